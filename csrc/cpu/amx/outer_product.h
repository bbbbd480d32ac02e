// Products whose second operand is read along its rows, as gradients need them: c += a b and a^T b, of bfloat16. kDepth
// steps of a sum at a time, both operands are copied into tiles: rows of b as pairs, for a right operand, up to 512
// columns; of a 32 rows as they lie (they stay in the first-level cache while all columns pass), or, of a^T, transposed
// 32 steps at a time. 32 x 32 sums stay in tile registers over those steps; those of the block before are put where
// they belong meanwhile, since tiles that were just stored would have to be waited for. A result depends on its own
// operands alone, in ascending order. Tiles take denormal numbers as zero. Measured: docs/investigations/amx.md.
#pragma once

#include "cpu/amx/pairs.h"
#include "cpu/amx/tile_product.h"
#include "cpu/moe_backward_driver.h"

namespace dsv4::DSV4_AMX_NAMESPACE {
namespace {

struct OuterProduct {
  static constexpr int64_t kWidth = 512;  // rows of a^T, and columns of b, that are copied together
  static constexpr int64_t kDepth = 512;  // steps of a sum
  static constexpr int64_t kStep = avx512::kStep;

  static int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

  static int64_t outer_memory() {
    return 2 * kWidth * kDepth * static_cast<int64_t>(sizeof(bf16)) +
           kWidth * kWidth * static_cast<int64_t>(sizeof(float));
  }

  template <class X>
  static void accumulate(const MoeRows<const X>& a, int64_t count, int64_t inputs, const X* b, int64_t b_stride,
                         int64_t n, bool first, const MoeRows<float>& c, uint8_t* memory) {
    bf16 *left = reinterpret_cast<bf16*>(memory), *right = left + kWidth * kDepth;
    configure();
    int64_t at = 0;
    do {  // once even of no inputs: the first sums are stored
      const int64_t depth = smaller(inputs - at, kDepth), steps = (depth + kStep - 1) / kStep;
      pack<false>({b, b_stride, nullptr}, at, depth, inputs, n, steps, right);
      const bool fresh = first && at == 0;
      Blocks blocks([&](int64_t m, int64_t j, const float (*sums)[kSide]) __attribute__((always_inline)) {
        for (int64_t i = 0; i < smaller(count - m, kSide); ++i) put(sums[i], c.at(m + i) + j, n - j, fresh);
      });
      for (int64_t m = 0; m < count; m += kSide) {
        pack_rows(a, m, smaller(count - m, kSide), at, depth, steps, left);
        for (int64_t j = 0; j < n; j += kSide) blocks.multiply(left, right, m, 0, j, steps, count - m > kTileRows);
      }
      blocks.finish();
      at += depth;
    } while (at < inputs);
    tile_release();
  }

  template <class X>
  static void outer(const MoeRows<const X>& a, const MoeRows<const X>& b, int64_t count, int64_t m, int64_t n, X* out,
                    int64_t out_stride, uint8_t* memory) {
    configure();
    for (int64_t column = 0; column < n; column += kWidth) {
      const MoeRows<const X> some{b.data + column, b.stride, b.index};
      outer_columns(a, some, count, m, smaller(n - column, kWidth), column > 0, out + column, out_stride, memory);
    }
    tile_release();
    _mm_sfence();
  }

 private:
  // kept: memory holds a^T of the columns before, if it has room for all its rows.
  template <class X>
  static void outer_columns(const MoeRows<const X>& a, const MoeRows<const X>& b, int64_t count, int64_t m, int64_t n,
                            bool kept, X* out, int64_t out_stride, uint8_t* memory) {
    bf16 *left = reinterpret_cast<bf16*>(memory), *right = left + kWidth * kDepth;
    float* totals = reinterpret_cast<float*>(right + kWidth * kDepth);
    int64_t at = 0;
    do {  // once even of no rows: the gradient is zero
      const int64_t depth = smaller(count - at, kDepth), steps = (depth + kStep - 1) / kStep;
      if (!kept || count > kDepth) pack<true>(a, at, depth, count, m, steps, left);
      pack<false>(b, at, depth, count, n, steps, right);
      const bool fresh = at == 0, last = at + depth >= count;
      Blocks blocks([&](int64_t row, int64_t j, const float (*sums)[kSide]) __attribute__((always_inline)) {
        for (int64_t i = 0; i < smaller(m - row, kSide); ++i) {
          float* total = totals + (row + i) * kWidth + j;
          if (last) {
            put(sums[i], total, out + (row + i) * out_stride + j, n - j, fresh);
          } else {
            put(sums[i], total, n - j, fresh);
          }
        }
      });
      for (int64_t row = 0; row < m; row += kSide) {
        for (int64_t j = 0; j < n; j += kSide) blocks.multiply(left, right, row, row, j, steps, m - row > kTileRows);
      }
      blocks.finish();
      at += depth;
    } while (at < count);
  }

  static void configure() {
    TileConfig config;
    for (int tile = 0; tile < kTiles; ++tile) config.set(tile, kTileRows, kTileBytes);
    tile_configure(config);
  }

  // Blocks of 32 x 32 sums, one after another; `put` takes each while the next is multiplied.
  template <class Put>
  class Blocks {
   public:
    explicit Blocks(const Put& put) : put_(put) {}

