// Gradients of plain experts, portable: sums in double precision, rounded once. Also the yardstick for the other
// kernels.
#include "cpu/scalar/expert_gradient.h"
#include "cpu/scalar/moe_product.h"

namespace dsv4::scalar {
namespace {

struct Kernel : MoeSingly<ExpertKernel> {
  static int64_t product_memory(int64_t inputs) {
    const int64_t sums = kMoeColumns * static_cast<int64_t>(sizeof(double)), forward = memory(inputs);
    return sums > forward ? sums : forward;
  }

  // total[j] = sum of factor(i) b[i][j] over the rows of b.
  template <class X, class Factor>
  static void sum_rows(const MoeRows<const X>& b, int64_t count, int64_t n, const Factor& factor, double* total) {
    for (int64_t j = 0; j < n; ++j) total[j] = 0;
    for (int64_t i = 0; i < count; ++i) {
      const X* row = b.at(i);
      const double value = to_float(factor(i));
      for (int64_t j = 0; j < n; ++j) total[j] += value * to_float(row[j]);
    }
  }

  template <class X>
  static void accumulate(const MoeRows<const X>& a, int64_t count, int64_t inputs, const X* b, int64_t b_stride,
                         int64_t n, bool first, const MoeRows<float>& c, uint8_t* memory) {
    double* total = reinterpret_cast<double*>(memory);
    for (int64_t m = 0; m < count; ++m) {
      const X* row = a.at(m);
      const auto factor = [&](int64_t i) { return row[i]; };
      sum_rows(MoeRows<const X>{b, b_stride, nullptr}, inputs, n, factor, total);
      float* to = c.at(m);
      for (int64_t j = 0; j < n; ++j) to[j] = static_cast<float>(first ? total[j] : to[j] + total[j]);
    }
  }

  template <class X>
  static void outer(const MoeRows<const X>& a, const MoeRows<const X>& b, int64_t count, int64_t m, int64_t n, X* out,
                    int64_t out_stride, uint8_t* memory) {
    double* total = reinterpret_cast<double*>(memory);
    for (int64_t i = 0; i < m; ++i) {
      sum_rows(b, count, n, [&](int64_t row) { return a.at(row)[i]; }, total);
      for (int64_t j = 0; j < n; ++j) out[i * out_stride + j] = from_float<X>(static_cast<float>(total[j]));
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

}  // namespace dsv4::scalar
