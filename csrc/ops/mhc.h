// Manifold-constrained hyper-connections. T tokens, D hidden width, 4 residual streams.
// Element types: X is bfloat16 or float32, the same for all X of one call; the rest is float32. The last axis of every
// tensor is contiguous, post and comb are contiguous within a token; other strides are free. Outputs overlap nothing.
#pragma once

#include "common/context.h"
#include "common/status.h"
#include "common/view.h"

namespace dsv4 {

inline constexpr int kStreams = 4;
inline constexpr int kMixes = 24;  // rows of fn: 4 pre, 4 post, 16 comb
inline constexpr int kMostSinkhornIterations = 1 << 20;

// result[t, o] = post[t, o] * sublayer[t] + sum_i comb[t, i, o] * streams[t, i]
struct MhcPostParams {
  AnyView<2> sublayer;        // X [T, D]      what attention or the experts returned
  AnyView<3> streams;         // X [T, 4, D]
  View<const float, 2> post;  // [T, 4]
  View<const float, 3> comb;  // [T, 4, 4]     comb[t, i, o]: how much of stream i goes to stream o
  AnyView<3> result;          // X [T, 4, D]
};

// How the streams r of a token become its mixing weights:
//   m = (fn r) / sqrt(mean(r^2) + norm_eps), the mean over all 4 D; logits = m * scale (of its group) + base
//   pre = sigmoid(logits[0:4]) + hc_eps; post = 2 sigmoid(logits[4:8]); comb = sinkhorn(logits[8:24] as [4, 4])
//   sinkhorn: softmax over the last axis + hc_eps, columns / (sum + hc_eps), then (iterations - 1) times
//   rows / (sum + hc_eps), columns / (sum + hc_eps). A column is the sum over the first axis, the stream read.
struct MhcMixing {
  View<const float, 2> fn;      // [24, 4 D]  (mhc_head: [4, 4 D])
  View<const float, 1> scale;   // [3]        pre, post, comb (mhc_head: [1])
  View<const float, 1> base;    // [24]       (mhc_head: [4])
  float norm_eps;               // >= 0
  float hc_eps;                 // >= 0
  int64_t sinkhorn_iterations;  // from 1 to kMostSinkhornIterations; not read by mhc_head
};

// The weights of this sublayer from the streams before it, and the sublayer's input.
struct MhcPreParams {
  AnyView<3> streams;  // X [T, 4, D]
  MhcMixing mixing;
  AnyView<1> norm_weight;  // X or float32 [D], optional: the input leaves as its RMSNorm times this
  float rms_eps;           // of that RMSNorm, >= 0
  AnyView<2>
      input;  // X [T, D]     sum_i pre[t, i] * streams[t, i], cast to X, then the optional norm and one cast more
  View<float, 2> post;  // [T, 4]
  View<float, 3> comb;  // [T, 4, 4]
  Workspace workspace;
};

// mhc_post of one sublayer and mhc_pre of the next, reading the streams once. The new streams are rounded to X before
// they are read again, so the result equals the two ops one after another, bit for bit.
struct MhcPostPreParams {
  MhcPostParams post;
  MhcPreParams pre;  // pre.streams is post.result
};
inline Workspace& workspace_of(MhcPostPreParams& p) { return p.pre.workspace; }

// Collapses the streams before the output head: pre weights alone, no Sinkhorn.
struct MhcHeadParams {
  AnyView<3> streams;  // X [T, 4, D]
  MhcMixing mixing;    // fn [4, 4 D], scale [1], base [4]
  AnyView<2> output;   // X [T, D]
  Workspace workspace;
};

// Gradients. Those of X tensors are X, all others float32; each is rounded once. Sums over tokens run in ascending
// order.
struct MhcPostBackwardParams {
  AnyView<3> grad_result;     // X [T, 4, D]
  AnyView<2> sublayer;        // X [T, D]
  AnyView<3> streams;         // X [T, 4, D]
  View<const float, 2> post;  // [T, 4]
  View<const float, 3> comb;  // [T, 4, 4]
  AnyView<2> grad_sublayer;   // X [T, D]
  AnyView<3> grad_streams;    // X [T, 4, D]
  View<float, 2> grad_post;   // [T, 4]
  View<float, 3> grad_comb;   // [T, 4, 4]
};

struct MhcPreBackwardParams {
  AnyView<2> grad_input;           // X [T, D]
  View<const float, 2> grad_post;  // [T, 4]
  View<const float, 3> grad_comb;  // [T, 4, 4]
  AnyView<3> grad_residual;        // X [T, 4, D], optional: added to grad_streams before it is rounded
  AnyView<3> streams;              // X [T, 4, D]
  MhcMixing mixing;
  AnyView<1> norm_weight;  // X or float32 [D], optional, as in the forward call
  float rms_eps;
  AnyView<3> grad_streams;          // X [T, 4, D]
  View<float, 2> grad_fn;           // [24, 4 D], or none, and then not computed
  View<float, 1> grad_scale;        // [3]
  View<float, 1> grad_base;         // [24]
  View<float, 1> grad_norm_weight;  // [D], given where norm_weight is
  Workspace workspace;
};

struct MhcHeadBackwardParams {
  AnyView<2> grad_output;     // X [T, D]
  AnyView<3> streams;         // X [T, 4, D]
  MhcMixing mixing;           // fn [4, 4 D], scale [1], base [4]
  AnyView<3> grad_streams;    // X [T, 4, D]
  View<float, 2> grad_fn;     // [4, 4 D], or none
  View<float, 1> grad_scale;  // [1]
  View<float, 1> grad_base;   // [4]
  Workspace workspace;
};

// What the call needs in workspace.bytes under this context; X is the element type of the streams.
int64_t mhc_pre_workspace_bytes(int64_t tokens, int64_t hidden, DType x, const Context&);  // mhc_post_pre too
int64_t mhc_head_workspace_bytes(int64_t tokens, int64_t hidden, DType x, const Context&);
int64_t mhc_pre_backward_workspace_bytes(int64_t tokens, int64_t hidden, DType x, const Context&);
int64_t mhc_head_backward_workspace_bytes(int64_t tokens, int64_t hidden, DType x, const Context&);

Status mhc_pre(const MhcPreParams&, const Context&);
Status mhc_post(const MhcPostParams&, const Context&);
Status mhc_post_pre(const MhcPostPreParams&, const Context&);
Status mhc_head(const MhcHeadParams&, const Context&);
Status mhc_pre_backward(const MhcPreBackwardParams&, const Context&);
Status mhc_post_backward(const MhcPostBackwardParams&, const Context&);
Status mhc_head_backward(const MhcHeadBackwardParams&, const Context&);

}  // namespace dsv4
