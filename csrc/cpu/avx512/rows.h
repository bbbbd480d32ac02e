// Arithmetic on rows of float32 in steps of 32: what cpu/page_writer.h and cpu/compressor.h are made of. Float64
// inside, eight to a register; a float64 result reaches a narrower type by way of float32, as torch converts it.
#pragma once

#include "common/pages.h"
#include "common/turns.h"
#include "cpu/avx512/lanes.h"
#include "cpu/compress.h"

namespace dsv4::avx512 {
namespace {

DSV4_INLINE __m512d low(__m512 x) { return _mm512_cvtps_pd(_mm512_castps512_ps256(x)); }
DSV4_INLINE __m512d high(__m512 x) { return _mm512_cvtps_pd(_mm512_extractf32x8_ps(x, 1)); }
DSV4_INLINE __m512 join(__m512d first, __m512d second) {
  return _mm512_insertf32x8(_mm512_castps256_ps512(_mm512_cvtpd_ps(first)), _mm512_cvtpd_ps(second), 1);
}

DSV4_INLINE __m512 load16(const float* p) { return _mm512_loadu_ps(p); }
DSV4_INLINE __m512 load16(const bf16* p) {
  const __m256i words = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(words), 16));
}
DSV4_INLINE void store16(float* p, __m512 x) { _mm512_storeu_ps(p, x); }
// bf16_from_float of 16 values, one a 32-bit lane. The conversion instruction would take denormals for zero.
DSV4_INLINE __m512i bf16_words(__m512 x) {
  const __m512i bits = _mm512_castps_si512(x);
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  const __m512i words = _mm512_srli_epi32(_mm512_add_epi32(_mm512_add_epi32(bits, _mm512_set1_epi32(0x7FFF)), odd), 16);
  return _mm512_mask_mov_epi32(words, _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q), _mm512_set1_epi32(0x7FFF));
}
DSV4_INLINE void store16(bf16* p, __m512 x) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtepi32_epi16(bf16_words(x)));
}
DSV4_INLINE __m512 rounded16(__m512 x, const float*) { return x; }
DSV4_INLINE __m512 rounded16(__m512 x, const bf16*) {
  return _mm512_castsi512_ps(_mm512_slli_epi32(bf16_words(x), 16));
}

// Rotates 16 pairs, their even and odd elements apart, by 16 (cos, sin), or back. Products of a float32 are exact in
// float64.
DSV4_INLINE Pair rotated(Pair x, const float* rope, bool inverse = false) {
  Pair turn = arrange(load(rope), static_cast<const bf16*>(nullptr));
  if (inverse) turn.b = _mm512_xor_ps(turn.b, _mm512_set1_ps(-0.f));
  const __m512d even0 = low(x.a), even1 = high(x.a), odd0 = low(x.b), odd1 = high(x.b);
  const __m512d cos0 = low(turn.a), cos1 = high(turn.a), sin0 = low(turn.b), sin1 = high(turn.b);
  return {join(_mm512_fmsub_pd(even0, cos0, _mm512_mul_pd(odd0, sin0)),
               _mm512_fmsub_pd(even1, cos1, _mm512_mul_pd(odd1, sin1))),
          join(_mm512_fmadd_pd(even0, sin0, _mm512_mul_pd(odd0, cos0)),
               _mm512_fmadd_pd(even1, sin1, _mm512_mul_pd(odd1, cos1)))};
}

// 32 dims in float64.
struct Wide {
  __m512d of[4];
};
DSV4_INLINE Wide widened(Pair x) { return {{low(x.a), high(x.a), low(x.b), high(x.b)}}; }

