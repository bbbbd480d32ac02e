// Gradients of norms of whole rows, for the arithmetic `L` of an instruction set (see page_writer.h): float64 inside.
#pragma once

#include "cpu/norm_rope.h"

namespace dsv4 {
namespace {

// A row's gradient to `result`; its part of the weight's is added to `sums`, where there are any.
template <class G, class X, class R, class L>
DSV4_HOST_DEVICE void norm_gradient(const L& lanes, const G* grad, const X* x, int64_t dim, const AnyView<1>& weight,
                                    double eps, const float* rope, int64_t pairs, double* sums, R* result) {
  const double square = lanes.sum_of_squares(x, dim) / static_cast<double>(dim) + eps;
  const double root = 1 / L::square_root(square), mean = root / (square * static_cast<double>(dim));
  if (weight.dtype == DType::kBFloat16) {
    const bf16* w = static_cast<const bf16*>(weight.data);
    const double along = lanes.norm_product(grad, x, w, dim, rope, pairs) * mean;
    lanes.norm_gradient(grad, x, w, dim, rope, pairs, root, along, sums, result);
  } else {
    const float* w = static_cast<const float*>(weight.data);
    const double along = lanes.norm_product(grad, x, w, dim, rope, pairs) * mean;
    lanes.norm_gradient(grad, x, w, dim, rope, pairs, root, along, sums, result);
  }
}

// The groups' sums, rounded once.
template <class W>
DSV4_HOST_DEVICE void add_groups(const Context& context, int64_t rows, int64_t dim, const double* sums, W* result) {
  constexpr int64_t kColumns = 64;
  const int64_t groups = row_groups(rows), pieces = (dim + kColumns - 1) / kColumns;
  parallel(context, pieces, rows_a_piece(groups * kColumns), [&](int64_t begin, int64_t end) {
    for (int64_t first = begin * kColumns; first < dim && first < end * kColumns; first += kColumns) {
      const int64_t count = dim - first < kColumns ? dim - first : kColumns;
      double sum[kColumns] = {};
      for (int64_t group = 0; group < groups; ++group) {
        const double* from = sums + group * dim + first;
        for (int64_t i = 0; i < count; ++i) sum[i] += from[i];
      }
      for (int64_t i = 0; i < count; ++i) result[first + i] = from_float<W>(static_cast<float>(sum[i]));
    }
  });
}
DSV4_HOST_DEVICE void add_groups(const Context& context, int64_t rows, const double* sums, const AnyView<1>& result) {
  const int64_t dim = result.size(0);
  if (result.dtype == DType::kBFloat16) {
    add_groups(context, rows, dim, sums, static_cast<bf16*>(result.data));
  } else {
    add_groups(context, rows, dim, sums, static_cast<float*>(result.data));
  }
}

template <class X, class L>
Status norm_gradient_rows(const L& lanes, const NormRopeBackwardParams& p, const Context& context) {
  const int64_t rows = p.x.size(0), dim = p.x.size(1), pairs = p.rope.size(1);
  double* sums = p.weight.given() ? static_cast<double*>(p.workspace.data) : nullptr;
  const int64_t groups = row_groups(rows);
  parallel(context, groups, rows_a_piece(rows / (groups + 1) * dim), [&](int64_t begin, int64_t end) {
    for (int64_t group = begin; group < end; ++group) {
      double* own = sums == nullptr ? nullptr : sums + group * dim;
      for (int64_t d = 0; own != nullptr && d < dim; ++d) own[d] = 0;
      for (int64_t t = rows * group / groups; t < rows * (group + 1) / groups; ++t) {
        norm_gradient(lanes, p.grad.as<const X>().at(t), p.x.as<const X>().at(t), dim, p.weight, p.eps,
                      p.rope.as<const float>().at(t), pairs, own, p.grad_x.as<X>().at(t));
      }
    }
  });
  if (p.weight.given()) add_groups(context, rows, sums, p.grad_weight);
  return Status::ok();
}

}  // namespace
}  // namespace dsv4
