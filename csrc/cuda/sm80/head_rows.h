// Kernels on the heads of rows, [T, H, D]: a head is a row of lanes (row_lanes.h).
#pragma once

#include "cuda/sm80/hadamard_row.h"
#include "cuda/sm80/row_launch.h"
#include "cuda/sm80/row_norms.h"

namespace dsv4::sm80 {

struct HeadArguments {
  AnyView<3> x, rope, result;
  TwoFloats eps;
  HadamardScale hadamard;
  bool inverse;
  int64_t first_token;
  uint32_t rows, heads;  // of this launch
  int dim, lanes;
  bool vector, vector_rope;
};

// The head that a thread works on. Threads past the last take part in its shuffles and store nothing.
template <class X>
struct HeadRow {
  RowLanes lanes;
  bool own;
  GlobalRow<X> from;
  X* to;
  RowRope rope;

  DSV4_DEVICE explicit HeadRow(const HeadArguments& a) : lanes(a.lanes), own(lanes.row < a.rows) {
    const uint32_t row = own ? static_cast<uint32_t>(lanes.row) : a.rows - 1;
    const int64_t token = a.first_token + row / a.heads, head = row % a.heads;
    from = {static_cast<const X*>(a.x.data) + token * a.x.stride[0] + head * a.x.stride[1], a.dim, a.vector};
    to = static_cast<X*>(a.result.data) + token * a.result.stride[0] + head * a.result.stride[1];
    rope = row_rope(a.rope, token, a.dim, a.vector_rope, a.inverse);
  }
};

inline HeadArguments head_arguments(const AnyView<3>& x, const AnyView<3>& rope, const AnyView<3>& result) {
  HeadArguments a = {};
  a.x = x;
  a.rope = rope;
  a.result = result;
  a.heads = static_cast<uint32_t>(x.size(1));
  a.dim = static_cast<int>(x.size(2));
  a.lanes = row_lanes(x.size(2));
  a.vector = in_eights(x) && in_eights(result);
  a.vector_rope = whole_turns(rope, x.size(2));
  return a;
}

// Launches of so many rows that they and blocks fit in 32 bits.
template <class Arguments>
Status launch_heads(const char* name, void (*kernel)(Arguments), Arguments a, const Context& context) {
  constexpr int64_t kRowsAtOnce = int64_t{1} << 30;
  const int64_t tokens = a.x.size(0), heads = a.x.size(1);
  if (heads == 0 || a.dim == 0) return Status::ok();
  const int64_t at_once = kRowsAtOnce / heads > 0 ? kRowsAtOnce / heads : 1;
  for (a.first_token = 0; a.first_token < tokens; a.first_token += at_once) {
    const int64_t left = tokens - a.first_token;
    a.rows = static_cast<uint32_t>((left < at_once ? left : at_once) * heads);
    const Status status = cuda::launch(name, kernel, row_shape(a.rows, a.lanes), context, a);
    if (!status.is_ok()) return status;
  }
  return Status::ok();
}

}  // namespace dsv4::sm80
