// moe_experts in a few kernels, none of which waits for the host: activations to the form of quantised weights; the map
// of pairs by expert (moe_map.h); gate and up (expert_tiles.h), down, each for the routed experts and for the shared
// one; the sum of a token's outputs by ascending expert, then the shared one's, in float32.
//
// Few rows an expert: tiles of 8 rows, each weight read once, bound by the bytes of the experts touched or by the
// instructions that expand them. 64 rows of a matrix a block, w1 and w3 apart and `activate` after them: one token's
// six experts are three blocks for each SM of a large GPU, where blocks of a quantiser's 128 outputs of both would be
// fewer than it has SMs. Many: tiles of 64, with e2m1 weights 124 FLOP a byte from L2 for gate and up, 84 for down:
// bound by the tensor cores and the instructions that expand codes. The launch has a tile for every pair or, from some
// pairs on, for every expert and 8 or 64 pairs, whichever is less; tiles without rows end at once.
//
// The shared expert is one alone: until tokens are many it takes 32 rows a block, so that some hundred blocks read each
// matrix of a model.
#include "cuda/common/launch.h"
#include "cuda/sm80/expert_launch.h"
#include "cuda/sm80/moe.h"

namespace dsv4::sm80 {

struct CombineArguments {
  const int32_t* places;  // [tokens, top_k]: rows of outputs, -1: none
  const void* outputs;    // [pairs, hidden]
  const void* shared;     // [tokens, hidden], or none
  void* result;
  int64_t result_stride, hidden;
  int top_k;
  bool vector;
};

namespace {

constexpr int kCombineThreads = 128;
constexpr int kTilesRows[2] = {8, 64};  // of the map; few, many

template <WeightForm kForm>
inline constexpr int kPassWarps = kForm == WeightForm::kFloat32    ? 2
                                  : kForm == WeightForm::kBFloat16 ? 4
                                                                   : 8;
template <WeightForm kForm>
inline constexpr bool kIsFp4 = kForm == WeightForm::kFp4 || kForm == WeightForm::kFp4Wide;
template <WeightForm kForm>
inline constexpr int kManyN = kForm == WeightForm::kFp8 || kForm == WeightForm::kFp4 ? 8 : 4;

template <WeightForm kForm>
inline constexpr int kFewStages = kIsFp4<kForm>     ? 4
                                  : kIsPlain<kForm> ? 2
                                                    : 3;

template <WeightForm kForm>
using GateUpMany = TileShape<kForm, 2, kManyN<kForm>, kPassWarps<kForm>, 1, 1, kIsFp4<kForm> ? 3 : 2>;
template <WeightForm kForm>
using ProductFew = TileShape<kForm, kForm == WeightForm::kFloat32 ? 1 : 2, 1, 2, 1, 2, kFewStages<kForm>>;
template <WeightForm kForm>
using ProductMany = TileShape<kForm, kForm == WeightForm::kFloat32 ? 1 : 2, 4, 4, 2, 1,
                              kIsFp4<kForm>     ? 4
                              : kIsPlain<kForm> ? 2
                                                : 3>;

// The shared expert, of which there is one: 32 rows a block, K dealt out to warps.
template <WeightForm kForm>
using SharedFew = TileShape<kForm, 1, 1, kForm == WeightForm::kFloat32 ? 1 : 2, 1, 4, kFewStages<kForm>>;
template <WeightForm kForm>
using SharedSome = TileShape<kForm, 1, kForm == WeightForm::kFloat32 ? 2 : 4, 2, 1, 2, kIsPlain<kForm> ? 2 : 3>;

// Grid: x over tokens, y over runs of pieces of the outputs.
template <class X>
DSV4_DEVICE void combine(const CombineArguments& a) {
  const int64_t token = ptx::block_index_x();
  const int64_t column = (ptx::block_index_y() * kCombineThreads + ptx::thread_index()) * kElements<X>;
  if (column >= a.hidden) return;
  float sum[kElements<X>] = {};
  const auto add = [&](const void* outputs, int64_t row) {
    const X* from = static_cast<const X*>(outputs) + row * a.hidden;
    float value[kElements<X>];
    unpack(load_piece(from, column, a.hidden, a.vector), value);
    DSV4_UNROLL
    for (int i = 0; i < kElements<X>; ++i) sum[i] = ptx::add(sum[i], value[i]);
  };
  for_ascending(a.places + token * a.top_k, a.top_k, [&](int32_t row) { add(a.outputs, row); });
  if (a.shared != nullptr) add(a.shared, token);
  store_piece(static_cast<X*>(a.result) + token * a.result_stride, column, a.hidden, a.vector, pack(sum));
}

}  // namespace

#define DSV4_EXPERT_KERNELS(name, form)                                                      \
  DSV4_KERNEL(GateUpMany<form>::kThreads, 1)                                                 \
  sm80_##name##_moe_gate_up_many(const ExpertArguments a) { gate_up<GateUpMany<form>>(a); }  \
  DSV4_KERNEL(ProductFew<form>::kThreads, 1)                                                 \
  sm80_##name##_moe_product_few(const ExpertArguments a) { product<ProductFew<form>>(a); }   \
  DSV4_KERNEL(ProductMany<form>::kThreads, 1)                                                \
  sm80_##name##_moe_product_many(const ExpertArguments a) { product<ProductMany<form>>(a); } \
  DSV4_KERNEL(SharedFew<form>::kThreads, 1)                                                  \
  sm80_##name##_moe_shared_few(const ExpertArguments a) { product<SharedFew<form>>(a); }     \
  DSV4_KERNEL(SharedSome<form>::kThreads, 2)                                                 \
  sm80_##name##_moe_shared_some(const ExpertArguments a) { product<SharedSome<form>>(a); }

DSV4_EXPERT_KERNELS(fp8, WeightForm::kFp8)
DSV4_EXPERT_KERNELS(fp4, WeightForm::kFp4)
DSV4_EXPERT_KERNELS(fp4_wide, WeightForm::kFp4Wide)
DSV4_EXPERT_KERNELS(bf16, WeightForm::kBFloat16)
DSV4_EXPERT_KERNELS(f32, WeightForm::kFloat32)

DSV4_KERNEL(kActivateThreads, 4) sm80_bf16_moe_activate(const ExpertArguments a) { activate<bf16>(a); }
DSV4_KERNEL(kActivateThreads, 4) sm80_f32_moe_activate(const ExpertArguments a) { activate<float>(a); }
DSV4_KERNEL(kMapThreads, 2) sm80_i32_moe_map(const MapArguments a) { moe_map(a); }
DSV4_KERNEL(kCombineThreads, 4) sm80_bf16_moe_combine(const CombineArguments a) { combine<bf16>(a); }
DSV4_KERNEL(kCombineThreads, 4) sm80_f32_moe_combine(const CombineArguments a) { combine<float>(a); }

namespace {

constexpr int64_t kTokensAtOnce = 4096;  // bounds the workspace

// A kernel of the experts and what it takes at a time.
struct ExpertKernel {
  void (*run)(ExpertArguments);
  int rows, tokens, threads, shared_bytes;
};

template <class Shape>
constexpr ExpertKernel gate_up_of(void (*run)(ExpertArguments)) {
  using Plan = GateUpShape<Shape>;
  static_assert(Plan::kPasses * Plan::kPassRows == kBlockInputs && Plan::kSharedBytes <= cuda::kMaxSharedBytes);
  return {run, kBlockInputs, Shape::kTokens, Shape::kThreads, Plan::kSharedBytes};
}
template <class Shape>
constexpr ExpertKernel product_of(void (*run)(ExpertArguments)) {
  static_assert(Shape::kSharedBytes <= cuda::kMaxSharedBytes);
  return {run, Shape::kRows, Shape::kTokens, Shape::kThreads, Shape::kSharedBytes};
}

// The kernels of a form of weights.
struct ExpertForm {
  ExpertKernel gate_up_many;
  ExpertKernel product[2];  // few, many
  ExpertKernel shared[3];   // by SharedTile
};

#define DSV4_EXPERT_FORM(name, form)                                     \
  {                                                                      \
    gate_up_of<GateUpMany<form>>(sm80_##name##_moe_gate_up_many),        \
        {product_of<ProductFew<form>>(sm80_##name##_moe_product_few),    \
         product_of<ProductMany<form>>(sm80_##name##_moe_product_many)}, \
    {                                                                    \
      product_of<SharedFew<form>>(sm80_##name##_moe_shared_few),         \
          product_of<SharedSome<form>>(sm80_##name##_moe_shared_some),   \
          product_of<ProductMany<form>>(sm80_##name##_moe_product_many)  \
    }                                                                    \
  }

// By WeightForm.
constexpr ExpertForm kForms[] = {DSV4_EXPERT_FORM(fp8, WeightForm::kFp8), DSV4_EXPERT_FORM(fp4, WeightForm::kFp4),
                                 DSV4_EXPERT_FORM(fp4_wide, WeightForm::kFp4Wide),
                                 DSV4_EXPERT_FORM(bf16, WeightForm::kBFloat16),
                                 DSV4_EXPERT_FORM(f32, WeightForm::kFloat32)};

WeightForm form_of(const ExpertMatrix& w) {
  const bool wide = w.scale.dtype == DType::kFloat32;
  if (w.format == WeightFormat::kFp8) return WeightForm::kFp8;
  if (w.format == WeightFormat::kFp4) return wide ? WeightForm::kFp4Wide : WeightForm::kFp4;
  return w.data.dtype == DType::kBFloat16 ? WeightForm::kBFloat16 : WeightForm::kFloat32;
}

bool plain(const ExpertMatrix& w) { return w.format == WeightFormat::kPlain; }

ExpertWeights weights_of(const ExpertMatrix& w) {
  ExpertWeights e = {};
  const int64_t size = size_of(w.data.dtype);
  WeightMatrix& m = e.matrix;
  m.data = static_cast<const uint8_t*>(w.data.data);
  m.stride = w.data.stride[1] * size;
  m.bytes = w.data.shape[2] * size;
  m.scales = w.scale.data;
  m.scale_stride = w.scale.stride[1];
  m.scales_of_a_row = w.scale.shape[2];
  m.wide_scales = w.scale.dtype == DType::kFloat32;
  e.stride = w.data.stride[0] * size;
  e.scale_stride = w.scale.stride[0] * size_of(w.scale.dtype);
  m.vector = in_pieces(w.data) && m.stride % 16 == 0;  // rows past the last have addresses too
  return e;
}

const ExpertForm& kernels_of(const ExpertMatrix& w) { return kForms[static_cast<int>(form_of(w))]; }

// The three matrices of the routed experts, or of the shared one.
struct Expert {
  const ExpertMatrix *w1, *w3, *w2;
  bool given() const { return w1->format != WeightFormat::kNone; }
  int64_t inter() const { return w1->data.shape[1]; }
};
Expert routed(const MoeExpertsParams& p) { return {&p.w1, &p.w3, &p.w2}; }
Expert shared(const MoeExpertsParams& p) { return {p.shared, p.shared + 1, p.shared + 2}; }

// Whether one kernel multiplies both.
bool alike(const Expert& e) { return form_of(*e.w1) == form_of(*e.w3) && e.w1->scale.dtype == e.w3->scale.dtype; }

// Whether a block takes rows of both, a quantiser's block of them.
bool at_once(const Expert& e, bool many) { return many && alike(e); }

// Whether some w1 or w3 multiplies x as it is, or else quantised.
bool wants_x(const MoeExpertsParams& p, bool as_it_is) {
  for (const ExpertMatrix* w : {&p.w1, &p.w3, &p.shared[0], &p.shared[1]}) {
    if (w->format != WeightFormat::kNone && plain(*w) == as_it_is) return true;
  }
  return false;
}

int planes_of(const MoeExpertsParams& p, const ExpertMatrix& w) {
  return plain(w) && p.x.dtype == DType::kFloat32 ? 3 : 1;
}

int64_t padded_bytes(int64_t inputs) { return round_up(inputs, kBlockInputs) * 2; }

// Where things lie in the workspace, for `tokens` tokens.
struct Layout {
  int64_t pairs, tile_count, tile_rows, used = 0;
  int64_t quantised, wide, tokens_of, row_weights, places, rows, tiles, inner, shared_inner, outputs, shared_outputs;
  int64_t gate, up;  // of the routed experts, then of the shared one

  Layout(const MoeExpertsParams& p, const ExpertCut& cut, int64_t tokens) {
    const int64_t hidden = p.x.size(1), experts = p.w1.data.shape[0], size = size_of(p.x.dtype);
    const bool has_shared = shared(p).given();
    pairs = tokens * p.weights.size(1);
    tile_rows = kTilesRows[cut.many];
    tile_count = pairs == 0 ? 0 : cut.tile_at_row ? pairs : pairs / tile_rows + experts;
    quantised = take(wants_x(p, false) ? tokens * padded_bytes(hidden) : 0);
    wide = take(wants_x(p, true) && size == 4 ? tokens * 3 * padded_bytes(hidden) : 0);
    tokens_of = take(pairs * 4);
    row_weights = take(pairs * 4);
    places = take(pairs * 4);
    rows = take(pairs * 4);
    tiles = take(tile_count * static_cast<int64_t>(sizeof(ExpertTile)));
    inner = take(pairs * planes_of(p, p.w2) * padded_bytes(routed(p).inter()));
    shared_inner = take(has_shared ? tokens * planes_of(p, p.shared[2]) * padded_bytes(shared(p).inter()) : 0);
    outputs = take(pairs * hidden * size);
    shared_outputs = take(has_shared ? tokens * hidden * size : 0);
    const int64_t apart = at_once(routed(p), cut.many) ? 0 : pairs * routed(p).inter() * size;
    const bool shared_at_once = !has_shared || at_once(shared(p), cut.shared == SharedTile::kMany);
    const int64_t shared_apart = shared_at_once ? 0 : tokens * shared(p).inter() * size;
    gate = take(apart > shared_apart ? apart : shared_apart);
    up = take(apart > shared_apart ? apart : shared_apart);
  }

 private:
  int64_t take(int64_t bytes) {
    const int64_t at = used;
    used += round_up(bytes, 64);
    return at;
  }
};

Status launch_kernel(const char* name, const ExpertKernel& kernel, int64_t tile_count, int64_t tile_rows,
                     ExpertArguments a, const Context& context) {
  a.split = a.tiles != nullptr ? static_cast<int>(tile_rows) / kernel.tokens : 1;
  a.tile_count = a.tiles != nullptr ? tile_count * a.split : ceil_div(a.rows, kernel.tokens);
  cuda::LaunchShape shape;
  shape.blocks_x = a.tile_count * ceil_div(a.outputs, kernel.rows) * (a.second_out != nullptr ? 2 : 1);
  shape.threads = kernel.threads;
  shape.shared_bytes = kernel.shared_bytes;
  if (shape.blocks_x == 0) return Status::ok();
  return cuda::launch(name, kernel.run, shape, context, a);
}

}  // namespace

Status launch_map(const char* name, const MapArguments& a, const Context& context) {
  cuda::LaunchShape shape;
  shape.blocks_x = a.experts > 0 ? a.experts : 1;
  shape.threads = kMapThreads;
  shape.shared_bytes = kMapSharedBytes;
  return cuda::launch(name, sm80_i32_moe_map, shape, context, a);
}

Status launch_product(const char* name, const ExpertMatrix& w, int64_t tile_count, int64_t tile_rows, ExpertArguments a,
                      const Context& context) {
  a.first = weights_of(w);
  return launch_kernel(name, kernels_of(w).product[true], tile_count, tile_rows, a, context);
}

namespace {

// A run over tokens [first, first + count).
class ExpertRun {
 public:
  ExpertRun(const MoeExpertsParams& p, const ExpertCut& cut, const Context& context, int64_t first, int64_t count)
      : p_(p), cut_(cut), context_(context), first_(first), count_(count), at_(p, cut, count) {}

  Status run() const {
    Status status = prepare(false);
    if (status.is_ok()) status = prepare(true);
    if (status.is_ok()) status = map();
    if (status.is_ok() && at_.pairs > 0 && p_.w1.data.shape[0] > 0) status = expert(routed(p_), false);
    if (status.is_ok() && shared(p_).given()) status = expert(shared(p_), true);
    return status.is_ok() ? combine() : status;
  }

 private:
  template <class T = uint8_t>
  T* memory(int64_t at) const {
    return reinterpret_cast<T*>(static_cast<uint8_t*>(p_.workspace.data) + at);
  }
  bool narrow() const { return p_.x.dtype == DType::kBFloat16; }
  int64_t size() const { return size_of(p_.x.dtype); }
  AnyView<2> x() const { return p_.x.part(0, first_, count_); }

  // x for quantised weights, or for plain ones in float32.
  Status prepare(bool wide) const {
    if ((wide && narrow()) || !wants_x(p_, wide)) return Status::ok();
    void* to = memory(wide ? at_.wide : at_.quantised);
    return prepare_activations("moe_experts", with_group(x()), to, wide ? 3 : 1, !wide,
                               wide ? InputOrder::kPlain : InputOrder::kUnits, context_);
  }

  Status map() const {
    if (at_.pairs == 0) return Status::ok();
    MapArguments a = {};
    a.indices = p_.indices.part(0, first_, count_);
    a.pairs = at_.pairs;
    a.top_k = static_cast<int>(p_.weights.size(1));
    a.experts = static_cast<int>(p_.w1.data.shape[0]);
    a.rows = memory<int32_t>(at_.rows);
    a.weights = p_.weights;
    a.weights.data += first_ * p_.weights.stride[0];
    a.tokens = memory<int32_t>(at_.tokens_of);
    a.row_weights = memory<float>(at_.row_weights);
    a.places = memory<int32_t>(at_.places);
    a.tiles = memory<ExpertTile>(at_.tiles);
    a.tile_rows = static_cast<int>(at_.tile_rows);
    a.tile_count = at_.tile_count;
    a.tile_at_row = cut_.tile_at_row;
    return launch_map("moe_experts", a, context_);
  }

  // What a w1 or w3 multiplies.
  ActivationRows input(const ExpertMatrix& w, bool is_shared) const {
    ActivationRows rows = {};
    rows.inputs = p_.x.size(1);
    rows.planes = planes_of(p_, w);
    rows.map = is_shared ? nullptr : memory<int32_t>(at_.tokens_of);
    if (plain(w) && narrow()) {
      rows.data = static_cast<const uint8_t*>(x().data);
      rows.stride = count_ > 1 ? p_.x.stride[0] * 2 : 0;
      rows.bytes = rows.inputs * 2;
      rows.vector = in_eights(x());
    } else {
      rows.data = memory(plain(w) ? at_.wide : at_.quantised);
      rows.bytes = rows.plane_stride = padded_bytes(rows.inputs);
      rows.stride = rows.planes * rows.bytes;
      rows.vector = true;
    }
    return rows;
  }

  Status expert(const Expert& e, bool is_shared) const {
    ExpertArguments a = {};
    a.tiles = is_shared ? nullptr : memory<ExpertTile>(at_.tiles);
    a.rows = count_;
    a.outputs = e.inter();
    a.row_weights = is_shared ? nullptr : memory<float>(at_.row_weights);
    a.limit = p_.swiglu_limit;
    a.narrow = narrow();
    a.inner = memory(is_shared ? at_.shared_inner : at_.inner);
    a.inner_planes = planes_of(p_, *e.w2);
    a.inner_plane_stride = padded_bytes(a.outputs);
    a.inner_stride = a.inner_planes * a.inner_plane_stride;
    a.quantise = !plain(*e.w2);
    const bool many = is_shared ? cut_.shared == SharedTile::kMany : cut_.many;
    const Status gated = at_once(e, many) ? gate_up(e, is_shared, a) : gate_and_up(e, is_shared, a);
    if (!gated.is_ok()) return gated;
    a.first = weights_of(*e.w2);
    a.x = {};
    a.x.data = a.inner;
    a.x.inputs = a.outputs;
    a.x.stride = a.inner_stride;
    a.x.plane_stride = a.x.bytes = a.inner_plane_stride;
    a.x.planes = a.inner_planes;
    a.x.vector = true;
    a.outputs = p_.x.size(1);
    a.out = memory(is_shared ? at_.shared_outputs : at_.outputs);
    return launch(product_of(*e.w2, is_shared), a);
  }

  // Of w2, or of w1 and w3 apart.
  const ExpertKernel& product_of(const ExpertMatrix& w, bool is_shared) const {
    const ExpertForm& form = kernels_of(w);
    return is_shared ? form.shared[static_cast<int>(cut_.shared)] : form.product[cut_.many];
  }

  Status gate_up(const Expert& e, bool is_shared, ExpertArguments a) const {
    a.first = weights_of(*e.w1);
    a.second = weights_of(*e.w3);
    a.first.matrix.vector = a.second.matrix.vector = a.first.matrix.vector && a.second.matrix.vector;
    a.x = input(*e.w1, is_shared);
    return launch(kernels_of(*e.w1).gate_up_many, a);
  }

  // The same where w1 and w3 are not alike, or tiles are narrower than a quantiser's block.
  Status gate_and_up(const Expert& e, bool is_shared, ExpertArguments a) const {
    a.gate = memory(at_.gate);
    a.up = memory(at_.up);
    a.vector = a.outputs * size() % 16 == 0;
    const Status multiplied = alike(e) ? gate_beside_up(e, is_shared, a) : gate_then_up(e, is_shared, a);
    if (!multiplied.is_ok()) return multiplied;
    const ExpertKernel kernel = {narrow() ? sm80_bf16_moe_activate : sm80_f32_moe_activate, kBlockInputs, kActivateRows,
                                 kActivateThreads, 0};
    return launch(kernel, a);
  }

  Status gate_beside_up(const Expert& e, bool is_shared, ExpertArguments a) const {
    a.first = weights_of(*e.w1);
    a.second = weights_of(*e.w3);
    a.x = input(*e.w1, is_shared);
    a.out = memory(at_.gate);
    a.second_out = memory(at_.up);
    return launch(product_of(*e.w1, is_shared), a);
  }

  Status gate_then_up(const Expert& e, bool is_shared, ExpertArguments a) const {
    for (const ExpertMatrix* w : {e.w1, e.w3}) {
      a.first = weights_of(*w);
      a.x = input(*w, is_shared);
      a.out = memory(w == e.w1 ? at_.gate : at_.up);
      const Status status = launch(product_of(*w, is_shared), a);
      if (!status.is_ok()) return status;
    }
    return Status::ok();
  }

  Status launch(const ExpertKernel& kernel, const ExpertArguments& a) const {
    return launch_kernel("moe_experts", kernel, at_.tile_count, at_.tile_rows, a, context_);
  }

  Status combine() const {
    CombineArguments a = {};
    const int64_t elements = 16 / size();
    a.places = memory<int32_t>(at_.places);
    a.outputs = memory(at_.outputs);
    a.shared = shared(p_).given() ? memory(at_.shared_outputs) : nullptr;
    a.result_stride = p_.result.stride[0];
    a.result = static_cast<uint8_t*>(p_.result.data) + first_ * a.result_stride * size();
    a.hidden = p_.x.size(1);
    a.top_k = static_cast<int>(p_.weights.size(1));
    a.vector = in_pieces(p_.result);
    cuda::LaunchShape shape;
    shape.blocks_x = count_;
    shape.blocks_y = ceil_div(a.hidden, kCombineThreads * elements);
    shape.threads = kCombineThreads;
    if (shape.blocks_y == 0) return Status::ok();
    return cuda::launch("moe_experts", narrow() ? sm80_bf16_moe_combine : sm80_f32_moe_combine, shape, context_, a);
  }

  const MoeExpertsParams& p_;
  const ExpertCut& cut_;
  const Context& context_;
  int64_t first_, count_;
  Layout at_;
};

// Large tiles where there are enough of them to occupy a GPU.
SharedTile shared_tile(const MoeExpertsParams& p, int64_t tokens) {
  constexpr int64_t kEnough = 64;
  if (!shared(p).given() || tokens <= kTilesRows[0]) return SharedTile::kFew;
  const int64_t large = ceil_div(tokens, kTilesRows[1]) * ceil_div(shared(p).inter(), kBlockInputs);
  return large < kEnough ? SharedTile::kSome : SharedTile::kMany;
}

}  // namespace

ExpertCut expert_cut(const MoeExpertsParams& p) {
  const int64_t tokens = p.x.size(0) < kTokensAtOnce ? p.x.size(0) : kTokensAtOnce;
  const int64_t pairs = tokens * p.weights.size(1), experts = p.w1.data.shape[0];
  ExpertCut cut = {tokens, pairs > kTilesRows[0] * experts, shared_tile(p, tokens), false};
  cut.tile_at_row = pairs <= pairs / kTilesRows[cut.many] + experts;
  return cut;
}

ExpertResults expert_results(const MoeExpertsParams& p, const ExpertCut& cut) {
  const int64_t tokens = p.x.size(0), last = tokens == 0 ? 0 : (tokens - 1) % cut.tokens + 1;
  const Layout at(p, cut, last);
  return {at.inner, at.shared_inner, at.outputs, at.shared_outputs};
}

int64_t moe_experts_workspace_bytes(const MoeExpertsParams& p, const ExpertCut& cut) {
  return Layout(p, cut, cut.tokens).used;
}

Status moe_experts(const MoeExpertsParams& p, const ExpertCut& cut, const Context& context) {
  const int64_t needed = moe_experts_workspace_bytes(p, cut), tokens = p.x.size(0);
  if (p.workspace.bytes < needed) {
    return Status::error("moe_experts: workspace has %lld bytes, needs %lld", static_cast<long long>(p.workspace.bytes),
                         static_cast<long long>(needed));
  }
  for (int64_t first = 0; first < tokens; first += cut.tokens) {
    const int64_t left = tokens - first;
    const Status status = ExpertRun(p, cut, context, first, left < cut.tokens ? left : cut.tokens).run();
    if (!status.is_ok()) return status;
  }
  return Status::ok();
}

int64_t moe_experts_workspace_bytes(const MoeExpertsParams& p, const Context&) {
  return sm80::moe_experts_workspace_bytes(p, expert_cut(p));
}
Status moe_experts(const MoeExpertsParams& p, const Context& context) {
  return sm80::moe_experts(p, expert_cut(p), context);
}

Status moe_map(const MoeMapParams& p, const Context& context) {
  MapArguments a = {};
  a.indices = p.indices;
  a.pairs = p.indices.size(0) * p.indices.size(1);
  a.top_k = static_cast<int>(p.indices.size(1));
  a.experts = static_cast<int>(p.experts);
  a.offsets = static_cast<int32_t*>(p.offsets.data);
  a.rows = static_cast<int32_t*>(p.rows.data);
  return launch_map("moe_map", a, context);
}

}  // namespace dsv4::sm80
