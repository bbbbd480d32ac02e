// Mixture of experts: the router's gate, and the experts. T tokens, D hidden width, E experts, K experts a token, I the
// inner width of an expert. The last axis of every tensor is contiguous.
#pragma once

#include "common/context.h"
#include "common/status.h"
#include "common/view.h"

namespace dsv4 {

// score = sqrt(softplus(x w)), rounded to float32. The experts of a token: the K largest score + bias, best first, ties
// to the lower index, NaN last; or tid2eid[token_ids[t]]. Their weights: score / sum of the chosen scores *
// route_scale.
struct MoeGateParams {
  AnyView<2> x;               // bfloat16 or float32 [T, D]
  AnyView<2> weight;          // bfloat16 or float32 [E, D]
  int64_t top_k;              // K, 1 to E
  View<const float, 1> bias;  // [E], or none
  AnyView<1> token_ids;       // int32 or int64 [T], or none
  AnyView<2> tid2eid;         // int32 or int64 [vocabulary, K], with token_ids
  double route_scale;
  View<float, 2> weights;  // [T, K]
  AnyView<2> indices;      // int32 [T, K]
  Workspace workspace;
};

// What a call needs in workspace.bytes under this context; results and workspace are not read. 0 for parameters that
// are not valid.
int64_t moe_gate_workspace_bytes(const MoeGateParams&, const Context&);

Status moe_gate(const MoeGateParams&, const Context&);

enum class WeightFormat : int8_t { kNone, kPlain, kFp8, kFp4 };

// Matrices [out, in] of E experts as a checkpoint stores them.
struct ExpertMatrix {
  WeightFormat format = WeightFormat::kNone;
  // kPlain: bfloat16 or float32 [E, out, in]; kFp8: e4m3 bytes [E, out, in]; kFp4: e2m1 bytes [E, out, in / 2], the
  // even input in the low nibble. Bytes have dtype uint8.
  AnyView<3> data;
  // uint8 (e8m0) or float32; kFp8: [E, ceil(out / 128), ceil(in / 128)]; kFp4: [E, out, ceil(in / 32)].
  AnyView<3> scale;
};

// result[t] = sum of w2(silu(gate) * up * weight), gate = w1 x, up = w3 x, over the token's experts by ascending index
// (an index twice: by slot), then the shared expert with weight 1; summed in float32, cast once. gate and up are
// rounded to the type of x, then clamped: gate <= limit, |up| <= limit, where limit > 0. The product with the weight is
// rounded once, each expert's output too. A quantised matrix quantises what it multiplies to e4m3 in blocks of 128; the
// products are exact, their sums float32 or wider. An index outside 0 ... E - 1 contributes nothing. A token's result
// depends on that token alone.
struct MoeExpertsParams {
  AnyView<2> x;                  // bfloat16 or float32 [T, D]
  View<const float, 2> weights;  // [T, K]
  AnyView<2> indices;            // int32 or int64 [T, K]
  ExpertMatrix w1, w3, w2;       // [E, I, D], [E, I, D], [E, D, I]; plain: in the type of x
  ExpertMatrix shared[3];        // w1, w3, w2 of the shared expert, with E = 1 and an I of its own; or kNone
  float swiglu_limit;            // 0: no clamp
  AnyView<2> result;             // [T, D], the type of x
  Workspace workspace;
};

int64_t moe_experts_workspace_bytes(const MoeExpertsParams&, const Context&);

Status moe_experts(const MoeExpertsParams&, const Context&);

// Gradients of moe_experts on plain matrices. gate and up are taken again from x, with the bits of the forward pass;
// where they were clamped (gate > limit, |up| > limit) their gradient is 0. grad_x: the sum over the token's experts as
// in moe_experts, in float32, rounded once; grad_weights, the gradients of the matrices: sums over an expert's pairs
// (token, slot) in ascending order, rounded once, 0 for an expert without any. The gradients of gate and up are rounded
// to the type of x before they are multiplied. An index outside 0 ... E - 1 has grad_weights 0. grad_x and grad_weights
// of a token depend on that token alone. Any of the results may be none, and is then not computed; the bits of the
// others do not depend on that.
struct MoeExpertsBackwardParams {
  AnyView<2> grad;               // of the result: [T, D], the type of x
  AnyView<2> x;                  // bfloat16 or float32 [T, D]
  View<const float, 2> weights;  // [T, K]
  AnyView<2> indices;            // int32 or int64 [T, K]
  AnyView<3> matrices[3];        // w1, w3, w2, the type of x: [E, I, D], [E, I, D], [E, D, I]
  AnyView<3> shared[3];          // the same of the shared expert, with E = 1 and an I of its own; or none
  float swiglu_limit;            // 0: no clamp
  AnyView<2> grad_x;             // [T, D], the type of x
  View<float, 2> grad_weights;   // [T, K]
  AnyView<3> grad_matrices[3];   // as matrices
  AnyView<3> grad_shared[3];     // as shared
  Workspace workspace;
};

int64_t moe_experts_backward_workspace_bytes(const MoeExpertsBackwardParams&, const Context&);

Status moe_experts_backward(const MoeExpertsBackwardParams&, const Context&);

// The pairs (token, slot) of a routing sorted by expert: rows[offsets[e]] ... rows[offsets[e + 1] - 1] are the pairs
// token * K + slot of expert e, ascending. Indices outside 0 ... E - 1 have no place; the rows that they leave at the
// end, from offsets[E] on, are -1.
struct MoeMapParams {
  AnyView<2> indices;  // int32 or int64 [T, K]
  int64_t experts;     // E
  AnyView<1> offsets;  // int32 [E + 1]
  AnyView<1> rows;     // int32 [T * K]
};

Status moe_map(const MoeMapParams&, const Context&);

}  // namespace dsv4
