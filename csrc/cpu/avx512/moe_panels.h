// Dot products of activations with quantised rows of weights for the experts, without a multiplication for the scales:
// scales are powers of two, so FP4 weights take theirs while they expand (exact in bfloat16), and FP8 weights, whose
// scale serves a whole block of outputs, leave it to a copy of the activations (exact too). What remains is
//   sum = dot(x, w, sum) over the steps of a chunk, in order;   result = total(chunk 0) + total(chunk 1) + ...
// as for many rows (weight_panel.h), so that a result depends on its row of activations and its row of weights alone.
// Here four rows of weights go from their codes through registers into the products; memory is the limit.
// Inputs come in the order of the weight format (weight_rows.h), whole blocks, zero beyond the last.
#pragma once

#include "cpu/avx512/weight_panel.h"

namespace dsv4::avx512 {
namespace {

inline constexpr int kColumns = 4;  // rows of weights that are multiplied at once

// e2m1 with its scales.
class Fp4Panel {
 public:
  using Rows = Fp4Rows;
  static constexpr int kMostScale = kMostScaleFp4;
  static constexpr bool kScalesActivations = false;

  // What expand subtracts, a word a group of 32 inputs, for four rows: [block][row][4], in steps of 8 blocks.
  static void read_scales(const uint8_t* const* scales, int64_t count, uint16_t* to) {
    const __m512i low = _mm512_setr_epi64(0, 8, 1, 9, 2, 10, 3, 11),
                  high = _mm512_setr_epi64(4, 12, 5, 13, 6, 14, 7, 15);
    const __m512i first = _mm512_setr_epi64(0, 1, 8, 9, 2, 3, 10, 11),
                  second = _mm512_setr_epi64(4, 5, 12, 13, 6, 7, 14, 15);
    for (int64_t i = 0; i < count; i += 32, to += 128) {
      const __mmask32 mine = mask32(count - i > 32 ? 32 : count - i);
      __m512i words[kColumns];
#pragma GCC unroll 4
      for (int n = 0; n < kColumns; ++n) {
        const __m512i scale = _mm512_cvtepu8_epi16(_mm256_maskz_loadu_epi8(mine, scales[n] + i));
        words[n] = _mm512_slli_epi16(_mm512_sub_epi16(_mm512_set1_epi16(kMostScaleFp4), scale), 7);
      }
#pragma GCC unroll 2
      for (int half = 0; half < 2; ++half) {
        const __m512i ab = _mm512_permutex2var_epi64(words[0], half == 0 ? low : high, words[1]);
        const __m512i cd = _mm512_permutex2var_epi64(words[2], half == 0 ? low : high, words[3]);
        _mm512_storeu_si512(to + 64 * half, _mm512_permutex2var_epi64(ab, first, cd));
        _mm512_storeu_si512(to + 64 * half + 32, _mm512_permutex2var_epi64(ab, second, cd));
      }
    }
  }

  template <class... Count>
  DSV4_MEMBER Block expand(const uint8_t* codes, const uint16_t* scales, Count... count) const {
    return rows_.expand(codes, scales, count...);
  }

 private:
  Fp4Rows rows_;
};

// e4m3; activations have been multiplied by the scale of the block.
class Fp8Panel {
 public:
  using Rows = Fp8Rows;
  static constexpr int kMostScale = kMostScaleFp8;
  static constexpr bool kScalesActivations = true;

  static void read_scales(const uint8_t* const*, int64_t, uint16_t*) {}
  template <class... Count>
  DSV4_MEMBER Block expand(const uint8_t* codes, const uint16_t*, Count... count) const {
    return rows_.expand(codes, Fp8Rows::kUnscaled, count...);
  }

