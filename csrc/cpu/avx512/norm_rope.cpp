// query_norm_rope: a head at a time, which stays in the first-level cache between the sum and the product; reads and
// writes 2 H D bytes a row for bfloat16 and computes about 6 FLOPs an element: bound by memory. Squares are exact in
// float32 before they are rounded, their sum is float64. Expected: 70 % of the copy bandwidth of a core.
// rms_norm, kv_norm_rope: the same for rows. rope_rows: some 40 float64 operations for 8 angles, bound by these.
// store_window: a row at a time in the first-level cache; 4.6 D bytes a row of bfloat16 into FP8 pages.
#include "cpu/norm_rope.h"

#include "cpu/avx512/rows.h"
#include "cpu/page_writer.h"

namespace dsv4::avx512 {
namespace {

// The inverse root of a head's mean square, rounded to X at every step.
template <class X>
float inverse_root(const X* q, int64_t dim, double eps) {
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
  const auto round = [](double value) -> double { return to_float(from_float<X>(static_cast<float>(value))); };
  const double mean = round(sum / static_cast<double>(dim));
  return static_cast<float>(round(1 / Lanes::square_root(round(mean + eps))));
}

template <class X>
void rotate_head(const X* q, int64_t dim, const float* rope, int64_t pairs, double eps, X* out) {
  const __m512 root = _mm512_set1_ps(inverse_root(q, dim, eps));
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

}  // namespace

Status query_norm_rope(const QueryNormRopeParams& p, const Context& context) {
  return p.query.dtype == DType::kBFloat16 ? rotate_queries<bf16>(p, context) : rotate_queries<float>(p, context);
}

Status rms_norm(const RmsNormParams& p, const Context& context) {
  return p.x.dtype == DType::kBFloat16 ? rms_norm_rows<bf16>(Lanes(), p, context)
                                       : rms_norm_rows<float>(Lanes(), p, context);
}

Status kv_norm_rope(const KvNormRopeParams& p, const Context& context) {
  return p.kv.dtype == DType::kBFloat16 ? kv_norm_rope_rows<bf16>(Lanes(), p, context)
                                        : kv_norm_rope_rows<float>(Lanes(), p, context);
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
