// Linear layers: a kernel that prepares the activations where they need it (activations.h), and the product on tiles of
// weight_tile.h, whose sums go straight from registers to the output.
//
// Few tokens read the weights once: 16 rows a block, K dealt out to four warps, two of three stages of 512 inputs in
// flight (of float32 weights one of two), up to three blocks an SM; bound by the bandwidth of the weights' bytes (1 or
// 0.53 a weight). Many: 128 x 128, 85 FLOP a byte from L2 with FP8 weights; bound by the tensor cores, and on the
// newest GPUs by the instructions that expand codes.
#include "cuda/sm80/linear.h"
#include "cuda/sm80/linear_launch.h"
#include "cuda/sm80/weight_tile.h"

namespace dsv4::sm80 {

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

}  // namespace

#define DSV4_LINEAR_KERNELS(name, form)                                                              \
  DSV4_KERNEL(FewTile<form>::kThreads, 3) sm80_##name##_linear_few(const LinearArguments a) {        \
    linear_tile<WeightTile<FewTile<form>>>(a);                                                       \
  }                                                                                                  \
  DSV4_KERNEL(SomeTile<form>::kThreads, 2)                                                           \
  sm80_##name##_linear_some(const LinearArguments a) { linear_tile<WeightTile<SomeTile<form>>>(a); } \
  DSV4_KERNEL(ManyTile<form>::kThreads, 1)                                                           \
  sm80_##name##_linear_many(const LinearArguments a) { linear_tile<WeightTile<ManyTile<form>>>(a); }

DSV4_LINEAR_KERNELS(fp8, WeightForm::kFp8)
DSV4_LINEAR_KERNELS(fp4, WeightForm::kFp4)
DSV4_LINEAR_KERNELS(fp4_wide, WeightForm::kFp4Wide)
DSV4_LINEAR_KERNELS(bf16, WeightForm::kBFloat16)
DSV4_LINEAR_KERNELS(f32, WeightForm::kFloat32)

namespace {

// The kernels of a form of weights, by LinearTile.
struct LinearForm {
  LinearKernel of[3];
};

template <class Shape>
constexpr LinearKernel kernel_of(void (*run)(LinearArguments)) {
  static_assert(Shape::kSharedBytes <= cuda::kMaxSharedBytes);
  return {run, Shape::kRows, Shape::kTokens, Shape::kThreads, Shape::kSharedBytes};
}

#define DSV4_LINEAR_FORM(name, form)                                                                            \
  {                                                                                                             \
    {                                                                                                           \
      kernel_of<FewTile<form>>(sm80_##name##_linear_few), kernel_of<SomeTile<form>>(sm80_##name##_linear_some), \
          kernel_of<ManyTile<form>>(sm80_##name##_linear_many)                                                  \
    }                                                                                                           \
  }

constexpr LinearForm kFp8 = DSV4_LINEAR_FORM(fp8, WeightForm::kFp8);
constexpr LinearForm kFp4 = DSV4_LINEAR_FORM(fp4, WeightForm::kFp4);
constexpr LinearForm kFp4Wide = DSV4_LINEAR_FORM(fp4_wide, WeightForm::kFp4Wide);
constexpr LinearForm kBFloat16 = DSV4_LINEAR_FORM(bf16, WeightForm::kBFloat16);
constexpr LinearForm kFloat32 = DSV4_LINEAR_FORM(f32, WeightForm::kFloat32);

Status run(const LinearProduct& p, const Context& context, const LinearForm& form, LinearTile tile) {
  const InputOrder order = p.plain ? InputOrder::kPlain : InputOrder::kUnits;
  return run(p, context, form.of[static_cast<int>(tile)], order);
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
