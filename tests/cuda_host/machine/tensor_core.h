// How products are added up.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>

#include "common/dtype.h"

namespace dsv4::machine {

inline double power_of_two(int exponent) {
  const uint64_t bits = static_cast<uint64_t>(1023 + exponent) << 52;
  double value;
  memcpy(&value, &bits, sizeof(value));
  return value;
}

// One element of a product as a careful guess at a tensor core has it: eight products and the sum before them, each
// exact, are cut off at 2^-24 of the largest power of two among them, added, and the result is cut off to a float.
// ("Numerical behavior of NVIDIA tensor cores", Fasi, Higham, Mikaitis and Pranesh, 2021, found more bits, not fewer.)
inline float sum_of_eight(const float* products, float sum) {
  constexpr uint32_t kExponent = 0x7F800000u;
  uint32_t largest = bits_from_float(sum) & kExponent;
  for (int k = 0; k < 8; ++k) largest = std::max(largest, bits_from_float(products[k]) & kExponent);
  if (largest == kExponent) {  // infinite or NaN
    for (int k = 0; k < 8; ++k) sum += products[k];
    return sum;
  }
  const int exponent = std::max(static_cast<int>(largest >> 23), 1) - 127;
  const double unit = power_of_two(exponent - 24), per = power_of_two(24 - exponent);
  auto total = static_cast<int64_t>(sum * per);
  for (int k = 0; k < 8; ++k) total += static_cast<int64_t>(products[k] * per);
  auto magnitude = static_cast<uint64_t>(total < 0 ? -total : total);
  if (magnitude >> 24 != 0) magnitude &= ~uint64_t{0} << (40 - __builtin_clzll(magnitude));
  return static_cast<float>((total < 0 ? -static_cast<double>(magnitude) : static_cast<double>(magnitude)) * unit);
}

// Of sixteen products.
inline float sum_of_sixteen(const float* a, const float* b, float sum) {
  float products[16];
  for (int k = 0; k < 16; ++k) products[k] = a[k] * b[k];
  return sum_of_eight(products + 8, sum_of_eight(products, sum));
}

}  // namespace dsv4::machine
