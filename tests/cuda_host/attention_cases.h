// sparse_attention problems for the CUDA kernels: sequences in paged pools, the answer in float64, the comparison.
#pragma once

#include <algorithm>
#include <climits>
#include <cmath>
#include <map>
#include <string>
#include <utility>
#include <vector>

#include "buffer.h"
#include "common/pages.h"
#include "cuda/sm80/attention.h"

namespace dsv4::testing {

enum class Entries { kNone, kIndices, kLengths };
enum class RowForm { kFp8, kBf16, kF32 };

// Of a sequence: the first row's position, and how many rows.
struct Run {
  int start, rows;
};

struct AttentionCase {
  std::vector<Run> runs = {Run{40, 3}};
  int64_t heads = 16, head_dim = 64;
  Entries entries = Entries::kIndices;
  bool f32_query = false;
  RowForm window_rows = RowForm::kBf16, entry_rows = RowForm::kFp8;
  int64_t rope_dim = 16;  // of FP8 rows
  bool rotated = true;    // rope given, of that width
  int64_t window = 32, k = 24;
  int64_t window_page_size = 16, page_size = 8;
  int64_t ratio = 1;   // positions of an entry
  int64_t pad = 0;     // elements between a row's query, or out, and the next's
  int64_t blocks = 0;  // of the compressed pool's table, at least
  bool gaps = false;   // some pages are not stored
  uint64_t seed = 1;
  uint64_t placement = 1;  // of the pages
};

inline int64_t sum_of_rows(const AttentionCase& c) {
  int64_t rows = 0;
  for (const Run& run : c.runs) rows += run.rows;
  return rows;
}

// All of it in float32.
inline AttentionCase f32_case() {
  AttentionCase c;
  c.f32_query = true;
  c.window_rows = c.entry_rows = RowForm::kF32;
  return c;
}

// A pool whose content depends on the seed, the sequence and the entry alone, its places on `placement`. Whatever is
// not stored is NaN.
class TestPool {
 public:
  TestPool(const AttentionCase& c, RowForm form, int64_t page_size, const std::vector<int64_t>& counts, uint64_t salt,
           int64_t blocks)
      : form_(form),
        page_size_(page_size),
        head_dim_(c.head_dim),
        rope_dim_(c.rope_dim),
        blocks_(std::max(blocks_of(counts, page_size), blocks)),
        pages_(static_cast<int64_t>(counts.size()) * blocks_of(counts, page_size) + 2),
        table_({static_cast<int64_t>(counts.size()), std::max<int64_t>(blocks_, 1)}),
        plain_(plain_shape(RowForm::kBf16)),
        wide_(plain_shape(RowForm::kF32)),
        bytes_(form == RowForm::kFp8 ? Shape{pages_, fp8_page_bytes(page_size, c.head_dim, c.rope_dim)} : Shape{1, 1}) {
    std::vector<int32_t> free;
    for (int64_t page = 0; page < pages_; ++page) free.push_back(static_cast<int32_t>(page));
    Random order(c.placement * 977 + salt);
    for (size_t i = free.size() - 1; i > 0; --i) std::swap(free[i], free[order.bits() % (i + 1)]);
    for (int64_t s = 0; s < table_.rows(); ++s) {
      for (int64_t b = 0; b < table_.inner(); ++b) {
        const int64_t stored = counts[static_cast<size_t>(s)] - b * page_size;
        // Both numbers that mean "not stored": -1 and past the pool.
        table_.at(s, b) = b % 2 == 0 ? -1 : static_cast<int32_t>(pages_);
        if (stored <= 0 || (c.gaps && (s + b) % 3 == 1)) continue;
        const int32_t page = free.back();
        free.pop_back();
        table_.at(s, b) = page;
        for (int64_t offset = 0; offset < std::min(stored, page_size); ++offset) {
          fill(page, offset, s, b * page_size + offset, c.seed * 31 + salt);
        }
      }
    }
    table_.upload();
    upload();
  }

  RowPool view() {
    RowPool pool = {};
    pool.page_size = page_size_;
    pool.table = table_.any<2>();
    pool.table.dtype = DType::kInt32;
    pool.table.shape[1] = blocks_;
    if (form_ == RowForm::kFp8) {
      pool.bytes = bytes_.any<2>();
      pool.bytes.dtype = DType::kUInt8;
    } else {
      pool.plain = form_ == RowForm::kF32 ? wide_.any<3>() : plain_.any<3>();
    }
    return pool;
  }

