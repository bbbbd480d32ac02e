// How an op chooses its implementation: an ordered list, best first, the portable scalar one last.
#pragma once

#include <atomic>

#include "common/context.h"
#include "common/status.h"

// Names a kernel in a candidate list: itself where this library contains that instruction set, else nothing. The CPU
// and the CUDA library compile the same list, each with its own kernels.
#if defined(DSV4_WITH_CPU)
#define DSV4_SCALAR(kernel) kernel
#else
#define DSV4_SCALAR(kernel) nullptr
#endif
#if defined(DSV4_WITH_AVX2)
#define DSV4_AVX2(kernel) kernel
#else
#define DSV4_AVX2(kernel) nullptr
#endif
#if defined(DSV4_WITH_AVX512)
#define DSV4_AVX512(kernel) kernel
#else
#define DSV4_AVX512(kernel) nullptr
#endif
#if defined(DSV4_WITH_AMX)
#define DSV4_AMX(kernel) kernel
#else
#define DSV4_AMX(kernel) nullptr
#endif
#if defined(DSV4_WITH_SM80)
#define DSV4_SM80(kernel) kernel
#else
#define DSV4_SM80(kernel) nullptr
#endif
#if defined(DSV4_WITH_SM90)
#define DSV4_SM90(kernel) kernel
#else
#define DSV4_SM90(kernel) nullptr
#endif

namespace dsv4 {

template <class Params>
struct Candidate {
  const char* name;  // "amx", "avx512", "avx2", "scalar", "sm90", "sm80"; unique in its list
  Isa isa;
  Status (*run)(const Params&, const Context&);  // none: not in this library
  bool (*accepts)(const Params&) = nullptr;      // none: every valid problem
};

inline Device device_of(Isa isa) { return isa >= Isa::kSm80 ? Device::kCuda : Device::kCpu; }

// What the tests and `dsv4 env` read of an op. All ops of a library form a list; choosing a kernel does not use it.
class OpInfo {
 public:
  static const OpInfo* first();
  const OpInfo* next() const { return next_; }
  const char* name() const { return name_; }
  virtual int size() const = 0;
  // The name and instruction set of a candidate; false if this library does not contain it.
  virtual bool candidate(int index, const char** name, Isa* isa) const = 0;
  // How often a candidate ran in this process; the tests compare it with what they expect.
  virtual int64_t calls(int index) const = 0;
  // The implementation that ran last in this process, from any thread; null before the first call.
  const char* last() const { return last_.load(std::memory_order_relaxed); }

 protected:
  explicit OpInfo(const char* name);
  ~OpInfo() = default;
  void record(const char* name) const { last_.store(name, std::memory_order_relaxed); }

 private:
  const char* name_;
  const OpInfo* next_;
  mutable std::atomic<const char*> last_{nullptr};
};

// An op: its name and its candidates. One constant each, in csrc/ops/<op>.cpp.
template <class Params, int N>
class Op final : public OpInfo {
 public:
  Op(const char* name, const Candidate<Params> (&candidates)[N]) : OpInfo(name), candidates_(candidates) {}

  // The first candidate that this library, the context and the problem admit, unless the problem is not valid.
  Status run(const Status& valid, const Params& params, const Context& context) const {
    if (!valid.is_ok()) return valid;
    for (int index = 0; index < N; ++index) {
      const Candidate<Params>& candidate = candidates_[index];
      if (candidate.run == nullptr || device_of(candidate.isa) != context.device || candidate.isa > context.best)
        continue;
      if (candidate.accepts != nullptr && !candidate.accepts(params)) continue;
      record(candidate.name);
      calls_[index].fetch_add(1, std::memory_order_relaxed);
      return candidate.run(params, context);
    }
    return Status::error("%s: no implementation for this device in this build", name());
  }

  int size() const override { return N; }

  bool candidate(int index, const char** name, Isa* isa) const override {
    *name = candidates_[index].name;
    *isa = candidates_[index].isa;
    return candidates_[index].run != nullptr;
  }

  int64_t calls(int index) const override { return calls_[index].load(std::memory_order_relaxed); }

 private:
  const Candidate<Params>* candidates_;
  mutable std::atomic<int64_t> calls_[N] = {};
};

template <class Params, int N>
Op(const char*, const Candidate<Params> (&)[N]) -> Op<Params, N>;

}  // namespace dsv4
