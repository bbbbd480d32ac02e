// Rows of up to 32 lanes of a warp: an eighth of a row's dims or 32 lanes, whichever is less, and eight neighbouring
// dims a lane and step. Which lane holds what, and in what order sums run, depends on the dims alone: never on the
// row's place, nor on whether its memory allows 16-byte accesses.
#pragma once

#include "cuda/sm80/pieces.h"
#include "cuda/sm80/two_floats.h"

namespace dsv4::sm80 {

inline constexpr int kRowThreads = 128;

// Lanes of a row of `dim` dims: a power of two.
inline int row_lanes(int64_t dim) {
  int lanes = 1;
  while (lanes < 32 && lanes * 8 < dim) lanes *= 2;
  return lanes;
}

inline int64_t rows_of_block(int lanes) { return kRowThreads / lanes; }

// Where a thread stands.
struct RowLanes {
  int count, lane;
  int64_t row;  // of all; the launch has more rows than there are

  DSV4_DEVICE explicit RowLanes(int lanes) : count(lanes), lane(ptx::thread_index() & (lanes - 1)) {
    const int shift = ptx::count_ones(static_cast<uint32_t>(lanes - 1));  // a power of two
    row = ptx::block_index_x() * (kRowThreads >> shift) + (ptx::thread_index() >> shift);
  }
  // Every lane of a warp on one row: copies of it where it has fewer lanes.
  DSV4_DEVICE RowLanes(int lanes, int64_t the_row)
      : count(lanes), lane(ptx::thread_index() % 32 & (lanes - 1)), row(the_row) {}
  DSV4_DEVICE int step() const { return 8 * count; }
};

// Eight elements at `column`, zeros past the end of the row. vector: the launcher found rows to be made of whole
// eights, aligned to 16 bytes.
DSV4_DEVICE void load_eight(const bf16* row, int column, int dim, bool vector, float (&value)[8]) {
  if (column >= dim) {
    DSV4_UNROLL
    for (int e = 0; e < 8; ++e) value[e] = 0.0f;
  } else {
    unpack(load_piece(row, column, dim, vector), value);
  }
}

DSV4_DEVICE void load_eight(const float* row, int column, int dim, bool vector, float (&value)[8]) {
  DSV4_UNROLL
  for (int half = 0; half < 8; half += 4) {
    float part[4] = {0.0f, 0.0f, 0.0f, 0.0f};
    if (column + half < dim) unpack(load_piece(row, column + half, dim, vector), part);
    DSV4_UNROLL
    for (int e = 0; e < 4; ++e) value[half + e] = part[e];
  }
}

DSV4_DEVICE void store_eight(bf16* row, int column, int dim, bool vector, const float (&value)[8]) {
  if (column < dim) store_piece(row, column, dim, vector, pack(value));
}

DSV4_DEVICE void store_eight(float* row, int column, int dim, bool vector, const float (&value)[8]) {
  DSV4_UNROLL
  for (int half = 0; half < 8; half += 4) {
    const float part[4] = {value[half], value[half + 1], value[half + 2], value[half + 3]};
    if (column + half < dim) store_piece(row, column + half, dim, vector, pack(part));
  }
}

// A row in global memory.
template <class X>
struct GlobalRow {
  const X* data;
  int dim;
  bool vector;

