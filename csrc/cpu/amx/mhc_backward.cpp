// The gradients of mhc_pre and mhc_head with bfloat16 streams. fn r is AVX-512's, in float32: from the forward pass's
// two parts of fn the gradients would have four times the error of eager torch. In AMX tiles:
//   d streams   fn^T dz, 16 tokens x 16 elements: dz and fn as bfloat16 high + low, three products (what the low parts
//               have in common is below 2^-16 of the result, which is rounded to bfloat16)
//   d fn        dz r^T, 24 rows of fn x 32 elements over 128 tokens: dz as the sum of three bfloat16 numbers, so that
//               nothing but the order of the sum differs from float32 FMA (where dz is above 2^-103: of smaller ones
//               the last part is lost, since tiles take denormal numbers as zero)
// 12 and 10 products for 32 tokens x 32 elements.
#include "cpu/avx512/mhc_backward.h"

#include "cpu/amx/mhc_product.h"
#include "cpu/amx/pairs.h"
#include "cpu/avx512/mhc_product.h"
#include "cpu/mhc.h"

namespace dsv4::DSV4_AMX_NAMESPACE {
namespace {

using avx512::kBlock;
using avx512::kRun;

constexpr int kDepth = kStep;  // tokens of a tile of d fn

static_assert(avx512::kFew % kTileRows == 0);

DSV4_INLINE Pair minus(Pair x, __m512i part) {
  const Pair near = avx512::widen(part);
  return {_mm512_sub_ps(x.a, near.a), _mm512_sub_ps(x.b, near.b)};
}

struct Gradient {
  template <int kOutputs>
  static constexpr int kSumTiles = kOutputs > kTileRows ? 2 : 1;  // of d fn, for 16 elements
  template <int kOutputs>
  static constexpr int64_t kTotals = avx512::kRunSteps * 2 * kSumTiles<kOutputs> * kTileWords;
  template <int kOutputs>
  static constexpr int kRight = kOutputs / 2 * kTileRows;  // words of a tile of fn for d streams

  // The columns of dz for d fn, three parts of each row of fn: 16 rows in tiles 0, 2 and 3, whose products have sums in
  // common; the other 8 in halves of tile 1 and in tile 4, which adds to the first of them.
  template <int kOutputs>
  static constexpr int kFactorTiles = kOutputs > kTileRows ? 5 : 1;
  template <int kOutputs>
  static constexpr int factor_column(int j, int part) {
    if (kOutputs < kTileRows) return part * kOutputs + j;
    constexpr int kTiles[2][3] = {{0, 2, 3}, {1, 1, 4}};
    if (j < kTileRows) return kTiles[0][part] * kTileRows + j;
    return kTiles[1][part] * kTileRows + (part == 1 ? kOutputs - kTileRows : 0) + j - kTileRows;
  }

  // dz of a block of tokens.
  template <int kOutputs>
  struct Factors {
    alignas(64) bf16 streams[kBlock / kTileRows][2][kTileRows][kStep];                // [tokens][part][token][row]
    alignas(64) bf16 fn[kBlock / kDepth][kFactorTiles<kOutputs>][kTileRows][kDepth];  // [tokens][tile][column][token]
  };

  static int64_t bytes(int64_t hidden, int outputs) {
    return kStreams * Product::steps(hidden) * 4 * (outputs / 2 * kTileRows) * static_cast<int64_t>(sizeof(uint32_t));
  }

  // [stream][step][half of its elements][part][pair of rows][element]
  template <int kOutputs>
  DSV4_INLINE void pack(const View<const float, 2>& fn, int64_t hidden, int64_t part, void* to) {
    const int64_t all = Product::steps(hidden), stream = part / 4;
    const int64_t begin = all * (part % 4) / 4, end = all * (part % 4 + 1) / 4;
    for (int64_t s = begin; s < end; ++s) {
      uint32_t* out = static_cast<uint32_t*>(to) + (stream * all + s) * 4 * kRight<kOutputs>;
      for (int j = 0; j < kOutputs; j += 2, out += kTileRows) {
        const float* row = fn.data + j * fn.stride[0] + stream * hidden + s * kStep;
        const Product::Split x = Product::split(row, hidden - s * kStep);
        const Product::Split y = Product::split(row + fn.stride[0], hidden - s * kStep);
        const Pairs high = interleave(x.high, y.high), low = interleave(x.low, y.low);
        _mm512_storeu_si512(out, high.first);
        _mm512_storeu_si512(out + kRight<kOutputs>, low.first);
        _mm512_storeu_si512(out + 2 * kRight<kOutputs>, high.second);
        _mm512_storeu_si512(out + 3 * kRight<kOutputs>, low.second);
      }
    }
  }

