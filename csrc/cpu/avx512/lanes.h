// Vector helpers of the AVX-512 kernels. Rows are handled 32 elements at a time, as two registers of 16 floats in an
// order of the element type's own: bfloat16 as even and odd elements, which unpack with one operation each, float32 as
// first and second half. Everything is static, so that no copy compiled with these flags can be linked elsewhere.
#pragma once

// GCC 12 takes the deliberately undefined operands inside its own intrinsics for a mistake of the caller.
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#pragma GCC diagnostic ignored "-Wuninitialized"
#include <immintrin.h>
#pragma GCC diagnostic pop

#include "common/dtype.h"

namespace dsv4::avx512 {

inline constexpr int kStep = 32;  // elements of a step

struct Pair {
  __m512 a, b;
};

DSV4_INLINE Pair unpack(__m512i words) {
  const __m512i high = _mm512_set1_epi32(static_cast<int>(0xFFFF0000u));
  return {_mm512_castsi512_ps(_mm512_slli_epi32(words, 16)), _mm512_castsi512_ps(_mm512_and_si512(words, high))};
}

// Rounds to nearest even. Denormal results become zero.
DSV4_INLINE __m512i pack(Pair value) {
  alignas(64) static const uint16_t kInterleave[32] = {0, 16, 1, 17, 2,  18, 3,  19, 4,  20, 5,  21, 6,  22, 7,  23,
                                                       8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
  const __m512i halves = reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(value.b, value.a));
  return _mm512_permutexvar_epi16(_mm512_load_si512(kInterleave), halves);
}

DSV4_INLINE __mmask32 mask32(int64_t count) { return static_cast<__mmask32>((int64_t{1} << count) - 1); }
DSV4_INLINE __mmask16 low16(int64_t count) { return static_cast<__mmask16>(mask32(count)); }
DSV4_INLINE __mmask16 high16(int64_t count) { return static_cast<__mmask16>(mask32(count) >> 16); }

// `count` of the masked forms is 1 to 32; elements beyond it are not touched and load as zero.
DSV4_INLINE Pair load(const bf16* p) { return unpack(_mm512_loadu_si512(p)); }
DSV4_INLINE Pair load(const bf16* p, int64_t count) { return unpack(_mm512_maskz_loadu_epi16(mask32(count), p)); }
DSV4_INLINE Pair load(const float* p) { return {_mm512_loadu_ps(p), _mm512_loadu_ps(p + 16)}; }
DSV4_INLINE Pair load(const float* p, int64_t count) {
  return {_mm512_maskz_loadu_ps(low16(count), p), _mm512_maskz_loadu_ps(high16(count), p + 16)};
}

DSV4_INLINE void store(bf16* p, Pair value) { _mm512_storeu_si512(p, pack(value)); }
DSV4_INLINE void store(bf16* p, Pair value, int64_t count) { _mm512_mask_storeu_epi16(p, mask32(count), pack(value)); }
DSV4_INLINE void store(float* p, Pair value) {
  _mm512_storeu_ps(p, value.a);
  _mm512_storeu_ps(p + 16, value.b);
}
DSV4_INLINE void store(float* p, Pair value, int64_t count) {
  _mm512_mask_storeu_ps(p, low16(count), value.a);
  _mm512_mask_storeu_ps(p + 16, high16(count), value.b);
}

// Float32 values in the order in which elements of type X unpack, and back.
DSV4_INLINE Pair arrange(Pair natural, const bf16*) {
  const __m512i even = _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
  const __m512i odd = _mm512_setr_epi32(1, 3, 5, 7, 9, 11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31);
  return {_mm512_permutex2var_ps(natural.a, even, natural.b), _mm512_permutex2var_ps(natural.a, odd, natural.b)};
}
DSV4_INLINE Pair arrange(Pair natural, const float*) { return natural; }
DSV4_INLINE Pair natural(Pair arranged, const bf16*) {
  const __m512i first = _mm512_setr_epi32(0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
  const __m512i second = _mm512_setr_epi32(8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31);
  return {_mm512_permutex2var_ps(arranged.a, first, arranged.b),
          _mm512_permutex2var_ps(arranged.a, second, arranged.b)};
}
DSV4_INLINE Pair natural(Pair arranged, const float*) { return arranged; }

// What is left of a value after rounding to X.
DSV4_INLINE Pair rounded(Pair value, const bf16*) { return unpack(pack(value)); }
DSV4_INLINE Pair rounded(Pair value, const float*) { return value; }

DSV4_INLINE Pair scaled(Pair x, __m512 factor) { return {_mm512_mul_ps(x.a, factor), _mm512_mul_ps(x.b, factor)}; }
DSV4_INLINE Pair fma(Pair x, __m512 factor, Pair sum) {
  return {_mm512_fmadd_ps(x.a, factor, sum.a), _mm512_fmadd_ps(x.b, factor, sum.b)};
}
// One accumulator, both halves: a first.
DSV4_INLINE __m512 dot(Pair x, Pair y, __m512 sum) { return _mm512_fmadd_ps(x.b, y.b, _mm512_fmadd_ps(x.a, y.a, sum)); }

// The sum of the lanes, by the tree of `totals`.
DSV4_INLINE float total(__m512 x) {
  x = _mm512_add_ps(x, _mm512_permute_ps(x, 0x4E));
  x = _mm512_add_ps(x, _mm512_permute_ps(x, 0xB1));
  x = _mm512_add_ps(x, _mm512_shuffle_f32x4(x, x, 0xB1));
  x = _mm512_add_ps(x, _mm512_shuffle_f32x4(x, x, 0x4E));
  return _mm512_cvtss_f32(x);
}

// In each lane, four sums of the four values there: lanes of 16 brought to 4, as `total` begins.
DSV4_INLINE __m512 quad_sums(const __m512* x) {
  const __m512 ab = _mm512_add_ps(_mm512_unpacklo_ps(x[0], x[1]), _mm512_unpackhi_ps(x[0], x[1]));
  const __m512 cd = _mm512_add_ps(_mm512_unpacklo_ps(x[2], x[3]), _mm512_unpackhi_ps(x[2], x[3]));
  const __m512d lo = _mm512_unpacklo_pd(_mm512_castps_pd(ab), _mm512_castps_pd(cd));
  const __m512d hi = _mm512_unpackhi_pd(_mm512_castps_pd(ab), _mm512_castps_pd(cd));
  return _mm512_add_ps(_mm512_castpd_ps(lo), _mm512_castpd_ps(hi));
}
DSV4_INLINE __m512 lane_pairs(__m512 x, __m512 y) {
  return _mm512_add_ps(_mm512_shuffle_f32x4(x, y, 0x88), _mm512_shuffle_f32x4(x, y, 0xDD));
}

// The totals of kCount registers, up to 16, in order; what follows them is of no meaning.
template <int kCount>
DSV4_INLINE __m512 totals(const __m512* x) {
  constexpr int kQuads = (kCount + 3) / 4;
  __m512 quads[4];
#pragma GCC unroll 4
  for (int q = 0; q < kQuads; ++q) {
    __m512 four[4];
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) four[i] = x[4 * q + i < kCount ? 4 * q + i : kCount - 1];
    quads[q] = quad_sums(four);
  }
  const __m512 low = lane_pairs(quads[0], quads[kQuads > 1 ? 1 : 0]);
  const __m512 high = kQuads > 2 ? lane_pairs(quads[2], quads[kQuads > 3 ? 3 : 2]) : low;
  return lane_pairs(low, high);
}

// Transposes 16 x 16 words.
DSV4_INLINE void transpose(__m512i* x) {
  __m512i y[16];
  for (int i = 0; i < 16; i += 2) {
    y[i] = _mm512_unpacklo_epi32(x[i], x[i + 1]);
    y[i + 1] = _mm512_unpackhi_epi32(x[i], x[i + 1]);
  }
  for (int i = 0; i < 16; i += 4) {
    x[i] = _mm512_unpacklo_epi64(y[i], y[i + 2]);
    x[i + 1] = _mm512_unpackhi_epi64(y[i], y[i + 2]);
    x[i + 2] = _mm512_unpacklo_epi64(y[i + 1], y[i + 3]);
    x[i + 3] = _mm512_unpackhi_epi64(y[i + 1], y[i + 3]);
  }
  for (int i = 0; i < 4; ++i) {
    y[i] = _mm512_shuffle_i32x4(x[i], x[i + 4], 0x88);
    y[i + 4] = _mm512_shuffle_i32x4(x[i], x[i + 4], 0xDD);
    y[i + 8] = _mm512_shuffle_i32x4(x[i + 8], x[i + 12], 0x88);
    y[i + 12] = _mm512_shuffle_i32x4(x[i + 8], x[i + 12], 0xDD);
  }
  for (int i = 0; i < 4; ++i) {
    x[i] = _mm512_shuffle_i32x4(y[i], y[i + 8], 0x88);
    x[i + 4] = _mm512_shuffle_i32x4(y[i + 4], y[i + 12], 0x88);
    x[i + 8] = _mm512_shuffle_i32x4(y[i], y[i + 8], 0xDD);
    x[i + 12] = _mm512_shuffle_i32x4(y[i + 4], y[i + 12], 0xDD);
  }
}

// e^x within 1 ulp or so: x = n ln 2 + r, |r| <= ln 2 / 2, and the series of e^r to the seventh power (its remainder is
// below 6e-9). NaN stays NaN.
DSV4_INLINE __m512 exp(__m512 x) {
  x = _mm512_max_ps(_mm512_set1_ps(-104.f), _mm512_min_ps(_mm512_set1_ps(89.f), x));
  const __m512 n = _mm512_roundscale_ps(_mm512_mul_ps(x, _mm512_set1_ps(1.44269504f)), 0);
  __m512 r = _mm512_fnmadd_ps(n, _mm512_set1_ps(0.693145752f), x);
  r = _mm512_fnmadd_ps(n, _mm512_set1_ps(1.42860677e-6f), r);
  __m512 p = _mm512_set1_ps(1.f / 5040);
  p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(1.f / 720));
  p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(1.f / 120));
  p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(1.f / 24));
  p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(1.f / 6));
  p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(0.5f));
  p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(1.f));
  p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(1.f));
  return _mm512_scalef_ps(p, n);
}

DSV4_INLINE __m512 sigmoid(__m512 x) {
  const __m512 one = _mm512_set1_ps(1.f);
  return _mm512_div_ps(one, _mm512_add_ps(one, exp(_mm512_sub_ps(_mm512_setzero_ps(), x))));
}

}  // namespace dsv4::avx512
