// Dot products of activations with rows of quantised weights, for the linear layers and the experts. Inputs are taken
// in blocks of 128: four registers of 32 bfloat16 on either side, in an order of the weight format's own, into which
// the activations are brought once. Weights expand to the values of their codes, exactly; the scale of a block (or of
// its four groups, which lie in the four lanes) multiplies the block's sum:
//   block = dot(x3, w3, dot(x2, w2, dot(x1, w1, dot(x0, w0, 0))));  sum += block * scale
// and `total` adds the 16 lanes by one tree. Every path below keeps to this, so a result depends on its row of
// activations and its row of weights alone. vdpbf16ps takes denormal operands and sums as zero: activations (scale
// included) below 2^-126 do not count; codes are never that small.
#pragma once

#include "common/pages.h"
#include "cpu/avx512/lanes.h"

#define DSV4_MEMBER __attribute__((always_inline)) inline

namespace dsv4::avx512 {
namespace {

inline constexpr int64_t kBlock = 128;  // inputs
inline constexpr int64_t kBlockSteps = kBlock / kStep;
inline constexpr int64_t kFewRows = 4;  // rows of activations up to which experts expand weights in registers alone

DSV4_INLINE int64_t blocks_of(int64_t inputs) { return (inputs + kBlock - 1) / kBlock; }

struct Block {
  __m512i w[kBlockSteps];
};

DSV4_INLINE __mmask64 mask64(int64_t count) {
  return count >= 64 ? ~__mmask64{0} : count <= 0 ? 0 : (__mmask64{1} << count) - 1;
}

DSV4_INLINE __m512 dot_bf16(__m512 sum, __m512i x, __m512i w) {
  return _mm512_dpbf16_ps(sum, reinterpret_cast<__m512bh>(x), reinterpret_cast<__m512bh>(w));
}

// The upper and lower bytes of the bfloat16 values of e4m3's 128 magnitudes, and of half of them.
struct E4m3Bytes {
  uint8_t high[2][128] = {}, low[2][128] = {};

  constexpr E4m3Bytes() {
    for (int half = 0; half < 2; ++half) {
      for (int code = 0; code < 128; ++code) {
        int exponent = code >> 3, mantissa = code & 7;
        if (exponent == 0) {  // steps of 2^-9: bring the highest bit to the front
          for (exponent = 1; mantissa != 0 && (mantissa & 8) == 0; --exponent) mantissa *= 2;
        }
        int bits = code == 0 ? 0 : ((exponent + 120 - half) << 7) | (mantissa & 7) << 4;
        if (code == 127) bits = 0x7FC0;
        high[half][code] = static_cast<uint8_t>(bits >> 8);
        low[half][code] = static_cast<uint8_t>(bits);
      }
    }
  }
};
alignas(64) static constexpr E4m3Bytes kE4m3;

// e4m3, a byte an input, one scale a block. Make one per piece of work: it holds tables.
class Fp8Rows {
 public:
  static constexpr int64_t kBlockBytes = kBlock;
  static constexpr int64_t kScales = 1;  // of a block
  static constexpr int64_t bytes(int64_t inputs) { return inputs; }

  Fp8Rows() {
    for (int half = 0; half < 2; ++half) {
      high_[half] = _mm512_load_si512(kE4m3.high[0] + 64 * half);
      low_[half] = _mm512_load_si512(kE4m3.low[0] + 64 * half);
    }
  }

  DSV4_MEMBER Block expand(const uint8_t* codes) const {
    return words(_mm512_loadu_si512(codes), _mm512_loadu_si512(codes + 64));
  }
  // The first `count` bytes; the rest count as zero and are not read.
  DSV4_MEMBER Block expand(const uint8_t* codes, int64_t count) const {
    return words(_mm512_maskz_loadu_epi8(mask64(count), codes),
                 _mm512_maskz_loadu_epi8(mask64(count - 64), codes + 64));
  }