  DSV4_DEVICE void eight(int column, float (&value)[8]) const { load_eight(data, column, dim, vector, value); }
  DSV4_DEVICE float one(int column) const { return to_float(data[column]); }
};

// To X and back.
DSV4_DEVICE float rounded_to(float value, bf16) { return ptx::low_bf16(ptx::pack_bf16(value, 0.0f)); }
DSV4_DEVICE float rounded_to(float value, float) { return value; }
template <class X>
DSV4_DEVICE float rounded_to(float value) {
  return rounded_to(value, X{});
}

DSV4_DEVICE void round_eight(float (&value)[8], bf16) { unpack(pack(value), value); }
DSV4_DEVICE void round_eight(float (&)[8], float) {}

// The sum over a row's lanes, in each of them.
DSV4_DEVICE TwoFloats sum_of_row(TwoFloats sum, const RowLanes& lanes) {
  for (int mask = 1; mask < lanes.count; mask *= 2) {
    const float high = ptx::shuffle_xor(sum.high, mask);
    const float low = ptx::shuffle_xor(sum.low, mask);
    sum = add(sum, {high, low});
  }
  return sum;
}

// The bits of the largest magnitude of the first `count`.
DSV4_DEVICE uint32_t largest_magnitude(const float (&value)[8], int count) {
  uint32_t largest = 0;
  DSV4_UNROLL
  for (int e = 0; e < 8; ++e) {
    const uint32_t bits = e < count ? bits_from_float(value[e]) & 0x7FFFFFFFu : 0;
    largest = largest < bits ? bits : largest;
  }
  return largest;
}

// The largest of `count` neighbouring lanes of a row, in each of them.
DSV4_DEVICE uint32_t largest_of_lanes(uint32_t value, int count) {
  for (int mask = 1; mask < count; mask *= 2) {
    const uint32_t other = ptx::shuffle_xor(value, mask);
    value = value < other ? other : value;
  }
  return value;
}

// Of a row's elements, which `scale` has been multiplied into.
struct SumOfSquares {
  TwoFloats sum;
  float scale;
};

inline constexpr float kSmall = 0x1p-80f, kLargeSum = 0x1p80f;

// Squares as they are, or rounded to X; kScaled: of elements times kSmall.
struct ExactSquare {
  template <bool kScaled>
  DSV4_DEVICE static TwoFloats add_to(const TwoFloats& sum, float x) {
    if (kScaled) x = ptx::multiply(x, kSmall);
    return add(sum, two_product(x, x));
  }
};
template <class X>
struct RoundedSquare {
  template <bool kScaled>
  DSV4_DEVICE static TwoFloats add_to(const TwoFloats& sum, float x) {
    float square = rounded_to<X>(ptx::multiply(x, x));
    if (kScaled) square = ptx::multiply(ptx::multiply(square, kSmall), kSmall);
    return add(sum, square);
  }
};

template <class Square, bool kScaled, class Row>
DSV4_DEVICE TwoFloats squares_of_row(const RowLanes& lanes, const Row& row) {
  TwoFloats sum = {0.0f, 0.0f};
  for (int column = 8 * lanes.lane; column < row.dim; column += lanes.step()) {
    float value[8];
    row.eight(column, value);
    DSV4_UNROLL
    for (int e = 0; e < 8; ++e) sum = Square::template add_to<kScaled>(sum, value[e]);
  }
  return sum_of_row(sum, lanes);
}

// Where a sum of the warp's is so large that float32 does not hold it, or not both halves of its root's square, its
// rows are read again, small enough.
template <class Square, class Row>
DSV4_DEVICE SumOfSquares sum_of_squares(const RowLanes& lanes, const Row& row) {
  const TwoFloats sum = squares_of_row<Square, false>(lanes, row);
  const bool lost = !(sum.high < kLargeSum);
  const uint32_t any_lost = ptx::ballot(lost);
  if (any_lost == 0) return {sum, 1.0f};
  const TwoFloats small = squares_of_row<Square, true>(lanes, row);
  return lost ? SumOfSquares{small, kSmall} : SumOfSquares{sum, 1.0f};
}

// Dims [passed, dim) of a row are rotated, in pairs from `passed` on.
struct RowRope {
  const float* turn;  // (cos, sin) of the first pair
  int passed, dim;
  float way;    // 1, or -1 to rotate back
  bool vector;  // eights are of whole pairs, whose turns are aligned

  DSV4_DEVICE bool covers(int column) const { return column + 8 > passed && column < dim; }
  // Whether pairs lie across the borders of eights.
  DSV4_DEVICE bool across() const { return passed % 2 != 0; }

  // Rotates what is to be rotated of an eight that it covers. before, after: the elements beside it, where `across`.
  // kNearest: to the nearest float32 of the exact result; else with a rounding of each product.
  template <bool kNearest = true>
  DSV4_DEVICE void rotate(int column, float (&value)[8], float before, float after) const {
    if (vector) {
      const float* turns = turn + (column - passed);
      DSV4_UNROLL
      for (int half = 0; half < 8; half += 4) {
        float two[4];
        unpack(ptx::load_global_16(turns + half), two);
        rotate_pair<kNearest>(value[half], value[half + 1], two[0], ptx::multiply(two[1], way));
        rotate_pair<kNearest>(value[half + 2], value[half + 3], two[2], ptx::multiply(two[3], way));
      }
    } else {
      rotate_slowly<kNearest>(column, value, before, after);
    }
  }

 private:
  template <bool kNearest>
  DSV4_DEVICE static float products(float a, float b, float c, float d) {
    return kNearest ? sum_of_products(a, b, c, d) : ptx::fma(c, d, ptx::multiply(a, b));
  }

  template <bool kNearest>
  DSV4_DEVICE static void rotate_pair(float& even, float& odd, float cos, float sin) {
    const float turned = products<kNearest>(even, cos, -odd, sin);
    odd = products<kNearest>(even, sin, odd, cos);
    even = turned;
  }

  template <bool kNearest>
  DSV4_DEVICE void rotate_slowly(int column, float (&value)[8], float before, float after) const {
    float last = before;
    DSV4_UNROLL
    for (int e = 0; e < 8; ++e) {
      const int at = column + e - passed;
      const float own = value[e], next = e < 7 ? value[e < 7 ? e + 1 : e] : after;
      if (at >= 0 && column + e < dim) {
        const float cos = turn[at / 2 * 2], sin = ptx::multiply(turn[at / 2 * 2 + 1], way);
        value[e] = at % 2 == 0 ? products<kNearest>(own, cos, -next, sin) : products<kNearest>(last, sin, own, cos);
      }
      last = own;
    }
  }
};

// The eight at `column` of a row after a norm and the rotation, each rounded to N.
template <class N, class Row, class Norm>
DSV4_DEVICE void norm_rope_eight(const Row& row, const Norm& norm, const RowRope& rope, int column, float (&value)[8]) {
  row.eight(column, value);
  norm.eight(column, value);
  round_eight(value, N{});
  if (!rope.covers(column)) return;
  float before = 0.0f, after = 0.0f;
  if (rope.across()) {
    if (column > 0) before = rounded_to<N>(norm.one(column - 1, row.one(column - 1)));
    if (column + 8 < rope.dim) after = rounded_to<N>(norm.one(column + 8, row.one(column + 8)));
  }
  rope.rotate(column, value, before, after);
  round_eight(value, N{});
}

}  // namespace dsv4::sm80
