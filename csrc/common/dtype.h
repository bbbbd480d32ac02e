// Storage types and their exact bit conversions. Plain C++ and CUDA; no torch, no toolkit headers.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__CUDACC__)
#define DSV4_HOST_DEVICE __host__ __device__ __forceinline__
#else
// Always inlined on the host: a copy emitted by a file with AVX-512 flags could be the one the linker keeps for all
// files.
#define DSV4_HOST_DEVICE inline __attribute__((always_inline))
#endif

// Helpers of files with flags of their own: static for the same reason.
#define DSV4_INLINE static inline __attribute__((always_inline))

namespace dsv4 {

enum class DType : int8_t { kNone, kFloat32, kBFloat16, kUInt8, kInt32, kInt64 };

// Bytes of an element; 0 for none.
DSV4_HOST_DEVICE int64_t size_of(DType dtype) {
  switch (dtype) {
    case DType::kFloat32:
    case DType::kInt32:
      return 4;
    case DType::kBFloat16:
      return 2;
    case DType::kUInt8:
      return 1;
    case DType::kInt64:
      return 8;
    case DType::kNone:
      return 0;
  }
  return 0;
}

struct bf16 {
  uint16_t bits;
};

DSV4_HOST_DEVICE float float_from_bits(uint32_t bits) {
  float value;
  memcpy(&value, &bits, 4);
  return value;
}

DSV4_HOST_DEVICE uint32_t bits_from_float(float value) {
  uint32_t bits;
  memcpy(&bits, &value, 4);
  return bits;
}

DSV4_HOST_DEVICE float to_float(float value) { return value; }
DSV4_HOST_DEVICE float to_float(bf16 value) { return float_from_bits(static_cast<uint32_t>(value.bits) << 16); }

// Round to nearest even; every NaN becomes 0x7FFF, as the cvt instruction gives.
DSV4_HOST_DEVICE bf16 bf16_from_float(float value) {
  const uint32_t bits = bits_from_float(value);
  if ((bits & 0x7FFFFFFFu) > 0x7F800000u) return bf16{0x7FFF};
  return bf16{static_cast<uint16_t>((bits + 0x7FFFu + ((bits >> 16) & 1u)) >> 16)};
}

template <class T>
DSV4_HOST_DEVICE T from_float(float value);
template <>
DSV4_HOST_DEVICE float from_float<float>(float value) {
  return value;
}
template <>
DSV4_HOST_DEVICE bf16 from_float<bf16>(float value) {
  return bf16_from_float(value);
}

// The quantisers' block scale, from the bits of the largest magnitude (an unsigned maximum of bits without their signs,
// so that a NaN or an infinity wins): 2^ceil(log2(max(amax, floor) * inverse_largest)) as e8m0, 255 (NaN) where amax is
// not finite. FP8: floor 1e-4, largest 448; FP4: floor 6 * 2^-126, largest 6.
DSV4_HOST_DEVICE uint8_t e8m0_scale(uint32_t amax_bits, float floor, float inverse_largest) {
  if (amax_bits >= 0x7F800000u) return 255;
  const float amax = float_from_bits(amax_bits);
  const uint32_t ratio = bits_from_float((amax < floor ? floor : amax) * inverse_largest);  // never denormal
  return static_cast<uint8_t>((ratio >> 23) + ((ratio & 0x7FFFFFu) != 0));
}
DSV4_HOST_DEVICE uint8_t fp8_scale(uint32_t amax_bits) { return e8m0_scale(amax_bits, 1e-4f, 1.0f / 448); }
DSV4_HOST_DEVICE uint8_t fp4_scale(uint32_t amax_bits) { return e8m0_scale(amax_bits, 6 * 0x1p-126f, 1.0f / 6); }
// 1 / scale of those, exact; not for 255.
DSV4_HOST_DEVICE float inverse_scale(uint8_t scale) { return float_from_bits((254u - scale) << 23); }

// e4m3 of a finite value: clamped to +-448, rounded to nearest even.
DSV4_HOST_DEVICE uint8_t e4m3_code(float value) {
  const uint32_t bits = bits_from_float(value), magnitude = bits & 0x7FFFFFFFu, most = 0x43E00000u;  // 448
  const uint32_t clamped = magnitude < most ? magnitude : most;
  const uint32_t rounded = ((clamped + 0x7FFFFu + ((clamped >> 20) & 1u)) >> 20) - 960;
  const uint32_t denormal = bits_from_float(float_from_bits(clamped) + 16384.f) - 0x46800000u;  // units of 2^-9
  return static_cast<uint8_t>((clamped < 0x3C800000u ? denormal : rounded) | (bits >> 24 & 0x80u));
}

// e2m1 of a finite value: magnitudes 0, .5, 1, 1.5, 2, 3, 4, 6, clamped, rounded to nearest even; the sign of zero is
// kept. Magnitudes from 2^e on, e = 1 and 2, have steps of 2^(e - 1), those below 2 steps of 1/2; adding 2^(22 + e)
// rounds to the step. The code is the number of steps, the sum's lowest bits, plus 2 e, the lowest of its exponent,
// whose bias of 298 steps six more make a multiple of 8.
DSV4_HOST_DEVICE uint8_t e2m1_code(float value) {
  const uint32_t bits = bits_from_float(value);
  const float x = float_from_bits(bits & 0x7FFFFFFFu), clamped = x < 6.0f ? x : 6.0f;
  const float power = float_from_bits(bits_from_float(clamped < 1.0f ? 1.0f : clamped) & 0x7F800000u);
  const uint32_t sum = bits_from_float(power * 4194307.0f + clamped);  // 2^22 + 3; the product is exact, fused or not
  return static_cast<uint8_t>(((sum + (sum >> 22)) & 7u) | (bits >> 28 & 8u));
}

}  // namespace dsv4
