// Products of activations with one quantised matrix of an expert, and what else the driver of the experts
// (cpu/moe_driver.h) asks of a kernel.
#pragma once

#include "cpu/avx512/plain_rows.h"
#include "cpu/avx512/weight_panel.h"
#include "cpu/moe_driver.h"

namespace dsv4::avx512 {
namespace {

inline constexpr int64_t kAhead = 8;        // rows of codes to ask for before they are needed
inline constexpr int64_t kFewOutputs = 32;  // rows of weights that few rows of activations meet at a time
inline constexpr int64_t kPlainRows = 8;    // of activations, for which weights in bfloat16 are not transposed
inline constexpr int64_t kTogether = 4;     // rows of activations that are brought together, where nothing folds

// Rows [row, row + rows), at most kMoeOutputs, of one quantised matrix with `count` rows of activations. Rows are
// taken from the beginning of a block of 128 outputs, so that what is decided for them is decided by the weights alone.
template <class Rows>
class Product {
 public:
  static int64_t memory(int64_t in) {
    return kPanelWords * static_cast<int64_t>(sizeof(uint32_t)) +
           kFewRows * near_stride(in) * static_cast<int64_t>(sizeof(bf16)) + scales_memory(in);
  }

  Product(const ExpertMatrix& w, int64_t expert, int64_t in, const uint8_t* const* x, int64_t count, float* out,
          uint8_t* memory)
      : w_(w),
        expert_(expert),
        in_(in),
        x_(x),
        count_(count),
        out_(out),
        panel_(reinterpret_cast<uint32_t*>(memory)),
        near_(reinterpret_cast<bf16*>(panel_ + kPanelWords)),
        scales_(reinterpret_cast<uint8_t*>(near_ + kFewRows * near_stride(in))) {}

  void run(int64_t row, int64_t rows) {
    row_ = row, rows_ = rows;
    if (!folds()) {
      multiply_and_scale();
    } else if (count_ > kFewRows) {
      multiply_many(expand_, weights(0, rows_), count_, panel_, out_, [&](int64_t m) { return activations(m); });
    } else {
      few();
    }
  }

 protected:
  using Scale = typename Rows::Scale;
  static constexpr int64_t kScales = Rows::kScales;
  static_assert(kMoeOutputs <= kPanelOutputs, "rows of a panel");
  static int64_t near_stride(int64_t in) { return blocks_of(in) * kBlock + kRowGap; }
  // Of all rows, folded, or of one as floats.
  static int64_t scales_memory(int64_t in) {
    const int64_t rows = kScales == 1 ? 1 : kMoeOutputs;
    return round_up(rows * blocks_of(in) * kScales * static_cast<int64_t>(sizeof(float)), 64);
  }

  const uint8_t* codes(int64_t r) const { return w_.data.as<const uint8_t>().at(expert_, row_ + r); }
  const uint8_t* scale_row(int64_t r) const {
    return w_.scale.as<const uint8_t>().at(expert_, kScales == 1 ? (row_ + r) / 128 : row_ + r);
  }
  // Whether rows of weights have scales of their own, one after another in memory.
  bool dense_scales() const { return kScales > 1 && w_.scale.stride[1] == w_.scale.size(2); }
  const bf16* activations(int64_t m) const { return reinterpret_cast<const bf16*>(x_[m]); }

  void bring(int64_t m, bf16* to) const {
    __builtin_memcpy(to, activations(m), static_cast<size_t>(blocks_of(in_) * kBlock) * sizeof(bf16));
  }

  // Whether the scales of all rows are powers of two that expanded weights can take.
  bool folds() const {
    if (w_.scale.dtype != DType::kUInt8) return false;
    __m512i least = _mm512_set1_epi8(127), most = _mm512_set1_epi8(127);
    const bool dense = dense_scales();  // all rows as one
    const int64_t count = dense ? rows_ * w_.scale.size(2) : w_.scale.size(2);
    for (int64_t r = 0; r < rows_; r += kScales == 1 || dense ? 128 : 1) {
      const uint8_t* scales = scale_row(r);
      for (int64_t i = 0; i < count; i += 64) {
        const __m512i some = _mm512_mask_loadu_epi8(_mm512_set1_epi8(127), mask64(count - i), scales + i);
        least = _mm512_min_epu8(least, some);
        most = _mm512_max_epu8(most, some);
      }
    }
    return _mm512_cmplt_epu8_mask(least, _mm512_set1_epi8(kLeastScale)) == 0 &&
           _mm512_cmpgt_epu8_mask(most, _mm512_set1_epi8(static_cast<char>(Rows::kMostScale))) == 0;
  }

