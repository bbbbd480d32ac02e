// The gradients of mhc_pre and mhc_head by float32 FMA, for J = 24 or 4 rows of fn. d streams: 4 tokens x 32 elements
// at a time, fn of a run and stream (24 KiB) in the first-level cache. d fn: 12 rows of fn x 32 elements, from zero for
// every 32 tokens. 24 J D FLOPs a token in all, three times the forward pass: bound by the FMA units; 70 % of their
// peak expected.
#include "cpu/avx512/mhc_backward.h"

#include "cpu/avx512/mhc_product.h"
#include "cpu/mhc.h"

namespace dsv4::avx512 {
namespace {

// totals[column] += the sum over some tokens of dz r, one step of it.
template <class X, int kOutputs, int kColumns>
DSV4_INLINE void fn_step(const X (*r)[kRun], const float (*factors)[kOutputs], int64_t tokens, int64_t d, int column,
                         float (*totals)[kRun]) {
  Pair sum[kColumns];
#pragma GCC unroll 12
  for (int c = 0; c < kColumns; ++c) sum[c] = {_mm512_setzero_ps(), _mm512_setzero_ps()};
  for (int64_t t = 0; t < tokens; ++t) {
    const Pair x = get<false>(r[t] + d);
#pragma GCC unroll 12
    for (int c = 0; c < kColumns; ++c) {
      __m512 factor = _mm512_set1_ps(factors[t][column + c]);
      __asm__("" : "+v"(factor));  // one load for two products
      sum[c] = fma(x, factor, sum[c]);
    }
  }
#pragma GCC unroll 12
  for (int c = 0; c < kColumns; ++c) {
    const Pair old = load(totals[column + c] + d);
    store(totals[column + c] + d, {_mm512_add_ps(old.a, sum[c].a), _mm512_add_ps(old.b, sum[c].b)});
  }
}

// One step of fn^T dz for kTokens tokens.
template <int kOutputs, int kTokens>
DSV4_INLINE void streams_step(const float (*factors)[kOutputs], const float* packed, int64_t all, int stream,
                              int64_t step, Pair (&sum)[kTokens]) {
  constexpr int kColumns = Product::columns<kOutputs>();
#pragma GCC unroll 4
  for (int n = 0; n < kTokens; ++n) sum[n] = {_mm512_setzero_ps(), _mm512_setzero_ps()};
  for (int group = 0; group < kOutputs / kColumns; ++group) {
    const float* fn = packed + Product::packed_step<kOutputs>(all, stream, group, step);
#pragma GCC unroll 4
    for (int c = 0; c < kColumns; ++c) {
      const Pair row = load(fn + c * kStep);
#pragma GCC unroll 4
      for (int n = 0; n < kTokens; ++n) {
        __m512 factor = _mm512_set1_ps(factors[n][group * kColumns + c]);
        __asm__("" : "+v"(factor));  // one load for two products
        sum[n] = fma(row, factor, sum[n]);
      }
    }
  }
}

struct Gradient {
  template <int kOutputs>
  struct Factors {
    float dz[kBlock][kOutputs];
  };

  template <int kOutputs>
  static constexpr int64_t kTotals = kOutputs * kRun;  // [row of fn][element]

  static int64_t bytes(int64_t, int) { return 0; }  // the Product's packed fn

  template <int kOutputs>
  DSV4_INLINE void pack(const View<const float, 2>&, int64_t, int64_t, void*) {}

  template <int kOutputs>
  DSV4_INLINE void prepare(const MhcTokenGradient* tokens, int64_t count, Factors<kOutputs>* factors) {
    for (int64_t t = 0; t < count; ++t) memcpy(factors->dz[t], tokens[t].product, sizeof(factors->dz[t]));
  }

  template <int kOutputs, class Row>
  DSV4_INLINE void streams(const Factors<kOutputs>& factors, int64_t first, int64_t count, const void* fn,
                           int64_t hidden, Steps run, const Row& row) {
    for (int i = 0; i < kStreams; ++i) {
      int64_t t = 0;
      for (; t + 4 <= count; t += 4) {
        const decltype(row(0, 0)) rows[] = {row(i, t), row(i, t + 1), row(i, t + 2), row(i, t + 3)};
        tokens_step<kOutputs>(factors.dz + first + t, fn, hidden, i, run, rows);
      }
      for (; t < count; ++t) {
        const decltype(row(0, 0)) rows[] = {row(i, t)};
        tokens_step<kOutputs>(factors.dz + first + t, fn, hidden, i, run, rows);
      }
    }
  }

  template <int kOutputs, class Row, int kTokens>
  DSV4_INLINE void tokens_step(const float (*dz)[kOutputs], const void* fn, int64_t hidden, int stream, Steps run,
                               const Row (&rows)[kTokens]) {
    Pair sum[kTokens];
    for (int64_t step = run.begin; step < run.end; ++step) {
      streams_step<kOutputs, kTokens>(dz, static_cast<const float*>(fn), Product::steps(hidden), stream, step, sum);
#pragma GCC unroll 4
      for (int n = 0; n < kTokens; ++n) rows[n].finish((step - run.begin) * kStep, run.width, sum[n]);
    }
  }

  template <int kOutputs, class X>
  DSV4_INLINE void add_fn(const Factors<kOutputs>& factors, const X (*rows)[kRun], int64_t count, int64_t steps,
                          float* totals) {
    constexpr int kColumns = Product::columns<kOutputs>();
    auto* sums = reinterpret_cast<float (*)[kRun]>(totals);
    for (int64_t at = 0; at < count; at += kFew) {
      for (int64_t d = 0; d < steps * kStep; d += kStep) {
        for (int column = 0; column < kOutputs; column += kColumns) {
          fn_step<X, kOutputs, kColumns>(rows + at, factors.dz + at, std::min<int64_t>(kFew, count - at), d, column,
                                         sums);
        }
      }
    }
  }

  template <int kOutputs>
  DSV4_INLINE Pair total(const float* totals, int64_t step, int j) {
    return load(totals + j * kRun + step * kStep);
  }
};

}  // namespace

int64_t mhc_backward_bytes(int64_t tokens, int64_t hidden, int mixes, const Context& context) {
  return backward_bytes<Product, Gradient, float>(tokens, hidden, mixes, context);  // the wider of the two
}

Status mhc_pre_backward(const MhcPreBackwardParams& a, const Context& context) {
  return a.streams.dtype == DType::kBFloat16 ? pre_backward<Product, Gradient, bf16>(a, context)
                                             : pre_backward<Product, Gradient, float>(a, context);
}

Status mhc_head_backward(const MhcHeadBackwardParams& a, const Context& context) {
  return a.streams.dtype == DType::kBFloat16 ? head_backward<Product, Gradient, bf16>(a, context)
                                             : head_backward<Product, Gradient, float>(a, context);
}

}  // namespace dsv4::avx512
