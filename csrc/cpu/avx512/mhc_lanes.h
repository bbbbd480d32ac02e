// Rows of mHC, 32 elements at a time in the order in which they lie: bfloat16 widens by a zero-extending load and
// narrows without a permutation, and the float32 rows of fn multiply as they are, so that few tokens need no packed fn.
#pragma once

#include "cpu/avx512/lanes.h"

namespace dsv4::avx512 {

DSV4_INLINE __m512 widen(__m256i words) {
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(words), 16));
}
DSV4_INLINE Pair widen(__m512i words) {
  return {widen(_mm512_castsi512_si256(words)), widen(_mm512_extracti64x4_epi64(words, 1))};
}
// Rounds to nearest even. Denormal results become zero.
DSV4_INLINE __m512i narrow(Pair value) { return reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(value.b, value.a)); }

// `count` elements, 1 to 32, if kPart: what lies beyond them is not touched and reads as zero.
template <bool kPart>
DSV4_INLINE Pair get(const bf16* p, int64_t count = kStep) {
  if (kPart) return widen(_mm512_maskz_loadu_epi16(mask32(count), p));
  const __m256i* words = reinterpret_cast<const __m256i*>(p);
  return {widen(_mm256_loadu_si256(words)), widen(_mm256_loadu_si256(words + 1))};
}
template <bool kPart>
DSV4_INLINE Pair get(const float* p, int64_t count = kStep) {
  return kPart ? load(p, count) : load(p);
}

enum class Store { kWhole, kPastCaches, kPart };

// Past the caches: p is 64-byte aligned, and a fence follows the last one.
template <Store kStore>
DSV4_INLINE void put(bf16* p, Pair value, int64_t count = kStep) {
  const __m512i words = narrow(value);
  if (kStore == Store::kPart) {
    _mm512_mask_storeu_epi16(p, mask32(count), words);
  } else if (kStore == Store::kPastCaches) {
    _mm512_stream_si512(reinterpret_cast<__m512i*>(p), words);
  } else {
    _mm512_storeu_si512(p, words);
  }
}
template <Store kStore>
DSV4_INLINE void put(float* p, Pair value, int64_t count = kStep) {
  if (kStore == Store::kPart) {
    store(p, value, count);
  } else if (kStore == Store::kPastCaches) {
    _mm512_stream_ps(p, value.a);
    _mm512_stream_ps(p + 16, value.b);
  } else {
    store(p, value);
  }
}

// A step, zeros behind its `count` elements if kPart; returns it.
template <bool kPart>
DSV4_INLINE Pair copy(const bf16* from, bf16* to, int64_t count) {
  const __m512i words = kPart ? _mm512_maskz_loadu_epi16(mask32(count), from) : _mm512_loadu_si512(from);
  _mm512_storeu_si512(to, words);
  return widen(words);
}
template <bool kPart>
DSV4_INLINE Pair copy(const float* from, float* to, int64_t count) {
  const Pair x = get<kPart>(from, count);
  store(to, x);
  return x;
}

DSV4_INLINE void copy_past_caches(const bf16* from, bf16* to) {
  _mm512_stream_si512(reinterpret_cast<__m512i*>(to), _mm512_loadu_si512(from));
}
DSV4_INLINE void copy_past_caches(const float* from, float* to) {
  _mm512_stream_ps(to, _mm512_loadu_ps(from));
  _mm512_stream_ps(to + 16, _mm512_loadu_ps(from + 16));
}

// The value as X keeps it.
template <class X>
DSV4_INLINE Pair nearest(Pair value) {
  if constexpr (sizeof(X) == sizeof(bf16)) return widen(narrow(value));
  return value;
}

// To the second-level cache. Addresses beyond an array do no harm.
DSV4_INLINE void prefetch(const void* p) { _mm_prefetch(static_cast<const char*>(p), _MM_HINT_T1); }

}  // namespace dsv4::avx512
