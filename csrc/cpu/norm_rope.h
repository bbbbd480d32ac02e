// The norm and rope kernels of each CPU instruction set. ops/norm_rope.cpp chooses among them and has checked the
// parameters.
#pragma once

#include "ops/norm_rope.h"

namespace dsv4 {

// Rows of `elements` that a thread should have to do, at the least: some microseconds of work.
DSV4_HOST_DEVICE int64_t rows_a_piece(int64_t elements) { return elements >= 32768 ? 1 : 32768 / (elements + 1) + 1; }

// Workspace of kernels that hold a row of `floats` in each thread: one slot a thread, 64-byte aligned.
DSV4_HOST_DEVICE int64_t row_slots(int64_t rows, const Context& context) {
  return rows < context.threads ? rows : context.threads;
}
DSV4_HOST_DEVICE int64_t row_slot_bytes(int64_t floats) { return (floats * 4 + 63) / 64 * 64; }
DSV4_HOST_DEVICE int64_t row_workspace_bytes(int64_t rows, int64_t floats, const Context& context) {
  return row_slots(rows, context) * row_slot_bytes(floats);
}

// Sums over rows, in float64: the rows of a group in order, then the groups in order. Enough groups for many threads,
// few enough that their sums stay near; a group for every four rows of a small call.
DSV4_HOST_DEVICE int64_t row_groups(int64_t rows) { return rows >= 256 ? 64 : (rows + 3) / 4; }
DSV4_HOST_DEVICE int64_t row_sums_bytes(int64_t rows, int64_t dim) {
  return row_groups(rows) * dim * static_cast<int64_t>(sizeof(double));
}

}  // namespace dsv4

namespace dsv4::scalar {
Status rms_norm(const RmsNormParams&, const Context&);
Status query_norm_rope(const QueryNormRopeParams&, const Context&);
Status query_norm_rope_backward(const QueryNormRopeBackwardParams&, const Context&);
Status kv_norm_rope(const KvNormRopeParams&, const Context&);
Status norm_rope_backward(const NormRopeBackwardParams&, const Context&);
Status apply_rope(const ApplyRopeParams&, const Context&);
Status rope_rows(const RopeRowsParams&, const Context&);
Status store_window(const StoreWindowParams&, const Context&);
}  // namespace dsv4::scalar

// Head dims and rope dims that are multiples of 32.
namespace dsv4::avx512 {
Status rms_norm(const RmsNormParams&, const Context&);
Status query_norm_rope(const QueryNormRopeParams&, const Context&);
Status query_norm_rope_backward(const QueryNormRopeBackwardParams&, const Context&);
Status kv_norm_rope(const KvNormRopeParams&, const Context&);
Status norm_rope_backward(const NormRopeBackwardParams&, const Context&);
Status apply_rope(const ApplyRopeParams&, const Context&);
Status rope_rows(const RopeRowsParams&, const Context&);
Status store_window(const StoreWindowParams&, const Context&);
}  // namespace dsv4::avx512
