// cos and sin of rotary angles, from the same operations in every instruction set, so that tables agree to the bit.
// Float64 throughout: x = n pi / 2 + r with |r| <= pi / 4 (pi / 2 in parts of 22 bits, whose products with n are
// exact), then the series of both; their remainders are below 2^-56. Rounded to float32 that is the nearest float but
// for angles whose cosine or sine lies as close to the middle between two.
#pragma once

#include <math.h>

#include "common/dtype.h"

namespace dsv4 {

inline constexpr float kMostReducedAngle = 0x1p30f;  // beyond, n has too many bits

template <class D>
struct QuarterTurn {
  D cos, sin;  // of r
  D quarters;  // n
};

// D: double, or a vector of them.
template <class D>
DSV4_HOST_DEVICE QuarterTurn<D> quarter_turn(D angle) {
  constexpr double kRound = 0x1.8p52;  // adding and taking it away rounds to an integer
  const D n = (angle * 0x1.45f306dc9c883p-1 + kRound) - kRound;
  const D r = (((angle - n * 0x1.921fbp+0) - n * 0x1.5110bp-22) - n * 0x1.184698p-44) - n * 0x1.3198a2e037073p-69;
  const D s = r * r;
  D cosine = s * (-1.0 / 87178291200) + 1.0 / 479001600;
  cosine = cosine * s - 1.0 / 3628800;
  cosine = cosine * s + 1.0 / 40320;
  cosine = cosine * s - 1.0 / 720;
  cosine = cosine * s + 1.0 / 24;
  cosine = cosine * s - 0.5;
  cosine = cosine * s + 1.0;
  D sine = s * (-1.0 / 1307674368000) + 1.0 / 6227020800;
  sine = sine * s - 1.0 / 39916800;
  sine = sine * s + 1.0 / 362880;
  sine = sine * s - 1.0 / 5040;
  sine = sine * s + 1.0 / 120;
  sine = sine * s - 1.0 / 6;
  return {cosine, sine * s * r + r, n};
}

// turn = (cos, sin) of the angle that was split.
DSV4_HOST_DEVICE void join_turn(const QuarterTurn<double>& of, float* turn) {
  const int64_t n = static_cast<int64_t>(of.quarters);
  const double cosine = n & 1 ? of.sin : of.cos, sine = n & 1 ? of.cos : of.sin;
  turn[0] = static_cast<float>((n + 1) & 2 ? -cosine : cosine);
  turn[1] = static_cast<float>(n & 2 ? -sine : sine);
}

// turn = (cos, sin) of the angle, whatever it is.
DSV4_HOST_DEVICE void turn_of(float angle, float* turn) {
  if (!(fabsf(angle) <= kMostReducedAngle)) {
    turn[0] = static_cast<float>(::cos(static_cast<double>(angle)));
    turn[1] = static_cast<float>(::sin(static_cast<double>(angle)));
    return;
  }
  join_turn(quarter_turn(static_cast<double>(angle)), turn);
}

}  // namespace dsv4
