// Dot products of activations with rows of quantised weights, for the linear layers and the experts. Inputs are taken
// in blocks of 128: four registers of 32 bfloat16 on either side, in an order of the weight format's own, into which
// the activations are brought once. Scales that are powers of two, as checkpoints have them, go into the weights as
// they expand, exactly (the ranges are below), and sums go on over blocks:
//   sum = dot(x3, w3, dot(x2, w2, dot(x1, w1, dot(x0, w0, sum))))
// Other scales multiply the sum of their block, or of its four groups, which lie in the four lanes:
//   block = dot(x3, w3, dot(x2, w2, dot(x1, w1, dot(x0, w0, 0))));  sum += block * scale
// and `total` adds the 16 lanes by one tree. Which of the two it is depends on the weights alone, and so a result on
// its row of activations and its row of weights. vdpbf16ps takes denormal operands and sums as zero: activations below
// 2^-126 do not count; weights are never that small.
//
// Zen 4 gives vdpbf16ps two of its four vector units, saturating arithmetic, comparisons and permutations of two
// registers (vpermi2b) the same two; permutations of one register, shifts, plain sums, minima and logic find place
// beside the products. That is what decided between ways to expand.
#pragma once

#include "common/pages.h"
#include "cpu/avx512/e4m3_bytes.h"
#include "cpu/avx512/lanes.h"

#define DSV4_MEMBER __attribute__((always_inline)) inline

namespace dsv4::avx512 {
namespace {

inline constexpr int64_t kBlock = 128;  // inputs
inline constexpr int64_t kBlockSteps = kBlock / kStep;
inline constexpr int64_t kChunk = 1024, kChunkBlocks = kChunk / kBlock;  // inputs, after which lanes are added up
inline constexpr int64_t kCodeBytes = 64;                                // of a register of codes
inline constexpr int64_t kPageBytes = 4096;  // plain rows shorter than that are read one after another

DSV4_INLINE int64_t blocks_of(int64_t inputs) { return (inputs + kBlock - 1) / kBlock; }

struct Block {
  __m512i w[kBlockSteps];
};

DSV4_INLINE __mmask64 mask64(int64_t count) {
  return count >= 64 ? ~__mmask64{0} : count <= 0 ? 0 : (__mmask64{1} << count) - 1;
}

// Asks for memory to come as far as the second-level cache: in the first, it would drive out what is being multiplied.
DSV4_INLINE void ask(const uint8_t* from, int64_t bytes) {
  for (int64_t at = 0; at < bytes; at += 64) _mm_prefetch(from + at, _MM_HINT_T1);
}

DSV4_INLINE __m512 dot_bf16(__m512 sum, __m512i x, __m512i w) {
  return _mm512_dpbf16_ps(sum, reinterpret_cast<__m512bh>(x), reinterpret_cast<__m512bh>(w));
}

// Values that are exact in bfloat16, as bfloat16 in the order of memory.
DSV4_INLINE __m512i exact_words(Pair value) {
  const __m512i high = _mm512_set1_epi32(static_cast<int>(0xFFFF0000u));
  return _mm512_ternarylogic_epi32(_mm512_srli_epi32(_mm512_castps_si512(value.a), 16), _mm512_castps_si512(value.b),
                                   high, 0xF8);  // a | (b & c)
}

// e8m0 scales that go into weights of e2m1 end here, far from overflow; those of e4m3 at kMostScaleFp8.
inline constexpr int kMostScaleFp4 = 190;

// The e8m0 scales of a block, as stored, all of which fold. Four are there with e2m1, of whatever value beyond the
// last.
struct StoredScales {
  const uint8_t* first;
};

// What the formats have in common, on their own `load` and `half`.
template <class Rows>
struct BlockOf {
  // A block of weights times its scales; `count` bytes of it, if not all: the rest counts as zero and is not read.
  template <class Scales, class... Count>
  DSV4_MEMBER Block expand(const uint8_t* codes, Scales scales, Count... count) const {
    const Rows& rows = static_cast<const Rows&>(*this);
    const auto packed = rows.load(codes, scales, count...);
    Block block;
    rows.template half<0, true>(packed, block.w);
    rows.template half<1, true>(packed, block.w + 2);
    return block;
  }
};

// e4m3, a byte an input, one scale a block.
class Fp8Rows : public BlockOf<Fp8Rows> {
 public:
  using Scale = uint8_t;  // s for 2^-s
  static constexpr int64_t kBlockBytes = kBlock;
  static constexpr int64_t kScales = 1;  // of a block
  static constexpr int kWideRows = 2;    // of activations that meet four rows of weights at once
  static constexpr int kMostScale = kMostScaleFp8;
  static constexpr Scale kUnscaled[kScales] = {0};
  static constexpr int64_t bytes(int64_t inputs) { return inputs; }

