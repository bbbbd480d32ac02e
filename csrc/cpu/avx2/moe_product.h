// Products of activations with one matrix of an expert, and what else the driver of the experts asks of a kernel.
#pragma once

#include "cpu/avx2/product.h"
#include "cpu/moe_driver.h"
#include "cpu/scalar/quantised.h"

namespace dsv4::avx2 {
namespace {

// cpu/moe_driver.h says what each is.
struct ExpertKernel {
  template <class X>
  static int64_t row_bytes(WeightFormat, int64_t n) {
    return round_up(n, kLanes) * static_cast<int64_t>(sizeof(float));
  }

  template <class X>
  static void prepare(WeightFormat format, const X* x, int64_t n, uint8_t* to_) {
    float* to = reinterpret_cast<float*>(to_);
    if (format == WeightFormat::kPlain) return widen(x, n, to);
    scalar::quantise(x, n, to);
    for (int64_t i = n; i % kLanes != 0; ++i) to[i] = 0;
  }

  static int64_t memory(int64_t) { return kPanelBytes; }

  template <class X>
  static void expand(const ExpertMatrix& w, int64_t expert, int64_t row, int64_t first, int64_t count, float* to) {
    if (w.format == WeightFormat::kPlain) return widen(w.data.as<const X>().at(expert, row, first), count, to);
    const uint8_t* codes = w.data.as<const uint8_t>().at(expert, row);
    const int64_t scale_row = w.format == WeightFormat::kFp4 ? row : row / 128;
    const auto scale = [&](int64_t block) {
      return w.scale.dtype == DType::kFloat32 ? *w.scale.as<const float>().at(expert, scale_row, block)
                                              : e8m0_value(*w.scale.as<const uint8_t>().at(expert, scale_row, block));
    };
    if (w.format == WeightFormat::kFp4) {
      expand_codes<true>(codes, w.data.stride[1], first, count, scale, to);
    } else {
      expand_codes<false>(codes, w.data.stride[1], first, count, scale, to);
    }
  }

  template <class X>
  static void project(const ExpertMatrix& w, int64_t expert, int64_t row, int64_t rows, int64_t in,
                      const uint8_t* const* x, int64_t count, float* out, uint8_t* memory) {
    product([&](int64_t r, int64_t first, int64_t n, float* to) { expand<X>(w, expert, row + r, first, n, to); }, rows,
            in, reinterpret_cast<float*>(memory), [&](int64_t c) { return reinterpret_cast<const float*>(x[c]); },
            count, [&](int64_t c) { return out + c * kMoeOutputs; });
  }

  template <class X>
  static void activate(const float* gate, const float* up, float weight, float limit, int64_t n, X* out) {
    const X* type = nullptr;
    const __m256 most = _mm256_set1_ps(limit), least = _mm256_set1_ps(-limit);
    for (int64_t i = 0; i < n; i += kLanes) {
      const int64_t left = n - i;
      __m256 g = rounded(left < kLanes ? load(gate + i, left) : load(gate + i), type);
      __m256 u = rounded(left < kLanes ? load(up + i, left) : load(up + i), type);
      if (limit > 0) {  // the second operand comes through where it is NaN
        g = _mm256_min_ps(most, g);
        u = _mm256_max_ps(least, _mm256_min_ps(most, u));
      }
      const __m256 value = _mm256_mul_ps(_mm256_mul_ps(_mm256_mul_ps(g, sigmoid(g)), u), _mm256_set1_ps(weight));
      left < kLanes ? store(out + i, value, left) : store(out + i, value);
    }
  }
};

}  // namespace
}  // namespace dsv4::avx2