  // The key's values, or nothing if it is not stored.
  const std::vector<double>* key(int64_t sequence, int64_t entry) const {
    const auto found = keys_.find({sequence, entry});
    return found == keys_.end() ? nullptr : &found->second;
  }
  RowForm form() const { return form_; }
  std::vector<int64_t> shape() const { return {pages_, page_size_, head_dim_}; }
  // Which row of the pool an entry is.
  int64_t row_of(int64_t sequence, int64_t entry) {
    return table_.at(sequence, entry / page_size_) * page_size_ + entry % page_size_;
  }
  bool intact() { return table_.intact() && plain_.intact() && wide_.intact() && bytes_.intact(); }

  // Makes one value of a stored key NaN.
  void spoil(int64_t sequence, int64_t entry) {
    const int64_t page = table_.at(sequence, entry / page_size_), offset = entry % page_size_;
    if (form_ == RowForm::kFp8) {
      bytes_.at(page, fp8_row_at(offset, head_dim_, rope_dim_) + 3) = 0xFF;
    } else if (form_ == RowForm::kF32) {
      wide_.at(page, offset * head_dim_ + 3) = NAN;
    } else {
      plain_.at(page, offset * head_dim_ + 3) = bf16{0x7FC0};
    }
    upload();
  }

 private:
  using Shape = std::vector<int64_t>;

  Shape plain_shape(RowForm form) const {
    return form == form_ ? Shape{pages_, page_size_, head_dim_} : Shape{1, 1, 1};
  }

  void upload() {
    plain_.upload();
    wide_.upload();
    bytes_.upload();
  }

  static int64_t blocks_of(const std::vector<int64_t>& counts, int64_t page_size) {
    return (*std::max_element(counts.begin(), counts.end()) + page_size - 1) / page_size;
  }

  void fill(int64_t page, int64_t offset, int64_t sequence, int64_t entry, uint64_t seed) {
    Random random(seed * 1000003 + static_cast<uint64_t>(sequence * 65537 + entry));
    std::vector<double>& key = keys_[{sequence, entry}];
    const float size = random.uniform(0.5f, 2.0f);
    const auto half = [&] { return from_float<bf16>(random.uniform(-size, size)); };
    for (int64_t d = 0; d < head_dim_ && form_ == RowForm::kF32; ++d) {
      key.push_back(wide_.at(page, offset * head_dim_ + d) = random.uniform(-size, size));
    }
    for (int64_t d = 0; d < head_dim_ && form_ == RowForm::kBf16; ++d) {
      key.push_back(to_float(plain_.at(page, offset * head_dim_ + d) = half()));
    }
    if (form_ != RowForm::kFp8) return;
    const int64_t row = fp8_row_at(offset, head_dim_, rope_dim_), nope = head_dim_ - rope_dim_;
    const int64_t scales = fp8_scales_at(offset, page_size_, head_dim_, rope_dim_);
    for (int64_t b = 0; b * kRowBlock < nope; ++b) {
      bytes_.at(page, scales + b) = static_cast<uint8_t>(116 + random.bits() % 4);
    }
    for (int64_t d = 0; d < nope; ++d) {
      uint8_t code = static_cast<uint8_t>(random.bits() >> 30);
      if ((code & 0x7F) == 0x7F) code ^= 1;
      bytes_.at(page, row + d) = code;
      key.push_back(static_cast<double>(e4m3_value(code)) *
                    static_cast<double>(e8m0_value(bytes_.at(page, scales + d / kRowBlock))));
    }
    for (int64_t d = 0; d < rope_dim_; ++d) {
      const bf16 value = half();
      memcpy(&bytes_.at(page, row + nope + 2 * d), &value, 2);
      key.push_back(to_float(value));
    }
  }

  RowForm form_;
  int64_t page_size_, head_dim_, rope_dim_, blocks_, pages_;
  DeviceTensor<int32_t> table_;
  DeviceTensor<bf16> plain_;
  DeviceTensor<float> wide_;
  DeviceTensor<uint8_t> bytes_;
  std::map<std::pair<int64_t, int64_t>, std::vector<double>> keys_;
};

// X: of queries and out.
template <class X = bf16>
struct AttentionProblem {
  AttentionCase c;
  int64_t rows;
  DeviceTensor<X> query, out;
  DeviceTensor<int32_t> sequence, position, indices, lengths;
  DeviceTensor<float> sink, rope, lse;
  TestPool raw, compressed;
  DeviceBytes workspace;
  float scale;