  // What `load` takes for e8m0 scales, and 1 up to `padded`; false where one does not fold.
  static bool fold(const uint8_t* scales, int64_t count, int64_t padded, Scale* to) {
    __mmask64 beyond = 0;
    for (int64_t i = 0; i < padded; i += 64) {
      const __mmask64 mine = mask64(count - i), out = mask64(padded - i);
      const __m512i shift =
          _mm512_maskz_sub_epi8(mine, _mm512_set1_epi8(kMostScale), _mm512_maskz_loadu_epi8(mine, scales + i));
      beyond |= _mm512_cmpgt_epu8_mask(shift, _mm512_set1_epi8(kMostScale - kLeastScale));
      _mm512_mask_storeu_epi8(to + i, out, shift);
    }
    return beyond == 0;
  }

  struct Packed {
    __m512i codes[2];
    const E4m3Bytes::Table* table;
  };
  DSV4_MEMBER Packed load(const uint8_t* codes, const Scale* shift) const {
    return {{_mm512_loadu_si512(codes), _mm512_loadu_si512(codes + 64)}, kE4m3.of + *shift};
  }
  DSV4_MEMBER Packed load(const uint8_t* codes, const Scale* shift, int64_t count) const {
    return {{_mm512_maskz_loadu_epi8(mask64(count), codes), _mm512_maskz_loadu_epi8(mask64(count - 64), codes + 64)},
            kE4m3.of + *shift};
  }
  template <class... Count>
  DSV4_MEMBER Packed load(const uint8_t* codes, StoredScales stored, Count... count) const {
    const Scale shift = static_cast<Scale>(kMostScale - *stored.first);
    return load(codes, &shift, count...);
  }
  // The table of a scale, in registers where rows of weights have it in common.
  struct Shared {
    __m512i high[2], low[2];
  };
  DSV4_MEMBER Shared share(const Scale* shift) const { return read(kE4m3.of + *shift); }

  // Registers 2 kHalf and 2 kHalf + 1 of a block.
  template <int kHalf, bool>
  DSV4_MEMBER void half(const Packed& packed, const Shared& table, __m512i* w) const {
    const __m512i code = packed.codes[kHalf];
    const __m512i upper =
        _mm512_ternarylogic_epi32(_mm512_set1_epi8(0x7F), _mm512_permutex2var_epi8(table.high[0], code, table.high[1]),
                                  code, 0xCA);  // the sign of the code
    const __m512i lower = _mm512_permutex2var_epi8(table.low[0], code, table.low[1]);
    w[0] = _mm512_unpacklo_epi8(lower, upper);
    w[1] = _mm512_unpackhi_epi8(lower, upper);
  }
  template <int kHalf, bool kSaturate>
  DSV4_MEMBER void half(const Packed& packed, __m512i* w) const {
    half<kHalf, kSaturate>(packed, read(packed.table), w);
  }

