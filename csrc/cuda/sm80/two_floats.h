// A number as the unevaluated sum of two floats, of which the second is what the first's rounding left: some 48 bits,
// twice what float32 has, from float32 instructions alone. float64 would be as exact, but GPUs without many float64
// units compute it at a 64th of the speed. A result rounded from here to float32 is the rounding of the exact one but
// for ties within 2^-45, so norms and rotations have the bits of their float64 definitions.
//
// What is not finite counts by its first float.
#pragma once

#include "cuda/common/ptx.h"

namespace dsv4::sm80 {

struct TwoFloats {
  float high, low;
};

DSV4_DEVICE bool is_finite(float x) { return (bits_from_float(x) & 0x7FFFFFFFu) < 0x7F800000u; }

// a + b, exactly.
DSV4_DEVICE TwoFloats two_sum(float a, float b) {
  const float sum = ptx::add(a, b), of_b = ptx::add(sum, -a), of_a = ptx::add(sum, -of_b);
  return {sum, ptx::add(ptx::add(a, -of_a), ptx::add(b, -of_b))};
}

// a * b, exactly, but for what lies below 2^-149.
DSV4_DEVICE TwoFloats two_product(float a, float b) {
  const float product = ptx::multiply(a, b);
  return {product, ptx::fma(a, b, -product)};
}

// The same whichever comes first.
DSV4_DEVICE TwoFloats add(const TwoFloats& a, const TwoFloats& b) {
  const TwoFloats sum = two_sum(a.high, b.high);
  return {sum.high, ptx::add(sum.low, ptx::add(a.low, b.low))};
}

DSV4_DEVICE TwoFloats add(const TwoFloats& a, float b) {
  const TwoFloats sum = two_sum(a.high, b);
  return {sum.high, ptx::add(sum.low, a.low)};
}

// Zeros keep their sign.
DSV4_DEVICE float nearest(const TwoFloats& x) {
  return is_finite(x.high) && x.low != 0.0f ? ptx::add(x.high, x.low) : x.high;
}

DSV4_DEVICE TwoFloats divide(const TwoFloats& a, float b) {
  const float quotient = ptx::divide(nearest(a), b);
  const float rest = ptx::add(ptx::fma(-quotient, b, a.high), a.low);
  return {quotient, ptx::divide(rest, b)};
}

DSV4_DEVICE TwoFloats quotient(float a, const TwoFloats& b) {
  const float quotient = ptx::divide(a, b.high);
  const float rest = ptx::fma(-quotient, b.low, ptx::fma(-quotient, b.high, a));
  return {quotient, ptx::divide(rest, b.high)};
}

// 1 / sqrt(x), by one step of Newton's from the float32 result.
DSV4_DEVICE TwoFloats inverse_root(const TwoFloats& x) {
  const float root = ptx::divide(1.0f, ptx::square_root(nearest(x)));
  const TwoFloats square = two_product(root, root);
  float rest = ptx::fma(-x.high, square.high, 1.0f);
  rest = ptx::fma(-x.high, square.low, rest);
  rest = ptx::fma(-x.low, square.high, rest);
  const float low = ptx::multiply(ptx::multiply(root, 0.5f), rest);
  return {root, low > -root && low < root ? low : 0.0f};  // no correction to infinities, nor where the square is none
}

// a * b + c * d to the nearest float.
DSV4_DEVICE float sum_of_products(float a, float b, float c, float d) {
  return nearest(add(two_product(a, b), two_product(c, d)));
}

}  // namespace dsv4::sm80
