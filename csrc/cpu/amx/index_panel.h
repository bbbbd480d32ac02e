// Keys of index_topk as left operands of tile products: 16 keys x 32 dims a tile, [group of 16 keys][D / 32][16][32]
// bfloat16. A key is decoded in registers and stored as it comes out, with its dims in whatever order decoding leaves
// them; the query is brought into the same order once a row (arrange), so nothing is transposed for a key. FP4: 128
// dims in 19 instructions, of which 9 are shuffles; scales are powers of two and are added to the exponents. FP8: 22,
// and the magnitude of the scale is left for the score: relu(s x) = s relu(x) for s >= 0.
// The panel is a ring, so that keys are decoded while others, decoded before, are multiplied.
#pragma once

#include "cpu/amx/tile.h"
#include "cpu/index_driver.h"

namespace dsv4::DSV4_AMX_NAMESPACE {
namespace {

inline constexpr int kStepDims = 32;
inline constexpr int64_t kStepBytes = kTileRows * kTileBytes;

// Bytes of the bfloat16 values of all e4m3 magnitudes; the values of e2m1 codes twice, since the bit above a code is
// not cleared, less 127 in the exponent, which the scale brings back.
struct IndexCodes {
  alignas(64) uint8_t high[128];
  alignas(64) uint8_t low[128];
  alignas(64) uint16_t e2m1[32];

  DSV4_HOST_DEVICE explicit IndexCodes(IndexKeyFormat format) {
    for (int code = 0; format == IndexKeyFormat::kFp8 && code < 128; ++code) {
      const uint32_t bits = bits_from_float(e4m3_value(static_cast<uint8_t>(code)));
      high[code] = static_cast<uint8_t>(bits >> 24), low[code] = static_cast<uint8_t>(bits >> 16);
    }
    for (int code = 0; format == IndexKeyFormat::kFp4 && code < 32; ++code) {
      const uint32_t bits = bits_from_float(e2m1_value(static_cast<uint8_t>(code & 15))) >> 16;
      e2m1[code] = code % 8 == 0 ? 0 : static_cast<uint16_t>(bits - (127u << 7));
    }
  }
};

// Dims of one key or head that decode together, from the widest down: 128, then 64, then 32.
DSV4_INLINE int64_t index_width(int64_t left) { return left >= 128 ? 128 : left >= 64 ? 64 : 32; }

class IndexRing {
 public:
  static constexpr int64_t kGroups = 64;  // two chunks and more

  static int64_t bytes(int64_t dim) { return kGroups * dim / kStepDims * kStepBytes; }

  IndexRing(const IndexKeyPool& pool, int64_t page_size, uint8_t* memory)
      : format_(pool.format()),
        dim_(pool.dim()),
        page_size_(page_size),
        value_bytes_(pool.value_bytes()),
        group_bytes_(pool.dim() / kStepDims * kStepBytes),
        panel_(memory),
        codes_(pool.format()) {}

  // `groups`, a power of two: how many are to be used, few if they should stay in the nearest cache.
  void begin(int64_t groups) { mask_ = groups - 1, base_ = 0, done_ = 0, count_ = 0, next_count_ = 0; }

  // The keys of a chunk, then those of the next, some of which may be decoded before they come here.
  void prepare(const IndexKey* keys, int64_t count) {
    if (count_ > 0) base_ += kIndexChunk / kTileRows, done_ -= count_;
    keys_ = keys, count_ = count, next_count_ = 0;
  }
  void expect(const IndexKey* keys, int64_t count) { next_ = keys, next_count_ = count, fetched_ = 0; }

  // Keys lie page by page anywhere in memory. Those of the next chunk are fetched a few at a time.
  void fetch(int64_t count) {
    const int64_t end = fetched_ + count < next_count_ ? fetched_ + count : next_count_;
    if (fetched_ < end) fetch_until(end);
  }

  // Keys to decode, behind one another in the ring but for its end. Counted from the first of the chunk on.
  struct Run {
    const IndexKey* keys;
    int64_t at, count;
  };

  // Up to `count` more keys, none from `limit` on: the caller decodes them.
  Run claim(int64_t count, int64_t limit) {
    const bool here = done_ < count_;
    int64_t end = here ? count_ : count_ + next_count_;
    end = end < limit ? end : limit;
    end = end < done_ + count ? end : done_ + count;
    const Run run = {here ? keys_ + done_ : next_ + (done_ - count_), done_, end > done_ ? end - done_ : 0};
    done_ += run.count;
    return run;
  }
  // The first of a run.
  void decode(Run* run, int64_t count) {
    count = count < run->count ? count : run->count;
    decode_run(run->keys, run->at, count);
    run->keys += count, run->at += count, run->count -= count;
  }
  void require(int64_t end) {
    while (done_ < end) {
      Run run = claim(end - done_, end);
      if (run.count == 0) return;
      decode(&run, run.count);
    }
  }

