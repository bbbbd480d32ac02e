// index_topk problems for the CUDA kernels: inputs, the answer in float64, and the comparison.
#pragma once

#include <algorithm>
#include <cmath>
#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "buffer.h"
#include "common/pages.h"
#include "cuda/sm80/index.h"
#include "cuda/sm90/index.h"
#include "ops/index_keys.h"

namespace dsv4::testing {

struct IndexCase {
  int64_t tokens, heads, dim, k;
  IndexKeyFormat format = IndexKeyFormat::kFp4;
  int64_t page_size = 8, blocks = 20, sequences = 2;
  bool exact = true;        // whole numbers and powers of two: scores are the same in any order of summation
  bool wide_query = false;  // float32
  uint64_t seed = 1;
};

// The cut of a call; 0: what the op takes.
struct IndexCutCase {
  int64_t group_rows = 0;
  int rows_per_block = 0;
  int64_t range = 0;
  bool by_warpgroups = false;  // Hopper's kernel
};

// Whether the device has Hopper's kernel for a case.
inline bool has_index_by_warpgroups(const IndexCase& c) {
  return has_warpgroups() && !c.wide_query && c.format != IndexKeyFormat::kFloat32 && c.dim > 96 && c.dim <= 128;
}

struct IndexProblem {
  IndexCase c;
  int64_t pages, page_bytes;
  DeviceTensor<bf16> narrow_query, narrow_pages;
  DeviceTensor<float> wide_query, wide_pages, weights;
  DeviceTensor<uint8_t> bytes;
  DeviceTensor<int32_t> table, sequence, lengths, result;
  std::unique_ptr<DeviceBytes> workspace;
  sm80::IndexCut cut;

  explicit IndexProblem(const IndexCase& the_case)
      : c(the_case),
        pages(c.sequences * c.blocks + 3),
        page_bytes(c.page_size * (c.format == IndexKeyFormat::kFp4 ? fp4_key_bytes(c.dim) : fp8_key_bytes(c.dim))),
        narrow_query({c.wide_query ? 0 : c.tokens, c.heads, c.dim}),
        narrow_pages({c.format == IndexKeyFormat::kBFloat16 ? pages : 0, c.page_size, c.dim}),
        wide_query({c.wide_query ? c.tokens : 0, c.heads, c.dim}),
        wide_pages({c.format == IndexKeyFormat::kFloat32 ? pages : 0, c.page_size, c.dim}),
        weights({c.tokens, c.heads}),
        bytes({quantised() ? pages : 0, page_bytes}),
        table({c.sequences, c.blocks}),
        sequence({c.tokens}),
        lengths({c.tokens}),
        result({c.tokens, c.k}) {
    fill_keys();
    // A row's data depends on its number alone, not on how many there are.
    for (int64_t t = 0; t < c.tokens; ++t) {
      Random random(c.seed * 1000003 + static_cast<uint64_t>(t) + 1);
      for (int64_t i = 0; i < c.heads * c.dim; ++i) set_query(t, i, number(random, 3));
      for (int64_t h = 0; h < c.heads; ++h) weights.at(t, h) = number(random, 2.6f);
      sequence.at(t) = static_cast<int32_t>(t / 3 % c.sequences);
      lengths.at(t) = static_cast<int32_t>(random.uniform(0, static_cast<float>(entries() + 8)));
    }
    upload();
  }

  bool quantised() const { return c.format == IndexKeyFormat::kFp4 || c.format == IndexKeyFormat::kFp8; }
  int64_t entries() const { return c.blocks * c.page_size; }
  float number(Random& random, float most) const {
    const float value = random.uniform(-most, most);
    return c.exact ? std::round(value) : value;
  }
  void set_query(int64_t t, int64_t i, float value) {
    if (c.wide_query) {
      wide_query.at(t, i) = value;
    } else {
      narrow_query.at(t, i) = from_float<bf16>(value);
    }
  }
  float query_at(int64_t t, int64_t i) { return c.wide_query ? wide_query.at(t, i) : to_float(narrow_query.at(t, i)); }

