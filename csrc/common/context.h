// Where a call runs: the instruction sets it may use, and the threads or the stream it runs on.
#pragma once

#include <cstdint>

namespace dsv4 {

// Ordered within a device: a limit admits itself and everything below it on that device.
enum class Isa : int8_t { kScalar = 0, kAvx2 = 1, kAvx512 = 2, kAmx = 3, kSm80 = 16, kSm90 = 17 };

enum class Device : int8_t { kCpu, kCuda };

// Runs body(argument, begin, end) over pieces of [0, count), from any number of threads, and returns when all are done.
// The caller supplies the threads: torch's inside torch, the program's own in native tests and benchmarks.
using ParallelFor = void (*)(void* pool, int64_t count, void (*body)(void* argument, int64_t begin, int64_t end),
                             void* argument);

struct Context {
  Device device = Device::kCpu;
  Isa best = Isa::kScalar;             // what the hardware has, lowered by DSV4_MAX_ISA
  ParallelFor parallel_for = nullptr;  // CPU
  void* pool = nullptr;                // CPU: handed to parallel_for
  int threads = 1;                     // CPU: how many parallel_for has; results never depend on it
  void* stream = nullptr;              // CUDA: cudaStream_t
  int device_index = 0;                // CUDA
};

// Scratch memory that a call needs: 64-byte aligned, uninitialised, not shared with a call that may run meanwhile.
struct Workspace {
  void* data = nullptr;
  int64_t bytes = 0;  // at least what the op's workspace function says
};

// parallel_for with a callable. Results must not depend on how [0, count) is cut.
template <class Body>
void parallel(const Context& context, int64_t count, const Body& body) {
  context.parallel_for(
      context.pool, count,
      [](void* argument, int64_t begin, int64_t end) { (*static_cast<const Body*>(argument))(begin, end); },
      const_cast<Body*>(&body));
}

// The same in pieces of `grain` or more. What fits in one stays on this thread: waking another takes longer.
template <class Body>
void parallel(const Context& context, int64_t count, int64_t grain, const Body& body) {
  if (count <= grain) {
    if (count > 0) body(0, count);
    return;
  }
  parallel(context, (count + grain - 1) / grain,
           [&](int64_t begin, int64_t end) { body(begin * grain, end * grain < count ? end * grain : count); });
}

}  // namespace dsv4
