// Problems for the CUDA kernels of norms and rotations, and the scalar kernels' answers.
#pragma once

#include "cpu/page_writer.h"
#include "cpu/scalar/rows.h"
#include "cuda/sm80/norm_rope.h"
#include "row_cases.h"

namespace dsv4::testing {

constexpr double kRowEps = 1e-5;

struct QueryCase {
  int64_t tokens, heads, dim, rope_dim;
  float size = 3;
  int64_t shift = 0;  // elements by which operands begin off 16 bytes
  uint64_t seed = 1;
};

template <class X>
struct QueryProblem {
  QueryCase c;
  DeviceTensor<X> query, result;
  DeviceTensor<float> rope;

  explicit QueryProblem(const QueryCase& the_case)
      : c(the_case),
        query({c.tokens, c.heads, c.dim}, c.shift),
        result({c.tokens, c.heads, c.dim}, c.shift),
        rope({c.tokens, c.rope_dim / 2, 2}, c.shift) {
    for (int64_t t = 0; t < c.tokens; ++t) {
      Random random(c.seed * 1000003 + static_cast<uint64_t>(t));
      for (int64_t i = 0; i < query.inner(); ++i) query.at(t, i) = from_float<X>(random.uniform(-c.size, c.size));
    }
    query.upload();
    fill_turns(rope, c.seed);
  }

  std::string run() {
    const Status status = sm80::query_norm_rope(
        {view_of<3>(query, false), view_of<3>(rope, false), kRowEps, view_of<3>(result, false)}, cuda_context());
    if (!status.is_ok()) return status.message();
    if (!finish_device()) return "the kernel failed";
    result.download();
    return query.intact() && result.intact() && rope.intact() ? "" : "wrote outside of the result";
  }

  // As the definition has it, in float64.
  std::vector<X> expected(int64_t t, int64_t h) {
    const auto rounded = [](double value) -> double { return scalar::Lanes::rounded<X>(value); };
    const X* q = &query.at(t, h * c.dim);
    double sum = 0;
    for (int64_t d = 0; d < c.dim; ++d) sum += rounded(to_float(q[d]) * to_float(q[d]));
    const double mean = rounded(sum / static_cast<double>(c.dim));
    const float root = static_cast<float>(rounded(1 / std::sqrt(rounded(mean + kRowEps))));
    std::vector<float> row;
    for (int64_t d = 0; d < c.dim; ++d) row.push_back(to_float(from_float<X>(to_float(q[d]) * root)));
    if (c.rope_dim > 0) scalar::Lanes().rotate<X>(&row[c.dim - c.rope_dim], &rope.at(t), c.rope_dim / 2);
    std::vector<X> result_row;
    for (const float value : row) result_row.push_back(from_float<X>(value));
    return result_row;
  }

  std::string wrong() {
    for (int64_t t = 0; t < c.tokens; ++t) {
      for (int64_t h = 0; h < c.heads; ++h) {
        const std::vector<X> row = expected(t, h);
        for (int64_t d = 0; d < c.dim; ++d) {
          const X got = result.at(t, h * c.dim + d), wanted = row[static_cast<size_t>(d)];
          const bool nan = std::isnan(to_float(got)) && std::isnan(to_float(wanted));
          if (nan || memcmp(&got, &wanted, sizeof(X)) == 0) continue;
          return "row " + std::to_string(t) + " head " + std::to_string(h) + " dim " + std::to_string(d) + ": got " +
                 std::to_string(to_float(got)) + ", expected " + std::to_string(to_float(wanted));
        }
      }
    }
    return "";
  }
};

template <class X>
std::string try_queries(const QueryCase& c) {
  QueryProblem<X> p(c);
  const std::string fault = p.run();
  return fault.empty() ? p.wrong() : fault;
}

struct WindowCase {
  int64_t tokens, dim, rope_dim;
  PageFormat format = PageFormat::kFp8Rows;
  int64_t page_size = 4;
  bool wide_weight = true;
  float size = 3;
  int64_t shift = 0;
  uint64_t seed = 1;
};

// Rows of three sequences, positions apart and some beyond the table.
template <class X>
struct WindowProblem {
  static constexpr int64_t kBlocks = 5;

  WindowCase c;
  DeviceTensor<X> kv;
  DeviceTensor<float> rope, wide_weight;
  DeviceTensor<bf16> narrow_weight;
  DeviceTensor<int32_t> sequence, position;
  PoolMemory pool;

  explicit WindowProblem(const WindowCase& the_case)
      : c(the_case),
        kv({c.tokens, c.dim}, c.shift),
        rope({c.tokens, c.rope_dim / 2, 2}, c.shift),
        wide_weight({c.dim}),
        narrow_weight({c.dim}),
        sequence({c.tokens}),
        position({c.tokens}),
        pool(c.format, 3, kBlocks, c.page_size, c.dim, c.rope_dim, c.shift * 4) {
    for (int64_t t = 0; t < c.tokens; ++t) {
      Random random(c.seed * 1000003 + static_cast<uint64_t>(t));
      const float size = c.size * std::exp2(std::round(random.uniform(-3, 3)));
      for (int64_t d = 0; d < c.dim; ++d) kv.at(t, d) = from_float<X>(random.uniform(-size, size));
      sequence.at(t) = static_cast<int32_t>(t % 3);
      position.at(t) = static_cast<int32_t>(t / 3 * 13 % (kBlocks * c.page_size + 2));
    }
    Random random(c.seed);
    narrow_weight.fill(random, -1.5f, 1.5f);
    wide_weight.fill(random, -1.5f, 1.5f);
    fill_turns(rope, c.seed);
    upload();
  }

  void upload() {
    kv.upload();
    wide_weight.upload();
    sequence.upload();
    position.upload();
  }

  StoreWindowParams params(bool on_host) {
    const AnyView<1> weight = c.wide_weight ? view_of<1>(wide_weight, on_host) : view_of<1>(narrow_weight, on_host);
    return {view_of<2>(kv, on_host),
            weight,
            view_of<3>(rope, on_host),
            pool.pool(on_host),
            view_of<1>(sequence, on_host),
            view_of<1>(position, on_host),
            kRowEps,
            {}};
  }

  // What went wrong, or nothing.
  std::string run() {
    const Status status = sm80::store_window(params(false), cuda_context());
    if (!status.is_ok()) return status.message();
    if (!finish_device()) return "the kernel failed";
    return kv.intact() && rope.intact() && sequence.intact() && position.intact() ? "" : "wrote to an operand";
  }

  std::string wrong() {
    StoreWindowParams p = params(true);
    std::vector<float> row(static_cast<size_t>(c.dim) + 16);
    p.workspace = {row.data(), row_workspace_bytes(1, c.dim, scalar_context())};
    const Status status = store_window_rows<X>(scalar::Lanes(), p, scalar_context());
    return status.is_ok() ? pool.wrong_bytes() : status.message();
  }
};

template <class X>
std::string try_window(const WindowCase& c) {
  WindowProblem<X> p(c);
  const std::string fault = p.run();
  return fault.empty() ? p.wrong() : fault;
}

}  // namespace dsv4::testing
