#include "simt/fiber.h"

#include <sys/mman.h>

#include <cstdint>
#include <new>

#if defined(__x86_64__)

// Saves what a function must preserve on the old stack, and takes the same up from the new one.
extern "C" void dsv4_switch_context(void** save, void* load);
extern "C" void dsv4_start_fiber();
asm(R"(
.text
.globl dsv4_switch_context
.type dsv4_switch_context, @function
dsv4_switch_context:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size dsv4_switch_context, .-dsv4_switch_context
.globl dsv4_start_fiber
.type dsv4_start_fiber, @function
dsv4_start_fiber:
  movq %r13, %rdi
  callq *%r12
  ud2
.size dsv4_start_fiber, .-dsv4_start_fiber
)");

#else
#include <ucontext.h>
#endif

namespace dsv4::simt {
namespace {
constexpr size_t kGuardBytes = 4096;
}

Fiber::Fiber() {
  void* memory = mmap(nullptr, kGuardBytes + kStackBytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (memory == MAP_FAILED) throw std::bad_alloc();
  memory_ = static_cast<char*>(memory);
  mprotect(memory_, kGuardBytes, PROT_NONE);
}

#if defined(__x86_64__)

Fiber::~Fiber() { munmap(memory_, kGuardBytes + kStackBytes); }

void Fiber::start(void (*entry)(void*), void* argument) {
  void** top = reinterpret_cast<void**>(memory_ + kGuardBytes + kStackBytes);
  *--top = nullptr;
  *--top = nullptr;  // two: the stack is 16-byte aligned at the call
  *--top = reinterpret_cast<void*>(&dsv4_start_fiber);
  *--top = nullptr;                         // rbp
  *--top = nullptr;                         // rbx
  *--top = reinterpret_cast<void*>(entry);  // r12
  *--top = argument;                        // r13
  *--top = nullptr;                         // r14
  *--top = nullptr;                         // r15
  fiber_context_ = top;
}

void Fiber::enter() { dsv4_switch_context(&scheduler_context_, fiber_context_); }
void Fiber::leave() { dsv4_switch_context(&fiber_context_, scheduler_context_); }

#else

namespace {
void start_context(unsigned entry_high, unsigned entry_low, unsigned argument_high, unsigned argument_low) {
  const auto join = [](unsigned high, unsigned low) { return static_cast<uintptr_t>(high) << 32 | low; };
  reinterpret_cast<void (*)(void*)>(join(entry_high, entry_low))(
      reinterpret_cast<void*>(join(argument_high, argument_low)));
}
}  // namespace

Fiber::~Fiber() {
  munmap(memory_, kGuardBytes + kStackBytes);
  delete static_cast<ucontext_t*>(fiber_context_);
  delete static_cast<ucontext_t*>(scheduler_context_);
}

void Fiber::start(void (*entry)(void*), void* argument) {
  if (fiber_context_ == nullptr) fiber_context_ = new ucontext_t;
  if (scheduler_context_ == nullptr) scheduler_context_ = new ucontext_t;
  auto* context = static_cast<ucontext_t*>(fiber_context_);
  getcontext(context);
  context->uc_stack.ss_sp = memory_ + kGuardBytes;
  context->uc_stack.ss_size = kStackBytes;
  context->uc_link = nullptr;
  const uintptr_t code = reinterpret_cast<uintptr_t>(entry), data = reinterpret_cast<uintptr_t>(argument);
  makecontext(context, reinterpret_cast<void (*)()>(start_context), 4, static_cast<unsigned>(code >> 32),
              static_cast<unsigned>(code), static_cast<unsigned>(data >> 32), static_cast<unsigned>(data));
}

void Fiber::enter() {
  swapcontext(static_cast<ucontext_t*>(scheduler_context_), static_cast<ucontext_t*>(fiber_context_));
}
void Fiber::leave() {
  swapcontext(static_cast<ucontext_t*>(fiber_context_), static_cast<ucontext_t*>(scheduler_context_));
}

#endif

}  // namespace dsv4::simt
