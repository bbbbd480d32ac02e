// moe_experts_backward on plain matrices, in a few kernels, none of which waits for the host; the map by expert and the
// products of gate and up are the forward pass's (moe.cu), so both passes clamp the same values:
//   gate, up   [rows, inter], rounded to the type of x
//   inner      grad w2; of it, gate and up, in the tile's last step: the gradients of gate and up in their place, the
//              rows that w2 multiplied, and of each row and 128 inner values a part of its routing weight's gradient
//   matrix     w1: grad_gate^T x, w3: grad_up^T x, w2: grad^T inner; K: an expert's rows
//   inputs     grad_gate w1 + grad_up w3, float32 rows, for some columns at a time, which bounds the workspace; then
//   sum        those of a token by ascending expert, the shared one's last
// What a result asks for that is none is not launched.
// A block has 128 columns and 128 rows (product_tile.h): 64 FLOP a byte from L2 in bfloat16, bound by the tensor cores;
// float32 runs on FMA. Where experts have few rows it has 64 rows, 43 FLOP a byte, and two blocks share an SM, one of
// which loads or stores while the other multiplies: bound by reading matrices and writing their gradients.
#include "cuda/common/launch.h"
#include "cuda/sm80/expert_gradient.h"
#include "cuda/sm80/expert_launch.h"
#include "cuda/sm80/moe.h"

namespace dsv4::sm80 {

template <class X>
using FewRows = ProductShape<X, false, 1>;
template <class X>
using ManyRows = ProductShape<X, false, 2>;
template <class X>
using FewOutputs = ProductShape<X, true, 1>;
template <class X>
using ManyOutputs = ProductShape<X, true, 2>;

#define DSV4_GRADIENT_KERNELS(name, X)                                                                    \
  DSV4_KERNEL(FewRows<X>::kThreads, 2)                                                                    \
  sm80_##name##_moe_backward_inner_few(const InnerArguments a) { gradient_inner<FewRows<X>>(a); }         \
  DSV4_KERNEL(ManyRows<X>::kThreads, 1)                                                                   \
  sm80_##name##_moe_backward_inner_many(const InnerArguments a) { gradient_inner<ManyRows<X>>(a); }       \
  DSV4_KERNEL(FewRows<X>::kThreads, 2)                                                                    \
  sm80_##name##_moe_backward_inputs_few(const InputArguments a) { gradient_inputs<FewRows<X>>(a); }       \
  DSV4_KERNEL(ManyRows<X>::kThreads, 1)                                                                   \
  sm80_##name##_moe_backward_inputs_many(const InputArguments a) { gradient_inputs<ManyRows<X>>(a); }     \
  DSV4_KERNEL(FewOutputs<X>::kThreads, 2)                                                                 \
  sm80_##name##_moe_backward_matrix_few(const MatrixArguments a) { gradient_matrix<FewOutputs<X>>(a); }   \
  DSV4_KERNEL(ManyOutputs<X>::kThreads, 1)                                                                \
  sm80_##name##_moe_backward_matrix_many(const MatrixArguments a) { gradient_matrix<ManyOutputs<X>>(a); } \
  DSV4_KERNEL(kGradientSumThreads, 4)                                                                     \
  sm80_##name##_moe_backward_sum(const GradientSumArguments a) { gradient_sum<X>(a); }

DSV4_GRADIENT_KERNELS(bf16, bf16)
DSV4_GRADIENT_KERNELS(f32, float)

DSV4_KERNEL(kGradientSumThreads, 4)
sm80_f32_moe_backward_weights(const GradientSumArguments a) { gradient_weights(a); }

namespace {

constexpr const char* kOp = "moe_experts_backward";
constexpr int64_t kSumsAtOnce = int64_t{1} << 26;  // float32 numbers: bounds the workspace
constexpr int64_t kRowsOfTile[2] = {64, 128};      // few, many

TileRows rows_of(const AnyView<2>& view, const int32_t* map) {
  const int64_t size = size_of(view.dtype);
  return {static_cast<const uint8_t*>(view.data),
          map,
          view.stride[0] * size,
          view.shape[1] * size,
          0,
          view.shape[0],
          in_pieces(view)};
}

GradientMatrix matrix_of(const AnyView<3>& view) {
  const int64_t size = size_of(view.dtype);
  GradientMatrix m = {};
  m.rows = {static_cast<const uint8_t*>(view.data),
            nullptr,
            view.stride[1] * size,
            view.shape[2] * size,
            0,
            view.shape[1],
            in_pieces(view)};
  m.expert_stride = view.stride[0] * size;
  return m;
}

// The matrices of the routed experts, or of the shared one, and where their rows lie in the workspace.
struct Group {
  const AnyView<3>*matrices, *gradients;
  bool shared, many;
  int64_t gate, up, inner, outputs;
  int64_t experts() const { return matrices[0].shape[0]; }
  int64_t inter() const { return matrices[0].shape[1]; }
};

// Where things lie in the workspace.
struct Layout {
  int64_t tokens, pairs, tile_rows, tile_count, used = 0;
  int64_t wide, tokens_of, row_weights, places, rows, offsets, tiles, parts;
  Group groups[2];  // the routed experts, the shared one

