// How the weights of the linear layers expand: 128 inputs of a row, with their scales, as four registers of 32
// bfloat16, each of them a row of a tile; and the order of inputs that goes with it.
//
// e2m1 takes the order in which a register holds one scale: 16 bytes of codes stand in all four lanes, lane l takes
// nibble l of each of their 8 words, and that finds its value in the table of the scale: two vector instructions for 32
// weights, where one table and the subtraction of a scale take five, most of them on the port that shifts.
#pragma once

#include "cpu/amx/tile.h"
#include "cpu/avx512/weight_rows.h"

namespace dsv4::DSV4_AMX_NAMESPACE {
namespace {

using avx512::Block, avx512::kBlock, avx512::kBlockSteps, avx512::kStep, avx512::StoredScales;

// kLeast to kMost are the scales that go into the weights.
struct Fp8Weights : avx512::Fp8Rows {
  using Rows = avx512::Fp8Rows;
  using Element = uint8_t;
  static constexpr int kLeast = avx512::kLeastScale, kMost = kMostScale;

  static void restore(bf16*) {}
};

// bfloat16 values of e2m1's codes times each of those scales, without a sign of zero; twice, so that the lowest bit of
// the next nibble does not matter.
struct E2m1Values {
  uint16_t of[avx512::kMostScaleFp4 - avx512::kLeastScale + 1][32] = {};

  constexpr E2m1Values() {
    for (int scale = avx512::kLeastScale; scale <= avx512::kMostScaleFp4; ++scale) {
      for (int code = 0; code < 32; ++code) {
        const int size = code & 7, exponent = scale + size / 2 - 1, mantissa = size == 1 ? 0 : size & 1;
        const int bits = (code & 8) << 12 | exponent << 7 | mantissa << 6;
        of[scale - avx512::kLeastScale][code] = static_cast<uint16_t>(size == 0 ? 0 : bits);
      }
    }
  }
};
alignas(64) static constexpr E2m1Values kE2m1Values;

struct Fp4Weights : avx512::Fp4Rows {
  using Rows = avx512::Fp4Rows;
  using Element = uint8_t;
  static constexpr int kLeast = avx512::kLeastScale, kMost = kMostScale;

  Fp4Weights() {
    alignas(64) uint8_t fields[kTileBytes];
    for (int i = 0; i < kTileBytes; ++i) fields[i] = static_cast<uint8_t>(i / 16 * 4 + i % 8 / 2 * 16);
    fields_ = _mm512_load_si512(fields);
  }

  DSV4_MEMBER Block expand(const uint8_t* codes, StoredScales scales) const {
    Block block;
#pragma GCC unroll 4
    for (int64_t j = 0; j < kBlockSteps; ++j) {
      const __m512i four = _mm512_broadcast_i32x4(_mm_loadu_si128(reinterpret_cast<const __m128i*>(codes + 16 * j)));
      const __m512i index = _mm512_multishift_epi64_epi8(fields_, four);
      block.w[j] = _mm512_permutexvar_epi16(
          index, _mm512_load_si512(kE2m1Values.of[0] + (size_t{scales.first[j]} * kStep - kLeast * kStep)));
    }
    return block;
  }
  DSV4_MEMBER Block expand(const uint8_t* codes, StoredScales scales, int64_t count) const {
    alignas(64) uint8_t some[kBlockBytes];
    _mm512_store_si512(some, _mm512_maskz_loadu_epi8(avx512::mask64(count), codes));
    return expand(some, scales);
  }

  // Lanes and registers change places against Fp4Rows.
  static void arrange(const bf16* x, bf16* to) {
    alignas(64) uint16_t order[kStep];
    for (int i = 0; i < kStep; ++i) order[i] = static_cast<uint16_t>(i % 8 * 4 + i / 8);
    for (int64_t at = 0; at < kBlock; at += kStep) {
      _mm512_storeu_si512(to + at, _mm512_permutexvar_epi16(_mm512_load_si512(order), _mm512_loadu_si512(x + at)));
    }
  }
  static int64_t place(int64_t j, int64_t i) {
    const int64_t there = Rows::place(j, i);
    return there / 4 % 4 * 16 + there / 16 * 4 + there % 4;
  }
  // A block of activations into the order of Fp4Rows.
  static void restore(bf16* x) {
    bf16 lanes[4][4][8];
    __builtin_memcpy(lanes, x, sizeof(lanes));
    for (int64_t i = 0; i < 16; ++i) __builtin_memcpy(x + 8 * i, lanes[i % 4][i / 4], sizeof(lanes[0][0]));
  }

 private:
  __m512i fields_;
};

struct PlainWeights {
  using Element = bf16;
  static constexpr int64_t kBlockBytes = kBlock * static_cast<int64_t>(sizeof(bf16)), kScales = 0;
  static constexpr int kLeast = 0;
  static constexpr int64_t bytes(int64_t inputs) { return inputs * static_cast<int64_t>(sizeof(bf16)); }

  DSV4_MEMBER Block expand(const uint8_t* words, StoredScales) const {
    Block block;
    for (int64_t j = 0; j < kBlockSteps; ++j) block.w[j] = _mm512_loadu_si512(words + j * kTileBytes);
    return block;
  }
  DSV4_MEMBER Block expand(const uint8_t* words, StoredScales, int64_t count) const {
    Block block;
    for (int64_t j = 0; j < kBlockSteps; ++j) {
      block.w[j] = _mm512_maskz_loadu_epi8(avx512::mask64(count - j * kTileBytes), words + j * kTileBytes);
    }
    return block;
  }
  static void arrange(const bf16* x, bf16* to) { __builtin_memcpy(to, x, kBlock * sizeof(bf16)); }
  static int64_t place(int64_t j, int64_t i) { return 16 * j + i; }
};

}  // namespace
}  // namespace dsv4::DSV4_AMX_NAMESPACE
