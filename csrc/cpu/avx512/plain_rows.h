// Dot products of rows in bfloat16 or float32 with plain rows of weights, for the experts of mode "off" and the gate.
// Elements of a pair of rows meet in ascending steps of 32, in one register of sums for bfloat16 (two products a lane),
// two for float32 (first and second half of a step, added at the end); `total` adds the lanes after every chunk, as
// weight_panel.h does for many rows in bfloat16. A result depends on its two rows alone. vdpbf16ps takes denormal
// operands and sums as zero.
#pragma once

#include "cpu/avx512/weight_rows.h"

namespace dsv4::avx512 {
namespace {

// Rows of bfloat16 weights as they lie in memory, for the products of many rows (weight_panel.h).
struct PlainRows {
  using Scale = uint8_t;  // there are none
  static constexpr int64_t kBlockBytes = kBlock * static_cast<int64_t>(sizeof(bf16)), kCodeSteps = 1;
  static constexpr int64_t bytes(int64_t inputs) { return inputs * static_cast<int64_t>(sizeof(bf16)); }

  template <class Put>
  DSV4_MEMBER void expand_words(const __m512i* words, const Scale* const*, int64_t, const Put& put) const {
#pragma GCC unroll 16
    for (int d = 0; d < 16; ++d) put(d, 0, words[d]);
  }
};

struct PlainSum {
  __m512 a, b;
};

DSV4_INLINE PlainSum plain_add(PlainSum s, const bf16* x, const bf16* w, __mmask32 mask) {
  s.a = dot_bf16(s.a, _mm512_maskz_loadu_epi16(mask, x), _mm512_maskz_loadu_epi16(mask, w));
  return s;
}
DSV4_INLINE PlainSum plain_add(PlainSum s, const float* x, const float* w, __mmask32 mask) {
  const __mmask16 low = static_cast<__mmask16>(mask), high = static_cast<__mmask16>(mask >> 16);
  s.a = _mm512_fmadd_ps(_mm512_maskz_loadu_ps(low, x), _mm512_maskz_loadu_ps(low, w), s.a);
  s.b = _mm512_fmadd_ps(_mm512_maskz_loadu_ps(high, x + 16), _mm512_maskz_loadu_ps(high, w + 16), s.b);
  return s;
}

// kM rows x (`stride` elements apart) with kN rows w (`w_stride` apart): lanes whose totals are the products, to
// sum[m * kN + n].
template <int kM, int kN, class T>
DSV4_INLINE void plain_sums(const T* x, int64_t stride, const T* w, int64_t w_stride, int64_t inputs, __m512* sums) {
  PlainSum sum[kM * kN];
#pragma GCC unroll 16
  for (int i = 0; i < kM * kN; ++i) sum[i] = {_mm512_setzero_ps(), _mm512_setzero_ps()};
  const auto step = [&](int64_t at, __mmask32 mask) __attribute__((always_inline)) {
#pragma GCC unroll 4
    for (int m = 0; m < kM; ++m) {
#pragma GCC unroll 4
      for (int n = 0; n < kN; ++n) {
        sum[m * kN + n] = plain_add(sum[m * kN + n], x + m * stride + at, w + n * w_stride + at, mask);
      }
    }
  };
  int64_t at = 0;
  for (; at + kStep <= inputs; at += kStep) step(at, ~__mmask32{0});
  if (at < inputs) step(at, mask32(inputs - at));
#pragma GCC unroll 16
  for (int i = 0; i < kM * kN; ++i) sums[i] = _mm512_add_ps(sum[i].a, sum[i].b);
}

// Products of the same: results[m * result_stride + n].
template <int kM, int kN, class T>
static __attribute__((noinline)) void plain_tile(const T* x, int64_t stride, const T* w, int64_t w_stride,
                                                 int64_t inputs, float* results, int64_t result_stride) {
  __m512 result = _mm512_setzero_ps();
  for (int64_t at = 0; at == 0 || at < inputs; at += kChunk) {
    __m512 sums[kM * kN];
    plain_sums<kM, kN>(x + at, stride, w + at, w_stride, inputs - at < kChunk ? inputs - at : kChunk, sums);
    const __m512 mine = totals<kM * kN>(sums);
    result = at == 0 ? mine : _mm512_add_ps(result, mine);
  }
  alignas(64) float tile[16];
  _mm512_store_ps(tile, result);
#pragma GCC unroll 16
  for (int i = 0; i < kM * kN; ++i) results[i / kN * result_stride + i % kN] = tile[i];
}

// One row x with 16 rows w shorter than a page, one after another: several at a time in one page hide from the
// processor what comes next (docs/investigations/decode_cpu.md).
template <class T>
static __attribute__((noinline)) void plain_in_order(const T* x, const T* w, int64_t w_stride, int64_t inputs,
                                                     float* results) {
  constexpr int64_t kChunks = kPageBytes / static_cast<int64_t>(sizeof(T)) / kChunk;
  const int64_t chunks = inputs <= kChunk ? 1 : kChunks;
  __m512 sums[kChunks][16];
  for (int n = 0; n < 16; ++n) {
    for (int64_t c = 0; c < chunks; ++c) {
      const int64_t at = c * kChunk, left = inputs - at;
      plain_sums<1, 1>(x + at, 0, w + n * w_stride + at, 0, left < kChunk ? left : kChunk, sums[c] + n);
    }
  }
  __m512 result = totals<16>(sums[0]);
  for (int64_t c = 1; c < chunks; ++c) result = _mm512_add_ps(result, totals<16>(sums[c]));
  _mm512_storeu_ps(results, result);
}

template <int kM, class T>
static inline void plain_rows(const T* x, int64_t stride, const T* w, int64_t w_stride, int64_t rows, int64_t inputs,
                              float* results, int64_t result_stride) {
  int64_t r = 0;
  if (kM == 1 && inputs * static_cast<int64_t>(sizeof(T)) < kPageBytes) {
    for (; r + 16 <= rows; r += 16) plain_in_order(x, w + r * w_stride, w_stride, inputs, results + r);
  }
  for (; r + 4 <= rows; r += 4) {
    plain_tile<kM, 4>(x, stride, w + r * w_stride, w_stride, inputs, results + r, result_stride);
  }
  for (; r < rows; ++r) {
    plain_tile<kM, 1>(x, stride, w + r * w_stride, w_stride, inputs, results + r, result_stride);
  }
}

// `count` rows x with `rows` rows w, few enough for the second-level cache.
template <class T>
static inline void plain_product(const T* x, int64_t stride, int64_t count, const T* w, int64_t w_stride, int64_t rows,
                                 int64_t inputs, float* results, int64_t result_stride) {
  int64_t m = 0;
  for (; m + 4 <= count; m += 4) {
    plain_rows<4>(x + m * stride, stride, w, w_stride, rows, inputs, results + m * result_stride, result_stride);
  }
  for (; m < count; ++m) {
    plain_rows<1>(x + m * stride, stride, w, w_stride, rows, inputs, results + m * result_stride, result_stride);
  }
}

}  // namespace
}  // namespace dsv4::avx512
