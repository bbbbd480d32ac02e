// query_norm_rope: a head at a time, which stays in the first-level cache between the sum and the product; reads and
// writes 2 H D bytes a row for bfloat16 and computes about 6 FLOPs an element: bound by memory. Squares are exact in
// float32 before they are rounded, their sum is float64. Expected: 70 % of the copy bandwidth of a core.
// Its gradient: 6 H D bytes a row, arithmetic in float64, so that the result has the error of one rounding.
// rms_norm, kv_norm_rope and their gradients: the same for rows; the weight's gradient is summed in float64 in a group
// of rows' own sums, which stay in the second-level cache. rope_rows: some 40 float64 operations for 8 angles, bound by
// these. store_window: a row at a time in the first-level cache; 4.6 D bytes a row of bfloat16 into FP8 pages.
#include "cpu/norm_rope.h"

#include "cpu/avx512/rows.h"
#include "cpu/norm_gradient_rows.h"
#include "cpu/page_writer.h"

namespace dsv4::avx512 {
namespace {

// A head's mean square + eps, and its inverse root, rounded to X at every step. Of type double GCC 12 returns them
// without their last rounding.
struct Root {
  float mean, inverse;
};
template <class X>
Root root_of(const X* q, int64_t dim, double eps) {
  __m512d sums[4] = {_mm512_setzero_pd(), _mm512_setzero_pd(), _mm512_setzero_pd(), _mm512_setzero_pd()};
  for (int64_t d = 0; d < dim; d += kStep) {
    const Pair x = load(q + d);
    const Pair y = rounded(Pair{_mm512_mul_ps(x.a, x.a), _mm512_mul_ps(x.b, x.b)}, q);
    sums[0] = _mm512_add_pd(sums[0], low(y.a));
    sums[1] = _mm512_add_pd(sums[1], high(y.a));
    sums[2] = _mm512_add_pd(sums[2], low(y.b));
    sums[3] = _mm512_add_pd(sums[3], high(y.b));
  }
  const double sum =
      _mm512_reduce_add_pd(_mm512_add_pd(_mm512_add_pd(sums[0], sums[2]), _mm512_add_pd(sums[1], sums[3])));
  const auto round = [](double value) { return to_float(from_float<X>(static_cast<float>(value))); };
  const float mean = round(static_cast<double>(round(sum / static_cast<double>(dim))) + eps);
  return {mean, round(1 / Lanes::square_root(static_cast<double>(mean)))};
}

template <class X>
void rotate_head(const X* q, int64_t dim, const float* rope, int64_t pairs, double eps, X* out) {
  const __m512 root = _mm512_set1_ps(root_of(q, dim, eps).inverse);
  const int64_t passed = dim - 2 * pairs;
  for (int64_t d = 0; d < passed; d += kStep) store(out + d, scaled(load(q + d), root));
  const bf16* apart = nullptr;
  for (int64_t d = passed; d < dim; d += kStep) {
    const Pair y = rounded(scaled(load(q + d), root), q);
    const Pair turned = rotated(arrange(natural(y, q), apart), rope + d - passed);
    store(out + d, arrange(natural(turned, apart), q));
  }
}

template <class X>
Status rotate_queries(const QueryNormRopeParams& p, const Context& context) {
  const int64_t heads = p.query.size(1), dim = p.query.size(2), pairs = p.rope.size(1);
  parallel(context, p.query.size(0) * heads, rows_a_piece(dim), [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t t = i / heads, h = i % heads;
      rotate_head(p.query.as<const X>().at(t, h), dim, p.rope.as<const float>().at(t), pairs, p.eps,
                  p.result.as<X>().at(t, h));
    }
  });
  return Status::ok();
}

// 32 dims of a head, those from `still` on with even and odd elements apart.
template <class X>
DSV4_INLINE Pair head_dims(const X* head, int64_t d, int64_t still) {
  const Pair x = load(head + d);
  return d < still ? x : arrange(natural(x, head), static_cast<const bf16*>(nullptr));
}
// The same of a gradient, those from `still` on rotated back.
template <class X>
DSV4_INLINE Wide head_turned_back(const X* grad, int64_t d, int64_t still, const float* rope) {
  const Wide x = widened(head_dims(grad, d, still));
  return d < still ? x : turned_back(x, rope + d - still);
}

template <class X>
void head_gradient(const X* q, const X* grad, int64_t dim, const float* rope, int64_t pairs, double eps, X* out) {
  const int64_t still = dim - 2 * pairs;
  const Root root = root_of(q, dim, eps);
  const double mean = root.mean;
  __m512d sums[4] = {_mm512_setzero_pd(), _mm512_setzero_pd(), _mm512_setzero_pd(), _mm512_setzero_pd()};
  for (int64_t d = 0; d < dim; d += kStep) {
    const Wide x = widened(head_dims(q, d, still)), g = head_turned_back(grad, d, still, rope);
    for (int i = 0; i < 4; ++i) sums[i] = _mm512_fmadd_pd(x.of[i], g.of[i], sums[i]);
  }
  const double along =
      _mm512_reduce_add_pd(_mm512_add_pd(_mm512_add_pd(sums[0], sums[2]), _mm512_add_pd(sums[1], sums[3]))) /
      (static_cast<double>(dim) * mean * Lanes::square_root(mean));
  const __m512d inverse = _mm512_set1_pd(root.inverse), less = _mm512_set1_pd(along);
  for (int64_t d = 0; d < dim; d += kStep) {
    const Wide x = widened(head_dims(q, d, still)), g = head_turned_back(grad, d, still, rope);
    Wide y;
    for (int i = 0; i < 4; ++i) y.of[i] = _mm512_fnmadd_pd(x.of[i], less, _mm512_mul_pd(g.of[i], inverse));
    const Pair value = {join(y.of[0], y.of[1]), join(y.of[2], y.of[3])};
    store(out + d, d < still ? value : arrange(natural(value, static_cast<const bf16*>(nullptr)), out));
  }
}

template <class X>
Status rotate_gradients(const QueryNormRopeBackwardParams& p, const Context& context) {
  const int64_t heads = p.query.size(1), dim = p.query.size(2), pairs = p.rope.size(1);
  parallel(context, p.query.size(0) * heads, rows_a_piece(dim), [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t t = i / heads, h = i % heads;
      head_gradient(p.query.as<const X>().at(t, h), p.grad.as<const X>().at(t, h), dim, p.rope.as<const float>().at(t),
                    pairs, p.eps, p.result.as<X>().at(t, h));
    }
  });
  return Status::ok();
}

}  // namespace

