// The end of a row: what its sums are divided by, its lse, the rotation undone, and what is kept of a split.
#pragma once

#include "cuda/sm80/attention_keys.h"

namespace dsv4::sm80 {

inline constexpr int kGroupHeads = 16;  // of a block, or half of one

// What the sums of a head are divided by, and its lse. A head whose row has no key has a total of 0; of any other it is
// at least 1, or NaN.
struct HeadEnd {
  float divisor, lse;

  DSV4_DEVICE HeadEnd(float most, float total, float sink) {
    if (total == 0.0f) {
      divisor = 1.0f;
      lse = INFINITY;
    } else {
      divisor = ptx::add(total, ptx::exponential(ptx::add(sink, -most)));
      lse = ptx::add(most, ptx::logarithm(total));
    }
  }

  DSV4_DEVICE void write_lse(const AttentionArguments& a, int64_t row, int64_t head) const {
    const AnyView<2>& to = a.params.lse;
    if (head < a.heads) static_cast<float*>(to.data)[row * to.stride[0] + head] = lse;
  }
};

DSV4_DEVICE float sink_of(const AttentionArguments& a, int64_t head) {
  return head < a.heads ? static_cast<const float*>(a.params.sink.data)[head * a.params.sink.stride[0]] : 0.0f;
}

// Two neighbouring dims of a result, rounded to X.
template <class X>
struct OutPair;

template <>
struct OutPair<bf16> {
  uint32_t bits;
  DSV4_DEVICE OutPair(float even, float odd) : bits(ptx::pack_bf16(even, odd)) {}
  DSV4_DEVICE float even() const { return ptx::low_bf16(bits); }
  DSV4_DEVICE float odd() const { return ptx::high_bf16(bits); }
  DSV4_DEVICE void store(bf16* to, bool whole) const {
    if (whole) {
      ptx::store_global_4(to, bits);
    } else {
      to[0] = bf16{static_cast<uint16_t>(bits)};
      to[1] = bf16{static_cast<uint16_t>(bits >> 16)};
    }
  }
};

template <>
struct OutPair<float> {
  float low, high;
  DSV4_DEVICE OutPair(float even, float odd) : low(even), high(odd) {}
  DSV4_DEVICE float even() const { return low; }
  DSV4_DEVICE float odd() const { return high; }
  DSV4_DEVICE void store(float* to, bool whole) const {
    if (whole) {
      ptx::store_global_8(to, ptx::Words2{{bits_from_float(low), bits_from_float(high)}});
    } else {
      to[0] = low;
      to[1] = high;
    }
  }
};

// The rotation that two dims have undergone, if any.
struct Turn {
  bool given;
  float cosine, sine;
};

// A row of out.
template <class X>
struct RowOut {
  X* data;
  const float* angles;
  int64_t head_stride;
  int rotated;  // the first dim that is
  bool paired;

  DSV4_DEVICE RowOut(const AttentionArguments& a, int64_t row) {
    const AnyView<3>&out = a.params.out, &rope = a.params.rope;
    const int pairs = rope.given() ? static_cast<int>(rope.shape[1]) : 0;
    data = static_cast<X*>(out.data) + row * out.stride[0];
    angles = static_cast<const float*>(rope.data) + (pairs > 0 ? row * rope.stride[0] : 0);
    head_stride = out.stride[1];
    rotated = a.head_dim - 2 * pairs;
    paired = a.paired_out;
  }

  DSV4_DEVICE Turn turn(int dim) const {
    if (dim < rotated) return {false, 1.0f, 0.0f};
    return {true, angles[dim - rotated], angles[dim - rotated + 1]};
  }

  // Two dims of a head, rounded; turned back, and rounded again.
  DSV4_DEVICE void write(int64_t head, int dim, const Turn& turn, float even, float odd) const {
    OutPair<X> pair(even, odd);
    if (turn.given) {
      const float e = pair.even(), o = pair.odd();
      pair = OutPair<X>(ptx::add(ptx::multiply(e, turn.cosine), ptx::multiply(o, turn.sine)),
                        ptx::add(ptx::multiply(o, turn.cosine), -ptx::multiply(e, turn.sine)));
    }
    pair.store(data + head * head_stride + dim, paired);
  }
};

// Divides sums of a group's heads, eights of dims from first_dim on, and writes them to a row's out. Of each eight a
// lane has heads lane / 4 and 8 more, dims lane % 4 * 2 and the next. divisor: of the two heads.
template <class X, int kEights>
DSV4_DEVICE void write_sums(const AttentionArguments& a, int64_t row, int64_t first_head, int first_dim,
                            const float (&sum)[kEights][4], int eights, const float (&divisor)[2]) {
  const int lane = ptx::thread_index() % 32;
  const RowOut<X> out(a, row);
  DSV4_UNROLL
  for (int i = 0; i < kEights; ++i) {
    const int dim = first_dim + 8 * i + lane % 4 * 2;
    if (i >= eights || dim >= a.head_dim) continue;
    const Turn turn = out.turn(dim);
    DSV4_UNROLL
    for (int half = 0; half < 2; ++half) {
      const int64_t head = first_head + lane / 4 + 8 * half;
      if (head >= a.heads) continue;
      out.write(head, dim, turn, ptx::divide(sum[i][2 * half], divisor[half]),
                ptx::divide(sum[i][2 * half + 1], divisor[half]));
    }
  }
}

// A split's result, float32: the greatest scores of its 16 heads, their totals, and the sums, eight dims after eight,
// as a warp's lanes have them.
DSV4_HOST_DEVICE int64_t partial_floats(int slice) { return 2 * kGroupHeads + static_cast<int64_t>(slice) * 64; }

DSV4_DEVICE float* partial_of(const AttentionArguments& a, int64_t row, int64_t split, int64_t group) {
  return a.partial + (((row - a.first_row) * a.splits + split) * a.groups + group) * partial_floats(a.slice);
}

// In a split's result the place of a lane's sums of eight dims: of heads lane / 4 and 8 more, of dims lane % 4 * 2 and
// the next.
DSV4_DEVICE int partial_sum(int eight, int lane) { return 2 * kGroupHeads + (eight * 32 + lane) * 4; }

// The place of two neighbouring dims of a head of the group.
DSV4_DEVICE int partial_pair(int head, int dim) {
  return partial_sum(dim / 8, head % 8 * 4 + dim % 8 / 2) + head / 8 * 2;
}

}  // namespace dsv4::sm80
