// Attention of each row over a window of raw rows and compressed entries, under one softmax with a sink. T rows of
// queries, H heads, D head_dim. Keys and values are the same rows, shared by all heads, in pages (common/pages.h).
// X, the type of query and out, is bfloat16 or float32. The last axis of every tensor is contiguous.
#pragma once

#include "common/context.h"
#include "common/status.h"
#include "common/view.h"
#include "ops/pool.h"

namespace dsv4 {

// With s_j = scale * query . key_j over the row's keys, lse = log sum_j exp(s_j) and
// out = sum_j exp(s_j) key_j / (exp(sink) + sum_j exp(s_j)), rounded to X; then the rotation of `rope` is undone on the
// last dims, in float32, and the result rounded again. Where X is bfloat16, the numerators exp(s_j - max s) are rounded
// to it before the product with the values; the denominator sums unrounded ones. Keys of row t: positions position[t] -
// window + 1 ... position[t] of the window pool (from 0 on); entries indices[t] of the compressed pool that lie in [0,
// lengths[t]), or without indices all entries below lengths[t]. What is not stored is left out. No other memory has any
// influence. A row without keys: out 0, lse +inf.
struct SparseAttentionParams {
  AnyView<3> query;     // X [T, H, D]
  RowPool window_pool;  //
  RowPool compressed;   // optional; its table has as many sequences as window_pool's
  AnyView<1> sequence;  // int32 [T], a row of the tables
  AnyView<1> position;  // int32 [T]
  AnyView<2> indices;   // int32 [T, k], optional; any order, each entry at most once, any value elsewhere
  AnyView<1> lengths;   // int32 [T], given with compressed
  AnyView<1> sink;      // float32 [H]
  AnyView<3> rope;      // float32 [T, R / 2, 2], (cos, sin); optional
  int64_t rope_dim;     // bfloat16 dims at the end of an FP8 row
  int64_t window;       // >= 1
  float scale;
  AnyView<3> out;  // X [T, H, D]
  AnyView<2> lse;  // float32 [T, H]
  Workspace workspace;
};

// What the call needs in workspace.bytes under this context; out, lse and workspace are not read. 0 for parameters that
// are not valid.
int64_t sparse_attention_workspace_bytes(const SparseAttentionParams&, const Context&);

Status sparse_attention(const SparseAttentionParams&, const Context&);

// The gradient of that call through out and lse. With p_j = exp(s_j - lse) over their sum, which is 1 but for rounding,
// g = sigmoid(lse - sink), G = grad_out turned by `rope` and rounded to X, and delta = g sum_j p_j G . key_j, which is
// grad_out . out, a row and head gives
//   d s_j = p_j (g (G . key_j - delta) + grad_lse), d query = scale sum_j d s_j key_j,
//   d key_j = scale d s_j query + p_j g G,          d sink = -delta (1 - g).
// A row without keys gives nothing. Gradients of keys and of sink are sums over the rows in their order, of sums over
// the heads: they do not depend on the threads, nor those of keys on rows that do not read them. A key listed twice
// counts twice.
struct SparseAttentionBackwardParams {
  SparseAttentionParams forward;  // the call and its lse, with plain pools dense; out and workspace are not used
  AnyView<3> grad_out;            // X [T, H, D]
  AnyView<2> grad_lse;            // float32 [T, H]
  AnyView<3> grad_query;          // X [T, H, D]
  AnyView<3> grad_window;      // as window_pool.plain, dense; a pool of bytes has no gradient, and none is given here
  AnyView<3> grad_compressed;  // the same for compressed.plain
  AnyView<1> grad_sink;        // float32 [H]
  Workspace workspace;
};

// As above; of the results and the workspace nothing is read.
int64_t sparse_attention_backward_workspace_bytes(const SparseAttentionBackwardParams&, const Context&);

Status sparse_attention_backward(const SparseAttentionBackwardParams&, const Context&);

}  // namespace dsv4
