// Compiled with AVX-512 and AMX flags; called only where the processor has them.
#include <immintrin.h>

#include "common/peaks.h"

namespace dsv4 {
namespace {

constexpr int kChains = 12;  // independent accumulators: covers the latency of two units

// The accumulators end in a volatile, or the compiler would drop the loop.
void keep(const __m512 (&sums)[kChains]) {
  __m512 total = _mm512_setzero_ps();
  for (const __m512& sum : sums) total = _mm512_add_ps(total, sum);
  alignas(64) volatile float sink[16];
  _mm512_store_ps(const_cast<float*>(sink), total);
  (void)sink[0];
}

}  // namespace

double avx512_float32_peak(int64_t rounds) {
  __m512 sums[kChains];
  for (__m512& sum : sums) sum = _mm512_set1_ps(1.0f);
  volatile float source = 0.999f;
  const __m512 factor = _mm512_set1_ps(source);
  for (int64_t round = 0; round < rounds; ++round) {
    for (int i = 0; i < kChains; ++i) sums[i] = _mm512_fmadd_ps(sums[i], factor, factor);
  }
  keep(sums);
  return 2.0 * 16 * kChains * static_cast<double>(rounds);
}

double avx512_bfloat16_peak(int64_t rounds) {
  __m512 sums[kChains];
  for (__m512& sum : sums) sum = _mm512_set1_ps(1.0f);
  volatile int source = 0x3F803F80;
  const __m512bh factor = (__m512bh)_mm512_set1_epi32(source);
  for (int64_t round = 0; round < rounds; ++round) {
    for (int i = 0; i < kChains; ++i) sums[i] = _mm512_dpbf16_ps(sums[i], factor, factor);
  }
  keep(sums);
  return 2.0 * 32 * kChains * static_cast<double>(rounds);
}

double amx_bfloat16_peak(int64_t rounds) {
  struct alignas(64) {
    uint8_t palette = 1, start_row = 0, reserved[14] = {};
    uint16_t columns[16] = {};
    uint8_t rows[16] = {};
  } configuration;
  for (int tile = 0; tile < 8; ++tile) {
    configuration.columns[tile] = 64;
    configuration.rows[tile] = 16;
  }
  // Numbers of all kinds: the clock is lower than with zeros, some 18 % on Emerald Rapids.
  alignas(64) uint16_t numbers[4][16][32];
  uint32_t state = 1;
  for (auto& tile : numbers) {
    for (auto& row : tile) {
      for (uint16_t& number : row) {
        state = state * 1664525u + 1013904223u;
        number = static_cast<uint16_t>((state >> 16 & 0x80FF) | 0x3F00);  // 0.5 to 2, of either sign
      }
    }
  }
  __asm__ volatile("ldtilecfg %0" : : "m"(configuration));  // GCC's intrinsic says that it reads 8 bytes of it
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
  _tile_loadd(4, numbers[0], 64);
  _tile_loadd(5, numbers[1], 64);
  _tile_loadd(6, numbers[2], 64);
  _tile_loadd(7, numbers[3], 64);
  for (int64_t round = 0; round < rounds / 8; ++round) {
    _tile_dpbf16ps(0, 4, 6);
    _tile_dpbf16ps(1, 4, 7);
    _tile_dpbf16ps(2, 5, 6);
    _tile_dpbf16ps(3, 5, 7);
  }
  _tile_release();
  return 2.0 * 16 * 16 * 32 * 4 * static_cast<double>(rounds / 8);
}

}  // namespace dsv4
