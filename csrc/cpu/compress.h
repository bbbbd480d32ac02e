// The compressor's kernels of each CPU instruction set. ops/compress.cpp chooses among them and has checked the
// parameters.
#pragma once

#include "cpu/norm_rope.h"
#include "ops/compress.h"

namespace dsv4 {

// One position that an entry pools: its values and its gate, whose position bias is still to be added unless null.
struct PooledRow {
  const float *kv, *gate, *ape;
};

// Of one thread: the positions of an entry, its row in float32 and, for the Hadamard rotation, in float64.
DSV4_HOST_DEVICE int64_t compress_slot_bytes(const CompressParams& p) {
  const int64_t head_dim = p.norm_weight.size(0), pooled = p.kv.size(1) / head_dim * p.ratio;
  const int64_t pointers = static_cast<int64_t>(sizeof(PooledRow) / sizeof(float)) * pooled;
  return row_slot_bytes(pointers) + row_slot_bytes(head_dim) + row_slot_bytes(2 * head_dim);
}
DSV4_HOST_DEVICE int64_t compress_slots_bytes(const CompressParams& p, const Context& context) {
  return row_slots(p.kv.size(0), context) * compress_slot_bytes(p);
}

}  // namespace dsv4

namespace dsv4::scalar {
Status compress(const CompressParams&, const Context&);
}  // namespace dsv4::scalar

// Head dims and rope dims that are multiples of 32.
namespace dsv4::avx512 {
Status compress(const CompressParams&, const Context&);
}  // namespace dsv4::avx512
