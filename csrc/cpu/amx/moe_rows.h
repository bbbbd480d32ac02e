// Rows of an expert's activations around its products in tiles: gathered from tokens, activated from sums, and outputs
// brought back to rows. Lanes are rows: a register holds an input or an output of 16 of them, so that neither the
// activation nor the quantiser needs a shuffle, and two outputs of 16 rows are a pair as a tile wants it.
#pragma once

#include "cpu/amx/moe_product.h"

namespace dsv4::DSV4_AMX_NAMESPACE {
namespace {

// A row of activations as its weights read it: quantised, but for plain ones; whole blocks, zero beyond the last.
template <class X>
void prepare_row(WeightFormat format, const X* x, int64_t n, bf16* to) {
  if (format == WeightFormat::kFp8) return avx512::quantise_row<avx512::Fp8Rows>(x, n, to);
  if (format == WeightFormat::kFp4) return avx512::quantise_row<avx512::Fp4Rows>(x, n, to);
  if constexpr (sizeof(X) == sizeof(bf16)) {
    __builtin_memcpy(to, x, static_cast<size_t>(n) * sizeof(bf16));
    __builtin_memset(to + n, 0, static_cast<size_t>(moe_row_bytes(n)) - static_cast<size_t>(n) * sizeof(bf16));
  }
}

// Up to 16 such rows as a unit.
inline void gather_unit(const bf16* const* rows, int64_t count, int64_t in, bf16* to) {
  if (count == 1) {
    __builtin_memcpy(to, rows[0], static_cast<size_t>(moe_row_bytes(in)));
    return;
  }
  for (int64_t s = 0; s < blocks_of(in) * kBlockSteps; ++s, to += count * kStep) {
    __m512i words[kTileRows];
    for (int64_t i = 0; i < kTileRows; ++i) {
      words[i] = i < count ? _mm512_loadu_si512(rows[i] + s * kStep) : _mm512_setzero_si512();
    }
    avx512::transpose(words);
    for (int64_t k = 0; k < kTileRows; ++k) {
      _mm512_mask_storeu_epi32(to + 2 * k * count, avx512::low16(count), words[k]);
    }
  }
}

// order[i]: which of 128 inputs comes i-th for weights of that format.
inline void input_order(WeightFormat format, uint8_t* order) {
  alignas(64) bf16 numbers[kBlock], arranged[kBlock];
  for (int64_t i = 0; i < kBlock; ++i) numbers[i].bits = static_cast<uint16_t>(i);
  if (format == WeightFormat::kFp8) {
    avx512::Fp8Rows::arrange(numbers, arranged);
  } else if (format == WeightFormat::kFp4) {
    avx512::Fp4Rows::arrange(numbers, arranged);
  } else {
    __builtin_memcpy(arranged, numbers, sizeof(numbers));
  }
  for (int64_t i = 0; i < kBlock; ++i) order[i] = static_cast<uint8_t>(arranged[i].bits);
}

template <class X>
DSV4_INLINE __m512 rounded_lanes(__m512 x) {
  if constexpr (sizeof(X) == sizeof(float)) return x;
  const __m256i words = reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(x));
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(words), 16));
}

// The FP8 quantiser of avx512::quantise_block on 128 inputs of 16 rows, in place.
DSV4_INLINE void quantise_lanes(__m512 (&values)[kBlock]) {
  const __m512i magnitude = _mm512_set1_epi32(0x7FFFFFFF), zero = _mm512_setzero_si512();
  __m512i most[4] = {zero, zero, zero, zero};
  for (int64_t i = 0; i < kBlock; ++i) {
    most[i % 4] = _mm512_max_epu32(most[i % 4], _mm512_and_si512(magnitude, _mm512_castps_si512(values[i])));
  }
  const __m512i amax = _mm512_max_epu32(_mm512_max_epu32(most[0], most[1]), _mm512_max_epu32(most[2], most[3]));
  const __mmask16 bad = _mm512_cmpge_epu32_mask(amax, _mm512_set1_epi32(0x7F800000));
  const __m512 largest = _mm512_castsi512_ps(_mm512_mask_mov_epi32(amax, bad, zero));
  const __m512i ratio =
      _mm512_castps_si512(_mm512_mul_ps(_mm512_max_ps(largest, _mm512_set1_ps(1e-4f)), _mm512_set1_ps(1.0f / 448.0f)));
  const __m512i whole = _mm512_srli_epi32(ratio, 23);
  const __mmask16 more = _mm512_test_epi32_mask(ratio, _mm512_set1_epi32(0x7FFFFF));
  const __m512i exponent = _mm512_mask_add_epi32(whole, more, whole, _mm512_set1_epi32(1));
  // A row with an infinity or a NaN becomes NaN.
  const __m512 scale =
      _mm512_castsi512_ps(_mm512_mask_mov_epi32(_mm512_slli_epi32(exponent, 23), bad, _mm512_set1_epi32(0x7FC00000)));
  const __m512 inverse = _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_sub_epi32(_mm512_set1_epi32(254), exponent), 23));
  const __m512 limit = _mm512_set1_ps(448.0f), below = _mm512_set1_ps(-448.0f);
  for (int64_t i = 0; i < kBlock; ++i) {
    const __m512 value = _mm512_max_ps(below, _mm512_min_ps(limit, _mm512_mul_ps(values[i], inverse)));
    const __m512i bits = _mm512_castps_si512(value);
    const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 20), _mm512_set1_epi32(1));
    const __m512i up = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7FFFF)));
    const __m512i normal = _mm512_and_si512(up, _mm512_set1_epi32(static_cast<int>(0xFFF00000u)));
    const __mmask16 small = _mm512_cmplt_epu32_mask(_mm512_and_si512(bits, magnitude),
                                                    _mm512_set1_epi32((127 - 6) << 23));  // steps of 2^-9 below 2^-6
    const __m512 code = _mm512_mask_roundscale_ps(_mm512_castsi512_ps(normal), small, value, 9 << 4);
    values[i] = _mm512_mul_ps(code, scale);
  }
}

