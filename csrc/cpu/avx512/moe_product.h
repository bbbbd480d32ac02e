// Products of activations with one quantised matrix of an expert, and what else the driver of the experts
// (cpu/moe_driver.h) asks of a kernel.
#pragma once

#include "cpu/avx512/moe_panels.h"
#include "cpu/avx512/plain_rows.h"
#include "cpu/moe_driver.h"

namespace dsv4::avx512 {
namespace {

inline constexpr int64_t kAhead = 8;    // rows of codes to ask for before they are needed
inline constexpr int64_t kFewRows = 4;  // rows of activations that are brought together

// Rows [row, row + rows), at most kMoeOutputs, of one quantised matrix with `count` rows of activations. Rows are
// taken from the beginning of a block of 128 outputs, so that what is decided for them is decided by the weights alone.
template <class Panel>
class Product {
 public:
  using Rows = typename Panel::Rows;

  static int64_t elements(int64_t in) { return blocks_of(in) * kBlock; }
  static int64_t memory(int64_t in) {
    return kPanelWords * static_cast<int64_t>(sizeof(uint32_t)) +
           kMostRows * elements(in) * static_cast<int64_t>(sizeof(bf16)) + scales_memory(in);
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
        scales_(reinterpret_cast<uint8_t*>(near_ + kMostRows * elements(in))) {}

  void run(int64_t row, int64_t rows) {
    row_ = row, rows_ = rows;
    if (!folds()) {
      multiply_and_scale();
    } else if (count_ <= kMostRows) {
      with_constant<kMostRows>(count_, [&](auto m) { few<decltype(m)::value>(); });
    } else {
      many();
    }
  }

 protected:
  static constexpr int64_t kScales = Rows::kScales;
  static constexpr int kOne = 16;  // rows of weights whose lanes are added up together
  static_assert(kOne * kShortBlocks <= kColumns * 8, "scales that `one` keeps");
  // Scales of four rows as words, in steps of 8 blocks, of one row as floats, or of a chunk of all rows, folded.
  static int64_t scales_memory(int64_t in) {
    const int64_t few = kColumns * round_up(blocks_of(in), 8), many = kMoeOutputs * kChunkBlocks;
    return (few > many ? few : many) * 4 * static_cast<int64_t>(sizeof(uint16_t));
  }

  const uint8_t* codes(int64_t r) const { return w_.data.as<const uint8_t>().at(expert_, row_ + r); }
  const uint8_t* scale_row(int64_t r) const {
    return w_.scale.as<const uint8_t>().at(expert_, kScales == 1 ? (row_ + r) / 128 : row_ + r);
  }
  // Whether rows of weights have scales of their own, one after another in memory.
  bool dense_scales() const { return kScales > 1 && w_.scale.stride[1] == w_.scale.size(2); }
  const bf16* activations(int64_t m) const { return reinterpret_cast<const bf16*>(x_[m]); }

  // Four rows of weights; beyond the last row the last once more.
  struct Four {
    const uint8_t *codes[kColumns], *scales[kColumns];
    int64_t columns;

    Four(const Product& p, int64_t r) : columns(p.rows_ - r < kColumns ? p.rows_ - r : kColumns) {
      for (int64_t n = 0; n < kColumns; ++n) {
        const int64_t mine = r + (n < columns ? n : columns - 1);
        codes[n] = p.codes(mine);
        scales[n] = p.scale_row(mine);
      }
    }
  };

  // Whether the scales of all rows are powers of two that expanded weights, or activations, can take.
  bool folds() const {
    if (w_.scale.dtype != DType::kUInt8) return false;
    __m512i least = _mm512_set1_epi8(127), most = _mm512_set1_epi8(127);
    const bool dense = dense_scales();  // all rows as one
    const int64_t count = dense ? rows_ * w_.scale.size(2) : w_.scale.size(2);
    for (int64_t r = 0; r < rows_; r += kScales == 1 || dense ? 128 : 1) {
      const uint8_t* scales = scale_row(r);
      for (int64_t i = 0; i < count; i += 64) {
        const __mmask64 mine = mask64(count - i);
        const __m512i some = _mm512_mask_loadu_epi8(_mm512_set1_epi8(127), mine, scales + i);
        least = _mm512_min_epu8(least, some);
        most = _mm512_max_epu8(most, some);
      }
    }
    return _mm512_cmplt_epu8_mask(least, _mm512_set1_epi8(kLeastScale)) == 0 &&
           _mm512_cmpgt_epu8_mask(most, _mm512_set1_epi8(static_cast<char>(Panel::kMostScale))) == 0;
  }

  void multiply_and_scale() const {
    for (int64_t m = 0; m < count_; m += kFewRows) {
      with_constant<kFewRows>(count_ - m < kFewRows ? count_ - m : kFewRows,
                              [&](auto height) { scaled<decltype(height)::value>(m); });
    }
  }

  // Products of blocks, each multiplied by its scale.
  template <int kM>
  void scaled(int64_t m) const {
    bf16* x = near_;
    const int64_t width = elements(in_), count = w_.scale.size(2), padded = blocks_of(in_) * kScales;
    for (int i = 0; i < kM; ++i) {
      __builtin_memcpy(x + i * width, activations(m + i), static_cast<size_t>(width) * sizeof(bf16));
    }
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
      dot_row<kM>(expand_, codes(r), Rows::bytes(in_), scales, x, width, sums);
      for (int i = 0; i < kM; ++i) out_[(m + i) * kMoeOutputs + r] = sums[i];
    }
  }

