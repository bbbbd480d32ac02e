// fn r by float32 FMA: the Product of the AVX-512 kernels. 12 rows of fn x 2 tokens in 24 accumulators; fn is packed
// into blocks of 12 rows x 32 elements that the inner loop reads straight through.
#pragma once

#include "cpu/avx512/mhc_forward.h"

namespace dsv4::avx512 {
namespace {

constexpr int kChunk = 16;  // steps whose fn (24 KiB for 12 rows) stays in the first-level cache

struct Product {
  static constexpr int kParts = 4 * kStreams;

  template <int kOutputs>
  static constexpr int columns() {
    return kOutputs == kMixes ? 12 : 4;
  }

  static int64_t steps(int64_t hidden) { return (hidden + kStep - 1) / kStep; }

  // Rows [first, first + kColumns) of fn over `count` steps of one stream: [step][row][32], zero past the hidden width.
  template <class X, int kColumns>
  DSV4_INLINE void pack_steps(const View<const float, 2>& fn, int64_t hidden, int64_t stream, int64_t first,
                              int64_t step, int64_t count, float* to) {
    for (int c = 0; c < kColumns; ++c) {
      const float* row = fn.data + (first + c) * fn.stride[0] + stream * hidden + step * kStep;
      float* out = to + c * kStep;
      const int64_t left = hidden - step * kStep;
      for (int64_t s = 0; s < count; ++s, row += kStep, out += kColumns * kStep) {
        const int64_t valid = left - s * kStep;
        store(out, arrange(valid >= kStep ? load(row) : load(row, valid), static_cast<const X*>(nullptr)));
      }
    }
  }

  template <class X, int kOutputs>
  DSV4_INLINE void pack(const View<const float, 2>& fn, int64_t hidden, int64_t part, void* to) {
    constexpr int kColumns = columns<kOutputs>();
    const int64_t all = steps(hidden), stream = part / 4, begin = all * (part % 4) / 4, end = all * (part % 4 + 1) / 4;
    for (int64_t group = 0; group < kOutputs / kColumns; ++group) {
      float* out =
          static_cast<float*>(to) + ((stream * (kOutputs / kColumns) + group) * all + begin) * kColumns * kStep;
      pack_steps<X, kColumns>(fn, hidden, stream, group * kColumns, begin, end - begin, out);
    }
  }

  // sums[n][c] += the products of kTokens tokens with kColumns packed rows, squares[n] += their squares. `tail`
  // elements of the last step count, all 32 where it is 0.
  template <class X, int kColumns, int kTokens, bool kWithSquares>
  static __attribute__((noinline)) void multiply(const X* r, int64_t token_stride, const float* fn, int64_t count,
                                                 int64_t tail, __m512* sums, int64_t sums_stride, int square) {
    __m512 acc[kTokens][kColumns], sq[kTokens];
#pragma GCC unroll 2
    for (int n = 0; n < kTokens; ++n) {
#pragma GCC unroll 12
      for (int c = 0; c < kColumns; ++c) acc[n][c] = sums[n * sums_stride + c];
      sq[n] = kWithSquares ? sums[n * sums_stride + square] : _mm512_setzero_ps();
    }
    const auto add = [&](const Pair* x) __attribute__((always_inline)) {
#pragma GCC unroll 12
      for (int c = 0; c < kColumns; ++c) {
        __m512 a = _mm512_loadu_ps(fn + c * kStep), b = _mm512_loadu_ps(fn + c * kStep + 16);
        __asm__("" : "+v"(a), "+v"(b));
#pragma GCC unroll 2
        for (int n = 0; n < kTokens; ++n) acc[n][c] = _mm512_fmadd_ps(x[n].b, b, _mm512_fmadd_ps(x[n].a, a, acc[n][c]));
      }
#pragma GCC unroll 2
      for (int n = 0; n < kTokens; ++n) {
        if (kWithSquares) sq[n] = dot(x[n], x[n], sq[n]);
      }
    };
    const int64_t whole = tail == 0 ? count : count - 1;
    for (int64_t s = 0; s < whole; ++s, r += kStep, fn += kColumns * kStep) {
      Pair x[kTokens];
#pragma GCC unroll 2
      for (int n = 0; n < kTokens; ++n) x[n] = load(r + n * token_stride);
      add(x);
    }
    if (tail != 0) {
      Pair x[kTokens];
      for (int n = 0; n < kTokens; ++n) x[n] = load(r + n * token_stride, tail);
      add(x);
    }
#pragma GCC unroll 2
    for (int n = 0; n < kTokens; ++n) {
#pragma GCC unroll 12
      for (int c = 0; c < kColumns; ++c) sums[n * sums_stride + c] = acc[n][c];
      if (kWithSquares) sums[n * sums_stride + square] = sq[n];
    }
  }

  template <class X, int kColumns, bool kWithSquares>
  DSV4_INLINE void multiply_tokens(const X* r, int64_t token_stride, int64_t tokens, const float* fn, int64_t count,
                                   int64_t tail, __m512 (*sums)[kSums], int first) {
    int64_t t = 0;
    for (; t + 2 <= tokens; t += 2) {
      multiply<X, kColumns, 2, kWithSquares>(r + t * token_stride, token_stride, fn, count, tail, sums[t] + first,
                                             kSums, kSquares);
    }
    if (t < tokens) {
      multiply<X, kColumns, 1, kWithSquares>(r + t * token_stride, token_stride, fn, count, tail, sums[t] + first,
                                             kSums, kSquares);
    }
  }

  template <class X, int kOutputs>
  DSV4_INLINE void segment(const Rows<X>& rows, int64_t first, int64_t tokens, int64_t stream,
                           const View<const float, 2>& fn, const void* packed, float (*out)[kSums]) {
    constexpr int kColumns = columns<kOutputs>(), kGroups = kOutputs / kColumns;
    alignas(64) __m512 sums[kTile][kSums];
    alignas(64) float chunk[kChunk * kColumns * kStep];
    for (int64_t t = 0; t < tokens; ++t) {
      for (int j = 0; j < kSums; ++j) sums[t][j] = _mm512_setzero_ps();
    }
    const int64_t all = steps(rows.hidden);
    for (int64_t step = 0; step < all; step += kChunk) {
      const int64_t count = step + kChunk <= all ? kChunk : all - step;
      const int64_t tail = step + count == all ? rows.hidden % kStep : 0;
      const X* r = rows.data + first * rows.token + stream * rows.stream + step * kStep;
      for (int64_t group = 0; group < kGroups; ++group) {
        const float* block = chunk;
        if (packed != nullptr) {
          block = static_cast<const float*>(packed) + ((stream * kGroups + group) * all + step) * kColumns * kStep;
        } else {
          pack_steps<X, kColumns>(fn, rows.hidden, stream, group * kColumns, step, count, chunk);
        }
        const int column = static_cast<int>(group) * kColumns;
        if (group == 0) {
          multiply_tokens<X, kColumns, true>(r, rows.token, tokens, block, count, tail, sums, column);
        } else {
          multiply_tokens<X, kColumns, false>(r, rows.token, tokens, block, count, tail, sums, column);
        }
      }
    }
    for (int64_t t = 0; t < tokens; ++t) {
      _mm512_store_ps(out[t], sums16(sums[t]));
      _mm512_store_ps(out[t] + 16, sums16(sums[t] + 16));
    }
  }
};

}  // namespace
}  // namespace dsv4::avx512
