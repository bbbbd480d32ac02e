// Rows of activations with rows of plain weights, for dense_linear. A pair of rows has one register of sums: 16 lanes,
// each adding every 16th product (bfloat16 by bfloat16: every 16th pair, by vdpbf16ps) in ascending order; `totals`
// adds the lanes after every chunk of inputs. So a result depends on its two rows alone. Mixed operands widen to
// float32, exactly.
//
// Up to 4 rows of activations: 16 pairs of rows at a time straight from memory, each weight read once; the limit is the
// bandwidth. Rows of weights shorter than a page go one after another: several at a time in one page hide from the
// processor what comes next (half the bandwidth, docs/investigations/decode_cpu.md). More: a chunk at a time, so that 4
// rows of activations stay in the first-level cache and 32 of weights in the second while 4 x 4 pairs at a time go
// through registers (8 loads for 16 products); the results wait in scratch memory. The limit is the rate of FMA or
// vdpbf16ps.
#pragma once

#include "cpu/avx512/code_tiles.h"
#include "cpu/linear_driver.h"

namespace dsv4::avx512 {
namespace {

inline constexpr int64_t kDenseFew = 4;  // rows of activations that need no scratch memory

DSV4_INLINE __m512 floats(const float* p) { return _mm512_loadu_ps(p); }
DSV4_INLINE __m512 floats(const float* p, __mmask16 mask) { return _mm512_maskz_loadu_ps(mask, p); }
DSV4_INLINE __m512 widen(__m256i words) {
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(words), 16));
}
DSV4_INLINE __m512 floats(const bf16* p) { return widen(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))); }
DSV4_INLINE __m512 floats(const bf16* p, __mmask16 mask) { return widen(_mm256_maskz_loadu_epi16(mask, p)); }

// A step of inputs as the products take it.
template <class X, class W>
struct DenseStep {
  static constexpr int64_t kInputs = 16;
  template <class T>
  DSV4_INLINE __m512 load(const T* p) {
    return floats(p);
  }
  template <class T>
  DSV4_INLINE __m512 load(const T* p, int64_t count) {
    return floats(p, low16(count));
  }
  DSV4_INLINE __m512 add(__m512 sum, __m512 x, __m512 w) { return _mm512_fmadd_ps(x, w, sum); }
};
template <>
struct DenseStep<bf16, bf16> {
  static constexpr int64_t kInputs = 32;
  DSV4_INLINE __m512i load(const bf16* p) { return _mm512_loadu_si512(p); }
  DSV4_INLINE __m512i load(const bf16* p, int64_t count) { return _mm512_maskz_loadu_epi16(mask32(count), p); }
  DSV4_INLINE __m512 add(__m512 sum, __m512i x, __m512i w) { return dot_bf16(sum, x, w); }
};

// Adds kM rows x with kN rows w to sum[m * kN + n].
template <int kM, int kN, class X, class W>
DSV4_INLINE void dense_sums(const X* x, int64_t x_stride, const W* w, int64_t w_stride, int64_t inputs, __m512* sum) {
  using Step = DenseStep<X, W>;
  const auto add = [&](int64_t at, auto... count) __attribute__((always_inline)) {
    decltype(Step::load(x, count...)) rows[kM];
#pragma GCC unroll 4
    for (int m = 0; m < kM; ++m) rows[m] = Step::load(x + m * x_stride + at, count...);
#pragma GCC unroll 16
    for (int n = 0; n < kN; ++n) {
      const auto weights = Step::load(w + n * w_stride + at, count...);
#pragma GCC unroll 4
      for (int m = 0; m < kM; ++m) sum[m * kN + n] = Step::add(sum[m * kN + n], rows[m], weights);
    }
  };
#pragma GCC unroll 16
  for (int i = 0; i < kM * kN; ++i) sum[i] = _mm512_setzero_ps();
  int64_t at = 0;
  for (; at + Step::kInputs <= inputs; at += Step::kInputs) add(at);
  if (at < inputs) add(at, inputs - at);
}

// Products over a chunk of inputs: lane m * kN + n.
template <int kM, int kN, class X, class W>
static __attribute__((noinline)) __m512 dense_tile(const X* x, int64_t x_stride, const W* w, int64_t w_stride,
                                                   int64_t inputs) {
  __m512 sum[kM * kN];
  dense_sums<kM, kN>(x, x_stride, w, w_stride, inputs, sum);
  return totals<kM * kN>(sum);
}

