// mhc_pre, mhc_post_pre and mhc_head with bfloat16 streams: fn r in AMX tiles. fn is split into bfloat16 high + low, 48
// columns in 3 tiles: the high parts of 16 of fn's rows, both parts of the other 8, the low parts of the 16. The third
// adds to the sums of the first, so that 32 tokens have 4 tiles of sums, 2 of their own and 2 that fn's take in turn
// (mhc_head: 8 columns in one). Relative error of the products
// against float32 fn: 2.5e-6. Everything but the product is the AVX-512 kernels'.
//
//   many tokens: 32 at a time, so that fn, 1.5 MiB at D = 4096 and more than the second-level cache keeps beside the
//                streams, passes once for all of them. Their rows, 8 D bytes apart, would fall into one set of the
//                first-level cache: 128 elements of each are staged as tiles before they are multiplied, squares
//                summed on the way.
//   few tokens:  fn is the left operand, as it lies but for its split, and the tokens are the columns; the sums are
//                those of many tokens to the bit, since a product of tiles does not depend on which side is which.
//
// A token takes 3 D / 8 tile cycles, 10 D + 80 bytes from memory and 48 D of fn from the last-level cache. Measured on
// Emerald Rapids, D = 1024: tiles with their loads and stages one after the other, a third each of what the product
// takes, the rest on the way; they do not overlap (docs/investigations/amx.md). One token splits fn for itself,
// which takes three to four times as long as AVX-512's float32 products.
#include "cpu/mhc.h"

#include "cpu/amx/tile.h"
#include "cpu/avx512/mhc_forward.h"

namespace dsv4::DSV4_AMX_NAMESPACE {
namespace {

using avx512::kSquares;
using avx512::kStep;
using avx512::kSums;
using avx512::Pair;
using avx512::Rows;

static_assert(avx512::kTile == kTileRows && 2 * kStep == kTileBytes);

constexpr int kA = 4, kB = 6;        // tiles: 0 to 3 sums, 4 and 5 left operands, 6 and 7 right ones
constexpr int kChunk = 4;            // steps staged at a time
constexpr int64_t kAhead = 1024;     // elements from what is staged to what is fetched
constexpr int kTileWords = 16 * 16;  // 32-bit words of a tile of fn: a pair of elements, a column
constexpr int kTileElements = kTileRows * kStep;
constexpr int kFnAhead = 8;  // steps from the fn that is multiplied to what is fetched

struct Product {
  static constexpr int kParts = 4 * kStreams;
  static constexpr int kGroups = 2;  // of 16 tokens

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

  // A chunk of up to 32 tokens as tiles.
  struct Stage {
    alignas(64) bf16 tiles[kGroups][kChunk][kTileRows][kStep];
  };

  // Elements [d, d + 32 kChunk) of one stream of some tokens, on their way into a stage, past the caches where
  // traffic.write says so, and with a look at what comes later.
  template <class X>
  struct Stager {
    const Rows<X>& rows;
    const avx512::Traffic<X>& traffic;
    int stream;
    __m512* squares;  // [token]

    const X* fetched(int64_t d) const {
      if (traffic.fetch != nullptr) return traffic.fetch + stream * traffic.fetch_stream + d;
      if (d + kAhead < rows.hidden) return rows.data + stream * rows.stream + d + kAhead;
      if (stream + 1 < kStreams) return rows.data + (stream + 1) * rows.stream + d + kAhead - rows.hidden;
      return rows.data + rows.tokens * rows.token + d + kAhead - rows.hidden;
    }

    __attribute__((always_inline)) void stage(int64_t d, int64_t first, int64_t last, Stage* to) const {
      const X *from = rows.data + stream * rows.stream + d, *fetch = fetched(d);
      const int64_t left = rows.hidden - d;
      for (int64_t t = first; t < last && t < rows.tokens; ++t) {
        bf16* tile = to->tiles[t / kTileRows][0][t % kTileRows];
        const X* ahead = fetch + t * traffic.fetch_token;
        X* write = traffic.write == nullptr
                       ? nullptr
                       : traffic.write + t * traffic.write_token + stream * traffic.write_stream + d;
        if (left >= kChunk * kStep) {
          row<false>(from + t * rows.token, left, tile, ahead, write, squares + t);
        } else {
          row<true>(from + t * rows.token, left, tile, ahead, write, squares + t);
        }
      }
    }

