// mhc_pre, mhc_post_pre and mhc_head with bfloat16 streams: fn r in AMX tiles. fn is split into bfloat16 high + low, 48
// columns in 3 tiles: the high parts of 16 of fn's rows, both parts of the other 8, the low parts of the 16. The third
// adds to the sums of the first, so that 32 tokens have 4 tiles of sums, 2 of their own and 2 that fn's take in turn
// (mhc_head: 8 columns in one). Relative error of the products against float32 fn: 2.5e-6. Everything but the product
// is the AVX-512 kernels'.
//
//   many tokens: 32 at a time pass slices of 2048 columns, the last one first in every other block, since its part of
//                fn, 768 KiB, may still be in the second-level cache. Rows, 8 D bytes apart, would fall into one set of
//                the first-level cache: 64 elements of each are staged as tiles, squares summed on the way, a few rows
//                after each load of a tile, so that the two overlap.
//   few tokens:  fn is the left operand, as it lies but for its split, and the tokens are the columns; the sums are
//                those of many tokens to the bit, since a product of tiles does not depend on which side is which.
//
// A token takes 3 D / 8 tile cycles, 10 D + 80 bytes from memory and, from two slices on, 24 D of fn from the
// last-level cache (docs/investigations/amx.md). One token splits fn for itself, which takes three to four times as
// long as AVX-512's float32 products.
#pragma once

#include "cpu/amx/tile.h"
#include "cpu/avx512/mhc_forward.h"

namespace dsv4::DSV4_AMX_NAMESPACE {
namespace {

using avx512::kSquares;
using avx512::kStep;
using avx512::kSums;
using avx512::Pair;
using avx512::Rows;
using avx512::Slices;

static_assert(avx512::kTile == kTileRows && 2 * kStep == kTileBytes);

constexpr int kA = 4, kB = 6;          // tiles: 0 to 3 sums, 4 and 5 left operands, 6 and 7 right ones
constexpr int kChunk = 2;              // steps staged at a time
constexpr int kFewChunk = 4;           // the same of few tokens
constexpr int kTileWords = 16 * 16;    // 32-bit words of a tile of fn: a pair of elements, a column
constexpr int64_t kFetched = 512;      // elements from what is staged to what is fetched
constexpr int64_t kSliceWidth = 2048;  // 768 KiB of fn, beside 512 KiB of streams

struct Product {
  static constexpr int kParts = 4 * kStreams;
  static constexpr int kGroups = 2, kMaxSlices = 8;
  static constexpr int64_t kAhead = 0;

  static Slices slices(int64_t hidden) {
    const int64_t count = (hidden + kSliceWidth - 1) / kSliceWidth;
    return {hidden, static_cast<int>(count < kMaxSlices ? count : kMaxSlices)};
  }

  static constexpr int tiles(int outputs) { return (2 * outputs + 15) / 16; }
  static int64_t steps(int64_t hidden) { return (hidden + kStep - 1) / kStep; }
  static int64_t bytes(int64_t hidden, int outputs) {
    return kStreams * steps(hidden) * tiles(outputs) * kTileWords * static_cast<int64_t>(sizeof(uint32_t));
  }

  // 32 elements of a row of fn as bfloat16: the nearest value, and what that leaves over.
  struct Split {
    __m512i high, low;
  };
  DSV4_INLINE Split split(const float* row, int64_t left) {
    const Pair x = left >= kStep ? avx512::load(row) : avx512::load(row, left);
    const __m512i high = avx512::narrow(x);
    const Pair near = avx512::widen(high);
    return {high, avx512::narrow({_mm512_sub_ps(x.a, near.a), _mm512_sub_ps(x.b, near.b)})};
  }

  // The column of both operands in which a row of fn stands.
  template <int kOutputs>
  static constexpr int column(int j, bool low) {
    if (kOutputs < kTileRows) return low ? kOutputs + j : j;
    return j < kTileRows ? (low ? 2 * kTileRows + j : j) : (low ? kOutputs - kTileRows : 0) + j;
  }
  static_assert(kMixes == 24);

  // A product of fn's row j, from the sums of the first two tiles of columns.
  template <int kOutputs>
  DSV4_INLINE float product(const float* sums, int64_t stride, int j) {
    if (kOutputs > kTileRows && j < kTileRows) return sums[j * stride];
    return sums[column<kOutputs>(j, false) * stride] + sums[column<kOutputs>(j, true) * stride];
  }