    // Block (row, column), of the tiles of `left` from row `from` on.
    void multiply(const bf16* left, const bf16* right, int64_t row, int64_t from, int64_t column, int64_t steps,
                  bool two_rows) {
      const auto tiles = [steps](const bf16* data, int64_t at) {
        return TileSteps{data + at / kTileRows * steps * kTileElements};
      };
      const TileSteps rows[2] = {tiles(left, from), tiles(left, from + kTileRows)};
      const TileSteps columns[2] = {tiles(right, column), tiles(right, column + kTileRows)};
      two_rows ? sum<2>(rows, columns, steps) : sum<1>(rows, columns, steps);
      finish();
      row_ = row, column_ = column, next_ ^= 1;
    }
    void finish() {
      if (row_ >= 0) put_(row_, column_, sums_[next_ ^ 1]);
      row_ = -1;
    }

   private:
    template <int kRows>
    void sum(const TileSteps (&rows)[2], const TileSteps (&columns)[2], int64_t steps) {
      zero_sums<kRows, 2>();
      add_products<kRows, 2, true>(rows, columns, steps, [](int64_t) {});
      store_sums<kRows, 2>(sums_[next_]);
    }

    const Put put_;
    int64_t row_ = -1, column_ = 0;
    int next_ = 0;
    alignas(64) float sums_[2][kSide][kSide];
  };

  // Sums of up to 32 columns, added to those in c, or the first.
  DSV4_INLINE Pair total(const float* sums, const float* c, int64_t count, bool first) {
    const Pair x = in_order(sums, sums + kTileRows);
    if (first) return x;
    const Pair before = avx512::load(c, count);
    return {_mm512_add_ps(before.a, x.a), _mm512_add_ps(before.b, x.b)};
  }
  DSV4_INLINE void put(const float* sums, float* c, int64_t left, bool first) {
    const int64_t count = smaller(left, kSide);
    avx512::store(c, total(sums, c, count, first), count);
  }
  DSV4_INLINE void put(const float* sums, const float* c, bf16* out, int64_t left, bool first) {
    const int64_t count = smaller(left, kSide);
    const Pair x = total(sums, c, count, first);
    const __m512i words = reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(x.b, x.a));
    if (count == kSide && reinterpret_cast<uintptr_t>(out) % 64 == 0) {
      _mm512_stream_si512(reinterpret_cast<__m512i*>(out), words);  // a line as a whole: need not be read before
    } else {
      _mm512_mask_storeu_epi16(out, avx512::mask32(count), words);
    }
  }

  DSV4_INLINE __m512i load(const bf16* from, int64_t count) {
    return count >= kStep ? _mm512_loadu_si512(from)
                          : _mm512_maskz_loadu_epi16(count <= 0 ? 0 : avx512::mask32(count), from);
  }

  // Steps [at, at + depth) of up to 32 rows from `first` on, zero beyond: [tile of rows][step][row][32].
  static void pack_rows(const MoeRows<const bf16>& a, int64_t first, int64_t rows, int64_t at, int64_t depth,
                        int64_t steps, bf16* to) {
    for (int64_t i = 0; i < (rows > kTileRows ? kSide : kTileRows); ++i) {
      bf16* tile = to + i / kTileRows * steps * kTileElements + i % kTileRows * kStep;
      const bf16* row = i < rows ? a.at(first + i) + at : nullptr;
      for (int64_t s = 0; s < steps; ++s, tile += kTileElements) {
        const __m512i x = row == nullptr ? _mm512_setzero_si512() : load(row + s * kStep, depth - s * kStep);
        _mm512_store_si512(tile, x);
      }
    }
  }

  // Columns [0, n) of rows [at, at + depth) of `all`, zero beyond, as right operands [tile of columns][step][pair of
  // rows][16][2], two tiles of 32 columns by fours; or transposed, as left ones [tile of columns][step][column][32
  // rows]. Rows that come later are asked for.
  template <bool kTransposed>
  static void pack(const MoeRows<const bf16>& from, int64_t at, int64_t depth, int64_t all, int64_t n, int64_t steps,
                   bf16* to) {
    for (int64_t s = 0; s < steps; ++s) {
      const bf16* rows[kStep];
      for (int64_t i = 0; i < kStep; ++i) rows[i] = s * kStep + i < depth ? from.at(at + s * kStep + i) : nullptr;
      for (int64_t j = 0; j < n; j += kSide) {
        for (int64_t i = at + (s + 1) * kStep; i < smaller(at + (s + 2) * kStep, all); ++i) {
          __builtin_prefetch(from.at(i) + j, 0, 2);
        }
        bf16* const tile = to + (j / kTileRows * steps + s) * kTileElements;
        __m512i first[kTileRows], second[kTileRows];
        for (int64_t i = 0; i < kTileRows; ++i) {
          const Pairs pairs = interleave_fours(load(rows[2 * i], j, n), load(rows[2 * i + 1], j, n));
          first[i] = pairs.first, second[i] = pairs.second;
        }
        if constexpr (kTransposed) {
          avx512::transpose(first);
          avx512::transpose(second);
        }
        for (int64_t i = 0; i < kTileRows; ++i) {
          if constexpr (kTransposed) {
            const int64_t column = i / 4 * 8 + i % 4;  // and the one four further
            bf16* line = tile + column / kTileRows * steps * kTileElements + column % kTileRows * kStep;
            _mm512_store_si512(line, first[i]);
            _mm512_store_si512(line + 4 * kStep, second[i]);
          } else {
            _mm512_store_si512(tile + i * kStep, first[i]);
            _mm512_store_si512(tile + steps * kTileElements + i * kStep, second[i]);
          }
        }
      }
    }
  }
  DSV4_INLINE __m512i load(const bf16* row, int64_t j, int64_t n) {
    return row == nullptr ? _mm512_setzero_si512() : load(row + j, n - j);
  }
};

}  // namespace
}  // namespace dsv4::DSV4_AMX_NAMESPACE
