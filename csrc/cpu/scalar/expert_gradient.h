// The gradient of an expert's activation in double precision, each result rounded once.
#pragma once

#include <math.h>

#include "cpu/moe_backward_driver.h"

namespace dsv4::scalar {
namespace {

// The sum of grad * silu(gate) * up over n inner values of a row, and what goes on from them.
template <class X>
float activate_backward(const float* gate, const float* up, const float* grad, float weight, float limit, int64_t n,
                        const MoeInner<X>& to) {
  double sum = 0;
  for (int64_t i = 0; i < n; ++i) {
    const double raw_gate = to_float(from_float<X>(gate[i])), raw_up = to_float(from_float<X>(up[i]));
    const bool clamps = limit > 0, clamps_up = clamps && (raw_up > limit || raw_up < -limit);
    const double g = clamps && raw_gate > limit ? limit : raw_gate;
    const double u = !clamps_up ? raw_up : raw_up > 0 ? limit : -limit;
    const double sigmoid = 1 / (1 + ::exp(-g)), silu = g * sigmoid, weighted = static_cast<double>(grad[i]) * weight;
    const double slope = sigmoid * (1 + g * (1 - sigmoid));
    sum += grad[i] * silu * u;
    to.hidden[i] = from_float<X>(static_cast<float>(silu * u * weight));
    to.grad_gate[i] = from_float<X>(clamps && raw_gate > limit ? 0.0f : static_cast<float>(weighted * u * slope));
    to.grad_up[i] = from_float<X>(clamps_up ? 0.0f : static_cast<float>(weighted * silu));
  }
  return static_cast<float>(sum);
}

}  // namespace
}  // namespace dsv4::scalar