  // A group of 16 keys of 128 dims that lie side by side in one page, to be decoded key by key with decode_one. kNone:
  // keys that must be decoded as a run.
  enum class Kind : uint8_t { kNone, kFp4, kFp8 };
  template <Kind kKind>
  struct KindConstant {
    static constexpr Kind value = kKind;
  };
  struct Whole {
    const uint8_t *values, *scales;
    uint8_t* to;
  };
  Kind whole(const Run& run, Whole* to) {
    const bool bytes = format_ == IndexKeyFormat::kFp4 || format_ == IndexKeyFormat::kFp8;
    if (!bytes || dim_ != 128 || run.count != kTileRows || page_size_ < kTileRows) return Kind::kNone;
    const IndexKey &first = run.keys[0], &last = run.keys[kTileRows - 1];
    if (first.values == nullptr || last.values != first.values + (kTileRows - 1) * value_bytes_) return Kind::kNone;
    if (last.scales != first.scales + (kTileRows - 1) * 4) return Kind::kNone;
    const __m512i scales = _mm512_loadu_si512(first.scales);
    *to = {first.values, first.scales, row(run.at)};
    if (format_ == IndexKeyFormat::kFp8) {
      _mm512_store_ps(scale(run.at), _mm512_abs_ps(_mm512_castsi512_ps(scales)));
      return Kind::kFp8;
    }
    const __m512i below = _mm512_sub_epi8(scales, _mm512_set1_epi8(2));
    return _mm512_cmpgt_epu8_mask(below, _mm512_set1_epi8(static_cast<char>(250))) == 0 ? Kind::kFp4 : Kind::kNone;
  }
  // Fetches four keys of as many dims. One that is not stored has no address to fetch, which does no harm.
  template <Kind kKind>
  __attribute__((always_inline)) void fetch_four() {
    if (fetched_ + 4 > next_count_) return fetch(4);
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
      const auto at = reinterpret_cast<uintptr_t>(next_[fetched_ + i].values);
      _mm_prefetch(reinterpret_cast<const char*>(at), _MM_HINT_T1);
      if constexpr (kKind == Kind::kFp8) _mm_prefetch(reinterpret_cast<const char*>(at + 64), _MM_HINT_T1);
    }
    if (fetched_ % kTileRows == 0) _mm_prefetch(reinterpret_cast<const char*>(next_[fetched_].scales), _MM_HINT_T1);
    fetched_ += 4;
  }
  template <Kind kKind>
  __attribute__((always_inline)) void decode_one(const Whole& whole, int64_t key) const {
    uint8_t* to = whole.to + key * kTileBytes;
    int32_t bits;
    memcpy(&bits, whole.scales + 4 * key, 4);
    if constexpr (kKind == Kind::kFp4) {
      const __m512i table = _mm512_load_si512(codes_.e2m1);
      fp4_steps<4>(_mm512_loadu_si512(whole.values + 64 * key), fp4_scale(bits), table, to);
    } else {
      const __m512i sign = _mm512_set1_epi32(bits >> 31);
      fp8_steps(_mm512_loadu_si512(whole.values + 128 * key), sign, to);
      fp8_steps(_mm512_loadu_si512(whole.values + 128 * key + 64), sign, to + 2 * kStepBytes);
    }
  }

  const uint8_t* group(int64_t index) const { return panel_ + ((base_ + index) & mask_) * group_bytes_; }

  bool scales_scores() const { return format_ == IndexKeyFormat::kFp8; }
  const float* scales(int64_t index) const { return scales_ + ((base_ + index) & mask_) * kTileRows; }

  // `width` dims of a head, index_width of what is left, in the order in which those of a key come out.
  void arrange(const bf16* head, int64_t width, __m512i* out) const {
    const int64_t steps = width / kStepDims;
    __m512i x[4];
    for (int64_t s = 0; s < steps; ++s) x[s] = _mm512_loadu_si512(head + s * kStepDims);
    if (format_ == IndexKeyFormat::kFp4) {
      arrange_fp4(x, steps, out);
    } else if (format_ == IndexKeyFormat::kFp8) {
      arrange_fp8(x, steps, out);
    } else {
      for (int64_t s = 0; s < steps; ++s) out[s] = x[s];
    }
  }