  // A part of fn as right operand: [stream][step][tile of columns][pair of elements][column].
  template <int kOutputs>
  DSV4_INLINE void pack(const View<const float, 2>& fn, int64_t hidden, int64_t part, void* to) {
    const int64_t all = steps(hidden), stream = part / 4, begin = all * (part % 4) / 4, end = all * (part % 4 + 1) / 4;
    uint32_t* out = static_cast<uint32_t*>(to) + (stream * all + begin) * tiles(kOutputs) * kTileWords;
    for (int64_t s = begin; s < end; ++s) {
      __m512i words[16 * tiles(kOutputs)];
      for (int j = 2 * kOutputs; j < 16 * tiles(kOutputs); ++j) words[j] = _mm512_setzero_si512();
      for (int j = 0; j < kOutputs; ++j) {
        const Split row = split(fn.data + j * fn.stride[0] + stream * hidden + s * kStep, hidden - s * kStep);
        words[column<kOutputs>(j, false)] = row.high, words[column<kOutputs>(j, true)] = row.low;
      }
      for (int tile = 0; tile < tiles(kOutputs); ++tile, out += kTileWords) {
        avx512::transpose(words + 16 * tile);
        for (int k = 0; k < 16; ++k) _mm512_storeu_si512(out + 16 * k, words[16 * tile + k]);
      }
    }
  }

  // Up to 32 elements of a token's row, zeros behind them; adds their squares.
  template <class X>
  DSV4_INLINE __m512i read(const X* r, int64_t left, __m512* squares) {
    const __m512i words = left >= kStep ? _mm512_loadu_si512(r) : _mm512_maskz_loadu_epi16(avx512::mask32(left), r);
    const Pair x = avx512::unpack(words);
    *squares = avx512::dot(x, x, *squares);
    return words;
  }

  // The products of a stream's slice as they leave the tiles, 32 a token, and its squares: added to `out`, or put
  // there.
  template <int kOutputs>
  DSV4_INLINE void add_sums(const float (*sums)[2 * kTileRows], const __m512* squares, int64_t tokens, bool first,
                            float (*out)[kSums]) {
    constexpr int kLow = kOutputs < kTileRows ? kOutputs : kOutputs - kTileRows;  // columns from high to low parts
    for (int64_t group = 0; group < tokens; group += kTileRows) {
      alignas(64) float square[kTileRows];
      _mm512_store_ps(square, avx512::totals<16>(squares + group));
      for (int64_t t = group; t < group + kTileRows && t < tokens; ++t) {
        __m512 x[2] = {_mm512_load_ps(sums[t]), _mm512_setzero_ps()};
        if (kOutputs > kTileRows) x[1] = _mm512_load_ps(sums[t] + kTileRows);
        __m512& split = x[kOutputs > kTileRows];
        const __m512i low = _mm512_alignr_epi32(_mm512_castps_si512(split), _mm512_castps_si512(split), kLow);
        split = _mm512_maskz_add_ps(avx512::low16(kLow), split, _mm512_castsi512_ps(low));
        x[1] = _mm512_mask_mov_ps(x[1], 1 << (kSquares - kTileRows), _mm512_set1_ps(square[t - group]));
        for (int i = 0; i < 2; ++i) {
          float* to = out[t] + i * kTileRows;
          _mm512_store_ps(to, first ? x[i] : _mm512_add_ps(_mm512_load_ps(to), x[i]));
        }
      }
    }
  }

  // A chunk of up to 32 tokens as tiles.
  struct Stage {
    alignas(64) bf16 tiles[kGroups][kChunk][kTileRows][kStep];
  };

  // A slice of one stream of some tokens on its way into stages, and past the caches to where it is to be written.
  template <class X>
  struct Stager {
    const X* from;
    X* write;  // null: nowhere
    int64_t token, write_token, tokens;
    __m512* squares;  // [token]
    // What is fetched meanwhile: rows from `ahead` elements on, `after` where those end.
    const X *rows, *after;
    int64_t fetch_token, ahead, end;

    __attribute__((always_inline)) const X* fetched(int64_t d) const {
      return d + ahead < end ? rows + d + ahead : after + d + ahead - end;
    }

    // Of up to 64 elements from d on.
    __attribute__((always_inline)) void part(int64_t d, int64_t left, Stage* to) const {
      for (int s = 0; s < kChunk && left > 0; ++s, d += kStep, left -= kStep) {
        const int64_t count = left < kStep ? left : kStep;
        for (int64_t t = 0; t < tokens; ++t) {
          const __m512i words = read(from + t * token + d, count, squares + t);
          _mm512_store_si512(to->tiles[t / kTileRows][s][t % kTileRows], words);
          if (write != nullptr) _mm512_mask_storeu_epi16(write + t * write_token + d, avx512::mask32(count), words);
        }
      }
    }

