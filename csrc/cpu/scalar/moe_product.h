// What the driver of the experts (cpu/moe_driver.h) asks of a kernel, portable: sums in double precision, rounded once.
#pragma once

#include <math.h>

#include "cpu/moe_driver.h"
#include "cpu/scalar/quantised.h"

namespace dsv4::scalar {
namespace {

// A row of weights as values.
template <class X>
void expand(const ExpertMatrix& w, int64_t expert, int64_t row, int64_t in, double* to) {
  if (w.format == WeightFormat::kPlain) {
    const X* values = w.data.as<const X>().at(expert, row);
    for (int64_t i = 0; i < in; ++i) to[i] = to_float(values[i]);
    return;
  }
  const bool fp4 = w.format == WeightFormat::kFp4;
  const uint8_t* codes = w.data.as<const uint8_t>().at(expert, row);
  const auto scale = [&](int64_t i) -> double {
    const int64_t r = fp4 ? row : row / 128, c = i / (fp4 ? 32 : 128);
    return w.scale.dtype == DType::kFloat32 ? *w.scale.as<const float>().at(expert, r, c)
                                            : e8m0_value(*w.scale.as<const uint8_t>().at(expert, r, c));
  };
  for (int64_t i = 0; i < in; ++i) {
    const uint8_t pair = codes[i / 2];
    to[i] = (fp4 ? e2m1_value(i % 2 == 0 ? pair & 15 : pair >> 4) : e4m3_value(codes[i])) * scale(i);
  }
}

struct ExpertKernel {
  template <class X>
  static int64_t row_bytes(WeightFormat, int64_t n) {
    return n * static_cast<int64_t>(sizeof(float));
  }

  template <class X>
  static void prepare(WeightFormat format, const X* x, int64_t n, uint8_t* to_) {
    float* to = reinterpret_cast<float*>(to_);
    if (format == WeightFormat::kPlain) {
      for (int64_t i = 0; i < n; ++i) to[i] = to_float(x[i]);
    } else {
      quantise(x, n, to);
    }
  }

  static int64_t memory(int64_t in) { return in * static_cast<int64_t>(sizeof(double)); }

  template <class X>
  static void project(const ExpertMatrix& w, int64_t expert, int64_t row, int64_t rows, int64_t in,
                      const uint8_t* const* x, int64_t count, float* out, uint8_t* memory) {
    double* weights = reinterpret_cast<double*>(memory);
    for (int64_t r = 0; r < rows; ++r) {
      expand<X>(w, expert, row + r, in, weights);
      for (int64_t c = 0; c < count; ++c) {
        const float* values = reinterpret_cast<const float*>(x[c]);
        double sum = 0;
        for (int64_t i = 0; i < in; ++i) sum += values[i] * weights[i];
        out[c * kMoeOutputs + r] = static_cast<float>(sum);
      }
    }
  }

  template <class X>
  static void activate(const float* gate, const float* up, float weight, float limit, int64_t n, X* out) {
    for (int64_t i = 0; i < n; ++i) {
      double g = to_float(from_float<X>(gate[i])), u = to_float(from_float<X>(up[i]));
      if (limit > 0) {
        g = g > limit ? limit : g;
        u = u > limit ? limit : u < -limit ? -limit : u;
      }
      out[i] = from_float<X>(static_cast<float>(g / (1 + ::exp(-g)) * u * weight));
    }
  }
};

}  // namespace
}  // namespace dsv4::scalar
