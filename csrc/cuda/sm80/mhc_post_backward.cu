// The gradients of mhc_post: a block a token, 16 bytes a thread and access. A thread makes its pieces of the gradients
// of the sublayer's output and of the streams, and gathers its share of the 20 sums over the hidden width, which the
// block then adds at once (lane_sums.h). Reads 18 D and writes 10 D bytes a token in bfloat16, 80 D FLOP: bound by
// bandwidth.
#include "cuda/common/launch.h"
#include "cuda/sm80/lane_sums.h"
#include "cuda/sm80/mhc.h"
#include "cuda/sm80/mhc_launch.h"
#include "cuda/sm80/mhc_rows.h"

namespace dsv4::sm80 {

struct PostBackwardArguments {
  MhcPostBackwardParams p;
  bool vector;
};

namespace {

constexpr int kPostBackwardThreads = 128;
constexpr int kPostSums = 32, kCombSums = kStreams;  // 4 of post, 16 of comb, none
constexpr int kPostBackwardBytes = kPostBackwardThreads / 32 * kPostSums * 4;

// sum_k weight[k] x_k of four rows' pieces.
template <class X>
DSV4_DEVICE Words4 weighted(const float (&weight)[kStreams], const float (&x)[kStreams][kElements<X>]) {
  float sum[kElements<X>];
  DSV4_UNROLL
  for (int e = 0; e < kElements<X>; ++e) {
    sum[e] = ptx::multiply(weight[0], x[0][e]);
    DSV4_UNROLL
    for (int k = 1; k < kStreams; ++k) sum[e] = ptx::fma(weight[k], x[k][e], sum[e]);
  }
  return pack(sum);
}

DSV4_DEVICE Words4 stream_of(const TokenPiece& p, int i) {
  return i == 0 ? p.r0 : i == 1 ? p.r1 : i == 2 ? p.r2 : p.r3;
}

template <class X>
DSV4_DEVICE void post_piece(const PostBackwardArguments& a, int64_t token, int64_t column, const PostWeights& weights,
                            float (&sums)[kPostSums]) {
  constexpr int n = kElements<X>;
  const MhcPostBackwardParams& p = a.p;
  const int64_t hidden = p.streams.size(2);
  const auto load = [&](const X* row) { return load_piece(row, column, hidden, a.vector); };
  const TokenPiece of_grad = {load(row_of<X>(p.grad_result, token, 0)), load(row_of<X>(p.grad_result, token, 1)),
                              load(row_of<X>(p.grad_result, token, 2)), load(row_of<X>(p.grad_result, token, 3)),
                              load(row_of<X>(p.sublayer, token))};
  const TokenPiece old = {load(row_of<X>(p.streams, token, 0)),
                          load(row_of<X>(p.streams, token, 1)),
                          load(row_of<X>(p.streams, token, 2)),
                          load(row_of<X>(p.streams, token, 3)),
                          {}};
  float g[kStreams][n], x[n];
  unpack(of_grad.y, x);
  DSV4_UNROLL
  for (int o = 0; o < kStreams; ++o) {
    unpack(stream_of(of_grad, o), g[o]);
    DSV4_UNROLL
    for (int e = 0; e < n; ++e) sums[o] = ptx::fma(g[o][e], x[e], sums[o]);
  }
  store_piece(row_of<X>(p.grad_sublayer, token), column, hidden, a.vector, weighted<X>(weights.post, g));
  DSV4_UNROLL
  for (int i = 0; i < kStreams; ++i) {
    unpack(stream_of(old, i), x);
    DSV4_UNROLL
    for (int o = 0; o < kStreams; ++o) {
      float& sum = sums[kCombSums + kStreams * i + o];
      DSV4_UNROLL
      for (int e = 0; e < n; ++e) sum = ptx::fma(g[o][e], x[e], sum);
    }
    store_piece(row_of<X>(p.grad_streams, token, i), column, hidden, a.vector, weighted<X>(weights.comb[i], g));
  }
}

template <class X>
DSV4_DEVICE void post_backward(const PostBackwardArguments& a) {
  const MhcPostBackwardParams& p = a.p;
  const int64_t token = ptx::block_index_x(), hidden = p.streams.size(2);
  PostWeights weights;
  weights.load(p.post, p.comb, token);
  float sums[kPostSums] = {};
  for (int64_t column = ptx::thread_index() * kElements<X>; column < hidden;
       column += kPostBackwardThreads * kElements<X>) {
    post_piece<X>(a, token, column, weights, sums);
  }
  const float sum = sum_of_block<kPostBackwardThreads>(sums);
  const int lane = ptx::thread_index();
  if (lane < kStreams) {
    p.grad_post.data[token * p.grad_post.stride[0] + lane] = sum;
  } else if (lane < kCombSums + kStreams * kStreams) {
    p.grad_comb.data[token * p.grad_comb.stride[0] + lane - kCombSums] = sum;
  }
}

}  // namespace

DSV4_KERNEL(kPostBackwardThreads, 4) sm80_bf16_mhc_post_backward(const PostBackwardArguments a) {
  post_backward<bf16>(a);
}
DSV4_KERNEL(kPostBackwardThreads, 4) sm80_f32_mhc_post_backward(const PostBackwardArguments a) {
  post_backward<float>(a);
}

Status mhc_post_backward(const MhcPostBackwardParams& p, const Context& context) {
  if (p.streams.size(0) == 0) return Status::ok();
  cuda::LaunchShape shape;
  shape.blocks_x = p.streams.size(0);
  shape.threads = kPostBackwardThreads;
  shape.shared_bytes = kPostBackwardBytes;
  const bool vector = in_pieces(p.grad_result) && in_pieces(p.sublayer) && in_pieces(p.streams) &&
                      in_pieces(p.grad_sublayer) && in_pieces(p.grad_streams);
  const auto kernel = p.streams.dtype == DType::kFloat32 ? sm80_f32_mhc_post_backward : sm80_bf16_mhc_post_backward;
  return cuda::launch("mhc_post_backward", kernel, shape, context, PostBackwardArguments{p, vector});
}

}  // namespace dsv4::sm80
