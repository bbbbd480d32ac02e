// What the moe_gate kernels share: rows of tokens in blocks, and the choice from their logits. A kernel gives
//   int64_t kTokens                        of a block
//   void logits(const MoeGateParams&, int64_t first, int64_t count, float* z, uint8_t* memory)   z[count, E]
//   void scores(float* z, int64_t count)   in place
//   int64_t memory(const MoeGateParams&)   of one thread
#pragma once

#include <math.h>

#include "cpu/moe_driver.h"

namespace dsv4 {
namespace {

// sqrt(softplus(z)) in double precision, rounded to float32 as the definition does. Below -40 softplus is exp to the
// last bit, and its root is better taken as exp(z / 2): no underflow. Above 20 softplus is z by convention.
DSV4_HOST_DEVICE float sqrt_softplus(float z) {
  if (z < -40) return static_cast<float>(::exp(0.5 * static_cast<double>(z)));
  const double wide = z;
  return static_cast<float>(::sqrt(wide > 20 ? wide : ::log1p(::exp(wide))));
}

// The choice of one token. `score` holds the scores, E of them.
void choose(const MoeGateParams& p, int64_t token, const float* score) {
  const int64_t experts = p.weight.size(0);
  float* weights = p.weights.at(token);
  int32_t* indices = p.indices.as<int32_t>().at(token);
  if (p.token_ids.given()) {
    const int64_t row = moe_integer(p.token_ids, token, 0);
    for (int64_t k = 0; k < p.top_k; ++k) indices[k] = static_cast<int32_t>(moe_integer(p.tid2eid, row, k));
  } else {
    const float* bias = p.bias.data;
    const auto ranked = [&](int64_t e) {
      const float value = bias == nullptr ? score[e] : score[e] + bias[e];
      return value != value ? -HUGE_VALF : value;
    };
    // The best so far in order; an equal one that comes later goes behind.
    int64_t held = 0;
    float least = 0;
    for (int64_t e = 0; e < experts; ++e) {
      const float value = ranked(e);
      if (held == p.top_k && !(value > least)) continue;
      int64_t k = held < p.top_k ? held++ : held - 1;
      for (; k > 0 && ranked(indices[k - 1]) < value; --k) indices[k] = indices[k - 1];
      indices[k] = static_cast<int32_t>(e);
      least = ranked(indices[held - 1]);
    }
  }
  double total = 0;
  for (int64_t k = 0; k < p.top_k; ++k) total += score[indices[k]];
  const double least = 1.17549435082228750797e-38;  // of the normal float32 numbers
  total = total < least ? least : total;
  for (int64_t k = 0; k < p.top_k; ++k) {
    weights[k] = static_cast<float>(static_cast<double>(score[indices[k]]) / total * p.route_scale);
  }
}

template <class Kernel>
class GateCall {
 public:
  GateCall(const MoeGateParams& p, const Context& context)
      : p_(p),
        context_(context),
        blocks_((p.x.size(0) + kTokens - 1) / kTokens),
        slots_(blocks_ < context.threads ? blocks_ : context.threads),
        score_bytes_(round_up(kTokens * p.weight.size(0) * static_cast<int64_t>(sizeof(float)), 64)),
        slot_bytes_(score_bytes_ + round_up(Kernel::memory(p), 64)) {}

  int64_t bytes() const { return slots_ * slot_bytes_; }

  Status run() const {
    const int64_t experts = p_.weight.size(0);
    moe_spread(context_, slots_, blocks_, [&](int64_t slot, int64_t block) {
      uint8_t* memory = static_cast<uint8_t*>(p_.workspace.data) + slot * slot_bytes_;
      float* score = reinterpret_cast<float*>(memory);
      const int64_t first = block * kTokens, left = p_.x.size(0) - first;
      const int64_t count = left < kTokens ? left : kTokens;
      Kernel::logits(p_, first, count, score, memory + score_bytes_);
      Kernel::scores(score, count * experts);
      for (int64_t i = 0; i < count; ++i) choose(p_, first + i, score + i * experts);
    });
    return Status::ok();
  }

 private:
  static constexpr int64_t kTokens = Kernel::kTokens;

  const MoeGateParams& p_;
  const Context& context_;
  int64_t blocks_, slots_, score_bytes_, slot_bytes_;
};

}  // namespace
}  // namespace dsv4
