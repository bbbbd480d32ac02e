// The Hadamard rotation of rows in registers, of up to 1024 dims: eight neighbouring dims a lane and step
// (row_lanes.h), so three stages run in a lane, those between lanes by shuffles, the last between steps.
//
// Every element is cut into two floats so coarse that the sums of either fit in a float: float32 adds them exactly, and
// a row of bfloat16 has the bits of the float64 definition.
#pragma once

#include <cmath>

#include "cuda/sm80/row_lanes.h"

namespace dsv4::sm80 {

inline constexpr int kHadamardSteps = 4;
inline constexpr int kHadamardDims = 32 * 8 * kHadamardSteps;

// 1 / sqrt(n), and what cuts the elements of a row.
struct HadamardScale {
  TwoFloats factor;
  int levels;  // log2 of n, at least 2
};

inline HadamardScale hadamard_scale(int64_t dims) {
  const double root = std::pow(static_cast<double>(dims), -0.5);
  const float high = static_cast<float>(root);
  int levels = 2;
  while (int64_t{1} << levels < dims) ++levels;
  return {{high, static_cast<float>(root - static_cast<double>(high))}, levels};
}

// The parts of a row's elements, from the bits of its largest magnitude. Elements of very large rows are taken times
// 2^-60; rows that are not finite, or zero, stay whole.
struct HadamardCut {
  float coarse;  // adding it rounds to the coarse part
  bool zero, whole, large;

  DSV4_DEVICE HadamardCut(uint32_t largest, int levels) {
    zero = largest == 0;
    whole = zero || largest >= 0x7F800000u;
    large = !whole && largest >= 0x66000000u;  // 2^77
    const uint32_t exponent = (largest >> 23) - (large ? 60u : 0u) + static_cast<uint32_t>(levels);
    coarse = float_from_bits(exponent << 23 | 0x400000u);  // 1.5 times a power of two
  }
  DSV4_DEVICE void cut(float x, float& high, float& low) const {
    if (large) x = ptx::multiply(x, 0x1p-60f);
    high = whole ? x : ptx::add(ptx::add(x, coarse), -coarse);
    low = whole ? (zero ? x : 0.0f) : ptx::add(x, -high);  // zeros keep their signs in both parts
  }
  DSV4_DEVICE float join(float high, float low, const TwoFloats& factor) const {
    const TwoFloats sum = two_sum(high, low), product = two_product(sum.high, factor.high);
    const float rest = ptx::fma(sum.high, factor.low, ptx::fma(sum.low, factor.high, product.low));
    const float result = nearest({product.high, rest});
    return large ? ptx::multiply(result, 0x1p60f) : result;
  }
};

DSV4_DEVICE void butterfly(float& a, float& b) {
  const float sum = ptx::add(a, b);
  b = ptx::add(a, -b);
  a = sum;
}

// Element 8 (step * lanes + lane) + e is value[step][e].
template <int kSteps>
DSV4_DEVICE void hadamard_sums(const RowLanes& lanes, int dim, float (&value)[kSteps][8]) {
  DSV4_UNROLL
  for (int half = 1; half < 8; half *= 2) {
    if (half >= dim) break;
    DSV4_UNROLL
    for (int s = 0; s < kSteps; ++s) {
      DSV4_UNROLL
      for (int e = 0; e < 8; ++e) {
        if ((e & half) == 0) butterfly(value[s][e], value[s][e | half]);
      }
    }
  }
  for (int mask = 1; mask < lanes.count; mask *= 2) {
    const float sign = (lanes.lane & mask) == 0 ? 1.0f : -1.0f;
    DSV4_UNROLL
    for (int s = 0; s < kSteps; ++s) {
      DSV4_UNROLL
      for (int e = 0; e < 8; ++e) {
        const float other = ptx::shuffle_xor(value[s][e], mask);
        value[s][e] = ptx::fma(value[s][e], sign, other);
      }
    }
  }
  DSV4_UNROLL
  for (int half = 1; half < kSteps; half *= 2) {
    DSV4_UNROLL
    for (int s = 0; s < kSteps; ++s) {
      DSV4_UNROLL
      for (int e = 0; e < 8; ++e) {
        if ((s & half) == 0) butterfly(value[s][e], value[s | half][e]);
      }
    }
  }
}

// The row of eights at 8 (step * lanes + lane), zeros past its end, times the Hadamard matrix over sqrt(n).
template <int kSteps>
DSV4_DEVICE void hadamard_row(const RowLanes& lanes, int dim, const HadamardScale& scale, float (&value)[kSteps][8]) {
  uint32_t largest = 0;
  DSV4_UNROLL
  for (int s = 0; s < kSteps; ++s) {
    const uint32_t own = largest_magnitude(value[s], 8);
    largest = largest < own ? own : largest;
  }
  const HadamardCut cut(largest_of_lanes(largest, lanes.count), scale.levels);
  float low[kSteps][8];
  DSV4_UNROLL
  for (int s = 0; s < kSteps; ++s) {
    DSV4_UNROLL
    for (int e = 0; e < 8; ++e) cut.cut(value[s][e], value[s][e], low[s][e]);
  }
  hadamard_sums(lanes, dim, value);
  hadamard_sums(lanes, dim, low);
  DSV4_UNROLL
  for (int s = 0; s < kSteps; ++s) {
    DSV4_UNROLL
    for (int e = 0; e < 8; ++e) value[s][e] = cut.join(value[s][e], low[s][e], scale.factor);
  }
}

}  // namespace dsv4::sm80
