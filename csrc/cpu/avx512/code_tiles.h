// Tiles of few rows of activations with rows of quantised weights, from their codes through registers into the
// products: for the linear layers and the experts. Weights that expand for three rows of activations or more do so
// beside the products, in units that those leave idle (weight_rows.h), so expanding them again for every eight rows
// costs less than storing them expanded, up to some 16 (then: weight_panel.h). What limits a tile of few rows is how
// fast codes arrive: those of later rows are asked for one cache line a block, since asking for more at once stops the
// loads behind.
#pragma once

#include "cpu/avx512/weight_rows.h"

namespace dsv4::avx512 {
namespace {

inline constexpr int64_t kTileRows = 8;  // rows of activations of a tile, at most
// Between rows of activations in memory: a multiple of 4 KiB would put all of a tile into the same sets of the cache.
inline constexpr int64_t kRowGap = kStep;

// Rows of weights multiplied at once: two, and four where two would leave too few sums to hide the latency of products,
// or the format needs few registers to expand.
template <class Rows, int kM>
inline constexpr int kTileColumns = kM <= Rows::kWideRows ? 4 : 2;

template <int kValue>
struct Constant {
  static constexpr int value = kValue;
};

// `count` as a constant from 1 to kMost.
template <int kMost, class Body>
DSV4_INLINE void with_constant(int64_t count, const Body& body) {
  if constexpr (kMost > 1) {
    if (count < kMost) return with_constant<kMost - 1>(count, body);
  }
  body(Constant<kMost>{});
}

// The height of the next tile where `left` rows are left: equal ones, 5 + 4 rather than 8 + 1.
DSV4_INLINE int64_t tile_height(int64_t left, int64_t most = kTileRows) {
  const int64_t tiles = (left + most - 1) / most;
  return (left + tiles - 1) / tiles;
}

// Rows of weights. Scales are what Rows::load takes, or float32 for those that do not fold. `next` are codes that will
// be wanted later, rows as these.
template <class Scale>
struct CodeRows {
  const uint8_t *codes, *next;
  int64_t stride, bytes;
  const Scale* scales;
  int64_t scale_stride;
};

// A block of kM rows x with kN rows of weights whose scales fold, added to their sums.
template <int kM, int kN, class Rows, class... Count>
DSV4_INLINE void add_block(const Rows& rows, const CodeRows<typename Rows::Scale>& w, int64_t block, const bf16* x,
                           int64_t x_stride, __m512* sum, Count... count) {
  typename Rows::Packed packed[kN];
#pragma GCC unroll 4
  for (int n = 0; n < kN; ++n) {
    ask(w.next + n * w.stride + block * Rows::kBlockBytes, Rows::kBlockBytes);
    packed[n] = rows.load(w.codes + n * w.stride + block * Rows::kBlockBytes,
                          w.scales + n * w.scale_stride + block * Rows::kScales, count...);
  }
  const auto add = [&](auto half) __attribute__((always_inline)) {
    constexpr int kHalf = decltype(half)::value;
    __m512i weights[kN][2];
#pragma GCC unroll 4
    for (int n = 0; n < kN; ++n) rows.template half<kHalf, (kM <= 2)>(packed[n], weights[n]);
#pragma GCC unroll 2
    for (int j = 0; j < 2; ++j) {
#pragma GCC unroll 8
      for (int m = 0; m < kM; ++m) {  // sums one after another, or a product would wait for the one before
        const __m512i row = _mm512_loadu_si512(x + m * x_stride + block * kBlock + kStep * (2 * kHalf + j));
#pragma GCC unroll 4
        for (int n = 0; n < kN; ++n) sum[m * kN + n] = dot_bf16(sum[m * kN + n], row, weights[n][j]);
      }
    }
  };
  add(Constant<0>{});
  add(Constant<1>{});
}

// The same where scales multiply the sums of blocks.
template <int kM, int kN, class Rows, class... Count>
DSV4_INLINE void add_block(const Rows& rows, const CodeRows<float>& w, int64_t block, const bf16* x, int64_t x_stride,
                           __m512* sum, Count... count) {
  Block weights[kN];
#pragma GCC unroll 4
  for (int n = 0; n < kN; ++n) {
    ask(w.next + n * w.stride + block * Rows::kBlockBytes, Rows::kBlockBytes);
    weights[n] = rows.expand(w.codes + n * w.stride + block * Rows::kBlockBytes, Rows::kUnscaled, count...);
  }
#pragma GCC unroll 8
  for (int m = 0; m < kM; ++m) {
    __m512 part[kN];
#pragma GCC unroll 4
    for (int n = 0; n < kN; ++n) part[n] = _mm512_setzero_ps();
#pragma GCC unroll 4
    for (int j = 0; j < kBlockSteps; ++j) {
      const __m512i row = _mm512_loadu_si512(x + m * x_stride + block * kBlock + kStep * j);
#pragma GCC unroll 4
      for (int n = 0; n < kN; ++n) part[n] = dot_bf16(part[n], row, weights[n].w[j]);
    }
#pragma GCC unroll 4
    for (int n = 0; n < kN; ++n) {
      sum[m * kN + n] = _mm512_fmadd_ps(part[n], Rows::scale(w.scales + n * w.scale_stride, block), sum[m * kN + n]);
    }
  }
}

// kM arranged rows x with kN rows of weights of w.bytes code bytes: puts, or adds to, out[m * stride + n]. Sums start
// at zero in every chunk, as for many rows (weight_panel.h). A function of its own, or compilers spill what the loop
// keeps in registers.
template <int kM, int kN, class Rows, class Scale>
static __attribute__((noinline)) void code_tile(const Rows& rows, const CodeRows<Scale>& from, const bf16* x,
                                                int64_t x_stride, bool first, float* out, int64_t stride) {
  const Rows expand = rows;
  const CodeRows<Scale> w = from;
  const int64_t whole = w.bytes / Rows::kBlockBytes, rest = w.bytes - whole * Rows::kBlockBytes;
  alignas(64) float results[16];
  __m512 result = _mm512_setzero_ps();
  if (!first) {
#pragma GCC unroll 16
    for (int i = 0; i < kM * kN; ++i) results[i] = out[i / kN * stride + i % kN];
    result = _mm512_load_ps(results);
  }
  int64_t block = 0;
  do {
    __m512 sum[kM * kN];
#pragma GCC unroll 16
    for (int i = 0; i < kM * kN; ++i) sum[i] = _mm512_setzero_ps();
    const int64_t chunk = block + kChunkBlocks, end = whole < chunk ? whole : chunk;
    for (; block < end; ++block) add_block<kM, kN>(expand, w, block, x, x_stride, sum);
    if (block < chunk && rest > 0) add_block<kM, kN>(expand, w, block++, x, x_stride, sum, rest);
    const __m512 mine = totals<kM * kN>(sum);
    result = first ? mine : _mm512_add_ps(result, mine);
    first = false;
  } while (block * Rows::kBlockBytes < w.bytes);
  _mm512_store_ps(results, result);
#pragma GCC unroll 16
  for (int i = 0; i < kM * kN; ++i) out[i / kN * stride + i % kN] = results[i];
}

inline constexpr int64_t kShortBlocks = 2;  // of rows of weights that code_rows takes

// One arranged row x with `count` rows of weights of kBlocks whole blocks whose scales fold: the sums of a tile,
// sums[n]. What all rows share stays in registers: the activations, and the tables of weights that have one scale.
// Codes are read in the order of memory and not asked for: the processor does so itself, and better
// (docs/investigations/decode_cpu.md).
template <int kBlocks, class Rows>
static __attribute__((noinline)) void code_rows(const Rows& rows, const CodeRows<typename Rows::Scale>& from,
                                                int64_t count, const bf16* x, __m512* sums) {
  const Rows expand = rows;
  CodeRows<typename Rows::Scale> w = from;
  __m512i row[kBlocks * kBlockSteps];
#pragma GCC unroll 8
  for (int i = 0; i < kBlocks * kBlockSteps; ++i) row[i] = _mm512_loadu_si512(x + kStep * i);
  typename Rows::Shared shared[kBlocks];
#pragma GCC unroll 2
  for (int b = 0; b < kBlocks; ++b) shared[b] = expand.share(w.scales + b * Rows::kScales);
  for (int64_t n = 0; n < count; ++n) {
    __m512 sum = _mm512_setzero_ps();
#pragma GCC unroll 2
    for (int b = 0; b < kBlocks; ++b) {
      const auto packed = expand.load(w.codes + b * Rows::kBlockBytes, w.scales + b * Rows::kScales);
      __m512i weights[kBlockSteps];
      expand.template half<0, true>(packed, shared[b], weights);
      expand.template half<1, true>(packed, shared[b], weights + 2);
#pragma GCC unroll 4
      for (int j = 0; j < kBlockSteps; ++j) sum = dot_bf16(sum, row[b * kBlockSteps + j], weights[j]);
    }
    sums[n] = sum;
    w.codes += w.stride, w.scales += w.scale_stride;
  }
}

// Whether code_rows takes rows of so many code bytes, and the call with the number of their blocks.
template <class Rows>
DSV4_INLINE bool are_short(int64_t bytes) {
  return bytes == Rows::kBlockBytes || bytes == kShortBlocks * Rows::kBlockBytes;
}
template <class Rows>
DSV4_INLINE void short_rows(const Rows& rows, const CodeRows<typename Rows::Scale>& w, int64_t count, const bf16* x,
                            __m512* sums) {
  if (w.bytes == Rows::kBlockBytes) return code_rows<1>(rows, w, count, x, sums);
  code_rows<kShortBlocks>(rows, w, count, x, sums);
}

// Rows of weights one after another, with the scales of all their blocks, as Rows::load takes them or float32.
template <class Scale>
struct WeightRows {
  const uint8_t* codes;
  int64_t stride;
  const Scale* scales;
  int64_t scale_stride;  // 0 where all rows have the same
  int64_t count;         // up to kMostOutputs
  int64_t bytes;         // of a row's codes
  int64_t blocks;
};
inline constexpr int64_t kMostOutputs = 128;

// Few rows of activations: nothing is expanded ahead.
template <class Rows, class Scale>
class FewRows {
 public:
  FewRows(const Rows& rows, const WeightRows<Scale>& weights, int64_t x_stride, int64_t out_stride)
      : expand_(rows), w_(weights), x_stride_(x_stride), out_stride_(out_stride) {}

