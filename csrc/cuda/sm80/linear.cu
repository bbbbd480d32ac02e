// Linear layers: a kernel that prepares the activations where they need it (activations.h), and the product on tiles of
// weight_tile.h, whose sums go straight from registers to the output.
//
// Few tokens read the weights once: 16 rows a block, K dealt out to four warps, two of three stages of 512 inputs in
// flight (of float32 weights one of two), up to three blocks an SM; bound by the bandwidth of the weights' bytes (1 or
// 0.53 a weight). Many: 128 x 128, 85 FLOP a byte from L2 with FP8 weights; bound by the tensor cores, and on the
// newest GPUs by the instructions that expand codes.
#include "cuda/common/launch.h"
#include "cuda/sm80/linear.h"
#include "cuda/sm80/weight_tile.h"

namespace dsv4::sm80 {

struct LinearArguments {
  WeightMatrix weights;
  ActivationRows x;
  int64_t group_stride;  // of x, bytes
  AnyView<3> out;
  int64_t outputs;  // of a group
  int64_t row_tiles, token_tiles;
};

namespace {

template <WeightForm kForm>
inline constexpr bool kIsWide = kForm == WeightForm::kFloat32;
template <WeightForm kForm>
using FewTile = TileShape<kForm, 1, 1, 1, 1, 4, kIsWide<kForm> ? 2 : 3>;
template <WeightForm kForm>
using SomeTile = TileShape<kForm, 1, kIsWide<kForm> ? 2 : 4, 2, 1, 2, kIsPlain<kForm> ? 2 : 3>;
template <WeightForm kForm>
using ManyTile = TileShape<kForm, kIsWide<kForm> ? 1 : 2,
                           kForm == WeightForm::kFp8 || kForm == WeightForm::kFp4 ? 8 : 4, 4, 2, 1, 2>;

// Grid: groups, then tiles of tokens, then tiles of rows, the last fastest.
template <class Shape>
DSV4_DEVICE void linear(const LinearArguments& a) {
  const int64_t tile = ptx::block_index_x() / a.row_tiles;
  const int64_t group = tile / a.token_tiles, first_token = tile % a.token_tiles * Shape::kTokens;
  const int64_t first = ptx::block_index_x() % a.row_tiles * Shape::kRows;
  const int64_t left = a.outputs - first;
  const int count = left < Shape::kRows ? static_cast<int>(left) : Shape::kRows;
  const WeightRows weights = {a.weights, group * a.outputs + first, count};
  ActivationRows x = a.x;
  x.data += group * a.group_stride;
  x.map = nullptr;  // so that the compiler knows
  x = x.from(first_token);
  WeightTile<Shape> product;
  product.run(weights, x);
  const AnyView<3>& out = a.out;
  product.each([&](int row, int token, float value) {
    if (row >= weights.count || token >= x.count) return;
    const int64_t at = (first_token + token) * out.stride[0] + group * out.stride[1] + first + row;
    if (out.dtype == DType::kBFloat16) {
      static_cast<bf16*>(out.data)[at] = bf16{static_cast<uint16_t>(ptx::pack_bf16(value, 0.0f))};
    } else {
      static_cast<float*>(out.data)[at] = value;
    }
  });
}

}  // namespace

#define DSV4_LINEAR_KERNELS(name, form)                                                       \
  DSV4_KERNEL(FewTile<form>::kThreads, 3) sm80_##name##_linear_few(const LinearArguments a) { \
    linear<FewTile<form>>(a);                                                                 \
  }                                                                                           \
  DSV4_KERNEL(SomeTile<form>::kThreads, 2)                                                    \
  sm80_##name##_linear_some(const LinearArguments a) { linear<SomeTile<form>>(a); }           \
  DSV4_KERNEL(ManyTile<form>::kThreads, 1)                                                    \
  sm80_##name##_linear_many(const LinearArguments a) { linear<ManyTile<form>>(a); }

DSV4_LINEAR_KERNELS(fp8, WeightForm::kFp8)
DSV4_LINEAR_KERNELS(fp4, WeightForm::kFp4)
DSV4_LINEAR_KERNELS(fp4_wide, WeightForm::kFp4Wide)
DSV4_LINEAR_KERNELS(bf16, WeightForm::kBFloat16)
DSV4_LINEAR_KERNELS(f32, WeightForm::kFloat32)

