// Arithmetic on rows of float32, portable: what cpu/page_writer.h and cpu/compressor.h are made of.
#pragma once

#include <cmath>

#include "common/pages.h"
#include "common/turns.h"
#include "cpu/compress.h"

namespace dsv4::scalar {

// Element d of a row whose pairs, from `still` on, are turned back by their (cos, sin).
template <class X>
double turned_back(const X* row, int64_t d, int64_t still, const float* rope) {
  if (d < still) return to_float(row[d]);
  const int64_t odd = (d - still) % 2;
  const double cos = rope[d - still - odd], sin = rope[d - still - odd + 1];
  return to_float(row[d]) * cos + (odd == 1 ? -to_float(row[d - 1]) : to_float(row[d + 1])) * sin;
}

struct Lanes {
  static double square_root(double x) { return std::sqrt(x); }

  // To N and back, as from a float64 result: by way of float32.
  template <class N>
  static float rounded(double value) {
    return to_float(from_float<N>(static_cast<float>(value)));
  }

  template <class T>
  void load(const T* from, int64_t count, float* row) const {
    for (int64_t d = 0; d < count; ++d) row[d] = to_float(from[d]);
  }

  template <class T>
  void store(const float* row, int64_t count, T* to) const {
    for (int64_t d = 0; d < count; ++d) {
      const T value = from_float<T>(row[d]);
      memcpy(to + d, &value, sizeof(value));  // a byte row need not be aligned
    }
  }

  template <class X>
  double sum_of_squares(const X* row, int64_t count) const {
    double parts[8] = {};
    for (int64_t d = 0; d < count; ++d) parts[d % 8] += static_cast<double>(to_float(row[d])) * to_float(row[d]);
    return ((parts[0] + parts[4]) + (parts[2] + parts[6])) + ((parts[1] + parts[5]) + (parts[3] + parts[7]));
  }

  // The row times `root` times the weight, if any, rounded to N.
  template <class N, class X, class W, class R>
  void scale(const X* row, int64_t count, double root, const W* weight, R* result) const {
    for (int64_t d = 0; d < count; ++d) {
      result[d] = from_float<R>(rounded<N>(to_float(row[d]) * root * weight_at(weight, d)));
    }
  }

  // (cos, sin) of position times each frequency.
  void turns(float position, const float* frequency, int64_t pairs, float* result) const {
    for (int64_t i = 0; i < pairs; ++i) turn_of(position * frequency[i], result + 2 * i);
  }

  // Each pair turned by its (cos, sin), or back, rounded to N.
  template <class N, class R>
  void rotate(R* pair, const float* rope, int64_t pairs, bool inverse = false) const {
    for (int64_t i = 0; i < pairs; ++i, pair += 2, rope += 2) {
      const double even = to_float(pair[0]), odd = to_float(pair[1]), cos = rope[0], sin = inverse ? -rope[1] : rope[1];
      pair[0] = from_float<R>(rounded<N>(even * cos - odd * sin));
      pair[1] = from_float<R>(rounded<N>(even * sin + odd * cos));
    }
  }

  // The sum of grad, its pairs turned back, times x and the weight, if any.
  template <class G, class X, class W>
  double norm_product(const G* grad, const X* x, const W* weight, int64_t count, const float* rope,
                      int64_t pairs) const {
    double sum = 0;
    for (int64_t d = 0; d < count; ++d) {
      sum += turned_back(grad, d, count - 2 * pairs, rope) * to_float(x[d]) * weight_at(weight, d);
    }
    return sum;
  }

  // result = grad, its pairs turned back, times the weight, if any, times root, less x times along; the first without
  // the weight, times x, is added to `sums`, if any.
  template <class G, class X, class W, class R>
  void norm_gradient(const G* grad, const X* x, const W* weight, int64_t count, const float* rope, int64_t pairs,
                     double root, double along, double* sums, R* result) const {
    for (int64_t d = 0; d < count; ++d) {
      const double g = turned_back(grad, d, count - 2 * pairs, rope) * root;
      put(g * weight_at(weight, d) - to_float(x[d]) * along, result + d);
      if (sums != nullptr) sums[d] += g * to_float(x[d]);
    }
  }

  // The row times the Hadamard matrix times `factor`, rounded to N; work has room for it in float64.
  template <class N, class X, class R>
  void hadamard(const X* row, int64_t count, double factor, double* work, R* result) const {
    for (int64_t d = 0; d < count; ++d) work[d] = to_float(row[d]);
    for (int64_t half = 1; half < count; half *= 2) {
      for (int64_t start = 0; start < count; start += 2 * half) {
        for (int64_t d = start; d < start + half; ++d) {
          const double a = work[d], b = work[d + half];
          work[d] = a + b;
          work[d + half] = a - b;
        }
      }
    }
    for (int64_t d = 0; d < count; ++d) result[d] = from_float<R>(rounded<N>(work[d] * factor));
  }

