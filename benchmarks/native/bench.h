// The harness of the native benchmarks: measured peaks of the machine, timing with cold caches, one JSON object a line
// in the format of `dsv4 bench`. A result that fails its check is printed without a time and makes the exit code 1.
#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "common/context.h"
#include "common/dense.h"
#include "common/thread_pool.h"

namespace dsv4::bench {

enum class Unit { kFloat32, kBFloat16 };  // which peak a kernel's arithmetic is measured against

// What this machine was measured to do on the threads of the pool.
struct Peaks {
  double copy_bytes_per_second = 0;  // bytes read plus bytes written, arrays far larger than the caches
  double float32_flops = 0;          // fused multiply-adds, the widest vectors that the kernels use
  double bfloat16_flops = 0;         // BF16 dot products or tiles; the float32 peak where there are none
};
Peaks measure_peaks(ThreadPool& pool);

struct Timing {
  double microseconds = 0;  // median
  double spread = 0;        // half the distance between the quartiles, microseconds
};

// One measured case. `run` computes once; `error` compares what it left behind with an independent computation.
struct Measurement {
  std::string op, impl, shape;
  double flops = 0;
  double bytes = 0;  // the fewest that must move
  Unit unit = Unit::kFloat32;
  std::function<void()> run;
  std::function<double()> error;
  double error_limit = 0;
  std::string baseline;  // what it is compared with; empty: nothing
  std::function<void()> run_baseline;
};

class Bench {
 public:
  // Arguments: [--quick] [--threads N] [--json FILE] [--op NAME]...; the rest is an error that ends main with code 2.
  Bench(int argc, char** argv);

  bool usable() const { return usable_; }
  bool quick() const { return quick_; }
  ThreadPool& pool() { return *pool_; }
  const Peaks& peaks();

  void measure(const Measurement& measurement);

  // What main returns: 0, 1 after a failed check or when nothing was measured, 2 for bad arguments.
  int exit_code() const;

 private:
  Timing time(const std::function<void()>& run);
  void flush_caches();

  bool usable_ = true, quick_ = false;
  int failed_ = 0, measured_ = 0;
  std::string json_;
  std::vector<std::string> ops_;
  std::vector<char> flush_;
  std::unique_ptr<ThreadPool> pool_;
  Peaks peaks_;
};

// Scratch memory for ops, 64-byte aligned, as large as the largest that was asked for.
class Scratch {
 public:
  // Valid until the next call.
  Workspace of(int64_t bytes) {
    if (static_cast<int64_t>(memory_.size()) < bytes + 64) memory_.resize(static_cast<size_t>(bytes + 64));
    return {reinterpret_cast<void*>((reinterpret_cast<uintptr_t>(memory_.data()) + 63) / 64 * 64), bytes};
  }

 private:
  std::vector<uint8_t> memory_;
};

// The largest difference divided by the largest magnitude of `expected`; infinity where one of them is not finite
// alone.
double relative_error(const std::vector<float>& actual, const std::vector<float>& expected);

}  // namespace dsv4::bench
