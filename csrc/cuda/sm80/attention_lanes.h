// One tile's arithmetic in float32, where tensor cores have none. A warp has four heads and all dims, of every 128 four
// a lane, with its queries and sums in registers. Scores: a lane multiplies its dims of eight keys by four heads, and
// the 32 results are summed over the lanes by exchanging halves, so that each lane ends with the score of one key and
// head. Sums: numerators come back through shared memory, for each key four in one read. No warp waits for another but
// for the tile.
//
// In shared memory: two tiles of 16 keys, and whether each counts; of each warp, the numerators [16 keys, 4 heads] and
// the factors of the sums so far.
#pragma once

#include "cuda/sm80/attention_ends.h"
#include "cuda/sm80/attention_load.h"

namespace dsv4::sm80 {

inline constexpr int kLaneHeads = 4;
inline constexpr int kLaneDims = 4;
inline constexpr int kLaneSteps = kMaxHeadDim / (32 * kLaneDims);
inline constexpr int kLaneKeys = 32 / kLaneHeads;  // at once
inline constexpr int kLaneWarps = kGroupHeads / kLaneHeads;
static_assert(F32Tile::kKeys == 2 * kLaneKeys);

struct LanesShared : TilePair<F32Tile> {
  static constexpr int kFactors = F32Tile::kKeys * kLaneHeads * 4;
  static constexpr int kWarpBytes = kFactors + kLaneHeads * 4;
  uint32_t numerators;

  DSV4_DEVICE LanesShared(const AttentionArguments& a, int warp) : TilePair<F32Tile>(a) {
    numerators = end() + static_cast<uint32_t>(warp * kWarpBytes);
  }
  static constexpr int bytes(int tile_row) { return TilePair<F32Tile>::bytes(tile_row) + kLaneWarps * kWarpBytes; }
};

// The first of this lane's dims of a step of 128.
DSV4_DEVICE int lane_dim(int step) { return (32 * step + ptx::thread_index() % 32) * kLaneDims; }

// Steps of a head.
DSV4_DEVICE int lane_steps(const AttentionArguments& a) { return (a.head_dim + 32 * kLaneDims - 1) / (32 * kLaneDims); }

// This lane's dims of a key; zeros past its end.
DSV4_DEVICE Words4 dims_of_key(const AttentionArguments& a, uint32_t tile, int key, int step) {
  if (lane_dim(step) >= a.padded_dim) return Words4{};
  return ptx::load_shared_16(F32Tile::address(a, tile, key, 32 * step + ptx::thread_index() % 32));
}

// This lane's dims of four vectors.
using LaneVectors = float[kLaneSteps][kLaneHeads][kLaneDims];

// The product of key first_key + lane / 4 and vector lane % 4.
DSV4_DEVICE float multiply_keys(const AttentionArguments& a, uint32_t tile, int first_key, int steps,
                                const LaneVectors& vectors) {
  const int lane = ptx::thread_index() % 32;
  float product[32];  // key * 4 + vector
  DSV4_UNROLL
  for (int i = 0; i < 32; ++i) product[i] = 0.0f;
  DSV4_UNROLL
  for (int s = 0; s < kLaneSteps; ++s) {
    if (s >= steps) break;
    DSV4_UNROLL
    for (int i = 0; i < 32; i += kLaneHeads) {
      const Words4 key = dims_of_key(a, tile, first_key + i / kLaneHeads, s);
      DSV4_UNROLL
      for (int d = 0; d < kLaneDims; ++d) {
        DSV4_UNROLL
        for (int v = 0; v < kLaneHeads; ++v) {
          product[i + v] = ptx::fma(vectors[s][v][d], float_from_bits(key.word[d]), product[i + v]);
        }
      }
    }
  }
  DSV4_UNROLL
  for (int step = 0; step < 5; ++step) {
    const int mask = 16 >> step;
    const bool upper = (lane & mask) != 0;
    DSV4_UNROLL
    for (int i = 0; i < 16; ++i) {
      if (i >= mask) continue;
      const float kept = upper ? product[i + mask] : product[i], given = upper ? product[i] : product[i + mask];
      product[i] = ptx::add(kept, ptx::shuffle_xor(given, mask));
    }
  }
  return product[0];
}

template <class X>
struct WarpHeads {
  int lane, first;     // first: of its heads, in the group
  int64_t first_head;  // the same of all heads
  int steps;           // of 128 dims
  LaneVectors query, sum;
  float most, total;  // of head lane % 4: the greatest score; this lane's share of the numerators