    // Of 64 elements from d on: kCount tokens of one tile.
    template <bool kWrites, int kCount>
    __attribute__((always_inline)) void whole(int64_t d, int first, Stage* to) const {
      bf16* tile = to->tiles[first / kTileRows][0][first % kTileRows];
      const X* row = from + first * token + d;
      const X* fetch = fetched(d) + first * fetch_token;
      X* past = kWrites ? write + first * write_token + d : nullptr;
#pragma GCC unroll 4
      for (int t = 0; t < kCount; ++t, row += token, tile += kStep, fetch += fetch_token) {
        __m512 sum = squares[first + t];
#pragma GCC unroll 2
        for (int s = 0; s < kChunk; ++s) {
          const __m512i words = read(row + s * kStep, kStep, &sum);
          _mm512_store_si512(tile + s * kTileRows * kStep, words);
          avx512::prefetch(fetch + s * kStep);
          if (kWrites) _mm512_stream_si512(reinterpret_cast<__m512i*>(past + s * kStep), words);
        }
        squares[first + t] = sum;
        if (kWrites) past += write_token;
      }
    }
  };

  // Tiles: sums 0 and 1 of the first 16 tokens, 2 and 3 of the others. `meanwhile` is called four times, for vector
  // work between the loads of tiles.
  template <int kOutputs, int kTokenGroups, class Meanwhile>
  DSV4_INLINE void multiply_step(const Stage& stage, int step, const uint32_t* fn, const Meanwhile& meanwhile) {
    tile_load<kA>(stage.tiles[0][step], kTileBytes);
    tile_load<kB>(fn, kTileBytes);
    tile_dot<0, kA, kB>();
    meanwhile(0);
    if constexpr (kTokenGroups == 2) tile_load<kA + 1>(stage.tiles[1][step], kTileBytes);
    if constexpr (kTokenGroups == 2) tile_dot<2, kA + 1, kB>();
    meanwhile(1);
    if constexpr (kOutputs == kMixes) {
      tile_load<kB + 1>(fn + kTileWords, kTileBytes);
      tile_dot<1, kA, kB + 1>();
      if constexpr (kTokenGroups == 2) tile_dot<3, kA + 1, kB + 1>();
    }
    meanwhile(2);
    if constexpr (kOutputs == kMixes) {
      tile_load<kB>(fn + 2 * kTileWords, kTileBytes);
      tile_dot<0, kA, kB>();
      if constexpr (kTokenGroups == 2) tile_dot<2, kA + 1, kB>();
    }
    meanwhile(3);
  }

  // Of 16 tokens: sums in two tiles from kFirst on, or one.
  template <int kFirst, int kOutputs>
  DSV4_INLINE void zero_sums() {
    tile_zero<kFirst>();
    if constexpr (kOutputs == kMixes) tile_zero<kFirst + 1>();
  }
  template <int kFirst, int kOutputs>
  DSV4_INLINE void store_sums(float* to, int64_t stride, int64_t second) {
    tile_store<kFirst>(to, stride);
    if constexpr (kOutputs == kMixes) tile_store<kFirst + 1>(to + second, stride);
  }

  DSV4_INLINE void configure_whole() {
    TileConfig config;
    for (int tile = 0; tile < kTiles; ++tile) config.set(tile, kTileRows, kTileBytes);
    tile_configure(config);
  }

  // The products of one stream of up to 32 tokens over a slice, in the tiles of the sums. `fn` is the slice's part.
  template <int kOutputs, int kTokenGroups, bool kWrites, class X>
  DSV4_INLINE void multiply_slice(const Stager<X>& stager, Slices::Range slice, const uint32_t* fn, Stage* stages) {
    constexpr int64_t kStepWords = tiles(kOutputs) * kTileWords, kWidth = kChunk * kStep;
    constexpr int kRows = kTokenGroups * kTileRows / (4 * kChunk);  // staged beside a quarter of a step
    const bool full = stager.tokens == kTokenGroups * kTileRows;
    const auto stage_part = [&](int64_t d, Stage* to) { stager.part(d, slice.end - d, to); };
    stage_part(slice.begin, &stages[0]);
    for (int64_t d = slice.begin; d < slice.end; d += kWidth, fn += kChunk * kStepWords) {
      const int64_t chunk = (d - slice.begin) / kWidth, next = d + kWidth;
      const Stage& now = stages[chunk % 2];
      Stage* to = &stages[1 - chunk % 2];
      if (full && next + kWidth <= slice.end) {
#pragma GCC unroll 2
        for (int s = 0; s < kChunk; ++s) {
          multiply_step<kOutputs, kTokenGroups>(now, s, fn + s * kStepWords, [&](int quarter) {
            stager.template whole<kWrites, kRows>(next, (4 * s + quarter) * kRows, to);
          });
        }
        continue;
      }
      if (next < slice.end) stage_part(next, to);
      for (int s = 0; s < kChunk && d + s * kStep < slice.end; ++s) {
        multiply_step<kOutputs, kTokenGroups>(now, s, fn + s * kStepWords, [](int) {});
      }
    }
  }

