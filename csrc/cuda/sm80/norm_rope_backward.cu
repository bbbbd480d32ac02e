// Gradients of query_norm_rope, and of rms_norm and kv_norm_rope with that of their weight; see row_gradients.h.
//
// Queries: a head is a row of lanes (row_lanes.h), an eight of a lane for up to 256 dims, two for up to 512, held in
// registers. The mean of the squares must be rounded as in the forward pass: of bfloat16, a float32 sum nearly always
// says how; else the forward pass's own sum does.
// Rows: a piece (piece_sums.h) belongs to a team of threads, with an eight each for up to 256 dims, else two: lanes, or
// whole warps up to 512 threads. A team goes through its rows one by one and holds the weight's sums in registers;
// bfloat16 rows are fetched while the one before is computed. Teams of several warps meet in shared memory once a row,
// in two places by turns, so that one barrier is enough.
// Longer rows, and rows anywhere in memory, are read twice and keep their sums in memory, in the same order.
// 6 bytes a bfloat16 element from and to memory and some 40 instructions, of which a row's own work is a third: 60 to
// 70 % of the copy bandwidth expected of many rows, more where memory is slower. Few rows leave a GPU idle.
#include "cuda/common/launch.h"
#include "cuda/sm80/head_rows.h"
#include "cuda/sm80/norm_rope.h"
#include "cuda/sm80/piece_sums.h"
#include "cuda/sm80/row_gradients.h"

namespace dsv4::sm80 {

inline constexpr int kTeamThreads = 512, kTeamWarps = kTeamThreads / 32;

struct QueryGradientArguments : HeadArguments {
  AnyView<3> grad;
  float one_of;  // 1 / dim
};

struct NormGradientArguments {
  AnyView<2> grad, x, result;
  AnyView<3> rope;
  NormWeight weight;
  TwoFloats eps;
  float* partial;  // [pieces, width], or none
  int64_t rows;
  int rows_of_piece, width;
  int dim, threads;  // of a team
  float one_of;      // 1 / dim
  bool vector, vector_rope;
};

template <class X, int kSteps>
DSV4_DEVICE void query_gradients(const QueryGradientArguments& a) {
  const HeadRow<X> head(a);
  const uint32_t row = head.own ? static_cast<uint32_t>(head.lanes.row) : a.rows - 1;
  const X* grad = static_cast<const X*>(a.grad.data) + (a.first_token + row / a.heads) * a.grad.stride[0] +
                  row % a.heads * a.grad.stride[1];
  const bool vector = kSteps > 0 || a.vector;
  const GlobalRow<X> from = {head.from.data, a.dim, vector}, grads = {grad, a.dim, vector};
  const RowRope rope = {head.rope.turn, head.rope.passed, a.dim, -1.0f, kSteps > 0 || a.vector_rope};
  GradientRow<X, kSteps> held(from, grads, rope, 8 * head.lanes.lane, head.lanes.step());
  if constexpr (kSteps > 0) {
    FetchedRow<X, kSteps> fetched;
    fetched.fetch(from, grads, 8 * head.lanes.lane, head.lanes.step());
    held.take(fetched);
  }
  GradientSums<X> sums;
  held.each([&](int, int, const float (&x)[8], const float (&g)[8]) {
    float square[8];
    DSV4_UNROLL
    for (int e = 0; e < 8; ++e) square[e] = ptx::multiply(x[e], x[e]);
    round_eight(square, X{});
    DSV4_UNROLL
    for (int e = 0; e < 8; ++e) sums.squares.add(square[e]), sums.along.add_product(g[e], x[e]);
  });
  const SumOf<X> along = sums.along.over(head.lanes.count);
  SumOfSquares squares = {sums.squares.over(head.lanes.count).value, 1.0f};
  // The mean has the bits of the forward pass.
  bool unsure = !(squares.sum.high < kLargeSum);
  if (SumOf<X>::kNarrow) unsure = unsure || kSteps == 0 || !says_rounded_mean(squares.sum.high, a.one_of);
  const uint32_t any_unsure = ptx::ballot(unsure);
  if (any_unsure != 0) squares = sum_of_squares<RoundedSquare<X>>(head.lanes, from);
  const RowGradient gradient = query_gradient<X>(squares, along, a.dim, a.one_of, a.eps);
  if (!head.own) return;
  held.each([&](int, int column, const float (&x)[8], const float (&g)[8]) {
    float value[8];
    DSV4_UNROLL
    for (int e = 0; e < 8; ++e) value[e] = gradient.of(gradient.normed(x[e]), g[e]);
    store_eight(head.to, column, a.dim, vector, value);
  });
}

// Where a thread stands among those that share a row. Teams of more than a warp are blocks.
struct Team {
  int64_t piece;
  int thread, threads;

