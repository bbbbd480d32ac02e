// fn r by float32 FMA: the Product of the AVX-512 kernels. Columns of fn x tokens in accumulators of 16 lanes. A chunk
// of 512 elements is summed from zero, then added to what the chunks before it left, in ascending order over the 4
// streams; the lanes are added last. That order depends on the hidden width alone, so it does not matter which of the
// two ways a token takes:
//   many tokens: 12 columns x 2 tokens; fn packed once a call into blocks of 12 columns x 512 elements, which stay in
//                the first-level cache while a tile of tokens passes; what comes next is fetched meanwhile
//   few tokens:  6 columns x 2 tokens a thread; fn read where it lies
#pragma once

#include <type_traits>

#include "cpu/avx512/mhc_forward.h"

namespace dsv4::avx512 {
namespace {

constexpr int kChunk = 16;  // steps; 12 columns of fn take 24 KiB

struct Product {
  static constexpr int kParts = 4 * kStreams;
  static constexpr int kGroups = 1, kMaxSlices = 1;
  static constexpr int64_t kAhead = kTile;

  static Slices slices(int64_t hidden) { return {hidden, 1}; }

  template <int kOutputs>
  static constexpr int columns() {
    return kOutputs == kMixes ? 12 : 4;
  }

  static int64_t steps(int64_t hidden) { return (hidden + kStep - 1) / kStep; }
  static int64_t bytes(int64_t hidden, int mixes) {
    return mixes * kStreams * steps(hidden) * kStep * static_cast<int64_t>(sizeof(float));
  }

  // Where packed fn has a step of a group of columns: [stream][chunk][group][step of the chunk][column][32], the order
  // in which it is used. The last chunk of a stream may be shorter; what lies past the hidden width is zero.
  template <int kOutputs>
  DSV4_INLINE int64_t packed_step(int64_t all, int64_t stream, int64_t group, int64_t step) {
    constexpr int kColumns = columns<kOutputs>();
    const int64_t chunk = step / kChunk * kChunk, count = all - chunk < kChunk ? all - chunk : kChunk;
    return ((stream * all + chunk) * (kOutputs / kColumns) + group * count + step - chunk) * kColumns * kStep;
  }

  // A quarter of a stream.
  template <int kOutputs>
  DSV4_INLINE void pack(const View<const float, 2>& fn, int64_t hidden, int64_t part, void* to) {
    constexpr int kColumns = columns<kOutputs>();
    const int64_t all = steps(hidden), stream = part / 4, begin = all * (part % 4) / 4, end = all * (part % 4 + 1) / 4;
    for (int j = 0; j < kOutputs; ++j) {
      const float* row = fn.data + j * fn.stride[0] + stream * hidden;
      for (int64_t s = begin; s < end; ++s) {
        const int64_t left = hidden - s * kStep;
        float* out =
            static_cast<float*>(to) + packed_step<kOutputs>(all, stream, j / kColumns, s) + j % kColumns * kStep;
        store(out, left >= kStep ? get<false>(row + s * kStep) : get<true>(row + s * kStep, left));
      }
    }
  }

  // Where a pass over a chunk stands with the traffic that goes on meanwhile, a part of it each step.
  template <class X>
  struct Meanwhile {
    const float* fn;  // fetched: the block that follows
    const X* fetch;
    int64_t fetch_token;
    X* write;
    int64_t write_token;
  };
  static constexpr int kLine = 64 / sizeof(float);

  template <class X, int kColumns, int kTokens, bool kWithSquares, bool kPart>
  DSV4_INLINE void add_step(const X* r, int64_t token_stride, const float* fn, int64_t column_stride, int64_t count,
                            __m512 (&acc)[kTokens][kColumns], __m512 (&squares)[kTokens]) {
    Pair x[kTokens];
#pragma GCC unroll 2
    for (int n = 0; n < kTokens; ++n) {
      x[n] = get<kPart>(r + n * token_stride, count);
      if (kWithSquares) squares[n] = dot(x[n], x[n], squares[n]);
    }
#pragma GCC unroll 12
    for (int c = 0; c < kColumns; ++c) {
      const float* at = fn + c * column_stride;
      __m512 f = kPart ? _mm512_maskz_loadu_ps(low16(count), at) : _mm512_loadu_ps(at);
      __asm__("" : "+v"(f));  // one load for two products
#pragma GCC unroll 2
      for (int n = 0; n < kTokens; ++n) acc[n][c] = _mm512_fmadd_ps(x[n].a, f, acc[n][c]);
    }
#pragma GCC unroll 12
    for (int c = 0; c < kColumns; ++c) {
      const float* at = fn + c * column_stride + 16;
      __m512 f = kPart ? _mm512_maskz_loadu_ps(high16(count), at) : _mm512_loadu_ps(at);
      __asm__("" : "+v"(f));
#pragma GCC unroll 2
      for (int n = 0; n < kTokens; ++n) acc[n][c] = _mm512_fmadd_ps(x[n].b, f, acc[n][c]);
    }
  }

