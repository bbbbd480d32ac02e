// Many sums over a block's threads at once.
#pragma once

#include "cuda/common/ptx.h"

namespace dsv4::sm80 {

// Lanes whose bit `kMask` is set keep the upper half of 2 kMask values, the others the lower, each with what the other
// has of it; then so on down to one value. By template: nvcc keeps values in memory whose index takes two loops.
template <int kMask, int kCount>
DSV4_DEVICE void halve(float (&value)[kCount], int lane) {
  if constexpr (kMask > 0) {
    const bool upper = (lane & kMask) != 0;
    DSV4_UNROLL
    for (int i = 0; i < kMask; ++i) {
      const float kept = upper ? value[i + kMask] : value[i], given = upper ? value[i] : value[i + kMask];
      value[i] = ptx::add(kept, ptx::shuffle_xor(given, kMask));
    }
    halve<kMask / 2>(value, lane);
  }
}

// Lane l receives the sum over the warp of value l % kCount; a power of two of them. kCount sums take kCount - 1
// exchanges, and one for every bit that a lane has beyond.
template <int kCount>
DSV4_DEVICE float sum_of_warp(float (&value)[kCount]) {
  static_assert(kCount >= 1 && kCount <= 32 && (kCount & (kCount - 1)) == 0);
  halve<kCount / 2>(value, ptx::thread_index() % 32);
  float sum = value[0];
  DSV4_UNROLL
  for (int mask = kCount; mask < 32; mask *= 2) {
    sum = ptx::add(sum, ptx::shuffle_xor(sum, mask));
  }
  return sum;
}

// The same over the block, in the lanes of each warp; it writes the first kThreads / 32 * kCount floats of shared
// memory. Once a kernel: a second call would need a barrier before it.
template <int kThreads, int kCount>
DSV4_DEVICE float sum_of_block(float (&value)[kCount]) {
  const float own = sum_of_warp(value);
  const int lane = ptx::thread_index() % 32, warp = ptx::thread_index() / 32;
  const uint32_t sums = ptx::shared_base() + static_cast<uint32_t>(lane % kCount * 4);
  if (lane < kCount) ptx::store_shared_float(sums + static_cast<uint32_t>(warp * kCount * 4), own);
  ptx::sync_threads();
  float total = 0.0f;
  DSV4_UNROLL
  for (int other = 0; other < kThreads / 32; ++other) {
    total = ptx::add(total, ptx::load_shared_float(sums + static_cast<uint32_t>(other * kCount * 4)));
  }
  return total;
}

}  // namespace dsv4::sm80
