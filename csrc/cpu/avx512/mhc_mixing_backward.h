// The gradients within the mixing weights, 16 tokens a register: from those of pre, post and comb to those of the
// products, logits and scales.
#pragma once

#include "cpu/avx512/mhc_mixing.h"
#include "cpu/mhc.h"

namespace dsv4::avx512 {
namespace {

// grad: of comb, becomes that of its logits. 16 tokens, one a lane. The steps are taken again and kept in blocks, so
// that any number of them fits the stack.
void sinkhorn_backward(const __m512* logits, const MhcMixing& mixing, __m512* grad) {
  constexpr int kKept = 64;
  __m512 softmax[16], kept[kKept][16], divisors[kKept][4];
  for (int k = 0; k < 16; ++k) softmax[k] = logits[k];
  softmax_rows(softmax);
  const __m512 eps = _mm512_set1_ps(mixing.hc_eps);
  for (int end = 2 * mixing.sinkhorn_iterations - 1; end > 0;) {
    const int begin = (end - 1) / kKept * kKept;
    __m512 x[16];
    for (int k = 0; k < 16; ++k) x[k] = _mm512_add_ps(softmax[k], eps);
    for (int step = 0; step < end; ++step) {
      const int slot = step < begin ? 0 : step - begin;
      normalise(x, step % 2 == 1, eps, divisors[slot]);
      for (int k = 0; k < 16; ++k) kept[slot][k] = x[k];
    }
    for (int step = end - 1; step >= begin; --step) {
      const __m512* y = kept[step - begin];
      const int outer = step % 2 == 1 ? 4 : 1, inner = step % 2 == 1 ? 1 : 4;
      for (int line = 0; line < 4; ++line) {
        __m512* g = grad + line * outer;
        const __m512* at = y + line * outer;
        __m512 sum = _mm512_mul_ps(g[0], at[0]);
        for (int k = 1; k < 4; ++k) sum = _mm512_fmadd_ps(g[k * inner], at[k * inner], sum);
        const __m512 factor = _mm512_div_ps(_mm512_set1_ps(1.f), divisors[step - begin][line]);
        for (int k = 0; k < 4; ++k) g[k * inner] = _mm512_mul_ps(_mm512_sub_ps(g[k * inner], sum), factor);
      }
    }
    end = begin;
  }
  for (int line = 0; line < 4; ++line) {
    __m512* g = grad + 4 * line;
    const __m512* s = softmax + 4 * line;
    __m512 sum = _mm512_mul_ps(g[0], s[0]);
    for (int k = 1; k < 4; ++k) sum = _mm512_fmadd_ps(g[k], s[k], sum);
    for (int k = 0; k < 4; ++k) g[k] = _mm512_mul_ps(s[k], _mm512_sub_ps(g[k], sum));
  }
}

// rows: the products and squares; grads: of pre, post and comb [token][j], j as in fn.
template <int kOutputs>
void mixing_backward(const float (*rows)[kSums], const float (*grads)[kSums], const MhcMixing& mixing, int64_t width,
                     int64_t tokens, MhcTokenGradient* out) {
  const __m512 rms = reciprocal_rms(column(rows, kSquares), width, mixing.norm_eps);
  __m512 m[kOutputs], logits[kOutputs], grad[kOutputs], scale[3];
  for (int g = 0; g < 3; ++g) scale[g] = _mm512_setzero_ps();
  for (int j = 0; j < kOutputs; ++j) {
    const int group = j < 4 ? 0 : j < 8 ? 1 : 2;
    m[j] = _mm512_mul_ps(column(rows, j), rms);
    logits[j] = logit(rows, j, group, rms, mixing);
    grad[j] = column(grads, j);
    if (j < 8) {
      const __m512 s = sigmoid(logits[j]);
      const __m512 slope = _mm512_mul_ps(s, _mm512_sub_ps(_mm512_set1_ps(1.f), s));
      grad[j] = _mm512_mul_ps(grad[j], j < 4 ? slope : _mm512_add_ps(slope, slope));
    }
  }
  if constexpr (kOutputs == kMixes) sinkhorn_backward(logits + 8, mixing, grad + 8);
  __m512 total = _mm512_setzero_ps();
  for (int j = 0; j < kOutputs; ++j) {
    const int group = j < 4 ? 0 : j < 8 ? 1 : 2;
    const __m512 grad_m = _mm512_mul_ps(grad[j], _mm512_set1_ps(mixing.scale.data[group * mixing.scale.stride[0]]));
    scale[group] = _mm512_fmadd_ps(grad[j], m[j], scale[group]);
    total = _mm512_fmadd_ps(grad_m, m[j], total);
    logits[j] = grad[j];
    grad[j] = _mm512_mul_ps(grad_m, rms);
  }
  total = _mm512_div_ps(_mm512_mul_ps(total, _mm512_mul_ps(rms, rms)), _mm512_set1_ps(static_cast<float>(width)));
  const float *products = reinterpret_cast<const float*>(grad), *logit_lanes = reinterpret_cast<const float*>(logits),
              *scales = reinterpret_cast<const float*>(scale), *factors = reinterpret_cast<const float*>(&total);
  for (int64_t t = 0; t < tokens; ++t) {
    for (int j = 0; j < kMixes; ++j) {
      out[t].product[j] = j < kOutputs ? products[16 * j + t] : 0.f;
      out[t].logits[j] = j < kOutputs ? logit_lanes[16 * j + t] : 0.f;
    }
    for (int g = 0; g < 3; ++g) out[t].scale[g] = scales[16 * g + t];
    out[t].along = factors[t];
  }
}

}  // namespace
}  // namespace dsv4::avx512
