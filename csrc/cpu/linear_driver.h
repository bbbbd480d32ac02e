// What the linear kernels share: rows of activations are prepared once, then panels of weight rows go to the threads.
//
// A kernel is a class with
//   static int64_t row_bytes(const LinearParams&)    of a prepared row of activations
//   static int64_t memory(const LinearParams&)       scratch memory of one, bytes
//   static void prepare(const LinearParams&, int64_t token, int64_t group, uint8_t* to)
//   Kernel(const LinearParams&, uint8_t* memory)
//   void run(const uint8_t* rows, int64_t group, int64_t begin, int64_t end)   outputs [begin, end) of the group, for
//       its prepared rows, one after another
#pragma once

#include "common/pages.h"
#include "ops/linear.h"

namespace dsv4 {
namespace {

inline constexpr int64_t kLinearPanel = 32;  // weight rows

template <class Kernel>
class LinearCall {
 public:
  LinearCall(const LinearParams& p, const Context& context)
      : p_(p),
        context_(context),
        tokens_(p.x.size(0)),
        groups_(p.x.size(1)),
        outputs_(p.weight.size(0) / p.x.size(1)),
        panels_((outputs_ + kLinearPanel - 1) / kLinearPanel),
        row_bytes_(round_up(Kernel::row_bytes(p), 64)),
        slot_bytes_(round_up(Kernel::memory(p), 64)),
        slots_(groups_ * panels_ < context.threads ? groups_ * panels_ : context.threads) {}

  int64_t bytes() const { return tokens_ == 0 ? 0 : tokens_ * groups_ * row_bytes_ + slots_ * slot_bytes_; }

  Status run() const {
    if (tokens_ == 0 || outputs_ == 0) return Status::ok();
    parallel(context_, tokens_ * groups_, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) Kernel::prepare(p_, i % tokens_, i / tokens_, row(i));
    });
    int64_t next = 0;
    parallel(context_, slots_, [&](int64_t begin, int64_t end) {
      for (int64_t slot = begin; slot < end; ++slot) {
        Kernel kernel(p_, row(tokens_ * groups_) + slot * slot_bytes_);
        for (;;) {
          const int64_t item = __atomic_fetch_add(&next, 1, __ATOMIC_RELAXED);
          if (item >= groups_ * panels_) break;
          const int64_t group = item / panels_, first = item % panels_ * kLinearPanel;
          kernel.run(row(group * tokens_), group, first,
                     first + kLinearPanel < outputs_ ? first + kLinearPanel : outputs_);
        }
      }
    });
    return Status::ok();
  }

 private:
  uint8_t* row(int64_t index) const { return static_cast<uint8_t*>(p_.workspace.data) + index * row_bytes_; }

  const LinearParams& p_;
  const Context& context_;
  int64_t tokens_, groups_, outputs_, panels_, row_bytes_, slot_bytes_, slots_;
};

// A kernel's functions for one op.
template <class Kernel>
int64_t linear_workspace_bytes(const LinearParams& p, const Context& context) {
  return LinearCall<Kernel>(p, context).bytes();
}
template <class Kernel>
Status run_linear(const LinearParams& p, const Context& context) {
  return LinearCall<Kernel>(p, context).run();
}

}  // namespace
}  // namespace dsv4
