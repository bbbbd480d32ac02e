// The mixture of experts with AVX2 and FMA: weights and activations as float32, multiplied by cpu/avx2/product.h.
#include "cpu/moe.h"

#include "cpu/avx2/product.h"
#include "cpu/moe_gate.h"
#include "cpu/scalar/quantised.h"

namespace dsv4::avx2 {
namespace {

// What the driver of the experts (cpu/moe_driver.h) asks of a kernel.
struct ExpertKernel {
  template <class X>
  static int64_t row_bytes(WeightFormat, int64_t n) {
    return round_up(n, kLanes) * static_cast<int64_t>(sizeof(float));
  }

  template <class X>
  static void prepare(WeightFormat format, const X* x, int64_t n, uint8_t* to_) {
    float* to = reinterpret_cast<float*>(to_);
    if (format == WeightFormat::kPlain) return widen(x, n, to);
    scalar::quantise(x, n, to);
    for (int64_t i = n; i % kLanes != 0; ++i) to[i] = 0;
  }

  static int64_t memory(int64_t) { return kPanelBytes; }

  template <class X>
  static void expand(const ExpertMatrix& w, int64_t expert, int64_t row, int64_t first, int64_t count, float* to) {
    if (w.format == WeightFormat::kPlain) return widen(w.data.as<const X>().at(expert, row, first), count, to);
    const uint8_t* codes = w.data.as<const uint8_t>().at(expert, row);
    const int64_t scale_row = w.format == WeightFormat::kFp4 ? row : row / 128;
    const auto scale = [&](int64_t block) {
      return w.scale.dtype == DType::kFloat32 ? *w.scale.as<const float>().at(expert, scale_row, block)
                                              : e8m0_value(*w.scale.as<const uint8_t>().at(expert, scale_row, block));
    };
    if (w.format == WeightFormat::kFp4) {
      expand_codes<true>(codes, first, count, scale, to);
    } else {
      expand_codes<false>(codes, first, count, scale, to);
    }
  }

  template <class X>
  static void project(const ExpertMatrix& w, int64_t expert, int64_t row, int64_t rows, int64_t in,
                      const uint8_t* const* x, int64_t count, float* out, uint8_t* memory) {
    product([&](int64_t r, int64_t first, int64_t n, float* to) { expand<X>(w, expert, row + r, first, n, to); }, rows,
            in, reinterpret_cast<float*>(memory), [&](int64_t c) { return reinterpret_cast<const float*>(x[c]); },
            count, [&](int64_t c) { return out + c * kMoeOutputs; });
  }

  template <class X>
  static void activate(const float* gate, const float* up, float weight, float limit, int64_t n, X* out) {
    const X* type = nullptr;
    const __m256 most = _mm256_set1_ps(limit), least = _mm256_set1_ps(-limit);
    for (int64_t i = 0; i < n; i += kLanes) {
      const int64_t left = n - i;
      __m256 g = rounded(left < kLanes ? load(gate + i, left) : load(gate + i), type);
      __m256 u = rounded(left < kLanes ? load(up + i, left) : load(up + i), type);
      if (limit > 0) {  // the second operand comes through where it is NaN
        g = _mm256_min_ps(most, g);
        u = _mm256_max_ps(least, _mm256_min_ps(most, u));
      }
      const __m256 value = _mm256_mul_ps(_mm256_mul_ps(_mm256_mul_ps(g, sigmoid(g)), u), _mm256_set1_ps(weight));
      left < kLanes ? store(out + i, value, left) : store(out + i, value);
    }
  }
};

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

  static void row(const AnyView<2>& matrix, int64_t row, int64_t first, int64_t count, float* to) {
    if (matrix.dtype == DType::kBFloat16) {
      widen(matrix.as<const bf16>().at(row, first), count, to);
    } else {
      widen(matrix.as<const float>().at(row, first), count, to);
    }
  }

  static void logits(const MoeGateParams& p, int64_t first, int64_t count, float* z, uint8_t* memory) {
    const int64_t experts = p.weight.size(0), hidden = p.x.size(1);
    float *panel = reinterpret_cast<float*>(memory), *x = panel + kPanelRows * kPanelInputs;
    for (int64_t i = 0; i < count; ++i) row(p.x, first + i, 0, hidden, x + i * stride(p));
    for (int64_t e = 0; e < experts; e += kPanelRows) {
      const int64_t rows = experts - e < kPanelRows ? experts - e : kPanelRows;
      float sums[kTokens][kPanelRows];
      product([&](int64_t r, int64_t from, int64_t n, float* to) { row(p.weight, e + r, from, n, to); }, rows, hidden,
              panel, [&](int64_t i) { return x + i * stride(p); }, count, [&](int64_t i) { return sums[i]; });
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