  // Both return the block's scale.
  template <class X>
  uint8_t quantize_fp8(const X* row, int64_t count, uint8_t* codes) const {
    const uint8_t scale = fp8_scale(largest(row, count));
    for (int64_t d = 0; d < count; ++d) {
      codes[d] = scale == 255 ? 0x7F : e4m3_code(to_float(row[d]) * inverse_scale(scale));
    }
    return scale;
  }
  template <class X>
  uint8_t quantize_fp4(const X* row, int64_t count, uint8_t* codes) const {
    const uint8_t scale = fp4_scale(largest(row, count));
    for (int64_t d = 0; d < count; d += 2) {
      codes[d / 2] = static_cast<uint8_t>(e2m1(row[d], scale) | e2m1(row[d + 1], scale) << 4);
    }
    return scale;
  }

  // A block as it is after quantize_fp4, rounded to X.
  template <class X>
  void fp4_round_trip(const float* row, int64_t count, X* result) const {
    const uint8_t scale = fp4_scale(largest(row, count));
    for (int64_t d = 0; d < count; ++d) result[d] = from_float<X>(e2m1_value(e2m1(row[d], scale)) * e8m0_value(scale));
  }

  template <class X>
  void dequantize_fp8(const uint8_t* codes, int64_t count, float scale, X* result) const {
    for (int64_t d = 0; d < count; ++d) result[d] = from_float<X>(e4m3_value(codes[d]) * scale);
  }
  template <class X>
  void dequantize_fp4(const uint8_t* codes, int64_t count, float scale, X* result) const {
    for (int64_t d = 0; d < count; ++d) {
      result[d] = from_float<X>(e2m1_value(static_cast<uint8_t>(codes[d / 2] >> 4 * (d % 2) & 15)) * scale);
    }
  }

  // row[d] = sum of kv[d] over the rows, weighted by the softmax of their gates, rounded to N.
  template <class N>
  void pool(const PooledRow* rows, int64_t count, int64_t dims, float* row) const {
    for (int64_t d = 0; d < dims; ++d) {
      row[d] = rounded<N>(PoolSums(rows, count, d).mean);
    }
  }

  // The gradients of that row's positions from its own; all are in the order of `rows`.
  void pool_gradient(const PooledRow* rows, const PooledGradient* to, int64_t count, int64_t dims, const double* grad,
                     double*) const {
    for (int64_t d = 0; d < dims; ++d) {
      const PoolSums sums(rows, count, d);
      const double share = grad[d] / sums.weights;
      for (int64_t i = 0; i < count; ++i) {
        const double value = std::exp(gate(rows[i], d) - sums.most) * share;
        to[i].kv[d] = static_cast<float>(value);
        to[i].gate[d] = static_cast<float>(value * (rows[i].kv[d] - sums.mean));
      }
    }
  }

  void add(const float* a, const float* b, int64_t count, float* sum) const {
    for (int64_t d = 0; d < count; ++d) sum[d] = a[d] + b[d];
  }

 private:
  template <class W>
  static double weight_at(const W* weight, int64_t d) {
    return weight == nullptr ? 1.0 : to_float(weight[d]);
  }

  template <class R>
  static void put(double value, R* to) {
    *to = from_float<R>(static_cast<float>(value));
  }
  static void put(double value, double* to) { *to = value; }

  static double gate(const PooledRow& row, int64_t d) {
    return row.ape == nullptr ? row.gate[d] : row.gate[d] + row.ape[d];  // a sum in float32, as state holds it
  }

  // Of a channel: the largest gate, the sum of the weights below it, and the weighted mean of kv.
  struct PoolSums {
    double most = -INFINITY, weights = 0, mean = 0;

    PoolSums(const PooledRow* rows, int64_t count, int64_t d) {
      for (int64_t i = 0; i < count; ++i) most = std::fmax(most, gate(rows[i], d));
      double values = 0;
      for (int64_t i = 0; i < count; ++i) {
        const double weight = std::exp(gate(rows[i], d) - most);
        weights += weight;
        values += weight * rows[i].kv[d];
      }
      mean = values / weights;
    }
  };

  // A block that is not finite has codes of 0.
  template <class X>
  static uint8_t e2m1(X value, uint8_t scale) {
    return scale == 255 ? uint8_t{0} : e2m1_code(to_float(value) * inverse_scale(scale));
  }

  template <class X>
  static uint32_t largest(const X* row, int64_t count) {
    uint32_t most = 0;
    for (int64_t d = 0; d < count; ++d) {
      const uint32_t magnitude = bits_from_float(to_float(row[d])) & 0x7FFFFFFFu;
      most = magnitude > most ? magnitude : most;
    }
    return most;
  }
};

}  // namespace dsv4::scalar
