// A row's gradient in float32, where tensor cores have none: as attention_lanes.h. A warp has two heads; their queries
// and G are the four vectors that a key is multiplied by, so that lanes whose number has bit 1 set end with the product
// of a key and G, the others with its score, and two such lanes tell each other. Twice, as on tensor cores.
//
// In shared memory: two tiles of 16 keys, and whether each counts; of each warp, the weights [16 keys, 4 vectors].
#pragma once

#include "cuda/sm80/attention_gradient.h"
#include "cuda/sm80/attention_lanes.h"

namespace dsv4::sm80 {

inline constexpr int kGradientLaneHeads = 2;
inline constexpr int kGradientLaneWarps = kGroupHeads / kGradientLaneHeads;
inline constexpr int kGradientLaneThreads = 32 * kGradientLaneWarps;

struct GradientLanesShared : TilePair<F32Tile> {
  static constexpr int kWarpBytes = F32Tile::kKeys * kLaneHeads * 4;
  uint32_t weights;

  DSV4_DEVICE GradientLanesShared(const AttentionArguments& a, int warp) : TilePair<F32Tile>(a) {
    weights = end() + static_cast<uint32_t>(warp * kWarpBytes);
  }
  static constexpr int bytes(int tile_row) {
    return TilePair<F32Tile>::bytes(tile_row) + kGradientLaneWarps * kWarpBytes;
  }
};

template <class X>
struct GradientHeads {
  int lane, first;     // first: of its heads, in the group
  int64_t first_head;  // the same of all heads
  int steps;
  LaneVectors vectors;  // queries of both heads, then G
  float sum[kLaneSteps][kGradientLaneHeads][kLaneDims];

  DSV4_DEVICE void locate(const AttentionArguments& a, int64_t group) {
    lane = ptx::thread_index() % 32;
    first = ptx::thread_index() / 32 * kGradientLaneHeads;
    first_head = group * kGroupHeads + first;
    steps = lane_steps(a);
    DSV4_UNROLL
    for (int i = 0; i < kLaneSteps * kLaneDims; ++i) {
      DSV4_UNROLL
      for (int h = 0; h < kGradientLaneHeads; ++h) sum[i / kLaneDims][h][i % kLaneDims] = 0.0f;
    }
  }

  // The head whose keys this lane has.
  DSV4_DEVICE int64_t own_head() const { return first_head + lane % kGradientLaneHeads; }

  DSV4_DEVICE void load(const AttentionGradientArguments& g, int64_t row) {
    const GradientTurn<X> turns(g.call, row);
    DSV4_UNROLL
    for (int s = 0; s < kLaneSteps; ++s) {
      DSV4_UNROLL
      for (int h = 0; h < kGradientLaneHeads; ++h) {
        DSV4_UNROLL
        for (int d = 0; d < kLaneDims; d += 2) {
          const int dim = lane_dim(s) + d;
          float *query = &vectors[s][h][d], *grad = &vectors[s][kGradientLaneHeads + h][d];
          query[0] = query[1] = grad[0] = grad[1] = 0.0f;
          if (first_head + h >= g.call.heads || dim >= g.call.head_dim) continue;
          read(g.call.params.query, row, first_head + h, dim, query);
          read(g.grad_out, row, first_head + h, dim, grad);
          const OutPair<X> turned = turns.turn(dim, grad[0], grad[1]);
          grad[0] = turned.even();
          grad[1] = turned.odd();
        }
      }
    }
  }

  // For the keys' kernel, zeros past the heads and dims that exist.
  DSV4_DEVICE void store_operands(const AttentionGradientArguments& g, int64_t index, int64_t group) const {
    DSV4_UNROLL
    for (int s = 0; s < kLaneSteps; ++s) {
      if (lane_dim(s) >= g.wide_dim) continue;
      DSV4_UNROLL
      for (int v = 0; v < kLaneHeads; ++v) {
        Words4 dims;
        DSV4_UNROLL
        for (int d = 0; d < kLaneDims; ++d) dims.word[d] = bits_from_float(vectors[s][v][d]);
        ptx::store_global_16(operand_of<float>(g, index, group, place_of(v)) + lane_dim(s), dims);
      }
    }
  }

  // Products of a tile's keys: of key lane / 4 and of that eight on, with this lane's head and its G.
  DSV4_DEVICE void multiply(const AttentionArguments& a, const GradientLanesShared& shared, int64_t tile,
                            float (&score)[2], float (&reach)[2]) const {
    DSV4_UNROLL_IF(false)
    for (int half = 0; half < 2; ++half) {
      const float mine = multiply_keys(a, shared.tile(tile), half * kLaneKeys, steps, vectors);
      const float other = ptx::shuffle_xor(mine, kGradientLaneHeads);
      const bool of_grad = (lane & kGradientLaneHeads) != 0;
      const float s = of_grad ? other : mine, r = of_grad ? mine : other;
      score[0] = half == 0 ? s : score[0];
      reach[0] = half == 0 ? r : reach[0];
      score[1] = s;
      reach[1] = r;
    }
  }

  static DSV4_DEVICE bool counts(const GradientLanesShared& shared, int64_t tile, int key) {
    return ptx::load_shared_float(shared.count(tile) + static_cast<uint32_t>(key * 4)) != 0.0f;
  }

  DSV4_DEVICE int key_of(int half) const { return half * kLaneKeys + lane / kLaneHeads; }