 private:
  __attribute__((noinline)) void fetch_until(int64_t end) {
    for (; fetched_ < end; ++fetched_) {
      const IndexKey key = next_[fetched_];
      if (key.values == nullptr) continue;
      if (fetched_ % kTileRows == 0) _mm_prefetch(reinterpret_cast<const char*>(key.scales), _MM_HINT_T1);
      for (int64_t at = 0; at < value_bytes_; at += 64) {
        _mm_prefetch(reinterpret_cast<const char*>(key.values + at), _MM_HINT_T1);
      }
    }
  }

  void decode_run(const IndexKey* keys, int64_t at, int64_t count) {
    switch (format_) {
      case IndexKeyFormat::kFp4:
        return decode_fp4(keys, at, count);
      case IndexKeyFormat::kFp8:
        return decode_fp8(keys, at, count);
      default:
        return copy(keys, at, count);
    }
  }

  uint8_t* row(int64_t key) const {
    return panel_ + ((base_ + key / kTileRows) & mask_) * group_bytes_ + key % kTileRows * kTileBytes;
  }
  float* scale(int64_t key) { return scales_ + ((base_ + key / kTileRows) & mask_) * kTileRows + key % kTileRows; }

  void clear(uint8_t* to) const {
    for (int64_t d = 0; d < dim_; d += kStepDims, to += kStepBytes) _mm512_store_si512(to, _mm512_setzero_si512());
  }

  __attribute__((noinline)) void copy(const IndexKey* keys, int64_t at, int64_t count) const {
    for (int64_t i = 0; i < count; ++i) {
      uint8_t* to = row(at + i);
      if (keys[i].values == nullptr) {
        clear(to);
        continue;
      }
      for (int64_t d = 0; d < dim_; d += kStepDims, to += kStepBytes) {
        _mm512_store_si512(to, _mm512_loadu_si512(keys[i].values + 2 * d));
      }
    }
  }

  // The lower nibbles of 32 words, then of each 4 bits further up. The table looks at 5 bits.
  template <int kSteps>
  static __attribute__((always_inline)) void fp4_steps(__m512i words, __m512i scale, __m512i table, uint8_t* to) {
    const __m512i magnitude = _mm512_set1_epi16(7);
    for (int s = 0; s < kSteps; ++s) {
      const __m512i codes = s == 0 ? words : _mm512_srli_epi16(words, static_cast<unsigned>(16 / kSteps * s));
      const __m512i value = _mm512_permutexvar_epi16(codes, table);
      const __mmask32 nonzero = _mm512_test_epi16_mask(codes, magnitude);
      _mm512_store_si512(to + s * kStepBytes, _mm512_mask_add_epi16(value, nonzero, value, scale));
    }
  }

  // Four exponents, each to the words of 128 bits, where bfloat16 has them.
  static __attribute__((always_inline)) __m512i fp4_scale(int32_t exponents) {
    alignas(64) static const uint64_t kSpread[8] = {0x8000800080008000, 0x8000800080008000, 0x8001800180018001,
                                                    0x8001800180018001, 0x8002800280028002, 0x8002800280028002,
                                                    0x8003800380038003, 0x8003800380038003};
    return _mm512_slli_epi16(_mm512_shuffle_epi8(_mm512_set1_epi32(exponents), _mm512_load_si512(kSpread)), 7);
  }

  // Every 128 bits hold the codes of the dims of one scale: four dims a word, so that the step of nibble k has dims
  // 4 j + k. Fewer dims fill the register more than once, shifted already.
  __attribute__((noinline)) void decode_fp4(const IndexKey* keys, int64_t at, int64_t count) const {
    const __m512i table = _mm512_load_si512(codes_.e2m1);
    for (int64_t i = 0; i < count; ++i) {
      const IndexKey key = keys[i];
      uint8_t* to = row(at + i);
      if (key.values == nullptr) {
        clear(to);
        continue;
      }
      const uint8_t *values = key.values, *scales = key.scales;
      int64_t left = dim_;
      for (; left >= 128; left -= 128, values += 64, scales += 4, to += 4 * kStepBytes) {
        uint32_t e;
        memcpy(&e, scales, 4);
        if (__builtin_expect(extreme(e), 0)) {
          slow_fp4(values, scales, 128, to);
          continue;
        }
        fp4_steps<4>(_mm512_loadu_si512(values), fp4_scale(static_cast<int32_t>(e)), table, to);
      }
      if (left > 0) decode_fp4_rest(values, scales, left, to);
    }
  }

