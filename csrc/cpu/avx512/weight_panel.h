// Products of many rows of activations with quantised or plain bfloat16 weights, which are expanded once for all of
// them: 64 outputs of a chunk of inputs at a time, 16 in a register, a pair of inputs a word. A pair of activations is
// broadcast and meets four registers of weights.
//
// A result has the bits of the dot products of few rows (code_tiles.h, plain_rows.h), whose registers hold 32 inputs of
// one output: lane l of theirs adds every 16th pair of a chunk, and a tree adds the lanes. Here those pairs come one
// after another for every l, sums start at zero for each, and go through the same tree; what waits in it lies in the
// first-level cache. 3 rows and 2 lanes at a time are 24 sums, 8 loads and 6 broadcasts for 24 products. 6 rows of a
// lane load less, but store more than twice as many sums: of 128 inputs, 4 steps a lane, their products took 19 %
// longer, of 1,024 3 %. The limit is the rate of vdpbf16ps; below some 20 rows it is the expansion, whose loads of 16
// rows' codes are transposed (4 shuffles of 64 bytes).
#pragma once

#include "cpu/avx512/code_tiles.h"

namespace dsv4::avx512 {
namespace {

inline constexpr int64_t kPanelColumns = 64;            // outputs that are multiplied at once
inline constexpr int64_t kPanelOutputs = kMostOutputs;  // of a panel: 256 KiB in the second-level cache
inline constexpr int64_t kFewRows = 16;     // of activations, for which tiles straight from the codes are faster
inline constexpr int64_t kPanelRows = 256;  // rows of activations that share an expansion
inline constexpr int kPanelHeight = 3;      // rows of activations of a tile
inline constexpr int kPanelVectors = kPanelColumns / 16;
inline constexpr int kLanes = 16, kLevels = 3;  // of the tree, beyond its first
// Words of a lane of a panel. Lanes lie 1 KiB more than a power of two apart, since words of all lanes are stored at
// once, which would fall into the same sets of the first-level cache.
DSV4_INLINE int64_t lane_words(int64_t steps) { return (steps + 4) * kPanelColumns; }
inline constexpr int64_t kPanelWords = kPanelOutputs * kLanes * (kChunk / kStep + 4);

// The place of lane l in the order of the tree, and the lane of a place: its first level adds l and l + 2, its second
// those to their neighbours, then come quarters.
DSV4_INLINE int64_t tree_order(int64_t l) { return (l & 12) | (l & 1) << 1 | (l >> 1 & 1); }

// Expands to [64 outputs][place of the lane][step][64], rows beyond the last as the last.
template <class Rows>
static __attribute__((noinline)) void expand_chunk(const Rows& rows, const WeightRows<typename Rows::Scale>& w,
                                                   int64_t block, int64_t blocks, uint32_t* panel) {
  const Rows expand = rows;
  const int64_t lane = lane_words(blocks * kBlockSteps), begin = block * Rows::kBlockBytes,
                end = begin + blocks * Rows::kBlockBytes;
  for (int64_t r = 0; r < round_up(w.count, kPanelColumns); r += kLanes) {
    const uint8_t* from[kLanes];
    const typename Rows::Scale* scales[kLanes];
    for (int64_t n = 0; n < kLanes; ++n) {
      const int64_t row = r + n < w.count ? r + n : w.count - 1;
      from[n] = w.codes + row * w.stride;
      scales[n] = w.scales + row * w.scale_stride;
    }
    // The rows that come next, of this chunk or of the one after it; beyond the end asking does nothing.
    const int64_t ahead = r + kLanes < w.count ? kLanes * w.stride : end - begin - r * w.stride;
    uint32_t* to = panel + r / kPanelColumns * kLanes * lane + r % kPanelColumns;
    for (int64_t at = begin; at < end; at += kCodeBytes, to += Rows::kCodeSteps * kPanelColumns) {
      __m512i words[kLanes];
      const __mmask64 mine = mask64(w.bytes - at);
#pragma GCC unroll 16
      for (int n = 0; n < kLanes; ++n) {
        words[n] = _mm512_maskz_loadu_epi8(mine, from[n] + at);
        _mm_prefetch(from[n] + at + ahead, _MM_HINT_T1);
      }
      transpose(words);
      expand.expand_words(words, scales, at / Rows::kBlockBytes,
                          [&](int64_t l, int64_t step, __m512i pairs) __attribute__((always_inline)) {
                            _mm512_store_si512(to + tree_order(l) * lane + step * kPanelColumns, pairs);
                          });
    }
  }
}

// Codes that the next expansion will read, row by row, asked for evenly over so many steps of the products before it.
struct Upcoming {
  const uint8_t* codes;
  int64_t stride, bytes, rows, steps = 1, due = 0;

