// query_norm_rope: a warp reads a head of 512 dims (or several smaller heads) twice, for its squares and, from L1, to
// write it; 16 bytes a lane. 4 bytes a bfloat16 element from and to memory and some 20 float32 instructions: bound by
// memory, 85 % of the copy bandwidth expected from 16 tokens of 64 heads on.
// apply_rope: the rotation alone; kv_norm_rope: with a norm that has a weight.
// rope_rows: a pair a thread, in float64 like the CPU's; tables are small.
// store_window: the same as kv_norm_rope, and with the scales of FP8 blocks by shuffles among eight lanes. 3 bytes an
// element and 50 instructions, of rows 1 / heads as many as queries: latency is what counts.
//
// Sums, roots and rotations in two floats (two_floats.h): the bits are those of the float64 definition.
#include "common/turns.h"
#include "cuda/common/launch.h"
#include "cuda/sm80/head_rows.h"
#include "cuda/sm80/norm_rope.h"
#include "cuda/sm80/page_rows.h"

namespace dsv4::sm80 {

struct WindowArguments {
  StoreWindowParams params;
  PagePlaces places;
  NormWeight weight;
  TwoFloats eps;
  int64_t rows;
  int dim, lanes;
  bool vector, vector_rope, vector_place;
};

struct TableArguments {
  RopeRowsParams params;
  int64_t count;  // of positions times pairs
};

struct KvArguments {
  KvNormRopeParams params;
  NormWeight weight;
  TwoFloats eps;
  int64_t rows;
  int dim, lanes;
  bool vector, vector_rope;
};

template <class X>
DSV4_DEVICE void normalise_queries(const HeadArguments& a) {
  const HeadRow<X> row(a);
  const PlainNorm norm = {rounded_root<X>(sum_of_squares<RoundedSquare<X>>(row.lanes, row.from), a.dim, a.eps)};
  if (!row.own) return;
  for (int column = 8 * row.lanes.lane; column < a.dim; column += row.lanes.step()) {
    float value[8];
    norm_rope_eight<X>(row.from, norm, row.rope, column, value);
    store_eight(row.to, column, a.dim, a.vector, value);
  }
}

// What is not rotated keeps its bits, which a NaN would not if it was rounded.
template <class X>
DSV4_DEVICE void rotate_heads(const HeadArguments& a) {
  const HeadRow<X> row(a);
  if (!row.own) return;
  for (int column = 8 * row.lanes.lane; column < a.dim; column += row.lanes.step()) {
    constexpr int kPiece = kElements<X>;
    if (column < row.rope.passed) {
      for (int at = column; at < column + 8 && at < a.dim; at += kPiece) {
        store_piece(row.to, at, a.dim, a.vector, load_piece(row.from.data, at, a.dim, a.vector));
      }
    }
    if (!row.rope.covers(column)) continue;
    float value[8];
    norm_rope_eight<X>(row.from, NoNorm{}, row.rope, column, value);
    if (column >= row.rope.passed) {
      store_eight(row.to, column, a.dim, a.vector, value);
    } else {
      DSV4_UNROLL
      for (int e = 0; e < 8; ++e) {
        if (column + e >= row.rope.passed && column + e < a.dim) row.to[column + e] = from_float<X>(value[e]);
      }
    }
  }
}

template <class X>
DSV4_DEVICE void normalise_rows(const KvArguments& a) {
  const RowLanes lanes(a.lanes);
  const int64_t row = lanes.row < a.rows ? lanes.row : a.rows - 1;  // shuffles need whole warps
  const AnyView<2>&kv = a.params.kv, &result = a.params.result;
  const GlobalRow<X> from = {static_cast<const X*>(kv.data) + row * kv.stride[0], a.dim, a.vector};
  X* to = static_cast<X*>(result.data) + row * result.stride[0];
  const RowRope rope = row_rope(a.params.rope, row, a.dim, a.vector_rope);
  const WeightedNorm norm = {inverse_rms(sum_of_squares<ExactSquare>(lanes, from), a.dim, a.eps), a.weight};
  if (lanes.row >= a.rows) return;
  for (int column = 8 * lanes.lane; column < a.dim; column += lanes.step()) {
    float value[8];
    norm_rope_eight<X>(from, norm, rope, column, value);
    store_eight(to, column, a.dim, a.vector, value);
  }
}

// An angle of more turns than quarter_turn takes, without whole turns; float64, off by up to 2^-40 at 2^60.
DSV4_DEVICE double without_turns(double angle) {
  constexpr double kRound = 0x1.8p52;
  const double scaled = angle * 0x1.45f306dc9c883p-3;
  const double turns = scaled < 0x1p51 && scaled > -0x1p51 ? (scaled + kRound) - kRound : scaled;
  double rest = ptx::fma(-turns, 0x1.921fb54442d18p+2, angle);
  rest = ptx::fma(-turns, 0x1.1a62633145c07p-52, rest);
  return ptx::fma(-turns, -0x1.f1976b7ed8fbcp-108, rest);
}

DSV4_DEVICE void make_turn(const TableArguments& a) {
  const RopeRowsParams& p = a.params;
  const int64_t i = ptx::block_index_x() * kRowThreads + ptx::thread_index(), pairs = p.frequency.shape[0];
  if (i >= a.count) return;
  const int64_t t = i / pairs, pair = i % pairs;
  const float position =
      p.position.dtype == DType::kInt32
          ? static_cast<float>(static_cast<const int32_t*>(p.position.data)[t * p.position.stride[0]])
          : static_cast<float>(static_cast<const int64_t*>(p.position.data)[t * p.position.stride[0]]);
  const float frequency = static_cast<const float*>(p.frequency.data)[pair];
  double angle = ptx::multiply(position, frequency);
  if (angle > kMostReducedAngle || angle < -kMostReducedAngle) angle = without_turns(angle);
  join_turn(quarter_turn(angle), static_cast<float*>(p.result.data) + t * p.result.stride[0] + 2 * pair);
}

template <class X>
DSV4_DEVICE void store_rows(const WindowArguments& a) {
  const RowLanes lanes(a.lanes);
  const bool own = lanes.row < a.rows;
  const int64_t row = own ? lanes.row : a.rows - 1;
  const int64_t sequence = static_cast<const int32_t*>(a.params.sequence.data)[row * a.params.sequence.stride[0]];
  const int64_t position = static_cast<const int32_t*>(a.params.position.data)[row * a.params.position.stride[0]];
  const PagePlaces::Place place = a.places.find(own ? sequence : -1, position);
  const GlobalRow<X> from = {static_cast<const X*>(a.params.kv.data) + row * a.params.kv.stride[0], a.dim, a.vector};
  const RowRope rope = row_rope(a.params.rope, row, a.dim, a.vector_rope);
  const WeightedNorm norm = {inverse_rms(sum_of_squares<ExactSquare>(lanes, from), a.dim, a.eps), a.weight};
  const PageRow to(a.places, place, lanes, a.vector_place);
  for (int first = 0; first < a.dim; first += lanes.step()) {
    float value[8];
    norm_rope_eight<X>(from, norm, rope, first + 8 * lanes.lane, value);
    to.write_row(first + 8 * lanes.lane, value);
  }
}

DSV4_KERNEL(kRowThreads, 8) sm80_bf16_query_norm_rope(const HeadArguments a) { normalise_queries<bf16>(a); }
DSV4_KERNEL(kRowThreads, 8) sm80_f32_query_norm_rope(const HeadArguments a) { normalise_queries<float>(a); }
DSV4_KERNEL(kRowThreads, 8) sm80_bf16_apply_rope(const HeadArguments a) { rotate_heads<bf16>(a); }
DSV4_KERNEL(kRowThreads, 8) sm80_f32_apply_rope(const HeadArguments a) { rotate_heads<float>(a); }
DSV4_KERNEL(kRowThreads, 8) sm80_bf16_kv_norm_rope(const KvArguments a) { normalise_rows<bf16>(a); }
DSV4_KERNEL(kRowThreads, 8) sm80_f32_kv_norm_rope(const KvArguments a) { normalise_rows<float>(a); }
DSV4_KERNEL(kRowThreads, 8) sm80_f32_rope_rows(const TableArguments a) { make_turn(a); }
DSV4_KERNEL(kRowThreads, 8) sm80_bf16_store_window(const WindowArguments a) { store_rows<bf16>(a); }
DSV4_KERNEL(kRowThreads, 8) sm80_f32_store_window(const WindowArguments a) { store_rows<float>(a); }

Status query_norm_rope(const QueryNormRopeParams& p, const Context& context) {
  HeadArguments a = head_arguments(p.query, p.rope, p.result);
  a.eps = two_floats(p.eps);
  const auto kernel = p.query.dtype == DType::kFloat32 ? sm80_f32_query_norm_rope : sm80_bf16_query_norm_rope;
  return launch_heads("query_norm_rope", kernel, a, context);
}

Status apply_rope(const ApplyRopeParams& p, const Context& context) {
  HeadArguments a = head_arguments(p.x, p.rope, p.result);
  a.inverse = p.inverse;
  const auto kernel = p.x.dtype == DType::kFloat32 ? sm80_f32_apply_rope : sm80_bf16_apply_rope;
  return launch_heads("apply_rope", kernel, a, context);
}

Status kv_norm_rope(const KvNormRopeParams& p, const Context& context) {
  const int64_t rows = p.kv.size(0), dim = p.kv.size(1);
  if (rows == 0 || dim == 0) return Status::ok();
  const KvArguments a = {p,
                         norm_weight(p.weight),
                         two_floats(p.eps),
                         rows,
                         static_cast<int>(dim),
                         row_lanes(dim),
                         in_eights(p.kv) && in_eights(p.result),
                         whole_turns(p.rope, dim)};
  const auto kernel = p.kv.dtype == DType::kFloat32 ? sm80_f32_kv_norm_rope : sm80_bf16_kv_norm_rope;
  return cuda::launch("kv_norm_rope", kernel, row_shape(rows, a.lanes), context, a);
}

Status rope_rows(const RopeRowsParams& p, const Context& context) {
  const TableArguments a = {p, p.position.size(0) * p.frequency.size(0)};
  if (a.count == 0) return Status::ok();
  cuda::LaunchShape shape;
  shape.blocks_x = ceil_div(a.count, kRowThreads);
  shape.threads = kRowThreads;
  return cuda::launch("rope_rows", sm80_f32_rope_rows, shape, context, a);
}

Status store_window(const StoreWindowParams& p, const Context& context) {
  const int64_t rows = p.kv.size(0), dim = p.kv.size(1);
  if (rows == 0 || dim == 0) return Status::ok();
  const PagePlaces places(p.pool, dim, 2 * p.rope.size(1), false);
  const WindowArguments a = {p,
                             places,
                             norm_weight(p.weight),
                             two_floats(p.eps),
                             rows,
                             static_cast<int>(dim),
                             row_lanes(dim),
                             in_eights(p.kv),
                             whole_turns(p.rope, dim),
                             whole_places(places)};
  const auto kernel = p.kv.dtype == DType::kFloat32 ? sm80_f32_store_window : sm80_bf16_store_window;
  return cuda::launch("store_window", kernel, row_shape(rows, a.lanes), context, a);
}

}  // namespace dsv4::sm80
