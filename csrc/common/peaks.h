// Loops that only do arithmetic from registers, to measure what the processor's units can do.
#pragma once

#include <cstdint>

#include "common/context.h"
#include "common/thread_pool.h"

namespace dsv4 {

// Fused multiply-adds by the widest vectors that the kernels use; bfloat16: dot products or tiles, and the float32 peak
// where there are none. FLOP/s on the threads of the pool, the fastest of a few runs.
struct UnitPeaks {
  double float32, bfloat16;
};
UnitPeaks measure_units(ThreadPool& pool);

// Each runs `rounds` rounds and returns the number of floating-point operations done.
struct PeakKernels {
  double (*float32)(int64_t rounds);
  double (*bfloat16)(int64_t rounds);  // null: no such unit
};

PeakKernels peak_kernels(Isa isa);

double avx2_float32_peak(int64_t rounds);
double avx512_float32_peak(int64_t rounds);
double avx512_bfloat16_peak(int64_t rounds);
double amx_bfloat16_peak(int64_t rounds);

}  // namespace dsv4