 private:
  Fp8Rows rows_;
};

// Adds, or for the first chunk puts, the totals of kM x 4 sums to out[m * stride + n], n < columns.
template <int kM>
DSV4_INLINE void put_sums(const __m512* sum, bool first, int64_t columns, float* out, int64_t stride) {
  const __mmask8 mine = static_cast<__mmask8>((1 << columns) - 1);
#pragma GCC unroll 2
  for (int m = 0; m < kM; m += 4) {
    const int left = kM - m < 4 ? kM - m : 4;
    __m512 quads[4];
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) quads[i] = i < left ? quad_sums(sum + 4 * (m + i)) : quads[0];
    const __m512 low = lane_pairs(quads[0], quads[1]), high = left > 2 ? lane_pairs(quads[2], quads[3]) : low;
    const __m512 sums = lane_pairs(low, high);
    const __m128 rows[4] = {_mm512_castps512_ps128(sums), _mm512_extractf32x4_ps(sums, 1),
                            _mm512_extractf32x4_ps(sums, 2), _mm512_extractf32x4_ps(sums, 3)};
#pragma GCC unroll 4
    for (int i = 0; i < left; ++i) {
      float* to = out + (m + i) * stride;
      const __m128 before = first ? _mm_setzero_ps() : _mm_maskz_loadu_ps(mine, to);
      _mm_mask_storeu_ps(to, mine, first ? rows[i] : _mm_add_ps(before, rows[i]));
    }
  }
}

// kM rows x with four rows of weights straight from their codes of `bytes` bytes, scales as read_scales left them. What
// lies `ahead` bytes further is asked for.
template <int kM, class Panel>
static __attribute__((noinline)) void dot_codes(const Panel& panel, const uint8_t* const* codes, int64_t bytes,
                                                int64_t ahead, const uint16_t* scales, const bf16* x, int64_t stride,
                                                int64_t columns, float* out, int64_t out_stride) {
  constexpr int64_t kBytes = Panel::Rows::kBlockBytes;
  const uint8_t *row0 = codes[0], *row1 = codes[1], *row2 = codes[2], *row3 = codes[3];
  bool first = true;
  for (int64_t left = bytes; first || left > 0; left -= kChunkBlocks * kBytes, first = false) {
    __m512 sum[kM * kColumns];
#pragma GCC unroll 32
    for (int i = 0; i < kM * kColumns; ++i) sum[i] = _mm512_setzero_ps();
    const auto add = [&](auto expand) __attribute__((always_inline)) {
      const auto column = [&](int n, const uint8_t* row) __attribute__((always_inline)) {
        ask(row + ahead, kBytes);
        const Block b = expand(row, scales + 4 * n);
#pragma GCC unroll 8
        for (int m = 0; m < kM; ++m) {
#pragma GCC unroll 4
          for (int j = 0; j < kBlockSteps; ++j) {
            const __m512i values = _mm512_loadu_si512(x + m * stride + kStep * j);
            sum[m * kColumns + n] = dot_bf16(sum[m * kColumns + n], values, b.w[j]);
          }
        }
      };
      column(0, row0), column(1, row1), column(2, row2), column(3, row3);
      row0 += kBytes, row1 += kBytes, row2 += kBytes, row3 += kBytes, x += kBlock, scales += 4 * kColumns;
    };
    const int64_t whole = left / kBytes < kChunkBlocks ? left / kBytes : kChunkBlocks;
    for (int64_t b = 0; b < whole; ++b) {
      add([&](const uint8_t* row, const uint16_t* scale)
              __attribute__((always_inline)) { return panel.expand(row, scale); });
    }
    if (whole < kChunkBlocks && left % kBytes > 0) {
      add([&](const uint8_t* row, const uint16_t* scale)
              __attribute__((always_inline)) { return panel.expand(row, scale, left % kBytes); });
    }
    put_sums<kM>(sum, first, columns, out, out_stride);
  }
}

// Activations of one block times a power of two.
DSV4_INLINE void scale_block(const bf16* x, __m512 scale, bf16* to, int64_t stride) {
#pragma GCC unroll 4
  for (int j = 0; j < kBlockSteps; ++j) store(to + j * stride, scaled(load(x + kStep * j), scale));
}

}  // namespace
}  // namespace dsv4::avx512
