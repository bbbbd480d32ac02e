#include "torch/tape.h"

#include <chrono>
#include <map>
#include <memory>
#include <mutex>

#include "torch/glue.h"

namespace dsv4::binding {
namespace {

thread_local std::unique_ptr<Tape> t_recording;

// Python holds a number, so that a wrong one is an error and not a crash.
struct Shelf {
  std::mutex mutex;
  std::map<int64_t, std::shared_ptr<Tape>> tapes;
  int64_t next = 1;
};

Shelf& shelf() {
  static Shelf* shelf = new Shelf;  // outlives whatever Python still drops while it ends
  return *shelf;
}

std::shared_ptr<Tape> find(int64_t tape) {
  const std::lock_guard<std::mutex> lock(shelf().mutex);
  const auto found = shelf().tapes.find(tape);
  Check("tape_run").require(found != shelf().tapes.end(), "there is no tape " + std::to_string(tape));
  return found->second;
}

// Recording goes on until tape_end. One that is under way is dropped.
void tape_begin() { t_recording = std::make_unique<Tape>(); }

const Tape& recorded(const char* op) {
  Check(op).require(t_recording != nullptr, "nothing is being recorded");
  return *t_recording;
}

// Kernels recorded until now; -1: they cannot be repeated.
int64_t tape_calls() { return recorded("tape_calls").calls(); }

// Memory that they keep.
int64_t tape_bytes() { return recorded("tape_bytes").bytes(); }

// The number of what was recorded, for tape_run and tape_free.
int64_t tape_end() {
  recorded("tape_end");
  const std::lock_guard<std::mutex> lock(shelf().mutex);
  shelf().tapes[shelf().next] = std::move(t_recording);
  return shelf().next++;
}

// Runs kernels [begin, end) again; how long that kept this thread, in nanoseconds.
int64_t tape_run(int64_t tape, int64_t begin, int64_t end) { return find(tape)->run(begin, end); }

void tape_free(int64_t tape) {
  const std::lock_guard<std::mutex> lock(shelf().mutex);
  shelf().tapes.erase(tape);
}

}  // namespace

Tape* Tape::recording() { return t_recording.get(); }

void Tape::add(const Tensor& on, Call call) {
  if (!on_.has_value()) {
    on_ = on;
    scratch_.emplace(on);
  }
  refused_ |= on.get_device_index() != on_->get_device_index();
  calls_.push_back(std::move(call));
}

void Tape::keep(const Tensor& memory) {
  kept_.push_back(memory);
  bytes_ += memory.numel() * static_cast<int64_t>(memory.element_size());
}

int64_t Tape::run(int64_t begin, int64_t end) {
  const Check check("tape_run");
  check.require(
      0 <= begin && begin <= end && end <= calls(),
      "calls lie in [0, " + std::to_string(calls()) + "], got " + std::to_string(begin) + " to " + std::to_string(end));
  if (begin == end) return 0;
  int64_t taken = 0;
  check.on_device(*on_, [&](const Context& context) {
    const auto started = std::chrono::steady_clock::now();
    Status status = Status::ok();
    for (int64_t call = begin; call < end && status.is_ok(); ++call) status = calls_[call](context, *scratch_);
    taken = std::chrono::nanoseconds(std::chrono::steady_clock::now() - started).count();
    return status;
  });
  return taken;
}

}  // namespace dsv4::binding

STABLE_TORCH_LIBRARY_FRAGMENT(dsv4, library) {
  library.def(DSV4_LIBRARY_OP("tape_begin") "() -> ()");
  library.def(DSV4_LIBRARY_OP("tape_calls") "() -> int");
  library.def(DSV4_LIBRARY_OP("tape_bytes") "() -> int");
  library.def(DSV4_LIBRARY_OP("tape_end") "() -> int");
  library.def(DSV4_LIBRARY_OP("tape_run") "(int tape, int begin, int end) -> int");
  library.def(DSV4_LIBRARY_OP("tape_free") "(int tape) -> ()");
}
STABLE_TORCH_LIBRARY_IMPL(dsv4, CompositeExplicitAutograd, library) {
  library.impl(DSV4_LIBRARY_OP("tape_begin"), TORCH_BOX(&dsv4::binding::tape_begin));
  library.impl(DSV4_LIBRARY_OP("tape_calls"), TORCH_BOX(&dsv4::binding::tape_calls));
  library.impl(DSV4_LIBRARY_OP("tape_bytes"), TORCH_BOX(&dsv4::binding::tape_bytes));
  library.impl(DSV4_LIBRARY_OP("tape_end"), TORCH_BOX(&dsv4::binding::tape_end));
  library.impl(DSV4_LIBRARY_OP("tape_run"), TORCH_BOX(&dsv4::binding::tape_run));
  library.impl(DSV4_LIBRARY_OP("tape_free"), TORCH_BOX(&dsv4::binding::tape_free));
}