  // sums[n] += the products of kTokens tokens with kColumns columns of a chunk of fn, and their squares. The last step
  // has `tail` elements, 32 where it is 0. kMany: fn is packed; else its rows are `row` elements apart.
  template <class X, int kColumns, int kTokens, bool kWithSquares, bool kMany>
  static __attribute__((noinline)) void multiply(const X* r, int64_t token_stride, const float* fn, int64_t row,
                                                 int64_t count, int64_t tail, Meanwhile<X> meanwhile, bool begins,
                                                 __m512 (*sums)[kSums], int column) {
    const int64_t column_stride = kMany ? kStep : row, step_stride = kMany ? kColumns * kStep : kStep;
    __m512 acc[kTokens][kColumns], squares[kTokens];
#pragma GCC unroll 2
    for (int n = 0; n < kTokens; ++n) {
#pragma GCC unroll 12
      for (int c = 0; c < kColumns; ++c) acc[n][c] = _mm512_setzero_ps();
      squares[n] = _mm512_setzero_ps();
    }
    const int64_t whole = tail == 0 ? count : count - 1;
    for (int64_t s = 0; s < whole; ++s, r += kStep, fn += step_stride) {
      add_step<X, kColumns, kTokens, kWithSquares, false>(r, token_stride, fn, column_stride, kStep, acc, squares);
      if (!kMany) continue;
      for (int line = 0; line < kColumns / 4; ++line, meanwhile.fn += kLine)
        prefetch(meanwhile.fn);  // 16 tokens: all of it
      if (!kWithSquares) continue;
      for (int n = 0; n < kTokens; ++n) prefetch(meanwhile.fetch + n * meanwhile.fetch_token);
      meanwhile.fetch += kStep;
      if (meanwhile.write == nullptr) continue;
      for (int n = 0; n < kTokens; ++n)
        copy_past_caches(r + n * token_stride, meanwhile.write + n * meanwhile.write_token);
      meanwhile.write += kStep;
    }
    if (tail != 0) {
      add_step<X, kColumns, kTokens, kWithSquares, true>(r, token_stride, fn, column_stride, tail, acc, squares);
      for (int n = 0; n < kTokens && kWithSquares && meanwhile.write != nullptr; ++n) {
        put<Store::kPart>(meanwhile.write + n * meanwhile.write_token, get<true>(r + n * token_stride, tail), tail);
      }
    }
#pragma GCC unroll 2
    for (int n = 0; n < kTokens; ++n) {
      __m512* to = sums[n] + column;
      if (begins) {
#pragma GCC unroll 12
        for (int c = 0; c < kColumns; ++c) to[c] = acc[n][c];
        if (kWithSquares) sums[n][kSquares] = squares[n];
      } else {
#pragma GCC unroll 12
        for (int c = 0; c < kColumns; ++c) to[c] = _mm512_add_ps(to[c], acc[n][c]);
        if (kWithSquares) sums[n][kSquares] = _mm512_add_ps(sums[n][kSquares], squares[n]);
      }
    }
  }

  template <class X, int kColumns, bool kWithSquares, bool kMany>
  DSV4_INLINE void multiply_tokens(const X* r, int64_t token_stride, int64_t tokens, const float* fn, int64_t row,
                                   int64_t count, int64_t tail, Meanwhile<X> meanwhile, bool begins,
                                   __m512 (*sums)[kSums], int column) {
    int64_t t = 0;
    for (; t + 2 <= tokens; t += 2) {
      multiply<X, kColumns, 2, kWithSquares, kMany>(r + t * token_stride, token_stride, fn, row, count, tail, meanwhile,
                                                    begins, sums + t, column);
      meanwhile.fn += count * (kColumns / 4) * kLine;
      meanwhile.fetch += 2 * meanwhile.fetch_token;
      if (meanwhile.write != nullptr) meanwhile.write += 2 * meanwhile.write_token;
    }
    if (t < tokens) {
      multiply<X, kColumns, 1, kWithSquares, kMany>(r + t * token_stride, token_stride, fn, row, count, tail, meanwhile,
                                                    begins, sums + t, column);
    }
  }

