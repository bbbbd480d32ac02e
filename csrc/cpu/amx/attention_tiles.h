// Keys, queries and numerators of sparse_attention as AMX tiles take them. A tile lies in 1 KiB without gaps wherever
// it is not read as a key's row, so that its 16 lines fall into 16 sets of the cache.
#pragma once

#include "cpu/amx/tile.h"
#include "cpu/avx512/attention_forward.h"

namespace dsv4::DSV4_AMX_NAMESPACE {
namespace {

using avx512::E4m3Table;
using avx512::KeyReader;

inline constexpr int64_t kStepKeys = 32;                         // keys decoded together; the depth of a value product
inline constexpr int64_t kStepDims = 32;                         // the depth of a score product
inline constexpr int64_t kTileElements = kTileRows * kStepDims;  // bfloat16
inline constexpr int64_t kTileSums = kTileRows * kTileRows;      // float32
inline constexpr int64_t kAhead = 64;                            // keys between a request for memory and its use

constexpr int64_t tiles_of(int64_t count) { return (count + kTileRows - 1) / kTileRows; }

// Elements from one key's row to the next: not a power of two, or the rows of a tile would share sets.
constexpr int64_t row_stride(int64_t head_dim) { return head_dim + kStepDims; }

// Elements from the pairs of 32 keys to the next 32; for the same reason.
constexpr int64_t pairs_stride(int64_t head_dim) { return kStepKeys * head_dim + 2 * kTileElements; }

// Queries as right operands: [two tiles of heads][32 dims][tile][pair of dims][16 heads][2], heads after the last zero.
DSV4_INLINE void pack_query(const SparseAttentionParams& p, int64_t row, bf16* to) {
  const int64_t heads = p.query.size(1), head_dim = p.query.size(2), tiles = tiles_of(heads);
  for (int64_t tile = 0; tile < tiles; tile += 2) {
    for (int64_t d = 0; d < head_dim; d += kStepDims) {
      for (int64_t t = tile; t < smaller(tile + 2, tiles); ++t, to += kTileElements) {
        __m512i x[kTileRows];
        for (int i = 0; i < kTileRows; ++i) {
          const int64_t h = t * kTileRows + i;
          x[i] = h < heads ? _mm512_loadu_si512(p.query.as<const bf16>().at(row, h) + d) : _mm512_setzero_si512();
        }
        avx512::transpose(x);
        for (int i = 0; i < kTileRows; ++i) _mm512_storeu_si512(to + i * kStepDims, x[i]);
      }
    }
  }
}

// Loads the keys of a step one after the other, so that it can go on beside tile products. Keys from `end` on are zero.
struct KeyLoad {
  const KeyReader<bf16>& reader;
  int64_t head_dim, end, ahead;  // keys up to `ahead` are asked for
  bf16* rows;                    // [32, row_stride], left operands of scores
  bf16* pairs;                   // [tile of dims][pair of keys][16 dims][2], right operands of values; null: not wanted

  // Key `j`, number `i` of its step.
  DSV4_INLINE void load(const KeyLoad& l, int64_t j, int64_t i) {
    if (j + kAhead < l.ahead) KeyReader<bf16>::template prefetch<false>(l.reader, j + kAhead);
    bf16* row = l.rows + i * row_stride(l.head_dim);
    if (j < l.end) {
      const bf16* at = KeyReader<bf16>::template read<false>(l.reader, l.reader.table(), j, row);
      if (at != row) avx512::widen(at, l.head_dim, row);
    } else {
      for (int64_t d = 0; d < l.head_dim; d += kStepDims) _mm512_storeu_si512(row + d, _mm512_setzero_si512());
    }
    if (i % 2 == 1 && l.pairs != nullptr) pair(l, i / 2);
  }

