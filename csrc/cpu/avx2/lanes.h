// Vector helpers of the AVX2 kernels: eight float32 lanes, elements in their order. Everything is static, so that no
// copy compiled with these flags can be linked elsewhere.
#pragma once

#include <immintrin.h>

#include "common/pages.h"

namespace dsv4::avx2 {

inline constexpr int64_t kLanes = 8;

DSV4_INLINE __m256 load(const float* p) { return _mm256_loadu_ps(p); }
DSV4_INLINE __m256 load(const bf16* p) {
  const __m128i words = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(words), 16));
}
// The first `count` of eight, 1 to 7; zero behind them, which are not read.
template <class T>
DSV4_INLINE __m256 load(const T* p, int64_t count) {
  T all[kLanes] = {};
  memcpy(all, p, static_cast<size_t>(count) * sizeof(T));
  return load(all);
}

// Rounded to nearest even; every NaN becomes 0x7FFF (common/dtype.h).
DSV4_INLINE __m128i to_bf16(__m256 x) {
  const __m256i bits = _mm256_castps_si256(x);
  const __m256i even = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
  const __m256i rounded =
      _mm256_srli_epi32(_mm256_add_epi32(bits, _mm256_add_epi32(even, _mm256_set1_epi32(0x7FFF))), 16);
  const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(x, x, _CMP_UNORD_Q));
  const __m256i words = _mm256_blendv_epi8(rounded, _mm256_set1_epi32(0x7FFF), nan);
  return _mm_packus_epi32(_mm256_castsi256_si128(words), _mm256_extracti128_si256(words, 1));
}

DSV4_INLINE void store(float* p, __m256 x) { _mm256_storeu_ps(p, x); }
DSV4_INLINE void store(bf16* p, __m256 x) { _mm_storeu_si128(reinterpret_cast<__m128i*>(p), to_bf16(x)); }
// The first `count` of eight, 1 to 7.
template <class T>
DSV4_INLINE void store(T* p, __m256 x, int64_t count) {
  T all[kLanes];
  store(all, x);
  memcpy(p, all, static_cast<size_t>(count) * sizeof(T));
}

// What is left of a value after rounding to T.
DSV4_INLINE __m256 rounded(__m256 x, const float*) { return x; }
DSV4_INLINE __m256 rounded(__m256 x, const bf16*) {
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(to_bf16(x)), 16));
}

// Asks for a cache line, which may lie anywhere.
DSV4_INLINE void ask(const void* p) { _mm_prefetch(static_cast<const char*>(p), _MM_HINT_T0); }

// to[0, count) as float32, and zeros up to the next multiple of eight.
template <class T>
DSV4_INLINE void widen(const T* from, int64_t count, float* to) {
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) store(to + i, load(from + i));
  if (i < count) store(to + i, load(from + i, count - i));
}
// The first `count` of float32 as T.
template <class T>
DSV4_INLINE void narrow(const float* from, int64_t count, T* to) {
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) store(to + i, load(from + i));
  for (; i < count; ++i) to[i] = from_float<T>(from[i]);
}

// The sums of four registers' lanes. The order of additions is the same for each.
DSV4_INLINE __m128 totals(__m256 a, __m256 b, __m256 c, __m256 d) {
  const __m256 all = _mm256_hadd_ps(_mm256_hadd_ps(a, b), _mm256_hadd_ps(c, d));
  return _mm_add_ps(_mm256_castps256_ps128(all), _mm256_extractf128_ps(all, 1));
}
DSV4_INLINE float total(__m256 x) { return _mm_cvtss_f32(totals(x, x, x, x)); }

// The values of eight e4m3 codes (common/pages.h).
DSV4_INLINE __m256 e4m3_values(__m128i codes) {
  const __m256i code = _mm256_cvtepu8_epi32(codes), magnitude = _mm256_and_si256(code, _mm256_set1_epi32(0x7F));
  const __m256i sign = _mm256_slli_epi32(_mm256_andnot_si256(_mm256_set1_epi32(0x7F), code), 24);
  const __m256i normal = _mm256_add_epi32(_mm256_slli_epi32(magnitude, 20), _mm256_set1_epi32(120 << 23));
  const __m256 small = _mm256_mul_ps(_mm256_cvtepi32_ps(magnitude), _mm256_set1_ps(0x1p-9f));
  const __m256 is_small = _mm256_castsi256_ps(_mm256_cmpgt_epi32(_mm256_set1_epi32(8), magnitude));
  const __m256i nan = _mm256_cmpeq_epi32(magnitude, _mm256_set1_epi32(0x7F));
  const __m256 value = _mm256_blendv_ps(_mm256_castsi256_ps(normal), small, is_small);
  return _mm256_or_ps(value, _mm256_castsi256_ps(_mm256_or_si256(sign, nan)));
}
DSV4_INLINE __m256 e4m3_values(const uint8_t* codes) {
  return e4m3_values(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(codes)));
}

// The values of eight e2m1 codes in four bytes, the even one in a byte's low half.
DSV4_INLINE __m256 e2m1_values(const uint8_t* bytes) {
  int word;
  memcpy(&word, bytes, sizeof(word));
  const __m256i code = _mm256_srlv_epi32(_mm256_set1_epi32(word), _mm256_setr_epi32(0, 4, 8, 12, 16, 20, 24, 28));
  const __m256 sign = _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_srli_epi32(code, 3), 31));
  const __m256 magnitudes = _mm256_setr_ps(0.f, 0.5f, 1.f, 1.5f, 2.f, 3.f, 4.f, 6.f);
  return _mm256_or_ps(_mm256_permutevar8x32_ps(magnitudes, code), sign);  // takes the index from 3 bits
}

// e^x within 1 ulp or so, by the method of cpu/avx512/lanes.h. NaN stays NaN.
DSV4_INLINE __m256 exp(__m256 x) {
  x = _mm256_max_ps(_mm256_set1_ps(-104.f), _mm256_min_ps(_mm256_set1_ps(89.f), x));
  const __m256 n = _mm256_round_ps(_mm256_mul_ps(x, _mm256_set1_ps(1.44269504f)), 8);
  __m256 r = _mm256_fnmadd_ps(n, _mm256_set1_ps(0.693145752f), x);
  r = _mm256_fnmadd_ps(n, _mm256_set1_ps(1.42860677e-6f), r);
  __m256 p = _mm256_set1_ps(1.f / 5040);
  constexpr float kSeries[] = {1.f / 720, 1.f / 120, 1.f / 24, 1.f / 6, 0.5f, 1.f, 1.f};
  for (const float factor : kSeries) p = _mm256_fmadd_ps(p, r, _mm256_set1_ps(factor));
  // Two powers of two, since 2^n itself may be no float32.
  const __m256i power = _mm256_cvtps_epi32(n), half = _mm256_srai_epi32(power, 1), bias = _mm256_set1_epi32(127);
  const auto scale = [&](__m256i e) { return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(e, bias), 23)); };
  return _mm256_mul_ps(_mm256_mul_ps(p, scale(half)), scale(_mm256_sub_epi32(power, half)));
}

DSV4_INLINE __m256 sigmoid(__m256 x) {
  const __m256 one = _mm256_set1_ps(1.f);
  return _mm256_div_ps(one, _mm256_add_ps(one, exp(_mm256_sub_ps(_mm256_setzero_ps(), x))));
}

}  // namespace dsv4::avx2
