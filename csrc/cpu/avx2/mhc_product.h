// Products of streams with fn, and how the tokens of an mHC call are cut.
#pragma once

#include <cmath>

#include "cpu/avx2/product.h"
#include "cpu/mhc.h"
#include "cpu/work.h"

namespace dsv4::avx2 {
namespace {

inline constexpr int64_t kMhcProductBytes =
    kPanelBytes + kMhcTokens * kPanelStride * static_cast<int64_t>(sizeof(float));

// Tokens of a block, and how many threads have one. What it is shows in no result of a token.
inline int64_t mhc_block(int64_t tokens, const Context& context) {
  const int64_t threads = context.threads < 1 ? 1 : context.threads, share = (tokens + threads - 1) / threads;
  return share < kMhcTokens ? share : kMhcTokens;
}
inline int64_t mhc_slots(int64_t tokens, const Context& context) {
  const int64_t size = mhc_block(tokens, context), count = size == 0 ? 0 : (tokens + size - 1) / size;
  return count < context.threads ? count : context.threads;
}

// body(slot, token, count) for blocks of all tokens.
template <class Body>
void mhc_blocks(int64_t tokens, const Context& context, const Body& body) {
  const int64_t size = mhc_block(tokens, context);
  if (size == 0) return;
  spread(context, mhc_slots(tokens, context), (tokens + size - 1) / size, [&](int64_t slot, int64_t i) {
    const int64_t token = i * size, left = tokens - token;
    body(slot, token, left < size ? left : size);
  });
}

template <class T>
DSV4_INLINE __m256 load_some(const T* p, int64_t left) {
  return left < kLanes ? load(p, left) : load(p);
}
template <class T>
DSV4_INLINE void store_some(T* p, __m256 x, int64_t left) {
  left < kLanes ? store(p, x, left) : store(p, x);
}

// The sum of squares of float32 with zeros up to the next multiple of eight.
DSV4_INLINE float squares(const float* x, int64_t count) {
  __m256 sum = _mm256_setzero_ps();
  for (int64_t i = 0; i < count; i += kLanes) sum = _mm256_fmadd_ps(load(x + i), load(x + i), sum);
  return total(sum);
}

// fn r of up to kMhcTokens tokens, and 1 / rms of their streams. kRows: of fn.
template <int kRows>
struct MhcProducts {
  float sums[kMhcTokens][kRows];
  float rms[kMhcTokens];

  // memory: kMhcProductBytes.
  template <class T>
  void find(const View<const T, 3>& streams, const MhcMixing& mixing, int64_t token, int64_t count, uint8_t* memory) {
    float *panel = reinterpret_cast<float*>(memory), *x = panel + kPanelFloats;
    const int64_t hidden = streams.size(2);
    double all_squares[kMhcTokens] = {};
    for (int stream = 0; stream < kStreams; ++stream) {
      for (int64_t first = 0; first < hidden; first += kPanelInputs) {
        const int64_t n = hidden - first < kPanelInputs ? hidden - first : kPanelInputs;
        for (int64_t t = 0; t < count; ++t) {
          widen(streams.at(token + t, stream, first), n, x + t * kPanelStride);
          all_squares[t] += static_cast<double>(squares(x + t * kPanelStride, n));
        }
        for (int64_t j = 0; j < kRows; j += kPanelRows) {
          const int64_t rows = kRows - j < kPanelRows ? kRows - j : kPanelRows;
          for (int64_t r = 0; r < rows; ++r) {
            widen(mixing.fn.at(j + r, stream * hidden + first), n, panel + r * kPanelStride);
          }
          multiply(
              panel, rows, [&](int64_t t) { return x + t * kPanelStride; }, count, round_up(n, kLanes),
              stream == 0 && first == 0, [&](int64_t t) { return sums[t] + j; });
        }
      }
    }
    for (int64_t t = 0; t < count; ++t) {
      const double mean = all_squares[t] / static_cast<double>(kStreams * hidden);
      rms[t] = static_cast<float>(1 / std::sqrt(mean + static_cast<double>(mixing.norm_eps)));
    }
  }
};

}  // namespace
}  // namespace dsv4::avx2
