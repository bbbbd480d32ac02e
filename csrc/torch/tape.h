// The kernels of a sequence of ops with the addresses of their operands, to be run again without torch: for ops on a
// host what a graph of launches is for a GPU.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <functional>
#include <optional>
#include <utility>
#include <vector>

#include "common/context.h"
#include "common/status.h"

namespace dsv4::binding {

// Memory for one call at a time, on the device of a tensor.
class Scratch {
 public:
  explicit Scratch(const torch::stable::Tensor& on) : on_(on) {}

  // Valid until the next one.
  Workspace at_least(int64_t bytes);

 private:
  torch::stable::Tensor on_;
  std::optional<torch::stable::Tensor> memory_;  // none until asked for
  int64_t bytes_ = 0;
};

class Tape {
 public:
  using Call = std::function<Status(const Context&, Scratch&)>;

  // What this thread records now; null: nothing.
  static Tape* recording();

  // A call on the device of `on`.
  void add(const torch::stable::Tensor& on, Call call);

  // Keeps memory that calls use.
  void keep(const torch::stable::Tensor& memory);

  // An operand was copied by torch before the kernel saw it, which running the kernel again would leave out.
  void refuse() { refused_ = true; }

  int64_t calls() const { return refused_ ? -1 : static_cast<int64_t>(calls_.size()); }
  int64_t bytes() const { return bytes_; }

  // Nanoseconds from the first call to the end of the last. Throws what a call reports.
  int64_t run(int64_t begin, int64_t end);

 private:
  std::vector<Call> calls_;
  std::vector<torch::stable::Tensor> kept_;
  std::optional<torch::stable::Tensor> on_;
  std::optional<Scratch> scratch_;
  int64_t bytes_ = 0;
  bool refused_ = false;
};

}  // namespace dsv4::binding
