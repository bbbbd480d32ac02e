// Where index keys lie, and how a thread turns one into bfloat16. FP4 codes take their scale along, which bfloat16
// holds exactly (e2m1 has two significant bits, a scale none); the float32 scale of an FP8 key stays apart, and the
// key's products are multiplied by it.
#pragma once

#include "common/pages.h"
#include "cuda/common/ptx.h"
#include "ops/index.h"
#include "ops/index_keys.h"

namespace dsv4::sm80 {

using ptx::Words4;

// Strides in bytes.
struct IndexPool {
  const uint8_t* data;
  const int32_t* table;
  int64_t table_stride;  // elements
  int64_t page_stride, key_stride;
  int64_t scales;  // where a page's scales begin
  int64_t sequences, pages;
  uint32_t page_size;
  int scale_bytes;  // of a key
  int dim;
  IndexKeyFormat format;
  bool vector;  // keys are made of whole, aligned units of 32 dims
};

// An entry of a sequence of the table, below the entries of the table.
DSV4_DEVICE IndexKey find_index_key(const IndexPool& pool, int64_t sequence, uint32_t entry) {
  const int64_t page = pool.table[sequence * pool.table_stride + entry / pool.page_size];
  if (page < 0 || page >= pool.pages) return IndexKey{nullptr, nullptr};
  const int64_t offset = entry % pool.page_size;
  const uint8_t* start = pool.data + page * pool.page_stride;
  return IndexKey{start + offset * pool.key_stride, start + pool.scales + offset * pool.scale_bytes};
}

// What the products of a key are multiplied by; the bytes may lie anywhere.
DSV4_DEVICE float index_key_scale(const IndexPool& pool, const IndexKey& key) {
  if (pool.format != IndexKeyFormat::kFp8) return 1.0f;
  uint32_t bits = 0;
  DSV4_UNROLL
  for (int i = 0; i < 4; ++i) bits |= static_cast<uint32_t>(key.scales[i]) << (8 * i);
  return float_from_bits(bits);
}

// One dim of a key, without index_key_scale.
DSV4_DEVICE float index_key_value(const IndexPool& pool, const IndexKey& key, int d) {
  switch (pool.format) {
    case IndexKeyFormat::kFp4: {
      const int code = key.values[d / 2] >> (d % 2 * 4) & 15;
      return ptx::multiply(e2m1_value(static_cast<uint8_t>(code)), e8m0_value(key.scales[d / kIndexScaleDims]));
    }
    case IndexKeyFormat::kFp8:
      return e4m3_value(key.values[d]);
    case IndexKeyFormat::kBFloat16:
      return to_float(reinterpret_cast<const bf16*>(key.values)[d]);
    default:
      return reinterpret_cast<const float*>(key.values)[d];
  }
}

// Two floats that bfloat16 holds exactly.
DSV4_DEVICE uint32_t pack_index_pair(float low, float high) {
  return bits_from_float(low) >> 16 | (bits_from_float(high) & 0xFFFF0000u);
}

// Eight e2m1 codes, the first in the lowest bits, times the scale. Moved into a float's fields a code is its value
// times 2^-126.
DSV4_DEVICE Words4 decode_index_fp4(uint32_t codes, uint8_t scale) {
  // The factor 2^126 and the scale are one float up to 2^127.
  const bool small = scale <= 128;
  const float factor = float_from_bits((small ? scale + 126u : 253u) << 23);
  Words4 piece;
  DSV4_UNROLL
  for (int i = 0; i < 4; ++i) {
    float value[2];
    DSV4_UNROLL
    for (int e = 0; e < 2; ++e) {
      const uint32_t code = codes >> (8 * i + 4 * e);
      value[e] = ptx::multiply(float_from_bits((code & 8u) << 28 | (code & 7u) << 22), factor);
      if (!small) value[e] = ptx::multiply(value[e], e8m0_value(scale));
    }
    piece.word[i] = pack_index_pair(value[0], value[1]);
  }
  return piece;
}

// Eight e4m3 codes. Moved into a float's fields a code is its value times 2^-120.
DSV4_DEVICE Words4 decode_index_fp8(uint32_t low, uint32_t high) {
  Words4 piece;
  DSV4_UNROLL
  for (int i = 0; i < 4; ++i) {
    float value[2];
    DSV4_UNROLL
    for (int e = 0; e < 2; ++e) {
      const uint32_t code = (i < 2 ? low : high) >> (i % 2 * 16 + 8 * e);
      const float moved = float_from_bits((code & 0x80u) << 24 | (code & 0x7Fu) << 20);
      value[e] = (code & 0x7Fu) == 0x7Fu ? float_from_bits(0x7FC00000u) : ptx::multiply(moved, 0x1p120f);
    }
    piece.word[i] = pack_index_pair(value[0], value[1]);
  }
  return piece;
}

// Eight dims element by element, zeros past the last.
DSV4_DEVICE Words4 gather_index_key(const IndexPool& pool, const IndexKey& key, int first) {
  Words4 piece;
  DSV4_UNROLL
  for (int i = 0; i < 4; ++i) {
    const int d = first + 2 * i;
    const float low = d < pool.dim ? index_key_value(pool, key, d) : 0.0f;
    const float high = d + 1 < pool.dim ? index_key_value(pool, key, d + 1) : 0.0f;
    piece.word[i] = pack_index_pair(low, high);
  }
  return piece;
}

}  // namespace dsv4::sm80
