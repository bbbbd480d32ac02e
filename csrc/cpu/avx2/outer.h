// Products whose second operand is read along its rows, where no lanes are added: values weighted by probabilities, and
// gradients. Limit: two FMAs a cycle; a step of a whole tile loads 4 registers and broadcasts 3 numbers for 12 of them.
#pragma once

#include "cpu/avx2/lanes.h"

namespace dsv4::avx2 {
namespace {

inline constexpr int64_t kOuterRows = 3;      // of a tile
inline constexpr int64_t kOuterColumns = 32;  // of a tile

// The operands of tiles: step s of row m of a at a[m * a_row + s * a_step], of b, a row of columns, at b + s * b_step.
struct Outer {
  const float* a;
  int64_t a_row, a_step;
  const float* b;
  int64_t b_step, steps;
};

template <int kRows>
DSV4_INLINE void outer_tile(const Outer& of, float* sums, int64_t stride) {
  constexpr int kVectors = kOuterColumns / kLanes;
  __m256 tile[kRows][kVectors];
#pragma GCC unroll 3
  for (int m = 0; m < kRows; ++m) {
#pragma GCC unroll 4
    for (int i = 0; i < kVectors; ++i) tile[m][i] = _mm256_setzero_ps();
  }
  const float *a = of.a, *b = of.b;
  for (int64_t s = 0; s < of.steps; ++s, a += of.a_step, b += of.b_step) {
    __m256 row[kRows];
#pragma GCC unroll 3
    for (int m = 0; m < kRows; ++m) row[m] = _mm256_broadcast_ss(a + m * of.a_row);
#pragma GCC unroll 4
    for (int i = 0; i < kVectors; ++i) {
      const __m256 columns = load(b + i * kLanes);
#pragma GCC unroll 3
      for (int m = 0; m < kRows; ++m) tile[m][i] = _mm256_fmadd_ps(row[m], columns, tile[m][i]);
    }
  }
#pragma GCC unroll 3
  for (int m = 0; m < kRows; ++m) {
#pragma GCC unroll 4
    for (int i = 0; i < kVectors; ++i) {
      float* to = sums + m * stride + i * kLanes;
      store(to, _mm256_add_ps(load(to), tile[m][i]));
    }
  }
}

// sums[m * stride + n] += the sum over the steps, in their order, of a's row m times column n of b, for kOuterColumns
// columns and `rows` rows, kOuterRows at most. That sum starts at zero: many steps in short calls lose little.
DSV4_INLINE void add_outer(const Outer& of, int64_t rows, float* sums, int64_t stride) {
  if (rows >= 3) {
    outer_tile<3>(of, sums, stride);
  } else if (rows == 2) {
    outer_tile<2>(of, sums, stride);
  } else {
    outer_tile<1>(of, sums, stride);
  }
}

}  // namespace
}  // namespace dsv4::avx2
