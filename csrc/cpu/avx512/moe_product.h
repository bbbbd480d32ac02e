// Products of activations with one quantised matrix of an expert, and what else the driver of the experts
// (cpu/moe_driver.h) asks of a kernel.
//
// Where all scales of 128 outputs fold into the weights as they expand (weight_rows.h), sums start again every 1,024
// inputs: result = total(chunk 0) + total(chunk 1) + ... Elsewhere dot_row multiplies the sums of blocks. Either way a
// result depends on its row of activations and its row of weights alone.
#pragma once

#include "cpu/avx512/code_tiles.h"
#include "cpu/avx512/plain_rows.h"
#include "cpu/moe_driver.h"

namespace dsv4::avx512 {
namespace {

inline constexpr int64_t kChunk = 1024;  // inputs
inline constexpr int64_t kChunkBlocks = kChunk / kBlock;
inline constexpr int64_t kAhead = 8;    // rows of codes to ask for before they are needed
inline constexpr int64_t kFewRows = 4;  // rows of activations that are brought together where scales do not fold

// Rows [row, row + rows), at most kMoeOutputs, of one quantised matrix with `count` rows of activations. Rows are
// taken from the beginning of a block of 128 outputs, so that what is decided for them is decided by the weights alone.
template <class WeightRows>
class Product {
 public:
  using Rows = WeightRows;

  static int64_t elements(int64_t in) { return blocks_of(in) * kBlock; }
  static int64_t memory(int64_t in) {
    const int64_t scaled = kFewRows * elements(in), most = scaled > kNear ? scaled : kNear;
    return most * static_cast<int64_t>(sizeof(bf16)) + scales_memory(in);
  }

  Product(const ExpertMatrix& w, int64_t expert, int64_t in, const uint8_t* const* x, int64_t count, float* out,
          uint8_t* memory)
      : w_(w),
        expert_(expert),
        in_(in),
        x_(x),
        count_(count),
        out_(out),
        scales_(reinterpret_cast<float*>(memory)),
        near_(reinterpret_cast<bf16*>(memory + scales_memory(in))) {}

  void run(int64_t row, int64_t rows) {
    row_ = row, rows_ = rows;
    if (!folds()) return multiply_and_scale();
    // Whole rows of weights, one after another, are what memory likes best: where the first-level cache holds as much of
    // the activations.
    const int64_t all = blocks_of(in_);
    const bool whole = count_ <= kTileRows && count_ * elements(in_) <= kTileRows * kChunk;
    const int64_t blocks = whole ? all : kChunkBlocks;
    for (int64_t first = 0; first < all; first += blocks) {
      for (int64_t m = 0, height; m < count_; m += height) {
        height = tile_height(count_ - m);
        with_constant<kTileRows>(height, [&](auto tall) __attribute__((always_inline)) {
          multiply<decltype(tall)::value>(m, first, all - first < blocks ? all - first : blocks);
        });
      }
    }
  }

 protected:
  static constexpr int64_t kScales = Rows::kScales;
  static constexpr int64_t kNear = kTileRows * (kChunk + kRowGap);  // activations
  static int64_t scales_memory(int64_t in) {
    return round_up(blocks_of(in) * kScales * static_cast<int64_t>(sizeof(float)), 64);
  }

  const uint8_t* codes(int64_t r) const { return w_.data.as<const uint8_t>().at(expert_, row_ + r); }
  const uint8_t* scale_row(int64_t r) const {
    return w_.scale.as<const uint8_t>().at(expert_, kScales == 1 ? (row_ + r) / 128 : row_ + r);
  }
  const bf16* activations(int64_t m) const { return reinterpret_cast<const bf16*>(x_[m]); }

  // Whether the scales of all rows are powers of two that weights can take.
  bool folds() const {
    if (w_.scale.dtype != DType::kUInt8) return false;
    __m512i least = _mm512_set1_epi8(127), most = _mm512_set1_epi8(127);
    for (int64_t r = 0; r < rows_; r += kScales == 1 ? 128 : 1) {
      const uint8_t* scales = scale_row(r);
      for (int64_t i = 0; i < w_.scale.size(2); i += 64) {
        const __mmask64 mine = mask64(w_.scale.size(2) - i);
        const __m512i some = _mm512_mask_loadu_epi8(_mm512_set1_epi8(127), mine, scales + i);
        least = _mm512_min_epu8(least, some);
        most = _mm512_max_epu8(most, some);
      }
    }
    return _mm512_cmplt_epu8_mask(least, _mm512_set1_epi8(kLeastScale)) == 0 &&
           _mm512_cmpgt_epu8_mask(most, _mm512_set1_epi8(static_cast<char>(Rows::kMostScale))) == 0;
  }

