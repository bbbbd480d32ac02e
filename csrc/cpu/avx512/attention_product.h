// The products of the attention kernels by dot products of vectors.
#pragma once

#include "cpu/avx512/attention_tiles.h"

namespace dsv4::avx512 {
namespace {

inline constexpr int kHeads = 8;

template <class X>
DSV4_INLINE __m512i broadcast_word(const X* at) {
  int32_t word;
  memcpy(&word, at, sizeof(word));
  return _mm512_set1_epi32(word);
}

DSV4_INLINE __m512 dot_words(__m512 sum, __m512i a, __m512i b, const bf16*) {
  return _mm512_dpbf16_ps(sum, reinterpret_cast<__m512bh>(a), reinterpret_cast<__m512bh>(b));
}
DSV4_INLINE __m512 dot_words(__m512 sum, __m512i a, __m512i b, const float*) {
  return _mm512_fmadd_ps(_mm512_castsi512_ps(a), _mm512_castsi512_ps(b), sum);
}

// sums[h][0:32] (+)= sum over words of left[h][word] * right[word][0:32]. kApart: the words are summed before they are
// added to what is there.
template <class X, bool kApart, int kCount>
static __attribute__((noinline)) void multiply(const X* left, int64_t left_stride, const uint32_t* right, int64_t words,
                                               bool fresh, float* sums, int64_t sums_stride, Lookahead& ahead) {
  constexpr int64_t kElements = kWordElements<X>;
  __m512 acc[kCount][2];
#pragma GCC unroll 8
  for (int h = 0; h < kCount; ++h) {
    acc[h][0] = fresh || kApart ? _mm512_setzero_ps() : _mm512_loadu_ps(sums + h * sums_stride);
    acc[h][1] = fresh || kApart ? _mm512_setzero_ps() : _mm512_loadu_ps(sums + h * sums_stride + 16);
  }
  for (int64_t word = 0; word < words;) {
    Lookahead::step(ahead);
    for (const int64_t end = smaller(words, word + Lookahead::kWords); word < end; ++word, right += kGroup) {
      const __m512i a = _mm512_loadu_si512(right), b = _mm512_loadu_si512(right + 16);
#pragma GCC unroll 8
      for (int h = 0; h < kCount; ++h) {
        const __m512i x = broadcast_word(left + h * left_stride + word * kElements);
        acc[h][0] = dot_words(acc[h][0], x, a, static_cast<const X*>(nullptr));
        acc[h][1] = dot_words(acc[h][1], x, b, static_cast<const X*>(nullptr));
      }
    }
  }
#pragma GCC unroll 8
  for (int h = 0; h < kCount; ++h) {
    if (kApart && !fresh) {
      acc[h][0] = _mm512_add_ps(_mm512_loadu_ps(sums + h * sums_stride), acc[h][0]);
      acc[h][1] = _mm512_add_ps(_mm512_loadu_ps(sums + h * sums_stride + 16), acc[h][1]);
    }
    _mm512_storeu_ps(sums + h * sums_stride, acc[h][0]);
    _mm512_storeu_ps(sums + h * sums_stride + 16, acc[h][1]);
  }
}

template <class X, bool kApart>
DSV4_INLINE void multiply_row(const X* left, int64_t left_stride, int64_t heads, const uint32_t* right, int64_t words,
                              bool fresh, float* sums, int64_t sums_stride, Lookahead& ahead) {
  for (; heads >= kHeads; heads -= kHeads, left += kHeads * left_stride, sums += kHeads * sums_stride) {
    multiply<X, kApart, kHeads>(left, left_stride, right, words, fresh, sums, sums_stride, ahead);
  }
  for (; heads >= 4; heads -= 4, left += 4 * left_stride, sums += 4 * sums_stride) {
    multiply<X, kApart, 4>(left, left_stride, right, words, fresh, sums, sums_stride, ahead);
  }
  if (heads == 3) multiply<X, kApart, 3>(left, left_stride, right, words, fresh, sums, sums_stride, ahead);
  if (heads == 2) multiply<X, kApart, 2>(left, left_stride, right, words, fresh, sums, sums_stride, ahead);
  if (heads == 1) multiply<X, kApart, 1>(left, left_stride, right, words, fresh, sums, sums_stride, ahead);
}

// kMostWords: added to one sum in a row; 0: all. Long rows of float32 lose more than the products of plain torch do.
template <int64_t kMostWords>
struct WordProduct {
  static constexpr int64_t kLeastHeads = kHeads;  // that a thread takes of a row

