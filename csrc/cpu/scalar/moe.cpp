// The mixture of experts, portable: sums in double precision, rounded once, as the definition has them. Also the
// yardstick for the other kernels. A row of weights is expanded once for a group of activation rows.
#include "cpu/moe.h"

#include "cpu/moe_gate.h"
#include "cpu/scalar/moe_product.h"

namespace dsv4::scalar {
namespace {

template <class X>
using Experts = RowExperts<ExpertKernel, X>;

struct Gate {
  static constexpr int64_t kTokens = 16;
  static int64_t memory(const MoeGateParams&) { return 0; }
  static void scores(float* z, int64_t count) {
    for (int64_t i = 0; i < count; ++i) z[i] = sqrt_softplus(z[i]);
  }

  template <class X, class W>
  static void product(const MoeGateParams& p, int64_t first, int64_t count, float* z) {
    const int64_t experts = p.weight.size(0), hidden = p.x.size(1);
    for (int64_t i = 0; i < count; ++i) {
      const X* x = p.x.as<const X>().at(first + i);
      for (int64_t e = 0; e < experts; ++e) {
        const W* w = p.weight.as<const W>().at(e);
        double sum = 0;
        for (int64_t d = 0; d < hidden; ++d) sum += static_cast<double>(to_float(x[d])) * to_float(w[d]);
        z[i * experts + e] = static_cast<float>(sum);
      }
    }
  }

  static void logits(const MoeGateParams& p, int64_t first, int64_t count, float* z, uint8_t*) {
    const bool narrow = p.x.dtype == DType::kBFloat16;
    if (p.weight.dtype == DType::kBFloat16) {
      narrow ? product<bf16, bf16>(p, first, count, z) : product<float, bf16>(p, first, count, z);
    } else {
      narrow ? product<bf16, float>(p, first, count, z) : product<float, float>(p, first, count, z);
    }
  }
};

}  // namespace

int64_t moe_gate_workspace_bytes(const MoeGateParams& p, const Context& c) { return GateCall<Gate>(p, c).bytes(); }
Status moe_gate(const MoeGateParams& p, const Context& c) { return GateCall<Gate>(p, c).run(); }

int64_t moe_experts_workspace_bytes(const MoeExpertsParams& p, const Context& c) { return moe_bytes<Experts>(p, c); }
Status moe_experts(const MoeExpertsParams& p, const Context& c) { return moe_run<Experts>(p, c); }

Status moe_map(const MoeMapParams& p, const Context&) {
  int32_t *offsets = static_cast<int32_t*>(p.offsets.data), *rows = static_cast<int32_t*>(p.rows.data);
  moe_sort<int32_t>(p.indices, 0, p.indices.size(0), p.experts, offsets, rows, nullptr);
  for (int64_t i = offsets[p.experts]; i < p.rows.size(0); ++i) rows[i] = -1;
  return Status::ok();
}

}  // namespace dsv4::scalar