  // Word d of kCodeBytes of codes of 16 rows, which have one scale: put(lane, step, the pairs that lie in that lane
  // when a row expands, of 16 rows).
  static constexpr int64_t kCodeSteps = 2;
  template <class Put>
  DSV4_MEMBER void expand_words(const __m512i* words, const Scale* const* scales, int64_t block, const Put& put) const {
    const Shared table = share(scales[0] + block);
    const __m512i apart =  // the first two codes of four words, then the others: as they unpack
        _mm512_broadcast_i32x4(_mm_setr_epi8(0, 1, 4, 5, 8, 9, 12, 13, 2, 3, 6, 7, 10, 11, 14, 15));
#pragma GCC unroll 16
    for (int d = 0; d < 16; ++d) {
      __m512i w[2];
      half<0, true>(Packed{{_mm512_shuffle_epi8(words[d], apart)}, nullptr}, table, w);
      for (int i = 0; i < 2; ++i) put(d / 4 * 4 + d % 2 * 2 + i, d / 2 % 2, w[i]);
    }
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

  // 32 activations, even and odd ones apart and exact in bfloat16, as 16 pairs of neighbours in the order of `expand`;
  // pair i of those from activation 32 j on is pair place(j, i) of its block.
  DSV4_INLINE __m512i pairs(Pair values) { return exact_words(values); }
  DSV4_INLINE int64_t place(int64_t j, int64_t i) {
    return 16 * (2 * (j / 2) + i / 4 % 2) + 4 * (2 * (j % 2) + i / 8) + i % 4;
  }

  // The scale of a block for every lane.
  DSV4_INLINE __m512 scale(const float* scales, int64_t block) { return _mm512_set1_ps(scales[block]); }

 private:
  DSV4_INLINE Shared read(const E4m3Bytes::Table* table) {
    return {{_mm512_load_si512(table->high), _mm512_load_si512(table->high + 64)},
            {_mm512_load_si512(table->low), _mm512_load_si512(table->low + 64)}};
  }
};

// bfloat16 values of e2m1's codes times 2^63, without a sign of zero; twice, so that the lowest bit of the next nibble
// does not matter.
alignas(64) static constexpr uint16_t kE2m1[32] = {0x0000, 0x5E80, 0x5F00, 0x5F40, 0x5F80, 0x5FC0, 0x6000, 0x6040,
                                                   0x0000, 0xDE80, 0xDF00, 0xDF40, 0xDF80, 0xDFC0, 0xE000, 0xE040,
                                                   0x0000, 0x5E80, 0x5F00, 0x5F40, 0x5F80, 0x5FC0, 0x6000, 0x6040,
                                                   0x0000, 0xDE80, 0xDF00, 0xDF40, 0xDF80, 0xDFC0, 0xE000, 0xE040};

// e2m1, two inputs a byte, the even one in the low nibble; four scales a block, of 32 inputs each. Word i of the codes
// holds inputs 4 i to 4 i + 3; register j of a block takes nibble j of every word. The table is ahead by 2^63, which a
// subtraction from the exponent takes back.
class Fp4Rows : public BlockOf<Fp4Rows> {
 public:
  using Scale = uint16_t;  // what is subtracted: 63 - s, in the place of the exponent, for 2^s
  static constexpr int64_t kBlockBytes = kBlock / 2;
  static constexpr int64_t kScales = 4;
  static constexpr int kWideRows = 4;
  static constexpr int kMostScale = kMostScaleFp4;
  static constexpr Scale kUnscaled[kScales] = {63 << 7, 63 << 7, 63 << 7, 63 << 7};
  static constexpr int64_t bytes(int64_t inputs) { return inputs / 2; }

  Fp4Rows() : table_(_mm512_load_si512(kE2m1)) {
    alignas(64) uint8_t index[64];
    for (int i = 0; i < 64; ++i) index[i] = static_cast<uint8_t>(2 * (i / 16) + i % 2);
    spread_ = _mm512_load_si512(index);
    for (int i = 0; i < 64; ++i) index[i] = static_cast<uint8_t>(i % 2 == 0 ? i / 4 * 4 : 0);
    first_scales_ = _mm512_load_si512(index);
  }

  static bool fold(const uint8_t* scales, int64_t count, int64_t padded, Scale* to) {
    __mmask32 beyond = 0;
    const __m512i most = _mm512_set1_epi16(kMostScale), range = _mm512_set1_epi16(kMostScale - kLeastScale);
    for (int64_t i = 0; i < padded; i += 32) {
      const __mmask32 mine = static_cast<__mmask32>(mask64(count - i)),
                      out = static_cast<__mmask32>(mask64(padded - i));
      const __m512i scale = _mm512_cvtepu8_epi16(_mm256_maskz_loadu_epi8(mine, scales + i));
      const __m512i less = _mm512_maskz_sub_epi16(mine, most, scale);
      beyond |= _mm512_cmpgt_epu16_mask(less, range);
      _mm512_mask_storeu_epi16(to + i, out, _mm512_slli_epi16(less, 7));
    }
    return beyond == 0;
  }

