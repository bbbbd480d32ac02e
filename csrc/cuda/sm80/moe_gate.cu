// moe_gate: the logits are a plain linear layer, float32 to the workspace; then a warp a token takes their scores and
// chooses, round by round: each lane the best of its own experts behind the last one taken, the warp the best of those.
// The scores are read K times from the nearest cache: E K / 32 comparisons a lane.
#include <cmath>

#include "cuda/common/launch.h"
#include "cuda/common/ptx.h"
#include "cuda/sm80/linear.h"
#include "cuda/sm80/moe.h"
#include "cuda/sm80/operands.h"

namespace dsv4::sm80 {

struct GateArguments {
  MoeGateParams params;
  float* score;  // [tokens, experts]: logits, which become scores
  int64_t tokens;
  int experts, top_k;
};

namespace {

constexpr int kGateThreads = 128;
constexpr int kNobody = 0x7FFFFFFF;

// sqrt(softplus(z)). Below -40 softplus is exp, whose root does not underflow as exp(z / 2); above 20 it is z.
DSV4_DEVICE float sqrt_softplus(float z) {
  if (z < -40.0f) return ptx::exponential(ptx::multiply(0.5f, z));
  return ptx::square_root(z > 20.0f ? z : ptx::logarithm_1p(ptx::exponential(z)));
}

DSV4_DEVICE int64_t gate_integer(const void* data, DType dtype, int64_t at) {
  return dtype == DType::kInt64 ? static_cast<const int64_t*>(data)[at] : static_cast<const int32_t*>(data)[at];
}

struct Choice {
  float value;
  int expert;  // kNobody: none

  DSV4_DEVICE bool before(const Choice& other) const {
    return value > other.value || (value == other.value && expert < other.expert);
  }
};

// The warp's best of the experts behind `last`.
DSV4_DEVICE Choice choose_next(const float* score, const float* bias, int experts, const Choice& last) {
  Choice best = {-INFINITY, kNobody};
  for (int e = ptx::thread_index() % 32; e < experts; e += 32) {
    const float value = bias != nullptr ? ptx::add(score[e], bias[e]) : score[e];
    const Choice choice = {value != value ? -INFINITY : value, e};
    if (last.before(choice) && choice.before(best)) best = choice;
  }
  DSV4_UNROLL
  for (int mask = 16; mask > 0; mask /= 2) {
    Choice other;
    other.value = ptx::shuffle_xor(best.value, mask);
    other.expert = static_cast<int>(ptx::shuffle_xor(static_cast<uint32_t>(best.expert), mask));
    if (other.before(best)) best = other;
  }
  return best;
}

// Grid: x over tokens, a warp each.
DSV4_DEVICE void gate(const GateArguments& a) {
  const MoeGateParams& p = a.params;
  const int lane = ptx::thread_index() % 32;
  const int64_t token = ptx::block_index_x() * (kGateThreads / 32) + ptx::thread_index() / 32;
  if (token >= a.tokens) return;
  float* score = a.score + token * a.experts;
  for (int e = lane; e < a.experts; e += 32) score[e] = sqrt_softplus(score[e]);
  const bool hashed = p.token_ids.given();
  int64_t row = 0;
  bool known = true;
  if (hashed) {
    row = gate_integer(p.token_ids.data, p.token_ids.dtype, token * p.token_ids.stride[0]);
    known = row >= 0 && row < p.tid2eid.shape[0];
  }
  float* weights = p.weights.data + token * p.weights.stride[0];
  int32_t* indices = static_cast<int32_t*>(p.indices.data) + token * p.indices.stride[0];
  double total = 0;
  Choice last = {INFINITY, -1};
  for (int k = 0; k < a.top_k; ++k) {
    int64_t expert = -1;
    if (hashed) {
      if (known) expert = gate_integer(p.tid2eid.data, p.tid2eid.dtype, row * p.tid2eid.stride[0] + k);
      if (expert >= a.experts) expert = -1;
    } else {
      last = choose_next(score, p.bias.data, a.experts, last);
      expert = last.expert;
    }
    const int chosen = expert < 0 ? -1 : static_cast<int>(expert);
    // A score is in the sight of the lane that made it.
    const float own = chosen >= 0 && chosen % 32 == lane ? score[chosen] : 0.0f;
    const float value = ptx::shuffle(own, chosen >= 0 ? chosen % 32 : 0);
    total += static_cast<double>(value);
    if (lane == k % 32) {
      indices[k] = chosen;
      weights[k] = value;
    }
  }
  const double least = 1.17549435082228750797e-38;  // of the normal float32 numbers
  total = total < least ? least : total;
  for (int k = lane; k < a.top_k; k += 32) {
    weights[k] = static_cast<float>(static_cast<double>(weights[k]) / total * p.route_scale);
  }
}

}  // namespace

DSV4_KERNEL(kGateThreads, 4) sm80_f32_moe_gate(const GateArguments a) { gate(a); }

namespace {

int64_t score_bytes(const MoeGateParams& p) {
  return round_up(p.x.size(0) * p.weight.size(0) * static_cast<int64_t>(sizeof(float)), 64);
}

DenseLinearParams logits_of(const MoeGateParams& p) {
  DenseLinearParams logits = {};
  logits.x = p.x;
  logits.weight = p.weight;
  logits.out.data = p.workspace.data;
  logits.out.dtype = DType::kFloat32;
  logits.out.shape[0] = p.x.size(0);
  logits.out.shape[1] = logits.out.stride[0] = p.weight.size(0);
  logits.out.stride[1] = 1;
  return logits;
}

}  // namespace

int64_t moe_gate_workspace_bytes(const MoeGateParams& p, const Context& context) {
  return score_bytes(p) + sm80::dense_linear_workspace_bytes(logits_of(p), context);
}

Status moe_gate(const MoeGateParams& p, const Context& context) {
  if (p.x.size(0) == 0) return Status::ok();
  const int64_t needed = sm80::moe_gate_workspace_bytes(p, context);
  if (p.workspace.bytes < needed) {
    return Status::error("moe_gate: workspace has %lld bytes, needs %lld", static_cast<long long>(p.workspace.bytes),
                         static_cast<long long>(needed));
  }
  DenseLinearParams logits = logits_of(p);
  logits.workspace = {static_cast<uint8_t*>(p.workspace.data) + score_bytes(p), needed - score_bytes(p)};
  const Status multiplied = sm80::dense_linear(logits, context);
  if (!multiplied.is_ok()) return multiplied;
  GateArguments a = {};
  a.params = p;
  a.score = static_cast<float*>(p.workspace.data);
  a.tokens = p.x.size(0);
  a.experts = static_cast<int>(p.weight.size(0));
  a.top_k = static_cast<int>(p.top_k);
  cuda::LaunchShape shape;
  shape.blocks_x = ceil_div(a.tokens, kGateThreads / 32);
  shape.threads = kGateThreads;
  return cuda::launch("moe_gate", sm80_f32_moe_gate, shape, context, a);
}

}  // namespace dsv4::sm80