  uint8_t& fp4_scale(int64_t page, int64_t offset, int64_t unit) {
    return bytes.at(page, c.page_size * (c.dim / 2) + offset * (c.dim / 32) + unit);
  }
  uint8_t* fp8_scale(int64_t page, int64_t offset) { return &bytes.at(page, c.page_size * c.dim + 4 * offset); }

  void fill_key(Random& random, int64_t page, int64_t offset) {
    switch (c.format) {
      case IndexKeyFormat::kFp4:
        for (int64_t i = 0; i < c.dim / 2; ++i) {
          bytes.at(page, offset * (c.dim / 2) + i) = static_cast<uint8_t>(random.bits() >> 20);
        }
        for (int64_t i = 0; i < c.dim / 32; ++i) {
          fp4_scale(page, offset, i) = static_cast<uint8_t>(126 + (random.bits() >> 20) % (c.exact ? 3 : 9));
        }
        break;
      case IndexKeyFormat::kFp8: {
        for (int64_t d = 0; d < c.dim; ++d) {
          const auto magnitude = c.exact ? 0x30 + (random.bits() >> 20) % 16 : (random.bits() >> 20) % 0x7F;
          bytes.at(page, offset * c.dim + d) = static_cast<uint8_t>(magnitude | (random.bits() >> 20) % 2 << 7);
        }
        const float scale = c.exact ? 0.5f : random.uniform(0.01f, 0.02f);
        memcpy(fp8_scale(page, offset), &scale, 4);
        break;
      }
      case IndexKeyFormat::kBFloat16:
        for (int64_t d = 0; d < c.dim; ++d)
          narrow_pages.at(page, offset * c.dim + d) = from_float<bf16>(number(random, 4));
        break;
      case IndexKeyFormat::kFloat32:
        for (int64_t d = 0; d < c.dim; ++d) wide_pages.at(page, offset * c.dim + d) = number(random, 4);
        break;
    }
  }

  // Pages in a scattered order, some not stored (-1, or beyond the pool); the spare ones stay NaN.
  void fill_keys() {
    Random random(c.seed);
    std::vector<int64_t> order;
    for (int64_t page = 0; page < pages; ++page) order.push_back(page);
    for (size_t i = order.size() - 1; i > 0; --i) std::swap(order[i], order[(random.bits() >> 20) % (i + 1)]);
    for (int64_t s = 0; s < c.sequences; ++s) {
      for (int64_t b = 0; b < c.blocks; ++b) {
        const int64_t page = order[static_cast<size_t>(s * c.blocks + b)];
        table.at(s, b) = static_cast<int32_t>(b % 7 == 5 ? -1 : b % 11 == 9 ? pages : page);
        for (int64_t offset = 0; offset < c.page_size && stored(s, b); ++offset) fill_key(random, page, offset);
      }
    }
  }
  bool stored(int64_t s, int64_t b) { return table.at(s, b) >= 0 && table.at(s, b) < pages; }

  void spoil(int64_t page, int64_t offset) {
    for (int64_t d = 0; d < c.dim; ++d) {
      if (c.format == IndexKeyFormat::kFp4) fp4_scale(page, offset, d / 32) = 0xFF;
      if (c.format == IndexKeyFormat::kFp8) bytes.at(page, offset * c.dim + d) = 0x7F;
      if (c.format == IndexKeyFormat::kBFloat16) narrow_pages.at(page, offset * c.dim + d) = from_float<bf16>(NAN);
      if (c.format == IndexKeyFormat::kFloat32) wide_pages.at(page, offset * c.dim + d) = NAN;
    }
  }

