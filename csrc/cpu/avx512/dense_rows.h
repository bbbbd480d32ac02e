// Rows of activations with rows of plain weights, for dense_linear. A pair of rows has one register of sums: 16 lanes,
// each adding every 16th product (bfloat16 by bfloat16: every 16th pair, by vdpbf16ps) in ascending order; sums16 adds
// the lanes. So a result depends on its two rows alone. Mixed operands widen to float32, exactly.
//
// Up to 4 rows of activations: 16 pairs of rows at a time straight from memory, each weight read once; the limit is the
// bandwidth. Rows of weights shorter than a page go one after another: several at a time in one page hide from the
// processor what comes next (half the bandwidth, docs/investigations/decode_cpu.md). More: 4 KiB of a row at a time, so
// that 4 rows of activations stay in the first-level cache and 32 of weights in the second while 4 x 4 pairs at a time
// go through registers (8 loads for 16 products); the sums wait in scratch memory. The limit is the rate of FMA or
// vdpbf16ps.
#pragma once

#include "cpu/avx512/weight_rows.h"
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
  int64_t at = 0;
  for (; at + Step::kInputs <= inputs; at += Step::kInputs) add(at);
  if (at < inputs) add(at, inputs - at);
}

template <int kM, int kN, class X, class W>
static __attribute__((noinline)) void dense_tile(const X* x, int64_t x_stride, const W* w, int64_t w_stride,
                                                 int64_t inputs, bool first, __m512* sums) {
  __m512 sum[kM * kN];
#pragma GCC unroll 16
  for (int i = 0; i < kM * kN; ++i) sum[i] = first ? _mm512_setzero_ps() : sums[i];
  dense_sums<kM, kN>(x, x_stride, w, w_stride, inputs, sum);
#pragma GCC unroll 16
  for (int i = 0; i < kM * kN; ++i) sums[i] = sum[i];
}

// The same sums from zero, one row w after another.
template <int kM, int kN, class X, class W>
static __attribute__((noinline)) void dense_in_order(const X* x, int64_t x_stride, const W* w, int64_t w_stride,
                                                     int64_t inputs, __m512* sums) {
  for (int n = 0; n < kN; ++n) {
    __m512 sum[kM];
#pragma GCC unroll 4
    for (int m = 0; m < kM; ++m) sum[m] = _mm512_setzero_ps();
    dense_sums<kM, 1>(x, x_stride, w + n * w_stride, w_stride, inputs, sum);
#pragma GCC unroll 4
    for (int m = 0; m < kM; ++m) sums[m * kN + n] = sum[m];
  }
}

class DenseKernel {
 public:
  static int64_t memory(const DenseLinearParams& p) {
    if (p.x.size(0) <= kDenseFew) return 0;
    return kDenseRows * kDenseOutputs * static_cast<int64_t>(sizeof(__m512)) +
           (p.x.dtype != p.weight.dtype ? kDenseOutputs * kBlockBytes : 0);
  }

  DenseKernel(const DenseLinearParams& p, uint8_t* memory)
      : p_(p),
        sums_(reinterpret_cast<__m512*>(memory)),
        wide_(reinterpret_cast<float*>(sums_ + kDenseRows * kDenseOutputs)) {}

  void run(int64_t row, int64_t rows, int64_t output, int64_t outputs) const {
    const bool narrow = p_.weight.dtype == DType::kBFloat16;
    if (p_.x.dtype == DType::kBFloat16) {
      narrow ? start<bf16, bf16>(row, rows, output, outputs) : start<bf16, float>(row, rows, output, outputs);
    } else {
      narrow ? start<float, bf16>(row, rows, output, outputs) : start<float, float>(row, rows, output, outputs);
    }
  }

 private:
  static constexpr int64_t kTile = 4;
  static constexpr int64_t kBlockBytes = 4096;
  static constexpr int64_t kWideInputs = kBlockBytes / static_cast<int64_t>(sizeof(float));

  template <class X, class W>
  void start(int64_t row, int64_t rows, int64_t output, int64_t outputs) const {
    const X* x = p_.x.as<const X>().at(row);
    const W* w = p_.weight.as<const W>().at(output);
    if (p_.x.size(0) > kDenseFew) return many(x, w, row, rows, output, outputs);
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
    const int64_t w_stride = p_.weight.stride[0];
    const W* from = w + n * w_stride;
    __m512 sums[16];
    if (p_.x.size(1) * static_cast<int64_t>(sizeof(W)) < kPageBytes) {
      dense_in_order<kM, kN>(x, p_.x.stride[0], from, w_stride, p_.x.size(1), sums);
    } else {
      dense_tile<kM, kN>(x, p_.x.stride[0], from, w_stride, p_.x.size(1), true, sums);
    }
    put<kM, kN>(row, output + n, sums);
  }

  // Which rows of activations, weights and inputs a call of `tiles` multiplies.
  struct Block {
    int64_t row, m, output, outputs, inputs;
    bool first, last;
  };