  DSV4_DEVICE void locate(const AttentionArguments& a, int64_t group) {
    lane = ptx::thread_index() % 32;
    first = ptx::thread_index() / 32 * kLaneHeads;
    first_head = group * kGroupHeads + first;
    steps = lane_steps(a);
    most = -INFINITY;
    total = 0.0f;
    DSV4_UNROLL
    for (int i = 0; i < kLaneSteps * kLaneDims; ++i) {
      DSV4_UNROLL
      for (int h = 0; h < kLaneHeads; ++h) sum[i / kLaneDims][h][i % kLaneDims] = 0.0f;
    }
  }

  DSV4_DEVICE bool exist(const AttentionArguments& a) const { return first_head < a.heads; }

  DSV4_DEVICE void load_query(const AttentionArguments& a, int64_t row) {
    const AnyView<3>& from = a.params.query;
    const X* heads = static_cast<const X*>(from.data) + row * from.stride[0] + first_head * from.stride[1];
    DSV4_UNROLL
    for (int s = 0; s < kLaneSteps; ++s) {
      DSV4_UNROLL
      for (int h = 0; h < kLaneHeads; ++h) {
        DSV4_UNROLL
        for (int d = 0; d < kLaneDims; ++d) {
          const bool exists = first_head + h < a.heads && lane_dim(s) + d < a.head_dim;
          query[s][h][d] = exists ? to_float(heads[h * from.stride[1] + lane_dim(s) + d]) : 0.0f;
        }
      }
    }
  }

  // Adds a tile's keys.
  DSV4_DEVICE void add(const AttentionArguments& a, const LanesShared& shared, int64_t tile) {
    float score[2] = {};
    DSV4_UNROLL_IF(false)
    for (int half = 0; half < 2; ++half) {
      const float sum_of_dims = multiply_keys(a, shared.tile(tile), half * kLaneKeys, steps, query);
      score[0] = half == 0 ? sum_of_dims : score[0];
      score[1] = sum_of_dims;
    }
    weigh(a, shared, shared.count(tile), score);
    ptx::sync_warp();  // the numerators of all keys and heads are there
    accumulate(a, shared, shared.tile(tile));
  }

  // Adds the lanes' shares of a head's numerators: `total` becomes whole.
  DSV4_DEVICE void close() {
    DSV4_UNROLL
    for (int mask = kLaneHeads; mask < 32; mask *= 2) {
      total = ptx::add(total, ptx::shuffle_xor(total, mask));
    }
  }

  // What the split knows of these heads, for `combine`.
  DSV4_DEVICE void store(const AttentionArguments& a, float* partial) const {
    if (lane < kLaneHeads) {
      partial[first + lane] = most;
      partial[kGroupHeads + first + lane] = total;
    }
    DSV4_UNROLL
    for (int s = 0; s < kLaneSteps; ++s) {
      if (lane_dim(s) >= a.padded_dim) break;
      DSV4_UNROLL
      for (int h = 0; h < kLaneHeads; ++h) {
        DSV4_UNROLL
        for (int d = 0; d < kLaneDims; d += 2) {
          ptx::store_global_8(partial + partial_pair(first + h, lane_dim(s) + d),
                              ptx::Words2{{bits_from_float(sum[s][h][d]), bits_from_float(sum[s][h][d + 1])}});
        }
      }
    }
  }