  struct Packed {
    __m512i codes, scale;
  };
  DSV4_MEMBER Packed load(const uint8_t* codes, const Scale* scales) const {
    return {_mm512_loadu_si512(codes), lanes(scales)};
  }
  DSV4_MEMBER Packed load(const uint8_t* codes, const Scale* scales, int64_t count) const {
    return {_mm512_maskz_loadu_epi8(mask64(count), codes), lanes(scales)};
  }
  struct Shared {};  // every row of weights has scales of its own
  DSV4_MEMBER Shared share(const Scale*) const { return {}; }
  template <int kHalf, bool kSaturate>
  DSV4_MEMBER void half(const Packed& packed, const Shared&, __m512i* w) const {
    half<kHalf, kSaturate>(packed, w);
  }
  // Zero stays zero, by saturation or, in two instructions that find place beside more products, by the minimum.
  template <int kHalf, bool kSaturate>
  DSV4_MEMBER void half(const Packed& packed, __m512i* w) const {
    const auto scaled = [&](__m512i codes) __attribute__((always_inline)) {
      const __m512i value = _mm512_permutexvar_epi16(codes, table_);
      return kSaturate ? _mm512_subs_epu16(value, packed.scale)
                       : _mm512_sub_epi16(value, _mm512_min_epu16(value, packed.scale));
    };
    w[0] = scaled(kHalf == 0 ? packed.codes : _mm512_srli_epi16(packed.codes, 8));
    w[1] = scaled(_mm512_srli_epi16(packed.codes, 8 * kHalf + 4));
  }

  // As Fp8Rows::expand_words, with scales by row.
  static constexpr int64_t kCodeSteps = 4;
  template <class Put>
  DSV4_MEMBER void expand_words(const __m512i* words, const Scale* const* scales, int64_t block, const Put& put) const {
    alignas(64) uint64_t four[16];
    for (int n = 0; n < 16; ++n) __builtin_memcpy(four + n, scales[n] + block * kScales, sizeof(*four));
    const __m512i low = _mm512_load_si512(four), high = _mm512_load_si512(four + 8);
    __m512i index = first_scales_;
#pragma GCC unroll 16
    for (int d = 0; d < 16; ++d) {  // four words have one scale
      const Packed packed = {words[d], _mm512_permutex2var_epi16(low, index, high)};
      if (d % 4 == 3) index = _mm512_add_epi16(index, _mm512_set1_epi16(1));
      __m512i w[4];
      half<0, true>(packed, w);
      half<1, true>(packed, w + 2);
      for (int j = 0; j < 4; ++j) put(d, j, w[j]);
    }
  }

  // Element 4 i + j becomes element i of register j: by fours within registers, then registers' lanes of 8.
  DSV4_INLINE void arrange(const bf16* x, bf16* to) {
    alignas(64) static const uint16_t kFours[kStep] = {0, 4, 8,  12, 16, 20, 24, 28, 1, 5, 9,  13, 17, 21, 25, 29,
                                                       2, 6, 10, 14, 18, 22, 26, 30, 3, 7, 11, 15, 19, 23, 27, 31};
    const __m512i fours = _mm512_load_si512(kFours);
    __m512i r[kBlockSteps];
#pragma GCC unroll 4
    for (int q = 0; q < kBlockSteps; ++q) r[q] = _mm512_permutexvar_epi16(fours, _mm512_loadu_si512(x + kStep * q));
#pragma GCC unroll 2
    for (int j = 0; j < kBlockSteps; j += 2) {
      const __m512i first = j == 0 ? _mm512_shuffle_i64x2(r[0], r[1], 0x44) : _mm512_shuffle_i64x2(r[0], r[1], 0xEE);
      const __m512i second = j == 0 ? _mm512_shuffle_i64x2(r[2], r[3], 0x44) : _mm512_shuffle_i64x2(r[2], r[3], 0xEE);
      _mm512_storeu_si512(to + kStep * j, _mm512_shuffle_i64x2(first, second, 0x88));
      _mm512_storeu_si512(to + kStep * (j + 1), _mm512_shuffle_i64x2(first, second, 0xDD));
    }
  }

  DSV4_INLINE __m512i pairs(Pair values) {  // in each lane those of registers 0, 2, 1 and 3
    const auto joined = [](__m512 x) __attribute__((always_inline)) {
      const __m512 second = _mm512_permute_ps(x, 0xEE);
      return exact_words({x, second});
    };
    return _mm512_unpacklo_epi64(joined(values.a), joined(values.b));
  }
  DSV4_INLINE int64_t place(int64_t j, int64_t i) { return 16 * (i % 2 * 2 + i % 4 / 2) + 4 * j + i / 4; }

