// Products of float32 rows in scratch memory, which the AVX2 kernels for linears, experts and mHC share: weights are
// expanded kPanelRows at a time and kPanelInputs inputs of them (16 KiB), then multiplied with all rows of activations.
// A sum is eight lanes over a chunk of kPanelInputs, added by a tree, chunks one after another: its bits depend on its
// two rows alone. Limit: two FMAs a cycle; a tile of 4 x 3 loads 7 registers for 12 of them.
#pragma once

#include "common/view.h"
#include "cpu/avx2/lanes.h"

namespace dsv4::avx2 {
namespace {

inline constexpr int64_t kPanelRows = 4;
inline constexpr int64_t kPanelInputs = 1024;
inline constexpr int64_t kPanelStride = kPanelInputs + 16;  // rows in different sets of the first-level cache
inline constexpr int64_t kPanelFloats = kPanelRows * kPanelStride;
inline constexpr int64_t kPanelBytes = kPanelFloats * static_cast<int64_t>(sizeof(float));

// out[c][r] for four rows of weights and kRows of activations.
template <int kRows>
DSV4_INLINE void tile(const float* const* w, const float* const* x, int64_t n, bool first, float* const* out) {
  __m256 sums[kRows][4];
#pragma GCC unroll 3
  for (int c = 0; c < kRows; ++c) {
#pragma GCC unroll 4
    for (int r = 0; r < 4; ++r) sums[c][r] = _mm256_setzero_ps();
  }
  for (int64_t i = 0; i < n; i += kLanes) {
    __m256 values[kRows];
#pragma GCC unroll 3
    for (int c = 0; c < kRows; ++c) values[c] = load(x[c] + i);
#pragma GCC unroll 4
    for (int r = 0; r < 4; ++r) {
      const __m256 weights = load(w[r] + i);
#pragma GCC unroll 3
      for (int c = 0; c < kRows; ++c) sums[c][r] = _mm256_fmadd_ps(values[c], weights, sums[c][r]);
    }
  }
#pragma GCC unroll 3
  for (int c = 0; c < kRows; ++c) {
    const __m128 mine = totals(sums[c][0], sums[c][1], sums[c][2], sums[c][3]);
    _mm_storeu_ps(out[c], first ? mine : _mm_add_ps(_mm_loadu_ps(out[c]), mine));
  }
}

// out(c)[r] = or += the products of the panel's rows r < rows with the rows x(c) of activations, c < count, over n
// inputs, a multiple of eight. kPanelRows elements of out(c) are written.
template <class X, class Out>
void multiply(const float* panel, int64_t rows, const X& x, int64_t count, int64_t n, bool first, const Out& out) {
  static_assert(kPanelRows == 4, "rows of a tile");
  const float* w[kPanelRows];
  for (int64_t r = 0; r < kPanelRows; ++r) w[r] = panel + (r < rows ? r : rows - 1) * kPanelStride;
  for (int64_t c = 0; c < count; c += 3) {
    const float* values[3];
    float* to[3];
    const int64_t here = count - c < 3 ? count - c : 3;
    for (int64_t i = 0; i < here; ++i) {
      values[i] = x(c + i);
      to[i] = out(c + i);
    }
    if (here == 3) {
      tile<3>(w, values, n, first, to);
    } else if (here == 2) {
      tile<2>(w, values, n, first, to);
    } else {
      tile<1>(w, values, n, first, to);
    }
  }
}

// The same with all inputs of `rows` weight rows: expand(row, first, count, to) gives inputs of a row as float32, with
// zeros up to the next multiple of eight. x(c) are rows of `inputs` with zeros behind them, alike.
template <class Expand, class X, class Out>
void product(const Expand& expand, int64_t rows, int64_t inputs, float* panel, const X& x, int64_t count,
             const Out& out) {
  for (int64_t first = 0; first == 0 || first < inputs; first += kPanelInputs) {
    const int64_t n = inputs - first < kPanelInputs ? inputs - first : kPanelInputs;
    for (int64_t row = 0; row < rows; row += kPanelRows) {
      const int64_t here = rows - row < kPanelRows ? rows - row : kPanelRows;
      for (int64_t r = 0; r < here; ++r) expand(row + r, first, n, panel + r * kPanelStride);
      multiply(
          panel, here, [&](int64_t c) { return x(c) + first; }, count, round_up(n, kLanes), first == 0,
          [&](int64_t c) { return out(c) + row; });
    }
  }
}

// Elements [first, first + count) of a row of a plain matrix, as `product` takes them.
DSV4_INLINE void widen_row(const AnyView<2>& matrix, int64_t row, int64_t first, int64_t count, float* to) {
  if (matrix.dtype == DType::kBFloat16) {
    widen(matrix.as<const bf16>().at(row, first), count, to);
  } else {
    widen(matrix.as<const float>().at(row, first), count, to);
  }
}

// Inputs [first, first + count) of a row of e4m3 or e2m1 codes times their scales; scale(b) is that of block b of 128
// or 32 inputs, of which `first` begins one. `stride`: bytes from a row to the next. What the panel after this one
// reads is asked for: pieces of rows are no stream that the hardware would see.
template <bool kFp4, class Scale>
DSV4_INLINE void expand_codes(const uint8_t* codes, int64_t stride, int64_t first, int64_t count, const Scale& scale,
                              float* to) {
  constexpr int64_t kBlock = kFp4 ? 32 : 128, kCodes = kFp4 ? 2 : 1;  // of a byte
  const auto values = [](const uint8_t* at) { return kFp4 ? e2m1_values(at) : e4m3_values(at); };
  codes += first / kCodes;
  const auto factor_of = [&](int64_t i) { return _mm256_set1_ps(scale((first + i) / kBlock)); };
  int64_t i = 0;
  for (; i + kBlock <= count; i += kBlock) {
    const __m256 factor = factor_of(i);
    const uint8_t* block = codes + i / kCodes;
    if (i % (64 * kCodes) == 0) ask(block + kPanelRows * stride);
    if (kBlock > 64) ask(block + kPanelRows * stride + 64);
#pragma GCC unroll 16
    for (int64_t d = 0; d < kBlock; d += kLanes) {
      store(to + i + d, _mm256_mul_ps(values(block + d / kCodes), factor));
    }
  }
  for (; i < count; i += kLanes) {
    uint8_t some[kLanes] = {};
    memcpy(some, codes + i / kCodes, static_cast<size_t>((count - i < kLanes ? count - i : kLanes) / kCodes));
    store(to + i, _mm256_mul_ps(values(some), factor_of(i)));
  }
  for (i = count; i % kLanes != 0; ++i) to[i] = 0;  // code 0 times a scale of infinity is no zero
}

}  // namespace
}  // namespace dsv4::avx2