  // Steps [first, first + steps) of an activation row, step s at to + s * stride, with the scales of these outputs.
  void pack(int64_t m, int64_t first, int64_t steps, bf16* to, int64_t stride) const {
    const bf16* x = activations(m) + first * kStep;
    const uint8_t* scales = scale_row(0) + first / kBlockSteps;
    for (int64_t s = 0; s < steps; s += kBlockSteps, x += kBlock, to += kBlockSteps * stride) {
      if constexpr (Panel::kScalesActivations) {
        const __m512 scale = _mm512_castsi512_ps(_mm512_set1_epi32(scales[s / kBlockSteps] << 23));
        scale_block(x, scale, to, stride);
      } else {
        for (int j = 0; j < kBlockSteps; ++j) {
          _mm512_store_si512(to + j * stride, _mm512_loadu_si512(x + j * kStep));
        }
      }
    }
  }

  // One row of activations with rows of weights that need no chunks.
  void one() const {
    const int64_t blocks = blocks_of(in_);
    pack(0, 0, blocks * kBlockSteps, near_, kStep);
    typename Rows::Scale* scales = reinterpret_cast<typename Rows::Scale*>(scales_);
    CodeRows<typename Rows::Scale> w;
    w.stride = w_.data.stride[1], w.bytes = Rows::bytes(in_), w.scales = scales;
    w.scale_stride = kScales == 1 ? 0 : blocks * kScales;
    if (kScales == 1) __builtin_memset(scales, 0, kShortBlocks * sizeof(*scales));  // the activations have them
    __m512 sums[kOne] = {};
    for (int64_t r = 0; r < rows_; r += kOne) {
      const int64_t count = rows_ - r < kOne ? rows_ - r : kOne;
      const int64_t together = dense_scales() ? count : 1;  // rows
      for (int64_t n = 0; kScales > 1 && n < count; n += together) {
        const int64_t some = together * w_.scale.size(2);
        Rows::fold(scale_row(r + n), some, some, scales + n * w.scale_stride);
      }
      w.codes = codes(r);
      short_rows(expand_, w, count, near_, sums);
      _mm512_mask_storeu_ps(out_ + r, low16(count), totals<kOne>(sums));
    }
  }

