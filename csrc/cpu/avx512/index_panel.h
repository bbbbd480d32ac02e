// Keys of index_topk as the products want them: groups of 16 keys, the keys side by side in the lanes. A panel of
// bfloat16 holds [group][D / 2][16] words, each two dims of one key, which is also how AMX reads its second operand;
// one of float32 holds [group][D][16]. FP4 keys carry their scales into the panel, which is exact; FP8 keys leave their
// magnitude behind, to be multiplied with the score: relu(s x) = s relu(x) for s >= 0.
#pragma once

#include <type_traits>

#include "cpu/avx512/lanes.h"
#include "ops/index_keys.h"

namespace dsv4::avx512 {
namespace {

inline constexpr int kIndexLanes = 16;

// The bfloat16 values of all e4m3 magnitudes, and of e2m1 codes twice, so that the bit above the code does not matter.
struct IndexTables {
  alignas(64) uint16_t e4m3[128];
  alignas(64) uint16_t e2m1[32];

  DSV4_HOST_DEVICE IndexTables() {
    for (int code = 0; code < 128; ++code) e4m3[code] = top(e4m3_value(static_cast<uint8_t>(code)));
    for (int code = 0; code < 32; ++code) e2m1[code] = top(e2m1_value(static_cast<uint8_t>(code & 15)));
  }
  DSV4_HOST_DEVICE static uint16_t top(float value) { return static_cast<uint16_t>(bits_from_float(value) >> 16); }
};

// Sixteen words of a key each, from byte `at` on; `words` of them are there. Transposed: word w of all keys in x[w].
DSV4_INLINE void index_words(const IndexKey* keys, int64_t at, int words, __m512i* x) {
  for (int lane = 0; lane < kIndexLanes; ++lane) {
    x[lane] = keys[lane].values == nullptr ? _mm512_setzero_si512()
                                           : _mm512_maskz_loadu_epi32(low16(words), keys[lane].values + at);
  }
  transpose(x);
}

// Stores two dims of 16 keys.
DSV4_INLINE void index_store(uint32_t* panel, __m512i pair, const bf16*) { _mm512_store_si512(panel, pair); }
DSV4_INLINE void index_store(float* panel, __m512i pair, const float*) {
  const Pair dims = unpack(pair);
  _mm512_store_ps(panel, dims.a);
  _mm512_store_ps(panel + kIndexLanes, dims.b);
}

DSV4_INLINE __m512i low_halves() { return _mm512_set1_epi32(0xFFFF); }

// low in the lower half of each word, high in the upper.
DSV4_INLINE __m512i index_merge(__m512i low, __m512i high) {
  return _mm512_ternarylogic_epi32(low_halves(), low, high, 0xCA);
}

// The e8m0 scales of 16 keys for 32 dims: as float32, or as what to add to the bits of a bfloat16 other than zero.
struct IndexScales {
  __m512 factor;
  __m512i step;
  bool by_step;  // no product over- or underflows

  explicit __attribute__((always_inline)) IndexScales(__m512i exponent) {
    const __m512i one = _mm512_set1_epi32(1);
    __m512i bits = _mm512_slli_epi32(exponent, 23);
    bits = _mm512_mask_mov_epi32(bits, _mm512_cmplt_epi32_mask(exponent, one), _mm512_set1_epi32(0x00400000));
    bits = _mm512_mask_mov_epi32(bits, _mm512_cmpeq_epi32_mask(exponent, _mm512_set1_epi32(0xFF)),
                                 _mm512_set1_epi32(0x7FC00000));
    factor = _mm512_castsi512_ps(bits);
    const __m512i shifted = _mm512_slli_epi32(_mm512_sub_epi32(exponent, _mm512_set1_epi32(127)), 7);
    step = index_merge(shifted, _mm512_slli_epi32(shifted, 16));
    by_step = _mm512_cmpgt_epu32_mask(_mm512_sub_epi32(exponent, _mm512_set1_epi32(2)), _mm512_set1_epi32(250)) == 0;
  }

  __attribute__((always_inline)) __m512i apply(__m512i pair) const {
    if (by_step) {
      const __mmask32 nonzero = _mm512_test_epi16_mask(pair, _mm512_set1_epi16(0x7FFF));
      return _mm512_mask_add_epi16(pair, nonzero, pair, step);
    }
    const Pair value = scaled(unpack(pair), factor);
    return index_merge(_mm512_srli_epi32(_mm512_castps_si512(value.a), 16), _mm512_castps_si512(value.b));
  }
};

// Packs groups of keys for products in T: bf16 (words of two dims) or float.
template <class T>
class IndexPanel {
 public:
  using Element = std::conditional_t<std::is_same_v<T, bf16>, uint32_t, float>;
  static constexpr int64_t kElementsOfPair = std::is_same_v<T, bf16> ? kIndexLanes : 2 * kIndexLanes;

  static int64_t group_elements(int64_t dim) { return dim / 2 * kElementsOfPair; }

  IndexPanel(IndexKeyFormat format, int64_t dim) : format_(format), dim_(dim) {}

  bool scales_scores() const { return format_ == IndexKeyFormat::kFp8; }