  explicit AttentionProblem(const AttentionCase& the_case)
      : c(the_case),
        rows(sum_of_rows(c)),
        query({rows, c.heads, c.head_dim}, c.pad),
        out({rows, c.heads, c.head_dim}, c.pad),
        sequence({rows}),
        position({rows}),
        indices({rows, c.k}),
        lengths({rows}),
        sink({c.heads}),
        rope({rows, std::max<int64_t>(c.rope_dim / 2, 1), 2}),
        lse({rows, c.heads}),
        raw(c, c.window_rows, c.window_page_size, ends(c, 1), 1, 0),
        compressed(c, c.entry_rows, c.page_size, ends(c, c.ratio), 2, c.blocks),
        workspace(static_cast<size_t>(workspace_bytes(c, rows))),
        scale(2.0f / std::sqrt(static_cast<float>(c.head_dim))) {
    int64_t row = 0;
    for (size_t s = 0; s < c.runs.size(); ++s) {
      for (int i = 0; i < c.runs[s].rows; ++i) fill_row(row++, static_cast<int>(s), c.runs[s].start + i);
    }
    Random random(c.seed + 5);
    sink.fill(random, -1, 3);
    upload();
  }

  void upload() {
    query.upload();
    sequence.upload();
    position.upload();
    indices.upload();
    lengths.upload();
    sink.upload();
    rope.upload();
  }

  SparseAttentionParams params() {
    SparseAttentionParams p = {};
    p.query = query.template any<3>();
    p.window_pool = raw.view();
    p.sequence = integers<1>(sequence);
    p.position = integers<1>(position);
    if (c.entries != Entries::kNone) {
      p.compressed = compressed.view();
      p.lengths = integers<1>(lengths);
    }
    if (c.entries == Entries::kIndices) p.indices = integers<2>(indices);
    p.sink = sink.any<1>();
    if (c.rotated && c.rope_dim > 0) p.rope = rope.any<3>();
    p.rope_dim = c.rope_dim;
    p.window = c.window;
    p.scale = scale;
    p.out = out.template any<3>();
    p.lse = lse.any<2>();
    p.workspace = {workspace.device(), workspace_bytes(c, rows)};
    return p;
  }

  bool intact() {
    return query.intact() && out.intact() && sequence.intact() && position.intact() && indices.intact() &&
           lengths.intact() && sink.intact() && rope.intact() && lse.intact() && raw.intact() && compressed.intact() &&
           workspace.intact();
  }

  // A key of a row: its values, and where they are.
  struct RowKey {
    const std::vector<double>* values;
    bool window;
    int64_t pool_row;
  };

  // The keys of a row, in order.
  std::vector<const std::vector<double>*> keys(int64_t row) {
    std::vector<const std::vector<double>*> found;
    for (const RowKey& key : placed_keys(row)) found.push_back(key.values);
    return found;
  }
  std::vector<RowKey> placed_keys(int64_t row) {
    std::vector<RowKey> found;
    const auto add = [&](TestPool& pool, int64_t s, int64_t entry) {
      const std::vector<double>* key = pool.key(s, entry);
      if (key != nullptr) found.push_back({key, &pool == &raw, pool.row_of(s, entry)});
    };
    const int64_t s = sequence.at(row), p = position.at(row), length = lengths.at(row);
    for (int64_t e = std::max<int64_t>(0, p - c.window + 1); e <= p; ++e) add(raw, s, e);
    for (int64_t i = 0; c.entries == Entries::kIndices && i < c.k; ++i) {
      const int64_t e = indices.at(row, i);
      if (e >= 0 && e < length) add(compressed, s, e);
    }
    for (int64_t e = 0; c.entries == Entries::kLengths && e < length; ++e) add(compressed, s, e);
    return found;
  }

 private:
  static std::vector<int64_t> ends(const AttentionCase& c, int64_t ratio) {
    std::vector<int64_t> counts;
    for (const Run& run : c.runs) counts.push_back((run.start + run.rows) / ratio);
    return counts;
  }

  template <int N>
  static AnyView<N> integers(DeviceTensor<int32_t>& tensor) {
    AnyView<N> view = tensor.any<N>();
    view.dtype = DType::kInt32;
    return view;
  }

