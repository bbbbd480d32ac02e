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

}  // namespace dsv4