  void decode_fp4_rest(const uint8_t* values, const uint8_t* scales, int64_t left, uint8_t* to) const {
    const __m512i table = _mm512_load_si512(codes_.e2m1);
    if (left >= 64) {
      uint16_t e;
      memcpy(&e, scales, 2);
      if (extreme(e | 0x7F7F0000u)) {
        slow_fp4(values, scales, 64, to);
      } else {
        const __m512i words = _mm512_broadcast_i64x4(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(values)));
        const __m512i shift = _mm512_inserti64x4(_mm512_setzero_si512(), _mm256_set1_epi16(4), 1);
        const int64_t low = e & 0xFF, high = e >> 8;
        const __m512i scale =
            _mm512_slli_epi16(_mm512_broadcast_i64x4(_mm256_setr_m128i(_mm_set1_epi16(static_cast<short>(low)),
                                                                       _mm_set1_epi16(static_cast<short>(high)))),
                              7);
        fp4_steps<2>(_mm512_srlv_epi16(words, shift), scale, table, to);
      }
      left -= 64, values += 32, scales += 2, to += 2 * kStepBytes;
    }
    if (left == 0) return;
    if (extreme(*scales | 0x7F7F7F00u)) return slow_fp4(values, scales, 32, to);
    const __m512i words = _mm512_broadcast_i32x4(_mm_loadu_si128(reinterpret_cast<const __m128i*>(values)));
    const __m512i shift = _mm512_setr_epi64(0, 0, 0x0004000400040004, 0x0004000400040004, 0x0008000800080008,
                                            0x0008000800080008, 0x000C000C000C000C, 0x000C000C000C000C);
    const __m512i scale = _mm512_set1_epi16(static_cast<short>(*scales << 7));
    fp4_steps<1>(_mm512_srlv_epi16(words, shift), scale, table, to);
  }

  // Whether one of four exponents is so large or small that a product may be no normal bfloat16: not in 2 to 252.
  static __attribute__((always_inline)) bool extreme(uint32_t e) {
    return ((((e - 0x02020202u) & ~e) | ((~e - 0x03030303u) & e)) & 0x80808080u) != 0;
  }

  __attribute__((noinline, cold)) static void slow_fp4(const uint8_t* values, const uint8_t* scales, int64_t width,
                                                       uint8_t* to) {
    for (int64_t d = 0; d < width; ++d) {
      const auto code = static_cast<uint8_t>(values[d / 2] >> d % 2 * 4 & 15);
      const float value = e2m1_value(code) * e8m0_value(scales[d / kIndexScaleDims]);
      const auto bits = static_cast<uint16_t>(bits_from_float(value) >> 16);
      const int64_t steps = width / kStepDims, nibble = d % 4, word = d / 4;
      // Nibbles are spread over the steps first, then over the parts of a register.
      const int64_t step = nibble * steps / 4, part = nibble % (4 / steps);
      memcpy(to + step * kStepBytes + 2 * (part * (width / 4) + word), &bits, 2);
    }
  }

  static void arrange_fp4(const __m512i* x, int64_t steps, __m512i* out) {
    alignas(64) static const uint16_t kApart[32] = {0, 4, 8,  12, 16, 20, 24, 28, 1, 5, 9,  13, 17, 21, 25, 29,
                                                    2, 6, 10, 14, 18, 22, 26, 30, 3, 7, 11, 15, 19, 23, 27, 31};
    const __m512i apart = _mm512_load_si512(kApart);
    __m512i y[4];
    for (int64_t s = 0; s < steps; ++s) y[s] = _mm512_permutexvar_epi16(apart, x[s]);
    if (steps == 4) {
      const __m512i a = _mm512_shuffle_i32x4(y[0], y[1], 0x44), b = _mm512_shuffle_i32x4(y[0], y[1], 0xEE);
      const __m512i c = _mm512_shuffle_i32x4(y[2], y[3], 0x44), d = _mm512_shuffle_i32x4(y[2], y[3], 0xEE);
      out[0] = _mm512_shuffle_i32x4(a, c, 0x88), out[1] = _mm512_shuffle_i32x4(a, c, 0xDD);
      out[2] = _mm512_shuffle_i32x4(b, d, 0x88), out[3] = _mm512_shuffle_i32x4(b, d, 0xDD);
    } else if (steps == 2) {
      out[0] = _mm512_permutex2var_epi64(y[0], _mm512_setr_epi64(0, 1, 8, 9, 2, 3, 10, 11), y[1]);
      out[1] = _mm512_permutex2var_epi64(y[0], _mm512_setr_epi64(4, 5, 12, 13, 6, 7, 14, 15), y[1]);
    } else {
      out[0] = y[0];
    }
  }

