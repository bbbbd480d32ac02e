// Norms, rotations and the window's store, portable. Also the yardstick for the other kernels.
#include "cpu/norm_rope.h"

#include "cpu/norm_gradient_rows.h"
#include "cpu/page_writer.h"
#include "cpu/scalar/rows.h"

namespace dsv4::scalar {
namespace {

// A head's mean square + eps, and its inverse root, rounded to X at every step.
struct Root {
  float mean, inverse;
};
template <class X>
Root root_of(const X* q, int64_t dim, double eps) {
  const auto round = [](double value) { return Lanes::rounded<X>(value); };
  double sum = 0;
  for (int64_t d = 0; d < dim; ++d) sum += round(to_float(q[d]) * to_float(q[d]));
  const float mean = round(static_cast<double>(round(sum / static_cast<double>(dim))) + eps);
  return {mean, round(1 / std::sqrt(static_cast<double>(mean)))};
}

template <class X>
Status rotate_queries(const QueryNormRopeParams& p, const Context& context) {
  const int64_t heads = p.query.size(1), dim = p.query.size(2), pairs = p.rope.size(1);
  parallel(context, p.query.size(0) * heads, rows_a_piece(dim), [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t t = i / heads, h = i % heads;
      const X* q = p.query.as<const X>().at(t, h);
      X* out = p.result.as<X>().at(t, h);
      const float root = root_of(q, dim, p.eps).inverse;
      for (int64_t d = 0; d < dim; ++d) out[d] = from_float<X>(to_float(q[d]) * root);
      Lanes().rotate<X>(out + dim - 2 * pairs, p.rope.as<const float>().at(t), pairs);
    }
  });
  return Status::ok();
}

template <class X>
Status rotate_gradients(const QueryNormRopeBackwardParams& p, const Context& context) {
  const int64_t heads = p.query.size(1), dim = p.query.size(2), still = dim - 2 * p.rope.size(1);
  parallel(context, p.query.size(0) * heads, rows_a_piece(dim), [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t t = i / heads, h = i % heads;
      const X *q = p.query.as<const X>().at(t, h), *grad = p.grad.as<const X>().at(t, h);
      const float* rope = p.rope.as<const float>().at(t);
      const auto turned = [&](int64_t d) { return turned_back(grad, d, still, rope); };
      const Root root = root_of(q, dim, p.eps);
      double along = 0;
      for (int64_t d = 0; d < dim; ++d) along += turned(d) * to_float(q[d]);
      along /= static_cast<double>(dim) * root.mean * std::sqrt(static_cast<double>(root.mean));
      X* out = p.result.as<X>().at(t, h);
      for (int64_t d = 0; d < dim; ++d) {
        out[d] = from_float<X>(static_cast<float>(turned(d) * root.inverse - to_float(q[d]) * along));
      }
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

}  // namespace dsv4::scalar
