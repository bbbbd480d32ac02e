// The mixture of experts with vdpbf16ps (avx512/plain_rows.h for plain weights). Up to 16 tokens an expert: weights go
// from their codes through registers into the products (avx512/code_tiles.h), so that memory is the limit: 53 % of a
// byte a weight in FP4, 2 FLOPs a token. More: 128 rows of weights are expanded into the second-level cache, 1,024
// inputs at a time (avx512/weight_panel.h); the limit is the rate of vdpbf16ps.
#include "cpu/moe.h"

#include "cpu/avx512/gate_scores.h"
#include "cpu/avx512/moe_product.h"
#include "cpu/moe_gate.h"

namespace dsv4::avx512 {
namespace {

constexpr int64_t kGateRows = 32;  // rows of the gate's weights widened at a time
template <class X>
using Experts = RowExperts<MoeKernel, X>;

struct Gate {
  static constexpr int64_t kTokens = 16;
  static void scores(float* z, int64_t count) { gate_scores(z, count); }
  static int64_t memory(const MoeGateParams& p) {
    const int64_t row = p.x.size(1) * static_cast<int64_t>(sizeof(float));
    return p.x.dtype == p.weight.dtype ? 0 : (kGateRows > kTokens ? kGateRows : kTokens) * row;
  }

  // Rows of bfloat16 as float32, one after another.
  static void widen(const View<const bf16, 2>& from, int64_t first, int64_t count, float* to) {
    const int64_t width = from.size(1);
    for (int64_t i = 0; i < count; ++i, to += width) {
      for (int64_t d = 0; d < width; d += kStep) {
        const int64_t left = width - d < kStep ? width - d : kStep;
        store(to + d, natural(load(from.at(first + i, d), left), static_cast<const bf16*>(nullptr)), left);
      }
    }
  }

  template <class T>
  static void product(const MoeGateParams& p, int64_t count, float* z, const T* x, int64_t stride, float* memory) {
    const int64_t experts = p.weight.size(0), hidden = p.x.size(1);
    for (int64_t e = 0; e < experts; e += kGateRows) {
      const int64_t rows = experts - e < kGateRows ? experts - e : kGateRows;
      const T* w = static_cast<const T*>(p.weight.data) + e * p.weight.stride[0];
      int64_t w_stride = p.weight.stride[0];
      if constexpr (sizeof(T) == sizeof(float)) {
        if (p.weight.dtype == DType::kBFloat16) {
          widen(p.weight.as<const bf16>(), e, rows, memory);
          w = memory;
          w_stride = hidden;
        }
      }
      plain_product(x, stride, count, w, w_stride, rows, hidden, z + e, experts);
    }
  }

  static void logits(const MoeGateParams& p, int64_t first, int64_t count, float* z, uint8_t* memory_) {
    float* memory = reinterpret_cast<float*>(memory_);
    const bool narrow = p.x.dtype == DType::kBFloat16;
    if (narrow && p.weight.dtype == DType::kBFloat16) {
      product(p, count, z, p.x.as<const bf16>().at(first), p.x.stride[0], memory);
    } else if (narrow) {
      widen(p.x.as<const bf16>(), first, count, memory);
      product(p, count, z, static_cast<const float*>(memory), p.x.size(1), memory);
    } else {
      product(p, count, z, p.x.as<const float>().at(first), p.x.stride[0], memory);
    }
  }
};

}  // namespace

int64_t moe_gate_workspace_bytes(const MoeGateParams& p, const Context& c) { return GateCall<Gate>(p, c).bytes(); }
Status moe_gate(const MoeGateParams& p, const Context& c) { return GateCall<Gate>(p, c).run(); }

int64_t moe_experts_workspace_bytes(const MoeExpertsParams& p, const Context& c) { return moe_bytes<Experts>(p, c); }
Status moe_experts(const MoeExpertsParams& p, const Context& c) { return moe_run<Experts>(p, c); }

}  // namespace dsv4::avx512
