// RMS norm and rotary embedding of queries, and of the raw rows that go into the window's pages. T rows. X, the type of
// the rows, is bfloat16 or float32. The last axis of every tensor is contiguous.
#pragma once

#include "common/context.h"
#include "common/status.h"
#include "common/view.h"
#include "ops/pool.h"

namespace dsv4 {

// x / sqrt(mean(x^2) + eps) times weight, where there is one, rounded once to X.
struct RmsNormParams {
  AnyView<2> x;       // X [T, D]
  AnyView<1> weight;  // bfloat16 or float32 [D], or none
  double eps;
  AnyView<2> result;  // X [T, D]
};
Status rms_norm(const RmsNormParams&, const Context&);

// kv / sqrt(mean(kv^2) + eps) * weight rounded to X, the last R dims rotated in pairs (x[2i], x[2i + 1]) by (cos, sin)
// and rounded to X.
struct KvNormRopeParams {
  AnyView<2> kv;      // X [T, D]
  AnyView<1> weight;  // bfloat16 or float32 [D]
  AnyView<3> rope;    // float32 [T, R / 2, 2]
  double eps;
  AnyView<2> result;  // X [T, D]
};
Status kv_norm_rope(const KvNormRopeParams&, const Context&);

// The gradients of rms_norm and kv_norm_rope, for which every rounding is the identity. With s = mean(x^2) + eps and g
// grad, whose last R dims are rotated back: grad_x = g w s^-1/2 - x s^-3/2 mean(g w x), and grad_weight the sum of
// g x s^-1/2 over rows. Each is rounded once. Rows are summed in float64, in groups that depend on T alone.
struct NormRopeBackwardParams {
  AnyView<2> grad;    // X [T, D]
  AnyView<2> x;       // X [T, D]
  AnyView<1> weight;  // w: bfloat16 or float32 [D], or none: ones
  AnyView<3> rope;    // float32 [T, R / 2, 2]; none for rms_norm
  double eps;
  AnyView<2> grad_x;       // X [T, D]
  AnyView<1> grad_weight;  // in the type of weight [D], given where weight is
  Workspace workspace;
};

// What the call needs in workspace.bytes. 0 for parameters that are not valid.
int64_t norm_rope_backward_workspace_bytes(const NormRopeBackwardParams&, const Context&);

Status rms_norm_backward(const NormRopeBackwardParams&, const Context&);
Status kv_norm_rope_backward(const NormRopeBackwardParams&, const Context&);

// The last R dims of each head rotated, or rotated back, and rounded to X; the others keep their bits.
struct ApplyRopeParams {
  AnyView<3> x;     // X [T, H, D]
  AnyView<3> rope;  // float32 [T, R / 2, 2]
  bool inverse;
  AnyView<3> result;  // X [T, H, D]
};
Status apply_rope(const ApplyRopeParams&, const Context&);

// cos and sin of position times frequency; the product is rounded to float32, as is the position.
struct RopeRowsParams {
  AnyView<1> position;   // int32 or int64 [T]
  AnyView<1> frequency;  // float32 [R / 2]
  AnyView<3> result;     // float32 [T, R / 2, 2], (cos, sin)
};
Status rope_rows(const RopeRowsParams&, const Context&);

// Each head: squares, their mean, mean + eps, its inverse root and the product with it, each rounded to X; then the
// last R dims rotated in pairs (x[2i], x[2i + 1]) by (cos, sin) and rounded to X.
struct QueryNormRopeParams {
  AnyView<3> query;  // X [T, H, D]
  AnyView<3> rope;   // float32 [T, R / 2, 2]
  double eps;
  AnyView<3> result;  // X [T, H, D]
};
Status query_norm_rope(const QueryNormRopeParams&, const Context&);

// The gradient of that call, for which every rounding is the identity. With m the rounded mean + eps, r its rounded
// inverse root, and G grad rotated back: G r - q m^-1.5 mean(G q), rounded once.
struct QueryNormRopeBackwardParams {
  AnyView<3> grad;   // X [T, H, D]
  AnyView<3> query;  // X [T, H, D]
  AnyView<3> rope;   // float32 [T, R / 2, 2]
  double eps;
  AnyView<3> result;  // X [T, H, D]
};
Status query_norm_rope_backward(const QueryNormRopeBackwardParams&, const Context&);

// kv / sqrt(mean(kv^2) + eps) * weight rounded to X, the last R dims rotated and rounded to X, written to row
// position[t] of sequence[t]. FP8 rows: the dims before the last R in blocks of 64, each with the scale
// 2^ceil(log2(max(amax, 1e-4) / 448)). What the table does not store is dropped.
struct StoreWindowParams {
  AnyView<2> kv;        // X [T, D]
  AnyView<1> weight;    // bfloat16 or float32 [D]
  AnyView<3> rope;      // float32 [T, R / 2, 2]
  RowPool pool;         // written
  AnyView<1> sequence;  // int32 [T], a row of the table
  AnyView<1> position;  // int32 [T]
  double eps;
  Workspace workspace;
};

// What the call needs in workspace.bytes under this context. 0 for parameters that are not valid.
int64_t store_window_workspace_bytes(const StoreWindowParams&, const Context&);

Status store_window(const StoreWindowParams&, const Context&);

}  // namespace dsv4
