// Where index keys lie, and how a thread turns one into bfloat16. FP4 codes take their scale along, which bfloat16
// holds exactly (e2m1 has two significant bits, a scale none); the float32 scale of an FP8 key stays apart, and the
// key's products are multiplied by it.
#pragma once

#include "cuda/sm80/code_pairs.h"
#include "ops/index.h"
#include "ops/index_keys.h"

namespace dsv4::sm80 {

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

// Eight dims element by element, zeros past the last.
DSV4_DEVICE Words4 gather_index_key(const IndexPool& pool, const IndexKey& key, int first) {
  Words4 piece;
  DSV4_UNROLL
  for (int i = 0; i < 4; ++i) {
    const int d = first + 2 * i;
    const float low = d < pool.dim ? index_key_value(pool, key, d) : 0.0f;
    const float high = d + 1 < pool.dim ? index_key_value(pool, key, d + 1) : 0.0f;
    piece.word[i] = pack_exact(low, high);
  }
  return piece;
}

}  // namespace dsv4::sm80
