// What norms make of a row's elements, in eights or one by one; see norm_rope_eight.
#pragma once

#include "common/view.h"
#include "cuda/sm80/row_launch.h"

namespace dsv4::sm80 {

// 1 / sqrt(mean + eps). A sum that had to be scaled leaves nothing of eps.
DSV4_DEVICE TwoFloats inverse_rms(const SumOfSquares& squares, int dim, const TwoFloats& eps) {
  const TwoFloats mean = divide(squares.sum, static_cast<float>(dim));
  const TwoFloats root = inverse_root(squares.scale == 1.0f ? add(mean, eps) : mean);
  return {ptx::multiply(root.high, squares.scale), ptx::multiply(root.low, squares.scale)};
}

// The weight of a norm, bfloat16 or float32; none: 1.
struct NormWeight {
  const void* data;
  int dim;
  bool wide, vector;

  DSV4_DEVICE void eight(int column, float (&value)[8]) const {
    if (data == nullptr) {
      DSV4_UNROLL
      for (int e = 0; e < 8; ++e) value[e] = 1.0f;
    } else if (wide) {
      load_eight(static_cast<const float*>(data), column, dim, vector, value);
    } else {
      load_eight(static_cast<const bf16*>(data), column, dim, vector, value);
    }
  }
  DSV4_DEVICE float one(int column) const {
    return wide ? static_cast<const float*>(data)[column] : to_float(static_cast<const bf16*>(data)[column]);
  }
};

// x times the root times the weight, rounded once.
struct WeightedNorm {
  TwoFloats root;
  NormWeight weight;

  DSV4_DEVICE float of(float x, float by) const {
    const TwoFloats scaled = two_product(x, root.high), result = two_product(scaled.high, by);
    const float rest = ptx::fma(x, root.low, scaled.low);
    return nearest({result.high, ptx::fma(rest, by, result.low)});
  }
  DSV4_DEVICE void eight(int column, float (&value)[8]) const {
    float by[8];
    weight.eight(column, by);
    DSV4_UNROLL
    for (int e = 0; e < 8; ++e) value[e] = of(value[e], by[e]);
  }
  DSV4_DEVICE float one(int column, float x) const { return of(x, weight.one(column)); }
};

// x times a root that has been rounded.
struct PlainNorm {
  float root;

  DSV4_DEVICE void eight(int, float (&value)[8]) const {
    DSV4_UNROLL
    for (int e = 0; e < 8; ++e) value[e] = ptx::multiply(value[e], root);
  }
  DSV4_DEVICE float one(int, float x) const { return ptx::multiply(x, root); }
};

struct NoNorm {
  DSV4_DEVICE void eight(int, float (&)[8]) const {}
  DSV4_DEVICE float one(int, float x) const { return x; }
};

// The mean of a query's squares, and that mean + eps, each rounded to X. A sum that had to be scaled leaves nothing of
// eps.
template <class X>
DSV4_DEVICE float rounded_mean(const SumOfSquares& squares, int dim, const TwoFloats& eps) {
  const float mean = rounded_to<X>(nearest(divide(squares.sum, static_cast<float>(dim))));
  return squares.scale == 1.0f ? rounded_to<X>(nearest(add(eps, mean))) : mean;
}

// The root of queries: mean, mean + eps and root are rounded to X.
template <class X>
DSV4_DEVICE float rounded_root(const SumOfSquares& squares, int dim, const TwoFloats& eps) {
  const float mean = rounded_mean<X>(squares, dim, eps);
  return ptx::multiply(rounded_to<X>(nearest(inverse_root({mean, 0.0f}))), squares.scale);
}

// Of the host's arguments.
inline TwoFloats two_floats(double value) {
  const float high = static_cast<float>(value);
  return {high, static_cast<float>(value - static_cast<double>(high))};
}
inline NormWeight norm_weight(const AnyView<1>& weight) {
  const int dim = static_cast<int>(weight.size(0));
  return {weight.data, dim, weight.dtype == DType::kFloat32, dim % 8 == 0 && aligned(weight.data)};
}

}  // namespace dsv4::sm80
