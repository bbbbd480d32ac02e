// The pooling of an entry: a block's threads are `groups` groups of `quads` threads; a thread takes four neighbouring
// channels and its group's share of the entry's positions, four at a time, all twelve loads on their way at once. The
// softmax is one pass: when a larger gate comes, what has been summed is scaled down. Groups are joined in their order.
// Sizes and orders depend on dims, ratio and overlap alone.
#pragma once

#include "cuda/sm80/divisor.h"
#include "cuda/sm80/hadamard_row.h"
#include "cuda/sm80/page_rows.h"
#include "cuda/sm80/row_norms.h"
#include "ops/compress.h"

namespace dsv4::sm80 {

inline constexpr int kPoolThreads = 512;
inline constexpr int kWideKeyThreads = 256;  // of keys that fill many registers
inline constexpr int kPoolBatch = 4;         // positions
inline constexpr float kNoGate = -INFINITY;

struct CompressArguments {
  CompressParams params;
  PagePlaces places;
  NormWeight weight;
  TwoFloats eps;
  HadamardScale hadamard;
  int64_t tokens, blocks;
  int rows_per_block;
  int dim, pooled;  // positions of an entry, whether they exist or not
  int quads, groups, threads;
  int lanes;  // of the finished row
  Divisor ratio, ring;
  bool whole;  // one sequence from position 0, see compress_entries: no sequence, position, state and table
  bool vector, vector_rope, vector_place;
};

// A thread's channels, over the positions that it has seen.
struct PoolSum {
  float most[4], weight[4], value[4];

  DSV4_DEVICE void clear() {
    DSV4_UNROLL
    for (int c = 0; c < 4; ++c) most[c] = kNoGate, weight[c] = value[c] = 0.0f;
  }
};

// Where one position's values lie.
struct PoolSource {
  const float *kv, *gate, *bias;
  bool exists, biased;
};

// The entry that row t completes, at position `at` of sequence `own`.
struct PoolEntry {
  int64_t t, own, at;