  DSV4_DEVICE explicit Team(int of_team) : threads(of_team) {
    const uint32_t at = static_cast<uint32_t>(ptx::thread_index()), all = static_cast<uint32_t>(of_team);
    const bool alone = of_team > 32;
    thread = static_cast<int>(alone ? at : at % all);
    piece = alone ? ptx::block_index_x() : ptx::block_index_x() * (kRowThreads / all) + at / all;
  }

  // The sums over the team, in each of its threads. turn: how many sums it has made.
  template <class X>
  DSV4_DEVICE GradientSums<X> sum(const GradientSums<X>& own, int& turn) const {
    const int lanes = threads < 32 ? threads : 32;
    GradientSums<X> sums = {own.squares.over(lanes), own.along.over(lanes)};
    if (threads <= 32) return sums;
    const uint32_t memory = ptx::shared_base() + static_cast<uint32_t>(turn++ % 2 * kTeamWarps * 16);
    if (thread % 32 == 0) {
      const TwoFloats squares = sums.squares.value, along = sums.along.value;
      ptx::store_shared_16(memory + static_cast<uint32_t>(thread / 32 * 16),
                           {{bits_from_float(squares.high), bits_from_float(squares.low), bits_from_float(along.high),
                             bits_from_float(along.low)}});
    }
    ptx::sync_threads();
    const int warp = thread % kTeamWarps;
    float part[4] = {0.0f, 0.0f, 0.0f, 0.0f};
    if (warp < threads / 32) unpack(ptx::load_shared_16(memory + static_cast<uint32_t>(warp * 16)), part);
    sums.squares.value = {part[0], part[1]};
    sums.along.value = {part[2], part[3]};
    return {sums.squares.over(kTeamWarps), sums.along.over(kTeamWarps)};
  }
};

// A team's sums over the rows of its piece, of eights of columns, in float32 and in the order of the rows: in registers
// or, with kSteps = 0, in the piece's own memory.
template <int kSteps>
class WeightSums {
 public:
  // The products of an eight of the piece's first row, or of another.
  DSV4_DEVICE void add_eight(const NormGradientArguments& a, const Team& team, int s, int column, bool first,
                             const float (&grad)[8], const float (&y)[8]) {
    if constexpr (kSteps > 0) {
      add_to(sum_[s], grad, y);
    } else {
      if (a.partial == nullptr) return;
      float* partial = a.partial + team.piece * a.width;
      float sum[8] = {};
      if (!first) load_eight(partial, column, a.width, true, sum);
      add_to(sum, grad, y);
      store_eight(partial, column, a.width, true, sum);
    }
  }

  DSV4_DEVICE void store(const NormGradientArguments& a, const Team& team) const {
    if constexpr (kSteps > 0) {
      if (a.partial == nullptr) return;
      float* partial = a.partial + team.piece * a.width;
      DSV4_UNROLL
      for (int s = 0; s < kSteps; ++s) {
        store_eight(partial, 8 * (team.thread + s * team.threads), a.width, true, sum_[s]);
      }
    }
  }