namespace {

struct TileSize {
  int rows, tokens, threads, shared_bytes;
};

template <class Shape>
constexpr TileSize size_of() {
  static_assert(Shape::kSharedBytes <= cuda::kMaxSharedBytes);
  return {Shape::kRows, Shape::kTokens, Shape::kThreads, Shape::kSharedBytes};
}

// The kernels of a form of weights, by LinearTile.
struct LinearForm {
  void (*kernel[3])(LinearArguments);
  TileSize size[3];
};

#define DSV4_LINEAR_FORM(name, form)                                                    \
  {                                                                                     \
    {sm80_##name##_linear_few, sm80_##name##_linear_some, sm80_##name##_linear_many}, { \
      size_of<FewTile<form>>(), size_of<SomeTile<form>>(), size_of<ManyTile<form>>()    \
    }                                                                                   \
  }

constexpr LinearForm kFp8 = DSV4_LINEAR_FORM(fp8, WeightForm::kFp8);
constexpr LinearForm kFp4 = DSV4_LINEAR_FORM(fp4, WeightForm::kFp4);
constexpr LinearForm kFp4Wide = DSV4_LINEAR_FORM(fp4_wide, WeightForm::kFp4Wide);
constexpr LinearForm kBFloat16 = DSV4_LINEAR_FORM(bf16, WeightForm::kBFloat16);
constexpr LinearForm kFloat32 = DSV4_LINEAR_FORM(f32, WeightForm::kFloat32);

// A product, whatever the op: x [T, G, K], out [T, G, N].
struct Product {
  const char* name;
  AnyView<3> x, out;
  WeightMatrix weights;
  Workspace workspace;
  int64_t outputs;       // N
  bool quantise, plain;  // activations; weights

