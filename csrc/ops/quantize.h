// Block quantisers of rows, their inverses, and the Hadamard rotation. The last axis of every tensor is contiguous.
#pragma once

#include "common/context.h"
#include "common/status.h"
#include "common/view.h"

namespace dsv4 {

// Blocks of values along a row (the last may be shorter) share a scale, a power of two, as e8m0:
//   e4m3: 2^ceil(log2(max(amax, 1e-4) / 448)), codes 0x7F under a scale of NaN
//   e2m1: 2^ceil(log2(max(amax, 6 * 2^-126) / 6)), codes 0 under a scale of NaN
// the reciprocal of the largest code being a float32. Codes: the nearest to x / scale, ties to even. A block that holds
// an infinity or a NaN has scale NaN.
struct QuantizeParams {
  AnyView<2> x;      // bfloat16 or float32 [rows, n]
  int64_t block;     // for e2m1 even, as n
  AnyView<2> codes;  // uint8 [rows, n], or two e2m1 a byte [rows, n / 2], the even value in the low nibble
  AnyView<2> scale;  // uint8 [rows, ceil(n / block)]
};
Status quantize_fp8(const QuantizeParams&, const Context&);
Status quantize_fp4(const QuantizeParams&, const Context&);

// The value of each code times its scale, a product in float32, rounded once to the type of the result. `group` rows
// share a row of scales.
struct DequantizeParams {
  bool fp4;          // e2m1, else e4m3
  AnyView<3> codes;  // uint8 [batch, rows, n], with fp4 [batch, rows, n / 2]
  AnyView<3> scale;  // uint8 (e8m0) or float32 [batch, ceil(rows / group), ceil(n / block)]
  int64_t group, block;
  AnyView<3> result;  // bfloat16 or float32 [batch, rows, n]
};
Status dequantize_fp8(const DequantizeParams&, const Context&);
Status dequantize_fp4(const DequantizeParams&, const Context&);
Status dequantize_weight(const DequantizeParams&, const Context&);

// Each row times the Sylvester Hadamard matrix over sqrt(n), rounded once to its type.
struct HadamardParams {
  AnyView<2> x;       // bfloat16 or float32 [rows, n], n a power of two
  AnyView<2> result;  // like x
  Workspace workspace;
};

// What the call needs in workspace.bytes under this context; result and workspace are not read.
int64_t hadamard_workspace_bytes(const HadamardParams&, const Context&);

Status hadamard(const HadamardParams&, const Context&);

}  // namespace dsv4
