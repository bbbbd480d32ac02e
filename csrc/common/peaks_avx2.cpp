// Compiled with AVX2 and FMA flags; called only where the processor has them.
#include <immintrin.h>

#include "common/peaks.h"

namespace dsv4 {

double avx2_float32_peak(int64_t rounds) {
  constexpr int kChains = 12;  // independent accumulators: covers the latency of two units
  __m256 sums[kChains];
  for (__m256& sum : sums) sum = _mm256_set1_ps(1.0f);
  volatile float source = 0.999f;
  const __m256 factor = _mm256_set1_ps(source);
  for (int64_t round = 0; round < rounds; ++round) {
    for (int i = 0; i < kChains; ++i) sums[i] = _mm256_fmadd_ps(sums[i], factor, factor);
  }
  for (int i = 1; i < kChains; ++i) sums[0] = _mm256_add_ps(sums[0], sums[i]);
  volatile float sink = _mm256_cvtss_f32(sums[0]);  // or the compiler would drop the loop
  (void)sink;
  return 2.0 * 8 * kChains * static_cast<double>(rounds);
}

}  // namespace dsv4
