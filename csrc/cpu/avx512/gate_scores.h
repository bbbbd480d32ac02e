// sqrt(softplus(z)) of the gate's logits, eight lanes of float64 at a time and rounded to float32 once, as
// cpu/moe_gate.h has it for one value. softplus(z) = max(z, 0) + log1p(y), y = exp(-|z|), log1p(y) = 2 atanh(y / (2 +
// y)); both series end below the last bit of float64.
#pragma once

#include "cpu/avx512/lanes.h"

namespace dsv4::avx512 {
namespace {

// e^x for x <= 0; NaN stays NaN.
DSV4_INLINE __m512d exp_double(__m512d x) {
  x = _mm512_max_pd(_mm512_set1_pd(-800.), x);
  const __m512d n = _mm512_roundscale_pd(_mm512_mul_pd(x, _mm512_set1_pd(1.4426950408889634)), 0);
  __m512d r = _mm512_fnmadd_pd(n, _mm512_set1_pd(6.93147180369123816490e-01), x);
  r = _mm512_fnmadd_pd(n, _mm512_set1_pd(1.90821492927058770002e-10), r);
  double factor = 1;
  for (int i = 2; i <= 13; ++i) factor *= i;
  __m512d p = _mm512_set1_pd(1 / factor);
  for (int i = 13; i > 0; --i) {
    factor /= i;
    p = _mm512_fmadd_pd(p, r, _mm512_set1_pd(1 / factor));
  }
  return _mm512_scalef_pd(p, n);
}

DSV4_INLINE __m256 sqrt_softplus_lanes(__m256 logits) {
  const __m512d z = _mm512_cvtps_pd(logits), zero = _mm512_setzero_pd();
  const __mmask8 low = _mm512_cmp_pd_mask(z, _mm512_set1_pd(-40.), _CMP_LT_OQ),
                 high = _mm512_cmp_pd_mask(z, _mm512_set1_pd(20.), _CMP_GT_OQ);
  const __m512d y = exp_double(_mm512_mask_mul_pd(_mm512_sub_pd(zero, _mm512_abs_pd(z)), low, z, _mm512_set1_pd(0.5)));
  const __m512d s = _mm512_div_pd(y, _mm512_add_pd(_mm512_set1_pd(2.), y)), square = _mm512_mul_pd(s, s);
  __m512d p = _mm512_set1_pd(1. / 33);
  for (int i = 31; i > 0; i -= 2) p = _mm512_fmadd_pd(p, square, _mm512_set1_pd(1. / i));
  // The second operand of a maximum comes through where one is NaN.
  const __m512d wide = _mm512_fmadd_pd(_mm512_add_pd(s, s), p, _mm512_max_pd(zero, z));
  const __m512d root = _mm512_sqrt_pd(_mm512_mask_mov_pd(wide, high, z));
  return _mm512_cvtpd_ps(_mm512_mask_mov_pd(root, low, y));
}

// In place.
static inline void gate_scores(float* z, int64_t count) {
  int64_t i = 0;
  for (; i + 8 <= count; i += 8) _mm256_storeu_ps(z + i, sqrt_softplus_lanes(_mm256_loadu_ps(z + i)));
  if (i < count) {
    const __mmask8 mine = static_cast<__mmask8>((1 << (count - i)) - 1);
    _mm256_mask_storeu_ps(z + i, mine, sqrt_softplus_lanes(_mm256_maskz_loadu_ps(mine, z + i)));
  }
}

}  // namespace
}  // namespace dsv4::avx512
