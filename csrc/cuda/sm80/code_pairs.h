// Packed e4m3 and e2m1 codes as pairs of bfloat16, in the order of the codes. Moved into a bfloat16's fields a code is
// its value times a power of two, denormals too; a product of pairs mends that and applies a scale.
#pragma once

#include "common/pages.h"
#include "cuda/common/ptx.h"

namespace dsv4::sm80 {

using ptx::Words4;

// Two floats that bfloat16 holds exactly.
DSV4_DEVICE uint32_t pack_exact(float low, float high) {
  return bits_from_float(low) >> 16 | (bits_from_float(high) & 0xFFFF0000u);
}

// The pair of the bfloat16 with these bits.
DSV4_DEVICE uint32_t bf16_twice(uint32_t bits) { return bits * 0x00010001u; }

// Four e4m3 codes times 2^-120 times the factors, a pair; NaN comes as 480.
DSV4_DEVICE ptx::Words2 decode_e4m3(uint32_t codes, uint32_t factors) {
  const uint32_t upper = (codes & 0x80808080u) | (codes >> 4 & 0x07070707u), lower = codes << 4 & 0xF0F0F0F0u;
  return {{ptx::multiply_bf16_pairs(ptx::select_bytes(lower, upper, 0x5140u), factors),
           ptx::multiply_bf16_pairs(ptx::select_bytes(lower, upper, 0x7362u), factors)}};
}

DSV4_DEVICE Words4 decode_e4m3(uint32_t first, uint32_t second, uint32_t factors) {
  const ptx::Words2 low = decode_e4m3(first, factors), high = decode_e4m3(second, factors);
  return {{low.word[0], low.word[1], high.word[0], high.word[1]}};
}

// Not 0: some of the codes is NaN.
DSV4_DEVICE uint32_t e4m3_nans(uint32_t codes) { return ((codes & 0x7F7F7F7Fu) + 0x01010101u) & 0x80808080u; }

DSV4_DEVICE uint32_t e4m3_nans(const Words4& codes) {
  return e4m3_nans(codes.word[0]) | e4m3_nans(codes.word[1]) | e4m3_nans(codes.word[2]) | e4m3_nans(codes.word[3]);
}

// Eight e2m1 codes, the first in the lowest bits, times the scales, a pair. Exact under every e8m0 scale.
DSV4_DEVICE Words4 decode_e2m1(uint32_t codes, uint32_t scales) {
  Words4 pairs;
  DSV4_UNROLL
  for (int i = 0; i < 4; ++i) {  // both codes go to the top of their halves
    const uint32_t both = ptx::select_bytes(codes << 4, codes, 0x4000u + 0x1010u * static_cast<uint32_t>(i));
    const uint32_t moved = (both & 0x80008000u) | (both >> 6 & 0x01C001C0u);  // values times 2^-126
    pairs.word[i] = ptx::multiply_bf16_pairs(ptx::multiply_bf16_pairs(moved, bf16_twice(0x7E80u)), scales);
  }
  return pairs;
}

}  // namespace dsv4::sm80