// 16 pairs, their even and odd elements apart, rotated back.
DSV4_INLINE Wide turned_back(Wide x, const float* rope) {
  const Wide turn = widened(arrange(load(rope), static_cast<const bf16*>(nullptr)));
  Wide y;
  for (int i = 0; i < 2; ++i) {
    y.of[i] = _mm512_fmadd_pd(x.of[i], turn.of[i], _mm512_mul_pd(x.of[i + 2], turn.of[i + 2]));
    y.of[i + 2] = _mm512_fmsub_pd(x.of[i + 2], turn.of[i], _mm512_mul_pd(x.of[i], turn.of[i + 2]));
  }
  return y;
}
// The same of a row's dims from d on, where pairs begin at `still`, in their natural order.
template <class X>
DSV4_INLINE Wide turned_back(const X* row, int64_t d, int64_t still, const float* rope) {
  const Pair x = {load16(row + d), load16(row + d + 16)};
  if (d < still) return widened(x);
  const Wide y = turned_back(widened(arrange(x, static_cast<const bf16*>(nullptr))), rope + d - still);
  const __m512i first = _mm512_setr_epi64(0, 8, 1, 9, 2, 10, 3, 11),
                second = _mm512_setr_epi64(4, 12, 5, 13, 6, 14, 7, 15);
  return {{_mm512_permutex2var_pd(y.of[0], first, y.of[2]), _mm512_permutex2var_pd(y.of[0], second, y.of[2]),
           _mm512_permutex2var_pd(y.of[1], first, y.of[3]), _mm512_permutex2var_pd(y.of[1], second, y.of[3])}};
}

struct TurnLanes {
  __m512d cos, sin;
};

// turn_of of 8 angles that can be reduced, in float64.
DSV4_INLINE TurnLanes turn_lanes(__m512d angle) {
  const auto turn = quarter_turn(angle);
  const __m512i quarters = _mm512_cvtpd_epi64(turn.quarters);
  const __mmask8 swap = _mm512_test_epi64_mask(quarters, _mm512_set1_epi64(1));
  const __m512i one = _mm512_set1_epi64(1), two = _mm512_set1_epi64(2);
  const __m512i cos_sign = _mm512_slli_epi64(_mm512_and_si512(_mm512_add_epi64(quarters, one), two), 62);
  const __m512i sin_sign = _mm512_slli_epi64(_mm512_and_si512(quarters, two), 62);
  return {_mm512_xor_pd(_mm512_mask_mov_pd(turn.cos, swap, turn.sin), _mm512_castsi512_pd(cos_sign)),
          _mm512_xor_pd(_mm512_mask_mov_pd(turn.sin, swap, turn.cos), _mm512_castsi512_pd(sin_sign))};
}

// e^x for x <= 0, to a few units of the last place: x = n ln 2 + r and the series of e^r to the twelfth power (its
// remainder is below 2e-16). NaN stays NaN.
DSV4_INLINE __m512d exp(__m512d x) {
  constexpr double kFactors[] = {
      1.0 / 479001600, 1.0 / 39916800, 1.0 / 3628800, 1.0 / 362880, 1.0 / 40320, 1.0 / 5040, 1.0 / 720,
      1.0 / 120,       1.0 / 24,       1.0 / 6,       1.0 / 2,      1.0,         1.0};
  x = _mm512_max_pd(_mm512_set1_pd(-746), x);
  const __m512d n = _mm512_roundscale_pd(_mm512_mul_pd(x, _mm512_set1_pd(1.4426950408889634)), 0);
  __m512d r = _mm512_fnmadd_pd(n, _mm512_set1_pd(0x1.62e42fee00000p-1), x);
  r = _mm512_fnmadd_pd(n, _mm512_set1_pd(0x1.a39ef35793c76p-33), r);
  __m512d sum = _mm512_set1_pd(kFactors[0]);
  for (int i = 1; i < 13; ++i) sum = _mm512_fmadd_pd(sum, r, _mm512_set1_pd(kFactors[i]));
  return _mm512_scalef_pd(sum, n);
}

