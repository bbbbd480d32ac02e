// Problems for the CUDA kernels of norms and rotations, and the scalar kernels' answers.
#pragma once

#include "cpu/index_query_rows.h"
#include "cpu/page_writer.h"
#include "cpu/scalar/rows.h"
#include "cuda/sm80/index_query.h"
#include "cuda/sm80/norm_rope.h"
#include "row_cases.h"

namespace dsv4::testing {

constexpr double kRowEps = 1e-5;

// On heads of rows.
enum class HeadOp { kQueryNormRope, kApplyRope, kApplyRopeBack, kIndexQuery };

struct QueryCase {
  int64_t tokens, heads, dim, rope_dim;
  float size = 3;
  int64_t shift = 0;  // elements by which operands begin off 16 bytes
  HeadOp op = HeadOp::kQueryNormRope;
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

  Status launch() {
    const AnyView<3> from = view_of<3>(query, false), turns = view_of<3>(rope, false), to = view_of<3>(result, false);
    switch (c.op) {
      case HeadOp::kQueryNormRope:
        return sm80::query_norm_rope({from, turns, kRowEps, to}, cuda_context());
      case HeadOp::kIndexQuery:
        return sm80::index_query({from, turns, to}, cuda_context());
      default:
        return sm80::apply_rope({from, turns, c.op == HeadOp::kApplyRopeBack, to}, cuda_context());
    }
  }
  std::string run() {
    const Status status = launch();
    if (!status.is_ok()) return status.message();
    if (!finish_device()) return "the kernel failed";
    result.download();
    return query.intact() && result.intact() && rope.intact() ? "" : "wrote outside of the result";
  }

  // As the definition has it, in float64.
  std::vector<X> expected(int64_t t, int64_t h) {
    if (c.op != HeadOp::kQueryNormRope) return scalar_head(t, h);
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
  // As the scalar kernel has it.
  std::vector<X> scalar_head(int64_t t, int64_t h) {
    std::vector<X> head(static_cast<size_t>(c.dim));
    AnyView<3> from = view_of<3>(query, true), turns = view_of<3>(rope, true), to = from;
    from.data = &query.at(t, h * c.dim);
    turns.data = &rope.at(t);
    to.data = head.data();
    for (AnyView<3>* view : {&from, &to}) view->shape[0] = view->shape[1] = 1;
    turns.shape[0] = 1;
    const Status status =
        c.op == HeadOp::kIndexQuery
            ? index_query_rows<X>(scalar::Lanes(), {from, turns, to}, scalar_context())
            : apply_rope_rows<X>(scalar::Lanes(), {from, turns, c.op == HeadOp::kApplyRopeBack, to}, scalar_context());
    CHECK_MESSAGE(status.is_ok(), status.message());
    return head;
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

// rms_norm, and kv_norm_rope where there are dims to rotate.
struct NormCase {
  int64_t rows, dim, rope_dim = -1;
  int weight = 2;  // none, bfloat16, float32
  float size = 3;
  int64_t shift = 0;
  uint64_t seed = 1;
};

template <class X>
struct NormProblem {
  NormCase c;
  DeviceTensor<X> x, result;
  DeviceTensor<float> rope, wide_weight;
  DeviceTensor<bf16> narrow_weight;

  explicit NormProblem(const NormCase& the_case)
      : c(the_case),
        x({c.rows, c.dim}, c.shift),
        result({c.rows, c.dim}, c.shift),
        rope({c.rows, c.rope_dim > 0 ? c.rope_dim / 2 : 0, 2}, c.shift),
        wide_weight({c.dim}),
        narrow_weight({c.dim}) {
    for (int64_t row = 0; row < c.rows; ++row) {
      Random random(c.seed * 1000003 + static_cast<uint64_t>(row));
      for (int64_t d = 0; d < c.dim; ++d) x.at(row, d) = from_float<X>(random.uniform(-c.size, c.size));
    }
    x.upload();
    Random random(c.seed);
    narrow_weight.fill(random, -1.5f, 1.5f);
    wide_weight.fill(random, -1.5f, 1.5f);
    fill_turns(rope, c.seed);
  }

  AnyView<1> weight(bool on_host) {
    if (c.weight == 0) return {};
    return c.weight == 1 ? view_of<1>(narrow_weight, on_host) : view_of<1>(wide_weight, on_host);
  }

  std::string run() {
    const AnyView<2> from = view_of<2>(x, false), to = view_of<2>(result, false);
    const Status status =
        c.rope_dim < 0
            ? sm80::rms_norm({from, weight(false), kRowEps, to}, cuda_context())
            : sm80::kv_norm_rope({from, weight(false), view_of<3>(rope, false), kRowEps, to}, cuda_context());
    if (!status.is_ok()) return status.message();
    if (!finish_device()) return "the kernel failed";
    result.download();
    return x.intact() && result.intact() && rope.intact() ? "" : "wrote outside of the result";
  }

  std::string wrong() {
    std::vector<X> expected(static_cast<size_t>(c.rows * (c.dim + c.shift)));
    AnyView<2> from = view_of<2>(x, true), to = from;
    to.data = expected.data();
    to.stride[0] = c.dim + c.shift;
    const Status status =
        c.rope_dim < 0
            ? rms_norm_rows<X>(scalar::Lanes(), {from, weight(true), kRowEps, to}, scalar_context())
            : kv_norm_rope_rows<X>(scalar::Lanes(), {from, weight(true), view_of<3>(rope, true), kRowEps, to},
                                   scalar_context());
    if (!status.is_ok()) return status.message();
    for (int64_t row = 0; row < c.rows; ++row) {
      for (int64_t d = 0; d < c.dim; ++d) {
        const X got = result.at(row, d), wanted = expected[static_cast<size_t>(row * (c.dim + c.shift) + d)];
        if (std::isnan(to_float(got)) && std::isnan(to_float(wanted))) continue;
        if (memcmp(&got, &wanted, sizeof(X)) == 0) continue;
        return "row " + std::to_string(row) + " dim " + std::to_string(d) + ": got " + std::to_string(to_float(got)) +
               ", expected " + std::to_string(to_float(wanted));
      }
    }
    return "";
  }
};

template <class X>
std::string try_norm(const NormCase& c) {
  NormProblem<X> p(c);
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
