// Products whose second operand is read along its rows, as gradients need them: c += a b and a^T b. A register holds 16
// columns of sums; an element of a (bfloat16: two neighbours along the sum, for vdpbf16ps) is broadcast and meets 4
// registers of b, 6 rows of a at a time: 24 sums, 4 loads and 6 broadcasts for 24 products, no lanes to add. b is
// copied beforehand into panels of 64 columns, bfloat16 with two rows interleaved, kOuterSteps steps at a time, so that
// a panel (16 KiB) stays in the first-level cache while rows of a pass by. The sums of a chunk of steps start at zero
// and are added to what was there: a result depends on its own operands alone, in ascending order. The limit is the
// rate of FMA or vdpbf16ps, which takes denormal operands and sums as zero.
#pragma once

#include "cpu/avx512/weight_panel.h"
#include "cpu/moe_backward_driver.h"

namespace dsv4::avx512 {
namespace {

inline constexpr int64_t kOuterSteps = 64;
inline constexpr int kOuterVectors = 4;
inline constexpr int kMostRows = 6;                           // of a in a tile
inline constexpr int64_t kOuterColumns = 16 * kOuterVectors;  // of a panel

// A step is a 32-bit word of a: one number of float32 or two of bfloat16, the earlier in the low half.
template <class X>
inline constexpr int64_t kStepRows = static_cast<int64_t>(sizeof(float) / sizeof(X));

DSV4_INLINE __m512 add_step(__m512 sum, __m512i a, __m512i b, const bf16*) { return dot_bf16(sum, a, b); }
DSV4_INLINE __m512 add_step(__m512 sum, __m512i a, __m512i b, const float*) {
  return _mm512_fmadd_ps(_mm512_castsi512_ps(a), _mm512_castsi512_ps(b), sum);
}

DSV4_INLINE __m512i broadcast_word(const uint8_t* from) {
  int32_t word;
  __builtin_memcpy(&word, from, sizeof(word));
  return _mm512_set1_epi32(word);
}
// The last of an odd number of rows: with zero for the next.
DSV4_INLINE __m512i broadcast_half(const uint8_t* from) {
  uint16_t half;
  __builtin_memcpy(&half, from, sizeof(half));
  return _mm512_set1_epi32(half);
}

DSV4_INLINE void store_rounded(bf16* to, __mmask16 mask, __m512 value) {
  _mm256_mask_storeu_epi16(to, mask, reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(value)));
}
DSV4_INLINE void store_rounded(float* to, __mmask16 mask, __m512 value) { _mm512_mask_storeu_ps(to, mask, value); }

// What a tile multiplies, and where its sums go.
template <class X>
struct OuterTile {
  const uint8_t* a[kMostRows];  // word of step s at a[m] + s * a_stride
  int64_t a_stride;             // bytes
  int64_t steps;                // whole ones
  bool half;                    // one row of a and b is left
  const uint32_t* panel;
  int64_t columns;
  float* c[kMostRows];  // sums so far; the result, unless out is given
  bool first;           // c holds nothing yet
  X* out[kMostRows];    // or null: the sums, rounded
};

template <int kM, class X>
static __attribute__((noinline)) void outer_tile(const OuterTile<X>& t) {
  const X* type = nullptr;
  __m512 sum[kM * kOuterVectors];
#pragma GCC unroll 32
  for (int i = 0; i < kM * kOuterVectors; ++i) sum[i] = _mm512_setzero_ps();
  const uint8_t* a[kM];
#pragma GCC unroll 8
  for (int m = 0; m < kM; ++m) a[m] = t.a[m];
  const uint32_t* b = t.panel;
  const auto step = [&](int64_t at, auto broadcast) __attribute__((always_inline)) {
    __m512i columns[kOuterVectors];
#pragma GCC unroll 4
    for (int n = 0; n < kOuterVectors; ++n) columns[n] = _mm512_load_si512(b + 16 * n);
#pragma GCC unroll 8
    for (int m = 0; m < kM; ++m) {
      const __m512i row = broadcast(a[m] + at);
#pragma GCC unroll 4
      for (int n = 0; n < kOuterVectors; ++n) {
        __m512& mine = sum[m * kOuterVectors + n];
        mine = add_step(mine, row, columns[n], type);
      }
    }
    b += kOuterColumns;
  };
  const int64_t stride = t.a_stride, end = t.steps * stride;
  for (int64_t at = 0; at < end; at += stride) step(at, broadcast_word);
  if (t.half) step(end, broadcast_half);
#pragma GCC unroll 8
  for (int m = 0; m < kM; ++m) {
#pragma GCC unroll 4
    for (int n = 0; n < kOuterVectors; ++n) {
      const __mmask16 mask = low16(t.columns > 16 * n ? (t.columns < 16 * n + 16 ? t.columns - 16 * n : 16) : 0);
      float* c = t.c[m] + 16 * n;
      __m512 value = sum[m * kOuterVectors + n];
      if (!t.first) value = _mm512_add_ps(_mm512_maskz_loadu_ps(mask, c), value);
      if (t.out[m] != nullptr) {
        store_rounded(t.out[m] + 16 * n, mask, value);
      } else {
        _mm512_mask_storeu_ps(c, mask, value);
      }
    }
  }
}

// 32 columns of a step: of a row, and in bfloat16 of the next one, or of zero.
DSV4_INLINE void put_step(const bf16* row, const bf16* next, int64_t count, uint32_t* to) {
  alignas(64) static constexpr uint16_t kPairs[2][32] = {
      {0, 32, 1, 33, 2,  34, 3,  35, 4,  36, 5,  37, 6,  38, 7,  39,
       8, 40, 9, 41, 10, 42, 11, 43, 12, 44, 13, 45, 14, 46, 15, 47},
      {16, 48, 17, 49, 18, 50, 19, 51, 20, 52, 21, 53, 22, 54, 23, 55,
       24, 56, 25, 57, 26, 58, 27, 59, 28, 60, 29, 61, 30, 62, 31, 63}};
  const __mmask32 mask = mask32(count);
  const __m512i a = _mm512_maskz_loadu_epi16(mask, row);
  const __m512i b = _mm512_maskz_loadu_epi16(next == nullptr ? 0 : mask, next);
  _mm512_store_si512(to, _mm512_permutex2var_epi16(a, _mm512_load_si512(kPairs[0]), b));
  _mm512_store_si512(to + 16, _mm512_permutex2var_epi16(a, _mm512_load_si512(kPairs[1]), b));
}
DSV4_INLINE void put_step(const float* row, const float*, int64_t count, uint32_t* to) {
  _mm512_store_ps(to, _mm512_maskz_loadu_ps(low16(count), row));
  _mm512_store_ps(to + 16, _mm512_maskz_loadu_ps(high16(count), row + 16));
}

// Columns [0, n) of `rows` rows from `first` on: [column / kWidth][step][kWidth], zero beyond the last column.
// kOuterSteps steps lie between the panels. Rows in place are asked for ahead.
template <int64_t kWidth, class X>
static void pack_panels(const MoeRows<const X>& from, int64_t first, int64_t rows, int64_t n, uint32_t* to) {
  constexpr int64_t kAheadRows = 16;
  for (int64_t r = 0; r < rows; r += kStepRows<X>, to += kWidth) {
    const X* row = from.at(first + r);
    const X* next = kStepRows<X> == 2 && r + 1 < rows ? from.at(first + r + 1) : nullptr;
    if (from.index == nullptr) {
      const int64_t bytes = n * static_cast<int64_t>(sizeof(X));
      ask(reinterpret_cast<const uint8_t*>(row + kAheadRows * from.stride), bytes);
      if (next != nullptr) ask(reinterpret_cast<const uint8_t*>(next + kAheadRows * from.stride), bytes);
    }
    uint32_t* panel = to;
    for (int64_t at = 0; at < n; at += kWidth, panel += kOuterSteps * kWidth) {
      for (int64_t j = 0; j < kWidth; j += kStep) {
        const int64_t left = n - at - j;
        put_step(row + at + j, next == nullptr ? nullptr : next + at + j,
                 left < 0       ? 0
                 : left < kStep ? left
                                : kStep,
                 panel + j);
      }
    }
  }
}

struct OuterProduct {
  static int64_t outer_memory() {
    const int64_t words = kOuterSteps * (kMoeColumns + kMoeOutputs) + kMoeOutputs * kMoeColumns;
    return words * static_cast<int64_t>(sizeof(uint32_t));
  }