  // Rows [r, r + rows) with their scales as Rows::load takes them.
  WeightRows<Scale> weights(int64_t r, int64_t rows) const {
    const int64_t count = w_.scale.size(2), blocks = blocks_of(in_), padded = blocks * kScales;
    Scale* scales = reinterpret_cast<Scale*>(scales_);
    if (count == padded && dense_scales()) {
      Rows::fold(scale_row(r), rows * count, rows * count, scales);
    } else {
      for (int64_t n = 0; n < (kScales == 1 ? 1 : rows); ++n)
        Rows::fold(scale_row(r + n), count, padded, scales + n * padded);
    }
    return {codes(r), w_.data.stride[1], scales, kScales == 1 ? 0 : padded, rows, Rows::bytes(in_), blocks};
  }

  // Some rows of weights at a time, so that their scales stay in the first-level cache; those of a piece further on are
  // asked for, which comes to nothing beyond the last.
  void few() const {
    const int64_t stride = near_stride(in_);
    for (int64_t m = 0; m < count_ && count_ > 1; ++m) bring(m, near_ + m * stride);
    const bf16* x = count_ > 1 ? near_ : activations(0);
    for (int64_t r = 0; r < rows_; r += kFewOutputs) {
      const WeightRows<Scale> w = weights(r, rows_ - r < kFewOutputs ? rows_ - r : kFewOutputs);
      if (kScales > 1) ask(scale_row(r + kMoeOutputs), w.count * w_.scale.stride[1]);
      FewRows<Rows, Scale>(expand_, w, stride, kMoeOutputs).multiply(x, count_, true, out_ + r);
    }
  }

  void multiply_and_scale() const {
    for (int64_t m = 0; m < count_; m += kTogether) {
      with_constant<kTogether>(count_ - m < kTogether ? count_ - m : kTogether,
                               [&](auto height) { scaled<decltype(height)::value>(m); });
    }
  }

  // Products of blocks, each multiplied by its scale.
  template <int kM>
  void scaled(int64_t m) const {
    const int64_t width = near_stride(in_), count = w_.scale.size(2), padded = blocks_of(in_) * kScales;
    for (int i = 0; i < kM; ++i) bring(m + i, near_ + i * width);
    float* scales = reinterpret_cast<float*>(scales_);
    for (int64_t r = 0; r < rows_; ++r) {
      const int64_t from = kScales == 1 ? (row_ + r) / 128 : row_ + r;
      if (w_.scale.dtype == DType::kUInt8) {
        widen_scales(w_.scale.as<const uint8_t>().at(expert_, from), count, padded, scales);
      } else {
        widen_scales(w_.scale.as<const float>().at(expert_, from), count, padded, scales);
      }
      const uint8_t* next = codes(r) + kAhead * w_.data.stride[1];  // beyond the end it does nothing
      ask(next, Rows::bytes(in_));
      float sums[kM];
      dot_row<kM>(expand_, codes(r), Rows::bytes(in_), scales, near_, width, sums);
      for (int i = 0; i < kM; ++i) out_[(m + i) * kMoeOutputs + r] = sums[i];
    }
  }

  const Rows expand_{};
  const ExpertMatrix& w_;
  int64_t expert_, in_, row_ = 0, rows_ = 0;
  const uint8_t* const* x_;
  int64_t count_;
  float* out_;
  uint32_t* panel_;
  bf16* near_;
  uint8_t* scales_;
};

// What the driver asks of a kernel.
struct MoeKernel {
  template <class X>
  static int64_t row_bytes(WeightFormat format, int64_t n) {
    if (format == WeightFormat::kPlain && sizeof(X) > sizeof(bf16)) return n * static_cast<int64_t>(sizeof(X));
    return blocks_of(n) * kBlock * static_cast<int64_t>(sizeof(bf16));
  }

