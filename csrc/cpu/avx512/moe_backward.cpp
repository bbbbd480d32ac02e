// Gradients of plain experts. gate and up are the forward pass's own products (avx512/plain_rows.h), so that both
// passes clamp alike; the other six products of a row, of which weights or rows are read across, are those of
// avx512/outer_product.h. 16 hidden inter FLOPs a row of an expert. Many rows: the limit is the rate of vdpbf16ps or
// FMA. Few: reading every weight and writing every gradient once, 12 bytes a weight in bfloat16's case less than half
// of it.
#include "cpu/avx512/moe_product.h"
#include "cpu/avx512/outer_product.h"

namespace dsv4::avx512 {
namespace {

struct Kernel : MoeKernel<Product>, OuterProduct {
  template <class X>
  static float activate_backward(const float* gate, const float* up, const float* grad, float weight, float limit,
                                 int64_t n, const MoeInner<X>& to) {
    const X* type = nullptr;
    const __m512 one = _mm512_set1_ps(1.f), factor = _mm512_set1_ps(weight);
    const __m512 most = _mm512_set1_ps(limit > 0 ? limit : __builtin_inff());
    const __m512 least = _mm512_sub_ps(_mm512_setzero_ps(), most);
    __m512 sum = _mm512_setzero_ps();
    const auto lanes = [&](__m512 raw_g, __m512 raw_u, __m512 d, __m512* hidden, __m512* d_gate,
                           __m512* d_up) __attribute__((always_inline)) {
      // NaN passes both ways.
      const __mmask16 gate_passes = _mm512_cmp_ps_mask(raw_g, most, _CMP_NGT_UQ);
      const __mmask16 up_passes = _mm512_cmp_ps_mask(_mm512_abs_ps(raw_u), most, _CMP_NGT_UQ);
      const __m512 g = _mm512_min_ps(most, raw_g), u = _mm512_max_ps(least, _mm512_min_ps(most, raw_u));
      const __m512 divisor = _mm512_add_ps(one, exp(_mm512_sub_ps(_mm512_setzero_ps(), g)));
      const __m512 silu = _mm512_div_ps(g, divisor), sigmoid = _mm512_div_ps(one, divisor);
      const __m512 product = _mm512_mul_ps(silu, u), weighted = _mm512_mul_ps(d, factor);
      const __m512 slope = _mm512_mul_ps(sigmoid, _mm512_fmadd_ps(g, _mm512_sub_ps(one, sigmoid), one));
      sum = _mm512_fmadd_ps(d, product, sum);
      *hidden = _mm512_mul_ps(product, factor);
      *d_gate = _mm512_maskz_mul_ps(gate_passes, _mm512_mul_ps(weighted, u), slope);
      *d_up = _mm512_maskz_mul_ps(up_passes, weighted, silu);
    };
    for (int64_t i = 0; i < n; i += kStep) {
      const int64_t count = n - i < kStep ? n - i : kStep;
      const Pair g = rounded(load(gate + i, count), type), u = rounded(load(up + i, count), type);
      const Pair d = load(grad + i, count);
      Pair hidden, d_gate, d_up;
      lanes(g.a, u.a, d.a, &hidden.a, &d_gate.a, &d_up.a);
      lanes(g.b, u.b, d.b, &hidden.b, &d_gate.b, &d_up.b);
      store(to.hidden + i, arrange(hidden, type), count);
      store(to.grad_gate + i, arrange(d_gate, type), count);
      store(to.grad_up + i, arrange(d_up, type), count);
    }
    return total(sum);
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
