// Activations rounded to e4m3 as the contract of the quantised products has it (python/dsv4/ops/quantize.py), as
// values. Written so that compilers find the lanes.
#pragma once

#include "common/dtype.h"

namespace dsv4::scalar {
namespace {

inline constexpr int64_t kQuantBlock = 128;  // activations that share a scale

// The nearest e4m3 value of |value| <= 448, ties to even.
DSV4_HOST_DEVICE float round_to_e4m3(float value) {
  const uint32_t bits = bits_from_float(value), magnitude = bits & 0x7FFFFFFFu;
  const float shift = 1.5f * (1 << 14);  // float32 of this size has steps of 2^-9, those of e4m3's denormals
  const float small = (value + shift) - shift;
  const float large = float_from_bits((bits + 0x7FFFFu + ((bits >> 20) & 1u)) & 0xFFF00000u);
  return magnitude >= (127u - 6u) << 23 ? large : small;
}

// NaN for a whole block with an infinity or a NaN.
template <class X>
DSV4_INLINE void quantise(const X* x, int64_t inputs, float* to) {
  for (int64_t first = 0; first < inputs; first += kQuantBlock) {
    const int64_t end = first + kQuantBlock < inputs ? first + kQuantBlock : inputs;
    uint32_t largest = 0;
    for (int64_t i = first; i < end; ++i) {
      const uint32_t magnitude = bits_from_float(to_float(x[i])) & 0x7FFFFFFFu;
      largest = magnitude > largest ? magnitude : largest;
    }
    const uint8_t code = fp8_scale(largest);
    if (code == 255) {
      for (int64_t i = first; i < end; ++i) to[i] = float_from_bits(0x7FC00000u);
      continue;
    }
    const float scale = float_from_bits(static_cast<uint32_t>(code) << 23), inverse = inverse_scale(code);
    for (int64_t i = first; i < end; ++i) {
      const float scaled = to_float(x[i]) * inverse, above = scaled < -448.0f ? -448.0f : scaled;
      to[i] = round_to_e4m3(above > 448.0f ? 448.0f : above) * scale;
    }
  }
}

}  // namespace
}  // namespace dsv4::scalar
