// Gradients of plain experts with AVX2 and FMA. gate and up are the forward pass's own products (avx2/product.h), so
// that both passes clamp alike; the others, of which weights or rows are read across, are tiles of avx2/outer.h.
#include "cpu/avx2/moe_product.h"
#include "cpu/avx2/outer.h"
#include "cpu/scalar/expert_gradient.h"

namespace dsv4::avx2 {
namespace {

constexpr int64_t kSteps = 64;  // of a product whose operands are widened together

struct Kernel : MoeSingly<ExpertKernel> {
  static constexpr int64_t kWidth = kOutputs;  // of rows in scratch memory
  static constexpr int64_t kPanel = kSteps * kWidth;

  // Steps of a and of b, and the sums of kOutputs rows.
  static int64_t product_memory(int64_t) {
    const int64_t outer = (2 * kPanel + kWidth * kWidth) * static_cast<int64_t>(sizeof(float));
    return outer > kPanelBytes ? outer : kPanelBytes;
  }

  template <class X>
  static void accumulate(const MoeRows<const X>& a, int64_t count, int64_t inputs, const X* b, int64_t b_stride,
                         int64_t n, bool first, const MoeRows<float>& c, uint8_t* memory) {
    float *columns = reinterpret_cast<float*>(memory), *rows = columns + kPanel;
    for (int64_t step = 0; step == 0 || step < inputs; step += kSteps) {
      const int64_t steps = inputs - step < kSteps ? inputs - step : kSteps;
      for (int64_t i = 0; i < steps; ++i) widen(b + (step + i) * b_stride, n, columns + i * kWidth);
      for (int64_t m = 0; m < count; m += kOuterRows) {
        const int64_t here = count - m < kOuterRows ? count - m : kOuterRows;
        for (int64_t i = 0; i < here; ++i) widen(a.at(m + i) + step, steps, rows + i * kSteps);
        for (int64_t d = 0; d < n; d += kOuterColumns) {
          const int64_t width = n - d < kOuterColumns ? n - d : kOuterColumns;
          float sums[kOuterRows][kOuterColumns] = {};
          add_outer({rows, kSteps, 1, columns + d, kWidth, steps}, here, sums[0], kOuterColumns);
          for (int64_t i = 0; i < here; ++i) {  // in their order: a row of c may be named twice
            float* to = c.at(m + i) + d;
            for (int64_t j = 0; j < width; ++j) to[j] = first && step == 0 ? sums[i][j] : to[j] + sums[i][j];
          }
        }
      }
    }
  }

  template <class X>
  static void outer(const MoeRows<const X>& a, const MoeRows<const X>& b, int64_t count, int64_t m, int64_t n, X* out,
                    int64_t out_stride, uint8_t* memory) {
    float *columns = reinterpret_cast<float*>(memory), *rows = columns + kPanel, *sums = rows + kPanel;
    for (int64_t column = 0; column < n; column += kWidth) {
      const int64_t width = n - column < kWidth ? n - column : kWidth;
      memset(sums, 0, static_cast<size_t>(kWidth * kWidth) * sizeof(float));
      for (int64_t step = 0; step < count; step += kSteps) {
        const int64_t steps = count - step < kSteps ? count - step : kSteps;
        for (int64_t i = 0; i < steps; ++i) {
          widen(a.at(step + i), m, rows + i * kWidth);
          widen(b.at(step + i) + column, width, columns + i * kWidth);
        }
        for (int64_t i = 0; i < m; i += kOuterRows) {
          for (int64_t d = 0; d < width; d += kOuterColumns) {
            add_outer({rows + i, 1, kWidth, columns + d, kWidth, steps}, m - i, sums + i * kWidth + d, kWidth);
          }
        }
      }
      for (int64_t i = 0; i < m; ++i) narrow(sums + i * kWidth, width, out + i * out_stride + column);
    }
  }

  template <class X>
  static float activate_backward(const float* gate, const float* up, const float* grad, float weight, float limit,
                                 int64_t n, const MoeInner<X>& to) {
    return scalar::activate_backward(gate, up, grad, weight, limit, n, to);
  }
};

}  // namespace

int64_t moe_experts_backward_workspace_bytes(const MoeExpertsBackwardParams& p, const Context& c) {
  return moe_backward_bytes<Kernel>(p, c);
}
Status moe_experts_backward(const MoeExpertsBackwardParams& p, const Context& c) {
  return moe_backward_run<Kernel>(p, c);
}

}  // namespace dsv4::avx2
