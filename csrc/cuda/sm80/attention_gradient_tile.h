// A row's gradient on tensor cores: as attention_tile.h, for one or two groups of 16 heads. Keys are multiplied by the
// queries and by G, whose fragments a warp keeps in registers, twice: first for the sums over the row, then for the
// weights, which are rounded to bfloat16 for d query and for the keys' gradients.
//
// In shared memory: two tiles of 32 keys, and whether each counts; the four parts of the scores and of the products
// with G, of which the first give way to the weights.
#pragma once

#include "cuda/sm80/attention_gradient.h"
#include "cuda/sm80/attention_tile.h"

namespace dsv4::sm80 {

// FP8 rows have no gradient and are rarely differentiated through; the registers are needed for G.
struct GradientTile : Bf16Tile {
  static constexpr int kAhead = 0;
};

template <int kGroups>
struct GradientShared : TilePair<GradientTile> {
  using Area = ScoreArea<kGroups * kGroupHeads>;
  Area scores, reaches;

  DSV4_DEVICE explicit GradientShared(const AttentionArguments& a) : TilePair<GradientTile>(a) {
    scores.start = end();
    reaches.start = scores.start + Area::kBytes;
  }
  static constexpr int bytes(int tile_row) { return TilePair<GradientTile>::bytes(tile_row) + 2 * Area::kBytes; }
};

struct GradientPart : WarpPart {
  uint32_t grad[kSteps][4];  // G, as query

  DSV4_DEVICE void load_grad(const AttentionGradientArguments& g, int64_t row) {
    const GradientTurn<bf16> turns(g.call, row);
    DSV4_UNROLL
    for (int i = 0; i < kSteps; ++i) {
      DSV4_UNROLL
      for (int j = 0; j < 4; ++j) {
        const int dim = dim_of(i, j);
        grad[i][j] = load_pair(g.call, g.grad_out, g.paired_grad_out, row, head_of(j), dim, i < steps);
        if (i < steps && dim < g.call.head_dim) {
          grad[i][j] = turns.turn(dim, ptx::low_bf16(grad[i][j]), ptx::high_bf16(grad[i][j])).bits;
        }
      }
    }
  }

  // Queries and G for the keys' kernel, zeros past the heads and dims that exist.
  DSV4_DEVICE void store_operands(const AttentionGradientArguments& g, int64_t index, int64_t at) const {
    if (!exists(g.call)) return;
    DSV4_UNROLL
    for (int i = 0; i < kSteps; ++i) {
      if (i >= steps) break;
      DSV4_UNROLL
      for (int j = 0; j < 4; ++j) {
        const int operand = static_cast<int>(head_of(j) - first_head);
        ptx::store_global_4(operand_of<bf16>(g, index, at, operand) + dim_of(i, j), query[i][j]);
        ptx::store_global_4(operand_of<bf16>(g, index, at, kGroupHeads + operand) + dim_of(i, j), grad[i][j]);
      }
    }
    const int missing = static_cast<int>(g.wide_dim - g.call.padded_dim) / 2;
    for (int word = 32 * part + lane; word < kGroupWeights * missing; word += 32 * kGroupWarps) {
      bf16* to = operand_of<bf16>(g, index, at, word / missing) + g.call.padded_dim;
      ptx::store_global_4(to + word % missing * 2, 0);
    }
  }

  // Products of the tile's keys with queries and G over this warp's dims, into its parts.
  template <int kGroups>
  DSV4_DEVICE void multiply(const AttentionArguments& a, const GradientShared<kGroups>& shared, uint32_t tile) const {
    float scores[kTileKeys / 8][4] = {}, reaches[kTileKeys / 8][4] = {};
    each_keys(a, tile, [&](int i, int half, const uint32_t (&keys)[4]) {
      ptx::mma_m16n8k16(scores[2 * half], query[i], keys[0], keys[1]);
      ptx::mma_m16n8k16(scores[2 * half + 1], query[i], keys[2], keys[3]);
      ptx::mma_m16n8k16(reaches[2 * half], grad[i], keys[0], keys[1]);
      ptx::mma_m16n8k16(reaches[2 * half + 1], grad[i], keys[2], keys[3]);
    });
    shared.scores.store(part, group * kGroupHeads, scores);
    shared.reaches.store(part, group * kGroupHeads, reaches);
  }

  // Adds four keys of one of four heads to its sums.
  template <int kGroups>
  DSV4_DEVICE void add(const AttentionGradientArguments& g, const GradientShared<kGroups>& shared, uint32_t counts,
                       HeadGradient& head) const {
    float score[4], reach[4];
    const Words4 count = gather(shared, counts, score, reach);
    DSV4_UNROLL
    for (int i = 0; i < 4; ++i) head.add(g, score[i], reach[i], count.word[i] != 0);
  }

  // Their weights, in place of their products.
  template <int kGroups>
  DSV4_DEVICE void weigh(const AttentionGradientArguments& g, const GradientShared<kGroups>& shared, uint32_t counts,
                         const HeadGradient& head) const {
    float score[4], reach[4], of_query[4], of_grad[4];
    const Words4 count = gather(shared, counts, score, reach);
    DSV4_UNROLL
    for (int i = 0; i < 4; ++i) head.weigh(g, score[i], reach[i], count.word[i] != 0, of_query[i], of_grad[i]);
    ptx::sync_warp();  // the lanes have read the products that the weights replace
    shared.scores.store_weights(head_of_block(), lane % 8, of_query);
    shared.reaches.store_weights(head_of_block(), lane % 8, of_grad);
  }