  // The same times 2^-shift, 0 to 60: an even part off the exponent's upper seven bits, an odd rest by a table of
  // halves.
  DSV4_MEMBER Block expand_folded(const uint8_t* codes, const uint8_t* shift) const {
    return words(_mm512_loadu_si512(codes), _mm512_loadu_si512(codes + 64), *shift);
  }
  DSV4_MEMBER Block expand_folded(const uint8_t* codes, const uint8_t* shift, int64_t count) const {
    return words(_mm512_maskz_loadu_epi8(mask64(count), codes), _mm512_maskz_loadu_epi8(mask64(count - 64), codes + 64),
                 *shift);
  }

  // A block of activations from the order of memory into that of `expand`: bytes unpack within lanes of 16.
  DSV4_INLINE void arrange(const bf16* x, bf16* to) {
    const __m512i even = _mm512_setr_epi64(0, 1, 4, 5, 8, 9, 12, 13),
                  odd = _mm512_setr_epi64(2, 3, 6, 7, 10, 11, 14, 15);
    for (int half = 0; half < 2; ++half) {
      const __m512i a = _mm512_loadu_si512(x + 64 * half), b = _mm512_loadu_si512(x + 64 * half + 32);
      _mm512_storeu_si512(to + 64 * half, _mm512_permutex2var_epi64(a, even, b));
      _mm512_storeu_si512(to + 64 * half + 32, _mm512_permutex2var_epi64(a, odd, b));
    }
  }

  // The scale of a block for every lane.
  DSV4_INLINE __m512 scale(const float* scales, int64_t block) { return _mm512_set1_ps(scales[block]); }

 private:
  DSV4_MEMBER Block words(__m512i first, __m512i second) const {
    Block block;
    const __m512i magnitude = _mm512_set1_epi8(0x7F);
    const __m512i codes[2] = {first, second};
    for (int half = 0; half < 2; ++half) {
      const __m512i code = codes[half];
      const __m512i high = _mm512_ternarylogic_epi32(magnitude, _mm512_permutex2var_epi8(high_[0], code, high_[1]),
                                                     code, 0xCA);  // the sign of the code
      const __m512i low = _mm512_permutex2var_epi8(low_[0], code, low_[1]);
      block.w[2 * half] = _mm512_unpacklo_epi8(low, high);
      block.w[2 * half + 1] = _mm512_unpackhi_epi8(low, high);
    }
    return block;
  }

  DSV4_MEMBER Block words(__m512i first, __m512i second, uint8_t shift) const {
    Block block;
    const uint8_t *high_table = kE4m3.high[shift & 1], *low_table = kE4m3.low[shift & 1];
    const __m512i magnitude = _mm512_set1_epi8(0x7F), down = _mm512_set1_epi8(static_cast<char>(shift >> 1));
    const __m512i codes[2] = {first, second};
    for (int half = 0; half < 2; ++half) {
      const __m512i code = codes[half];
      const __mmask64 number = _mm512_cmpneq_epi8_mask(_mm512_add_epi8(code, code), _mm512_set1_epi8(-2));  // not NaN
      __m512i high = _mm512_permutex2var_epi8(_mm512_load_si512(high_table), code, _mm512_load_si512(high_table + 64));
      high = _mm512_mask_subs_epu8(high, number, high, down);  // zero stays zero
      high = _mm512_ternarylogic_epi32(magnitude, high, code, 0xCA);
      const __m512i low =
          _mm512_permutex2var_epi8(_mm512_load_si512(low_table), code, _mm512_load_si512(low_table + 64));
      block.w[2 * half] = _mm512_unpacklo_epi8(low, high);
      block.w[2 * half + 1] = _mm512_unpackhi_epi8(low, high);
    }
    return block;
  }

