// index_scores (cuda/sm80/index_scores.h) by the products of a warpgroup: 128 keys by the 64 heads of a chunk. The keys
// of a tile stay in registers for all rows that follow, and the queries come from shared memory with the swizzle that
// the product asks for. A row takes the tensor cores 512 clocks, and some 300 instructions a warp for relu, weights and
// sums, which the other block of an SM hides.
#pragma once

#include "cuda/common/wgmma.h"
#include "cuda/sm80/index_scores.h"

namespace dsv4::sm90 {

using namespace sm80;

// Of keys 64 m + 16 warp + lane / 4 + 8 half. For keys of four units of 32 dims.
struct IndexGroupSums {
  static constexpr int kHeads = 64, kAlignment = 1024, kSteps = kIndexMaxDim / 16;
  static constexpr int kHalfBytes = kHeads * 128;
  using Step = IndexStep<kHeads>;
  float sum[2][2];

  // Each half of the dims is a matrix of its own.
  static DSV4_DEVICE uint32_t query_piece(uint32_t queries, int head, int piece) {
    return queries + static_cast<uint32_t>(piece / 8 * kHalfBytes + head * 128 + (piece % 8 ^ head % 8) * 16);
  }
  // All warps take part, also where the row does not see their keys.
  static DSV4_DEVICE int64_t first_key(int64_t first) { return first; }
  static DSV4_DEVICE void show() { ptx::fence_async_proxy(); }

  DSV4_DEVICE void clear() {
    DSV4_UNROLL
    for (int i = 0; i < 4; ++i) sum[i / 2][i % 2] = 0.0f;
  }

  DSV4_DEVICE void take_keys(uint32_t keys) {
    const int lane = ptx::thread_index() % 32;
    DSV4_UNROLL
    for (int i = 0; i < 2 * kSteps; ++i) {
      const int row = i / kSteps * 64 + ptx::thread_index() / 32 * 16 + lane % 16;
      ptx::ldmatrix_x4(key_[i / kSteps][i % kSteps], index_piece(keys, row, i % kSteps * 2 + lane / 16));
    }
  }

  DSV4_DEVICE void add(const IndexArguments& a, const Step& step, uint32_t, uint32_t scales, uint32_t queries) {
    float d[2][kHeads / 8][4];
    const uint64_t query = ptx::wgmma_matrix(queries);
    ptx::wgmma_fence();
    DSV4_UNROLL
    for (int i = 0; i < 2 * kSteps; ++i) {
      const int step_of_key = i % kSteps;
      const uint32_t at = static_cast<uint32_t>(step_of_key / 4 * kHalfBytes + step_of_key % 4 * 32);
      ptx::wgmma_m64n64k16(d[i / kSteps], key_[i / kSteps][step_of_key], ptx::wgmma_moved(query, at), step_of_key > 0);
    }
    ptx::wgmma_commit();
    ptx::wgmma_wait<0>();
    add_index_heads(a, step, d, scales, key, sum);
  }

  DSV4_DEVICE void write(const IndexArguments& a, const Step& step, int64_t first, uint32_t scales) const {
    write_index_scores(a, step, first, sum, scales, key);
  }

 private:
  static DSV4_DEVICE int key(int m, int half) {
    return m * 64 + ptx::thread_index() / 32 * 16 + half * 8 + ptx::thread_index() % 32 / 4;
  }

  uint32_t key_[2][kSteps][4];
};

}  // namespace dsv4::sm90