 private:
  DSV4_DEVICE static void add_to(float (&sum)[8], const float (&grad)[8], const float (&y)[8]) {
    DSV4_UNROLL
    for (int e = 0; e < 8; ++e) sum[e] = ptx::fma(grad[e], y[e], sum[e]);
  }

  float sum_[kSteps > 0 ? kSteps : 1][8] = {};
};

// A thread's sums over a row; kScaled: of x times kSmall.
template <class X, bool kScaled, class Row>
DSV4_DEVICE GradientSums<X> sums_of(const Row& row, const NormWeight& weight) {
  GradientSums<X> sums;
  row.each([&](int, int column, const float (&x)[8], const float (&g)[8]) {
    float by[8];
    weight.eight(column, by);
    DSV4_UNROLL
    for (int e = 0; e < 8; ++e) {
      const float own = kScaled ? ptx::multiply(x[e], kSmall) : x[e];
      sums.squares.add_product(own, own);
      sums.along.add_product(ptx::multiply(g[e], by[e]), own);
    }
  });
  return sums;
}

template <class X, int kSteps>
DSV4_DEVICE void row_gradients(const NormGradientArguments& a) {
  constexpr bool kAhead = sizeof(X) == 2;  // registers hold the next row too
  const Team team(a.threads);
  const int column = 8 * team.thread, step = 8 * a.threads;
  const int64_t first = team.piece * a.rows_of_piece, left = a.rows - first;
  const int own = left < a.rows_of_piece ? static_cast<int>(left) : a.rows_of_piece;  // none, or less, past the end
  // Every team makes as many steps, whether it has rows or not.
  const auto row_of = [&](const AnyView<2>& rows, int i) -> GlobalRow<X> {
    const int64_t row = i < own ? first + i : a.rows - 1;
    return {static_cast<const X*>(rows.data) + row * rows.stride[0], a.dim, kSteps > 0 || a.vector};
  };
  NormWeight weight = a.weight;  // read again in each pass, from L1: registers have better things to hold
  if (kSteps > 0) weight.vector = true;
  WeightSums<kSteps> sums;
  FetchedRow<X, (kSteps > 0 ? kSteps : 1)> fetched;
  if constexpr (kSteps > 0) fetched.fetch(row_of(a.x, 0), row_of(a.grad, 0), column, step);
  int turn = 0;
  for (int i = 0; i < a.rows_of_piece; ++i) {
    const int64_t row = i < own ? first + i : a.rows - 1;
    GradientRow<X, kSteps> held(row_of(a.x, i), row_of(a.grad, i),
                                row_rope(a.rope, row, a.dim, kSteps > 0 || a.vector_rope, true), column, step);
    if constexpr (kSteps > 0) held.take(fetched);
    if constexpr (kSteps > 0 && kAhead) {
      if (i + 1 < own) fetched.fetch(row_of(a.x, i + 1), row_of(a.grad, i + 1), column, step);
    }
    float scale = 1.0f;
    GradientSums<X> row_sums = team.sum(sums_of<X, false>(held, weight), turn);
    const bool lost = !(row_sums.squares.value.high < kLargeSum);  // see sum_of_squares
    const uint32_t any_lost = ptx::ballot(lost);
    if (any_lost != 0) {
      const GradientSums<X> small = team.sum(sums_of<X, true>(held, weight), turn);
      if (lost) row_sums = small, scale = kSmall;
    }
    const RowGradient gradient = norm_gradient(row_sums, scale, a.dim, a.one_of, a.eps);
    if (i < own) {
      X* to = static_cast<X*>(a.result.data) + row * a.result.stride[0];
      held.each([&](int s, int at, const float (&x)[8], const float (&g)[8]) {
        float by[8], y[8], value[8];
        weight.eight(at, by);
        DSV4_UNROLL
        for (int e = 0; e < 8; ++e) {
          y[e] = gradient.normed(x[e]);
          value[e] = gradient.of(y[e], ptx::multiply(g[e], by[e]));
        }
        sums.add_eight(a, team, s, at, i == 0, g, y);
        store_eight(to, at, a.dim, kSteps > 0 || a.vector, value);
      });
    }
    if constexpr (kSteps > 0 && !kAhead) {
      if (i + 1 < own) fetched.fetch(row_of(a.x, i + 1), row_of(a.grad, i + 1), column, step);
    }
  }
  if (own > 0) sums.store(a, team);
}

using QueryArguments = QueryGradientArguments;
using NormArguments = NormGradientArguments;
DSV4_KERNEL(kRowThreads, 8) sm80_bf16_query_norm_rope_backward_1(const QueryArguments a) {
  query_gradients<bf16, 1>(a);
}
DSV4_KERNEL(kRowThreads, 8) sm80_bf16_query_norm_rope_backward_2(const QueryArguments a) {
  query_gradients<bf16, 2>(a);
}
DSV4_KERNEL(kRowThreads, 6) sm80_bf16_query_norm_rope_backward(const QueryArguments a) { query_gradients<bf16, 0>(a); }
DSV4_KERNEL(kRowThreads, 8) sm80_f32_query_norm_rope_backward_1(const QueryArguments a) {
  query_gradients<float, 1>(a);
}
DSV4_KERNEL(kRowThreads, 6) sm80_f32_query_norm_rope_backward_2(const QueryArguments a) {
  query_gradients<float, 2>(a);
}
DSV4_KERNEL(kRowThreads, 6) sm80_f32_query_norm_rope_backward(const QueryArguments a) { query_gradients<float, 0>(a); }
DSV4_KERNEL(kRowThreads, 6) sm80_bf16_norm_rope_backward_1(const NormArguments a) { row_gradients<bf16, 1>(a); }
DSV4_KERNEL(kTeamThreads, 1) sm80_bf16_norm_rope_backward_2(const NormArguments a) { row_gradients<bf16, 2>(a); }
DSV4_KERNEL(kTeamThreads, 2) sm80_bf16_norm_rope_backward(const NormArguments a) { row_gradients<bf16, 0>(a); }
DSV4_KERNEL(kRowThreads, 5) sm80_f32_norm_rope_backward_1(const NormArguments a) { row_gradients<float, 1>(a); }
DSV4_KERNEL(kTeamThreads, 1) sm80_f32_norm_rope_backward_2(const NormArguments a) { row_gradients<float, 2>(a); }
DSV4_KERNEL(kTeamThreads, 1) sm80_f32_norm_rope_backward(const NormArguments a) { row_gradients<float, 0>(a); }

namespace {

// Of rows of whole, aligned eights, one or two of a thread; of any rows.
template <class Arguments>
struct Kernels {
  void (*one)(Arguments);
  void (*two)(Arguments);
  void (*any)(Arguments);