  // Elements unpack within lanes, so the dims of two tiles come in the order that pack_sums knows.
  DSV4_INLINE void pair(const KeyLoad& l, int64_t i) {
    const bf16 *first = l.rows + 2 * i * row_stride(l.head_dim), *second = first + row_stride(l.head_dim);
    bf16* to = l.pairs + i * kStepDims;
    for (int64_t d = 0; d < l.head_dim; d += kStepDims, to += 2 * kTileElements) {
      const __m512i a = _mm512_loadu_si512(first + d), b = _mm512_loadu_si512(second + d);
      _mm512_storeu_si512(to, _mm512_unpacklo_epi16(a, b));
      _mm512_storeu_si512(to + kTileElements, _mm512_unpackhi_epi16(a, b));
    }
  }
};

// 32 sums of a head from two tiles of dims, scaled and rounded, in the order of the dims.
DSV4_INLINE __m512i pack_sums(const float* sums, __m512 factor) {
  alignas(64) static const uint16_t kOrder[32] = {0, 1, 2,  3,  16, 17, 18, 19, 4,  5,  6,  7,  20, 21, 22, 23,
                                                  8, 9, 10, 11, 24, 25, 26, 27, 12, 13, 14, 15, 28, 29, 30, 31};
  const __m512 a = _mm512_mul_ps(_mm512_loadu_ps(sums), factor);
  const __m512 b = _mm512_mul_ps(_mm512_loadu_ps(sums + kTileSums), factor);
  return _mm512_permutexvar_epi16(_mm512_load_si512(kOrder), reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(b, a)));
}

// e^x of x <= 0 or so; below e^-104 it is 0. As avx512::exp, with the nearest integer by addition, and the series of
// e^r fitted to the sixth power (its error is below 3e-9). NaN stays NaN.
DSV4_INLINE __m512 exp_below_zero(__m512 x) {
  x = _mm512_max_ps(_mm512_set1_ps(-105.f), x);
  const __m512 shift = _mm512_set1_ps(12582912.f);  // 1.5 * 2^23
  const __m512 n = _mm512_sub_ps(_mm512_fmadd_ps(x, _mm512_set1_ps(1.44269504f), shift), shift);
  __m512 r = _mm512_fnmadd_ps(n, _mm512_set1_ps(0.693145752f), x);
  r = _mm512_fnmadd_ps(n, _mm512_set1_ps(1.42860677e-6f), r);
  __m512 p = _mm512_set1_ps(1.38145173e-3f);
  p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(8.36875570e-3f));
  p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(4.16683925e-2f));
  p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(0.166665196f));
  p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(0.499999940f));
  p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(1.f));
  p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(1.f));
  return _mm512_scalef_ps(p, n);
}

// The largest of the scaled scores [32 keys][16 heads] of the first `keys` keys, and `most`.
DSV4_INLINE __m512 largest(const float* scores, int64_t keys, __m512 scale, __m512 most) {
  for (int64_t key = 0; key < keys; ++key) {
    most = _mm512_max_ps(most, _mm512_mul_ps(_mm512_loadu_ps(scores + key * kTileRows), scale));
  }
  return most;
}

struct Softmax {
  __m512 scale, most, totals[2];  // of even and odd keys
};

// Numerators of the same scores as a left operand: [16 heads][32 keys], those after the last 0.
template <bool kWhole>
DSV4_INLINE void weigh(const float* scores, int64_t keys, Softmax& s, bf16* to) {
  alignas(64) static const uint16_t kInterleave[32] = {0, 16, 1, 17, 2,  18, 3,  19, 4,  20, 5,  21, 6,  22, 7,  23,
                                                       8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
  const __m512i order = _mm512_load_si512(kInterleave);
  __m512i x[kTileRows];
#pragma GCC unroll 4
  for (int i = 0; i < kTileRows; ++i) {
    __m512 pair[2];
#pragma GCC unroll 2
    for (int j = 0; j < 2; ++j) {
      const int key = 2 * i + j;
      const __m512 score = _mm512_loadu_ps(scores + key * kTileRows);
      pair[j] = exp_below_zero(_mm512_fmsub_ps(score, s.scale, s.most));
      if (!kWhole && key >= keys) pair[j] = _mm512_setzero_ps();
      s.totals[j] = _mm512_add_ps(s.totals[j], pair[j]);
    }
    x[i] = _mm512_permutexvar_epi16(order, reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(pair[1], pair[0])));
  }
  avx512::transpose(x);
  for (int i = 0; i < kTileRows; ++i) _mm512_storeu_si512(to + i * kStepKeys, x[i]);
}

}  // namespace
}  // namespace dsv4::DSV4_AMX_NAMESPACE