// e4m3 of 16 finite values, one a 32-bit lane; see e4m3_code.
DSV4_INLINE __m512i e4m3_codes(__m512 value) {
  const __m512i bits = _mm512_castps_si512(value);
  const __m512i clamped =
      _mm512_min_epu32(_mm512_and_si512(bits, _mm512_set1_epi32(0x7FFFFFFF)), _mm512_set1_epi32(0x43E00000));
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(clamped, 20), _mm512_set1_epi32(1));
  const __m512i half = _mm512_add_epi32(_mm512_add_epi32(clamped, _mm512_set1_epi32(0x7FFFF)), odd);
  const __m512i normal = _mm512_sub_epi32(_mm512_srli_epi32(half, 20), _mm512_set1_epi32(960));
  const __m512 units = _mm512_add_ps(_mm512_castsi512_ps(clamped), _mm512_set1_ps(16384.f));
  const __m512i denormal = _mm512_sub_epi32(_mm512_castps_si512(units), _mm512_set1_epi32(0x46800000));
  const __mmask16 small = _mm512_cmplt_epu32_mask(clamped, _mm512_set1_epi32(0x3C800000));
  const __m512i sign = _mm512_and_si512(_mm512_srli_epi32(bits, 24), _mm512_set1_epi32(0x80));
  return _mm512_or_si512(_mm512_mask_mov_epi32(normal, small, denormal), sign);
}

// e2m1 of 16 finite values, one a 32-bit lane; see e2m1_code.
DSV4_INLINE __m512i e2m1_codes(__m512 value) {
  const __m512 x = _mm512_abs_ps(value);
  const __m512i one = _mm512_set1_epi32(1);
  __m512i code = _mm512_and_si512(_mm512_srli_epi32(_mm512_castps_si512(value), 28), _mm512_set1_epi32(8));
  code = _mm512_mask_add_epi32(code, _mm512_cmp_ps_mask(x, _mm512_set1_ps(0.25f), _CMP_GT_OQ), code, one);
  code = _mm512_mask_add_epi32(code, _mm512_cmp_ps_mask(x, _mm512_set1_ps(0.75f), _CMP_GE_OQ), code, one);
  code = _mm512_mask_add_epi32(code, _mm512_cmp_ps_mask(x, _mm512_set1_ps(1.25f), _CMP_GT_OQ), code, one);
  code = _mm512_mask_add_epi32(code, _mm512_cmp_ps_mask(x, _mm512_set1_ps(1.75f), _CMP_GE_OQ), code, one);
  code = _mm512_mask_add_epi32(code, _mm512_cmp_ps_mask(x, _mm512_set1_ps(2.5f), _CMP_GT_OQ), code, one);
  code = _mm512_mask_add_epi32(code, _mm512_cmp_ps_mask(x, _mm512_set1_ps(3.5f), _CMP_GE_OQ), code, one);
  return _mm512_mask_add_epi32(code, _mm512_cmp_ps_mask(x, _mm512_set1_ps(5.f), _CMP_GT_OQ), code, one);
}

// The values of 16 e4m3 codes: float16 has a wider exponent, so their bits read as float16 are 2^-8 of them.
DSV4_INLINE __m512 e4m3_values(__m128i codes) {
  const __m256i words = _mm256_cvtepu8_epi16(codes);
  const __m256i magnitude = _mm256_and_si256(words, _mm256_set1_epi16(0x7F));
  const __m256i sign = _mm256_slli_epi16(_mm256_xor_si256(words, magnitude), 8);
  const __m256i halves = _mm256_or_si256(sign, _mm256_slli_epi16(magnitude, 7));
  const __m512i bits = _mm512_castps_si512(_mm512_mul_ps(_mm512_cvtph_ps(halves), _mm512_set1_ps(256.f)));
  const __mmask16 nan = _mm256_cmpeq_epi16_mask(magnitude, _mm256_set1_epi16(0x7F));
  return _mm512_castsi512_ps(_mm512_mask_or_epi32(bits, nan, bits, _mm512_set1_epi32(0x7FC00000)));
}

