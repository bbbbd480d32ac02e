// What the kernels of sparse_attention_backward share: their arguments, and a row's slots as they number them.
//
// Memory between the kernels, of the rows of one launch; E is bfloat16 where tensor cores multiply, else float32. A
// group of 16 heads has 32 weights for each slot and 32 operands: 16 of its queries, then 16 of G. A slot's part of its
// key's gradient is the sum over the groups of weights times operands.
#pragma once

#include "cuda/sm80/attention_arguments.h"

namespace dsv4::sm80 {

inline constexpr int kGroupWeights = 2 * kGroupHeads;
inline constexpr int kSliceDims = 64;  // of all operands, that a block of the keys' kernel takes
inline constexpr int kMostClasses = 64;
inline constexpr uint32_t kNoNumber = 0xFFFFFFFFu;

// A key of a row that takes a gradient. number: its row in the window pool, or after all of those in the other one.
// times: how often the row lists it; 0 but for the first.
struct alignas(16) ListedKey {
  uint32_t slot, number, times, unused;
};

struct AttentionGradientArguments {
  AttentionArguments call;
  AnyView<3> grad_out, grad_query;
  AnyView<2> grad_lse;
  bool paired_grad_out, paired_grad_query;  // two elements are one aligned word
  bool paired_sums;                         // of the gradients of keys
  float *window_sums, *compressed_sums;     // as the pools, float32; null: no gradient
  int64_t window_rows;                      // of the window pool
  int64_t rows;                             // of this launch, from call.first_row on
  int64_t slots;                            // of a row's memory: whole tiles
  int64_t wide_dim;                         // of an operand: whole slices
  int classes;                              // of keys, by the last bits of their numbers: a power of two
  float* gates;                             // [all rows, heads]: delta (1 - g)
  void* operands;                           // E [rows, groups, 32, wide_dim]
  void* weights;                            // E [rows, groups, slots, 32]
  uint32_t* numbers;                        // [rows, slots]
  ListedKey* lists;                         // [rows, slots], class by class
  uint32_t* begins;                         // [rows, classes + 1], of the classes in the list

  DSV4_DEVICE bool keys_wanted() const { return window_sums != nullptr || compressed_sums != nullptr; }
};

// The number of a slot's key, if it has one that takes a gradient.
DSV4_DEVICE uint32_t number_of(const AttentionGradientArguments& g, const AttentionRow& row,
                               const AttentionSlot& slot) {
  AttentionKey key;
  key.find(g.call, row, slot);
  if (key.form == KeyForm::kNone) return kNoNumber;
  const bool window = slot.source == Source::kWindow;
  if ((window ? g.window_sums : g.compressed_sums) == nullptr) return kNoNumber;
  return static_cast<uint32_t>(key.number + (window ? 0 : g.window_rows));
}

// What the weights of a head follow from, in a lane that has some of its keys. First the sums over them, then, once
// these are whole, the weights. What is needed once is read then: registers are few.
struct HeadGradient {
  float lse;
  float total, mean;   // sums of p and of p G . key; then 1 / total, and mean of G . key
  float kept, at_all;  // g; grad_lse - g delta

  DSV4_DEVICE void load(const AttentionGradientArguments& g, int64_t row, int64_t head) {
    lse = element(g.call.params.lse, g, row, head);
    total = mean = kept = at_all = 0.0f;
  }

  static DSV4_DEVICE float element(const AnyView<2>& of, const AttentionGradientArguments& g, int64_t row,
                                   int64_t head) {
    return head < g.call.heads ? static_cast<const float*>(of.data)[row * of.stride[0] + head] : 0.0f;
  }

  DSV4_DEVICE float numerator(const AttentionGradientArguments& g, float score) const {
    return ptx::exponential(ptx::add(ptx::multiply(score, g.call.params.scale), -lse));
  }

  DSV4_DEVICE void add(const AttentionGradientArguments& g, float score, float reach, bool counts) {
    if (!counts) return;
    const float p = numerator(g, score);
    total = ptx::add(total, p);
    mean = ptx::fma(p, reach, mean);
  }

  // Adds what the lane of that distance has.
  DSV4_DEVICE void join(int distance) {
    total = ptx::add(total, ptx::shuffle_xor(total, distance));
    mean = ptx::add(mean, ptx::shuffle_xor(mean, distance));
  }

  // The sums are whole. Returns delta (1 - g).
  DSV4_DEVICE float close(const AttentionGradientArguments& g, int64_t row, int64_t head) {
    const bool some = total != 0.0f;
    const float sink = sink_of(g.call, head);
    mean = some ? ptx::divide(mean, total) : 0.0f;
    total = some ? ptx::divide(1.0f, total) : 0.0f;
    kept = ptx::divide(1.0f, ptx::add(1.0f, ptx::exponential(ptx::add(sink, -lse))));
    at_all = ptx::fma(-ptx::multiply(kept, kept), mean, element(g.grad_lse, g, row, head));
    if (!some) return 0.0f;
    return ptx::divide(ptx::multiply(kept, mean), ptx::add(1.0f, ptx::exponential(ptx::add(lse, -sink))));
  }

  // Of the query and of G in the key's gradient; the first is that of the key in the query's, too.
  DSV4_DEVICE void weigh(const AttentionGradientArguments& g, float score, float reach, bool counts, float& of_query,
                         float& of_grad) const {
    const float p = counts ? ptx::multiply(numerator(g, score), total) : 0.0f;
    of_query = counts ? ptx::multiply(ptx::multiply(p, ptx::fma(kept, reach, at_all)), g.call.params.scale) : 0.0f;
    of_grad = counts ? ptx::multiply(p, kept) : 0.0f;
  }
};

// Two dims of grad_out, turned by the row's rotation and rounded: G.
template <class X>
struct GradientTurn {
  const float* angles;
  int rotated;  // the first dim that is

  DSV4_DEVICE GradientTurn(const AttentionArguments& a, int64_t row) {
    const AnyView<3>& rope = a.params.rope;
    const int pairs = rope.given() ? static_cast<int>(rope.shape[1]) : 0;
    angles = static_cast<const float*>(rope.data) + (pairs > 0 ? row * rope.stride[0] : 0);
    rotated = a.head_dim - 2 * pairs;
  }

  DSV4_DEVICE OutPair<X> turn(int dim, float even, float odd) const {
    if (dim < rotated) return OutPair<X>(even, odd);
    const float cosine = angles[dim - rotated], sine = angles[dim - rotated + 1];
    return OutPair<X>(ptx::add(ptx::multiply(even, cosine), -ptx::multiply(odd, sine)),
                      ptx::add(ptx::multiply(odd, cosine), ptx::multiply(even, sine)));
  }
};

// Where a group's operand begins: a query, or with 16 more G.
template <class E>
DSV4_DEVICE E* operand_of(const AttentionGradientArguments& g, int64_t index, int64_t group, int operand) {
  return static_cast<E*>(g.operands) + ((index * g.call.groups + group) * kGroupWeights + operand) * g.wide_dim;
}

// A slot's 32 weights of a group.
template <class E>
DSV4_DEVICE E* weights_of(const AttentionGradientArguments& g, int64_t index, int64_t group, int64_t slot) {
  return static_cast<E*>(g.weights) + ((index * g.call.groups + group) * g.slots + slot) * kGroupWeights;
}

}  // namespace dsv4::sm80
