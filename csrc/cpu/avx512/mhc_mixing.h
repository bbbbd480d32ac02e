// The mixing weights of 16 tokens at a time, one token a lane: what comes between the product and the weighted sum of
// mhc_pre. All 16 entries of comb sit in registers, so a Sinkhorn round is 32 additions, 8 divisions and 32 products.
#pragma once

#include "cpu/avx512/mhc_lanes.h"
#include "ops/mhc.h"

namespace dsv4::avx512 {

inline constexpr int kTile = 16;     // tokens whose weights are computed together
inline constexpr int kSquares = 24;  // where a token's sum of squares stands behind its products
inline constexpr int kSums = 32;     // floats kept for a token

// rows[token][j] for 16 tokens, as one register.
DSV4_INLINE __m512 column(const float (*rows)[kSums], int j) {
  const __m512i token = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
  return _mm512_i32gather_ps(_mm512_slli_epi32(token, 5), rows[0] + j, 4);
}

DSV4_INLINE __m512 reciprocal_rms(__m512 squares, int64_t width, float eps) {
  const __m512 mean = _mm512_div_ps(squares, _mm512_set1_ps(static_cast<float>(width)));
  return _mm512_div_ps(_mm512_set1_ps(1.f), _mm512_sqrt_ps(_mm512_add_ps(mean, _mm512_set1_ps(eps))));
}

// x / (sum + eps) over rows (the last axis) or columns of comb[4 * i + o]; returns the divisors.
DSV4_INLINE void normalise(__m512* comb, bool rows, __m512 eps, __m512* divisor) {
  const int outer = rows ? 4 : 1, inner = rows ? 1 : 4;
#pragma GCC unroll 4
  for (int line = 0; line < 4; ++line) {
    __m512* x = comb + line * outer;
    const __m512 sum = _mm512_add_ps(_mm512_add_ps(x[0], x[inner]), _mm512_add_ps(x[2 * inner], x[3 * inner]));
    divisor[line] = _mm512_add_ps(sum, eps);
    const __m512 factor = _mm512_div_ps(_mm512_set1_ps(1.f), divisor[line]);
#pragma GCC unroll 4
    for (int k = 0; k < 4; ++k) x[k * inner] = _mm512_mul_ps(x[k * inner], factor);
  }
}

// Softmax over the last axis of logits[4 * i + o], in place.
DSV4_INLINE void softmax_rows(__m512* comb) {
#pragma GCC unroll 4
  for (int line = 0; line < 4; ++line) {
    __m512* x = comb + 4 * line;
    const __m512 top = _mm512_max_ps(_mm512_max_ps(x[0], x[1]), _mm512_max_ps(x[2], x[3]));
#pragma GCC unroll 4
    for (int k = 0; k < 4; ++k) x[k] = exp(_mm512_sub_ps(x[k], top));
    const __m512 sum = _mm512_add_ps(_mm512_add_ps(x[0], x[1]), _mm512_add_ps(x[2], x[3]));
    const __m512 factor = _mm512_div_ps(_mm512_set1_ps(1.f), sum);
#pragma GCC unroll 4
    for (int k = 0; k < 4; ++k) x[k] = _mm512_mul_ps(x[k], factor);
  }
}

DSV4_INLINE void sinkhorn(__m512* comb, float hc_eps, int iterations) {
  const __m512 eps = _mm512_set1_ps(hc_eps);
  __m512 divisor[4];
  softmax_rows(comb);
  for (int k = 0; k < 16; ++k) comb[k] = _mm512_add_ps(comb[k], eps);
  normalise(comb, false, eps, divisor);
  for (int round = 1; round < iterations; ++round) {
    normalise(comb, true, eps, divisor);
    normalise(comb, false, eps, divisor);
  }
}

// logits[j] of 16 tokens from their products and sums of squares; `first` is the group's first mix.
DSV4_INLINE __m512 logit(const float (*rows)[kSums], int j, int group, __m512 rms, const MhcMixing& mixing) {
  const __m512 mix = _mm512_mul_ps(column(rows, j), rms);
  return _mm512_fmadd_ps(mix, _mm512_set1_ps(mixing.scale.data[group * mixing.scale.stride[0]]),
                         _mm512_set1_ps(mixing.base.data[j * mixing.base.stride[0]]));
}

// pre[i], 16 tokens each.
DSV4_INLINE void pre_weights(const float (*rows)[kSums], const MhcMixing& mixing, __m512 rms, __m512* pre) {
  for (int i = 0; i < kStreams; ++i) {
    pre[i] = _mm512_add_ps(sigmoid(logit(rows, i, 0, rms, mixing)), _mm512_set1_ps(mixing.hc_eps));
  }
}

struct MixingWeights {
  __m512 pre[4], post[4], comb[16];
};

DSV4_INLINE void mixing_weights(const float (*rows)[kSums], const MhcMixing& mixing, int64_t width,
                                MixingWeights* out) {
  const __m512 rms = reciprocal_rms(column(rows, kSquares), width, mixing.norm_eps);
  pre_weights(rows, mixing, rms, out->pre);
  for (int i = 0; i < kStreams; ++i) {
    const __m512 s = sigmoid(logit(rows, kStreams + i, 1, rms, mixing));
    out->post[i] = _mm512_add_ps(s, s);
  }
  for (int k = 0; k < 16; ++k) out->comb[k] = logit(rows, 2 * kStreams + k, 2, rms, mixing);
  sinkhorn(out->comb, mixing.hc_eps, mixing.sinkhorn_iterations);
}

}  // namespace dsv4::avx512
