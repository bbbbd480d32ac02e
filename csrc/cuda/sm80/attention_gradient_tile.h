// A row's gradient on tensor cores: as attention_tile.h, for one group of 16 heads. Keys are multiplied by the queries
// and by G, whose fragments a warp keeps in registers, twice: first for the sums over the row, then for the weights,
// which are rounded to bfloat16 for d query and for the keys' gradients.
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

struct GradientShared : TilePair<GradientTile> {
  ScoreArea<kGroupHeads> scores, reaches;

  DSV4_DEVICE explicit GradientShared(const AttentionArguments& a) : TilePair<GradientTile>(a) {
    scores.start = end();
    reaches.start = scores.start + ScoreArea<kGroupHeads>::kBytes;
  }
  static constexpr int bytes(int tile_row) {
    return TilePair<GradientTile>::bytes(tile_row) + 2 * ScoreArea<kGroupHeads>::kBytes;
  }
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
    DSV4_UNROLL
    for (int i = 0; i < kSteps; ++i) {
      if (i >= steps) break;
      DSV4_UNROLL
      for (int j = 0; j < 4; ++j) {
        const int operand = static_cast<int>(head_of(j) - first_head);
        store_word(operand_of<bf16>(g, index, at, operand) + dim_of(i, j), query[i][j]);
        store_word(operand_of<bf16>(g, index, at, kGroupHeads + operand) + dim_of(i, j), grad[i][j]);
      }
    }
    const int missing = static_cast<int>(g.wide_dim - g.call.padded_dim) / 2;
    for (int word = ptx::thread_index(); word < kGroupWeights * missing; word += 32 * kGroupWarps) {
      store_word(operand_of<bf16>(g, index, at, word / missing) + g.call.padded_dim + word % missing * 2, 0);
    }
  }

  // Products of the tile's keys with queries and G over this warp's dims, into its parts.
  DSV4_DEVICE void multiply(const AttentionArguments& a, const GradientShared& shared, uint32_t tile) const {
    float scores[kTileKeys / 8][4], reaches[kTileKeys / 8][4];
    DSV4_UNROLL
    for (int n = 0; n < kTileKeys / 8; ++n) {
      DSV4_UNROLL
      for (int j = 0; j < 4; ++j) scores[n][j] = reaches[n][j] = 0.0f;
    }
    DSV4_UNROLL
    for (int i = 0; i < kSteps; ++i) {
      if (i >= steps) break;
      DSV4_UNROLL
      for (int half = 0; half < 2; ++half) {
        uint32_t keys[4];
        const int key = 16 * half + lane / 16 * 8 + lane % 8, piece = first_dim / 8 + 2 * i + lane / 8 % 2;
        ptx::ldmatrix_x4(keys, Bf16Tile::address(a, tile, key, piece));
        ptx::mma_m16n8k16(scores[2 * half], query[i], keys[0], keys[1]);
        ptx::mma_m16n8k16(scores[2 * half + 1], query[i], keys[2], keys[3]);
        ptx::mma_m16n8k16(reaches[2 * half], grad[i], keys[0], keys[1]);
        ptx::mma_m16n8k16(reaches[2 * half + 1], grad[i], keys[2], keys[3]);
      }
    }
    shared.scores.store(part, 0, scores);
    shared.reaches.store(part, 0, reaches);
  }

  // Adds four keys of one of four heads to its sums.
  DSV4_DEVICE void add(const GradientShared& shared, uint32_t counts, HeadGradient& head) const {
    float score[4], reach[4];
    const Words4 count = gather(shared, counts, score, reach);
    DSV4_UNROLL
    for (int i = 0; i < 4; ++i) head.add(score[i], reach[i], count.word[i] != 0);
  }

  // Their weights, in place of their products.
  DSV4_DEVICE void weigh(const GradientShared& shared, uint32_t counts, const HeadGradient& head) const {
    float score[4], reach[4], of_query[4], of_grad[4];
    const Words4 count = gather(shared, counts, score, reach);
    DSV4_UNROLL
    for (int i = 0; i < 4; ++i) head.weigh(score[i], reach[i], count.word[i] != 0, of_query[i], of_grad[i]);
    ptx::sync_warp();  // the lanes have read the products that the weights replace
    shared.scores.store_weights(weighed_head(), lane % 8, of_query);
    shared.reaches.store_weights(weighed_head(), lane % 8, of_grad);
  }

  // Adds the tile's keys, weighed, to this warp's d query.
  DSV4_DEVICE void accumulate(const AttentionArguments& a, const GradientShared& shared, uint32_t tile) {
    uint32_t weights[2][4];  // of 16 heads, 16 keys
    DSV4_UNROLL
    for (int half = 0; half < 2; ++half) {
      ptx::ldmatrix_x4(weights[half], shared.scores.weight(lane % 16, 2 * half + lane / 16));
    }
    add_values(a, tile, weights);
  }

  // A quarter of the tile's weights, key by key, for the keys' kernel.
  DSV4_DEVICE void store_weights(const AttentionGradientArguments& g, const GradientShared& shared, int64_t index,
                                 int64_t at, int64_t tile) const {
    const ScoreArea<kGroupHeads>& area = lane < 16 ? shared.scores : shared.reaches;
    uint32_t weights[4];  // of heads 2 (lane % 4) and the next, eight on, and the same of G; key lane / 4
    ptx::ldmatrix_x4_transposed(weights, area.weight(lane % 16, part));
    bf16* to = weights_of<bf16>(g, index, at, tile * kTileKeys + 8 * part + lane / 4);
    DSV4_UNROLL
    for (int i = 0; i < 4; ++i) store_word(to + 8 * i + lane % 4 * 2, weights[i]);
  }

  DSV4_DEVICE void write(const AttentionGradientArguments& g, int64_t row) const {
    const AnyView<3>& to = g.grad_query;
    DSV4_UNROLL
    for (int i = 0; i < 2 * kSteps; ++i) {
      const int dim = first_dim + 8 * i + lane % 4 * 2;
      if (i >= 2 * steps || dim >= g.call.head_dim) continue;
      DSV4_UNROLL
      for (int half = 0; half < 2; ++half) {
        const int64_t head = first_head + lane / 4 + 8 * half;
        if (head >= g.call.heads) continue;
        OutPair<bf16>(sum[i][2 * half], sum[i][2 * half + 1])
            .store(static_cast<bf16*>(to.data) + row * to.stride[0] + head * to.stride[1] + dim, g.paired_grad_query);
      }
    }
  }

 private:
  static DSV4_DEVICE void store_word(bf16* to, uint32_t word) { *reinterpret_cast<uint32_t*>(to) = word; }

  DSV4_DEVICE Words4 gather(const GradientShared& shared, uint32_t counts, float (&score)[4], float (&reach)[4]) const {
    shared.scores.gather(weighed_head(), lane % 8, score);
    shared.reaches.gather(weighed_head(), lane % 8, reach);
    return ptx::load_shared_16(counts + static_cast<uint32_t>(lane % 8 * 16));
  }
};