  DSV4_DEVICE void add(const AttentionGradientArguments& g, const GradientLanesShared& shared, int64_t tile,
                       HeadGradient& head) const {
    float score[2] = {}, reach[2] = {};
    multiply(g.call, shared, tile, score, reach);
    DSV4_UNROLL
    for (int half = 0; half < 2; ++half) head.add(g, score[half], reach[half], counts(shared, tile, key_of(half)));
  }

  // The tile's weights, for d query and, if `to` is given, for the keys' kernel: of the group, from the tile's first
  // slot on.
  DSV4_DEVICE void weigh(const AttentionGradientArguments& g, const GradientLanesShared& shared, int64_t tile,
                         const HeadGradient& head, float* to) const {
    float score[2] = {}, reach[2] = {};
    multiply(g.call, shared, tile, score, reach);
    DSV4_UNROLL
    for (int half = 0; half < 2; ++half) {
      float of_query, of_grad;
      head.weigh(g, score[half], reach[half], counts(shared, tile, key_of(half)), of_query, of_grad);
      const float mine = (lane & kGradientLaneHeads) != 0 ? of_grad : of_query;
      ptx::store_shared_float(shared.weights + static_cast<uint32_t>((half * 32 + lane) * 4), mine);
      if (to != nullptr) to[key_of(half) * kGroupWeights + place_of(lane % kLaneHeads)] = mine;
    }
  }

  // Adds the tile's keys, weighed, to d query.
  DSV4_DEVICE void accumulate(const AttentionArguments& a, const GradientLanesShared& shared, int64_t tile) {
    DSV4_UNROLL_IF(false)
    for (int key = 0; key < F32Tile::kKeys; ++key) {
      const Words4 weight = ptx::load_shared_16(shared.weights + static_cast<uint32_t>(key * kLaneHeads * 4));
      DSV4_UNROLL
      for (int s = 0; s < kLaneSteps; ++s) {
        if (s >= steps) break;
        const Words4 value = dims_of_key(a, shared.tile(tile), key, s);
        DSV4_UNROLL
        for (int h = 0; h < kGradientLaneHeads; ++h) {
          DSV4_UNROLL
          for (int d = 0; d < kLaneDims; ++d) {
            sum[s][h][d] = ptx::fma(float_from_bits(weight.word[h]), float_from_bits(value.word[d]), sum[s][h][d]);
          }
        }
      }
    }
  }

  DSV4_DEVICE void write(const AttentionGradientArguments& g, int64_t row) const {
    const AnyView<3>& view = g.grad_query;
    DSV4_UNROLL
    for (int h = 0; h < kGradientLaneHeads; ++h) {
      if (first_head + h >= g.call.heads) continue;
      X* to = static_cast<X*>(view.data) + row * view.stride[0] + (first_head + h) * view.stride[1];
      DSV4_UNROLL
      for (int s = 0; s < kLaneSteps; ++s) {
        DSV4_UNROLL
        for (int d = 0; d < kLaneDims; d += 2) {
          const int dim = lane_dim(s) + d;
          if (dim >= g.call.head_dim) continue;
          OutPair<X>(sum[s][h][d], sum[s][h][d + 1]).store(to + dim, g.paired_grad_query);
        }
      }
    }
  }

 private:
  // Where a vector, or its weight, stands among the group's 32.
  DSV4_DEVICE int place_of(int vector) const {
    return vector / kGradientLaneHeads * kGroupHeads + first + vector % kGradientLaneHeads;
  }

  static DSV4_DEVICE void read(const AnyView<3>& view, int64_t row, int64_t head, int dim, float* to) {
    const X* from = static_cast<const X*>(view.data) + row * view.stride[0] + head * view.stride[1] + dim;
    to[0] = to_float(from[0]);
    to[1] = to_float(from[1]);
  }
};

// The gradient of a row's group of heads; index: of the row in this launch.
template <class X>
DSV4_DEVICE void differentiate_in_lanes(const AttentionGradientArguments& g, int64_t index, int64_t group) {
  const AttentionArguments& a = g.call;
  const int64_t row = a.first_row + index;
  AttentionRow keys;
  keys.load(a, row);
  GradientHeads<X> heads;
  heads.locate(a, group);
  heads.load(g, row);
  if (g.keys_wanted()) heads.store_operands(g, index, group);
  const GradientLanesShared shared(a, heads.first / kGradientLaneHeads);
  HeadGradient head;
  head.load(g, row, heads.own_head());
  const int64_t tiles = (keys.slots + F32Tile::kKeys - 1) / F32Tile::kKeys;
  walk_tiles<F32Tile, kGradientLaneThreads>(a, keys, 0, tiles, shared,
                                            [&](int64_t tile) { heads.add(g, shared, tile, head); });
  DSV4_UNROLL
  for (int distance = kLaneHeads; distance < 32; distance *= 2) head.join(distance);
  const float gate = head.close(g, row, heads.own_head());
  if (heads.lane < kGradientLaneHeads && heads.own_head() < a.heads) g.gates[row * a.heads + heads.own_head()] = gate;
  ptx::sync_threads();  // nobody reads what the second walk replaces
  walk_tiles<F32Tile, kGradientLaneThreads>(a, keys, 0, tiles, shared, [&](int64_t tile) {
    float* to = g.keys_wanted() ? weights_of<float>(g, index, group, tile * F32Tile::kKeys) : nullptr;
    heads.weigh(g, shared, tile, head, to);
    ptx::sync_warp();  // the weights of all keys and vectors are there
    heads.accumulate(a, shared, tile);
  });
  heads.write(g, row);
}

}  // namespace dsv4::sm80
