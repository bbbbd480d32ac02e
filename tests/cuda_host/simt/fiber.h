// A stack and a place to go on from. Switching costs a few nanoseconds: a kernel of 256 threads switches often.
#pragma once

#include <cstddef>

namespace dsv4::simt {

class Fiber {
 public:
  Fiber();
  ~Fiber();
  Fiber(const Fiber&) = delete;
  Fiber& operator=(const Fiber&) = delete;

  // Makes the next enter() call entry(argument) on a fresh stack; what the fiber did before is abandoned. entry must
  // end in leave(), not return.
  void start(void (*entry)(void*), void* argument);
  void enter();  // from the scheduler: runs the fiber until it leaves
  void leave();  // from the fiber: back to the scheduler

 private:
  static constexpr size_t kStackBytes = 128 * 1024;
  char* memory_;  // a guard page below the stack
  void* fiber_context_ = nullptr;
  void* scheduler_context_ = nullptr;
};

}  // namespace dsv4::simt