  __m512i high_[2], low_[2];  // bytes of the bfloat16 values of the 128 magnitudes
};

// bfloat16 values of e2m1's codes; twice, so that the lowest bit of the next nibble does not matter.
alignas(64) static constexpr uint16_t kE2m1[32] = {0x0000, 0x3F00, 0x3F80, 0x3FC0, 0x4000, 0x4040, 0x4080, 0x40C0,
                                                   0x8000, 0xBF00, 0xBF80, 0xBFC0, 0xC000, 0xC040, 0xC080, 0xC0C0,
                                                   0x0000, 0x3F00, 0x3F80, 0x3FC0, 0x4000, 0x4040, 0x4080, 0x40C0,
                                                   0x8000, 0xBF00, 0xBF80, 0xBFC0, 0xC000, 0xC040, 0xC080, 0xC0C0};

// e2m1, two inputs a byte, the even one in the low nibble; four scales a block, of 32 inputs each. Word i of the codes
// holds inputs 4 i to 4 i + 3; register j of a block takes nibble j of every word.
class Fp4Rows {
 public:
  static constexpr int64_t kBlockBytes = kBlock / 2;
  static constexpr int64_t kScales = 4;
  static constexpr int64_t bytes(int64_t inputs) { return inputs / 2; }

  Fp4Rows() : table_(_mm512_load_si512(kE2m1)) {}

  DSV4_MEMBER Block expand(const uint8_t* codes) const { return words(_mm512_loadu_si512(codes)); }
  DSV4_MEMBER Block expand(const uint8_t* codes, int64_t count) const {
    return words(_mm512_maskz_loadu_epi8(mask64(count), codes));
  }

  DSV4_INLINE void arrange(const bf16* x, bf16* to) {
    for (int64_t i = 0; i < kStep; ++i) {
      for (int64_t j = 0; j < kBlockSteps; ++j) to[kStep * j + i] = x[kBlockSteps * i + j];
    }
  }

  DSV4_INLINE __m512 scale(const float* scales, int64_t block) {
    const __m512i lane = _mm512_setr_epi32(0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2, 3, 3, 3, 3);
    return _mm512_permutexvar_ps(lane, _mm512_castps128_ps512(_mm_loadu_ps(scales + 4 * block)));
  }

 private:
  DSV4_MEMBER Block words(__m512i codes) const {
    return {{_mm512_permutexvar_epi16(codes, table_), _mm512_permutexvar_epi16(_mm512_srli_epi16(codes, 4), table_),
             _mm512_permutexvar_epi16(_mm512_srli_epi16(codes, 8), table_),
             _mm512_permutexvar_epi16(_mm512_srli_epi16(codes, 12), table_)}};
  }

