// How kernels on rows (row_lanes.h) are launched, and what their operands' memory allows.
#pragma once

#include "common/view.h"
#include "cuda/common/launch.h"
#include "cuda/sm80/row_lanes.h"

namespace dsv4::sm80 {

DSV4_DEVICE RowRope row_rope(const AnyView<3>& rope, int64_t token, int dim, bool vector, bool inverse = false) {
  const int passed = dim - 2 * static_cast<int>(rope.shape[1]);
  const float* turn = static_cast<const float*>(rope.data) + token * rope.stride[0];
  return {turn, passed, dim, inverse ? -1.0f : 1.0f, vector};
}

inline bool in_sixteens(const void* data) { return reinterpret_cast<uintptr_t>(data) % 16 == 0; }

inline bool whole_turns(const AnyView<3>& rope, int64_t dim) {
  return dim % 8 == 0 && rope.shape[1] % 4 == 0 && in_sixteens(rope.data) &&
         (rope.stride[0] % 4 == 0 || rope.shape[0] == 1);
}

// Elements of a 16-byte piece of a type.
inline int64_t piece_of(DType dtype) { return dtype == DType::kFloat32 ? 4 : 8; }

inline bool in_eights(const AnyView<3>& heads) {
  const int64_t piece = piece_of(heads.dtype);
  return heads.shape[2] % 8 == 0 && in_sixteens(heads.data) && heads.stride[0] % piece == 0 &&
         heads.stride[1] % piece == 0;
}

inline bool in_eights(const AnyView<2>& rows) {
  return rows.shape[1] % 8 == 0 && in_sixteens(rows.data) && rows.stride[0] % piece_of(rows.dtype) == 0;
}

inline cuda::LaunchShape row_shape(int64_t rows, int lanes) {
  cuda::LaunchShape shape;
  shape.blocks_x = (rows + rows_of_block(lanes) - 1) / rows_of_block(lanes);
  shape.threads = kRowThreads;
  return shape;
}

}  // namespace dsv4::sm80