Status query_norm_rope(const QueryNormRopeParams& p, const Context& context) {
  return p.query.dtype == DType::kBFloat16 ? rotate_queries<bf16>(p, context) : rotate_queries<float>(p, context);
}

Status query_norm_rope_backward(const QueryNormRopeBackwardParams& p, const Context& context) {
  return p.query.dtype == DType::kBFloat16 ? rotate_gradients<bf16>(p, context) : rotate_gradients<float>(p, context);
}

Status rms_norm(const RmsNormParams& p, const Context& context) {
  return p.x.dtype == DType::kBFloat16 ? rms_norm_rows<bf16>(Lanes(), p, context)
                                       : rms_norm_rows<float>(Lanes(), p, context);
}

Status kv_norm_rope(const KvNormRopeParams& p, const Context& context) {
  return p.kv.dtype == DType::kBFloat16 ? kv_norm_rope_rows<bf16>(Lanes(), p, context)
                                        : kv_norm_rope_rows<float>(Lanes(), p, context);
}

Status norm_rope_backward(const NormRopeBackwardParams& p, const Context& context) {
  return p.x.dtype == DType::kBFloat16 ? norm_gradient_rows<bf16>(Lanes(), p, context)
                                       : norm_gradient_rows<float>(Lanes(), p, context);
}

Status apply_rope(const ApplyRopeParams& p, const Context& context) {
  return p.x.dtype == DType::kBFloat16 ? apply_rope_rows<bf16>(Lanes(), p, context)
                                       : apply_rope_rows<float>(Lanes(), p, context);
}

Status rope_rows(const RopeRowsParams& p, const Context& context) { return rope_table_rows(Lanes(), p, context); }

Status store_window(const StoreWindowParams& p, const Context& context) {
  return p.kv.dtype == DType::kBFloat16 ? store_window_rows<bf16>(Lanes(), p, context)
                                        : store_window_rows<float>(Lanes(), p, context);
}

}  // namespace dsv4::avx512