  auto of(bool vector, int64_t dim, int64_t threads) const {
    const int64_t eights = ceil_div(dim, 8 * threads);
    return !vector || eights > 2 ? any : eights == 2 ? two : one;
  }
};

constexpr Kernels<QueryArguments> kNarrowQueries = {
    sm80_bf16_query_norm_rope_backward_1, sm80_bf16_query_norm_rope_backward_2, sm80_bf16_query_norm_rope_backward};
constexpr Kernels<QueryArguments> kWideQueries = {
    sm80_f32_query_norm_rope_backward_1, sm80_f32_query_norm_rope_backward_2, sm80_f32_query_norm_rope_backward};
constexpr Kernels<NormArguments> kNarrowRows = {sm80_bf16_norm_rope_backward_1, sm80_bf16_norm_rope_backward_2,
                                                sm80_bf16_norm_rope_backward};
constexpr Kernels<NormArguments> kWideRows = {sm80_f32_norm_rope_backward_1, sm80_f32_norm_rope_backward_2,
                                              sm80_f32_norm_rope_backward};

// Of a team: a row of lanes of an eight each, or whole warps with two eights a thread.
int team_threads(int64_t dim) {
  if (dim <= 32 * 8) return row_lanes(dim);
  const int64_t warps = ceil_div(dim, 32 * 16);
  return static_cast<int>(warps < kTeamWarps ? 32 * warps : kTeamThreads);
}

// Of a row, for as many threads as it has eights.
int64_t row_work(int64_t dim) { return dim <= 32 * 8 ? row_lanes(dim) : 2 * team_threads(dim); }

Status launch_rows(const char* op, const NormRopeBackwardParams& p, const Context& context) {
  const int64_t rows = p.x.size(0), dim = p.x.size(1);
  NormGradientArguments a = {};
  a.grad = p.grad;
  a.x = p.x;
  a.result = p.grad_x;
  a.rope = p.rope;
  a.weight = norm_weight(p.weight);
  a.eps = two_floats(p.eps);
  a.rows = rows;
  a.dim = static_cast<int>(dim);
  a.one_of = 1.0f / static_cast<float>(dim);
  a.threads = team_threads(dim);
  a.rows_of_piece = static_cast<int>(rows_of_piece(rows, row_work(dim)));
  a.width = static_cast<int>(padded_width(dim));
  a.partial = p.weight.given() ? static_cast<float*>(p.workspace.data) : nullptr;
  a.vector = in_eights(p.x) && in_eights(p.grad) && in_eights(p.grad_x);
  a.vector_rope = whole_turns(p.rope, dim);
  const bool block = a.threads > 32;
  const int64_t teams = block ? 1 : kRowThreads / a.threads;
  cuda::LaunchShape shape;
  shape.blocks_x = ceil_div(pieces_of(rows, row_work(dim)), teams);
  shape.threads = block ? a.threads : kRowThreads;
  shape.shared_bytes = block ? 2 * kTeamWarps * 16 : 0;
  const bool weight = a.weight.vector || a.weight.data == nullptr;
  const auto& kernels = p.x.dtype == DType::kFloat32 ? kWideRows : kNarrowRows;
  return cuda::launch(op, kernels.of(a.vector && a.vector_rope && weight, dim, a.threads), shape, context, a);
}

}  // namespace

Status query_norm_rope_backward(const QueryNormRopeBackwardParams& p, const Context& context) {
  const int64_t dim = p.query.size(2);
  QueryGradientArguments a = {};
  static_cast<HeadArguments&>(a) = head_arguments(p.query, p.rope, p.result);
  a.grad = p.grad;
  a.one_of = 1.0f / static_cast<float>(dim);
  a.eps = two_floats(p.eps);
  a.vector = a.vector && in_eights(p.grad);
  const auto& kernels = p.query.dtype == DType::kFloat32 ? kWideQueries : kNarrowQueries;
  return launch_heads("query_norm_rope_backward", kernels.of(a.vector && a.vector_rope, dim, a.lanes), a, context);
}

int64_t norm_rope_backward_workspace_bytes(const NormRopeBackwardParams& p) {
  const int64_t rows = p.x.size(0), dim = p.x.size(1);
  if (!p.weight.given()) return 0;
  return pieces_of(rows, row_work(dim)) * padded_width(dim) * static_cast<int64_t>(sizeof(float));
}

Status norm_rope_backward(const char* op, const NormRopeBackwardParams& p, const Context& context) {
  const int64_t rows = p.x.size(0), dim = p.x.size(1);
  if (dim == 0) return Status::ok();
  if (rows > 0) {
    const Status status = launch_rows(op, p, context);
    if (!status.is_ok() || !p.weight.given()) return status;
  }
  if (!p.weight.given()) return Status::ok();
  const int64_t pieces = pieces_of(rows, row_work(dim));
  return add_pieces(
      op,
      {static_cast<const float*>(p.workspace.data), pieces, 1, 1, dim, p.grad_weight.data, p.grad_weight.dtype, dim},
      context);
}

Status norm_rope_backward(const NormRopeBackwardParams& p, const Context& context) {
  return norm_rope_backward(p.rope.given() ? "kv_norm_rope_backward" : "rms_norm_backward", p, context);
}

}  // namespace dsv4::sm80