  double key_at(int64_t page, int64_t offset, int64_t d) {
    switch (c.format) {
      case IndexKeyFormat::kFp4: {
        const int code = bytes.at(page, offset * (c.dim / 2) + d / 2) >> (d % 2 * 4) & 15;
        return static_cast<double>(e2m1_value(static_cast<uint8_t>(code))) *
               e8m0_value(fp4_scale(page, offset, d / 32));
      }
      case IndexKeyFormat::kFp8: {
        float scale;
        memcpy(&scale, fp8_scale(page, offset), 4);
        return static_cast<double>(e4m3_value(bytes.at(page, offset * c.dim + d))) * scale;
      }
      case IndexKeyFormat::kBFloat16:
        return to_float(narrow_pages.at(page, offset * c.dim + d));
      default:
        return wide_pages.at(page, offset * c.dim + d);
    }
  }

  int64_t visible(int64_t t) {
    const int64_t s = sequence.at(t);
    return s < 0 || s >= c.sequences ? 0 : std::clamp<int64_t>(lengths.at(t), 0, entries());
  }

  // Scores of a row in float64, NaN where there is none; terms: sums of their absolute terms.
  std::vector<double> scores64(int64_t t, std::vector<double>* terms = nullptr) {
    std::vector<double> scores;
    for (int64_t j = 0; j < visible(t); ++j) {
      const int64_t s = sequence.at(t), b = j / c.page_size;
      double score = 0, all = 0;
      for (int64_t h = 0; h < c.heads && stored(s, b); ++h) {
        double product = 0, absolute = 0;
        for (int64_t d = 0; d < c.dim; ++d) {
          const double term = query_at(t, h * c.dim + d) * key_at(table.at(s, b), j % c.page_size, d);
          product += term;
          absolute += std::abs(term);
        }
        score += weights.at(t, h) * (product < 0 ? 0 : product);
        all += std::abs(weights.at(t, h)) * absolute;
      }
      scores.push_back(stored(s, b) ? score : NAN);
      if (terms != nullptr) terms->push_back(all);
    }
    return scores;
  }

  IndexTopkParams params() {
    IndexTopkParams p = {};
    p.query = c.wide_query ? wide_query.any<3>() : narrow_query.any<3>();
    p.weights = weights.const_view<2>();
    if (quantised()) {
      p.bytes = bytes.any<2>();
    } else {
      p.plain = c.format == IndexKeyFormat::kFloat32 ? wide_pages.any<3>() : narrow_pages.any<3>();
    }
    p.table = table.any<2>();
    p.sequence = sequence.any<1>();
    p.lengths = lengths.any<1>();
    p.result = result.any<2>();
    p.k = c.k;
    p.page_size = c.page_size;
    return p;
  }

  void upload() {
    narrow_query.upload();
    narrow_pages.upload();
    wide_query.upload();
    wide_pages.upload();
    weights.upload();
    bytes.upload();
    table.upload();
    sequence.upload();
    lengths.upload();
  }
  bool intact() {
    return narrow_query.intact() && narrow_pages.intact() && wide_query.intact() && wide_pages.intact() &&
           weights.intact() && bytes.intact() && table.intact() && sequence.intact() && lengths.intact() &&
           result.intact() && workspace->intact();
  }

  // The message of what went wrong, or nothing.
  std::string run(const IndexCutCase& wanted = {}) { return run(params(), wanted); }
  std::string run(IndexTopkParams p, const IndexCutCase& wanted = {}) {
    cut = sm80::index_cut(p);
    if (wanted.group_rows > 0) cut.group_rows = wanted.group_rows;
    if (wanted.rows_per_block > 0) cut.rows_per_block = wanted.rows_per_block;
    if (wanted.range > 0) cut.range = wanted.range;
    const int64_t needed = sm80::index_topk_workspace_bytes(p, cut);
    workspace = std::make_unique<DeviceBytes>(static_cast<size_t>(needed));
    p.workspace = {workspace->device(), needed};
#if defined(DSV4_WITH_SM90)
    if (wanted.by_warpgroups) return finish(sm90::index_topk(p, cut, cuda_context()));
#endif
    return finish(sm80::index_topk(p, cut, cuda_context()));
  }
  std::string finish(const Status& status) {
    if (!status.is_ok()) return status.message();
    if (!finish_device()) return "the kernel failed";
    result.download();
    workspace->download();
    return intact() ? "" : "wrote outside its outputs";
  }