  // scores[h][key] = query[h] . key for the keys of a tile.
  template <class X>
  DSV4_INLINE void score(const X* query, int64_t query_stride, int64_t heads, int64_t head_dim, float* scores,
                         int64_t stride, const TileMemory<X>& memory, Lookahead ahead) {
    multiply_heads<X, false>(query, query_stride, heads, memory.tile, head_dim / kWordElements<X>, true, scores, stride,
                             ahead);
  }
  // Of a lookahead in one such product.
  template <class X>
  DSV4_INLINE int64_t lookahead_steps(int64_t heads, int64_t head_dim) {
    const int64_t words = head_dim / kWordElements<X>;
    return (heads + kHeads - 1) / kHeads * ((words + Lookahead::kWords - 1) / Lookahead::kWords);
  }

  // sums[h][d] = sum over keys [begin, end) of weights[h][key - begin] * value; kAdds: is added to what is there. Some
  // dims of many keys at a time: their sums stay in registers.
  template <class X, bool kAdds>
  DSV4_INLINE void mix(const X* weights, int64_t stride, int64_t heads, const KeyReader<X>& reader, int64_t begin,
                       int64_t end, int64_t head_dim, float* sums, const TileMemory<X>& memory) {
    for (int64_t first = begin; first < end; first += kSliceKeys) {
      const int64_t last = smaller(end, first + kSliceKeys);
      for (int64_t d = 0; d < head_dim; d += kSliceDims) {
        mix_slice<X, kAdds>(weights + (first - begin), stride, heads, reader, first, last, d, head_dim,
                            !kAdds && first == begin, sums, memory, Held());
      }
    }
  }
  // The same of at most kSliceKeys keys and of dims from d on, kSliceDims at most.
  template <class X, bool kAdds>
  DSV4_INLINE void mix_slice(const X* weights, int64_t stride, int64_t heads, const KeyReader<X>& reader, int64_t begin,
                             int64_t end, int64_t d, int64_t head_dim, bool fresh, float* sums,
                             const TileMemory<X>& memory, const Held& held) {
    const int64_t dims = smaller(head_dim - d, kSliceDims), steps = round_up(end - begin, kGroup) / kWordElements<X>;
    tile_for_values(reader, begin, end, d, dims, memory, held);
    Lookahead nothing;
    for (int64_t group = 0; group < dims / kGroup; ++group) {
      multiply_heads<X, kAdds>(weights, stride, heads, memory.tile + group * group_stride(steps), steps, fresh,
                               sums + d + group * kGroup, head_dim, nothing);
    }
  }

 private:
  template <class X, bool kApart>
  DSV4_INLINE void multiply_heads(const X* left, int64_t left_stride, int64_t heads, const uint32_t* right,
                                  int64_t words, bool fresh, float* sums, int64_t sums_stride, Lookahead& ahead) {
    if constexpr (kMostWords == 0) {
      multiply_row<X, kApart>(left, left_stride, heads, right, words, fresh, sums, sums_stride, ahead);
      return;
    }
    for (int64_t first = 0; first < words; first += kMostWords) {
      multiply_row<X, true>(left + first * kWordElements<X>, left_stride, heads, right + first * kGroup,
                            smaller(kMostWords, words - first), fresh && first == 0, sums, sums_stride, ahead);
    }
  }
};
using Product = WordProduct<0>;

// Runs body(X, M) with the type of the queries and the type as which they and the keys are multiplied.
template <class Body>
DSV4_INLINE void with_types(const SparseAttentionParams& p, const Body& body) {
  if (p.query.dtype == DType::kFloat32) {
    body(float{}, float{});
  } else if (p.window_pool.plain.dtype != DType::kFloat32 && p.compressed.plain.dtype != DType::kFloat32) {
    body(bf16{}, bf16{});
  } else {
    body(bf16{}, float{});
  }
}

}  // namespace
}  // namespace dsv4::avx512
