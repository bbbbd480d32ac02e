// How rows of the key-value cache lie in a page (python/dsv4/ops/layout.py is the definition). FP8 pages of b rows: b
// rows of e4m3 codes and then bfloat16 rope dims, b groups of e8m0 scale bytes (one for 64 codes, padded to 8), padding
// to a multiple of the row's bytes.
#pragma once

#include "common/dtype.h"

namespace dsv4 {

inline constexpr int64_t kRowBlock = 64;  // codes that share one scale

DSV4_HOST_DEVICE int64_t round_up(int64_t value, int64_t multiple) {
  return (value + multiple - 1) / multiple * multiple;
}

// Of one row: codes and rope dims; scales, padding included; a page of them.
DSV4_HOST_DEVICE int64_t fp8_row_bytes(int64_t head_dim, int64_t rope_dim) { return head_dim + rope_dim; }
DSV4_HOST_DEVICE int64_t fp8_row_scale_bytes(int64_t head_dim, int64_t rope_dim) {
  return round_up((head_dim - rope_dim + kRowBlock - 1) / kRowBlock, 8);
}
DSV4_HOST_DEVICE int64_t fp8_page_bytes(int64_t page_size, int64_t head_dim, int64_t rope_dim) {
  const int64_t row = fp8_row_bytes(head_dim, rope_dim);
  return round_up(page_size * (row + fp8_row_scale_bytes(head_dim, rope_dim)), row);
}

// Where a row begins, and where its scales do.
DSV4_HOST_DEVICE int64_t fp8_row_at(int64_t offset, int64_t head_dim, int64_t rope_dim) {
  return offset * fp8_row_bytes(head_dim, rope_dim);
}
DSV4_HOST_DEVICE int64_t fp8_scales_at(int64_t offset, int64_t page_size, int64_t head_dim, int64_t rope_dim) {
  return page_size * fp8_row_bytes(head_dim, rope_dim) + offset * fp8_row_scale_bytes(head_dim, rope_dim);
}

// Index keys of `dim` dims: codes of all keys of a page, then their scales. FP4: e2m1 codes, even dim in the low
// nibble, one e8m0 scale for 32; FP8: e4m3 codes, one float32 scale.
inline constexpr int64_t kIndexScaleDims = 32;
DSV4_HOST_DEVICE int64_t fp4_key_bytes(int64_t dim) { return dim / 2 + dim / kIndexScaleDims; }
DSV4_HOST_DEVICE int64_t fp8_key_bytes(int64_t dim) { return dim + 4; }
// Tells FP4 from FP8 by the size of a page; of a page that is neither it says FP8.
DSV4_HOST_DEVICE bool holds_fp4_keys(int64_t page_bytes, int64_t page_size, int64_t dim) {
  return dim % kIndexScaleDims == 0 && page_bytes == page_size * fp4_key_bytes(dim);
}

// The values of an e2m1 code, of an e4m3 code (0x7F and 0xFF are NaN) and of an e8m0 scale (0xFF is NaN).
DSV4_HOST_DEVICE float e2m1_value(uint8_t code) {
  const int magnitude = code & 7;
  const float value = magnitude < 4 ? 0.5f * static_cast<float>(magnitude) : magnitude == 7 ? 6.0f : magnitude - 2.0f;
  return code & 8 ? -value : value;
}
DSV4_HOST_DEVICE float e4m3_value(uint8_t code) {
  const uint32_t magnitude = code & 0x7Fu, sign = static_cast<uint32_t>(code & 0x80u) << 24;
  if (magnitude == 0x7Fu) return float_from_bits(sign | 0x7FC00000u);
  if (magnitude < 8) {  // denormal: units of 2^-9
    return float_from_bits(sign | bits_from_float(static_cast<float>(magnitude) * 0.001953125f));
  }
  return float_from_bits(sign | ((magnitude << 20) + (120u << 23)));
}
DSV4_HOST_DEVICE float e8m0_value(uint8_t scale) {
  if (scale == 0xFF) return float_from_bits(0x7FC00000u);
  return float_from_bits(scale == 0 ? 0x00400000u : static_cast<uint32_t>(scale) << 23);  // 2^-127 is denormal
}

}  // namespace dsv4
