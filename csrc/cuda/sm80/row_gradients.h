// Gradients of norms, row by row. Of x, its gradient g (turned back, times the weight) and y = x root, what is wanted
// is g root - y root mean(g y): two sums over the row, then a pass over the same elements, which registers hold between
// the two where a thread has at most two eights of them. Sums are float32 where X is bfloat16, else two floats.
#pragma once

#include "cuda/sm80/row_norms.h"

namespace dsv4::sm80 {

// sum + a * b, as exact as X needs.
template <class X>
DSV4_DEVICE TwoFloats add_product(const TwoFloats& sum, float a, float b) {
  if constexpr (sizeof(X) == 2) return {ptx::fma(a, b, sum.high), 0.0f};
  return add(sum, two_product(a, b));
}

// Over a row's elements, or those of a thread: of squares, and of gradients times x.
struct GradientSums {
  TwoFloats squares, along;
};

// The gradient of an element of x from the gradient g of y.
struct RowGradient {
  float root, by, along;

  DSV4_DEVICE float normed(float x) const { return ptx::multiply(x, root); }
  DSV4_DEVICE float of(float y, float g) const { return ptx::fma(-y, along, ptx::multiply(g, by)); }
};

// From the sums of elements times `scale` and the inverse root of their mean square; by: the root that g is multiplied
// with, which may have been rounded.
DSV4_DEVICE RowGradient row_gradient(const TwoFloats& along, int dim, float root, float scale, float by) {
  const float mean = ptx::multiply(ptx::divide(nearest(along), static_cast<float>(dim)), root);
  const float whole = ptx::multiply(root, scale);
  return {whole, ptx::multiply(by, scale), ptx::multiply(mean, whole)};
}

// Squares as a norm with a weight has them; rounded, as a query's.
template <class X>
struct PlainSquares {
  template <bool kScaled>
  DSV4_DEVICE static TwoFloats add_to(const TwoFloats& sum, float x) {
    if (kScaled) x = ptx::multiply(x, kSmall);
    return add_product<X>(sum, x, x);
  }
  DSV4_DEVICE static RowGradient gradient(const GradientSums& sums, float scale, int dim, const TwoFloats& eps) {
    const TwoFloats mean = divide(sums.squares, static_cast<float>(dim));
    const float root = nearest(inverse_root(scale == 1.0f ? add(mean, eps) : mean));
    return row_gradient(sums.along, dim, root, scale, root);
  }
};
template <class X>
struct QuerySquares : RoundedSquare<X> {
  DSV4_DEVICE static RowGradient gradient(const GradientSums& sums, float scale, int dim, const TwoFloats& eps) {
    const float root = nearest(inverse_root({rounded_mean<X>({sums.squares, scale}, dim, eps), 0.0f}));
    return row_gradient(sums.along, dim, root, scale, rounded_to<X>(root));
  }
};

// The gradient's pairs turned back, of an eight.
template <class X>
DSV4_DEVICE void turn_back(const GlobalRow<X>& grad, const RowRope& rope, int column, float (&value)[8]) {
  if (!rope.covers(column)) return;
  float before = 0.0f, after = 0.0f;
  if (!rope.vector && rope.across()) {
    if (column > 0) before = grad.one(column - 1);
    if (column + 8 < rope.dim) after = grad.one(column + 8);
  }
  rope.rotate(column, value, before, after);
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

  // The thread's sums; weight(column, by) gives what an eight of the gradient is multiplied with.
  template <class Squares, bool kScaled, class Weight>
  DSV4_DEVICE GradientSums sums(const Weight& weight) const {
    GradientSums sum = {};
    each([&](int, int column, const float (&x)[8], const float (&grad)[8]) {
      float by[8];
      weight(column, by);
      DSV4_UNROLL
      for (int e = 0; e < 8; ++e) {
        sum.squares = Squares::template add_to<kScaled>(sum.squares, x[e]);
        sum.along =
            add_product<X>(sum.along, ptx::multiply(grad[e], by[e]), kScaled ? ptx::multiply(x[e], kSmall) : x[e]);
      }
    });
    return sum;
  }

 private:
  GlobalRow<X> from_, grads_;
  RowRope rope_;
  int first_, step_;
  Words4 x_[kHeld][FetchedRow<X, kHeld>::kPieces];
  float grad_[kHeld][8];
};

// What the sums over whole rows, which `join` makes of a thread's, say; see sum_of_squares.
template <class Squares, class Row, class Weight, class Join>
DSV4_DEVICE RowGradient gradient_of(const Row& row, int dim, const TwoFloats& eps, const Weight& weight,
                                    const Join& join) {
  GradientSums sums = join(row.template sums<Squares, false>(weight));
  const bool lost = !(sums.squares.high < kLargeSum);
  const uint32_t any_lost = ptx::ballot(lost);
  float scale = 1.0f;
  if (any_lost != 0) {
    const GradientSums small = join(row.template sums<Squares, true>(weight));
    if (lost) sums = small, scale = kSmall;
  }
  return Squares::gradient(sums, scale, dim, eps);
}

}  // namespace dsv4::sm80