  // Of the shapes alone.
  static int64_t workspace_bytes(const AttentionCase& c, int64_t rows) {
    SparseAttentionParams p = {};
    p.query.dtype = sizeof(X) == 2 ? DType::kBFloat16 : DType::kFloat32;
    p.query.shape[0] = rows, p.query.shape[1] = c.heads, p.query.shape[2] = c.head_dim;
    const auto blocks = [&](int64_t ratio, int64_t page_size) {
      const std::vector<int64_t> counts = ends(c, ratio);
      return std::max<int64_t>((*std::max_element(counts.begin(), counts.end()) + page_size - 1) / page_size, 1);
    };
    p.window = c.window;
    p.window_pool.page_size = c.window_page_size;
    p.window_pool.table.shape[1] = blocks(1, c.window_page_size);
    if (c.entries != Entries::kNone) {
      p.compressed.bytes.dtype = DType::kUInt8;
      p.compressed.page_size = c.page_size;
      p.compressed.table.shape[1] = std::max(blocks(c.ratio, c.page_size), c.blocks);
    }
    if (c.entries == Entries::kIndices) p.indices.dtype = DType::kInt32, p.indices.shape[1] = c.k;
    return sm80::sparse_attention_workspace_bytes(p, cuda_context());
  }

  // A row's content depends on the seed, its sequence and its position alone.
  void fill_row(int64_t row, int s, int p) {
    Random random(c.seed * 7919 + static_cast<uint64_t>(s * 1000003 + p));
    sequence.at(row) = s;
    position.at(row) = p;
    for (int64_t i = 0; i < query.inner(); ++i) query.at(row, i) = from_float<X>(random.uniform(-1, 1));
    for (int64_t i = 0; i < rope.inner() / 2; ++i) {
      const float angle = random.uniform(-3, 3);
      rope.at(row, 2 * i) = std::cos(angle);
      rope.at(row, 2 * i + 1) = std::sin(angle);
    }
    const int64_t length = (p + 1) / c.ratio;
    lengths.at(row) = static_cast<int32_t>(length);
    // Every other entry from a random one on, and things that are none among them.
    constexpr int32_t kNone[] = {-1, INT_MIN, INT_MAX, -7};
    int64_t entry = length > 2 * c.k ? static_cast<int64_t>(random.bits() % static_cast<uint64_t>(length)) : 0;
    for (int64_t i = 0; i < c.k; ++i) {
      const bool none = i >= length || (length > c.k && random.bits() % 5 == 0);
      indices.at(row, i) =
          none ? (i % 5 == 4 ? static_cast<int32_t>(length) : kNone[i % 4])
               : static_cast<int32_t>(length > 2 * c.k ? (entry + 2 * i) % length : (7 * i + 3) % length);
    }
    // (7 i + 3) % length repeats unless 7 does not divide length; then take them in order.
    for (int64_t i = 0; i < c.k && length <= 2 * c.k && length % 7 == 0; ++i) {
      indices.at(row, i) = i < length ? static_cast<int32_t>(length - 1 - i) : -1;
    }
    std::map<int32_t, int> seen;
    for (int64_t i = 0; i < c.k; ++i) {
      int32_t& index = indices.at(row, i);
      if (index >= 0 && seen[index]++ > 0) index = -1;
    }
  }
};

// Runs the kernels; the message of what went wrong, or nothing. heads_per_block: 0, as the op chooses.
template <class X>
std::string run_attention(AttentionProblem<X>& p, int heads_per_block = 0) {
  const SparseAttentionParams params = p.params();
  if (!sm80::accepts_sparse_attention(params)) return "not accepted";
  const Status status = heads_per_block == 0 ? sm80::sparse_attention(params, cuda_context())
                                             : sm80::sparse_attention(params, cuda_context(), heads_per_block);
  if (!status.is_ok()) return status.message();
  if (!finish_device()) return "the device reports an error";
  p.out.download();
  p.lse.download();
  return p.intact() ? "" : "something was written where it should not be";
}

// What the kernels made of the problem against float64: "" or the first value beyond its limit. Limits: half a unit in
// the last place for each rounding to X, of which the numerators' many, where X is bfloat16, average out (4 times their
// standard error), and 3e-6 for sums in float32.
template <class X>
std::string compare_attention(AttentionProblem<X>& p) {
  constexpr bool kNarrow = sizeof(X) == 2;
  constexpr int kBits = kNarrow ? 7 : 23;
  const auto spacing = [](double value) { return value == 0 ? 0 : std::ldexp(1.0, std::ilogb(value) - kBits); };
  const int64_t dim = p.c.head_dim, pairs = p.params().rope.given() ? p.c.rope_dim / 2 : 0;
  for (int64_t row = 0; row < p.rows; ++row) {
    const auto keys = p.keys(row);
    for (int64_t h = 0; h < p.c.heads; ++h) {
      std::vector<double> scores;
      double most = -INFINITY, total = 0;
      for (const auto* key : keys) {
        double score = 0;
        for (int64_t d = 0; d < dim; ++d) {
          score += static_cast<double>(to_float(p.query.at(row, h * dim + d))) * (*key)[static_cast<size_t>(d)];
        }
        scores.push_back(score * static_cast<double>(p.scale));
        most = std::max(most, scores.back());
      }
      for (double& score : scores) total += score = std::exp(score - most);
      const double divisor = total + std::exp(static_cast<double>(p.sink.at(h)) - most);
      std::vector<double> value(static_cast<size_t>(dim), 0.0), limit(value);
      for (int64_t d = 0; d < dim && !keys.empty(); ++d) {
        double squares = 0, size = 0;
        for (size_t j = 0; j < keys.size(); ++j) {
          const double term = scores[j] * (*keys[j])[static_cast<size_t>(d)] / divisor;
          value[static_cast<size_t>(d)] += term;
          squares += term * term;
          size += std::abs(term);
        }
        limit[static_cast<size_t>(d)] = 0.501 * spacing(value[static_cast<size_t>(d)]) +
                                        std::sqrt(squares) * (kNarrow ? 4 * 0.29 / 128 : 0) + 3e-6 * size;
      }
      for (int64_t i = 0; i < pairs; ++i) {
        const size_t at = static_cast<size_t>(dim - 2 * pairs + 2 * i);
        const double even = value[at], odd = value[at + 1], e = limit[at], o = limit[at + 1];
        const double cos = p.rope.at(row, 2 * i), sin = p.rope.at(row, 2 * i + 1);
        value[at] = even * cos + odd * sin;
        value[at + 1] = odd * cos - even * sin;
        limit[at] = std::abs(cos) * e + std::abs(sin) * o + 0.501 * spacing(value[at]) + 1e-6 * (e + o);
        limit[at + 1] = std::abs(cos) * o + std::abs(sin) * e + 0.501 * spacing(value[at + 1]) + 1e-6 * (e + o);
      }
      const auto wrong = [&](const char* name, int64_t d, double got, double expected, double allowed) {
        return std::string(name) + "[" + std::to_string(row) + ", " + std::to_string(h) + ", " + std::to_string(d) +
               "]: got " + std::to_string(got) + ", expected " + std::to_string(expected) + ", limit " +
               std::to_string(allowed);
      };
      for (int64_t d = 0; d < dim; ++d) {
        const double got = to_float(p.out.at(row, h * dim + d)), expected = value[static_cast<size_t>(d)];
        // A limit next to a power of two is that of the smaller spacing: allow the larger.
        const double allowed = limit[static_cast<size_t>(d)] * 1.02 + 1e-30;
        if (!(std::abs(got - expected) <= allowed)) return wrong("out", d, got, expected, allowed);
      }
      const double got = p.lse.at(row, h), expected = keys.empty() ? INFINITY : most + std::log(total);
      const double allowed = 3e-6 * (1 + std::abs(expected));
      if (keys.empty() ? got != expected : !(std::abs(got - expected) <= allowed)) {
        return wrong("lse", 0, got, expected, allowed);
      }
    }
  }
  return "";
}

template <class X>
std::string try_attention_of(const AttentionCase& c, int heads_per_block) {
  AttentionProblem<X> p(c);
  const std::string fault = run_attention(p, heads_per_block);
  return fault.empty() ? compare_attention(p) : fault;
}

inline std::string try_attention(const AttentionCase& c, int heads_per_block = 0) {
  return c.f32_query ? try_attention_of<float>(c, heads_per_block) : try_attention_of<bf16>(c, heads_per_block);
}

// Bits of a row's results.
template <class X>
std::vector<uint32_t> bits_of(AttentionProblem<X>& p, int64_t row) {
  std::vector<uint32_t> bits;
  for (int64_t i = 0; i < p.out.inner(); ++i) bits.push_back(bits_from_float(to_float(p.out.at(row, i))));
  for (int64_t h = 0; h < p.c.heads; ++h) bits.push_back(bits_from_float(p.lse.at(row, h)));
  return bits;
}

}  // namespace dsv4::testing