  template <class X, int kOutputs, int kTokenGroups>
  DSV4_INLINE void slice_sums(const Rows<X>& rows, const uint32_t* packed, Slices::Range slice,
                              const avx512::Traffic<X>& traffic, float (*out)[kSums]) {
    constexpr int kTokens = kTokenGroups * kTileRows;
    alignas(64) float sums[kTokens][2 * kTileRows];
    Stage stages[2];
    if (rows.tokens < kTokens) memset(stages, 0, sizeof(stages));
    for (int s = 0; s < kStreams; ++s) {
      __m512 squares[kTokens];
      for (__m512& sum : squares) sum = _mm512_setzero_ps();
      const X *from = rows.data + s * rows.stream, *next = from + rows.stream + slice.begin;
      const bool made = traffic.fetch != nullptr;  // the streams were made just before, from what is fetched now
      const Stager<X> stager{from,
                             traffic.write == nullptr ? nullptr : traffic.write + s * traffic.write_stream,
                             rows.token,
                             traffic.write_token,
                             rows.tokens,
                             squares,
                             made ? traffic.fetch + s * traffic.fetch_stream : from,
                             s + 1 < kStreams ? next : rows.data + rows.tokens * rows.token + slice.begin,
                             traffic.fetch_token,
                             made ? 0 : kFetched,
                             slice.end};
      const uint32_t* fn = packed + (s * steps(rows.hidden) + slice.begin / kStep) * tiles(kOutputs) * kTileWords;
      zero_sums<0, kOutputs>();
      if constexpr (kTokenGroups == 2) zero_sums<2, kOutputs>();
      if (stager.write == nullptr) {
        multiply_slice<kOutputs, kTokenGroups, false>(stager, slice, fn, stages);
      } else {
        multiply_slice<kOutputs, kTokenGroups, true>(stager, slice, fn, stages);
      }
      store_sums<0, kOutputs>(sums[0], sizeof(sums[0]), kTileRows);
      if constexpr (kTokenGroups == 2) store_sums<2, kOutputs>(sums[kTileRows], sizeof(sums[0]), kTileRows);
      add_sums<kOutputs>(sums, squares, rows.tokens, s == 0, out);
    }
  }

  template <class X, int kOutputs>
  DSV4_INLINE void many(const Rows<X>& rows, const void* packed, Slices::Range slice, const avx512::Traffic<X>& traffic,
                        float (*out)[kSums]) {
    const uint32_t* fn = static_cast<const uint32_t*>(packed);
    configure_whole();
    if (rows.tokens > kTileRows) {
      slice_sums<X, kOutputs, 2>(rows, fn, slice, traffic, out);
    } else {
      slice_sums<X, kOutputs, 1>(rows, fn, slice, traffic, out);
    }
    tile_release();
  }

  // A chunk of fn as left operand [row of fn, high then low][32] and of up to 16 tokens as right one [pair][token].
  template <int kOutputs>
  struct FewStage {
    alignas(64) bf16 fn[kFewChunk][tiles(kOutputs) * 16][kStep];
    alignas(64) uint32_t tokens[kFewChunk][kTileRows * kTileRows];
  };