  template <class X>
  static void prepare(WeightFormat format, const X* x, int64_t n, uint8_t* to) {
    switch (format) {
      case WeightFormat::kFp8:
        quantise_row<Fp8Rows>(x, n, reinterpret_cast<bf16*>(to));
        break;
      case WeightFormat::kFp4:
        quantise_row<Fp4Rows>(x, n, reinterpret_cast<bf16*>(to));
        break;
      default:
        __builtin_memcpy(to, x, static_cast<size_t>(n) * sizeof(X));
        __builtin_memset(to + n * sizeof(X), 0, static_cast<size_t>(row_bytes<X>(format, n)) - n * sizeof(X));
    }
  }

  static int64_t memory(int64_t in) {
    const int64_t fp8 = Product<Fp8Rows>::memory(in), fp4 = Product<Fp4Rows>::memory(in);
    return fp8 > fp4 ? fp8 : fp4;
  }

  template <class X>
  static void project(const ExpertMatrix& w, int64_t expert, int64_t row, int64_t rows, int64_t in,
                      const uint8_t* const* x, int64_t count, float* out, uint8_t* memory) {
    switch (w.format) {
      case WeightFormat::kFp8:
        Product<Fp8Rows>(w, expert, in, x, count, out, memory).run(row, rows);
        break;
      case WeightFormat::kFp4:
        Product<Fp4Rows>(w, expert, in, x, count, out, memory).run(row, rows);
        break;
      default:
        plain<X>(w, expert, row, rows, in, x, count, out, reinterpret_cast<X*>(memory));
    }
  }

  // Many rows of bfloat16 with weights that are transposed once; else four rows at a time, brought together.
  template <class X>
  static void plain(const ExpertMatrix& w, int64_t expert, int64_t row, int64_t rows, int64_t in,
                    const uint8_t* const* x, int64_t count, float* out, X* memory) {
    if constexpr (sizeof(X) == sizeof(bf16)) {
      if (count > kPlainRows) {
        const uint8_t* first = reinterpret_cast<const uint8_t*>(w.data.as<const X>().at(expert, row));
        const int64_t stride = w.data.stride[1] * static_cast<int64_t>(sizeof(X));
        const WeightRows<uint8_t> weights = {first, stride, nullptr, 0, rows, PlainRows::bytes(in), blocks_of(in)};
        return multiply_many(PlainRows{}, weights, count, reinterpret_cast<uint32_t*>(memory), out,
                             [&](int64_t m) { return reinterpret_cast<const bf16*>(x[m]); });
      }
    }
    for (int64_t m = 0; m < count; m += kTogether) {
      const int64_t some = count - m < kTogether ? count - m : kTogether;
      for (int64_t i = 0; i < some; ++i)
        __builtin_memcpy(memory + i * in, x[m + i], static_cast<size_t>(in) * sizeof(X));
      plain_product(memory, in, some, w.data.as<const X>().at(expert, row), w.data.stride[1], rows, in,
                    out + m * kMoeOutputs, kMoeOutputs);
    }
  }

  template <class X>
  static void activate(const float* gate, const float* up, float weight, float limit, int64_t n, X* out) {
    const X* type = nullptr;
    const __m512 most = _mm512_set1_ps(limit > 0 ? limit : __builtin_inff()), factor = _mm512_set1_ps(weight);
    const auto lanes = [&](__m512 g, __m512 u) __attribute__((always_inline)) {
      // The second operand comes through where one is NaN.
      g = _mm512_min_ps(most, g);
      u = _mm512_max_ps(_mm512_sub_ps(_mm512_setzero_ps(), most), _mm512_min_ps(most, u));
      const __m512 divisor = _mm512_add_ps(_mm512_set1_ps(1.f), exp(_mm512_sub_ps(_mm512_setzero_ps(), g)));
      return _mm512_mul_ps(_mm512_mul_ps(_mm512_div_ps(g, divisor), u), factor);
    };
    for (int64_t i = 0; i < n; i += kStep) {
      const int64_t count = n - i < kStep ? n - i : kStep;
      const Pair g = rounded(load(gate + i, count), type), u = rounded(load(up + i, count), type);
      store(out + i, arrange(Pair{lanes(g.a, u.a), lanes(g.b, u.b)}, type), count);
    }
  }
};

}  // namespace
}  // namespace dsv4::avx512