// The values of 16 e2m1 codes, in the low four bits of each lane.
DSV4_INLINE __m512 e2m1_values(__m512i codes) {
  const __m512 values =
      _mm512_setr_ps(0.f, 0.5f, 1.f, 1.5f, 2.f, 3.f, 4.f, 6.f, -0.f, -0.5f, -1.f, -1.5f, -2.f, -3.f, -4.f, -6.f);
  return _mm512_permutexvar_ps(codes, values);
}

// Counts are multiples of 32.
struct Lanes {
  DSV4_INLINE double square_root(double x) { return _mm_cvtsd_f64(_mm_sqrt_sd(_mm_setzero_pd(), _mm_set_sd(x))); }

  template <class T>
  DSV4_INLINE void load(const T* from, int64_t count, float* row) {
    for (int64_t d = 0; d < count; d += 16) store16(row + d, load16(from + d));
  }

  template <class T>
  DSV4_INLINE void store(const float* row, int64_t count, T* to) {
    for (int64_t d = 0; d < count; d += 16) store16(to + d, load16(row + d));
  }

  template <class X>
  DSV4_INLINE double sum_of_squares(const X* row, int64_t count) {
    __m512d sums[4] = {_mm512_setzero_pd(), _mm512_setzero_pd(), _mm512_setzero_pd(), _mm512_setzero_pd()};
    for (int64_t d = 0; d < count; d += kStep) {
      const __m512 a = load16(row + d), b = load16(row + d + 16);
      sums[0] = _mm512_fmadd_pd(low(a), low(a), sums[0]);
      sums[1] = _mm512_fmadd_pd(high(a), high(a), sums[1]);
      sums[2] = _mm512_fmadd_pd(low(b), low(b), sums[2]);
      sums[3] = _mm512_fmadd_pd(high(b), high(b), sums[3]);
    }
    return _mm512_reduce_add_pd(_mm512_add_pd(_mm512_add_pd(sums[0], sums[2]), _mm512_add_pd(sums[1], sums[3])));
  }

  // The row times `root` times the weight, if any, rounded to N.
  template <class N, class X, class W, class R>
  DSV4_INLINE void scale(const X* row, int64_t count, double root, const W* weight, R* result) {
    const __m512d factor = _mm512_set1_pd(root);
    for (int64_t d = 0; d < count; d += 16) {
      const __m512 x = load16(row + d), w = weight == nullptr ? _mm512_set1_ps(1.f) : load16(weight + d);
      put<N>(_mm512_mul_pd(_mm512_mul_pd(low(x), factor), low(w)),
             _mm512_mul_pd(_mm512_mul_pd(high(x), factor), high(w)), result + d);
    }
  }

  // (cos, sin) of position times each frequency.
  DSV4_INLINE void turns(float position, const float* frequency, int64_t pairs, float* result) {
    for (int64_t i = 0; i < pairs; i += 16) {
      const __m512 angle = _mm512_mul_ps(_mm512_set1_ps(position), load16(frequency + i));
      if (_mm512_cmp_ps_mask(_mm512_abs_ps(angle), _mm512_set1_ps(kMostReducedAngle), _CMP_NLE_UQ) != 0) {
        for (int64_t k = i; k < i + 16; ++k) turn_of(position * frequency[k], result + 2 * k);
        continue;
      }
      const TurnLanes first = turn_lanes(low(angle)), second = turn_lanes(high(angle));
      const Pair apart = {join(first.cos, second.cos), join(first.sin, second.sin)};
      avx512::store(result + 2 * i, natural(apart, static_cast<const bf16*>(nullptr)));
    }
  }