  Layout(const MoeExpertsBackwardParams& p, const GradientCut& cut)
      : tokens(p.x.size(0)), pairs(tokens * p.weights.size(1)), tile_rows(kRowsOfTile[cut.many]) {
    const int64_t experts = p.matrices[0].shape[0], inter = p.matrices[0].shape[1], size = size_of(p.x.dtype);
    tile_count = pairs == 0 ? 0 : cut.tile_at_row ? pairs : pairs / tile_rows + experts;
    wide = take(size == 4 ? tokens * 3 * round_up(p.x.size(1), kBlockInputs) * 2 : 0);
    tokens_of = take(pairs * 4);
    row_weights = take(pairs * 4);
    places = take(pairs * 4);
    rows = take(pairs * 4);
    offsets = take((experts + 1) * 4);
    tiles = take(tile_count * static_cast<int64_t>(sizeof(ExpertTile)));
    parts = take(pairs * ceil_div(inter, kProductColumns) * 4);
    groups[0] = group(p.matrices, p.grad_matrices, pairs, size, cut.columns);
    groups[0].many = cut.many;
    const bool has_shared = p.shared[0].given();
    groups[1] = group(p.shared, p.grad_shared, has_shared ? tokens : 0, size, cut.columns);
    groups[1].shared = true;
    groups[1].many = cut.many_shared;
  }

 private:
  int64_t take(int64_t bytes) {
    const int64_t at = used;
    used += round_up(bytes, 64);
    return at;
  }
  Group group(const AnyView<3>* matrices, const AnyView<3>* gradients, int64_t count, int64_t size, int64_t columns) {
    Group g = {matrices, gradients, false, false, 0, 0, 0, 0};
    const int64_t bytes = count == 0 ? 0 : count * g.inter() * size;
    g.gate = take(bytes);
    g.up = take(bytes);
    g.inner = take(bytes);
    g.outputs = take(count * columns * 4);
    return g;
  }
};

// By type of x: float32, bfloat16; few, many.
constexpr void (*kInner[2][2])(InnerArguments) = {
    {sm80_f32_moe_backward_inner_few, sm80_f32_moe_backward_inner_many},
    {sm80_bf16_moe_backward_inner_few, sm80_bf16_moe_backward_inner_many}};
constexpr void (*kInputs[2][2])(InputArguments) = {
    {sm80_f32_moe_backward_inputs_few, sm80_f32_moe_backward_inputs_many},
    {sm80_bf16_moe_backward_inputs_few, sm80_bf16_moe_backward_inputs_many}};

constexpr void (*kMatrix[2][2])(MatrixArguments) = {
    {sm80_f32_moe_backward_matrix_few, sm80_f32_moe_backward_matrix_many},
    {sm80_bf16_moe_backward_matrix_few, sm80_bf16_moe_backward_matrix_many}};

template <class Shape>
cuda::LaunchShape shape_of() {
  static_assert(Shape::kSharedBytes <= cuda::kMaxSharedBytes);
  cuda::LaunchShape shape;
  shape.threads = Shape::kThreads;
  shape.shared_bytes = Shape::kSharedBytes;
  return shape;
}

class GradientRun {
 public:
  GradientRun(const MoeExpertsBackwardParams& p, const GradientCut& cut, const Context& context)
      : p_(p), cut_(cut), context_(context), at_(p, cut) {}

