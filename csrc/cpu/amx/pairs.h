// Elements of two rows side by side, as tiles take right operands.
#pragma once

#include "cpu/amx/tile.h"

namespace dsv4::DSV4_AMX_NAMESPACE {
namespace {

using avx512::Pair;

// 32 elements of two rows as pairs, the first row in the low halves.
struct Pairs {
  __m512i first, second;
};
// Elements 0 to 15, and 16 to 31.
DSV4_INLINE Pairs interleave(__m512i a, __m512i b) {
  alignas(64) static const uint16_t kOrder[32] = {0, 32, 1, 33, 2,  34, 3,  35, 4,  36, 5,  37, 6,  38, 7,  39,
                                                  8, 40, 9, 41, 10, 42, 11, 43, 12, 44, 13, 45, 14, 46, 15, 47};
  const __m512i order = _mm512_load_si512(kOrder);
  return {_mm512_permutex2var_epi16(a, order, b),
          _mm512_permutex2var_epi16(a, _mm512_add_epi16(order, _mm512_set1_epi16(16)), b)};
}
// The first and the last 4 of every 8: half of the work.
DSV4_INLINE Pairs interleave_fours(__m512i a, __m512i b) {
  return {_mm512_unpacklo_epi16(a, b), _mm512_unpackhi_epi16(a, b)};
}
// Sums of such columns, back in their order.
DSV4_INLINE Pair in_order(const float* fours, const float* next_fours) {
  const __m512 x = _mm512_load_ps(fours), y = _mm512_load_ps(next_fours);
  const __m512i first = _mm512_setr_epi32(0, 1, 2, 3, 16, 17, 18, 19, 4, 5, 6, 7, 20, 21, 22, 23);
  return {_mm512_permutex2var_ps(x, first, y),
          _mm512_permutex2var_ps(x, _mm512_add_epi32(first, _mm512_set1_epi32(8)), y)};
}

}  // namespace
}  // namespace dsv4::DSV4_AMX_NAMESPACE