  // Each pair turned by its (cos, sin), or back, rounded to N.
  template <class N, class R>
  DSV4_INLINE void rotate(R* row, const float* rope, int64_t pairs, bool inverse = false) {
    const N* type = nullptr;
    const bf16* apart = nullptr;
    for (int64_t d = 0; d < 2 * pairs; d += kStep) {
      const Pair x = arrange(Pair{load16(row + d), load16(row + d + 16)}, apart);
      const Pair y = natural(rotated(x, rope + d, inverse), apart);
      store16(row + d, rounded16(y.a, type));
      store16(row + d + 16, rounded16(y.b, type));
    }
  }

  // The sum of grad, its pairs turned back, times x and the weight, if any.
  template <class G, class X, class W>
  DSV4_INLINE double norm_product(const G* grad, const X* x, const W* weight, int64_t count, const float* rope,
                                  int64_t pairs) {
    __m512d sums[4] = {_mm512_setzero_pd(), _mm512_setzero_pd(), _mm512_setzero_pd(), _mm512_setzero_pd()};
    for (int64_t d = 0; d < count; d += kStep) {
      const Wide g = turned_back(grad, d, count - 2 * pairs, rope), v = wide(x + d), w = weights(weight, d);
      for (int i = 0; i < 4; ++i) sums[i] = _mm512_fmadd_pd(_mm512_mul_pd(g.of[i], w.of[i]), v.of[i], sums[i]);
    }
    return _mm512_reduce_add_pd(_mm512_add_pd(_mm512_add_pd(sums[0], sums[2]), _mm512_add_pd(sums[1], sums[3])));
  }

  // result = grad, its pairs turned back, times the weight, if any, times root, less x times along; the first without
  // the weight, times x, is added to `sums`, if any.
  template <class G, class X, class W, class R>
  DSV4_INLINE void norm_gradient(const G* grad, const X* x, const W* weight, int64_t count, const float* rope,
                                 int64_t pairs, double root, double along, double* sums, R* result) {
    const __m512d by = _mm512_set1_pd(root), less = _mm512_set1_pd(along);
    for (int64_t d = 0; d < count; d += kStep) {
      Wide g = turned_back(grad, d, count - 2 * pairs, rope), y;
      const Wide v = wide(x + d), w = weights(weight, d);
      for (int i = 0; i < 4; ++i) {
        g.of[i] = _mm512_mul_pd(g.of[i], by);
        y.of[i] = _mm512_fnmadd_pd(v.of[i], less, _mm512_mul_pd(g.of[i], w.of[i]));
        if (sums == nullptr) continue;
        double* sum = sums + d + 8 * i;
        _mm512_storeu_pd(sum, _mm512_fmadd_pd(g.of[i], v.of[i], _mm512_loadu_pd(sum)));
      }
      put<float>(y.of[0], y.of[1], result + d);
      put<float>(y.of[2], y.of[3], result + d + 16);
    }
  }

  // The row times the Hadamard matrix times `factor`, rounded to N; work has room for it in float64. Up to 128 values
  // are transformed in registers, longer rows' pieces joined in memory.
  template <class N, class X, class R>
  DSV4_INLINE void hadamard(const X* row, int64_t count, double factor, double* work, R* result) {
    switch (count) {
      case 32:
        return hadamard_piece<2, N>(row, factor, result);
      case 64:
        return hadamard_piece<4, N>(row, factor, result);
      case 128:
        return hadamard_piece<8, N>(row, factor, result);
    }
    for (int64_t d = 0; d < count; d += 128) hadamard_piece<8, N>(row + d, 1, work + d);
    for (int64_t half = 128; half < count; half *= 2) {
      for (int64_t start = 0; start < count; start += 2 * half) {
        for (int64_t d = start; d < start + half; d += 8) {
          const __m512d a = _mm512_loadu_pd(work + d), b = _mm512_loadu_pd(work + d + half);
          _mm512_storeu_pd(work + d, _mm512_add_pd(a, b));
          _mm512_storeu_pd(work + d + half, _mm512_sub_pd(a, b));
        }
      }
    }
    const __m512d by = _mm512_set1_pd(factor);
    for (int64_t d = 0; d < count; d += 16) {
      put<N>(_mm512_mul_pd(_mm512_loadu_pd(work + d), by), _mm512_mul_pd(_mm512_loadu_pd(work + d + 8), by),
             result + d);
    }
  }

