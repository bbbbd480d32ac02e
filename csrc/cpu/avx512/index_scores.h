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
        value_bytes_(IndexKeyPool(p).value_bytes()),
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

  // Keys lie page by page anywhere in memory. Those of the next chunk are fetched a few at a time while this one is
  // scored, since preparing them is all of the reading and little of the work.
  void expect(const IndexKey* keys, int64_t count) { next_ = keys, next_count_ = count, fetched_ = 0; }
  void fetch(int64_t count) {
    const int64_t end = fetched_ + count < next_count_ ? fetched_ + count : next_count_;
    for (; fetched_ < end; ++fetched_) {
      const uint8_t* values = next_[fetched_].values;
      if (fetched_ % kIndexLanes == 0) _mm_prefetch(reinterpret_cast<const char*>(next_[fetched_].scales), _MM_HINT_T1);
      for (int64_t at = 0; values != nullptr && at < value_bytes_; at += 64) {
        _mm_prefetch(reinterpret_cast<const char*>(values + at), _MM_HINT_T1);
      }
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
  int64_t group_, value_bytes_;
  Element* elements_;
  const IndexKey* next_ = nullptr;
  int64_t next_count_ = 0, fetched_ = 0;
  alignas(64) float scales_[kIndexChunk];
};

struct IndexLanes {
  static __mmask16 valid(int64_t left) { return low16(left < kIndexLanes ? left : kIndexLanes); }

  static void range(const int32_t* keys, int64_t count, int32_t* low, int32_t* high) {
    __m512i least = _mm512_set1_epi32(INT32_MAX), most = _mm512_set1_epi32(INT32_MIN);
    for (int64_t i = 0; i < count; i += kIndexLanes) {
      const __mmask16 mask = valid(count - i);
      const __m512i key = _mm512_maskz_loadu_epi32(mask, keys + i);
      least = _mm512_mask_min_epi32(least, mask, least, key);
      most = _mm512_mask_max_epi32(most, mask, most, key);
    }
    *low = _mm512_reduce_min_epi32(least);
    *high = _mm512_reduce_max_epi32(most);
  }

  static int64_t reaching(const int32_t* keys, int64_t count, int32_t value) {
    const __m512i bound = _mm512_set1_epi32(value), one = _mm512_set1_epi32(1);
    __m512i found = _mm512_setzero_si512(), others = _mm512_setzero_si512();
    const auto add = [&](__m512i sum, int64_t i, __mmask16 mask) __attribute__((always_inline)) {
      const __m512i key = _mm512_maskz_loadu_epi32(mask, keys + i);
      return _mm512_mask_add_epi32(sum, _mm512_mask_cmpge_epi32_mask(mask, key, bound), sum, one);
    };
    int64_t i = 0;
    for (; i + 2 * kIndexLanes <= count; i += 2 * kIndexLanes) {
      found = add(found, i, 0xFFFF);
      others = add(others, i + kIndexLanes, 0xFFFF);
    }
    for (; i < count; i += kIndexLanes) found = add(found, i, valid(count - i));
    return _mm512_reduce_add_epi32(_mm512_add_epi32(found, others));
  }

  static int64_t keep(int32_t* keys, int32_t* entries, int64_t count, int32_t value, int64_t room) {
    const __m512i bound = _mm512_set1_epi32(value);
    int64_t kept = 0;
    for (int64_t i = 0; i < count; i += kIndexLanes) {
      const __mmask16 mask = valid(count - i);
      const __m512i key = _mm512_maskz_loadu_epi32(mask, keys + i), entry = _mm512_maskz_loadu_epi32(mask, entries + i);
      uint32_t level = _mm512_mask_cmpeq_epi32_mask(mask, key, bound);
      while (__builtin_popcount(level) > room) level &= ~(0x80000000u >> __builtin_clz(level));
      room -= __builtin_popcount(level);
      const __mmask16 taken = _mm512_mask_cmpgt_epi32_mask(mask, key, bound) | static_cast<__mmask16>(level);
      // Never past lane i + 15, which has been read.
      _mm512_storeu_si512(keys + kept, _mm512_maskz_compress_epi32(taken, key));
      _mm512_storeu_si512(entries + kept, _mm512_maskz_compress_epi32(taken, entry));
      kept += __builtin_popcount(taken);
    }
    return kept;
  }
};

// Sixteen at a time, most of which fail the bound together.
DSV4_INLINE void index_offer(Selection<IndexLanes>& best, const float* scores, const uint16_t* stored, int64_t count,
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
