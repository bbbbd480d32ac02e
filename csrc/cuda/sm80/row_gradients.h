// Gradients of norms, row by row. Of x, its gradient g (turned back, times the weight) and y = x root, what is wanted
// is root (g - y mean(g y)): two sums over the row, then a pass over the same elements, which registers hold between
// the two where a thread has at most two eights of them.
#pragma once

#include "cuda/sm80/row_norms.h"

namespace dsv4::sm80 {

// A sum of products of X: where results are rounded to bfloat16 float32 is exact enough, else two floats.
template <class X>
struct SumOf {
  static constexpr bool kNarrow = sizeof(X) == 2;
  TwoFloats value = {0.0f, 0.0f};

  DSV4_DEVICE void add_product(float a, float b) {
    if constexpr (kNarrow) {
      value.high = ptx::fma(a, b, value.high);
    } else {
      value = sm80::add(value, two_product(a, b));
    }
  }
  DSV4_DEVICE void add(float x) {
    if constexpr (kNarrow) {
      value.high = ptx::add(value.high, x);
    } else {
      value = sm80::add(value, x);
    }
  }
  DSV4_DEVICE void add(const SumOf& other) {
    if constexpr (kNarrow) {
      value.high = ptx::add(value.high, other.value.high);
    } else {
      value = sm80::add(value, other.value);
    }
  }
  DSV4_DEVICE float nearest_float() const { return kNarrow ? value.high : nearest(value); }

  // The sum over each so many neighbouring lanes, in each of them.
  DSV4_DEVICE SumOf over(int lanes) const {
    SumOf sum = *this;
    for (int mask = 1; mask < lanes; mask *= 2) {
      SumOf other;
      other.value.high = ptx::shuffle_xor(sum.value.high, mask);
      if constexpr (!kNarrow) {
        other.value.low = ptx::shuffle_xor(sum.value.low, mask);
      }
      sum.add(other);
    }
    return sum;
  }
};

// Over a row's elements, or those of a thread: of squares, and of gradients times x.
template <class X>
struct GradientSums {
  SumOf<X> squares, along;
};

// The gradient of an element of x from the gradient g of y.
struct RowGradient {
  float root, by, along;

  DSV4_DEVICE float normed(float x) const { return ptx::multiply(x, root); }
  DSV4_DEVICE float of(float y, float g) const { return ptx::fma(-y, along, ptx::multiply(g, by)); }
};

// Of a norm with a weight, from the sums of elements times `scale`; see inverse_rms. one_of: 1 / dim.
template <class X>
DSV4_DEVICE RowGradient norm_gradient(const GradientSums<X>& sums, float scale, int dim, float one_of,
                                      const TwoFloats& eps) {
  float root;
  if constexpr (SumOf<X>::kNarrow) {
    const float mean = ptx::multiply(sums.squares.value.high, one_of);
    root = ptx::divide(1.0f, ptx::square_root(scale == 1.0f ? ptx::add(mean, eps.high) : mean));
  } else {
    const TwoFloats mean = divide(sums.squares.value, static_cast<float>(dim));
    root = nearest(inverse_root(scale == 1.0f ? add(mean, eps) : mean));
  }
  const float mean = ptx::multiply(ptx::multiply(sums.along.nearest_float(), one_of), root);
  const float whole = ptx::multiply(root, scale);
  return {whole, whole, ptx::multiply(mean, whole)};
}

// Of a query's norm, whose root is that of a rounded mean, and rounded itself.
template <class X>
DSV4_DEVICE RowGradient query_gradient(const SumOfSquares& squares, const SumOf<X>& along, int dim, float one_of,
                                       const TwoFloats& eps) {
  const float exact = nearest(inverse_root({rounded_mean<X>(squares, dim, eps), 0.0f}));
  const float root = ptx::multiply(exact, squares.scale);
  const float mean = ptx::multiply(ptx::multiply(along.nearest_float(), one_of), root);
  return {root, ptx::multiply(rounded_to<X>(exact), squares.scale), ptx::multiply(mean, root)};
}

// Whether a sum of at most 32 additions in float32 says to which bfloat16 number the mean is rounded.
DSV4_DEVICE bool says_rounded_mean(float sum, float one_of) {
  const float mean = ptx::multiply(sum, one_of);
  const float below = ptx::multiply(mean, 1.0f - 0x1p-18f), above = ptx::multiply(mean, 1.0f + 0x1p-18f);
  return sum == 0.0f || (sum > 0x1p-100f && rounded_to<bf16>(below) == rounded_to<bf16>(above));
}

// The gradient's pairs turned back, of an eight.
template <class X>
DSV4_DEVICE void turn_back(const GlobalRow<X>& grad, const RowRope& rope, int column, float (&value)[8]) {
  if (!rope.covers(column)) return;
  float before = 0.0f, after = 0.0f;
  if (!rope.vector && rope.across()) {
    if (column > 0) before = grad.one(column - 1);
    if (column + 8 < rope.dim) after = grad.one(column + 8);
  }
  rope.rotate<sizeof(X) == 4>(column, value, before, after);
}

// A thread's eights of a row of x and of its gradient, on their way from memory that nobody writes. Rows of whole,
// aligned eights.
template <class X, int kSteps>
struct FetchedRow {
  static constexpr int kPieces = 8 / kElements<X>;
  Words4 x[kSteps][kPieces], grad[kSteps][kPieces];