  // Both return the block's scale.
  template <class X>
  DSV4_INLINE uint8_t quantize_fp8(const X* row, int64_t count, uint8_t* codes) {
    const uint8_t scale = fp8_scale(largest(row, count));
    const __m512 inverse = _mm512_set1_ps(inverse_scale(scale));
    for (int64_t d = 0; d < count; d += 16) {
      const __m512i code = scale == 255 ? _mm512_set1_epi32(0x7F) : e4m3_codes(_mm512_mul_ps(load16(row + d), inverse));
      _mm_storeu_si128(reinterpret_cast<__m128i*>(codes + d), _mm512_cvtepi32_epi8(code));
    }
    return scale;
  }
  template <class X>
  DSV4_INLINE uint8_t quantize_fp4(const X* row, int64_t count, uint8_t* codes) {
    const uint8_t scale = fp4_scale(largest(row, count));
    const __m512 inverse = _mm512_set1_ps(inverse_scale(scale));
    for (int64_t d = 0; d < count; d += kStep) {
      const Pair x = arrange(Pair{load16(row + d), load16(row + d + 16)}, static_cast<const bf16*>(nullptr));
      const __m512i even = e2m1_codes(_mm512_mul_ps(x.a, inverse)), odd = e2m1_codes(_mm512_mul_ps(x.b, inverse));
      const __m512i pairs = _mm512_or_si512(even, _mm512_slli_epi32(odd, 4));
      _mm_storeu_si128(reinterpret_cast<__m128i*>(codes + d / 2),
                       scale == 255 ? _mm_setzero_si128() : _mm512_cvtepi32_epi8(pairs));
    }
    return scale;
  }

  // A block as it is after quantize_fp4, rounded to X. The scale of a block that is not finite is NaN, and so is all.
  template <class X>
  DSV4_INLINE void fp4_round_trip(const float* row, int64_t count, X* result) {
    const uint8_t scale = fp4_scale(largest(row, count));
    const __m512 inverse = _mm512_set1_ps(inverse_scale(scale)), factor = _mm512_set1_ps(e8m0_value(scale));
    for (int64_t d = 0; d < count; d += 16) {
      const __m512i codes = e2m1_codes(_mm512_mul_ps(load16(row + d), inverse));
      store16(result + d, _mm512_mul_ps(e2m1_values(codes), factor));
    }
  }