  // out[m * out_stride + n] of `count` arranged rows x; whether codes still have to come from memory.
  void multiply(const bf16* x, int64_t count, bool fresh, float* out) const {
    const int64_t range = kRangeBlocks / (count < kTileRows ? count : kTileRows) / kChunkBlocks * kChunkBlocks;
    for (int64_t block = 0; block == 0 || block < w_.blocks; block += range) {
      for (int64_t m = 0, height; m < count; m += height) {
        height = tile_height(count - m);
        const Range part = {block, block + range < w_.blocks ? range : w_.blocks - block, fresh && m == 0};
        with_constant<kTileRows>(height, [&](auto tall) __attribute__((always_inline)) {
          tiles<decltype(tall)::value>(x + m * x_stride_, part, out + m * out_stride_);
        });
      }
    }
  }

 private:
  static constexpr int64_t kRangeBlocks = 64;       // of a tile's activations, for the first-level cache: 16 KiB
  static constexpr int64_t kAheadBytes = 16 << 10;  // of codes asked for before their use
  static constexpr int64_t kMostAhead = 16;         // weight rows, alike

  struct Range {
    int64_t block, blocks;
    bool fresh;
  };

  // A range of inputs of kM rows x with all rows of weights.
  template <int kM>
  void tiles(const bf16* x, const Range& range, float* out) const {
    const int64_t at = range.block * Rows::kBlockBytes, left = w_.bytes - at, most = range.blocks * Rows::kBlockBytes;
    const int64_t ahead = kAheadBytes / (most + 1) / 4 * 4 + 4;
    CodeRows<Scale> w;
    w.stride = w_.stride, w.bytes = left < most ? left : most, w.scale_stride = w_.scale_stride;
    const auto point = [&](int64_t n) __attribute__((always_inline)) {
      w.codes = w_.codes + n * w_.stride + at;
      w.next = range.fresh ? later(range, n + (ahead < kMostAhead ? ahead : kMostAhead)) : w.codes;
      w.scales = w_.scales + n * w_.scale_stride + range.block * Rows::kScales;
    };
    if constexpr (kM == 1 && sizeof(Scale) < sizeof(float)) {
      if (range.block == 0 && range.blocks == w_.blocks && are_short<Rows>(w.bytes)) {
        point(0);
        __m512 lanes[kMostOutputs];
        short_rows(expand_, w, w_.count, x, lanes);
        for (int64_t n = 0; n < w_.count; n += 16) {
          _mm512_mask_storeu_ps(out + n, low16(w_.count - n < 16 ? w_.count - n : 16), totals<16>(lanes + n));
        }
        return;
      }
    }
    const auto tile = [&](int64_t n, auto columns) __attribute__((always_inline)) {
      point(n);
      code_tile<kM, decltype(columns)::value>(expand_, w, x + range.block * kBlock, x_stride_, range.block == 0,
                                              out + n, out_stride_);
    };
    int64_t n = 0;
    for (; n + kTileColumns<Rows, kM> <= w_.count; n += kTileColumns<Rows, kM>) {
      tile(n, Constant<kTileColumns<Rows, kM>>{});
    }
    for (; n < w_.count; ++n) tile(n, Constant<1>{});
  }

  // Codes of row n in this range; beyond the last, in the next range or of the rows that follow.
  const uint8_t* later(const Range& range, int64_t n) const {
    int64_t block = range.block;
    if (n >= w_.count) {
      block = block + range.blocks < w_.blocks ? block + range.blocks : 0;
      n -= block > 0 ? w_.count : 0;
    }
    return w_.codes + n * w_.stride + block * Rows::kBlockBytes;  // asking for what is past the end does nothing
  }

  const Rows& expand_;
  const WeightRows<Scale>& w_;
  int64_t x_stride_, out_stride_;
};

}  // namespace
}  // namespace dsv4::avx512