  // The bytes of 64 values, the upper and the lower ones. `sign`: all ones where they change their sign.
  __attribute__((always_inline)) void fp8_bytes(__m512i codes, __m512i sign, __m512i* high, __m512i* low) const {
    const __m512i top = _mm512_set1_epi8(static_cast<char>(0x80));
    const __m512i value =
        _mm512_permutex2var_epi8(_mm512_load_si512(codes_.high), codes, _mm512_load_si512(codes_.high + 64));
    *high = _mm512_or_si512(value, _mm512_ternarylogic_epi32(codes, sign, top, 0x28));  // (codes ^ sign) & top
    *low = _mm512_permutex2var_epi8(_mm512_load_si512(codes_.low), codes, _mm512_load_si512(codes_.low + 64));
  }
  // A word holds two codes: the even dims come out first, then the odd ones.
  static __attribute__((always_inline)) __m512i fp8_even(__m512i high, __m512i low) {
    return _mm512_ternarylogic_epi32(_mm512_set1_epi16(0x00FF), low, _mm512_slli_epi16(high, 8), 0xCA);
  }
  static __attribute__((always_inline)) __m512i fp8_odd(__m512i high, __m512i low) {
    return _mm512_ternarylogic_epi32(_mm512_set1_epi16(0x00FF), _mm512_srli_epi16(low, 8), high, 0xCA);
  }
  __attribute__((always_inline)) void fp8_steps(__m512i codes, __m512i sign, uint8_t* to) const {
    __m512i high, low;
    fp8_bytes(codes, sign, &high, &low);
    _mm512_store_si512(to, fp8_even(high, low));
    _mm512_store_si512(to + kStepBytes, fp8_odd(high, low));
  }

  __attribute__((noinline)) void decode_fp8(const IndexKey* keys, int64_t at, int64_t count) {
    for (int64_t i = 0; i < count; ++i) {
      const IndexKey key = keys[i];
      uint8_t* to = row(at + i);
      int32_t bits = 0;
      if (key.values != nullptr) memcpy(&bits, key.scales, 4);
      const int32_t magnitude = bits & 0x7FFFFFFF;
      memcpy(scale(at + i), &magnitude, 4);
      if (key.values == nullptr) {
        clear(to);
        continue;
      }
      const __m512i sign = _mm512_set1_epi32(bits >> 31);
      int64_t d = 0;
      for (; d + 64 <= dim_; d += 64, to += 2 * kStepBytes) fp8_steps(_mm512_loadu_si512(key.values + d), sign, to);
      if (d == dim_) continue;
      const __m256i half = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(key.values + d));
      __m512i high, low;
      fp8_bytes(_mm512_broadcast_i64x4(half), sign, &high, &low);
      _mm512_store_si512(to, _mm512_mask_blend_epi64(0xF0, fp8_even(high, low), fp8_odd(high, low)));
    }
  }

  static void arrange_fp8(const __m512i* x, int64_t steps, __m512i* out) {
    alignas(64) static const uint16_t kEven[32] = {0,  2,  4,  6,  8,  10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30,
                                                   32, 34, 36, 38, 40, 42, 44, 46, 48, 50, 52, 54, 56, 58, 60, 62};
    const __m512i even = _mm512_load_si512(kEven), odd = _mm512_add_epi16(even, _mm512_set1_epi16(1));
    int64_t s = 0;
    for (; s + 2 <= steps; s += 2) {
      out[s] = _mm512_permutex2var_epi16(x[s], even, x[s + 1]);
      out[s + 1] = _mm512_permutex2var_epi16(x[s], odd, x[s + 1]);
    }
    if (s < steps) {
      const __m512i first = _mm512_permutexvar_epi16(even, x[s]), second = _mm512_permutexvar_epi16(odd, x[s]);
      out[s] = _mm512_mask_blend_epi64(0xF0, first, second);  // indices wrap after 32
    }
  }

  IndexKeyFormat format_;
  int64_t dim_, page_size_, value_bytes_, group_bytes_;
  uint8_t* panel_;
  int64_t mask_ = 0, base_ = 0, done_ = 0;
  const IndexKey *keys_ = nullptr, *next_ = nullptr;
  int64_t count_ = 0, next_count_ = 0, fetched_ = 0;
  IndexCodes codes_;
  alignas(64) float scales_[kGroups * kTileRows];
};

}  // namespace
}  // namespace dsv4::DSV4_AMX_NAMESPACE