  template <class X>
  DSV4_INLINE void dequantize_fp8(const uint8_t* codes, int64_t count, float scale, X* result) {
    const __m512 factor = _mm512_set1_ps(scale);
    for (int64_t d = 0; d < count; d += 16) {
      const __m128i code = _mm_loadu_si128(reinterpret_cast<const __m128i*>(codes + d));
      store16(result + d, _mm512_mul_ps(e4m3_values(code), factor));
    }
  }
  template <class X>
  DSV4_INLINE void dequantize_fp4(const uint8_t* codes, int64_t count, float scale, X* result) {
    const __m512 factor = _mm512_set1_ps(scale);
    for (int64_t d = 0; d < count; d += kStep) {
      const __m512i code = _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(codes + d / 2)));
      const Pair apart = {e2m1_values(code), e2m1_values(_mm512_srli_epi32(code, 4))};
      const Pair values = natural(scaled(apart, factor), static_cast<const bf16*>(nullptr));
      store16(result + d, values.a);
      store16(result + d + 16, values.b);
    }
  }

  // row[d] = sum of kv[d] over the rows, weighted by the softmax of their gates, rounded to N. 32 channels at a
  // time, so that maxima and sums stay in registers; the rows' second reading comes from the cache.
  template <class N>
  DSV4_INLINE void pool(const PooledRow* rows, int64_t count, int64_t dims, float* row) {
    for (int64_t d = 0; d < dims; d += kStep) {
      const PoolSums sums(rows, count, d, nullptr);
      const N* type = nullptr;
      store16(row + d, rounded16(join(sums.mean.of[0], sums.mean.of[1]), type));
      store16(row + d + 16, rounded16(join(sums.mean.of[2], sums.mean.of[3]), type));
    }
  }

  // The gradients of that row's positions from its own; all are in the order of `rows`. work: of kPoolChannels numbers
  // a position.
  DSV4_INLINE void pool_gradient(const PooledRow* rows, const PooledGradient* to, int64_t count, int64_t dims,
                                 const double* grad, double* work) {
    static_assert(kStep == kPoolChannels, "what a position keeps");
    for (int64_t d = 0; d < dims; d += kStep) {
      const PoolSums sums(rows, count, d, work);
      __m512d share[4];
      for (int k = 0; k < 4; ++k) share[k] = _mm512_div_pd(_mm512_loadu_pd(grad + d + 8 * k), sums.weights.of[k]);
      for (int64_t i = 0; i < count; ++i) {
        const Wide v = wide(rows[i].kv + d);
        __m512d value[4], gate[4];
        for (int k = 0; k < 4; ++k) {
          value[k] = _mm512_mul_pd(_mm512_loadu_pd(work + i * kStep + 8 * k), share[k]);
          gate[k] = _mm512_mul_pd(value[k], _mm512_sub_pd(v.of[k], sums.mean.of[k]));
        }
        for (int half = 0; half < 2; ++half) {
          store16(to[i].kv + d + 16 * half, join(value[2 * half], value[2 * half + 1]));
          store16(to[i].gate + d + 16 * half, join(gate[2 * half], gate[2 * half + 1]));
        }
      }
    }
  }

  DSV4_INLINE void add(const float* a, const float* b, int64_t count, float* sum) {
    for (int64_t d = 0; d < count; d += 16) store16(sum + d, _mm512_add_ps(load16(a + d), load16(b + d)));
  }

 private:
  template <class X>
  DSV4_INLINE Wide wide(const X* row) {
    return widened({load16(row), load16(row + 16)});
  }
  template <class W>
  DSV4_INLINE Wide weights(const W* weight, int64_t d) {
    if (weight != nullptr) return wide(weight + d);
    const __m512d one = _mm512_set1_pd(1);
    return {{one, one, one, one}};
  }

  template <class N, class X>
  DSV4_INLINE void put(__m512d first, __m512d second, X* to) {
    store16(to, rounded16(join(first, second), static_cast<const N*>(nullptr)));
  }
  template <class N>
  DSV4_INLINE void put(__m512d first, __m512d second, double* to) {
    _mm512_storeu_pd(to, first);
    _mm512_storeu_pd(to + 8, second);
  }

  // 16 kPairs values, eight a register.
  template <int kPairs, class N, class X, class R>
  DSV4_INLINE void hadamard_piece(const X* row, double factor, R* result) {
    const __m512d sign1 = _mm512_castsi512_pd(_mm512_set_epi64(INT64_MIN, 0, INT64_MIN, 0, INT64_MIN, 0, INT64_MIN, 0));
    const __m512d sign2 = _mm512_castsi512_pd(_mm512_set_epi64(INT64_MIN, INT64_MIN, 0, 0, INT64_MIN, INT64_MIN, 0, 0));
    const __m512d sign4 = _mm512_castsi512_pd(_mm512_set_epi64(INT64_MIN, INT64_MIN, INT64_MIN, INT64_MIN, 0, 0, 0, 0));
    __m512d y[2 * kPairs];
    for (int i = 0; i < kPairs; ++i) {
      const __m512 x = load16(row + 16 * i);
      y[2 * i] = low(x);
      y[2 * i + 1] = high(x);
    }
    for (int i = 0; i < 2 * kPairs; ++i) {  // neighbours 1, 2 and 4 apart: the other one, plus or minus this
      y[i] = _mm512_add_pd(_mm512_permute_pd(y[i], 0x55), _mm512_xor_pd(y[i], sign1));
      y[i] = _mm512_add_pd(_mm512_permutex_pd(y[i], 0x4E), _mm512_xor_pd(y[i], sign2));
      y[i] = _mm512_add_pd(_mm512_shuffle_f64x2(y[i], y[i], 0x4E), _mm512_xor_pd(y[i], sign4));
    }
    for (int half = 1; half < 2 * kPairs; half *= 2) {
      for (int i = 0; i < 2 * kPairs; ++i) {
        if (i & half) continue;
        const __m512d a = y[i], b = y[i + half];
        y[i] = _mm512_add_pd(a, b);
        y[i + half] = _mm512_sub_pd(a, b);
      }
    }
    const __m512d by = _mm512_set1_pd(factor);
    for (int i = 0; i < kPairs; ++i) {
      put<N>(_mm512_mul_pd(y[2 * i], by), _mm512_mul_pd(y[2 * i + 1], by), result + 16 * i);
    }
  }

  DSV4_INLINE Pair gate(const PooledRow& row, int64_t d) {
    const Pair own = {load16(row.gate + d), load16(row.gate + d + 16)};
    if (row.ape == nullptr) return own;
    return {_mm512_add_ps(own.a, load16(row.ape + d)), _mm512_add_ps(own.b, load16(row.ape + d + 16))};
  }
  DSV4_INLINE Wide gates(const PooledRow& row, int64_t d) { return widened(gate(row, d)); }

  // Of 32 channels: the sum of the weights, of which the largest is 1, and the weighted mean of kv. The weights
  // themselves go to `kept`, if anywhere.
  struct PoolSums {
    Wide weights, mean;

    __attribute__((always_inline)) PoolSums(const PooledRow* rows, int64_t count, int64_t d, double* kept) {
      Pair largest = gate(rows[0], d);
      for (int64_t i = 1; i < count; ++i) {
        const Pair g = gate(rows[i], d);
        largest = {_mm512_max_ps(largest.a, g.a), _mm512_max_ps(largest.b, g.b)};
      }
      const Wide most = widened(largest);
      for (int k = 0; k < 4; ++k) weights.of[k] = mean.of[k] = _mm512_setzero_pd();
      for (int64_t i = 0; i < count; ++i) {
        const Wide g = gates(rows[i], d), v = wide(rows[i].kv + d);
        for (int k = 0; k < 4; ++k) {
          const __m512d weight = exp(_mm512_sub_pd(g.of[k], most.of[k]));
          weights.of[k] = _mm512_add_pd(weights.of[k], weight);
          if (kept != nullptr) _mm512_storeu_pd(kept + i * kStep + 8 * k, weight);
          mean.of[k] = _mm512_fmadd_pd(weight, v.of[k], mean.of[k]);
        }
      }
      for (int k = 0; k < 4; ++k) mean.of[k] = _mm512_div_pd(mean.of[k], weights.of[k]);
    }
  };

  template <class X>
  DSV4_INLINE uint32_t largest(const X* row, int64_t count) {
    __m512i most = _mm512_setzero_si512();
    for (int64_t d = 0; d < count; d += 16) {
      const __m512i bits = _mm512_castps_si512(load16(row + d));
      most = _mm512_max_epu32(most, _mm512_and_si512(bits, _mm512_set1_epi32(0x7FFFFFFF)));
    }
    return _mm512_reduce_max_epu32(most);
  }
};

}  // namespace
}  // namespace dsv4::avx512
