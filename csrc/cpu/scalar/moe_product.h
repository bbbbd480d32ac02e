// What the driver of the experts (cpu/moe_driver.h) asks of a kernel, portable: sums in double precision, rounded once.
#pragma once

#include <math.h>

#include "cpu/moe_driver.h"

namespace dsv4::scalar {
namespace {

// A float32 value in [-448, 448] rounded to e4m3, as a value.
float round_e4m3(float value) {
  const float magnitude = value < 0 ? -value : value;
  if (magnitude < 0.015625f) return (value + (value < 0 ? -24576.0f : 24576.0f)) - (value < 0 ? -24576.0f : 24576.0f);
  const uint32_t bits = bits_from_float(value);
  return float_from_bits((bits + 0x7FFFFu + ((bits >> 20) & 1u)) & 0xFFF00000u);
}

// Up to 128 values that share a scale (python/dsv4/ops/quantize.py).
template <class X>
void quantise_block(const X* x, int64_t n, float* to) {
  float largest = 1e-4f;
  bool finite = true;
  for (int64_t i = 0; i < n; ++i) {
    const uint32_t magnitude = bits_from_float(to_float(x[i])) & 0x7FFFFFFFu;
    finite = finite && magnitude < 0x7F800000u;
    if (finite && float_from_bits(magnitude) > largest) largest = float_from_bits(magnitude);
  }
  const uint32_t ratio = bits_from_float(largest * (1.0f / 448.0f));
  const uint32_t exponent = (ratio >> 23) + ((ratio & 0x7FFFFFu) != 0);
  const float scale = finite ? float_from_bits(exponent << 23) : float_from_bits(0x7FC00000u);
  for (int64_t i = 0; i < n; ++i) {
    float value = to_float(x[i]) / scale;
    value = value > 448 ? 448 : value < -448 ? -448 : value;
    to[i] = (finite ? round_e4m3(value) : 0) * scale;
  }
}

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
      for (int64_t i = 0; i < n; i += 128) quantise_block(x + i, n - i < 128 ? n - i : 128, to + i);
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