  // Position i, the oldest being 0. What does not exist points to memory that does.
  DSV4_DEVICE PoolSource source(const CompressArguments& a, int i, int end) const {
    const CompressParams& p = a.params;
    const bool within = i < end;
    if (!within) i = end - 1;
    const int back = a.pooled - 1 - i;
    const int64_t row = t - back, position = at - back;
    const int ratio = static_cast<int>(a.ratio.value());
    const bool second = i >= ratio;
    const int64_t channel = second ? a.dim : 0;
    PoolSource s;
    s.exists = within && position >= 0;
    const int64_t from = s.exists && row >= 0 ? row : t;
    const bool here =
        a.whole || (static_cast<const int32_t*>(p.sequence.data)[from * p.sequence.stride[0]] == own && row >= 0);
    s.biased = here;
    const int64_t slot = s.exists ? a.ring.divide(static_cast<uint32_t>(position)).rest : 0;
    const float* kept = p.state.data + own * p.state.stride[0] + slot * p.state.stride[1] + channel;
    s.kv = here ? p.kv.data + from * p.kv.stride[0] + channel : kept;
    s.gate = here ? p.gate.data + from * p.gate.stride[0] + channel : kept + p.state.stride[2];
    s.bias = p.ape.data + (second ? i - ratio : i) * p.ape.stride[0] + channel;
    return s;
  }
};

DSV4_DEVICE void load_quad(const float* from, int column, int dim, bool vector, float (&value)[4]) {
  unpack(load_piece(from, column, dim, vector), value);
}

// Adds the positions [first, first + kPoolBatch) below `end`, channels from `column` on.
DSV4_DEVICE void pool_batch(const CompressArguments& a, const PoolEntry& entry, int first, int end, int column,
                            PoolSum& sum) {
  float gate[kPoolBatch][4], value[kPoolBatch][4];
  float bias[kPoolBatch][4];
  bool exists[kPoolBatch], biased[kPoolBatch];
  DSV4_UNROLL
  for (int i = 0; i < kPoolBatch; ++i) {
    const PoolSource s = entry.source(a, first + i, end);
    load_quad(s.gate, column, a.dim, a.vector, gate[i]);
    load_quad(s.bias, column, a.dim, a.vector, bias[i]);
    load_quad(s.kv, column, a.dim, a.vector, value[i]);
    exists[i] = s.exists;
    biased[i] = s.biased;
  }
  DSV4_UNROLL
  for (int c = 0; c < 4; ++c) {
    float most = sum.most[c];
    DSV4_UNROLL
    for (int i = 0; i < kPoolBatch; ++i) {
      const float whole = biased[i] ? ptx::add(gate[i][c], bias[i][c]) : gate[i][c];
      gate[i][c] = exists[i] ? whole : kNoGate;
      most = ptx::maximum(most, gate[i][c]);
    }
    const float base = most == kNoGate ? 0.0f : most;  // -inf - -inf would be NaN
    const float scale = ptx::exponential(ptx::add(sum.most[c], -base));
    sum.most[c] = most;
    sum.weight[c] = ptx::multiply(sum.weight[c], scale);
    sum.value[c] = ptx::multiply(sum.value[c], scale);
    DSV4_UNROLL
    for (int i = 0; i < kPoolBatch; ++i) {
      const float weight = ptx::exponential(ptx::add(gate[i][c], -base));
      sum.weight[c] = ptx::add(sum.weight[c], weight);
      sum.value[c] = ptx::fma(weight, exists[i] ? value[i][c] : 0.0f, sum.value[c]);
    }
  }
}

// Shared memory: of each group, maxima, weights and values of all channels.
DSV4_DEVICE uint32_t pool_memory(const CompressArguments& a, int group, int part, int column) {
  return ptx::shared_base() + static_cast<uint32_t>(((group * 3 + part) * a.dim + column) * 4);
}

// Four channels from `column` on, as far as there are any.
DSV4_DEVICE void store_quad(const CompressArguments& a, int group, int part, int column, const float (&value)[4]) {
  const uint32_t to = pool_memory(a, group, part, column);
  if (a.dim % 4 == 0) {
    ptx::store_shared_16(to, pack(value));
    return;
  }
  DSV4_UNROLL
  for (int c = 0; c < 4; ++c) {
    if (column + c < a.dim) ptx::store_shared_float(to + static_cast<uint32_t>(4 * c), value[c]);
  }
}

// Every thread's sums of its channels to shared memory.
DSV4_DEVICE void pool_entry(const CompressArguments& a, const PoolEntry& entry) {
  const int group = ptx::thread_index() / a.quads, share = (a.pooled + a.groups - 1) / a.groups;
  const int begin = group * share, end = begin + share < a.pooled ? begin + share : a.pooled;
  for (int column = ptx::thread_index() % a.quads * 4; column < a.dim; column += 4 * a.quads) {
    PoolSum sum;
    sum.clear();
    for (int first = begin; first < end; first += kPoolBatch) pool_batch(a, entry, first, end, column, sum);
    store_quad(a, group, 0, column, sum.most);
    store_quad(a, group, 1, column, sum.weight);
    store_quad(a, group, 2, column, sum.value);
  }
}

// Of a channel, over all positions: what the largest gate was taken for, and the sums of weights and of weighed values.
struct JoinedPool {
  float base, weight, value;

  DSV4_DEVICE JoinedPool(const CompressArguments& a, int column) : weight(0.0f), value(0.0f) {
    float most = kNoGate;
    for (int g = 0; g < a.groups; ++g) most = ptx::maximum(most, ptx::load_shared_float(pool_memory(a, g, 0, column)));
    base = most == kNoGate ? 0.0f : most;
    for (int g = 0; g < a.groups; ++g) {
      const float scale = ptx::exponential(ptx::add(ptx::load_shared_float(pool_memory(a, g, 0, column)), -base));
      weight = ptx::fma(ptx::load_shared_float(pool_memory(a, g, 1, column)), scale, weight);
      value = ptx::fma(ptx::load_shared_float(pool_memory(a, g, 2, column)), scale, value);
    }
  }
  DSV4_DEVICE float mean() const { return ptx::divide(value, weight); }
};

// The groups' sums together, rounded to N, where the first group's maxima were.
template <class N>
DSV4_DEVICE void join_pools(const CompressArguments& a) {
  for (int column = ptx::thread_index(); column < a.dim; column += a.threads) {
    const JoinedPool pool(a, column);
    ptx::store_shared_float(pool_memory(a, 0, 0, column), rounded_to<N>(pool.mean()));
  }
}

// The pooled row in shared memory.
struct SharedRow {
  uint32_t data;
  int dim;

  DSV4_DEVICE float one(int column) const { return ptx::load_shared_float(data + static_cast<uint32_t>(4 * column)); }
  DSV4_DEVICE void eight(int column, float (&value)[8]) const {
    if (dim % 8 == 0 && column < dim) return load_shared_eight(data, column / 8, value);
    DSV4_UNROLL
    for (int e = 0; e < 8; ++e) value[e] = column + e < dim ? one(column + e) : 0.0f;
  }
};

}  // namespace dsv4::sm80
