// Keys, queries and numerators of sparse_attention as AMX tiles take them. The 16 lines of a tile fall into different
// sets of the first-level cache: queries and numerators lie in 1 KiB without gaps, keys in rows that are not a power of
// two long.
#pragma once

#include "cpu/amx/tile.h"
#include "cpu/avx512/attention_forward.h"

namespace dsv4::DSV4_AMX_NAMESPACE {
namespace {

inline constexpr int64_t kStepKeys = 32;                         // the depth of a value product
inline constexpr int64_t kStepDims = 32;                         // the depth of a score product
inline constexpr int64_t kTileElements = kTileRows * kStepDims;  // bfloat16
inline constexpr int64_t kTileSums = kTileRows * kTileRows;      // float32
inline constexpr int64_t kSliceDims = 512;  // dims of 32 keys that are decoded for scores at a time
inline constexpr int64_t kAhead = 48;       // keys between a request for memory and its use

constexpr int64_t tiles_of(int64_t count) { return (count + kTileRows - 1) / kTileRows; }

// Heads as right operands: [slice][two tiles of heads][32 dims][tile][pair of dims][16 heads][2], heads after the last
// zero.
DSV4_INLINE void pack_heads(const bf16* from, int64_t stride, int64_t heads, int64_t head_dim, bf16* to) {
  const int64_t tiles = tiles_of(heads);
  for (int64_t first = 0; first < head_dim; first += kSliceDims) {
    for (int64_t tile = 0; tile < tiles; tile += 2) {
      for (int64_t d = first; d < smaller(first + kSliceDims, head_dim); d += kStepDims) {
        for (int64_t t = tile; t < smaller(tile + 2, tiles); ++t, to += kTileElements) {
          __m512i x[kTileRows];
          for (int i = 0; i < kTileRows; ++i) {
            const int64_t h = t * kTileRows + i;
            x[i] = h < heads ? _mm512_loadu_si512(from + h * stride + d) : _mm512_setzero_si512();
          }
          avx512::transpose(x);
          for (int i = 0; i < kTileRows; ++i) _mm512_storeu_si512(to + i * kStepDims, x[i]);
        }
      }
    }
  }
}
DSV4_INLINE void pack_query(const SparseAttentionParams& p, int64_t row, bf16* to) {
  pack_heads(p.query.as<const bf16>().at(row), p.query.stride[1], p.query.size(1), p.query.size(2), to);
}

// A constant that the compiler does not compute again wherever it is used.
DSV4_INLINE __m512i kept(__m512i x) {
  __asm__("" : "+v"(x));
  return x;
}

// The keys of a row, read in pairs, which is faster. All pools hold bfloat16 or FP8.
struct KeyRows {
  const Key* keys;
  int64_t end;  // keys from here on, and those without data, are zero
  int64_t head_dim, codes;
  __m512i fields, magnitude, least;  // constants that the compiler is not to make again wherever it needs them

  static constexpr unsigned kLeastScale = 10, kMostScale = 246;  // 2^-9 and 448 times these are normal

  KeyRows(const SparseAttentionParams& p, const Key* keys_, int64_t end_)
      : keys(keys_),
        end(end_),
        head_dim(p.query.size(2)),
        codes(head_dim - p.rope_dim),
        fields(kept(_mm512_set1_epi16(static_cast<int16_t>(0x87FF)))),
        magnitude(kept(_mm512_set1_epi8(0x7F))),
        least(kept(_mm512_set1_epi8(8))) {}

