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

// Where the gradients of such a position go.
struct PooledGradient {
  float *kv, *gate;
};

template <class Params>
DSV4_HOST_DEVICE int64_t pooled_positions(const Params& p) {
  return p.kv.size(1) / p.norm_weight.size(0) * p.ratio;
}
template <class T>
DSV4_HOST_DEVICE int64_t list_bytes(int64_t count) {
  return row_slot_bytes(static_cast<int64_t>(sizeof(T) / sizeof(float)) * count);
}

// Of one thread: the positions of an entry, its row in float32 and, for the Hadamard rotation, in float64.
template <class Params>
DSV4_HOST_DEVICE int64_t compress_slot_bytes(const Params& p) {
  const int64_t head_dim = p.norm_weight.size(0);
  return list_bytes<PooledRow>(pooled_positions(p)) + row_slot_bytes(head_dim) + row_slot_bytes(2 * head_dim);
}
DSV4_HOST_DEVICE int64_t compress_slots_bytes(const CompressParams& p, const Context& context) {
  return row_slots(p.kv.size(0), context) * compress_slot_bytes(p);
}
DSV4_HOST_DEVICE int64_t compress_slots_bytes(const CompressEntriesParams& p, const Context& context) {
  return row_slots(p.kv.size(0) / p.ratio, context) * compress_slot_bytes(p);
}

// Of a group of entries: the above, where their gradients go, the gradient of the finished row in float32 and of the
// pooled one in float64, the weights of some channels. After them the groups' sums.
inline constexpr int64_t kPoolChannels = 32;
DSV4_HOST_DEVICE int64_t compress_gradient_slot_bytes(const CompressEntriesParams& p) {
  const int64_t head_dim = p.norm_weight.size(0);
  return compress_slot_bytes(p) + list_bytes<PooledGradient>(pooled_positions(p)) + row_slot_bytes(head_dim) +
         row_slot_bytes(2 * head_dim) + row_slot_bytes(2 * kPoolChannels * pooled_positions(p));
}
DSV4_HOST_DEVICE int64_t compress_gradient_bytes(const CompressEntriesBackwardParams& p, const Context& context) {
  const int64_t groups = row_groups(p.grad.size(0));
  return row_slots(groups, context) * compress_gradient_slot_bytes(p.forward) +
         row_sums_bytes(p.grad.size(0), p.grad.size(1));
}

}  // namespace dsv4

namespace dsv4::scalar {
Status compress(const CompressParams&, const Context&);
Status compress_entries(const CompressEntriesParams&, const Context&);
Status compress_entries_backward(const CompressEntriesBackwardParams&, const Context&);
}  // namespace dsv4::scalar

// Head dims and rope dims that are multiples of 32.
namespace dsv4::avx512 {
Status compress(const CompressParams&, const Context&);
Status compress_entries(const CompressEntriesParams&, const Context&);
Status compress_entries_backward(const CompressEntriesBackwardParams&, const Context&);
}  // namespace dsv4::avx512
