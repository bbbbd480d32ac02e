#include "common/peaks.h"

#include <algorithm>
#include <chrono>
#include <vector>

namespace dsv4 {
namespace {

// `kernel` runs the given number of rounds from registers and returns how many operations it did.
double peak_flops(ThreadPool& pool, double (*kernel)(int64_t rounds)) {
  using Clock = std::chrono::steady_clock;
  const Context context = pool.context();
  std::vector<double> done(static_cast<size_t>(context.threads));
  double best = 0;
  for (int repeat = 0; repeat < 5; ++repeat) {
    const auto start = Clock::now();
    parallel(context, context.threads, [&](int64_t begin, int64_t end) {
      for (int64_t thread = begin; thread < end; ++thread) done[static_cast<size_t>(thread)] = kernel(2'000'000);
    });
    double total = 0;
    for (const double operations : done) total += operations;
    best = std::max(best, total / std::chrono::duration<double>(Clock::now() - start).count());
  }
  return best;
}

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
#if defined(DSV4_PEAKS_AVX2)
  if (isa >= Isa::kAvx2) return {avx2_float32_peak, nullptr};
#endif
  (void)isa;
  return {scalar_float32_peak, nullptr};
}

UnitPeaks measure_units(ThreadPool& pool) {
  const PeakKernels kernels = peak_kernels(pool.context().best);
  const double float32 = peak_flops(pool, kernels.float32);
  return {float32, kernels.bfloat16 == nullptr ? float32 : peak_flops(pool, kernels.bfloat16)};
}

}  // namespace dsv4
