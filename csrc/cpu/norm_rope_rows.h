// Norms and rotations of whole rows, for the arithmetic `L` of an instruction set (see page_writer.h).
#pragma once

#include "cpu/norm_rope.h"

namespace dsv4 {

// result = row / sqrt(mean(row^2) + eps) times weight, where there is one, rounded to N.
template <class N, class X, class R, class L>
DSV4_HOST_DEVICE void normalise(const L& lanes, const X* row, int64_t dim, const AnyView<1>& weight, double eps,
                                R* result) {
  const double root = 1 / L::square_root(lanes.sum_of_squares(row, dim) / static_cast<double>(dim) + eps);
  if (weight.dtype == DType::kBFloat16) {
    lanes.template scale<N>(row, dim, root, static_cast<const bf16*>(weight.data), result);
  } else {
    lanes.template scale<N>(row, dim, root, static_cast<const float*>(weight.data), result);
  }
}

template <class X, class L>
Status rms_norm_rows(const L& lanes, const RmsNormParams& p, const Context& context) {
  const int64_t dim = p.x.size(1);
  parallel(context, p.x.size(0), rows_a_piece(dim), [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      normalise<X>(lanes, p.x.as<const X>().at(row), dim, p.weight, p.eps, p.result.as<X>().at(row));
    }
  });
  return Status::ok();
}

template <class X, class L>
Status kv_norm_rope_rows(const L& lanes, const KvNormRopeParams& p, const Context& context) {
  const int64_t dim = p.kv.size(1), pairs = p.rope.size(1);
  parallel(context, p.kv.size(0), rows_a_piece(dim), [&](int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; ++t) {
      X* result = p.result.as<X>().at(t);
      normalise<X>(lanes, p.kv.as<const X>().at(t), dim, p.weight, p.eps, result);
      lanes.template rotate<X>(result + dim - 2 * pairs, p.rope.as<const float>().at(t), pairs);
    }
  });
  return Status::ok();
}

template <class X, class L>
Status apply_rope_rows(const L& lanes, const ApplyRopeParams& p, const Context& context) {
  const int64_t heads = p.x.size(1), dim = p.x.size(2), pairs = p.rope.size(1);
  parallel(context, p.x.size(0) * heads, rows_a_piece(dim), [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t t = i / heads, h = i % heads;
      X* result = p.result.as<X>().at(t, h);
      memcpy(result, p.x.as<const X>().at(t, h), static_cast<size_t>(dim) * sizeof(X));
      lanes.template rotate<X>(result + dim - 2 * pairs, p.rope.as<const float>().at(t), pairs, p.inverse);
    }
  });
  return Status::ok();
}

template <class L>
Status rope_table_rows(const L& lanes, const RopeRowsParams& p, const Context& context) {
  const int64_t pairs = p.frequency.size(0);
  parallel(context, p.position.size(0), rows_a_piece(16 * pairs), [&](int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; ++t) {
      const float position = p.position.dtype == DType::kInt32
                                 ? static_cast<float>(*p.position.as<const int32_t>().at(t))
                                 : static_cast<float>(*p.position.as<const int64_t>().at(t));
      lanes.turns(position, p.frequency.as<const float>().data, pairs, p.result.as<float>().at(t));
    }
  });
  return Status::ok();
}

}  // namespace dsv4