  Status run() const {
    Status status = prepare();
    if (status.is_ok()) status = map();
    for (const Group& g : at_.groups) {
      if (status.is_ok() && rows_of_group(g) > 0 && g.inter() > 0) status = inner(g);
      if (status.is_ok() && (!g.shared || has_shared())) status = matrices(g);
    }
    for (int64_t column = 0; p_.grad_x.given() && status.is_ok() && column < hidden(); column += cut_.columns) {
      status = inputs(column);
    }
    return status.is_ok() && p_.grad_weights.given() ? weights() : status;
  }

 private:
  template <class T = uint8_t>
  T* memory(int64_t at) const {
    return reinterpret_cast<T*>(static_cast<uint8_t*>(p_.workspace.data) + at);
  }
  bool narrow() const { return p_.x.dtype == DType::kBFloat16; }
  int64_t size() const { return size_of(p_.x.dtype); }
  int64_t hidden() const { return p_.x.size(1); }
  bool has_shared() const { return p_.shared[0].given(); }
  int64_t rows_of_group(const Group& g) const {
    if (g.shared) return has_shared() ? at_.tokens : 0;
    return g.experts() > 0 ? at_.pairs : 0;
  }
  const int32_t* map_of(const Group& g) const { return g.shared ? nullptr : memory<int32_t>(at_.tokens_of); }

  // x in the form in which float32 weights meet it.
  Status prepare() const {
    if (narrow()) return Status::ok();
    return prepare_activations(kOp, with_group(p_.x), memory(at_.wide), 3, false, InputOrder::kPlain, context_);
  }

  Status map() const {
    MapArguments a = {};
    a.indices = p_.indices;
    a.pairs = at_.pairs;
    a.top_k = static_cast<int>(p_.weights.size(1));
    a.experts = static_cast<int>(p_.matrices[0].shape[0]);
    a.offsets = memory<int32_t>(at_.offsets);
    a.rows = memory<int32_t>(at_.rows);
    a.weights = p_.weights;
    a.tokens = memory<int32_t>(at_.tokens_of);
    a.row_weights = memory<float>(at_.row_weights);
    a.places = memory<int32_t>(at_.places);
    a.tiles = at_.tile_count > 0 ? memory<ExpertTile>(at_.tiles) : nullptr;
    a.tile_rows = static_cast<int>(at_.tile_rows);
    a.tile_count = at_.tile_count;
    a.tile_at_row = cut_.tile_at_row;
    return launch_map(kOp, a, context_);
  }

  // What w1 and w3 multiply.
  ActivationRows input(const Group& g) const {
    ActivationRows x = {};
    x.inputs = hidden();
    x.map = map_of(g);
    if (narrow()) {
      const TileRows rows = rows_of(p_.x, nullptr);
      x.data = rows.data;
      x.stride = p_.x.shape[0] > 1 ? rows.stride : 0;
      x.bytes = rows.bytes;
      x.planes = 1;
      x.vector = rows.vector;
    } else {
      x.data = memory(at_.wide);
      x.bytes = x.plane_stride = round_up(hidden(), kBlockInputs) * 2;
      x.planes = 3;
      x.stride = x.planes * x.bytes;
      x.vector = true;
    }
    return x;
  }

  // [rows, inter] in the workspace.
  AnyView<2> rows_at(const Group& g, int64_t at) const {
    AnyView<2> view;
    view.data = memory(at);
    view.dtype = p_.x.dtype;
    view.shape[0] = rows_of_group(g);
    view.shape[1] = view.stride[0] = g.inter();
    view.stride[1] = 1;
    return view;
  }

  GradientTiles tiles_of(const Group& g) const {
    return {g.shared ? nullptr : memory<ExpertTile>(at_.tiles), at_.tokens};
  }
  int64_t tile_count(const Group& g) const {
    return g.shared ? ceil_div(at_.tokens, kRowsOfTile[g.many]) : at_.tile_count;
  }

