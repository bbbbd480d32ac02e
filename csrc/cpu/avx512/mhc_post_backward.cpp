// The gradient of mhc_post in one pass: 80 D FLOPs for 28 D + 160 bytes a token, bound by memory.
#include "cpu/avx512/mhc_forward.h"

namespace dsv4::avx512 {
namespace {

struct PostToken {
  const float *post, *comb;
  __m512 grad_post[4], grad_comb[16];
};

template <Store kStore, class X>
DSV4_INLINE void post_backward_step(const X* grad, int64_t grad_stride, const X* y, const X* r, int64_t stride,
                                    X* grad_y, X* grad_r, int64_t grad_r_stride, int64_t count, PostToken* token) {
  constexpr bool kPart = kStore == Store::kPart;
  Pair g[kStreams];
#pragma GCC unroll 4
  for (int o = 0; o < kStreams; ++o) g[o] = get<kPart>(grad + o * grad_stride, count);
  const Pair sublayer = get<kPart>(y, count);
  Pair sum = scaled(g[0], _mm512_set1_ps(token->post[0]));
#pragma GCC unroll 4
  for (int o = 0; o < kStreams; ++o) {
    if (o > 0) sum = fma(g[o], _mm512_set1_ps(token->post[o]), sum);
    token->grad_post[o] = dot(g[o], sublayer, token->grad_post[o]);
  }
  put<kStore>(grad_y, sum, count);
#pragma GCC unroll 4
  for (int i = 0; i < kStreams; ++i) {
    const Pair in = get<kPart>(r + i * stride, count);
    Pair back = scaled(g[0], _mm512_set1_ps(token->comb[4 * i]));
#pragma GCC unroll 4
    for (int o = 0; o < kStreams; ++o) {
      if (o > 0) back = fma(g[o], _mm512_set1_ps(token->comb[4 * i + o]), back);
      token->grad_comb[4 * i + o] = dot(in, g[o], token->grad_comb[4 * i + o]);
    }
    put<kStore>(grad_r + i * grad_r_stride, back, count);
  }
}

template <class X, Store kStore>
void post_tokens_backward(const MhcPostBackwardParams& a, int64_t begin, int64_t end) {
  const Rows<X> streams(a.streams), grads(a.grad_result);
  const int64_t hidden = streams.hidden, out_stride = a.grad_streams.stride[1];
  for (int64_t t = begin; t < end; ++t) {
    PostToken token;
    token.post = a.post.data + t * a.post.stride[0];
    token.comb = a.comb.data + t * a.comb.stride[0];
    for (__m512& x : token.grad_post) x = _mm512_setzero_ps();
    for (__m512& x : token.grad_comb) x = _mm512_setzero_ps();
    const X *g = grads.data + t * grads.token, *r = streams.data + t * streams.token;
    const X* y = static_cast<const X*>(a.sublayer.data) + t * a.sublayer.stride[0];
    X* grad_y = static_cast<X*>(a.grad_sublayer.data) + t * a.grad_sublayer.stride[0];
    X* grad_r = static_cast<X*>(a.grad_streams.data) + t * a.grad_streams.stride[0];
    int64_t d = 0;
    for (; d + kStep <= hidden; d += kStep) {
      post_backward_step<kStore>(g + d, grads.stream, y + d, r + d, streams.stream, grad_y + d, grad_r + d, out_stride,
                                 kStep, &token);
    }
    if (d < hidden) {
      post_backward_step<Store::kPart>(g + d, grads.stream, y + d, r + d, streams.stream, grad_y + d, grad_r + d,
                                       out_stride, hidden - d, &token);
    }
    float *grad_post = a.grad_post.data + t * a.grad_post.stride[0],
          *grad_comb = a.grad_comb.data + t * a.grad_comb.stride[0];
    for (int o = 0; o < kStreams; ++o) grad_post[o] = _mm512_reduce_add_ps(token.grad_post[o]);
    _mm512_storeu_ps(grad_comb, totals<16>(token.grad_comb));
  }
  if (kStore == Store::kPastCaches) _mm_sfence();
}

template <class X>
Status post_backward(const MhcPostBackwardParams& a, const Context& context) {
  const AnyView<2>& y = a.grad_sublayer;
  const bool aligned =
      (reinterpret_cast<uintptr_t>(y.data) | static_cast<uintptr_t>(y.stride[0]) * sizeof(X)) % 64 == 0;
  const bool past = aligned && past_caches(a.grad_streams, sizeof(X));
  parallel(context, a.streams.shape[0], [&](int64_t begin, int64_t end) {
    if (past) {
      post_tokens_backward<X, Store::kPastCaches>(a, begin, end);
    } else {
      post_tokens_backward<X, Store::kWhole>(a, begin, end);
    }
  });
  return Status::ok();
}

}  // namespace

Status mhc_post_backward(const MhcPostBackwardParams& a, const Context& context) {
  return a.streams.dtype == DType::kBFloat16 ? post_backward<bf16>(a, context) : post_backward<float>(a, context);
}

}  // namespace dsv4::avx512
