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

namespace dsv4 {

enum class DType : int8_t { kNone, kFloat32, kBFloat16, kUInt8, kInt32, kInt64 };

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

}  // namespace dsv4