  template <class X>
  static void accumulate(const MoeRows<const X>& a, int64_t count, int64_t inputs, const X* b, int64_t b_stride,
                         int64_t n, bool first, const MoeRows<float>& c, uint8_t* memory) {
    constexpr int64_t kRows = kOuterSteps * kStepRows<X>;
    uint32_t* panels = reinterpret_cast<uint32_t*>(memory);
    int64_t at = 0;
    do {  // once even of no inputs: the first sums are stored
      const int64_t rows = inputs - at < kRows ? inputs - at : kRows;
      pack_panels<kOuterColumns>(MoeRows<const X>{b, b_stride, nullptr}, at, rows, n, panels);
      for (int64_t column = 0; column < n; column += kOuterColumns) {
        for (int64_t m = 0; m < count; m += kMostRows) {
          const int64_t height = count - m < kMostRows ? count - m : kMostRows;
          OuterTile<X> t = tile<X>(panels, column, n, rows, first && at == 0);
          t.a_stride = static_cast<int64_t>(sizeof(uint32_t));
          for (int64_t i = 0; i < height; ++i) {
            t.a[i] = reinterpret_cast<const uint8_t*>(a.at(m + i) + at);
            t.c[i] = c.at(m + i) + column;
          }
          multiply(t, height);
        }
      }
      at += rows;
    } while (at < inputs);
  }