// The inner activations of a unit from the sums of w1 and w3, `outputs` of them, up to 128: silu(gate) * up * weight,
// in the form that w2 reads. What lies `ahead` bytes behind them is asked for.
template <class X>
void activate_unit(const float* gate, const float* up, const float* weights, int64_t count, int64_t outputs,
                   float limit, WeightFormat format, const uint8_t* order, bf16* to, int64_t ahead) {
  alignas(64) __m512 values[kBlock];
  const __mmask16 rows = avx512::low16(count);
  const __m512 most = _mm512_set1_ps(limit > 0 ? limit : __builtin_inff());
  const __m512 least = _mm512_sub_ps(_mm512_setzero_ps(), most), factor = _mm512_maskz_loadu_ps(rows, weights);
  for (int64_t i = 0; i < outputs; ++i) {
    // The second operand comes through where one is NaN.
    const __m512 g = _mm512_min_ps(most, rounded_lanes<X>(_mm512_maskz_loadu_ps(rows, gate + i * kSide)));
    const __m512 u =
        _mm512_max_ps(least, _mm512_min_ps(most, rounded_lanes<X>(_mm512_maskz_loadu_ps(rows, up + i * kSide))));
    const __m512 divisor = _mm512_add_ps(_mm512_set1_ps(1.f), avx512::exp(_mm512_sub_ps(_mm512_setzero_ps(), g)));
    values[i] = rounded_lanes<X>(_mm512_mul_ps(_mm512_mul_ps(_mm512_div_ps(g, divisor), u), factor));
  }
  for (int64_t i = outputs; i < kBlock; ++i) values[i] = _mm512_setzero_ps();
  if (format != WeightFormat::kPlain) quantise_lanes(values);
  const __m512i upper = _mm512_set1_epi32(static_cast<int>(0xFFFF0000u));
  for (int64_t k = 0; k < kBlock / 2; ++k, to += 2 * count) {
    const __m512i a = _mm512_castps_si512(values[order[2 * k]]), b = _mm512_castps_si512(values[order[2 * k + 1]]);
    _mm_prefetch(reinterpret_cast<const char*>(to) + ahead, _MM_HINT_T0);
    _mm512_mask_storeu_epi32(to, rows, _mm512_or_si512(_mm512_srli_epi32(a, 16), _mm512_and_si512(b, upper)));
  }
}

// Where those of a unit lie in a strip's sums.
inline float* sums_of_unit(float* sums, int64_t unit) { return sums + unit / 2 * kSumsOfSide + unit % 2 * kTileRows; }

// Outputs of a unit from its sums: row i to out + i * stride. The places of the next unit, far apart, are asked for.
template <class X>
void put_unit(const float* sums, int64_t count, int64_t outputs, X* out, int64_t stride) {
  for (int64_t r = 0; r < outputs; r += kSide) {
    __m512i halves[2][kTileRows];
    for (int64_t half = 0; half < 2; ++half) {
      for (int64_t n = 0; n < kTileRows; ++n) {
        const int64_t from = r + half * kTileRows + n;
        const __mmask16 mine = from < outputs ? avx512::low16(count) : __mmask16{0};
        halves[half][n] = _mm512_maskz_loadu_epi32(mine, sums + from * kSide);
      }
      avx512::transpose(halves[half]);
    }
    for (int64_t i = 0; i < count; ++i) {
      X* place = out + i * stride + r;
      _mm_prefetch(reinterpret_cast<const char*>(place + kTileRows * stride), _MM_HINT_T0);
      const avx512::Pair values = {_mm512_castsi512_ps(halves[0][i]), _mm512_castsi512_ps(halves[1][i])};
      avx512::store(place, avx512::arrange(values, place), outputs - r < kSide ? outputs - r : kSide);
    }
  }
}

}  // namespace
}  // namespace dsv4::DSV4_AMX_NAMESPACE