  DSV4_DEVICE void fetch(const GlobalRow<X>& from, const GlobalRow<X>& grads, int first, int step) {
    DSV4_UNROLL
    for (int s = 0; s < kSteps; ++s) {
      DSV4_UNROLL
      for (int i = 0; i < kPieces; ++i) {
        const int column = first + s * step + i * kElements<X>;
        x[s][i] = column < from.dim ? ptx::load_constant_16(from.data + column) : Words4{};
        grad[s][i] = column < from.dim ? ptx::load_constant_16(grads.data + column) : Words4{};
      }
    }
  }

  DSV4_DEVICE static void unpack_eight(const Words4 (&pieces)[kPieces], float (&value)[8]) {
    DSV4_UNROLL
    for (int i = 0; i < kPieces; ++i) {
      float part[kElements<X>];
      unpack(pieces[i], part);
      DSV4_UNROLL
      for (int e = 0; e < kElements<X>; ++e) value[i * kElements<X> + e] = part[e];
    }
  }
};

// The same in floats, the gradient turned back. kSteps 0: any number of eights of rows anywhere in memory, which are
// read again for each pass; sums have the same order.
template <class X, int kSteps>
class GradientRow {
  static constexpr int kHeld = kSteps > 0 ? kSteps : 1;

 public:
  DSV4_DEVICE GradientRow(const GlobalRow<X>& x, const GlobalRow<X>& grad, const RowRope& rope, int first, int step)
      : from_(x), grads_(grad), rope_(rope), first_(first), step_(step) {}

  DSV4_DEVICE void take(const FetchedRow<X, kHeld>& fetched) {
    DSV4_UNROLL
    for (int s = 0; s < kSteps; ++s) {
      DSV4_UNROLL
      for (int i = 0; i < FetchedRow<X, kHeld>::kPieces; ++i) x_[s][i] = fetched.x[s][i];
      FetchedRow<X, kHeld>::unpack_eight(fetched.grad[s], grad_[s]);
      turn_back(grads_, rope_, first_ + s * step_, grad_[s]);
    }
  }

  // body(step, column, x, gradient) for each eight.
  template <class Body>
  DSV4_DEVICE void each(const Body& body) const {
    if constexpr (kSteps > 0) {
      DSV4_UNROLL
      for (int s = 0; s < kSteps; ++s) {
        float x[8];
        FetchedRow<X, kHeld>::unpack_eight(x_[s], x);
        body(s, first_ + s * step_, x, grad_[s]);
      }
    } else {
      for (int column = first_; column < from_.dim; column += step_) {
        float x[8], grad[8];
        from_.eight(column, x);
        grads_.eight(column, grad);
        turn_back(grads_, rope_, column, grad);
        body(0, column, x, grad);
      }
    }
  }

 private:
  GlobalRow<X> from_, grads_;
  RowRope rope_;
  int first_, step_;
  Words4 x_[kHeld][FetchedRow<X, kHeld>::kPieces];
  float grad_[kHeld][8];
};

}  // namespace dsv4::sm80
