// Linear layers, on quantised weights as the checkpoint stores them and on plain ones. T rows, G groups (1 but for
// grouped_linear), K inputs, N outputs a group. The last axis of every tensor is contiguous.
#pragma once

#include "common/context.h"
#include "common/status.h"
#include "common/view.h"

namespace dsv4 {

// out[t, g] = x[t, g] W_g^T. Products of the operands are exact; they are added in float32, in an order that depends on
// K alone, and the sum is rounded once.
struct LinearParams {
  AnyView<3> x;       // bfloat16 or float32 [T, G, K]
  AnyView<2> weight;  // uint8: e4m3 [G N, K], or two e2m1 a byte [G N, K / 2], the even input in the low nibble
  AnyView<2>
      scale;       // uint8 (e8m0) or float32: [ceil(G N / 128), ceil(K / 128)] with e4m3, [G N, ceil(K / 32)] with e2m1
  AnyView<3> out;  // bfloat16 or float32 [T, G, N]
  Workspace workspace;
};

// What a call needs in workspace.bytes under this context; out and workspace are not read. 0 for parameters that are
// not valid.
int64_t fp8_linear_workspace_bytes(const LinearParams&, const Context&);
int64_t fp4_linear_workspace_bytes(const LinearParams&, const Context&);
int64_t grouped_linear_workspace_bytes(const LinearParams&, const Context&);

// The first two take one group and quantise x to e4m3 in blocks of 128 with a power-of-two scale each
// (python/dsv4/ops/quantize.py); grouped_linear takes e4m3 weights and x as it is, or, without a scale, weights of the
// dtype of x, with which each group is a dense_linear.
Status fp8_linear(const LinearParams&, const Context&);
Status fp4_linear(const LinearParams&, const Context&);
Status grouped_linear(const LinearParams&, const Context&);

// out[t] = x[t] W^T with plain operands as they are: products in float32, added in an order that depends on K alone;
// the sum is rounded once.
struct DenseLinearParams {
  AnyView<2> x;       // bfloat16 or float32 [T, K]
  AnyView<2> weight;  // bfloat16 or float32 [N, K]
  AnyView<2> out;     // bfloat16 or float32 [T, N]
  Workspace workspace;
};
int64_t dense_linear_workspace_bytes(const DenseLinearParams&, const Context&);
Status dense_linear(const DenseLinearParams&, const Context&);

}  // namespace dsv4