  // Divides the sums and writes the row's out and lse.
  DSV4_DEVICE void write(const AttentionArguments& a, int64_t row) const {
    const int64_t own = first_head + lane % kLaneHeads;
    const HeadEnd end(most, total, sink_of(a, own));
    if (lane < kLaneHeads) end.write_lse(a, row, own);
    const RowOut<X> out(a, row);
    DSV4_UNROLL
    for (int h = 0; h < kLaneHeads; ++h) {
      const float divisor = ptx::shuffle(end.divisor, h);
      if (first_head + h >= a.heads) continue;
      DSV4_UNROLL
      for (int s = 0; s < kLaneSteps; ++s) {
        DSV4_UNROLL
        for (int d = 0; d < kLaneDims; d += 2) {
          const int dim = lane_dim(s) + d;
          if (dim >= a.head_dim) continue;
          out.write(first_head + h, dim, out.turn(dim), ptx::divide(sum[s][h][d], divisor),
                    ptx::divide(sum[s][h][d + 1], divisor));
        }
      }
    }
  }

 private:
  // The softmax: numerators, and what the sums so far are to be multiplied by. score: of keys lane / 4 and 8 more.
  DSV4_DEVICE void weigh(const AttentionArguments& a, const LanesShared& shared, uint32_t counts, float (&score)[2]) {
    DSV4_UNROLL
    for (int half = 0; half < 2; ++half) {
      const int key = half * kLaneKeys + lane / kLaneHeads;
      const bool counted = ptx::load_shared_float(counts + static_cast<uint32_t>(key * 4)) != 0.0f;
      score[half] = counted ? ptx::multiply(score[half], a.params.scale) : -INFINITY;
    }
    float greatest = ptx::maximum(score[0], score[1]);
    DSV4_UNROLL
    for (int mask = kLaneHeads; mask < 32; mask *= 2) {
      greatest = ptx::maximum(greatest, ptx::shuffle_xor(greatest, mask));
    }
    const float newest = ptx::maximum(most, greatest), base = newest == -INFINITY ? 0.0f : newest;
    const float factor = ptx::exponential(ptx::add(most, -base));
    score[0] = ptx::exponential(ptx::add(score[0], -base));
    score[1] = ptx::exponential(ptx::add(score[1], -base));
    most = newest;
    total = ptx::fma(total, factor, ptx::add(score[0], score[1]));
    const OutPair<X> rounded(score[0], score[1]);
    const uint32_t mine = shared.numerators + static_cast<uint32_t>(lane * 4);
    ptx::store_shared_float(mine, rounded.even());
    ptx::store_shared_float(mine + 32 * 4, rounded.odd());
    if (lane < kLaneHeads) ptx::store_shared_float(mine + LanesShared::kFactors, factor);
  }

  // Adds the tile's values, weighed, to the sums.
  DSV4_DEVICE void accumulate(const AttentionArguments& a, const LanesShared& shared, uint32_t tile) {
    const Words4 factor = ptx::load_shared_16(shared.numerators + LanesShared::kFactors);
    DSV4_UNROLL
    for (int h = 0; h < kLaneHeads; ++h) {
      DSV4_UNROLL
      for (int i = 0; i < kLaneSteps * kLaneDims; ++i) {
        float& so_far = sum[i / kLaneDims][h][i % kLaneDims];
        so_far = ptx::multiply(so_far, float_from_bits(factor.word[h]));
      }
    }
    DSV4_UNROLL_IF(false)
    for (int first_key = 0; first_key < F32Tile::kKeys; first_key += kLaneKeys) {
      Words4 weight[kLaneKeys];
      DSV4_UNROLL
      for (int k = 0; k < kLaneKeys; ++k) {
        weight[k] = ptx::load_shared_16(shared.numerators + static_cast<uint32_t>((first_key + k) * kLaneHeads * 4));
      }
      DSV4_UNROLL
      for (int s = 0; s < kLaneSteps; ++s) {
        if (s >= steps) break;
        DSV4_UNROLL
        for (int k = 0; k < kLaneKeys; ++k) {
          const Words4 value = dims_of_key(a, tile, first_key + k, s);
          DSV4_UNROLL
          for (int h = 0; h < kLaneHeads; ++h) {
            DSV4_UNROLL
            for (int d = 0; d < kLaneDims; ++d) {
              sum[s][h][d] = ptx::fma(float_from_bits(weight[k].word[h]), float_from_bits(value.word[d]), sum[s][h][d]);
            }
          }
        }
      }
    }
  }
};

}  // namespace dsv4::sm80
