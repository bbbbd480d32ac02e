// rms_norm: rows of up to 1024 dims as rows of lanes, longer ones by a block each, so that a single row does not wait
// for one warp; 16 bytes a thread and access, read twice, the second time from L1. 4 bytes a bfloat16 element from and
// to memory and some 25 instructions: bound by memory, 80 % of the copy bandwidth expected of many rows.
//
// Sums and roots in two floats (two_floats.h): the bits are those of the float64 definition.
#include "cuda/common/launch.h"
#include "cuda/sm80/norm_rope.h"
#include "cuda/sm80/row_launch.h"
#include "cuda/sm80/row_norms.h"

namespace dsv4::sm80 {

inline constexpr int kLongRowThreads = 512;

struct RmsNormArguments {
  AnyView<2> x, result;
  NormWeight weight;
  TwoFloats eps;
  int64_t rows;
  int dim, lanes, threads;
  bool vector;
};

template <class X>
DSV4_DEVICE void norm_rows(const RmsNormArguments& a) {
  const RowLanes lanes(a.lanes);
  const int64_t row = lanes.row < a.rows ? lanes.row : a.rows - 1;  // shuffles need whole warps
  const GlobalRow<X> from = {static_cast<const X*>(a.x.data) + row * a.x.stride[0], a.dim, a.vector};
  X* to = static_cast<X*>(a.result.data) + row * a.result.stride[0];
  const WeightedNorm norm = {inverse_rms(sum_of_squares<ExactSquare>(lanes, from), a.dim, a.eps), a.weight};
  if (lanes.row >= a.rows) return;
  for (int column = 8 * lanes.lane; column < a.dim; column += lanes.step()) {
    float value[8];
    from.eight(column, value);
    norm.eight(column, value);
    store_eight(to, column, a.dim, a.vector, value);
  }
}

// The sum of the row's squares over the block, in every thread.
template <bool kScaled, class X>
DSV4_DEVICE TwoFloats squares_of_block(const GlobalRow<X>& row, int threads) {
  TwoFloats sum = {0.0f, 0.0f};
  for (int column = 8 * ptx::thread_index(); column < row.dim; column += 8 * threads) {
    float value[8];
    row.eight(column, value);
    DSV4_UNROLL
    for (int e = 0; e < 8; ++e) sum = ExactSquare::add_to<kScaled>(sum, value[e]);
  }
  sum = sum_of_row(sum, RowLanes(32, 0));
  const uint32_t memory = ptx::shared_base();
  if (ptx::thread_index() % 32 == 0) {
    const uint32_t own = memory + static_cast<uint32_t>(ptx::thread_index() / 32 * 8);
    ptx::store_shared_8(own, {{bits_from_float(sum.high), bits_from_float(sum.low)}});
  }
  ptx::sync_threads();
  TwoFloats total = {0.0f, 0.0f};
  for (int warp = 0; warp < threads / 32; ++warp) {
    const uint32_t other = memory + static_cast<uint32_t>(warp * 8);
    total = add(total, {ptx::load_shared_float(other), ptx::load_shared_float(other + 4)});
  }
  return total;
}

template <class X>
DSV4_DEVICE void norm_long_row(const RmsNormArguments& a) {
  const int64_t row = ptx::block_index_x();
  const GlobalRow<X> from = {static_cast<const X*>(a.x.data) + row * a.x.stride[0], a.dim, a.vector};
  X* to = static_cast<X*>(a.result.data) + row * a.result.stride[0];
  SumOfSquares squares = {squares_of_block<false>(from, a.threads), 1.0f};
  if (!(squares.sum.high < kLargeSum)) {
    ptx::sync_threads();  // all have read the sums
    squares = {squares_of_block<true>(from, a.threads), kSmall};
  }
  const WeightedNorm norm = {inverse_rms(squares, a.dim, a.eps), a.weight};
  for (int column = 8 * ptx::thread_index(); column < a.dim; column += 8 * a.threads) {
    float value[8];
    from.eight(column, value);
    norm.eight(column, value);
    store_eight(to, column, a.dim, a.vector, value);
  }
}

DSV4_KERNEL(kRowThreads, 8) sm80_bf16_rms_norm(const RmsNormArguments a) { norm_rows<bf16>(a); }
DSV4_KERNEL(kRowThreads, 8) sm80_f32_rms_norm(const RmsNormArguments a) { norm_rows<float>(a); }
DSV4_KERNEL(kLongRowThreads, 2) sm80_bf16_rms_norm_long(const RmsNormArguments a) { norm_long_row<bf16>(a); }
DSV4_KERNEL(kLongRowThreads, 2) sm80_f32_rms_norm_long(const RmsNormArguments a) { norm_long_row<float>(a); }

Status rms_norm(const RmsNormParams& p, const Context& context) {
  const int64_t rows = p.x.size(0), dim = p.x.size(1);
  if (rows == 0 || dim == 0) return Status::ok();
  RmsNormArguments a = {};
  a.x = p.x;
  a.result = p.result;
  a.weight = norm_weight(p.weight);
  a.eps = two_floats(p.eps);
  a.rows = rows;
  a.dim = static_cast<int>(dim);
  a.lanes = row_lanes(dim);
  a.vector = in_eights(p.x) && in_eights(p.result);
  const bool wide = p.x.dtype == DType::kFloat32;
  if (dim <= 1024) {
    return cuda::launch("rms_norm", wide ? sm80_f32_rms_norm : sm80_bf16_rms_norm, row_shape(rows, a.lanes), context,
                        a);
  }
  a.threads = dim <= 2048 ? 256 : kLongRowThreads;
  cuda::LaunchShape shape;
  shape.blocks_x = rows;
  shape.threads = a.threads;
  shape.shared_bytes = a.threads / 32 * 8;
  return cuda::launch("rms_norm", wide ? sm80_f32_rms_norm_long : sm80_bf16_rms_norm_long, shape, context, a);
}

}  // namespace dsv4::sm80
