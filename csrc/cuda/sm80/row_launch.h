// How kernels on rows (row_lanes.h) are launched.
#pragma once

#include "cuda/common/launch.h"
#include "cuda/sm80/operands.h"
#include "cuda/sm80/row_lanes.h"

namespace dsv4::sm80 {

DSV4_DEVICE RowRope row_rope(const AnyView<3>& rope, int64_t token, int dim, bool vector, bool inverse = false) {
  const int passed = dim - 2 * static_cast<int>(rope.shape[1]);
  const float* turn = static_cast<const float*>(rope.data) + token * rope.stride[0];
  return {turn, passed, dim, inverse ? -1.0f : 1.0f, vector};
}

inline bool whole_turns(const AnyView<3>& rope, int64_t dim) {
  return dim % 8 == 0 && rope.shape[1] % 4 == 0 && aligned(rope.data) &&
         (rope.stride[0] % 4 == 0 || rope.shape[0] == 1);
}

inline cuda::LaunchShape row_shape(int64_t rows, int lanes) {
  cuda::LaunchShape shape;
  shape.blocks_x = ceil_div(rows, rows_of_block(lanes));
  shape.threads = kRowThreads;
  return shape;
}

}  // namespace dsv4::sm80
