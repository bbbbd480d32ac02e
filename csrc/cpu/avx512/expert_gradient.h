// The gradient of an expert's activation, 16 inner values of a row at a time.
#pragma once

#include "cpu/avx512/moe_product.h"
#include "cpu/avx512/rows.h"
#include "cpu/moe_backward_driver.h"

namespace dsv4::avx512 {
namespace {

// Float64 between the operands and the results: beside the products it costs little, and each gradient has the error of
// its sums alone.
struct Activation {
  __m512 hidden, grad_gate, grad_up;

  DSV4_MEMBER Activation(__m512 gate, __m512 up, __m512 grad, __m512 most, __m512d weight, __m512d* sum) {
    // NaN passes both ways.
    const __mmask16 gate_passes = _mm512_cmp_ps_mask(gate, most, _CMP_NGT_UQ);
    const __mmask16 up_passes = _mm512_cmp_ps_mask(_mm512_abs_ps(up), most, _CMP_NGT_UQ);
    gate = _mm512_min_ps(most, gate);
    up = _mm512_max_ps(_mm512_sub_ps(_mm512_setzero_ps(), most), _mm512_min_ps(most, up));
    const __m512d one = _mm512_set1_pd(1);
    __m512d h[2], d_gate[2], d_up[2];
#pragma GCC unroll 2
    for (int half = 0; half < 2; ++half) {
      const auto wide = [half](__m512 x) { return half == 0 ? low(x) : high(x); };
      const __m512d g = wide(gate), u = wide(up), d = wide(grad);
      const __m512d power = exp(_mm512_sub_pd(_mm512_setzero_pd(), _mm512_abs_pd(g)));
      const __mmask8 negative = _mm512_cmp_pd_mask(g, _mm512_setzero_pd(), _CMP_LT_OQ);
      const __m512d sigmoid = _mm512_div_pd(_mm512_mask_mov_pd(one, negative, power), _mm512_add_pd(one, power));
      const __m512d silu = _mm512_mul_pd(g, sigmoid), product = _mm512_mul_pd(silu, u);
      const __m512d slope = _mm512_mul_pd(sigmoid, _mm512_fmadd_pd(g, _mm512_sub_pd(one, sigmoid), one));
      const __m512d weighted = _mm512_mul_pd(d, weight);
      *sum = _mm512_fmadd_pd(d, product, *sum);
      h[half] = _mm512_mul_pd(product, weight);
      d_gate[half] = _mm512_mul_pd(_mm512_mul_pd(weighted, u), slope);
      d_up[half] = _mm512_mul_pd(weighted, silu);
    }
    hidden = join(h[0], h[1]);
    grad_gate = _mm512_maskz_mov_ps(gate_passes, join(d_gate[0], d_gate[1]));
    grad_up = _mm512_maskz_mov_ps(up_passes, join(d_up[0], d_up[1]));
  }
};

// The sum of grad * silu(gate) * up over n inner values of a row, and what goes on from them.
template <class X>
static float activate_backward(const float* gate, const float* up, const float* grad, float weight, float limit,
                               int64_t n, const MoeInner<X>& to) {
  const X* type = nullptr;
  const __m512 most = _mm512_set1_ps(limit > 0 ? limit : __builtin_inff());
  const __m512d factor = _mm512_set1_pd(weight);
  __m512d sum = _mm512_setzero_pd();
  for (int64_t i = 0; i < n; i += kStep) {
    const int64_t count = n - i < kStep ? n - i : kStep;
    const Pair g = rounded(load(gate + i, count), type), u = rounded(load(up + i, count), type);
    const Pair d = load(grad + i, count);
    const Activation a(g.a, u.a, d.a, most, factor, &sum), b(g.b, u.b, d.b, most, factor, &sum);
    store(to.hidden + i, arrange(Pair{a.hidden, b.hidden}, type), count);
    store(to.grad_gate + i, arrange(Pair{a.grad_gate, b.grad_gate}, type), count);
    store(to.grad_up + i, arrange(Pair{a.grad_up, b.grad_up}, type), count);
  }
  return static_cast<float>(_mm512_reduce_add_pd(sum));
}

}  // namespace
}  // namespace dsv4::avx512