  // The scales of blocks [first, first + blocks) of row r as Rows::load takes them.
  void read_scales(int64_t r, int64_t first, int64_t blocks, typename Rows::Scale* to) const {
    Rows::fold(scale_row(r) + first * kScales, w_.scale.size(2) - first * kScales, blocks * kScales, to);
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
    const int64_t width = elements(in_), count = w_.scale.size(2), padded = blocks_of(in_) * kScales;
    for (int i = 0; i < kM; ++i) {
      __builtin_memcpy(near_ + i * width, activations(m + i), static_cast<size_t>(width) * sizeof(bf16));
    }
    for (int64_t r = 0; r < rows_; ++r) {
      const int64_t from = kScales == 1 ? (row_ + r) / 128 : row_ + r;
      if (w_.scale.dtype == DType::kUInt8) {
        widen_scales(w_.scale.as<const uint8_t>().at(expert_, from), count, padded, scales_);
      } else {
        widen_scales(w_.scale.as<const float>().at(expert_, from), count, padded, scales_);
      }
      const uint8_t* next = codes(r) + kAhead * w_.data.stride[1];  // beyond the end it does nothing
      ask(next, Rows::bytes(in_));
      float sums[kM];
      dot_row<kM>(expand_, codes(r), Rows::bytes(in_), scales_, near_, width, sums);
      for (int i = 0; i < kM; ++i) out_[(m + i) * kMoeOutputs + r] = sums[i];
    }
  }

  // Blocks [first, first + blocks) of kM rows of activations with all rows of weights.
  template <int kM>
  void multiply(int64_t m, int64_t first, int64_t blocks) const {
    const int64_t stride = blocks * kBlock + kRowGap;
    for (int i = 0; i < kM; ++i) {
      __builtin_memcpy(near_ + i * stride, activations(m + i) + first * kBlock,
                       static_cast<size_t>(blocks * kBlock) * sizeof(bf16));
    }
    int64_t r = 0;
    const auto tiles = [&](auto columns) __attribute__((always_inline)) {
      constexpr int kN = decltype(columns)::value;
      for (; r + kN <= rows_; r += kN) {
        ask_activations(m + kM, r / kN, first, blocks);
        for (int64_t block = first; block < first + blocks; block += kChunkBlocks) {
          tile<kM, kN>(m, r, block, near_ + (block - first) * kBlock, stride);
        }
      }
    };
    tiles(Constant<kTileColumns<kM>>{});
    tiles(Constant<1>{});
  }

  // A chunk of kM rows with kN rows of weights.
  template <int kM, int kN>
  void tile(int64_t m, int64_t r, int64_t first, const bf16* x, int64_t x_stride) const {
    constexpr int64_t kScaleRows = kScales == 1 ? 1 : kN;
    alignas(64) typename Rows::Scale scales[kScaleRows][kChunkBlocks * kScales];
    const int64_t at = first * Rows::kBlockBytes, left = Rows::bytes(in_) - at, most = kChunkBlocks * Rows::kBlockBytes;
    for (int64_t n = 0; n < kScaleRows; ++n) read_scales(r + n, first, kChunkBlocks, scales[n]);
    CodeRows<typename Rows::Scale> w;
    w.codes = codes(r) + at;
    w.next = m == 0 ? w.codes + kAhead * w_.data.stride[1] : w.codes;  // beyond the end asking does nothing
    w.stride = w_.data.stride[1];
    w.bytes = left < most ? left : most;
    w.scales = scales[0];
    w.scale_stride = kScales == 1 ? 0 : kChunkBlocks * kScales;
    alignas(64) __m512 sums[kM * kN];
    code_tile<kM, kN>(expand_, w, x, x_stride, true, sums);
    alignas(64) float results[16];
    _mm512_store_ps(results, totals<kM * kN>(sums));
    for (int i = 0; i < kM; ++i) {
      float* to = out_ + (m + i) * kMoeOutputs + r;
      for (int n = 0; n < kN; ++n) to[n] = first == 0 ? results[i * kN + n] : to[n] + results[i * kN + n];
    }
  }

  // Asks for row i of the next tile's activations: they come while products keep the units busy.
  void ask_activations(int64_t m, int64_t i, int64_t first, int64_t blocks) const {
    if (i >= kTileRows || m + i >= count_) return;
    const int64_t bytes = kBlock * static_cast<int64_t>(sizeof(bf16));
    ask(x_[m + i] + first * bytes, blocks * bytes);
  }

  const Rows expand_{};
  const ExpertMatrix& w_;
  int64_t expert_, in_, row_ = 0, rows_ = 0;
  const uint8_t* const* x_;
  int64_t count_;
  float* out_;
  float* scales_;  // of a row that do not fold
  bf16* near_;     // activations, side by side
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
    const int64_t fp8 = Multiply<Fp8Rows>::memory(in), fp4 = Multiply<Fp4Rows>::memory(in);
    return fp8 > fp4 ? fp8 : fp4;
  }

  template <class X>
  static void project(const ExpertMatrix& w, int64_t expert, int64_t row, int64_t rows, int64_t in,
                      const uint8_t* const* x, int64_t count, float* out, uint8_t* memory) {
    switch (w.format) {
      case WeightFormat::kFp8:
        Multiply<Fp8Rows>(w, expert, in, x, count, out, memory).run(row, rows);
        break;
      case WeightFormat::kFp4:
        Multiply<Fp4Rows>(w, expert, in, x, count, out, memory).run(row, rows);
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