  template <int kOutputs>
  DSV4_INLINE void prepare(const MhcTokenGradient* tokens, int64_t count, Factors<kOutputs>* factors) {
    constexpr int kFirst = kOutputs < kTileRows ? kOutputs : kTileRows;
    const __mmask16 first = avx512::low16(kFirst), rest = avx512::low16(kOutputs - kFirst);
    const int64_t whole = (count + kDepth - 1) / kDepth * kDepth;
    for (int64_t t = 0; t < whole; ++t) {
      const float* product = tokens[t < count ? t : 0].product;
      Pair dz = {_mm512_maskz_loadu_ps(first, product), _mm512_maskz_loadu_ps(rest, product + kFirst)};
      if (t >= count) dz = {_mm512_setzero_ps(), _mm512_setzero_ps()};
      for (int part = 0; part < 2; ++part) {
        const __m512i words = avx512::narrow(dz);
        _mm512_store_si512(factors->streams[t / kTileRows][part][t % kTileRows], words);
        dz = minus(dz, words);
      }
    }
    constexpr int kStride = sizeof(MhcTokenGradient) / sizeof(float);
    const __m512i lane = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    const __m512i index = _mm512_mullo_epi32(lane, _mm512_set1_epi32(kStride));
    memset(factors->fn, 0, sizeof(factors->fn));  // columns that nothing takes
    for (int64_t at = 0; at < count; at += kDepth) {
      const int64_t left = std::min<int64_t>(kDepth, count - at);
      for (int j = 0; j < kOutputs; ++j) {
        const float* from = tokens[at].product + j;
        const __m512 zero = _mm512_setzero_ps();
        Pair dz = {_mm512_mask_i32gather_ps(zero, avx512::low16(left), index, from, 4),
                   _mm512_mask_i32gather_ps(zero, avx512::high16(left), index, from + kTileRows * kStride, 4)};
        for (int part = 0; part < 3; ++part) {
          const __m512i words = avx512::narrow(dz);
          const int column = factor_column<kOutputs>(j, part);
          _mm512_store_si512(factors->fn[at / kDepth][column / kTileRows][column % kTileRows], words);
          dz = minus(dz, words);
        }
      }
    }
  }

  // 16 tokens of a stream at a time; those before are finished, a row after every three products.
  template <int kOutputs, class Row>
  DSV4_INLINE void streams(const Factors<kOutputs>& factors, int64_t first, int64_t count, const void* fn,
                           int64_t hidden, avx512::Steps run, const Row& row) {
    TileConfig config;
    for (int tile = 0; tile < 4; ++tile) config.set(tile, kTileRows, kTileBytes);
    for (int tile = kA; tile < kA + 2; ++tile) config.set(tile, kTileRows, 2 * kOutputs);
    for (int tile = kB; tile < kB + 2; ++tile) config.set(tile, kOutputs / 2, kTileBytes);
    tile_configure(config);
    alignas(64) float sums[2][kTileRows][kRun + kTileRows];  // rows in different sets of the cache
    constexpr int64_t kStride = sizeof(sums[0][0]);
    const int64_t tiles = (count + kTileRows - 1) / kTileRows, jobs = kStreams * tiles;
    for (int64_t job = 0; job <= jobs; ++job) {
      const int64_t before = (job - 1) % tiles * kTileRows,
                    rows = job == 0 ? 0 : std::min<int64_t>(kTileRows, count - before);
      const auto finish = [&](int64_t t) __attribute__((always_inline)) {
        if (t >= rows) return;
        const auto out = row(static_cast<int>((job - 1) / tiles), before + t);
        const float* from = sums[(job - 1) % 2][t];
        for (int64_t d = 0; d < run.width; d += kStep) out.finish(d, run.width, avx512::load(from + d));
      };
      if (job == jobs) {
        for (int64_t t = 0; t < rows; ++t) finish(t);
        break;
      }
      const auto& dz = factors.streams[first / kTileRows + job % tiles];
      tile_load<kA>(dz[0], kTileBytes);
      tile_load<kA + 1>(dz[1], kTileBytes);
      const uint32_t* words =
          static_cast<const uint32_t*>(fn) + (job / tiles * Product::steps(hidden) + run.begin) * 4 * kRight<kOutputs>;
      float* to = sums[job % 2][0];
      int64_t t = 0;
      for (int64_t step = run.begin; step < run.end; ++step, words += 4 * kRight<kOutputs>, to += kStep) {
        half_step<0, kOutputs>(words, to, kStride);
        finish(t++);
        half_step<1, kOutputs>(words + 2 * kRight<kOutputs>, to + kTileRows, kStride);
        finish(t++);
      }
      for (; t < rows; ++t) finish(t);
    }
    tile_release();
  }

