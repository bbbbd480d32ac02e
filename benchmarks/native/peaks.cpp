#include "native/peaks.h"

namespace dsv4::bench {
namespace {

double scalar_float32_peak(int64_t rounds) {
  constexpr int kLanes = 64;  // enough independent sums for the compiler's vectors
  float sums[kLanes];
  for (int lane = 0; lane < kLanes; ++lane) sums[lane] = static_cast<float>(lane);
  volatile float source = 0.999f;
  const float factor = source;
  for (int64_t round = 0; round < rounds; ++round) {
    for (int lane = 0; lane < kLanes; ++lane) sums[lane] = sums[lane] * factor + factor;
  }
  volatile float sink = 0;
  for (int lane = 0; lane < kLanes; ++lane) sink = sink + sums[lane];
  return 2.0 * kLanes * static_cast<double>(rounds);
}

}  // namespace

PeakKernels peak_kernels(Isa isa) {
#if defined(DSV4_PEAKS_X86)
  if (isa == Isa::kAmx) return {avx512_float32_peak, amx_bfloat16_peak};
  if (isa == Isa::kAvx512) return {avx512_float32_peak, avx512_bfloat16_peak};
#endif
  (void)isa;
  return {scalar_float32_peak, nullptr};
}

}  // namespace dsv4::bench
