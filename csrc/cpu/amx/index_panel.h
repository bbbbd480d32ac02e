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

  IndexRing(const IndexKeyPool& pool, uint8_t* memory)
      : format_(pool.format()),
        dim_(pool.dim()),
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
    for (; fetched_ < end; ++fetched_) {
      const uint8_t* values = next_[fetched_].values;
      if (fetched_ % kTileRows == 0) _mm_prefetch(reinterpret_cast<const char*>(next_[fetched_].scales), _MM_HINT_T1);
      for (int64_t at = 0; values != nullptr && at < value_bytes_; at += 64) {
        _mm_prefetch(reinterpret_cast<const char*>(values + at), _MM_HINT_T1);
      }
    }
  }

  // Decodes up to `count` more keys, none from `limit` on. Keys are counted from the first of the chunk on.
  void decode(int64_t count, int64_t limit) {
    int64_t end = done_ + count < limit ? done_ + count : limit;
    end = end < count_ + next_count_ ? end : count_ + next_count_;
    while (done_ < end) {
      const bool here = done_ < count_;
      const int64_t stop = here && end > count_ ? count_ : end;
      decode_run(here ? keys_ + done_ : next_ + (done_ - count_), done_, stop - done_);
      done_ = stop;
    }
  }
  void require(int64_t end) {
    if (done_ < end) decode(end - done_, end);
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
  // `count` keys that lie behind one another in the ring but for its end.
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

  // Every 128 bits hold the codes of the dims of one scale: four dims a word, so that the step of nibble k has dims
  // 4 j + k. Fewer dims fill the register more than once, shifted already.
  __attribute__((noinline)) void decode_fp4(const IndexKey* keys, int64_t at, int64_t count) const {
    const __m512i table = _mm512_load_si512(codes_.e2m1);
    const __m512i spread =
        _mm512_setr_epi32(static_cast<int>(0x80008000), static_cast<int>(0x80008000), static_cast<int>(0x80008000),
                          static_cast<int>(0x80008000), static_cast<int>(0x80018001), static_cast<int>(0x80018001),
                          static_cast<int>(0x80018001), static_cast<int>(0x80018001), static_cast<int>(0x80028002),
                          static_cast<int>(0x80028002), static_cast<int>(0x80028002), static_cast<int>(0x80028002),
                          static_cast<int>(0x80038003), static_cast<int>(0x80038003), static_cast<int>(0x80038003),
                          static_cast<int>(0x80038003));
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
        const __m512i scale = _mm512_slli_epi16(_mm512_shuffle_epi8(_mm512_set1_epi32(static_cast<int>(e)), spread), 7);
        fp4_steps<4>(_mm512_loadu_si512(values), scale, table, to);
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

  // Lower and upper bytes of 64 values with the signs of `codes`.
  __attribute__((always_inline)) void fp8_bytes(__m512i codes, const __m512i* tables, __m512i* high,
                                                __m512i* low) const {
    const __m512i value = _mm512_permutex2var_epi8(tables[0], codes, tables[1]);
    *high = _mm512_ternarylogic_epi32(value, codes, _mm512_set1_epi8(static_cast<char>(0x80)), 0xF8);
    *low = _mm512_permutex2var_epi8(tables[2], codes, tables[3]);
  }

  // A word holds two codes: the even dims come out first, then the odd ones.
  __attribute__((noinline)) void decode_fp8(const IndexKey* keys, int64_t at, int64_t count) {
    const __m512i tables[4] = {_mm512_load_si512(codes_.high), _mm512_load_si512(codes_.high + 64),
                               _mm512_load_si512(codes_.low), _mm512_load_si512(codes_.low + 64)};
    const __m512i lower = _mm512_set1_epi16(0x00FF);
    for (int64_t i = 0; i < count; ++i) {
      const IndexKey key = keys[i];
      uint8_t* to = row(at + i);
      uint32_t scale_bits = 0;
      if (key.values != nullptr) memcpy(&scale_bits, key.scales, 4);
      const uint32_t magnitude = scale_bits & 0x7FFFFFFFu;
      memcpy(scale(at + i), &magnitude, 4);
      if (key.values == nullptr) {
        clear(to);
        continue;
      }
      const __m512i sign = _mm512_set1_epi8(static_cast<char>(scale_bits >> 24 & 0x80));
      __m512i high, low;
      int64_t d = 0;
      for (; d + 64 <= dim_; d += 64, to += 2 * kStepBytes) {
        fp8_bytes(_mm512_xor_si512(_mm512_loadu_si512(key.values + d), sign), tables, &high, &low);
        _mm512_store_si512(to, _mm512_ternarylogic_epi32(lower, low, _mm512_slli_epi16(high, 8), 0xCA));
        _mm512_store_si512(to + kStepBytes, _mm512_ternarylogic_epi32(lower, _mm512_srli_epi16(low, 8), high, 0xCA));
      }
      if (d == dim_) continue;
      const __m512i codes =
          _mm512_broadcast_i64x4(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(key.values + d)));
      fp8_bytes(_mm512_xor_si512(codes, sign), tables, &high, &low);
      const __m512i even = _mm512_ternarylogic_epi32(lower, low, _mm512_slli_epi16(high, 8), 0xCA);
      const __m512i odd = _mm512_ternarylogic_epi32(lower, _mm512_srli_epi16(low, 8), high, 0xCA);
      _mm512_store_si512(to, _mm512_mask_blend_epi64(0xF0, even, odd));
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
  int64_t dim_, value_bytes_, group_bytes_;
  uint8_t* panel_;
  int64_t mask_ = 0, base_ = 0, done_ = 0;
  const IndexKey *keys_ = nullptr, *next_ = nullptr;
  int64_t count_ = 0, next_count_ = 0, fetched_ = 0;
  IndexCodes codes_;
  alignas(64) float scales_[kGroups * kTileRows];
};

}  // namespace
}  // namespace dsv4::DSV4_AMX_NAMESPACE