  // fn^T dz of 16 tokens for 16 elements.
  template <int kTile, int kOutputs>
  DSV4_INLINE void half_step(const uint32_t* fn, float* sums, int64_t stride) {
    tile_load<kB>(fn, kTileBytes);
    tile_load<kB + 1>(fn + kRight<kOutputs>, kTileBytes);
    tile_zero<kTile>();
    tile_dot<kTile, kA + 1, kB>();
    tile_dot<kTile, kA, kB>();
    tile_dot<kTile, kA, kB + 1>();
    tile_store<kTile>(sums, stride);
  }

  template <int kOutputs>
  DSV4_INLINE void add_fn(const Factors<kOutputs>& factors, const bf16 (*rows)[kRun], int64_t count, int64_t steps,
                          float* totals) {
    Product::configure_whole();
    alignas(64) uint32_t right[kBlock / kDepth][2][kTileRows][kTileRows];  // [tokens][fours][pair of tokens][element]
    const int64_t whole = (count + kDepth - 1) / kDepth * kDepth;
    for (int64_t step = 0; step < steps; ++step, totals += 2 * kSumTiles<kOutputs> * kTileWords) {
      for (int64_t t = 0; t < whole; t += 2) {
        const auto row = [&](int64_t token) __attribute__((always_inline)) {
          return token < count ? _mm512_load_si512(rows[token] + step * kStep) : _mm512_setzero_si512();
        };
        const Pairs pairs = interleave_fours(row(t), row(t + 1));
        _mm512_store_si512(right[t / kDepth][0][t % kDepth / 2], pairs.first);
        _mm512_store_si512(right[t / kDepth][1][t % kDepth / 2], pairs.second);
      }
      move_totals<kOutputs>(totals, [](auto tile, float* at) { tile_load<decltype(tile)::value>(at, kTileBytes); });
      for (int64_t at = 0; at * kDepth < count; ++at) {
        tile_load<kB>(right[at][0][0], kTileBytes);
        tile_load<kB + 1>(right[at][1][0], kTileBytes);
        const auto add = [&](auto first, int tile) __attribute__((always_inline)) {
          constexpr int kSum = decltype(first)::value, kLeft = kA + kSum / 2;
          tile_load<kLeft>(factors.fn[at][tile], kTileBytes);
          tile_dot<kSum, kLeft, kB>();
          tile_dot<kSum + 1, kLeft, kB + 1>();
        };
        constexpr std::integral_constant<int, 0> kOf16{};
        add(kOf16, 0);
        if constexpr (kOutputs == kMixes) {
          constexpr std::integral_constant<int, 2> kOf8{};
          add(kOf8, 1), add(kOf16, 2), add(kOf8, 4), add(kOf16, 3);
        }
      }
      move_totals<kOutputs>(totals, [](auto tile, float* at) { tile_store<decltype(tile)::value>(at, kTileBytes); });
    }
    tile_release();
  }

  // One step's totals: [columns 0 to 15, then 16 to 31][fours], a tile each.
  template <int kOutputs, class Move>
  DSV4_INLINE void move_totals(float* totals, const Move& move) {
    move(std::integral_constant<int, 0>(), totals);
    move(std::integral_constant<int, 1>(), totals + kTileWords);
    if constexpr (kOutputs == kMixes) {
      move(std::integral_constant<int, 2>(), totals + 2 * kTileWords);
      move(std::integral_constant<int, 3>(), totals + 3 * kTileWords);
    }
  }

  template <int kOutputs>
  DSV4_INLINE Pair total(const float* totals, int64_t step, int j) {
    totals += step * 2 * kSumTiles<kOutputs> * kTileWords;
    const auto column = [&](int c) __attribute__((always_inline)) {
      const float* at = totals + c / kTileRows * 2 * kTileWords + c % kTileRows * kTileRows;
      return in_order(at, at + kTileWords);
    };
    Pair sum = column(factor_column<kOutputs>(j, 0));
    for (int part = 1; part < 3; ++part) {
      const int c = factor_column<kOutputs>(j, part);
      if (c >= kSumTiles<kOutputs> * kTileRows) continue;  // has been added
      const Pair more = column(c);
      sum = {_mm512_add_ps(sum.a, more.a), _mm512_add_ps(sum.b, more.b)};
    }
    return sum;
  }
};

}  // namespace

int64_t mhc_backward_bytes(int64_t tokens, int64_t hidden, int mixes, const Context& context) {
  return avx512::backward_bytes<avx512::Product, Gradient, bf16>(tokens, hidden, mixes, context);
}

Status mhc_pre_backward(const MhcPreBackwardParams& a, const Context& context) {
  return avx512::pre_backward<avx512::Product, Gradient, bf16>(a, context);
}

Status mhc_head_backward(const MhcHeadBackwardParams& a, const Context& context) {
  return avx512::head_backward<avx512::Product, Gradient, bf16>(a, context);
}

}  // namespace dsv4::DSV4_AMX_NAMESPACE