// The same, one row w after another.
template <int kM, int kN, class X, class W>
static __attribute__((noinline)) __m512 dense_in_order(const X* x, int64_t x_stride, const W* w, int64_t w_stride,
                                                       int64_t inputs) {
  __m512 sums[kM * kN];
  for (int n = 0; n < kN; ++n) {
    __m512 sum[kM];
    dense_sums<kM, 1>(x, x_stride, w + n * w_stride, w_stride, inputs, sum);
#pragma GCC unroll 4
    for (int m = 0; m < kM; ++m) sums[m * kN + n] = sum[m];
  }
  return totals<kM * kN>(sums);
}

class DenseKernel {
 public:
  static int64_t memory(const DenseLinearParams& p) {
    if (p.x.size(0) <= kDenseFew) return 0;
    return kDenseRows * kDenseOutputs / kTilePairs * static_cast<int64_t>(sizeof(__m512)) +
           (p.x.dtype != p.weight.dtype ? kDenseOutputs * kChunk * static_cast<int64_t>(sizeof(float)) : 0);
  }

  DenseKernel(const DenseLinearParams& p, uint8_t* memory) : p_(p), memory_(memory) {}

  void run(int64_t row, int64_t rows, int64_t output, int64_t outputs) const {
    const bool narrow = p_.weight.dtype == DType::kBFloat16;
    if (p_.x.dtype == DType::kBFloat16) {
      narrow ? start<bf16, bf16>(row, rows, output, outputs) : start<bf16, float>(row, rows, output, outputs);
    } else {
      narrow ? start<float, bf16>(row, rows, output, outputs) : start<float, float>(row, rows, output, outputs);
    }
  }

 private:
  static constexpr int64_t kTile = 4, kTilePairs = kTile * kTile;

  template <class X, class W>
  void start(int64_t row, int64_t rows, int64_t output, int64_t outputs) const {
    const X* x = p_.x.as<const X>().at(row);
    const W* w = p_.weight.as<const W>().at(output);
    if (p_.x.size(0) > kDenseFew) return tiles(x, w, row, rows, output, outputs);
    switch (rows) {
      case 4:
        return few<4, 4>(x, w, row, output, outputs);
      case 3:
        return few<3, 5>(x, w, row, output, outputs);
      case 2:
        return few<2, 8>(x, w, row, output, outputs);
      default:
        return few<1, 16>(x, w, row, output, outputs);
    }
  }

  template <int kM, int kN, class X, class W>
  void few(const X* x, const W* w, int64_t row, int64_t output, int64_t outputs) const {
    int64_t n = 0;
    for (; n + kN <= outputs; n += kN) few_tile<kM, kN>(x, w, row, output, n);
    for (; n < outputs; ++n) few_tile<kM, 1>(x, w, row, output, n);
  }
  template <int kM, int kN, class X, class W>
  void few_tile(const X* x, const W* w, int64_t row, int64_t output, int64_t n) const {
    const int64_t inputs = p_.x.size(1), x_stride = p_.x.stride[0], w_stride = p_.weight.stride[0];
    const W* from = w + n * w_stride;
    __m512 result = _mm512_setzero_ps();
    if (inputs <= kChunk && inputs * static_cast<int64_t>(sizeof(W)) < kPageBytes) {
      result = dense_in_order<kM, kN>(x, x_stride, from, w_stride, inputs);
    } else {
      for (int64_t at = 0; at < inputs; at += kChunk) {
        const int64_t some = inputs - at < kChunk ? inputs - at : kChunk;
        const __m512 mine = dense_tile<kM, kN>(x + at, x_stride, from + at, w_stride, some);
        result = at == 0 ? mine : _mm512_add_ps(result, mine);
      }
    }
    put<kM, kN>(row, output + n, result);
  }

  // Which rows of activations, weights and inputs a call of `tiles` multiplies.
  struct Part {
    int64_t row, m, output, outputs, inputs;
    bool first, last;
  };