  template <class X>
  static void outer(const MoeRows<const X>& a, const MoeRows<const X>& b, int64_t count, int64_t m, int64_t n, X* out,
                    int64_t out_stride, uint8_t* memory) {
    constexpr int64_t kRows = kOuterSteps * kStepRows<X>;
    uint32_t* panels = reinterpret_cast<uint32_t*>(memory);
    uint32_t* words = panels + kOuterSteps * kMoeColumns;  // of a: [step][kMoeOutputs]
    float* sums = reinterpret_cast<float*>(words + kOuterSteps * kMoeOutputs);
    int64_t at = 0;
    do {  // once even of no rows: the gradient is zero
      const int64_t rows = count - at < kRows ? count - at : kRows;
      pack_panels<kMoeOutputs>(a, at, rows, m, words);
      pack_panels<kOuterColumns>(b, at, rows, n, panels);
      for (int64_t column = 0; column < n; column += kOuterColumns) {
        for (int64_t i = 0; i < m; i += kMostRows) {
          const int64_t height = m - i < kMostRows ? m - i : kMostRows;
          OuterTile<X> t = tile<X>(panels, column, n, round_up(rows, kStepRows<X>), at == 0);
          t.a_stride = kMoeOutputs * static_cast<int64_t>(sizeof(uint32_t));
          for (int64_t k = 0; k < height; ++k) {
            t.a[k] = reinterpret_cast<const uint8_t*>(words + i + k);
            t.c[k] = sums + (i + k) * kMoeColumns + column;
            if (at + rows >= count) t.out[k] = out + (i + k) * out_stride + column;
          }
          multiply(t, height);
        }
      }
      at += rows;
    } while (at < count);
  }

 private:
  // A tile on the panel that holds column `column`.
  template <class X>
  static OuterTile<X> tile(const uint32_t* panels, int64_t column, int64_t n, int64_t rows, bool first) {
    OuterTile<X> t{};
    t.steps = rows / kStepRows<X>;
    t.half = rows % kStepRows<X> != 0;
    t.panel = panels + column * kOuterSteps;
    t.columns = n - column < kOuterColumns ? n - column : kOuterColumns;
    t.first = first;
    return t;
  }

  template <class X>
  static void multiply(const OuterTile<X>& t, int64_t height) {
    with_constant<kMostRows>(height, [&](auto rows) { outer_tile<decltype(rows)::value>(t); });
  }
};

}  // namespace
}  // namespace dsv4::avx512