  // A quarter of the tile's weights, key by key, for the keys' kernel.
  template <int kGroups>
  DSV4_DEVICE void store_weights(const AttentionGradientArguments& g, const GradientShared<kGroups>& shared,
                                 int64_t index, int64_t run, int64_t tile) const {
    const auto& area = lane < 16 ? shared.scores : shared.reaches;
    uint32_t weights[4];  // of heads 2 (lane % 4) and the next, eight on, and the same of G; key lane / 4
    ptx::ldmatrix_x4_transposed(weights, area.weight(group * kGroupHeads + lane % 16, part));
    if (!exists(g.call)) return;
    bf16* to = weights_of<bf16>(g, index, run * kGroups + group, tile * kTileKeys + 8 * part + lane / 4);
    DSV4_UNROLL
    for (int i = 0; i < 4; ++i) ptx::store_global_4(to + 8 * i + lane % 4 * 2, weights[i]);
  }

  // block_head: the block's first, the same in all threads. Addresses start from it: those of the queries, worked out
  // before, would be kept in registers until now.
  DSV4_DEVICE void write(const AttentionGradientArguments& g, int64_t row, int64_t block_head) const {
    const AnyView<3>& to = g.grad_query;
    DSV4_UNROLL
    for (int half = 0; half < 2; ++half) {
      const int head = group * kGroupHeads + lane / 4 + 8 * half, first = first_dim + lane % 4 * 2;
      if (block_head + head >= g.call.heads) continue;
      bf16* heads = static_cast<bf16*>(to.data) + row * to.stride[0] + block_head * to.stride[1];
      bf16* dims = heads + head * to.stride[1] + first;
      DSV4_UNROLL
      for (int i = 0; i < 2 * kSteps; ++i) {
        if (i >= 2 * steps || first + 8 * i >= g.call.head_dim) break;
        OutPair<bf16>(sum[i][2 * half], sum[i][2 * half + 1]).store(dims + 8 * i, g.paired_grad_query);
      }
    }
  }

 private:
  // Whether the row has this group; what it shares with the block's other one it computes all the same.
  DSV4_DEVICE bool exists(const AttentionArguments& a) const { return first_head < a.heads; }
  DSV4_DEVICE int head_of_block() const { return group * kGroupHeads + weighed_head(); }

  template <int kGroups>
  DSV4_DEVICE Words4 gather(const GradientShared<kGroups>& shared, uint32_t counts, float (&score)[4],
                            float (&reach)[4]) const {
    shared.scores.gather(head_of_block(), lane % 8, score);
    shared.reaches.gather(head_of_block(), lane % 8, reach);
    return ptx::load_shared_16(counts + static_cast<uint32_t>(lane % 8 * 16));
  }
};

// The gradient of a row's heads of a run of groups; index: of the row in this launch.
template <int kGroups>
DSV4_DEVICE void differentiate(const AttentionGradientArguments& g, int64_t index, int64_t run) {
  constexpr int kThreads = 32 * kGroupWarps * kGroups;
  const AttentionArguments& a = g.call;
  const int64_t row = a.first_row + index;
  AttentionRow keys;
  keys.load(a, row);
  const GradientShared<kGroups> shared(a);
  GradientPart warp;
  warp.locate(a, run * kGroups);
  warp.clear();
  warp.load_query(a, row);
  warp.load_grad(g, row);
  if (g.keys_wanted()) warp.store_operands(g, index, run * kGroups + warp.group);
  HeadGradient head;
  head.load(g, row, warp.first_head + warp.weighed_head());
  const int64_t tiles = (keys.slots + kTileKeys - 1) / kTileKeys;
  walk_tiles<GradientTile, kThreads>(a, keys, 0, tiles, shared, [&](int64_t tile) {
    warp.multiply(a, shared, shared.tile(tile));
    ptx::sync_threads();  // all parts of the products are there
    warp.add(g, shared, shared.count(tile), head);
  });
  DSV4_UNROLL
  for (int distance = 1; distance < 8; distance *= 2) head.join(distance);
  const int64_t own = warp.first_head + warp.weighed_head();
  const float gate = head.close(g, row, own);
  if (warp.lane % 8 == 0 && own < a.heads) g.gates[row * a.heads + own] = gate;
  ptx::sync_threads();  // nobody reads what the second walk replaces
  walk_tiles<GradientTile, kThreads>(a, keys, 0, tiles, shared, [&](int64_t tile) {
    warp.multiply(a, shared, shared.tile(tile));
    ptx::sync_threads();  // as above
    warp.weigh(g, shared, shared.count(tile), head);
    ptx::sync_threads();  // and all weights
    if (g.keys_wanted()) warp.store_weights(g, shared, index, run, tile);
    warp.add_values(a, shared.scores, shared.tile(tile));  // d query
  });
  warp.write(g, row, run * kGroups * kGroupHeads);
}

}  // namespace dsv4::sm80