  Status inner(const Group& g) const {
    for (int i = 0; i < 2; ++i) {
      ExpertMatrix w;
      w.format = WeightFormat::kPlain;
      w.data = g.matrices[i];
      ExpertArguments a = {};
      a.x = input(g);
      a.tiles = g.shared ? nullptr : memory<ExpertTile>(at_.tiles);
      a.rows = at_.tokens;
      a.outputs = g.inter();
      a.narrow = narrow();
      a.out = memory(i == 0 ? g.gate : g.up);
      const Status status = launch_product(kOp, w, at_.tile_count, at_.tile_rows, a, context_);
      if (!status.is_ok()) return status;
    }
    InnerArguments a = {};
    a.tiles = tiles_of(g);
    a.grad = rows_of(p_.grad, map_of(g));
    a.w2 = matrix_of(g.matrices[2]);
    a.hidden = hidden();
    a.inter = g.inter();
    a.row_weights = g.shared ? nullptr : memory<float>(at_.row_weights);
    a.limit = p_.swiglu_limit;
    a.gate = memory(g.gate);
    a.up = memory(g.up);
    a.inner = memory(g.inner);
    a.parts = g.shared ? nullptr : memory<float>(at_.parts);
    a.vector = a.inter * size() % 16 == 0;
    cuda::LaunchShape shape = shape_for<FewRows, ManyRows>(g);
    shape.blocks_x = tile_count(g) * ceil_div(a.inter, kProductColumns);
    return shape.blocks_x == 0 ? Status::ok() : cuda::launch(kOp, kInner[narrow()][g.many], shape, context_, a);
  }

  template <template <class> class Few, template <class> class Many>
  cuda::LaunchShape shape_for(const Group& g) const {
    if (narrow()) return g.many ? shape_of<Many<bf16>>() : shape_of<Few<bf16>>();
    return g.many ? shape_of<Many<float>>() : shape_of<Few<float>>();
  }

  Status matrices(const Group& g) const {
    const TileRows x = rows_of(p_.x, map_of(g)), grad = rows_of(p_.grad, map_of(g));
    const TileRows left[3] = {rows_of(rows_at(g, g.gate), nullptr), rows_of(rows_at(g, g.up), nullptr), grad};
    const TileRows right[3] = {x, x, rows_of(rows_at(g, g.inner), nullptr)};
    for (int i = 0; i < 3; ++i) {
      const AnyView<3>& to = g.gradients[i];
      if (!to.given()) continue;
      const GradientMatrix out = matrix_of(to);
      MatrixArguments a = {};
      a.offsets = g.shared ? nullptr : memory<int32_t>(at_.offsets);
      a.rows = at_.tokens;
      a.left = left[i];
      a.right = right[i];
      a.outputs = to.shape[1];
      a.inputs = to.shape[2];
      a.out = static_cast<uint8_t*>(to.data);
      a.out_stride = out.rows.stride;
      a.expert_stride = out.expert_stride;
      a.vector = out.rows.vector;
      cuda::LaunchShape shape = shape_for<FewOutputs, ManyOutputs>(g);
      shape.blocks_x = g.experts() * ceil_div(a.outputs, kRowsOfTile[g.many]) * ceil_div(a.inputs, kProductColumns);
      if (shape.blocks_x == 0) continue;
      const Status status = cuda::launch(kOp, kMatrix[narrow()][g.many], shape, context_, a);
      if (!status.is_ok()) return status;
    }
    return Status::ok();
  }

  int64_t columns_from(int64_t column) const {
    return hidden() - column < cut_.columns ? hidden() - column : cut_.columns;
  }

  // The gradient of x from `column` on.
  Status inputs(int64_t column) const {
    for (const Group& g : at_.groups) {
      if (rows_of_group(g) == 0) continue;
      InputArguments a = {};
      a.tiles = tiles_of(g);
      a.gate = rows_of(rows_at(g, g.gate), nullptr);
      a.up = rows_of(rows_at(g, g.up), nullptr);
      a.w1 = matrix_from(g.matrices[0], column);
      a.w3 = matrix_from(g.matrices[1], column);
      a.inter = g.inter();
      a.columns = columns_from(column);
      a.out = memory<float>(g.outputs);
      a.out_stride = cut_.columns;
      cuda::LaunchShape shape = shape_for<FewRows, ManyRows>(g);
      shape.blocks_x = tile_count(g) * ceil_div(a.columns, kProductColumns);
      if (shape.blocks_x == 0) continue;
      const Status status = cuda::launch(kOp, kInputs[narrow()][g.many], shape, context_, a);
      if (!status.is_ok()) return status;
    }
    return sum(column);
  }