  template <class X, int kOutputs>
  DSV4_INLINE void stage_few(const Rows<X>& rows, int64_t stream, const View<const float, 2>& fn, Slices::Range slice,
                             __m512* squares, FewStage<kOutputs>* to) {
    for (int s = 0; s < kFewChunk && slice.begin + s * kStep < slice.end; ++s) {
      const int64_t d = slice.begin + s * kStep, left = slice.end - d;
      for (int j = 0; j < kOutputs; ++j) {
        const Split row = split(fn.data + j * fn.stride[0] + stream * rows.hidden + d, left);
        _mm512_store_si512(to->fn[s][column<kOutputs>(j, false)], row.high);
        _mm512_store_si512(to->fn[s][column<kOutputs>(j, true)], row.low);
      }
      __m512i words[kTileRows];
      for (int64_t t = 0; t < kTileRows; ++t) {
        const X* r = rows.data + t * rows.token + stream * rows.stream + d;
        words[t] = t < rows.tokens ? read(r, left, squares + t) : _mm512_setzero_si512();
      }
      if (rows.tokens == 1) {
        _mm512_store_si512(to->tokens[s], words[0]);
        continue;
      }
      avx512::transpose(words);
      const __mmask16 there = avx512::low16(rows.tokens);
      for (int k = 0; k < kTileRows; ++k) {
        _mm512_mask_storeu_epi32(to->tokens[s] + k * rows.tokens, there, words[k]);
      }
    }
  }

  template <class X, int kOutputs>
  DSV4_INLINE void few_sums(const Rows<X>& rows, int64_t stream, const View<const float, 2>& fn, Slices::Range slice,
                            float (*out)[kSums]) {
    constexpr int kRows = 2 * kOutputs < kTileRows ? 2 * kOutputs : kTileRows;  // of a tile of fn
    constexpr int64_t kWidth = kFewChunk * kStep;
    const int64_t tokens = rows.tokens, width = 4 * tokens;
    TileConfig config;
    for (int tile = 0; tile < 2; ++tile) {
      config.set(tile, kRows, static_cast<int>(width));
      config.set(kA + tile, kRows, kTileBytes);
    }
    config.set(kB, kTileRows, static_cast<int>(width));
    tile_configure(config);
    zero_sums<0, kOutputs>();
    FewStage<kOutputs> stages[2];
    __m512 squares[kTileRows];
    for (__m512& sum : squares) sum = _mm512_setzero_ps();
    stage_few(rows, stream, fn, slice, squares, &stages[0]);
    for (int64_t chunk = 0; slice.begin < slice.end; ++chunk, slice.begin += kWidth) {
      const FewStage<kOutputs>& now = stages[chunk % 2];
      stage_few(rows, stream, fn, {slice.begin + kWidth, slice.end}, squares, &stages[1 - chunk % 2]);
      for (int s = 0; s < kFewChunk && slice.begin + s * kStep < slice.end; ++s) {
        tile_load<kB>(now.tokens[s], width);
        tile_load<kA>(now.fn[s][0], kTileBytes);
        tile_dot<0, kA, kB>();
        if constexpr (kOutputs == kMixes) {
          tile_load<kA + 1>(now.fn[s][kTileRows], kTileBytes);
          tile_dot<1, kA + 1, kB>();
          tile_load<kA>(now.fn[s][2 * kTileRows], kTileBytes);
          tile_dot<0, kA, kB>();
        }
      }
    }
    alignas(64) float sums[2 * kTileRows][kTileRows], square[kTileRows];
    store_sums<0, kOutputs>(sums[0], kTileBytes, kTileRows * kTileRows);
    tile_release();
    _mm512_store_ps(square, avx512::totals<16>(squares));
    for (int64_t t = 0; t < tokens; ++t) {
      for (int j = 0; j < kSums; ++j) out[t][j] = j < kOutputs ? product<kOutputs>(sums[0] + t, kTileRows, j) : 0.f;
      out[t][kSquares] = square[t];
    }
  }

  // The slices of the streams are spread over the threads.
  template <class X, int kOutputs>
  DSV4_INLINE void few(const Rows<X>& rows, const View<const float, 2>& fn, const Context& context,
                       float (*out)[kSums]) {
    alignas(64) float parts[kMaxSlices][kStreams][kTileRows][kSums];
    const Slices slices = Product::slices(rows.hidden);
    parallel(context, slices.count * kStreams, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        const int64_t stream = i % kStreams, slice = i / kStreams;
        few_sums<X, kOutputs>(rows, stream, fn, slices[static_cast<int>(slice)], parts[slice][stream]);
      }
    });
    for (int slice = 0; slice < slices.count; ++slice) {
      for (int s = 1; s < kStreams; ++s) avx512::add(parts[slice][s], rows.tokens, false, parts[slice][0]);
      avx512::add(parts[slice][0], rows.tokens, slice == 0, out);
    }
  }
};

}  // namespace
}  // namespace dsv4::DSV4_AMX_NAMESPACE
