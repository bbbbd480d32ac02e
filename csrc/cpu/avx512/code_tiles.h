// Tiles of rows of activations with rows of quantised weights, whose sums may wait in memory between ranges of inputs,
// so that the activations of a range stay in the first-level cache.
//
// Where the e4m3 scales of a row are powers of two from 2^-60 to 1, as checkpoints have them, weights expand to code
// times scale, exact in bfloat16, and vdpbf16ps adds to one register of sums without end. Otherwise, and with e2m1,
// whose scales are too many, the scale multiplies the sum of its block, one FMA to four vdpbf16ps
// (avx512/weight_rows.h). Which of the two is a matter of the weights alone, and so is the order of a sum.
#pragma once

#include "cpu/avx512/dense_rows.h"
#include "cpu/avx512/weight_rows.h"

namespace dsv4::avx512 {
namespace {

inline constexpr int kMostShift = 60;

// The shifts s of `count` scales 2^-s, and 0 up to `padded`; false where one does not fold.
static inline bool fold_scales(const uint8_t* scales, int64_t count, int64_t padded, uint8_t* to) {
  __mmask64 beyond = 0;
  for (int64_t i = 0; i < padded; i += 64) {
    const __mmask64 mine = mask64(count - i), out = mask64(padded - i);
    const __m512i shift = _mm512_maskz_sub_epi8(mine, _mm512_set1_epi8(127), _mm512_maskz_loadu_epi8(mine, scales + i));
    beyond |= _mm512_cmpgt_epu8_mask(shift, _mm512_set1_epi8(kMostShift));
    _mm512_mask_storeu_epi8(to + i, out, shift);
  }
  return beyond == 0;
}
static inline bool fold_scales(const float* scales, int64_t count, int64_t padded, uint8_t* to) {
  bool all = true;
  for (int64_t i = 0; i < padded; ++i) {
    const uint32_t bits = i < count ? bits_from_float(scales[i]) : 127u << 23, shift = 127u - (bits >> 23);
    all = all && (bits & 0x7FFFFFu) == 0 && shift <= static_cast<uint32_t>(kMostShift);
    to[i] = static_cast<uint8_t>(shift);
  }
  return all;
}

// One block of kN rows of weights, and what their scales have to do with it: nothing is left of those that fold.
template <class Rows, class... Count>
DSV4_INLINE Block expand_block(const Rows& rows, const uint8_t* codes, const uint8_t* shifts, int64_t block,
                               Count... count) {
  return rows.expand_folded(codes + block * Rows::kBlockBytes, shifts + block * Rows::kScales, count...);
}
template <class Rows, class... Count>
DSV4_INLINE Block expand_block(const Rows& rows, const uint8_t* codes, const float*, int64_t block, Count... count) {
  return rows.expand(codes + block * Rows::kBlockBytes, count...);
}

// kM arranged rows x with kN rows of `bytes` code bytes, from their codes. Scale is uint8_t for the shifts of scales
// that fold, float for scales; results add to sums[m * kN + n].
template <int kM, int kN, class Rows, class Scale>
static __attribute__((noinline)) void code_tile(const Rows& rows, const uint8_t* codes, int64_t stride, int64_t bytes,
                                                const Scale* scales, int64_t scale_stride, const bf16* x,
                                                int64_t x_stride, bool first, __m512* sums) {
  __m512 sum[kM * kN];
#pragma GCC unroll 16
  for (int i = 0; i < kM * kN; ++i) sum[i] = first ? _mm512_setzero_ps() : sums[i];
  const auto add = [&](int64_t block, auto... count) __attribute__((always_inline)) {
    Block w[kN];
#pragma GCC unroll 4
    for (int n = 0; n < kN; ++n) {
      w[n] = expand_block(rows, codes + n * stride, scales + n * scale_stride, block, count...);
    }
#pragma GCC unroll 8
    for (int m = 0; m < kM; ++m) {
      __m512 part[kN];
#pragma GCC unroll 4
      for (int n = 0; n < kN; ++n) part[n] = sizeof(Scale) == 1 ? sum[m * kN + n] : _mm512_setzero_ps();
#pragma GCC unroll 4
      for (int j = 0; j < kBlockSteps; ++j) {
        const __m512i row = _mm512_loadu_si512(x + m * x_stride + block * kBlock + kStep * j);
#pragma GCC unroll 4
        for (int n = 0; n < kN; ++n) part[n] = dot_bf16(part[n], row, w[n].w[j]);
      }
#pragma GCC unroll 4
      for (int n = 0; n < kN; ++n) {
        if constexpr (sizeof(Scale) == 1) {
          sum[m * kN + n] = part[n];
        } else {
          sum[m * kN + n] = _mm512_fmadd_ps(part[n], Rows::scale(scales + n * scale_stride, block), sum[m * kN + n]);
        }
      }
    }
  };
  const int64_t whole = bytes / Rows::kBlockBytes, rest = bytes - whole * Rows::kBlockBytes;
  for (int64_t block = 0; block < whole; ++block) add(block);
  if (rest > 0) add(whole, rest);
#pragma GCC unroll 16
  for (int i = 0; i < kM * kN; ++i) sums[i] = sum[i];
}

// kM arranged rows x with kN expanded rows w over whole blocks, whose scales multiply the sums of blocks.
template <int kM, int kN, class Rows>
static __attribute__((noinline)) void scaled_tile(const bf16* x, int64_t x_stride, const bf16* w, int64_t w_stride,
                                                  const float* scales, int64_t scale_stride, int64_t inputs, bool first,
                                                  __m512* sums) {
  constexpr int kPair = kM % 2 == 0 ? 2 : 1;  // rows at a time: the sums of blocks need registers too
  __m512 sum[kM * kN];
#pragma GCC unroll 16
  for (int i = 0; i < kM * kN; ++i) sum[i] = first ? _mm512_setzero_ps() : sums[i];
  for (int64_t block = 0; block < inputs / kBlock; ++block) {
#pragma GCC unroll 4
    for (int m = 0; m < kM; m += kPair) {
      __m512 part[kPair * kN];
#pragma GCC unroll 8
      for (int i = 0; i < kPair * kN; ++i) part[i] = _mm512_setzero_ps();
#pragma GCC unroll 4
      for (int j = 0; j < kBlockSteps; ++j) {
        const int64_t at = block * kBlock + kStep * j;
        __m512i row[kPair];
#pragma GCC unroll 2
        for (int i = 0; i < kPair; ++i) row[i] = _mm512_loadu_si512(x + (m + i) * x_stride + at);
#pragma GCC unroll 4
        for (int n = 0; n < kN; ++n) {
          const __m512i weights = _mm512_load_si512(w + n * w_stride + at);
#pragma GCC unroll 2
          for (int i = 0; i < kPair; ++i) part[i * kN + n] = dot_bf16(part[i * kN + n], row[i], weights);
        }
      }
#pragma GCC unroll 4
      for (int n = 0; n < kN; ++n) {
        const __m512 scale = Rows::scale(scales + n * scale_stride, block);
#pragma GCC unroll 2
        for (int i = 0; i < kPair; ++i) {
          sum[(m + i) * kN + n] = _mm512_fmadd_ps(part[i * kN + n], scale, sum[(m + i) * kN + n]);
        }
      }
    }
  }
#pragma GCC unroll 16
  for (int i = 0; i < kM * kN; ++i) sums[i] = sum[i];
}

// A row of weights as bfloat16, in whole blocks; `to` is 64-byte aligned.
template <class Rows, class Scale>
DSV4_INLINE void expand_codes(const Rows& rows, const uint8_t* codes, int64_t bytes, const Scale* scales, bf16* to) {
  const auto put = [&](int64_t block, auto... count) __attribute__((always_inline)) {
    const Block b = expand_block(rows, codes, scales, block, count...);
    for (int j = 0; j < kBlockSteps; ++j) _mm512_store_si512(to + block * kBlock + kStep * j, b.w[j]);
  };
  const int64_t whole = bytes / Rows::kBlockBytes, rest = bytes - whole * Rows::kBlockBytes;
  for (int64_t block = 0; block < whole; ++block) put(block);
  if (rest > 0) put(whole, rest);
}

}  // namespace
}  // namespace dsv4::avx512
