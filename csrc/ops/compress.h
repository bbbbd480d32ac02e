// The compressor of the key-value cache: every `ratio` raw positions become one entry. T rows, D head_dim, c = 1 or 2
// sets of channels. N, the type of norm_weight, is bfloat16 or float32. The last axis of every tensor is contiguous.
#pragma once

#include "common/context.h"
#include "common/status.h"
#include "common/view.h"
#include "ops/pool.h"

namespace dsv4 {

// The row at position ratio * j + ratio - 1 writes entry j of its sequence: channel by channel sum_p softmax_p(gate[p]
// + ape[p % ratio]) * kv[p], where p runs over the entry's own positions and, with c = 2, over the previous entry's
// with the first D channels and the own ones with the last D. The sum is rounded to N; RMS norm with weight, rounded to
// N; the last R dims rotated, rounded to N; with `rotate` (index keys) the Hadamard rotation, rounded to N; then stored
// in the pool's format. FP8 keys have one scale; rows are those of store_window. Entries that the table does not store
// are dropped.
//
// Positions before a sequence's first row come from `state`, where slot p % ring holds kv and gate + ape of position p.
// After all entries have been made, the last `ring` rows of each sequence replace their slots.
struct CompressParams {
  View<const float, 2> kv;    // [T, c D]; the rows of a sequence stand together, positions ascend by one from >= 0
  View<const float, 2> gate;  // [T, c D]
  View<const float, 2> ape;   // [ratio, c D]
  AnyView<1> norm_weight;     // N [D]
  AnyView<3> rope;            // float32 [T, R / 2, 2], (cos, sin) at the first position of each row's entry
  View<float, 4> state;       // [sequences, ring, 2, c D], ring >= c ratio; written
  RowPool pool;               // of rows, with `rotate` of keys; written
  AnyView<1> sequence;        // int32 [T], a row of the table
  AnyView<1> position;        // int32 [T]
  int64_t ratio;
  double eps;
  bool rotate;
  Workspace workspace;
};

// What the call needs in workspace.bytes under this context. 0 for parameters that are not valid.
int64_t compress_workspace_bytes(const CompressParams&, const Context&);

Status compress(const CompressParams&, const Context&);

// The entries of one whole sequence from position 0: what compress would store of them, in N and not quantised. E =
// T / ratio of them; a remainder of rows makes none.
struct CompressEntriesParams {
  View<const float, 2> kv;    // [T, c D]
  View<const float, 2> gate;  // [T, c D]
  View<const float, 2> ape;   // [ratio, c D]
  AnyView<1> norm_weight;     // N [D]
  AnyView<3> rope;            // float32 [E, R / 2, 2], (cos, sin) at position ratio * j
  int64_t ratio;
  double eps;
  bool rotate;
  AnyView<2> result;  // N [E, D]
  Workspace workspace;
};
int64_t compress_entries_workspace_bytes(const CompressEntriesParams&, const Context&);
Status compress_entries(const CompressEntriesParams&, const Context&);

// The gradients of that call, for which every rounding but that of the pooled row, from which the norm's is formed, is
// the identity; float64 inside and rounded once. With s_p the weight of position p in an entry, v_p its value, g the
// gradient of the pooled row and m the sum of s_p v_p: kv's is s_p g, gate's s_p g (v_p - m), rounded to float32; ape's
// is the sum of the latter over entries, norm_weight's as in norm_rope.h. Rows that no entry pools have none: 0.
struct CompressEntriesBackwardParams {
  AnyView<2> grad;                // N [E, D]
  CompressEntriesParams forward;  // without result
  View<float, 2> grad_kv;         // [T, c D]
  View<float, 2> grad_gate;       // [T, c D]
  View<float, 2> grad_ape;        // [ratio, c D]
  AnyView<1> grad_norm_weight;    // N [D]
};
inline Workspace& workspace_of(CompressEntriesBackwardParams& p) { return p.forward.workspace; }
int64_t compress_entries_backward_workspace_bytes(const CompressEntriesBackwardParams&, const Context&);
Status compress_entries_backward(const CompressEntriesBackwardParams&, const Context&);

}  // namespace dsv4
