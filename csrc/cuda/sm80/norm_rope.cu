// query_norm_rope: a warp reads a head of 512 dims (or several smaller heads) twice, for its squares and, from L1, to
// write it; 16 bytes a lane. 4 bytes a bfloat16 element from and to memory and some 20 float32 instructions: bound by
// memory, 85 % of the copy bandwidth expected from 16 tokens of 64 heads on.
// store_window: the same with a weight, and with the scales of FP8 blocks by shuffles among eight lanes. 3 bytes an
// element and 50 instructions, of rows 1 / heads as many as queries: latency is what counts.
//
// Sums, roots and rotations in two floats (two_floats.h): the bits are those of the float64 definition.
#include "cuda/common/launch.h"
#include "cuda/sm80/norm_rope.h"
#include "cuda/sm80/page_rows.h"
#include "cuda/sm80/row_launch.h"
#include "cuda/sm80/row_norms.h"

namespace dsv4::sm80 {

struct QueryArguments {
  QueryNormRopeParams params;
  TwoFloats eps;
  int64_t first_token;
  uint32_t rows, heads;  // of this launch
  int dim, lanes;
  bool vector, vector_rope;
};

struct WindowArguments {
  StoreWindowParams params;
  PagePlaces places;
  NormWeight weight;
  TwoFloats eps;
  int64_t rows;
  int dim, lanes;
  bool vector, vector_rope, vector_place;
};

template <class X>
DSV4_DEVICE void normalise_queries(const QueryArguments& a) {
  const RowLanes lanes(a.lanes);
  const bool own = lanes.row < a.rows;
  const uint32_t row = own ? static_cast<uint32_t>(lanes.row) : a.rows - 1;  // shuffles need whole warps
  const int64_t token = a.first_token + row / a.heads, head = row % a.heads;
  const AnyView<3>&query = a.params.query, &result = a.params.result;
  const GlobalRow<X> from = {static_cast<const X*>(query.data) + token * query.stride[0] + head * query.stride[1],
                             a.dim, a.vector};
  X* to = static_cast<X*>(result.data) + token * result.stride[0] + head * result.stride[1];
  const RowRope rope = row_rope(a.params.rope, token, a.dim, a.vector_rope);
  const PlainNorm norm = {rounded_root<X>(sum_of_squares<RoundedSquare<X>>(lanes, from), a.dim, a.eps)};
  if (!own) return;
  for (int column = 8 * lanes.lane; column < a.dim; column += lanes.step()) {
    float value[8];
    norm_rope_eight<X>(from, norm, rope, column, value);
    store_eight(to, column, a.dim, a.vector, value);
  }
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

DSV4_KERNEL(kRowThreads, 8) sm80_bf16_query_norm_rope(const QueryArguments a) { normalise_queries<bf16>(a); }
DSV4_KERNEL(kRowThreads, 8) sm80_f32_query_norm_rope(const QueryArguments a) { normalise_queries<float>(a); }
DSV4_KERNEL(kRowThreads, 8) sm80_bf16_store_window(const WindowArguments a) { store_rows<bf16>(a); }
DSV4_KERNEL(kRowThreads, 8) sm80_f32_store_window(const WindowArguments a) { store_rows<float>(a); }

Status query_norm_rope(const QueryNormRopeParams& p, const Context& context) {
  const int64_t tokens = p.query.size(0), heads = p.query.size(1), dim = p.query.size(2);
  if (tokens == 0 || heads == 0 || dim == 0) return Status::ok();
  QueryArguments a = {};
  a.params = p;
  a.eps = two_floats(p.eps);
  a.heads = static_cast<uint32_t>(heads);
  a.dim = static_cast<int>(dim);
  a.lanes = row_lanes(dim);
  a.vector = in_eights(p.query) && in_eights(p.result);
  a.vector_rope = whole_turns(p.rope, dim);
  const auto kernel = p.query.dtype == DType::kFloat32 ? sm80_f32_query_norm_rope : sm80_bf16_query_norm_rope;
  const int64_t at_once = kRowsAtOnce / heads > 0 ? kRowsAtOnce / heads : 1;
  for (a.first_token = 0; a.first_token < tokens; a.first_token += at_once) {
    const int64_t left = tokens - a.first_token;
    a.rows = static_cast<uint32_t>((left < at_once ? left : at_once) * heads);
    const Status status = cuda::launch("query_norm_rope", kernel, row_shape(a.rows, a.lanes), context, a);
    if (!status.is_ok()) return status;
  }
  return Status::ok();
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