  // 32 dims of an FP8 row in any case.
  static __attribute__((noinline)) void read_slowly(const KeyRows& r, const Key& key, int64_t d, bf16* to) {
    const unsigned scale = d < r.codes ? key.scales[d / kRowBlock] : 0;
    if (d + kStepDims <= r.codes && scale - kLeastScale <= kMostScale - kLeastScale) {
      const __m512i code = _mm512_cvtepu8_epi16(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(key.data + d)));
      const __m512i size = _mm512_and_si512(code, _mm512_set1_epi16(0x7F));
      if (_mm512_cmpeq_epi16_mask(size, _mm512_set1_epi16(0x7F)) == 0) {
        // Bits of 1 to 7 times 2^-9, their exponents lower by 120.
        alignas(64) static const int16_t kDenormal[32] = {0, -256, -128, -64, 0, 32, 64, 96};
        const __mmask32 small = _mm512_cmplt_epu16_mask(size, _mm512_set1_epi16(8));
        const __m512i bits =
            _mm512_mask_permutexvar_epi16(_mm512_slli_epi16(size, 4), small, size, _mm512_load_si512(kDenormal));
        const __m512i scaled = _mm512_maskz_add_epi16(_mm512_test_epi16_mask(size, size), bits,
                                                      _mm512_set1_epi16(static_cast<int16_t>((scale - 7) * 128)));
        return _mm512_storeu_si512(to, _mm512_or_si512(scaled, _mm512_slli_epi16(_mm512_sub_epi16(code, size), 8)));
      }
    }
    if (d >= r.codes) {
      return _mm512_storeu_si512(to, _mm512_loadu_si512(key.data + r.codes + 2 * (d - r.codes)));
    }
    for (int64_t i = 0; i < kStepDims; ++i, ++d) {
      if (d < r.codes) {
        to[i] = from_float<bf16>(e4m3_value(key.data[d]) * e8m0_value(key.scales[d / kRowBlock]));
      } else {
        memcpy(to + i, key.data + r.codes + 2 * (d - r.codes), sizeof(bf16));
      }
    }
  }

  // Dims [first, last) of two keys from `j` on, in any case.
  static __attribute__((noinline)) void read_any(const KeyRows& r, int64_t j, int64_t first, int64_t last, bf16* rows,
                                                 int64_t stride, bf16* pairs) {
    for (int64_t d = first; d < last; d += kStepDims) {
      for (int64_t i = 0; i < 2; ++i) {
        bf16* to = rows + i * stride + d - first;
        if (j + i >= r.end || r.keys[j + i].data == nullptr) {
          _mm512_storeu_si512(to, _mm512_setzero_si512());
        } else if (r.keys[j + i].scales == nullptr) {
          _mm512_storeu_si512(to, _mm512_loadu_si512(r.keys[j + i].data + 2 * d));
        } else {
          read_slowly(r, r.keys[j + i], d, to);
        }
      }
      if (pairs != nullptr) {
        const bf16* row = rows + d - first;
        put_pair(_mm512_loadu_si512(row), _mm512_loadu_si512(row + stride), pairs + 2 * (d - first));
      }
    }
  }

  // 32 codes, none denormal or NaN: sign, 4 bits of exponent and 3 of mantissa move to their places; the biases of
  // the exponents differ by 120.
  DSV4_INLINE __m512i widen(const KeyRows& r, const uint8_t* codes, __m512i shift) {
    const __m256i bytes = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(codes));
    return _mm512_add_epi16(_mm512_and_si512(_mm512_slli_epi16(_mm512_cvtepi8_epi16(bytes), 4), r.fields), shift);
  }