   private:
    template <bool kPart>
    DSV4_INLINE void row(const X* from, int64_t left, bf16* tile, const X* ahead, X* write, __m512* squares) {
      __m512 sum = *squares;
#pragma GCC unroll 4
      for (int s = 0; s < kChunk; ++s, left -= kStep) {
        if (kPart && left <= 0) break;
        const __m512i words = read(from + s * kStep, kPart ? left : kStep, &sum);
        _mm512_store_si512(tile + s * kTileElements, words);
        avx512::prefetch(ahead + s * kStep);
        if (write == nullptr) continue;
        if (!kPart || left >= kStep) {
          _mm512_stream_si512(reinterpret_cast<__m512i*>(write + s * kStep), words);
        } else {
          _mm512_mask_storeu_epi16(write + s * kStep, avx512::mask32(left), words);
        }
      }
      *squares = sum;
    }
  };

  // Tiles: sums 0 and 1 of the first 16 tokens, 2 and 3 of the others.
  template <int kOutputs, int kTokenGroups>
  DSV4_INLINE void multiply_step(const Stage& stage, int step, const uint32_t* fn) {
    tile_load<kA>(stage.tiles[0][step], kTileBytes);
    tile_load<kB>(fn, kTileBytes);
    tile_dot<0, kA, kB>();
    if constexpr (kTokenGroups == 2) tile_load<kA + 1>(stage.tiles[1][step], kTileBytes);
    if constexpr (kTokenGroups == 2) tile_dot<2, kA + 1, kB>();
    if constexpr (kOutputs == kMixes) {
      tile_load<kB + 1>(fn + kTileWords, kTileBytes);
      tile_dot<1, kA, kB + 1>();
      if constexpr (kTokenGroups == 2) tile_dot<3, kA + 1, kB + 1>();
      tile_load<kB>(fn + 2 * kTileWords, kTileBytes);
      tile_dot<0, kA, kB>();
      if constexpr (kTokenGroups == 2) tile_dot<2, kA + 1, kB>();
    }
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

  // The products and squares of one stream of up to 32 tokens; `fn` is the stream's part of packed fn.
  template <int kOutputs, int kTokenGroups, class X>
  DSV4_INLINE void stream_sums(const Stager<X>& stager, const uint32_t* fn, float (*out)[kSums]) {
    constexpr int64_t kStepWords = tiles(kOutputs) * kTileWords, kChunkElements = kChunk * kStep;
    const int64_t hidden = stager.rows.hidden, all = steps(hidden), tokens = stager.rows.tokens;
    Stage stages[2];
    if (tokens < kTokenGroups * kTileRows) memset(stages, 0, sizeof(stages));
    alignas(64) float sums[kTokenGroups * kTileRows][2 * kTileRows];
    zero_sums<0, kOutputs>();
    if constexpr (kTokenGroups == 2) zero_sums<2, kOutputs>();
    stager.stage(0, 0, tokens, &stages[0]);
    for (int64_t step = 0; step < all; step += kChunk) {
      const Stage& now = stages[step / kChunk % 2];
      Stage* next = &stages[1 - step / kChunk % 2];
      if (step + kChunk < all) stager.stage(step * kStep + kChunkElements, 0, tokens, next);
      for (int s = 0; s < kChunk; ++s) {
        const uint32_t* block = fn + (step + s) * kStepWords;
        for (int line = 0; line < kStepWords / 16; ++line) avx512::prefetch(block + kFnAhead * kStepWords + 16 * line);
        if (step + s < all) multiply_step<kOutputs, kTokenGroups>(now, s, block);
      }
    }
    store_sums<0, kOutputs>(sums[0], sizeof(sums[0]), kTileRows);
    if constexpr (kTokenGroups == 2) store_sums<2, kOutputs>(sums[kTileRows], sizeof(sums[0]), kTileRows);
    for (int64_t t = 0; t < tokens; ++t) {
      for (int j = 0; j < kOutputs; ++j) out[t][j] = product<kOutputs>(sums[t], 1, j);
      out[t][kSquares] = _mm512_reduce_add_ps(stager.squares[t]);
    }
  }

  // Adds up the streams' sums, first to last.
  DSV4_INLINE void add_streams(const float (*parts)[kGroups * kTileRows][kSums], int64_t tokens, float (*out)[kSums]) {
    for (int64_t t = 0; t < tokens; ++t) {
      for (int j = 0; j < kSums; j += 16) {
        __m512 sum = _mm512_load_ps(parts[0][t] + j);
        for (int s = 1; s < kStreams; ++s) sum = _mm512_add_ps(sum, _mm512_load_ps(parts[s][t] + j));
        _mm512_store_ps(out[t] + j, sum);
      }
    }
  }

  template <class X, int kOutputs>
  DSV4_INLINE void many(const Rows<X>& rows, const void* packed, const avx512::Traffic<X>& traffic,
                        float (*out)[kSums]) {
    alignas(64) float parts[kStreams][kGroups * kTileRows][kSums] = {};
    const int64_t words = steps(rows.hidden) * tiles(kOutputs) * kTileWords;
    configure_whole();
    for (int s = 0; s < kStreams; ++s) {
      __m512 squares[kGroups * kTileRows];
      for (__m512& sum : squares) sum = _mm512_setzero_ps();
      const Stager<X> stager{rows, traffic, s, squares};
      const uint32_t* fn = static_cast<const uint32_t*>(packed) + s * words;
      if (rows.tokens > kTileRows) {
        stream_sums<kOutputs, 2>(stager, fn, parts[s]);
      } else {
        stream_sums<kOutputs, 1>(stager, fn, parts[s]);
      }
    }
    tile_release();
    add_streams(parts, rows.tokens, out);
  }

  // A chunk of fn as left operand [row of fn, high then low][32] and of up to 16 tokens as right one [pair][token].
  template <int kOutputs>
  struct FewStage {
    alignas(64) bf16 fn[kChunk][tiles(kOutputs) * 16][kStep];
    alignas(64) uint32_t tokens[kChunk][kTileRows * kTileRows];
  };

  template <class X, int kOutputs>
  DSV4_INLINE void stage_few(const Rows<X>& rows, int64_t stream, const View<const float, 2>& fn, int64_t step,
                             __m512* squares, FewStage<kOutputs>* to) {
    for (int s = 0; s < kChunk && step + s < steps(rows.hidden); ++s) {
      const int64_t d = (step + s) * kStep, left = rows.hidden - d;
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
  DSV4_INLINE void few_sums(const Rows<X>& rows, int64_t stream, const View<const float, 2>& fn, float (*out)[kSums]) {
    constexpr int kRows = 2 * kOutputs < kTileRows ? 2 * kOutputs : kTileRows;  // of a tile of fn
    const int64_t tokens = rows.tokens, width = 4 * tokens, all = steps(rows.hidden);
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
    stage_few(rows, stream, fn, 0, squares, &stages[0]);
    for (int64_t step = 0; step < all; step += kChunk) {
      const FewStage<kOutputs>& now = stages[step / kChunk % 2];
      if (step + kChunk < all) stage_few(rows, stream, fn, step + kChunk, squares, &stages[1 - step / kChunk % 2]);
      for (int s = 0; s < kChunk && step + s < all; ++s) {
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
    alignas(64) float sums[2 * kTileRows][kTileRows];
    store_sums<0, kOutputs>(sums[0], kTileBytes, kTileRows * kTileRows);
    tile_release();
    for (int64_t t = 0; t < tokens; ++t) {
      for (int j = 0; j < kOutputs; ++j) out[t][j] = product<kOutputs>(sums[0] + t, kTileRows, j);
      out[t][kSquares] = _mm512_reduce_add_ps(squares[t]);
    }
  }

  // The streams are spread over the threads.
  template <class X, int kOutputs>
  DSV4_INLINE void few(const Rows<X>& rows, const View<const float, 2>& fn, const Context& context,
                       float (*out)[kSums]) {
    alignas(64) float parts[kStreams][kGroups * kTileRows][kSums] = {};
    parallel(context, kStreams, [&](int64_t begin, int64_t end) {
      for (int64_t s = begin; s < end; ++s) few_sums<X, kOutputs>(rows, s, fn, parts[s]);
    });
    add_streams(parts, rows.tokens, out);
  }
};

}  // namespace

int64_t mhc_workspace_bytes(int64_t hidden, int mixes) { return Product::bytes(hidden, mixes); }

Status mhc_pre(const MhcPreParams& p, const Context& context) {
  return avx512::run<Product, bf16>(avx512::PreOp{p, nullptr}, context);
}

Status mhc_post_pre(const MhcPostPreParams& p, const Context& context) {
  return avx512::run<Product, bf16>(avx512::PreOp{p.pre, &p.post}, context);
}

Status mhc_head(const MhcHeadParams& p, const Context& context) {
  return avx512::run<Product, bf16>(avx512::HeadOp{p}, context);
}

}  // namespace dsv4::DSV4_AMX_NAMESPACE