  // Sixteen keys; one that is not stored becomes zeros. `scale`: what scores are multiplied with, if scales_scores().
  void pack(const IndexKey* keys, Element* out, float* scale) const {
    switch (format_) {
      case IndexKeyFormat::kFp4:
        pack_fp4(keys, out);
        break;
      case IndexKeyFormat::kFp8:
        pack_fp8(keys, out, scale);
        break;
      case IndexKeyFormat::kBFloat16:
        for (int64_t word = 0; word < dim_ / 2; word += 16) {
          __m512i x[16];
          index_words(keys, 4 * word, 16, x);
          for (int w = 0; w < 16; ++w) store(out, word + w, x[w]);
        }
        break;
      case IndexKeyFormat::kFloat32:
        if constexpr (std::is_same_v<T, float>) {
          for (int64_t word = 0; word < dim_; word += 16) {
            __m512i x[16];
            index_words(keys, 4 * word, 16, x);
            for (int w = 0; w < 16; ++w) _mm512_store_si512(out + (word + w) * kIndexLanes, x[w]);
          }
        }
        break;
    }
  }

 private:
  static void store(Element* out, int64_t pair, __m512i dims) {
    index_store(out + pair * kElementsOfPair, dims, static_cast<const T*>(nullptr));
  }

  // The bits of each word from bit `low` on in its lower half, those from bit `high` on in its upper: 8 bits of each,
  // and others above them.
  static __attribute__((always_inline)) __m512i spread(__m512i words, int low, int high) {
    const uint64_t from =
        0x0000000100000001ull * static_cast<uint64_t>(low | high << 16) + (uint64_t{32} << 32 | uint64_t{32} << 48);
    return _mm512_multishift_epi64_epi8(_mm512_set1_epi64(static_cast<int64_t>(from)), words);
  }

  // A word holds 8 codes, the lower nibble of each byte first; four words share a scale.
  __attribute__((noinline)) void pack_fp4(const IndexKey* keys, Element* out) const {
    const __m512i values = _mm512_load_si512(tables_.e2m1);
    const int64_t words = dim_ / 8, groups = dim_ / kIndexScaleDims;
    for (int64_t word = 0; word < words; word += 16) {
      const int here = words - word < 16 ? static_cast<int>(words - word) : 16;
      __m512i x[16];
      index_words(keys, 4 * word, here, x);
      const __m512i exponents = scale_words(keys, word / 4, groups);
      for (int w = 0; w < here; w += 4) {
        const IndexScales scales(
            _mm512_and_si512(_mm512_srl_epi32(exponents, _mm_cvtsi32_si128(2 * w)), _mm512_set1_epi32(0xFF)));
        for (int v = w; v < w + 4; ++v) {
#pragma GCC unroll 4
          for (int byte = 0; byte < 4; ++byte) {
            const __m512i codes = spread(x[v], 8 * byte, 8 * byte + 4);
            store(out, (word + v) * 4 + byte, scales.apply(_mm512_permutexvar_epi16(codes, values)));
          }
        }
      }
    }
  }

  // Up to four scale bytes of each key in its lane.
  static __m512i scale_words(const IndexKey* keys, int64_t first, int64_t groups) {
    alignas(64) uint32_t words[kIndexLanes] = {};
    const size_t count = groups - first < 4 ? static_cast<size_t>(groups - first) : 4;
    for (int lane = 0; lane < kIndexLanes; ++lane) {
      if (keys[lane].values == nullptr) continue;
      if (count == 4) {
        memcpy(words + lane, keys[lane].scales + first, 4);
      } else {
        memcpy(words + lane, keys[lane].scales + first, count);
      }
    }
    return _mm512_load_si512(words);
  }

  // A word holds 4 codes. The sign of the scale goes into the values.
  __attribute__((noinline)) void pack_fp8(const IndexKey* keys, Element* out, float* scale) const {
    alignas(64) float scales[kIndexLanes] = {};
    for (int lane = 0; lane < kIndexLanes; ++lane) {
      if (keys[lane].values != nullptr) memcpy(scales + lane, keys[lane].scales, sizeof(float));
    }
    const __m512 all = _mm512_load_ps(scales);
    _mm512_storeu_ps(scale, _mm512_abs_ps(all));
    const __m512i sign = _mm512_and_si512(_mm512_castps_si512(all), _mm512_set1_epi32(static_cast<int>(0x80000000u)));
    const __m512i signs = _mm512_or_si512(sign, _mm512_srli_epi32(sign, 16));
    const __m512i t0 = _mm512_load_si512(tables_.e4m3), t1 = _mm512_load_si512(tables_.e4m3 + 32),
                  t2 = _mm512_load_si512(tables_.e4m3 + 64), t3 = _mm512_load_si512(tables_.e4m3 + 96);
    const auto pair = [&](__m512i codes) __attribute__((always_inline)) {
      const __mmask32 upper = _mm512_test_epi16_mask(codes, _mm512_set1_epi16(0x40));
      const __m512i value = _mm512_mask_blend_epi16(upper, _mm512_permutex2var_epi16(t0, codes, t1),
                                                    _mm512_permutex2var_epi16(t2, codes, t3));
      const __m512i own = _mm512_and_si512(_mm512_slli_epi16(codes, 8), _mm512_set1_epi16(static_cast<short>(0x8000)));
      return _mm512_xor_si512(_mm512_or_si512(value, own), signs);
    };
    const int64_t words = dim_ / 4;
    for (int64_t word = 0; word < words; word += 16) {
      const int here = words - word < 16 ? static_cast<int>(words - word) : 16;
      __m512i x[16];
      index_words(keys, 4 * word, here, x);
      for (int w = 0; w < here; ++w) {
        store(out, (word + w) * 2, pair(spread(x[w], 0, 8)));
        store(out, (word + w) * 2 + 1, pair(spread(x[w], 16, 24)));
      }
    }
  }

  IndexKeyFormat format_;
  int64_t dim_;
  IndexTables tables_;
};

}  // namespace
}  // namespace dsv4::avx512
