// What the attention kernels are told about a call, worked out on the host. Forward and backward share it.
#pragma once

#include "cuda/sm80/attention_ends.h"
#include "cuda/sm80/operands.h"

namespace dsv4::sm80 {

inline constexpr int kGroupWarps = 4;  // share the dims of a group of heads

// Whether pairs of elements are aligned as one.
inline bool paired(const AnyView<3>& view) {
  return view.given() && aligned(view.data, static_cast<uintptr_t>(2 * size_of(view.dtype))) &&
         view.stride[0] % 2 == 0 && view.stride[1] % 2 == 0;
}

inline AttentionPool pool_of(const RowPool& from, int64_t head_dim, int64_t rope_dim) {
  AttentionPool pool = {};
  pool.form = KeyForm::kNone;
  if (!from.given()) return pool;
  pool.table = static_cast<const int32_t*>(from.table.data);
  pool.table_stride = from.table.stride[0];
  pool.blocks = from.table.shape[1];
  constexpr int64_t kLargestPage = int64_t{1} << 31;  // entries have 31 bits
  pool.page_size = static_cast<uint32_t>(from.page_size < kLargestPage ? from.page_size : kLargestPage);
  const bool fp8 = from.bytes.given(), f32 = !fp8 && from.plain.dtype == DType::kFloat32;
  bool whole;  // of 16-byte pieces
  if (fp8) {
    pool.data = static_cast<const uint8_t*>(from.bytes.data);
    pool.pages = from.bytes.shape[0];
    pool.page_stride = from.bytes.stride[0];
    pool.row_stride = fp8_row_bytes(head_dim, rope_dim);
    pool.scales = fp8_scales_at(0, from.page_size, head_dim, rope_dim);
    pool.scale_stride = static_cast<int>(fp8_row_scale_bytes(head_dim, rope_dim));
    whole = (head_dim - rope_dim) % 16 == 0;
  } else {
    const int64_t element = size_of(from.plain.dtype);
    pool.data = static_cast<const uint8_t*>(from.plain.data);
    pool.pages = from.plain.shape[0];
    pool.page_stride = element * from.plain.stride[0];
    pool.row_stride = element * from.plain.stride[1];
    whole = head_dim * element % 16 == 0;
  }
  whole = whole && pool.row_stride % 16 == 0 && aligned(pool.data) && pool.page_stride % 16 == 0;
  if (fp8) {
    pool.form = whole ? KeyForm::kFp8 : KeyForm::kFp8Slow;
  } else if (f32) {
    pool.form = whole ? KeyForm::kF32 : KeyForm::kF32Slow;
  } else {
    pool.form = whole ? KeyForm::kBf16 : KeyForm::kBf16Slow;
  }
  return pool;
}

// Tensor cores multiply bfloat16.
inline bool in_lanes(const SparseAttentionParams& p) {
  const auto f32 = [](const RowPool& pool) { return pool.plain.given() && pool.plain.dtype == DType::kFloat32; };
  return p.query.dtype == DType::kFloat32 || f32(p.window_pool) || f32(p.compressed);
}

inline int64_t slots_of_any_row(const SparseAttentionParams& p) {
  int64_t entries = 0;
  if (p.compressed.given()) {
    entries = p.indices.given() ? p.indices.shape[1] : p.compressed.table.shape[1] * p.compressed.page_size;
  }
  constexpr int64_t kMost = int64_t{1} << 31;  // positions and lengths have 31 bits
  const auto bounded = [](int64_t count) { return count < kMost ? count : kMost; };
  const int64_t places = p.window_pool.table.shape[1] * p.window_pool.page_size;
  return bounded(p.window < places ? p.window : places) + bounded(entries);
}

// Heads of a block on tensor cores, which change no bit: few rows need many blocks, many rows are better served by
// reading a key once for more heads.
inline int heads_of_block(const SparseAttentionParams& p) {
  constexpr int64_t kManyBlocks = 264;  // two on each SM of the largest GPUs
  const int64_t groups = ceil_div(p.query.shape[1], kGroupHeads);
  const bool many = groups > 1 && p.query.shape[0] * (groups / 2) >= kManyBlocks;
  return many ? 2 * kGroupHeads : kGroupHeads;
}

// Dims of a warp of a group.
inline int warp_slice(int64_t head_dim) {
  return static_cast<int>(round_up(ceil_div(round_up(head_dim, 16), kGroupWarps), 16));
}

// But for the splits and where their results go.
inline AttentionArguments arguments_of(const SparseAttentionParams& p) {
  AttentionArguments a = {};
  const int64_t head_dim = p.query.shape[2];
  a.params = p;
  a.window = pool_of(p.window_pool, head_dim, p.rope_dim);
  a.compressed = pool_of(p.compressed, head_dim, p.rope_dim);
  a.sequences = p.window_pool.table.shape[0];
  a.heads = p.query.shape[1];
  a.groups = ceil_div(a.heads, kGroupHeads);
  a.head_dim = static_cast<int>(head_dim);
  a.rope = static_cast<int>(p.rope_dim);
  a.nope = a.head_dim - a.rope;
  a.padded_dim = static_cast<int>(round_up(head_dim, 16));
  a.slice = warp_slice(head_dim);
  a.tile_row = in_lanes(p) ? 4 * a.padded_dim : static_cast<int>(round_up(2 * head_dim, 128));
  a.paired_query = paired(p.query);
  a.paired_out = paired(p.out);
  return a;
}

}  // namespace dsv4::sm80