  template <class X, class W>
  void many(const X* x, const W* w, int64_t row, int64_t rows, int64_t output, int64_t outputs) const {
    constexpr bool kWidenX = sizeof(X) < sizeof(W), kWidenW = sizeof(W) < sizeof(X);
    constexpr int64_t kInputs = kBlockBytes / static_cast<int64_t>(kWidenX || kWidenW ? sizeof(float) : sizeof(W));
    const int64_t all = p_.x.size(1), x_stride = p_.x.stride[0], w_stride = p_.weight.stride[0];
    for (int64_t at = 0; at == 0 || at < all; at += kInputs) {
      const bool last = all - at <= kInputs;
      const int64_t inputs = last ? all - at : kInputs;
      if constexpr (kWidenW) copy(w + at, w_stride, outputs, inputs, wide_);
      for (int64_t m = 0; m < rows; m += kTile) {
        const int64_t height = rows - m < kTile ? rows - m : kTile;
        const Block block = {row, m, output, outputs, inputs, at == 0, last};
        const X* from = x + m * x_stride + at;
        if (!kWidenW && m == 0 && !last) ask_for(w + at + kInputs, w_stride, outputs);
        if constexpr (kWidenX) {
          copy(from, x_stride, height, inputs, wide_);
          tiles(height, wide_, kWideInputs, w + at, w_stride, block);
        } else if constexpr (kWidenW) {
          tiles(height, from, x_stride, wide_, kWideInputs, block);
        } else {
          tiles(height, from, x_stride, w + at, w_stride, block);
        }
      }
    }
  }

  // The first `count` inputs of `rows` rows as float32.
  template <class T>
  static void copy(const T* from, int64_t stride, int64_t rows, int64_t count, float* to) {
    for (int64_t i = 0; i < rows; ++i, from += stride, to += kWideInputs) {
      int64_t at = 0;
      for (; at + 16 <= count; at += 16) _mm512_store_ps(to + at, floats(from + at));
      if (at < count) _mm512_store_ps(to + at, floats(from + at, low16(count - at)));
    }
  }

  template <class X, class W>
  void tiles(int64_t height, const X* x, int64_t x_stride, const W* w, int64_t w_stride, const Block& b) const {
    switch (height) {
      case 4:
        return tiles<4>(x, x_stride, w, w_stride, b);
      case 3:
        return tiles<3>(x, x_stride, w, w_stride, b);
      case 2:
        return tiles<2>(x, x_stride, w, w_stride, b);
      default:
        return tiles<1>(x, x_stride, w, w_stride, b);
    }
  }
  template <int kM, class X, class W>
  void tiles(const X* x, int64_t x_stride, const W* w, int64_t w_stride, const Block& b) const {
    __m512* sums = sums_ + b.m * kDenseOutputs;
    int64_t n = 0;
    for (; n + 4 <= b.outputs; n += 4) {
      dense_tile<kM, 4>(x, x_stride, w + n * w_stride, w_stride, b.inputs, b.first, sums + n * kM);
      if (b.last) put<kM, 4>(b.row + b.m, b.output + n, sums + n * kM);
    }
    for (; n < b.outputs; ++n) {
      dense_tile<kM, 1>(x, x_stride, w + n * w_stride, w_stride, b.inputs, b.first, sums + n * kM);
      if (b.last) put<kM, 1>(b.row + b.m, b.output + n, sums + n * kM);
    }
  }
  // A block of weight rows: blocks are too short for the processor to notice by itself what comes next.
  template <class W>
  static void ask_for(const W* w, int64_t stride, int64_t rows) {
    for (int64_t n = 0; n < rows; ++n) {
      for (int64_t at = 0; at < kBlockBytes; at += 64) {
        _mm_prefetch(reinterpret_cast<const uint8_t*>(w + n * stride) + at, _MM_HINT_T1);
      }
    }
  }

  // Adds the lanes and writes kN outputs of kM rows.
  template <int kM, int kN>
  void put(int64_t row, int64_t output, const __m512* sums) const {
    alignas(64) float results[16];
    if constexpr (kN == 1) {
      for (int m = 0; m < kM; ++m) results[m] = total(sums[m]);
    } else {
      __m512 all[16];
      for (int i = 0; i < 16; ++i) all[i] = i < kM * kN ? sums[i] : _mm512_setzero_ps();
      _mm512_store_ps(results, sums16(all));
    }
    if (p_.out.dtype == DType::kBFloat16) {
      alignas(32) bf16 rounded[16];
      _mm256_store_si256(reinterpret_cast<__m256i*>(rounded),
                         reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(_mm512_load_ps(results))));
      for (int m = 0; m < kM; ++m) {
        __builtin_memcpy(p_.out.as<bf16>().at(row + m, output), rounded + m * kN, kN * sizeof(bf16));
      }
    } else {
      for (int m = 0; m < kM; ++m) {
        __builtin_memcpy(p_.out.as<float>().at(row + m, output), results + m * kN, kN * sizeof(float));
      }
    }
  }

  const DenseLinearParams& p_;
  __m512* sums_;
  float* wide_;
};

}  // namespace
}  // namespace dsv4::avx512