  DSV4_INLINE __m512 scale(const float* scales, int64_t block) {
    const __m512i lane = _mm512_setr_epi32(0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2, 3, 3, 3, 3);
    return _mm512_permutexvar_ps(lane, _mm512_castps128_ps512(_mm_loadu_ps(scales + 4 * block)));
  }

 private:
  DSV4_MEMBER __m512i lanes(const Scale* scales) const {  // group g lies in lane g
    int64_t four;
    __builtin_memcpy(&four, scales, sizeof(four));
    return _mm512_shuffle_epi8(_mm512_set1_epi64(four), spread_);
  }

  __m512i table_, spread_, first_scales_;
};

// float32 scales, of which powers of two may fold.
template <class Rows>
static inline bool fold_scales(const float* scales, int64_t count, int64_t padded, typename Rows::Scale* to) {
  bool all = true;
  for (int64_t i = 0; i < padded; ++i) {
    const uint32_t bits = i < count ? bits_from_float(scales[i]) : 127u << 23;
    const uint8_t exponent = (bits & 0x807FFFFFu) == 0 ? static_cast<uint8_t>(bits >> 23) : uint8_t{255};
    all = Rows::fold(&exponent, 1, 1, to + i) && all;
  }
  return all;
}
template <class Rows>
static inline bool fold_scales(const uint8_t* scales, int64_t count, int64_t padded, typename Rows::Scale* to) {
  return Rows::fold(scales, count, padded, to);
}

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
  for (int64_t block = 0; block < whole; ++block)
    add(block, rows.expand(codes + block * Rows::kBlockBytes, Rows::kUnscaled));
  if (rest > 0) add(whole, rows.expand(codes + whole * Rows::kBlockBytes, Rows::kUnscaled, rest));
#pragma GCC unroll 8
  for (int m = 0; m < kM; ++m) results[m] = total(sum[m]);
}

// Up to 128 activations after the FP8 quantiser (python/dsv4/ops/quantize.py), as they load, zero to the end of the
// block: e4m3 codes times their power of two. A block with an infinity or a NaN becomes NaN.
template <class X>
DSV4_INLINE void quantise_values(const X* x, int64_t count, Pair* values) {
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
    const __m512 nan = _mm512_castsi512_ps(_mm512_set1_epi32(0x7FFF0000));
    for (int64_t j = 0; j < kBlockSteps; ++j) values[j] = {nan, nan};
    return;
  }
  const float largest = float_from_bits(amax), least = 1e-4f;
  const uint32_t ratio = bits_from_float((largest > least ? largest : least) * (1.0f / 448.0f));
  const uint32_t exponent = (ratio >> 23) + ((ratio & 0x7FFFFFu) != 0);
  const __m512 scale = _mm512_set1_ps(float_from_bits(exponent << 23));
  const __m512 inverse = _mm512_set1_ps(float_from_bits((254 - exponent) << 23));
  // To three bits behind the leading one, or to steps of 2^-9 below 2^-6: a number 1.5 * 2^20 times the power of two at
  // hand ends where those do. Nothing comes near 464, from where on it would not be 448.
  const __m512i powers = _mm512_set1_epi32(0x7F800000), least_power = _mm512_set1_epi32((127 - 6) << 23),
                far = _mm512_set1_epi32((20 << 23) + (1 << 22));
  const auto code = [&](__m512 value) __attribute__((always_inline)) {
    value = _mm512_mul_ps(value, inverse);
    const __m512i power = _mm512_max_epu32(_mm512_and_si512(_mm512_castps_si512(value), powers), least_power);
    const __m512 ruler = _mm512_castsi512_ps(_mm512_add_epi32(power, far));
    return _mm512_mul_ps(_mm512_sub_ps(_mm512_add_ps(value, ruler), ruler), scale);
  };
#pragma GCC unroll 4
  for (int64_t j = 0; j < kBlockSteps; ++j) values[j] = {code(values[j].a), code(values[j].b)};
}

// The same as bfloat16, in the order of memory.
template <class X>
DSV4_INLINE void quantise_block(const X* x, int64_t count, bf16* to) {
  Pair values[kBlockSteps];
  quantise_values(x, count, values);
#pragma GCC unroll 4
  for (int64_t j = 0; j < kBlockSteps; ++j) {
    const Pair even_odd = sizeof(X) == sizeof(bf16) ? values[j] : arrange(values[j], to);
    _mm512_storeu_si512(to + kStep * j, exact_words(even_odd));
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