  template <class X, class W>
  void tiles(const X* x, const W* w, int64_t row, int64_t rows, int64_t output, int64_t outputs) const {
    constexpr bool kWidenX = sizeof(X) < sizeof(W), kWidenW = sizeof(W) < sizeof(X);
    const int64_t all = p_.x.size(1), x_stride = p_.x.stride[0], w_stride = p_.weight.stride[0];
    float* wide = reinterpret_cast<float*>(results() + kDenseRows * kDenseOutputs / kTilePairs);
    for (int64_t at = 0; at == 0 || at < all; at += kChunk) {
      const bool last = all - at <= kChunk;
      const int64_t inputs = last ? all - at : kChunk;
      if constexpr (kWidenW) copy(w + at, w_stride, outputs, inputs, wide);
      for (int64_t m = 0; m < rows; m += kTile) {
        const int64_t height = rows - m < kTile ? rows - m : kTile;
        const Part part = {row, m, output, outputs, inputs, at == 0, last};
        const X* from = x + m * x_stride + at;
        if (!kWidenW && m == 0 && !last) ask_for(w + at + kChunk, w_stride, outputs);
        with_constant<kTile>(height, [&](auto tall) {
          constexpr int kM = decltype(tall)::value;
          if constexpr (kWidenX) {
            copy(from, x_stride, height, inputs, wide);
            tiles_of<kM>(wide, kChunk, w + at, w_stride, part);
          } else if constexpr (kWidenW) {
            tiles_of<kM>(from, x_stride, wide, kChunk, part);
          } else {
            tiles_of<kM>(from, x_stride, w + at, w_stride, part);
          }
        });
      }
    }
  }

  // The first `count` inputs of `rows` rows as float32.
  template <class T>
  static void copy(const T* from, int64_t stride, int64_t rows, int64_t count, float* to) {
    for (int64_t i = 0; i < rows; ++i, from += stride, to += kChunk) {
      int64_t at = 0;
      for (; at + 16 <= count; at += 16) _mm512_store_ps(to + at, floats(from + at));
      if (at < count) _mm512_store_ps(to + at, floats(from + at, low16(count - at)));
    }
  }

  template <int kM, class X, class W>
  void tiles_of(const X* x, int64_t x_stride, const W* w, int64_t w_stride, const Part& part) const {
    __m512* result = results() + part.m / kTile * (kDenseOutputs / kTile);
    int64_t n = 0;
    const auto tile = [&](auto columns) __attribute__((always_inline)) {
      constexpr int kN = decltype(columns)::value;
      const __m512 mine = dense_tile<kM, kN>(x, x_stride, w + n * w_stride, w_stride, part.inputs);
      *result = part.first ? mine : _mm512_add_ps(*result, mine);
      if (part.last) put<kM, kN>(part.row + part.m, part.output + n, *result);
      ++result, n += kN;
    };
    while (n + kTile <= part.outputs) tile(Constant<kTile>{});
    if (part.outputs - n == 3) tile(Constant<3>{});
    if (part.outputs - n == 2) tile(Constant<2>{});
    if (part.outputs - n == 1) tile(Constant<1>{});
  }
  // A block of weight rows: blocks are too short for the processor to notice by itself what comes next.
  template <class W>
  static void ask_for(const W* w, int64_t stride, int64_t rows) {
    for (int64_t n = 0; n < rows; ++n) ask(reinterpret_cast<const uint8_t*>(w + n * stride), kChunk * sizeof(W));
  }

  // Writes kN outputs of kM rows.
  template <int kM, int kN>
  void put(int64_t row, int64_t output, __m512 result) const {
    alignas(64) float results[16];
    _mm512_store_ps(results, result);
    if (p_.out.dtype == DType::kBFloat16) {
      alignas(32) bf16 rounded[16];
      _mm256_store_si256(reinterpret_cast<__m256i*>(rounded), reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(result)));
      for (int m = 0; m < kM; ++m) {
        __builtin_memcpy(p_.out.as<bf16>().at(row + m, output), rounded + m * kN, kN * sizeof(bf16));
      }
    } else {
      for (int m = 0; m < kM; ++m) {
        __builtin_memcpy(p_.out.as<float>().at(row + m, output), results + m * kN, kN * sizeof(float));
      }
    }
  }

  // [rows / 4][outputs / 4] of a piece, a tile each.
  __m512* results() const { return reinterpret_cast<__m512*>(memory_); }

  const DenseLinearParams& p_;
  uint8_t* memory_;
};

}  // namespace
}  // namespace dsv4::avx512