  template <int kOutputs>
  DSV4_INLINE void add_lanes(const __m512 (*sums)[kSums], int64_t tokens, float (*out)[kSums]) {
    for (int64_t t = 0; t < tokens; ++t) {
      __m512 x[kSums];
      for (int j = 0; j < kSums; ++j) x[j] = j < kOutputs || j == kSquares ? sums[t][j] : _mm512_setzero_ps();
      _mm512_store_ps(out[t], totals<16>(x));
      _mm512_store_ps(out[t] + 16, totals<16>(x + 16));
    }
  }

  // The products and squares of a tile of tokens, with packed fn.
  template <class X, int kOutputs>
  DSV4_INLINE void many(const Rows<X>& rows, const void* packed, Slices::Range, const Traffic<X>& traffic,
                        float (*out)[kSums]) {
    constexpr int kColumns = columns<kOutputs>();
    alignas(64) __m512 sums[kTile][kSums];
    const int64_t all = steps(rows.hidden);
    const float *fn = static_cast<const float*>(packed), *end = fn + kStreams * all * kOutputs * kStep;
    for (int stream = 0; stream < kStreams; ++stream) {
      for (int64_t step = 0; step < all; step += kChunk) {
        const int64_t count = step + kChunk < all ? kChunk : all - step;
        const int64_t tail = step + kChunk < all ? 0 : rows.hidden % kStep;
        const X* r = rows.data + stream * rows.stream + step * kStep;
        Meanwhile<X> meanwhile = {nullptr, traffic.fetch_at(traffic, rows, stream, step * kStep, kChunk * kStep),
                                  traffic.fetch_token, nullptr, traffic.write_token};
        if (traffic.write != nullptr) meanwhile.write = traffic.write + stream * traffic.write_stream + step * kStep;
        for (int column = 0; column < kOutputs; column += kColumns) {
          const float* block = fn;
          fn += count * kColumns * kStep;
          meanwhile.fn = fn < end ? fn : static_cast<const float*>(packed);
          if (column == 0) {
            multiply_tokens<X, kColumns, true, true>(r, rows.token, rows.tokens, block, 0, count, tail, meanwhile,
                                                     stream + step == 0, sums, 0);
          } else {
            multiply_tokens<X, kColumns, false, true>(r, rows.token, rows.tokens, block, 0, count, tail, meanwhile,
                                                      stream + step == 0, sums, column);
          }
        }
      }
    }
    add_lanes<kOutputs>(sums, rows.tokens, out);
  }

  // The same for up to kTile tokens that are all there are: the columns are spread over the threads.
  template <class X, int kOutputs>
  DSV4_INLINE void few(const Rows<X>& rows, const View<const float, 2>& fn, const Context& context,
                       float (*out)[kSums]) {
    constexpr int kColumns = columns<kOutputs>() / 2;
    alignas(64) __m512 sums[kTile][kSums];
    const auto group = [&](int column, auto with_squares) {
      const int64_t all = steps(rows.hidden);
      for (int64_t stream = 0; stream < kStreams; ++stream) {
        for (int64_t step = 0; step < all; step += kChunk) {
          const bool last = step + kChunk >= all;
          const int64_t at = stream * rows.hidden + step * kStep;
          multiply_tokens<X, kColumns, decltype(with_squares)::value, false>(
              rows.data + stream * rows.stream + step * kStep, rows.token, rows.tokens,
              fn.data + column * fn.stride[0] + at, fn.stride[0], last ? all - step : kChunk,
              last ? rows.hidden % kStep : 0, {}, stream + step == 0, sums, column);
        }
      }
    };
    parallel(context, kOutputs / kColumns, [&](int64_t begin, int64_t end) {
      for (int64_t g = begin; g < end; ++g) {
        if (g == 0) {
          group(0, std::true_type());
        } else {
          group(static_cast<int>(g) * kColumns, std::false_type());
        }
      }
    });
    add_lanes<kOutputs>(sums, rows.tokens, out);
  }
};

}  // namespace
}  // namespace dsv4::avx512
