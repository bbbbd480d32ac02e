// Adds what the pieces of the tokens have left (mhc_backward_streams.h), in ascending order and in two floats: a thread
// has four neighbours of the gradient of fn or of the norm's weight, or one element of those of base and scale. 16
// bytes a thread and access: bound by bandwidth.
#pragma once

#include "cuda/sm80/mhc_backward_tokens.h"

namespace dsv4::sm80 {

struct MhcSumArguments {
  const float *fn_sums, *norm_sums, *rest_sums;  // as in StreamArguments
  View<float, 2> grad_fn;                        // [mixes, 4 D], or none
  View<float, 1> grad_scale, grad_base;
  View<float, 1> grad_norm_weight;  // [D], or without data
  int64_t pieces, mixes, hidden;
  bool vector_fn, vector_norm;
};

// The sums of four neighbours over the pieces, `stride` floats apart.
DSV4_DEVICE Words4 sum_pieces(const float* sums, int64_t stride, int64_t pieces) {
  TwoFloats sum[4] = {};
  for (int64_t piece = 0; piece < pieces; ++piece) {
    float value[4];
    unpack(ptx::load_global_16(sums + piece * stride), value);
    DSV4_UNROLL
    for (int i = 0; i < 4; ++i) sum[i] = add(sum[i], value[i]);
  }
  const float total[4] = {nearest(sum[0]), nearest(sum[1]), nearest(sum[2]), nearest(sum[3])};
  return pack(total);
}

inline constexpr int kMhcSumThreads = 256;

// Threads of the grid: four elements of grad_fn each, then of grad_norm_weight, then one of grad_base or grad_scale.
DSV4_DEVICE void add_pieces(const MhcSumArguments& a) {
  const int64_t width = kStreams * a.hidden, fn_fours = a.grad_fn.given() ? a.mixes * a.hidden : 0;
  const int64_t norm_fours = a.grad_norm_weight.data == nullptr ? 0 : (a.hidden + 3) / 4;
  int64_t index = ptx::block_index_x() * kMhcSumThreads + ptx::thread_index();
  if (index < fn_fours) {
    const Words4 total = sum_pieces(a.fn_sums + index * 4, a.mixes * width, a.pieces);
    float* row = a.grad_fn.data + index / a.hidden * a.grad_fn.stride[0];
    store_piece(row, index % a.hidden * 4, width, a.vector_fn, total);
    return;
  }
  index -= fn_fours;
  if (index < norm_fours) {
    const Words4 total = sum_pieces(a.norm_sums + index * 4, norm_fours * 4, a.pieces);
    store_piece(a.grad_norm_weight.data, index * 4, a.hidden, a.vector_norm, total);
    return;
  }
  index -= norm_fours;
  const bool is_base = index < a.mixes;
  if (!is_base && (index < kSummedScales || index >= kSummedScales + a.grad_scale.shape[0])) return;
  TwoFloats sum = {0.0f, 0.0f};
  for (int64_t piece = 0; piece < a.pieces; ++piece) {
    const float* part = a.rest_sums + (piece * kSummed + index) * 2;
    sum = add(sum, {part[0], part[1]});
  }
  if (is_base) {
    a.grad_base.data[index * a.grad_base.stride[0]] = nearest(sum);
  } else {
    a.grad_scale.data[(index - kSummedScales) * a.grad_scale.stride[0]] = nearest(sum);
  }
}

}  // namespace dsv4::sm80