  // What is added to the exponents of up to 8 blocks of codes, for two elements at once. Returns those whose scales are
  // extreme.
  DSV4_INLINE __mmask8 put_shifts(const uint8_t* scales, int64_t count, uint32_t* shifts) {
    const __m256i scale = _mm256_cvtepu8_epi32(_mm_maskz_loadu_epi8(avx512::low16(count), scales));
    const __m256i low = _mm256_slli_epi32(_mm256_sub_epi32(scale, _mm256_set1_epi32(7)), 7);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(shifts), _mm256_or_si256(low, _mm256_slli_epi32(low, 16)));
    return _mm256_mask_cmpgt_epu32_mask(static_cast<__mmask8>(avx512::low16(count)),
                                        _mm256_sub_epi32(scale, _mm256_set1_epi32(static_cast<int>(kLeastScale))),
                                        _mm256_set1_epi32(static_cast<int>(kMostScale - kLeastScale)));
  }

  // The same for up to 512 dims from a multiple of 64 on, fast where both keys are bfloat16, or FP8 and
  // their codes normal numbers.
  // Without kRows, rows may be overwritten or not. Pairs, if wanted, become rows of right operands of values; elements
  // unpack within lanes, so the 32 dims of two tiles come in the order that pack_sums knows.
  template <bool kRows>
  DSV4_INLINE void read(const KeyRows& r, int64_t j, int64_t first, int64_t last, bf16* rows, int64_t stride,
                        bf16* pairs) {
    const int64_t coded = smaller(last, r.codes);
    if (j + 1 >= r.end) return read_any(r, j, first, last, rows, stride, pairs);
    const Key a = r.keys[j], b = r.keys[j + 1];
    if (a.scales == nullptr && b.scales == nullptr && a.data != nullptr && b.data != nullptr) {
      for (int64_t d = first; d < last; d += kStepDims, rows += kStepDims) {
        put<kRows>(_mm512_loadu_si512(a.data + 2 * d), _mm512_loadu_si512(b.data + 2 * d), rows, stride, pairs);
      }
      return;
    }
    if (a.scales == nullptr || b.scales == nullptr || coded % kRowBlock != 0) {
      return read_any(r, j, first, last, rows, stride, pairs);
    }
    uint32_t shift_a[8], shift_b[8];
    const int64_t blocks = larger(coded - first, 0) / kRowBlock;
    const unsigned extreme = put_shifts(a.scales + first / kRowBlock, blocks, shift_a) |
                             put_shifts(b.scales + first / kRowBlock, blocks, shift_b);
    __m512i worst = _mm512_setzero_si512();
    int64_t d = first;
    bf16* row = rows;
    for (int64_t block = 0; block < blocks; ++block) {
      const __m512i shift[2] = {_mm512_set1_epi32(static_cast<int>(shift_a[block])),
                                _mm512_set1_epi32(static_cast<int>(shift_b[block]))};
      worst = _mm512_max_epu8(worst,
                              _mm512_sub_epi8(_mm512_and_si512(_mm512_loadu_si512(a.data + d), r.magnitude), r.least));
      worst = _mm512_max_epu8(worst,
                              _mm512_sub_epi8(_mm512_and_si512(_mm512_loadu_si512(b.data + d), r.magnitude), r.least));
#pragma GCC unroll 2
      for (int half = 0; half < 2; ++half, d += kStepDims, row += kStepDims) {
        put<kRows>(widen(r, a.data + d, shift[0]), widen(r, b.data + d, shift[1]), row, stride, pairs);
      }
    }
    if (extreme != 0 || _mm512_cmpge_epu8_mask(worst, _mm512_set1_epi8(0x77)) != 0) {
      return read_any(r, j, first, last, rows, stride, pairs == nullptr ? nullptr : pairs - 2 * (d - first));
    }
    for (; d < last; d += kStepDims, row += kStepDims) {
      const int64_t at = r.codes + 2 * (d - r.codes);
      put<kRows>(_mm512_loadu_si512(a.data + at), _mm512_loadu_si512(b.data + at), row, stride, pairs);
    }
  }

  template <bool kRows>
  DSV4_INLINE void put(__m512i first, __m512i second, bf16* row, int64_t stride, bf16*& pairs) {
    if (kRows) {
      _mm512_storeu_si512(row, first);
      _mm512_storeu_si512(row + stride, second);
    }
    if (pairs == nullptr) return;
    put_pair(first, second, pairs);
    pairs += 2 * kStepDims;
  }
  DSV4_INLINE void put_pair(__m512i first, __m512i second, bf16* to) {
    _mm512_storeu_si512(to, _mm512_unpacklo_epi16(first, second));
    _mm512_storeu_si512(to + kStepDims, _mm512_unpackhi_epi16(first, second));
  }

  // Asks for a key's memory ahead of its use: rows lie scattered, so the processor does not foresee them.
  DSV4_INLINE void prefetch(const KeyRows& r, int64_t j) {
    const Key& key = r.keys[j];
    if (key.data == nullptr) return;
    const int64_t bytes = key.scales != nullptr ? fp8_row_bytes(r.head_dim, r.head_dim - r.codes) : 2 * r.head_dim;
    for (int64_t at = 0; at < bytes; at += 64) __builtin_prefetch(key.data + at, 0, 2);
    if (key.scales != nullptr) __builtin_prefetch(key.scales, 0, 2);
  }
};

