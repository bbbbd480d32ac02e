// Tables of e4m3 values times powers of two, for byte permutations.
#pragma once

#include <cstdint>

namespace dsv4::avx512 {
namespace {

// e8m0 scales that fold into bfloat16 values of e4m3, far from denormal numbers: 2^-63 to 1.
inline constexpr int kLeastScale = 64, kMostScaleFp8 = 127;

// The upper and lower bytes of the bfloat16 values of e4m3's 128 magnitudes times 2^-shift, for every shift that folds.
struct E4m3Bytes {
  struct Table {
    uint8_t high[128], low[128];
  };
  Table of[kMostScaleFp8 - kLeastScale + 1] = {};

  constexpr E4m3Bytes() {
    for (int shift = 0; shift <= kMostScaleFp8 - kLeastScale; ++shift) {
      for (int code = 0; code < 128; ++code) {
        int exponent = code >> 3, mantissa = code & 7;
        if (exponent == 0) {  // steps of 2^-9: bring the highest bit to the front
          for (exponent = 1; mantissa != 0 && (mantissa & 8) == 0; --exponent) mantissa *= 2;
        }
        int bits = code == 0 ? 0 : ((exponent + 120 - shift) << 7) | (mantissa & 7) << 4;
        if (code == 127) bits = 0x7FC0;
        of[shift].high[code] = static_cast<uint8_t>(bits >> 8);
        of[shift].low[code] = static_cast<uint8_t>(bits);
      }
    }
  }
};
alignas(64) static constexpr E4m3Bytes kE4m3;

}  // namespace
}  // namespace dsv4::avx512