// The gradient of a row's group of heads; index: of the row in this launch.
DSV4_DEVICE void differentiate(const AttentionGradientArguments& g, int64_t index, int64_t group) {
  const AttentionArguments& a = g.call;
  const int64_t row = a.first_row + index;
  GradientRow keys;
  keys.load(a, row);
  const GradientShared shared(a);
  GradientPart warp;
  warp.locate(a, group);
  warp.clear();
  warp.load_query(a, row);
  warp.load_grad(g, row);
  if (g.keys_wanted()) warp.store_operands(g, index, group);
  const int64_t own = warp.first_head + warp.weighed_head();
  HeadGradient head;
  head.load(g, row, own);
  const int64_t tiles = (keys.slots + kTileKeys - 1) / kTileKeys;
  walk_tiles<GradientTile, 32 * kGroupWarps>(a, keys, 0, tiles, shared, [&](int64_t tile) {
    warp.multiply(a, shared, shared.tile(tile));
    ptx::sync_threads();  // all parts of the products are there
    warp.add(shared, shared.count(tile), head);
  });
  DSV4_UNROLL
  for (int distance = 1; distance < 8; distance *= 2) head.join(distance);
  const float gate = head.close();
  if (warp.lane % 8 == 0 && own < a.heads) g.gates[row * a.heads + own] = gate;
  ptx::sync_threads();  // nobody reads what the second walk replaces
  walk_tiles<GradientTile, 32 * kGroupWarps>(a, keys, 0, tiles, shared, [&](int64_t tile) {
    warp.multiply(a, shared, shared.tile(tile));
    ptx::sync_threads();  // as above
    warp.weigh(shared, shared.count(tile), head);
    ptx::sync_threads();  // and all weights
    warp.accumulate(a, shared, shared.tile(tile));
    if (g.keys_wanted()) warp.store_weights(g, shared, index, group, tile);
  });
  warp.write(g, row);
}

}  // namespace dsv4::sm80
