// How the kernels that pool entries (compress_pool.h) are launched.
#pragma once

#include "cuda/sm80/compress.h"
#include "cuda/sm80/compress_pool.h"
#include "cuda/sm80/row_launch.h"

namespace dsv4::sm80 {

template <class Params>
bool whole_quads(const Params& p) {
  return p.norm_weight.size(0) % 4 == 0 && in_pieces(p.kv) && in_pieces(p.gate) && in_pieces(p.ape);
}

inline int power_of_two(int64_t least) {
  int power = 1;
  while (power < least) power *= 2;
  return power;
}

// Keys of which a lane turns more than eight dims, in many registers.
inline bool wide_keys(int64_t dim, bool rotate) { return rotate && dim > 32 * 8; }

// Threads by channels and positions; at least a warp. The gradient's blocks are the forward pass's, though it turns no
// keys while it pools: an entry's sums have one order.
inline void cut_block(CompressArguments& a, bool rotate) {
  const int most_threads = wide_keys(a.dim, rotate) ? kWideKeyThreads : kPoolThreads;
  a.quads = power_of_two((a.dim + 3) / 4 < most_threads ? (a.dim + 3) / 4 : most_threads);
  const int64_t batches = (a.pooled + kPoolBatch - 1) / kPoolBatch;
  const int most = most_threads / a.quads;
  a.groups = batches < most ? power_of_two(batches) : most;
  while (a.quads * a.groups < 32) a.quads *= 2;
  a.threads = a.quads * a.groups;
}

// What the ops have in common; places, sequences, state and ring are still to be set.
template <class Params>
CompressArguments arguments_of(const Params& p) {
  const int64_t dim = p.norm_weight.size(0);
  CompressArguments a = {};
  a.params.kv = p.kv, a.params.gate = p.gate, a.params.ape = p.ape;
  a.params.norm_weight = p.norm_weight, a.params.rope = p.rope;
  a.weight = norm_weight(p.norm_weight);
  a.tokens = p.kv.size(0);
  a.eps = two_floats(p.eps);
  a.hadamard = hadamard_scale(dim);
  a.dim = static_cast<int>(dim);
  a.pooled = static_cast<int>(p.kv.size(1) / dim * p.ratio);
  a.lanes = row_lanes(dim);
  a.ratio = Divisor(static_cast<uint32_t>(p.ratio));
  a.vector_rope = whole_turns(p.rope, dim);
  return a;
}

}  // namespace dsv4::sm80