  __m512i table_;
};

// e8m0 or float32 scales as float32; to[count, padded) = 0.
static inline void widen_scales(const uint8_t* scales, int64_t count, int64_t padded, float* to) {
  for (int64_t i = 0; i < padded; i += 16) {
    const __mmask16 mine = low16(count - i < 0 ? 0 : count - i > 16 ? 16 : count - i);
    const __mmask16 out = low16(padded - i > 16 ? 16 : padded - i);
    const __m512i byte = _mm512_cvtepu8_epi32(_mm_maskz_loadu_epi8(mine, scales + i));
    __m512i bits = _mm512_slli_epi32(byte, 23);
    bits = _mm512_mask_mov_epi32(bits, _mm512_cmpeq_epi32_mask(byte, _mm512_setzero_si512()),
                                 _mm512_set1_epi32(0x00400000));  // 2^-127 is denormal
    bits = _mm512_mask_mov_epi32(bits, _mm512_cmpeq_epi32_mask(byte, _mm512_set1_epi32(255)),
                                 _mm512_set1_epi32(0x7FC00000));
    _mm512_mask_storeu_epi32(to + i, out, _mm512_maskz_mov_epi32(mine, bits));
  }
}
static inline void widen_scales(const float* scales, int64_t count, int64_t padded, float* to) {
  for (int64_t i = 0; i < padded; ++i) to[i] = i < count ? scales[i] : 0.0f;
}

// The sum of the lanes, by the tree of sums16.
DSV4_INLINE float total(__m512 x) {
  x = _mm512_add_ps(x, _mm512_permute_ps(x, 0x4E));
  x = _mm512_add_ps(x, _mm512_permute_ps(x, 0xB1));
  x = _mm512_add_ps(x, _mm512_shuffle_f32x4(x, x, 0xB1));
  x = _mm512_add_ps(x, _mm512_shuffle_f32x4(x, x, 0x4E));
  return _mm512_cvtss_f32(x);
}

// kM rows of arranged activations (`stride` elements apart, whole blocks, zero beyond the inputs) with one row of
// weights of `bytes` code bytes, straight from its codes.
template <int kM, class Rows>
static __attribute__((noinline)) void dot_row(const Rows& rows, const uint8_t* codes, int64_t bytes,
                                              const float* scales, const bf16* x, int64_t stride, float* results) {
  __m512 sum[kM];
#pragma GCC unroll 8
  for (int m = 0; m < kM; ++m) sum[m] = _mm512_setzero_ps();
  const auto add = [&](int64_t block, const Block& b) __attribute__((always_inline)) {
    const __m512 scale = Rows::scale(scales, block);
#pragma GCC unroll 8
    for (int m = 0; m < kM; ++m) {
      const bf16* from = x + m * stride + block * kBlock;
      __m512 part = _mm512_setzero_ps();
#pragma GCC unroll 4
      for (int j = 0; j < kBlockSteps; ++j) part = dot_bf16(part, _mm512_loadu_si512(from + kStep * j), b.w[j]);
      sum[m] = _mm512_fmadd_ps(part, scale, sum[m]);
    }
  };
  const int64_t whole = bytes / Rows::kBlockBytes, rest = bytes - whole * Rows::kBlockBytes;
  for (int64_t block = 0; block < whole; ++block) add(block, rows.expand(codes + block * Rows::kBlockBytes));
  if (rest > 0) add(whole, rows.expand(codes + whole * Rows::kBlockBytes, rest));
#pragma GCC unroll 8
  for (int m = 0; m < kM; ++m) results[m] = total(sum[m]);
}

// A row of weights as bfloat16 values of its codes, in whole blocks; `to` is 64-byte aligned.
template <class Rows>
DSV4_INLINE void expand_row(const Rows& rows, const uint8_t* codes, int64_t bytes, bf16* to) {
  const auto put = [&](int64_t block, const Block& b) __attribute__((always_inline)) {
    for (int j = 0; j < kBlockSteps; ++j) _mm512_store_si512(to + block * kBlock + kStep * j, b.w[j]);
  };
  const int64_t whole = bytes / Rows::kBlockBytes, rest = bytes - whole * Rows::kBlockBytes;
  for (int64_t block = 0; block < whole; ++block) put(block, rows.expand(codes + block * Rows::kBlockBytes));
  if (rest > 0) put(whole, rows.expand(codes + whole * Rows::kBlockBytes, rest));
}

// kM rows of arranged activations with kN expanded rows of weights; results[m * kN + n].
// This and dot_row are functions of their own, or compilers spill what the loops keep in registers.
template <int kM, int kN, class Rows>
static __attribute__((noinline)) void dot_tile(const bf16* x, int64_t stride, const bf16* w, int64_t w_stride,
                                               const float* scales, int64_t scale_stride, int64_t blocks,
                                               float* results) {
  __m512 sum[kM * kN];
  for (int i = 0; i < kM * kN; ++i) sum[i] = _mm512_setzero_ps();
  for (int64_t block = 0; block < blocks; ++block) {
    __m512 part[kM * kN];
#pragma GCC unroll 16
    for (int i = 0; i < kM * kN; ++i) part[i] = _mm512_setzero_ps();
#pragma GCC unroll 4
    for (int j = 0; j < kBlockSteps; ++j) {
      const int64_t at = block * kBlock + kStep * j;
      __m512i weights[kN];
#pragma GCC unroll 4
      for (int n = 0; n < kN; ++n) weights[n] = _mm512_load_si512(w + n * w_stride + at);
#pragma GCC unroll 8
      for (int m = 0; m < kM; ++m) {
        const __m512i row = _mm512_loadu_si512(x + m * stride + at);
#pragma GCC unroll 4
        for (int n = 0; n < kN; ++n) part[m * kN + n] = dot_bf16(part[m * kN + n], row, weights[n]);
      }
    }
#pragma GCC unroll 4
    for (int n = 0; n < kN; ++n) {
      const __m512 scale = Rows::scale(scales + n * scale_stride, block);
#pragma GCC unroll 8
      for (int m = 0; m < kM; ++m) sum[m * kN + n] = _mm512_fmadd_ps(part[m * kN + n], scale, sum[m * kN + n]);
    }
  }
  if constexpr (kM * kN == 16) {
    _mm512_storeu_ps(results, sums16(sum));
  } else {
    for (int i = 0; i < kM * kN; ++i) results[i] = total(sum[i]);
  }
}

// Up to 128 activations after the FP8 quantiser (python/dsv4/ops/quantize.py), as values, zero to the end of the block:
// e4m3 codes times their power of two are exact in bfloat16. A block with an infinity or a NaN becomes NaN.
template <class X>
DSV4_INLINE void quantise_block(const X* x, int64_t count, bf16* to) {
  Pair values[kBlockSteps];
  __m512i most = _mm512_setzero_si512();
  const __m512i magnitude = _mm512_set1_epi32(0x7FFFFFFF);
#pragma GCC unroll 4
  for (int64_t j = 0; j < kBlockSteps; ++j) {
    const int64_t left = count - kStep * j;
    values[j] = left >= kStep ? load(x + kStep * j) : left > 0 ? load(x + kStep * j, left) : Pair{};
    most = _mm512_max_epu32(most, _mm512_and_si512(magnitude, _mm512_castps_si512(values[j].a)));
    most = _mm512_max_epu32(most, _mm512_and_si512(magnitude, _mm512_castps_si512(values[j].b)));
  }
  const uint32_t amax = _mm512_reduce_max_epu32(most);  // magnitudes order as their bits do, NaN above all
  if (amax >= 0x7F800000u) {
    for (int64_t j = 0; j < kBlockSteps; ++j) _mm512_storeu_si512(to + kStep * j, _mm512_set1_epi16(0x7FFF));
    return;
  }
  const float largest = float_from_bits(amax), least = 1e-4f;
  const uint32_t ratio = bits_from_float((largest > least ? largest : least) * (1.0f / 448.0f));
  const uint32_t exponent = (ratio >> 23) + ((ratio & 0x7FFFFFu) != 0);
  const __m512 scale = _mm512_set1_ps(float_from_bits(exponent << 23));
  const __m512 inverse = _mm512_set1_ps(float_from_bits((254 - exponent) << 23));
  const auto code = [&](__m512 value) __attribute__((always_inline)) {
    const __m512 limit = _mm512_set1_ps(448.0f);
    value =
        _mm512_max_ps(_mm512_sub_ps(_mm512_setzero_ps(), limit), _mm512_min_ps(limit, _mm512_mul_ps(value, inverse)));
    const __m512i bits = _mm512_castps_si512(value);
    const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 20), _mm512_set1_epi32(1));
    const __m512i up = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7FFFF)));
    const __m512i normal = _mm512_and_si512(up, _mm512_set1_epi32(static_cast<int>(0xFFF00000u)));
    const __mmask16 small = _mm512_cmplt_epu32_mask(_mm512_and_si512(bits, magnitude),
                                                    _mm512_set1_epi32((127 - 6) << 23));  // steps of 2^-9 below 2^-6
    const __m512 rounded = _mm512_mask_roundscale_ps(_mm512_castsi512_ps(normal), small, value, 9 << 4);
    return _mm512_mul_ps(rounded, scale);
  };
#pragma GCC unroll 4
  for (int64_t j = 0; j < kBlockSteps; ++j) {
    const Pair codes = {code(values[j].a), code(values[j].b)};
    if constexpr (sizeof(X) == sizeof(bf16)) {
      store(to + kStep * j, codes);
    } else {
      store(to + kStep * j, arrange(codes, to));
    }
  }
}

// A row of activations quantised and arranged for `Rows`, whole blocks.
template <class Rows, class X>
DSV4_INLINE void quantise_row(const X* x, int64_t inputs, bf16* to) {
  for (int64_t at = 0; at < inputs; at += kBlock) {
    alignas(64) bf16 block[kBlock];
    quantise_block(x + at, inputs - at < kBlock ? inputs - at : kBlock, block);
    Rows::arrange(block, to + at);
  }
}

}  // namespace
}  // namespace dsv4::avx512