  template <int kM>
  void few() const {
    if (kM == 1 && are_short<Rows>(Rows::bytes(in_))) return one();
    const int64_t width = elements(in_);
    for (int m = 0; m < kM; ++m) pack(m, 0, width / kStep, near_ + m * width, kStep);
    uint16_t* scales = reinterpret_cast<uint16_t*>(scales_);
    for (int64_t r = 0; r < rows_; r += kColumns) {
      const Four four(*this, r);
      Panel::read_scales(four.scales, w_.scale.size(2), scales);
      dot_codes<kM>(expand_panel_, four.codes, Rows::bytes(in_), kAhead * w_.data.stride[1], scales, near_, width,
                    four.columns, out_ + r, kMoeOutputs);
    }
  }

  void many() const {
    const int64_t blocks = blocks_of(in_);
    for (int64_t first = 0; first == 0 || first < blocks; first += kChunkBlocks) {
      const int64_t some = blocks - first < kChunkBlocks ? blocks - first : kChunkBlocks;
      typename Rows::Scale* scales = reinterpret_cast<typename Rows::Scale*>(scales_);
      const int64_t left = w_.scale.size(2) - first * kScales, width = some * kScales;
      for (int64_t r = 0; r < (kScales == 1 ? 1 : rows_); ++r) {
        Rows::fold(scale_row(r) + first * kScales, left < width ? left : width, width, scales + r * width);
      }
      const ChunkRows<Rows> weights = {
          codes(0) + first * Rows::kBlockBytes,        w_.data.stride[1], scales, kScales == 1 ? 0 : width, rows_, some,
          Rows::bytes(in_) - first * Rows::kBlockBytes};
      expand_chunk(expand_, weights, panel_);
      // The chunk that comes next, at the end that of the next rows; beyond the last asking does nothing.
      const bool last = first + kChunkBlocks >= blocks;
      const uint8_t* next = last ? codes(0) + rows_ * w_.data.stride[1] : weights.codes + Rows::bytes(kChunk);
      const Upcoming upcoming = {next, w_.data.stride[1], Rows::bytes(kChunk), rows_};
      multiply_chunk(panel_, rows_, some * kBlockSteps, count_, first == 0, out_, upcoming,
                     [&](int64_t m) { return activations(m) + first * kBlock; });
    }
  }

  const Rows expand_{};
  const Panel expand_panel_{};
  const ExpertMatrix& w_;
  int64_t expert_, in_, row_ = 0, rows_ = 0;
  const uint8_t* const* x_;
  int64_t count_;
  float* out_;
  uint32_t* panel_;
  bf16* near_;
  uint8_t* scales_;
};

// What the driver asks of a kernel, with a class for products with quantised matrices.
template <template <class> class Multiply>
struct MoeKernel {
  template <class X>
  static int64_t row_bytes(WeightFormat format, int64_t n) {
    if (format == WeightFormat::kPlain) return n * static_cast<int64_t>(sizeof(X));
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
    }
  }

  static int64_t memory(int64_t in) {
    const int64_t fp8 = Multiply<Fp8Panel>::memory(in), fp4 = Multiply<Fp4Panel>::memory(in);
    return fp8 > fp4 ? fp8 : fp4;
  }

  template <class X>
  static void project(const ExpertMatrix& w, int64_t expert, int64_t row, int64_t rows, int64_t in,
                      const uint8_t* const* x, int64_t count, float* out, uint8_t* memory) {
    switch (w.format) {
      case WeightFormat::kFp8:
        Multiply<Fp8Panel>(w, expert, in, x, count, out, memory).run(row, rows);
        break;
      case WeightFormat::kFp4:
        Multiply<Fp4Panel>(w, expert, in, x, count, out, memory).run(row, rows);
        break;
      default:
        plain<X>(w, expert, row, rows, in, x, count, out, reinterpret_cast<X*>(memory));
    }
  }

  // Four rows of activations at a time, brought together.
  template <class X>
  static void plain(const ExpertMatrix& w, int64_t expert, int64_t row, int64_t rows, int64_t in,
                    const uint8_t* const* x, int64_t count, float* out, X* memory) {
    for (int64_t m = 0; m < count; m += kFewRows) {
      const int64_t some = count - m < kFewRows ? count - m : kFewRows;
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
