// What the AVX-512 and the AMX kernel of index_topk share: the panel of a chunk of keys, and offering scores.
#pragma once

#include "cpu/avx512/index_panel.h"
#include "cpu/index_driver.h"

namespace dsv4::avx512 {
namespace {

// weight * relu(product) added to a score. A NaN stays.
DSV4_INLINE __m512 index_add(__m512 score, float weight, __m512 product) {
  return _mm512_fmadd_ps(_mm512_set1_ps(weight), _mm512_max_ps(_mm512_setzero_ps(), product), score);
}

// The keys of a chunk, in memory of the kernel's.
template <class T>
class IndexKeys {
 public:
  using Element = typename IndexPanel<T>::Element;

  static int64_t bytes(const IndexTopkParams& p) {
    return kIndexChunk / kIndexLanes * IndexPanel<T>::group_elements(p.query.size(2)) * 4;
  }

  IndexKeys(const IndexTopkParams& p, uint8_t* memory)
      : panel_(IndexKeyPool(p).format(), p.query.size(2)),
        group_(IndexPanel<T>::group_elements(p.query.size(2))),
        elements_(reinterpret_cast<Element*>(memory)) {}

  void prepare(const IndexKey* keys, int64_t count) {
    for (int64_t first = 0; first < count; first += kIndexLanes) {
      Element* out = elements_ + first / kIndexLanes * group_;
      if (first + kIndexLanes <= count) {
        panel_.pack(keys + first, out, scales_ + first);
        continue;
      }
      IndexKey last[kIndexLanes] = {};
      for (int64_t i = first; i < count; ++i) last[i - first] = keys[i];
      panel_.pack(last, out, scales_ + first);
    }
  }

  int64_t group_elements() const { return group_; }
  const Element* group(int64_t index) const { return elements_ + index * group_; }

  // What FP8 keys leave to do.
  void scale(int64_t count, float* scores) const {
    if (!panel_.scales_scores()) return;
    for (int64_t first = 0; first < count; first += kIndexLanes) {
      const __m512 scaled = _mm512_mul_ps(_mm512_load_ps(scores + first), _mm512_load_ps(scales_ + first));
      _mm512_store_ps(scores + first, scaled);
    }
  }

 private:
  IndexPanel<T> panel_;
  int64_t group_;
  Element* elements_;
  alignas(64) float scales_[kIndexChunk];
};

// Sixteen at a time, most of which fail the bound together.
DSV4_INLINE void index_offer(Selection& best, const float* scores, const uint16_t* stored, int64_t count,
                             int64_t first) {
  const __m512i step = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
  __m512i bound = _mm512_set1_epi32(best.bound());
  for (int64_t i = 0; i < count; i += kIndexLanes) {
    const __m512 score = _mm512_add_ps(_mm512_load_ps(scores + i), _mm512_setzero_ps());
    const __m512i bits = _mm512_castps_si512(score);
    const __m512i flip = _mm512_and_si512(_mm512_srai_epi32(bits, 31), _mm512_set1_epi32(0x7FFFFFFF));
    const __m512i key = _mm512_xor_si512(bits, flip);
    const __mmask16 visible = static_cast<__mmask16>(stored[i / kIndexLanes]) & low16(count - i < 16 ? count - i : 16);
    const __mmask16 real = _mm512_mask_cmp_ps_mask(visible, score, score, _CMP_ORD_Q);
    if (_mm512_mask_cmpgt_epi32_mask(real, key, bound) == 0) continue;
    int32_t *keys, *entries;
    best.place(&keys, &entries);
    bound = _mm512_set1_epi32(best.bound());
    const __mmask16 taken = _mm512_mask_cmpgt_epi32_mask(real, key, bound);
    const __m512i entry = _mm512_add_epi32(_mm512_set1_epi32(static_cast<int32_t>(first + i)), step);
    // Compressed in registers: a compressing store is slow on Zen 4.
    _mm512_storeu_si512(keys, _mm512_maskz_compress_epi32(taken, key));
    _mm512_storeu_si512(entries, _mm512_maskz_compress_epi32(taken, entry));
    best.placed(__builtin_popcount(taken));
  }
}

}  // namespace
}  // namespace dsv4::avx512