  // The matrix from `column`, a multiple of 8, on.
  GradientMatrix matrix_from(const AnyView<3>& view, int64_t column) const {
    GradientMatrix m = matrix_of(view);
    m.rows.data += column * size();
    m.rows.bytes -= column * size();
    return m;
  }

  GradientSumArguments sums() const {
    GradientSumArguments a = {};
    a.places = memory<int32_t>(at_.places);
    a.tokens = at_.tokens;
    a.top_k = static_cast<int>(p_.weights.size(1));
    a.parts = memory<float>(at_.parts);
    a.blocks = ceil_div(p_.matrices[0].shape[1], kProductColumns);
    a.weights = p_.grad_weights;
    return a;
  }

  Status sum(int64_t column) const {
    GradientSumArguments a = sums();
    const TileRows to = rows_of(p_.grad_x, nullptr);
    a.outputs = memory<float>(at_.groups[0].outputs);
    a.shared = has_shared() ? memory<float>(at_.groups[1].outputs) : nullptr;
    a.stride = cut_.columns;
    a.columns = columns_from(column);
    a.result = static_cast<uint8_t*>(p_.grad_x.data) + column * size();
    a.result_stride = p_.grad_x.stride[0];
    a.vector = to.vector;
    cuda::LaunchShape shape;
    shape.blocks_x = at_.tokens;
    shape.blocks_y = ceil_div(a.columns, kGradientSumThreads * 8);
    shape.threads = kGradientSumThreads;
    if (shape.blocks_x == 0) return Status::ok();
    return cuda::launch(kOp, narrow() ? sm80_bf16_moe_backward_sum : sm80_f32_moe_backward_sum, shape, context_, a);
  }

  Status weights() const {
    cuda::LaunchShape shape;
    shape.blocks_x = ceil_div(at_.pairs, kGradientSumThreads);
    shape.threads = kGradientSumThreads;
    if (shape.blocks_x == 0) return Status::ok();
    return cuda::launch(kOp, sm80_f32_moe_backward_weights, shape, context_, sums());
  }

  const MoeExpertsBackwardParams& p_;
  const GradientCut& cut_;
  const Context& context_;
  Layout at_;
};

}  // namespace

GradientCut gradient_cut(const MoeExpertsBackwardParams& p) {
  const int64_t tokens = p.x.size(0), pairs = tokens * p.weights.size(1), experts = p.matrices[0].shape[0];
  GradientCut cut = {};
  cut.many = 2 * pairs > 3 * kRowsOfTile[0] * experts;
  cut.many_shared = tokens > kRowsOfTile[0];
  cut.tile_at_row = pairs <= pairs / kRowsOfTile[cut.many] + experts;
  const int64_t rows = pairs + (p.shared[0].given() ? tokens : 0), all = round_up(p.x.size(1), kProductColumns);
  const int64_t some = kSumsAtOnce / (rows > 0 ? rows : 1) / kProductColumns * kProductColumns;
  cut.columns = some >= all ? all : some > kProductColumns ? some : kProductColumns;
  return cut;
}

GradientRows gradient_rows(const MoeExpertsBackwardParams& p, const GradientCut& cut, bool shared) {
  const Group& g = Layout(p, cut).groups[shared];
  return {g.gate, g.up, g.inner};
}

bool accepts_moe_experts_backward(const MoeExpertsBackwardParams& p) {
  return p.x.size(0) * p.weights.size(1) <= INT32_MAX && p.matrices[0].shape[0] < INT32_MAX;
}

int64_t moe_experts_backward_workspace_bytes(const MoeExpertsBackwardParams& p, const GradientCut& cut) {
  return Layout(p, cut).used;
}

Status moe_experts_backward(const MoeExpertsBackwardParams& p, const GradientCut& cut, const Context& context) {
  return GradientRun(p, cut, context).run();
}

int64_t moe_experts_backward_workspace_bytes(const MoeExpertsBackwardParams& p, const Context&) {
  return sm80::moe_experts_backward_workspace_bytes(p, gradient_cut(p));
}
Status moe_experts_backward(const MoeExpertsBackwardParams& p, const Context& context) {
  return sm80::moe_experts_backward(p, gradient_cut(p), context);
}

}  // namespace dsv4::sm80