  std::vector<int32_t> chosen(int64_t t) { return std::vector<int32_t>(&result.at(t), &result.at(t) + c.k); }
  // As the kernels ordered them: bits that differ where scores do. Of a call whose rows formed one group.
  std::vector<uint32_t> score_bits(int64_t t) {
    const uint32_t* from = static_cast<const uint32_t*>(workspace->host()) + t * entries();
    return std::vector<uint32_t>(from, from + visible(t));
  }
};

// The entries of the k highest scores, of equal ones the lower, ascending, then -1.
inline std::vector<int32_t> best_of(const std::vector<float>& scores, int64_t k) {
  std::vector<int32_t> entries;
  for (size_t j = 0; j < scores.size(); ++j) {
    if (!std::isnan(scores[j])) entries.push_back(static_cast<int32_t>(j));
  }
  std::stable_sort(entries.begin(), entries.end(), [&](int32_t a, int32_t b) { return scores[a] > scores[b]; });
  entries.resize(std::min<size_t>(entries.size(), static_cast<size_t>(k)));
  std::sort(entries.begin(), entries.end());
  entries.resize(static_cast<size_t>(k), -1);
  return entries;
}

// What is wrong with a row's result, or nothing. Exact problems have one answer; in others an entry may take the place
// of one whose score is as close as float32 sums are.
inline std::string wrong_row(IndexProblem& p, int64_t t) {
  std::vector<double> terms;
  const std::vector<double> scores = p.scores64(t, &terms);
  std::vector<float> rounded(scores.begin(), scores.end());
  const std::vector<int32_t> expected = best_of(rounded, p.c.k), got = p.chosen(t);
  if (got == expected) return "";
  for (size_t i = 0; p.c.exact && i < got.size(); ++i) {
    if (got[i] == expected[i]) continue;
    return "row " + std::to_string(t) + "[" + std::to_string(i) + "]: got " + std::to_string(got[i]) + ", expected " +
           std::to_string(expected[i]);
  }
  std::vector<bool> taken(scores.size(), false);
  for (size_t i = 0; i < got.size(); ++i) {
    if ((got[i] < 0) != (expected[i] < 0)) return "row " + std::to_string(t) + ": not as many as expected";
    if (got[i] < 0) continue;
    if (static_cast<size_t>(got[i]) >= scores.size() || (i > 0 && got[i] <= got[i - 1]) || std::isnan(scores[got[i]])) {
      return "row " + std::to_string(t) + ": " + std::to_string(got[i]) + " is out of order or cannot be chosen";
    }
    taken[got[i]] = true;
  }
  double worst_taken = INFINITY, best_left = -INFINITY, close = 0;
  for (size_t j = 0; j < scores.size(); ++j) {
    if (std::isnan(scores[j])) continue;
    close = std::max(close, 1e-6 * terms[j]);
    if (taken[j]) {
      worst_taken = std::min(worst_taken, scores[j]);
    } else {
      best_left = std::max(best_left, scores[j]);
    }
  }
  if (best_left - worst_taken <= 2 * close) return "";
  return "row " + std::to_string(t) + ": left " + std::to_string(best_left) + ", took " + std::to_string(worst_taken);
}

inline std::string wrong_rows(IndexProblem& p) {
  for (int64_t t = 0; t < p.c.tokens; ++t) {
    const std::string wrong = wrong_row(p, t);
    if (!wrong.empty()) return wrong;
  }
  return "";
}

inline std::string try_index(const IndexCase& c, const IndexCutCase& cut = {}) {
  IndexProblem p(c);
  const std::string fault = p.run(cut);
  return fault.empty() ? wrong_rows(p) : fault;
}

}  // namespace dsv4::testing
