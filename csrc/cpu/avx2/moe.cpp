// The mixture of experts with AVX2 and FMA: weights and activations as float32, multiplied by cpu/avx2/product.h.
#include "cpu/moe.h"

#include "cpu/avx2/moe_product.h"
#include "cpu/moe_gate.h"

namespace dsv4::avx2 {
namespace {

template <class X>
using Experts = RowExperts<ExpertKernel, X>;

struct Gate {
  static constexpr int64_t kTokens = 16;
  static int64_t stride(const MoeGateParams& p) { return round_up(p.x.size(1), kLanes); }
  static int64_t memory(const MoeGateParams& p) {
    return kPanelBytes + kTokens * stride(p) * static_cast<int64_t>(sizeof(float));
  }
  static void scores(float* z, int64_t count) {
    for (int64_t i = 0; i < count; ++i) z[i] = sqrt_softplus(z[i]);
  }

  static void logits(const MoeGateParams& p, int64_t first, int64_t count, float* z, uint8_t* memory) {
    const int64_t experts = p.weight.size(0), hidden = p.x.size(1);
    float *panel = reinterpret_cast<float*>(memory), *x = panel + kPanelFloats;
    for (int64_t i = 0; i < count; ++i) widen_row(p.x, first + i, 0, hidden, x + i * stride(p));
    for (int64_t e = 0; e < experts; e += kPanelRows) {
      const int64_t rows = experts - e < kPanelRows ? experts - e : kPanelRows;
      float sums[kTokens][kPanelRows];
      product([&](int64_t r, int64_t from, int64_t n, float* to) { widen_row(p.weight, e + r, from, n, to); }, rows,
              hidden, panel, [&](int64_t i) { return x + i * stride(p); }, count, [&](int64_t i) { return sums[i]; });
      for (int64_t i = 0; i < count; ++i)
        memcpy(z + i * experts + e, sums[i], static_cast<size_t>(rows) * sizeof(float));
    }
  }
};

}  // namespace

int64_t moe_gate_workspace_bytes(const MoeGateParams& p, const Context& c) { return GateCall<Gate>(p, c).bytes(); }
Status moe_gate(const MoeGateParams& p, const Context& c) { return GateCall<Gate>(p, c).run(); }

int64_t moe_experts_workspace_bytes(const MoeExpertsParams& p, const Context& c) { return moe_bytes<Experts>(p, c); }
Status moe_experts(const MoeExpertsParams& p, const Context& c) { return moe_run<Experts>(p, c); }

}  // namespace dsv4::avx2