// Elements from one pair of keys to the next: not a power of two, or the rows of a tile would share sets of a cache.
// A pair lies in one piece, [tile of dims][16 dims][2], since it is written more slowly than read.
constexpr int64_t pair_stride(int64_t head_dim) { return 2 * head_dim + kStepDims; }
constexpr int64_t pairs_stride(int64_t head_dim) { return kTileRows * pair_stride(head_dim); }

// Elements from one key's dims to the next key's in a left operand of scores: rows of a tile share no sets of a cache.
constexpr int64_t row_stride(int64_t dims) { return dims + kStepDims; }

// 32 sums of a head from two tiles of dims, scaled and rounded, in the order of the dims.
DSV4_INLINE __m512i pack_sums(__m512 first, __m512 second, __m512 factor) {
  alignas(64) static const uint16_t kOrder[32] = {0, 1, 2,  3,  16, 17, 18, 19, 4,  5,  6,  7,  20, 21, 22, 23,
                                                  8, 9, 10, 11, 24, 25, 26, 27, 12, 13, 14, 15, 28, 29, 30, 31};
  const __m512i halves =
      reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(_mm512_mul_ps(second, factor), _mm512_mul_ps(first, factor)));
  return _mm512_permutexvar_epi16(_mm512_load_si512(kOrder), halves);
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

// The largest of the scaled scores [32 keys][16 heads] of the keys whose bits are set, and `most`.
DSV4_INLINE __m512 largest(const float* scores, uint32_t valid, __m512 scale, __m512 most) {
  if (valid == ~0u) {
    for (int64_t key = 0; key < kStepKeys; ++key) {
      most = _mm512_max_ps(most, _mm512_mul_ps(_mm512_loadu_ps(scores + key * kTileRows), scale));
    }
    return most;
  }
  for (; valid != 0; valid &= valid - 1) {
    const float* score = scores + __builtin_ctz(valid) * kTileRows;
    most = _mm512_max_ps(most, _mm512_mul_ps(_mm512_loadu_ps(score), scale));
  }
  return most;
}

struct Softmax {
  __m512 scale, most, totals[2];  // of even and odd keys
};

// Numerators of the same scores as a left operand: [16 heads][32 keys], 0 where no bit is set.
template <bool kWhole>
DSV4_INLINE void weigh(const float* scores, uint32_t valid, Softmax& s, bf16* to) {
  __m512i x[kTileRows];
#pragma GCC unroll 4
  for (int i = 0; i < kTileRows; ++i) {
    __m512 pair[2];
#pragma GCC unroll 2
    for (int j = 0; j < 2; ++j) {
      const int key = 2 * i + j;
      const __m512 score = _mm512_loadu_ps(scores + key * kTileRows);
      pair[j] = exp_below_zero(_mm512_fmsub_ps(score, s.scale, s.most));
      if (!kWhole && (valid >> key & 1) == 0) pair[j] = _mm512_setzero_ps();
      s.totals[j] = _mm512_add_ps(s.totals[j], pair[j]);
    }
    x[i] = avx512::pack({pair[0], pair[1]});
  }
  avx512::transpose(x);
  for (int i = 0; i < kTileRows; ++i) _mm512_storeu_si512(to + i * kStepKeys, x[i]);
}

}  // namespace
}  // namespace dsv4::DSV4_AMX_NAMESPACE
