// Launches of sizes that no test runs: the host's part of every op on views of memory that is not there, with kernels
// that are not run. A GPU takes at most 2^31 - 1 blocks by 65535.
#include "buffer.h"
#include "ops/attention.h"
#include "ops/compress.h"
#include "ops/index.h"
#include "ops/linear.h"
#include "ops/mhc.h"
#include "ops/moe.h"
#include "ops/norm_rope.h"
#include "ops/quantize.h"
#include "simt/control.h"

namespace {

using namespace dsv4;
using namespace dsv4::testing;

constexpr int64_t kMillion = int64_t{1} << 20, kMany = (int64_t{1} << 31) + 5;
void* const kNowhere = reinterpret_cast<void*>(uintptr_t{1} << 20);

// Dense, nowhere.
template <int N>
AnyView<N> of(DType dtype, const int64_t (&shape)[N]) {
  AnyView<N> view;
  view.data = kNowhere;
  view.dtype = dtype;
  int64_t stride = 1;
  for (int axis = N - 1; axis >= 0; --axis) {
    view.shape[axis] = shape[axis];
    view.stride[axis] = stride;
    stride *= shape[axis];
  }
  return view;
}
template <int N>
View<float, N> floats(const int64_t (&shape)[N]) {
  return of(DType::kFloat32, shape).template as<float>();
}
template <int N>
View<const float, N> constants(const int64_t (&shape)[N]) {
  return of(DType::kFloat32, shape).template as<const float>();
}

RowPool pool_of(DType dtype, int64_t pages, int64_t page_size, int64_t dim, int64_t sequences, int64_t blocks) {
  RowPool pool = {};
  pool.plain = of(dtype, {pages, page_size, dim});
  pool.table = of(DType::kInt32, {sequences, blocks});
  pool.page_size = page_size;
  return pool;
}

void check(const char* what, const Status& status) {
  CHECK_MESSAGE(status.is_ok(), std::string(what) + ": " + status.message());
}

template <class Check>
void each_type(const Check& check_type) {
  simt::Options options;
  options.launch_only = true;
  simt::configure(options);
  for (const DType x : {DType::kBFloat16, DType::kFloat32}) check_type(x, cuda_context());
  simt::configure({});
}

TEST(norms_and_rotations) {
  each_type([](DType x, const Context& context) {
    for (const auto& [rows, dim] : {std::pair(kMany, int64_t{2}), {kMillion, 7168}}) {
      const AnyView<2> all = of(x, {rows, dim});
      const AnyView<1> weight = of(DType::kFloat32, {dim});
      const AnyView<3> rope = of(DType::kFloat32, {rows, 1, 2});
      check("rms_norm", rms_norm({all, weight, 1e-6, all}, context));
      check("kv_norm_rope", kv_norm_rope({all, weight, rope, 1e-6, all}, context));
      NormRopeBackwardParams p = {all, all, weight, rope, 1e-6, all, weight, {}};
      p.workspace = {kNowhere, norm_rope_backward_workspace_bytes(p, context)};
      check("kv_norm_rope_backward", kv_norm_rope_backward(p, context));
      const AnyView<1> numbers = of(DType::kInt32, {rows});
      check("store_window",
            store_window({all, weight, rope, pool_of(x, 9, 64, dim, 3, 3), numbers, numbers, 1e-6, {}}, context));
      check("rope_rows", rope_rows({numbers, of(DType::kFloat32, {1}), rope}, context));
    }
    for (const auto& [tokens, heads, dim] : {std::tuple(kMany, int64_t{64}, int64_t{2}), {kMillion, 128, 512}}) {
      const AnyView<3> all = of(x, {tokens, heads, dim}), rope = of(DType::kFloat32, {tokens, 1, 2});
      check("query_norm_rope", query_norm_rope({all, rope, 1e-6, all}, context));
      check("query_norm_rope_backward", query_norm_rope_backward({all, all, rope, 1e-6, all}, context));
      check("apply_rope", apply_rope({all, rope, false, all}, context));
      check("index_query", index_query({all, rope, all}, context));
    }
  });
}

TEST(quantisers) {
  each_type([](DType x, const Context& context) {
    for (const auto& [rows, n] : {std::pair(kMany, int64_t{2}), {kMillion, 7168}}) {
      for (const int64_t block : {2, 128}) {
        const int64_t blocks = (n + block - 1) / block;
        const AnyView<2> scale = of(DType::kUInt8, {rows, blocks});
        check("quantize_fp8", quantize_fp8({of(x, {rows, n}), block, of(DType::kUInt8, {rows, n}), scale}, context));
        check("quantize_fp4",
              quantize_fp4({of(x, {rows, n}), block, of(DType::kUInt8, {rows, n / 2}), scale}, context));
        check("dequantize_fp8", dequantize_fp8({false, of(DType::kUInt8, {rows, 1, n}),
                                                of(DType::kUInt8, {rows, 1, blocks}), 1, block, of(x, {rows, 1, n})},
                                               context));
      }
    }
    for (const auto& [rows, n] : {std::pair(kMany, int64_t{2}), {kMillion, 8192}}) {
      check("hadamard", hadamard({of(x, {rows, n}), of(x, {rows, n}), {}}, context));
    }
  });
}

TEST(linears) {
  each_type([](DType x, const Context& context) {
    for (const auto& [tokens, in, out] : {std::tuple(kMany, int64_t{2}, int64_t{3}), {kMillion, 7168, 65536}}) {
      DenseLinearParams p = {of(x, {tokens, in}), of(x, {out, in}), of(x, {tokens, out}), {}};
      p.workspace = {kNowhere, dense_linear_workspace_bytes(p, context)};
      check("dense_linear", dense_linear(p, context));
      LinearParams q = {of(x, {tokens, 1, in}),
                        of(DType::kUInt8, {out, in}),
                        of(DType::kUInt8, {(out + 127) / 128, (in + 127) / 128}),
                        of(x, {tokens, 1, out}),
                        {}};
      q.workspace = {kNowhere, fp8_linear_workspace_bytes(q, context)};
      check("fp8_linear", fp8_linear(q, context));
    }
  });
}

TEST(experts) {
  each_type([](DType x, const Context& context) {
    for (const auto& [tokens, hidden, inter] :
         {std::tuple(kMillion * 64, int64_t{8}, int64_t{8}), {kMillion, 7168, 2048}}) {
      const int64_t experts = 256, top_k = 8;
      const AnyView<3> up = of(x, {experts, inter, hidden}), down = of(x, {experts, hidden, inter});
      const ExpertMatrix w1 = {WeightFormat::kPlain, up, {}}, w2 = {WeightFormat::kPlain, down, {}};
      MoeExpertsParams p = {};
      p.x = p.result = of(x, {tokens, hidden});
      p.weights = constants({tokens, top_k});
      p.indices = of(DType::kInt32, {tokens, top_k});
      p.w1 = p.w3 = w1;
      p.w2 = w2;
      p.workspace = {kNowhere, moe_experts_workspace_bytes(p, context)};
      check("moe_experts", moe_experts(p, context));
      MoeExpertsBackwardParams b = {};
      b.grad = b.x = b.grad_x = p.x;
      b.weights = p.weights;
      b.indices = p.indices;
      b.grad_weights = floats({tokens, top_k});
      for (int i = 0; i < 3; ++i) b.matrices[i] = b.grad_matrices[i] = i == 2 ? down : up;
      b.workspace = {kNowhere, moe_experts_backward_workspace_bytes(b, context)};
      check("moe_experts_backward", moe_experts_backward(b, context));
      MoeGateParams g = {p.x, of(x, {experts, hidden}), top_k, {}, {}, {}, 1, floats({tokens, top_k}), p.indices, {}};
      g.workspace = {kNowhere, moe_gate_workspace_bytes(g, context)};
      check("moe_gate", moe_gate(g, context));
    }
  });
}

TEST(hyper_connections) {
  each_type([](DType x, const Context& context) {
    for (const auto& [tokens, hidden] : {std::pair(kMillion * 1024, int64_t{4}), {kMillion, 7168}, {1, 1 << 24}}) {
      const AnyView<3> streams = of(x, {tokens, kStreams, hidden});
      const AnyView<2> rows = of(x, {tokens, hidden});
      const int64_t width = kStreams * hidden;
      const MhcMixing mixing = {constants({kMixes, width}), constants({3}), constants({kMixes}), 0, 0, 20};
      const auto post = constants({tokens, kStreams});
      const auto comb = constants({tokens, kStreams, kStreams});
      const MhcPostParams merged = {rows, streams, post, comb, streams};
      check("mhc_post", mhc_post(merged, context));
      MhcPreParams pre = {
          streams, mixing, of(x, {hidden}), 0, rows, floats({tokens, kStreams}), floats({tokens, kStreams, kStreams}),
          {}};
      pre.workspace = {kNowhere, mhc_pre_workspace_bytes(tokens, hidden, x, context)};
      check("mhc_pre", mhc_pre(pre, context));
      check("mhc_post_pre", mhc_post_pre({merged, pre}, context));
      check("mhc_post_backward", mhc_post_backward({streams, rows, streams, post, comb, rows, streams,
                                                    floats({tokens, kStreams}), floats({tokens, kStreams, kStreams})},
                                                   context));
      MhcPreBackwardParams back = {};
      back.grad_input = rows;
      back.grad_post = post, back.grad_comb = comb;
      back.streams = back.grad_streams = streams;
      back.mixing = mixing;
      back.grad_fn = floats({kMixes, width});
      back.grad_scale = floats({3}), back.grad_base = floats({kMixes});
      back.workspace = {kNowhere, mhc_pre_backward_workspace_bytes(tokens, hidden, x, context)};
      check("mhc_pre_backward", mhc_pre_backward(back, context));
    }
  });
}

TEST(attention) {
  each_type([](DType x, const Context& context) {
    // Rows of one split, and of several, whose results bound what a launch takes.
    for (const auto& [tokens, heads, dim, window] :
         {std::tuple(kMany, int64_t{1}, int64_t{2}, int64_t{64}), {kMillion, 128, 512, 640}}) {
      SparseAttentionParams p = {};
      p.query = p.out = of(x, {tokens, heads, dim});
      p.window_pool = pool_of(x, 1024, 256, dim, 3, 16);
      p.sequence = p.position = of(DType::kInt32, {tokens});
      p.sink = of(DType::kFloat32, {heads});
      p.window = window;
      p.lse = of(DType::kFloat32, {tokens, heads});
      p.workspace = {kNowhere, sparse_attention_workspace_bytes(p, context)};
      check("sparse_attention", sparse_attention(p, context));
      SparseAttentionBackwardParams b = {};
      b.forward = p;
      b.grad_out = b.grad_query = p.query;
      b.grad_lse = p.lse;
      b.grad_window = p.window_pool.plain;
      b.grad_sink = p.sink;
      b.workspace = {kNowhere, sparse_attention_backward_workspace_bytes(b, context)};
      check("sparse_attention_backward", sparse_attention_backward(b, context));
    }
  });
}

TEST(index_and_compress) {
  each_type([](DType x, const Context& context) {
    IndexTopkParams p = {};
    p.query = of(x, {kMillion, 64, 128});
    p.weights = constants({kMillion, 64});
    p.plain = of(x, {4096, 64, 128});
    p.table = of(DType::kInt32, {3, 4096});
    p.sequence = p.lengths = of(DType::kInt32, {kMillion});
    p.k = 512;
    p.page_size = 64;
    p.result = of(DType::kInt32, {kMillion, 512});
    p.workspace = {kNowhere, index_topk_workspace_bytes(p, context)};
    check("index_topk", index_topk(p, context));
    // Positions have 31 bits.
    for (const auto& [tokens, dim, ratio] : {std::tuple(kMany - 10, int64_t{2}, int64_t{1}), {kMillion, 512, 128}}) {
      const auto kv = constants({tokens, dim});
      const auto ape = constants({ratio, dim});
      const AnyView<1> weight = of(x, {dim}), numbers = of(DType::kInt32, {tokens});
      const AnyView<3> rope = of(DType::kFloat32, {tokens, 1, 2});
      const CompressParams c = {
          kv,      kv,    ape,  weight, rope, floats({3, ratio, 2, dim}), pool_of(x, 9, 64, dim, 3, 3), numbers,
          numbers, ratio, 1e-6, false,  {}};
      check("compress", compress(c, context));
      const int64_t entries = tokens / ratio;
      const AnyView<2> result = of(x, {entries, dim});
      const CompressEntriesParams e = {kv,    kv,   ape,   weight, of(DType::kFloat32, {entries, 1, 2}),
                                       ratio, 1e-6, false, result, {}};
      check("compress_entries", compress_entries(e, context));
      CompressEntriesBackwardParams b = {result, e, floats({tokens, dim}), floats({tokens, dim}), floats({ratio, dim}),
                                         weight};
      b.forward.workspace = {kNowhere, compress_entries_backward_workspace_bytes(b, context)};
      check("compress_entries_backward", compress_entries_backward(b, context));
    }
  });
}

}  // namespace
