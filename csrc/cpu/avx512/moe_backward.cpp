// Gradients of plain experts. gate and up are the forward pass's own products (avx512/plain_rows.h), so that both
// passes clamp alike; the other six products of a row, of which weights or rows are read across, are those of
// avx512/outer_product.h. 16 hidden inter FLOPs a row of an expert. Many rows: the limit is the rate of vdpbf16ps or
// FMA. Few: reading each weight and writing its gradient once, 4 bytes in bfloat16 and 8 in float32.
#include "cpu/avx512/expert_gradient.h"
#include "cpu/avx512/moe_product.h"
#include "cpu/avx512/outer_product.h"

namespace dsv4::avx512 {
namespace {

struct Kernel : MoeSingly<MoeKernel>, OuterProduct {
  static int64_t product_memory(int64_t inputs) {
    const int64_t forward = memory(inputs), others = outer_memory();
    return forward > others ? forward : others;
  }

  template <class X>
  static float activate_backward(const float* gate, const float* up, const float* grad, float weight, float limit,
                                 int64_t n, const MoeInner<X>& to) {
    return avx512::activate_backward(gate, up, grad, weight, limit, n, to);
  }
};

}  // namespace

int64_t moe_experts_backward_workspace_bytes(const MoeExpertsBackwardParams& p, const Context& c) {
  return moe_backward_bytes<Kernel>(p, c);
}
Status moe_experts_backward(const MoeExpertsBackwardParams& p, const Context& c) {
  return moe_backward_run<Kernel>(p, c);
}

}  // namespace dsv4::avx512