  int planes() const { return !quantise && x.dtype == DType::kFloat32 ? 3 : 1; }
  bool in_place() const { return plain && x.dtype == DType::kBFloat16; }
  int64_t row_bytes() const { return planes() * ceil_div(x.size(2), kBlockInputs) * 256; }
  int64_t workspace_bytes() const { return in_place() ? 0 : x.size(0) * x.size(1) * row_bytes(); }
};

// A row of `bytes` bytes.
WeightMatrix matrix_of(const AnyView<2>& weight, int64_t bytes) {
  WeightMatrix w = {};
  w.data = static_cast<const uint8_t*>(weight.data);
  w.stride = weight.stride[0] * (weight.shape[1] > 0 ? bytes / weight.shape[1] : 1);
  w.bytes = bytes;
  w.vector = aligned(w.data) && w.stride % 16 == 0 && w.bytes % 16 == 0;
  return w;
}

Product product_of(const char* name, const LinearParams& p, bool quantise) {
  Product product = {name, p.x, p.out, matrix_of(p.weight, p.weight.size(1)), p.workspace, 0, quantise, false};
  product.weights.scales = p.scale.data;
  product.weights.scale_stride = p.scale.stride[0];
  product.weights.scales_of_a_row = p.scale.size(1);
  product.weights.wide_scales = p.scale.dtype == DType::kFloat32;
  product.outputs = p.weight.size(0) / p.x.size(1);
  return product;
}

Product product_of(const DenseLinearParams& p) {
  const int64_t bytes = p.weight.size(1) * size_of(p.weight.dtype);
  return {"dense_linear",
          with_group(p.x),
          with_group(p.out),
          matrix_of(p.weight, bytes),
          p.workspace,
          p.weight.size(0),
          false,
          true};
}

ActivationRows rows_of(const Product& p) {
  ActivationRows x = {};
  x.planes = p.planes();
  if (p.in_place()) {
    x.data = static_cast<const uint8_t*>(p.x.data);
    x.stride = p.x.size(0) > 1 ? p.x.stride[0] * 2 : 0;
    x.bytes = p.x.size(2) * 2;
    x.vector = in_eights(p.x);
  } else {
    x.data = static_cast<const uint8_t*>(p.workspace.data);
    x.stride = p.x.size(1) * p.row_bytes();
    x.plane_stride = x.bytes = p.row_bytes() / x.planes;
    x.vector = true;
  }
  x.inputs = p.x.size(2);
  x.count = p.x.size(0);
  return x;
}

Status run(const Product& p, const Context& context, const LinearForm& form, LinearTile tile) {
  const int64_t tokens = p.x.size(0), groups = p.x.size(1);
  if (tokens == 0 || p.outputs == 0) return Status::ok();
  if (p.workspace.bytes < p.workspace_bytes()) {
    return Status::error("%s: workspace has %lld bytes, needs %lld", p.name, static_cast<long long>(p.workspace.bytes),
                         static_cast<long long>(p.workspace_bytes()));
  }
  const Status prepared =
      p.in_place() ? Status::ok()
                   : prepare_activations(p.name, p.x, p.workspace.data, p.planes(), p.quantise, !p.plain, context);
  if (!prepared.is_ok()) return prepared;
  const TileSize& size = form.size[static_cast<int>(tile)];
  LinearArguments a = {};
  a.weights = p.weights;
  a.x = rows_of(p);
  a.group_stride = p.row_bytes();
  a.out = p.out;
  a.outputs = p.outputs;
  a.row_tiles = ceil_div(a.outputs, size.rows);
  a.token_tiles = ceil_div(tokens, size.tokens);
  cuda::LaunchShape shape;
  shape.blocks_x = a.row_tiles * a.token_tiles * groups;
  shape.threads = size.threads;
  shape.shared_bytes = size.shared_bytes;
  return cuda::launch(p.name, form.kernel[static_cast<int>(tile)], shape, context, a);
}

// Large tiles where there are enough of them to occupy a GPU.
LinearTile tile_for(int64_t tokens, int64_t groups, int64_t outputs) {
  constexpr int64_t kEnough = 64;
  if (tokens <= FewTile<WeightForm::kFp8>::kTokens) return LinearTile::kFew;
  const int64_t large = groups * ceil_div(outputs, 128) * ceil_div(tokens, 128);
  return tokens > 32 && large >= kEnough ? LinearTile::kMany : LinearTile::kSome;
}
LinearTile tile_for(const LinearParams& p) {
  return tile_for(p.x.size(0), p.x.size(1), p.weight.size(0) / p.x.size(1));
}

}  // namespace

int64_t quantised_linear_workspace_bytes(const LinearParams& p, const Context&) {
  return product_of("", p, true).workspace_bytes();
}
int64_t grouped_linear_workspace_bytes(const LinearParams& p, const Context&) {
  return product_of("", p, false).workspace_bytes();
}
int64_t dense_linear_workspace_bytes(const DenseLinearParams& p, const Context&) {
  return product_of(p).workspace_bytes();
}

Status fp8_linear(const LinearParams& p, const Context& c, LinearTile tile) {
  return run(product_of("fp8_linear", p, true), c, kFp8, tile);
}
Status fp4_linear(const LinearParams& p, const Context& c, LinearTile tile) {
  return run(product_of("fp4_linear", p, true), c, p.scale.dtype == DType::kFloat32 ? kFp4Wide : kFp4, tile);
}
Status grouped_linear(const LinearParams& p, const Context& c, LinearTile tile) {
  return run(product_of("grouped_linear", p, false), c, kFp8, tile);
}
Status dense_linear(const DenseLinearParams& p, const Context& c, LinearTile tile) {
  return run(product_of(p), c, p.weight.dtype == DType::kBFloat16 ? kBFloat16 : kFloat32, tile);
}

Status fp8_linear(const LinearParams& p, const Context& c) { return fp8_linear(p, c, tile_for(p)); }
Status fp4_linear(const LinearParams& p, const Context& c) { return fp4_linear(p, c, tile_for(p)); }
Status grouped_linear(const LinearParams& p, const Context& c) { return grouped_linear(p, c, tile_for(p)); }
Status dense_linear(const DenseLinearParams& p, const Context& c) {
  return dense_linear(p, c, tile_for(p.x.size(0), 1, p.weight.size(0)));
}

}  // namespace dsv4::sm80
