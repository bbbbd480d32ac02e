// The permutation of routed pairs (token, slot) by expert, stable, and the tiles of rows that the experts' products
// take from it. A block an expert, which reads all indices and needs nothing of the others: its first row is the number
// of pairs of lower experts. No atomics, no host.
#pragma once

#include "common/view.h"
#include "cuda/common/ptx.h"

namespace dsv4::sm80 {

using ptx::Words4;

// Rows of one expert that a block multiplies.
struct ExpertTile {
  int32_t expert;  // -1: none
  int32_t first, count;
};

struct MapArguments {
  AnyView<2> indices;  // int32 or int64 [tokens, top_k]
  int64_t pairs;
  int top_k, experts;
  int32_t* offsets;  // [experts + 1]; each of the following may be none
  int32_t* rows;     // [pairs]: the pair of each row, -1 past the last
  // For moe_experts.
  View<const float, 2> weights;
  int32_t* tokens;     // of each row
  float* row_weights;  // of each row
  int32_t* places;     // the row of each pair, -1: none
  ExpertTile* tiles;   // [tile_count]
  int tile_rows;
  int64_t tile_count;
  bool tile_at_row;  // a tile stands at the number of its first row: best for few pairs; else see first_tile
};

inline constexpr int kMapThreads = 256;
inline constexpr int kMapWarps = kMapThreads / 32;
inline constexpr int kMapSharedBytes = 2 * kMapWarps * 4;

DSV4_DEVICE int64_t map_index(const MapArguments& a, int64_t pair) {
  const int64_t at = pair / a.top_k * a.indices.stride[0] + pair % a.top_k * a.indices.stride[1];
  return a.indices.dtype == DType::kInt64 ? static_cast<const int64_t*>(a.indices.data)[at]
                                          : static_cast<const int32_t*>(a.indices.data)[at];
}

// Where an expert's tiles begin, its first row being known: lower experts have at most start / tile_rows + expert.
DSV4_DEVICE int64_t first_tile(const MapArguments& a, int64_t expert, int64_t start) {
  return a.tile_at_row ? start : start / a.tile_rows + expert;
}

struct ExpertRows {
  int64_t expert, start, count;
};

DSV4_DEVICE void write_tiles(const MapArguments& a, const ExpertRows& rows) {
  const bool last = rows.expert + 1 >= a.experts;
  const int64_t first = first_tile(a, rows.expert, rows.start);
  const int64_t end = last ? a.tile_count : first_tile(a, rows.expert + 1, rows.start + rows.count);
  for (int64_t tile = first + ptx::thread_index(); tile < end; tile += kMapThreads) {
    const int64_t from = a.tile_at_row ? tile - first : (tile - first) * a.tile_rows, left = rows.count - from;
    const bool exists = left > 0 && from % a.tile_rows == 0;
    a.tiles[tile] = {exists ? static_cast<int32_t>(rows.expert) : -1, static_cast<int32_t>(rows.start + from),
                     static_cast<int32_t>(left < a.tile_rows ? left : a.tile_rows)};
  }
}

// Gives a row to each of this warp's pairs of the expert, in order, from `row` on.
DSV4_DEVICE void write_rows(const MapArguments& a, int64_t expert, int64_t first, int64_t end, int64_t row) {
  const uint32_t lower = (1u << (ptx::thread_index() % 32)) - 1u;
  for (int64_t base = first; base < end; base += 32) {
    const int64_t pair = base + ptx::thread_index() % 32;
    const int64_t index = pair < end ? map_index(a, pair) : -1;
    const bool mine = pair < end && index == expert;
    const uint32_t all = ptx::ballot(mine);
    if (mine) {
      const int64_t at = row + ptx::count_ones(all & lower);
      a.rows[at] = static_cast<int32_t>(pair);
      if (a.places != nullptr) {
        const int64_t token = pair / a.top_k;
        a.places[pair] = static_cast<int32_t>(at);
        a.tokens[at] = static_cast<int32_t>(token);
        a.row_weights[at] = a.weights.data[token * a.weights.stride[0] + pair % a.top_k * a.weights.stride[1]];
      }
    }
    const bool nobodys = pair < end && (index < 0 || index >= a.experts);
    if (expert == 0 && nobodys && a.places != nullptr) a.places[pair] = -1;
    row += ptx::count_ones(all);
  }
}

// Grid: x over experts, at least one.
DSV4_DEVICE void moe_map(const MapArguments& a) {
  const int64_t expert = ptx::block_index_x();
  const int warp = ptx::thread_index() / 32;
  // Neighbouring pairs go to one warp, in whole rounds of its lanes.
  const int64_t share = (a.pairs + kMapThreads - 1) / kMapThreads * 32;
  const int64_t first = warp * share, end = first + share < a.pairs ? first + share : a.pairs;
  uint32_t lower = 0, own = 0;
  for (int64_t pair = first + ptx::thread_index() % 32; pair < end; pair += 32) {
    const int64_t index = map_index(a, pair);
    lower += index >= 0 && index < expert && index < a.experts ? 1 : 0;
    own += index == expert && expert < a.experts ? 1 : 0;
  }
  lower = ptx::warp_sum(lower);
  own = ptx::warp_sum(own);
  const uint32_t counts = ptx::shared_base();
  if (ptx::thread_index() % 32 == 0) {
    ptx::store_shared_word(counts + static_cast<uint32_t>(warp * 8), lower);
    ptx::store_shared_word(counts + static_cast<uint32_t>(warp * 8 + 4), own);
  }
  ptx::sync_threads();  // all warps have counted
  ExpertRows rows = {expert, 0, 0};
  int64_t before = 0;  // pairs of the expert in lower warps
  for (int w = 0; w < kMapWarps; ++w) {
    const uint32_t mine = ptx::load_shared_word(counts + static_cast<uint32_t>(w * 8 + 4));
    rows.start += ptx::load_shared_word(counts + static_cast<uint32_t>(w * 8));
    rows.count += mine;
    if (w < warp) before += mine;
  }
  write_rows(a, expert, first, end, rows.start + before);
  const bool last = expert + 1 >= a.experts;
  if (last) {
    for (int64_t row = rows.start + rows.count + ptx::thread_index(); row < a.pairs; row += kMapThreads)
      a.rows[row] = -1;
  }
  if (a.offsets != nullptr && ptx::thread_index() == 0) {
    a.offsets[expert] = static_cast<int32_t>(rows.start);
    if (last && expert < a.experts) a.offsets[a.experts] = static_cast<int32_t>(rows.start + rows.count);
  }
  if (a.tiles != nullptr) write_tiles(a, rows);
}

// Calls body(row) for a token's rows in the order of their experts. places: its row of each slot, below 0 for none.
template <class Body>
DSV4_DEVICE void for_ascending(const int32_t* places, int top_k, const Body& body) {
  constexpr int32_t kNone = 0x7FFFFFFF;
  for (int32_t last = -1;;) {
    int32_t next = kNone;
    for (int k = 0; k < top_k; ++k) {
      const int32_t place = places[k];
      if (place > last && place < next) next = place;
    }
    if (next == kNone) break;
    body(next);
    last = next;
  }
}

}  // namespace dsv4::sm80