  DSV4_MEMBER void step() {
    for (due += rows; due >= steps; due -= steps, codes += stride) ask(codes, bytes);
  }
};

// A chunk of kM arranged rows x with 64 outputs of a panel: puts, or adds to, out[m * stride + n]. Two lanes that the
// tree's first level adds come at a time.
template <int kM>
static __attribute__((noinline)) void panel_tile(const bf16* const* x, const uint32_t* panel, int64_t steps, bool first,
                                                 float* out, int64_t stride, Upcoming& upcoming) {
  constexpr int kSums = kM * kPanelVectors;
  __m512 waiting[kLevels][kSums];
  const uint8_t* rows[kM];
#pragma GCC unroll 8
  for (int m = 0; m < kM; ++m) rows[m] = reinterpret_cast<const uint8_t*>(x[m]);
  const auto multiply = [&](const uint32_t* words, int64_t at, __m512* sums) __attribute__((always_inline)) {
    __m512i weights[kPanelVectors];
#pragma GCC unroll 4
    for (int n = 0; n < kPanelVectors; ++n) weights[n] = _mm512_load_si512(words + 16 * n);
#pragma GCC unroll 8
    for (int m = 0; m < kM; ++m) {
      int32_t word;
      __builtin_memcpy(&word, rows[m] + at, sizeof(word));
      const __m512i pair = _mm512_set1_epi32(word);
#pragma GCC unroll 4
      for (int n = 0; n < kPanelVectors; ++n) {
        sums[m * kPanelVectors + n] = dot_bf16(sums[m * kPanelVectors + n], pair, weights[n]);
      }
    }
  };
  const int64_t words = lane_words(steps);
  __m512 sum[kSums];
  for (int64_t place = 0; place < kLanes; place += 2, panel += 2 * words) {
    __m512 other[kSums];
#pragma GCC unroll 32
    for (int i = 0; i < kSums; ++i) sum[i] = other[i] = _mm512_setzero_ps();
    const int64_t lane = tree_order(place) * 4, apart = tree_order(place + 1) * 4 - lane;
    const uint32_t* from = panel;
    for (int64_t at = lane; at < lane + 64 * steps; at += 64, from += kPanelColumns) {
      multiply(from, at, sum);
      multiply(from + words, at + apart, other);
    }
    upcoming.step();
#pragma GCC unroll 32
    for (int i = 0; i < kSums; ++i) sum[i] = _mm512_add_ps(sum[i], other[i]);
    int level = 0;
    for (int64_t bits = place / 2; bits & 1; bits >>= 1, ++level) {
#pragma GCC unroll 32
      for (int i = 0; i < kSums; ++i) sum[i] = _mm512_add_ps(waiting[level][i], sum[i]);
    }
    if (place + 2 < kLanes) {
#pragma GCC unroll 32
      for (int i = 0; i < kSums; ++i) waiting[level][i] = sum[i];
    }
  }
#pragma GCC unroll 8
  for (int m = 0; m < kM; ++m) {
#pragma GCC unroll 4
    for (int n = 0; n < kPanelVectors; ++n) {
      float* to = out + m * stride + 16 * n;
      const __m512 mine = sum[m * kPanelVectors + n];
      _mm512_storeu_ps(to, first ? mine : _mm512_add_ps(_mm512_loadu_ps(to), mine));
    }
  }
}

// Many rows of activations: row(m), m < count, from input 0 on; out[m * kPanelOutputs + n].
template <class Rows, class Row>
DSV4_INLINE void multiply_many(const Rows& expand, const WeightRows<typename Rows::Scale>& w, int64_t count,
                               uint32_t* panel, float* out, const Row& row) {
  for (int64_t block = 0; block == 0 || block < w.blocks; block += kChunkBlocks) {
    const int64_t blocks = w.blocks - block < kChunkBlocks ? w.blocks - block : kChunkBlocks;
    const int64_t steps = blocks * kBlockSteps, words = kLanes * lane_words(steps);
    expand_chunk(expand, w, block, blocks, panel);
    // The chunk that comes next, at the end that of the rows that follow; beyond the last asking does nothing.
    const bool last = block + kChunkBlocks >= w.blocks;
    const uint8_t* next = w.codes + (last ? w.count * w.stride : (block + kChunkBlocks) * Rows::kBlockBytes);
    Upcoming upcoming = {next, w.stride, Rows::bytes(kChunk), w.count};
    upcoming.steps =
        (count + kPanelHeight - 1) / kPanelHeight * ((w.count + kPanelColumns - 1) / kPanelColumns) * (kLanes / 2);
    for (int64_t m = 0, height; m < count; m += height) {
      height = tile_height(count - m, kPanelHeight);
      with_constant<kPanelHeight>(height, [&](auto tall) {
        constexpr int kM = decltype(tall)::value;
        const bf16* rows[kM];
        for (int i = 0; i < kM; ++i) rows[i] = row(m + i) + block * kBlock;
        for (int64_t n = 0; n < w.count; n += kPanelColumns) {
          // The rows of the next tile come while this one keeps the units busy.
          for (int64_t i = n / kPanelColumns; i < kM && m + kM + i < count; i += kPanelOutputs / kPanelColumns) {
            ask(reinterpret_cast<const uint8_t*>(row(m + kM + i) + block * kBlock), 64 * steps);
          }
          panel_tile<kM>(rows, panel + n / kPanelColumns * words, steps, block == 0, out + m * kPanelOutputs + n,
                         kPanelOutputs, upcoming);
        }
      });
    }
  }
}

}  // namespace
}  // namespace dsv4::avx512
