// Linear layers of quantised weights for many tokens, on tiles of group_tile.h: 128 x 128 a block, one block an SM,
// three stages of four in flight. Fewer tokens, and what has no kernel here, go to the kernels of sm_80.
#include "cuda/sm80/linear.h"
#include "cuda/sm80/linear_launch.h"
#include "cuda/sm90/group_tile.h"
#include "cuda/sm90/linear.h"

namespace dsv4::sm90 {

namespace {

using Fp8Shape = GroupShape<WeightForm::kFp8, 4>;
using Fp4Shape = GroupShape<WeightForm::kFp4, 4>;

}  // namespace

DSV4_KERNEL(Fp8Shape::kThreads, 1) sm90_fp8_linear_many(const LinearArguments a) {
  linear_tile<GroupTile<Fp8Shape>>(a);
}
DSV4_KERNEL(Fp4Shape::kThreads, 1) sm90_fp4_linear_many(const LinearArguments a) {
  linear_tile<GroupTile<Fp4Shape>>(a);
}

namespace {

template <class Shape>
constexpr LinearKernel kernel_of(void (*run)(LinearArguments)) {
  static_assert(Shape::kSharedBytes <= cuda::kMaxSharedBytesOfHopper);
  return {run, Shape::kRows, Shape::kTokens, Shape::kThreads, Shape::kSharedBytes};
}
constexpr LinearKernel kFp8 = kernel_of<Fp8Shape>(sm90_fp8_linear_many);
constexpr LinearKernel kFp4 = kernel_of<Fp4Shape>(sm90_fp4_linear_many);

// Enough tiles to occupy a GPU.
bool many(const LinearParams& p) {
  const int64_t tokens = p.x.size(0), groups = p.x.size(1);
  const int64_t tiles =
      groups * ceil_div(p.weight.size(0) / groups, Fp8Shape::kRows) * ceil_div(tokens, Fp8Shape::kTokens);
  return tokens > 32 && tiles >= 64;
}

}  // namespace

Status fp8_linear_many(const LinearParams& p, const Context& c) {
  return run(product_of("fp8_linear", p, true), c, kFp8, InputOrder::kSteps);
}
Status fp4_linear_many(const LinearParams& p, const Context& c) {
  return run(product_of("fp4_linear", p, true), c, kFp4, InputOrder::kSteps);
}
Status grouped_linear_many(const LinearParams& p, const Context& c) {
  return run(product_of("grouped_linear", p, false), c, kFp8, InputOrder::kSteps);
}

Status fp8_linear(const LinearParams& p, const Context& c) {
  return many(p) ? fp8_linear_many(p, c) : sm80::fp8_linear(p, c);
}
Status fp4_linear(const LinearParams& p, const Context& c) {
  return many(p) ? fp4_linear_many(p, c) : sm80::fp4_linear(p, c);
}
Status grouped_linear(const LinearParams& p, const Context& c) {
  return many(p) ? grouped_linear_many(p, c) : sm80::grouped_linear(p, c);
}

}  // namespace dsv4::sm90
