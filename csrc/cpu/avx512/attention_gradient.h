// G, the gradient of a row's out in the frame of its keys.
#pragma once

#include "cpu/avx512/attention_tiles.h"

namespace dsv4::avx512 {
namespace {

// Turns pairs at the end of a head, as for a query; rounded to X.
template <class X, class M>
DSV4_INLINE void rotate(const X* x, const float* rope, int64_t width, M* to) {
  const bf16* kPairs = nullptr;  // even and odd elements apart
  for (int64_t d = 0; d < width; d += kStep) {
    const int64_t count = smaller(width - d, kStep);
    const Pair turn = arrange(load(rope + d, count), kPairs);
    Pair value = load(x + d, count);
    if constexpr (sizeof(X) == 4) value = arrange(value, kPairs);
    Pair turned = {_mm512_fmsub_ps(value.a, turn.a, _mm512_mul_ps(value.b, turn.b)),
                   _mm512_fmadd_ps(value.b, turn.a, _mm512_mul_ps(value.a, turn.b))};
    if constexpr (sizeof(M) == 4) turned = natural(rounded(turned, static_cast<const X*>(nullptr)), kPairs);
    store(to + d, turned, count);
  }
}

DSV4_INLINE void copy(const bf16* from, int64_t count, bf16* to) {
  memcpy(to, from, static_cast<size_t>(count) * sizeof(bf16));
}
DSV4_INLINE void copy(const float* from, int64_t count, float* to) {
  memcpy(to, from, static_cast<size_t>(count) * sizeof(float));
}
DSV4_INLINE void copy(const bf16* from, int64_t count, float* to) { widen(from, count, to); }

// The gradient of out of all heads of a row, turned as the queries are: [H, D].
template <class X, class M>
static void turn_gradient(const SparseAttentionBackwardParams& a, int64_t row, M* to) {
  const SparseAttentionParams& p = a.forward;
  const int64_t head_dim = p.query.size(2), width = p.rope.given() ? 2 * p.rope.size(1) : 0, still = head_dim - width;
  for (int64_t h = 0; h < p.query.size(1); ++h, to += head_dim) {
    const X* grad_out = a.grad_out.template as<X>().at(row, h);
    copy(grad_out, still, to);
    if (width > 0) rotate(grad_out + still, p.rope.as<const float>().at(row), width, to + still);
  }
}

}  // namespace
}  // namespace dsv4::avx512
