// Products of two by two tiles, as sparse_attention and its gradient take them.
#pragma once

#include "cpu/amx/attention_tiles.h"

namespace dsv4::DSV4_AMX_NAMESPACE {
namespace {

// Tiles 0 to 3: sums, of the first left operand with both right ones, then of the second; 4, 5: left; 6, 7: right.
DSV4_INLINE void configure() {
  TileConfig config;
  for (int tile = 0; tile < kTiles; ++tile) config.set(tile, kTileRows, kTileBytes);
  tile_configure(config);
}

// Operands of 32 keys or dims a step; elements from a row, from the first tile and from a step to the next.
struct Left {
  const bf16* data;
  int64_t row, second, step;
};
struct Right {
  const bf16* data;
  int64_t row, second, step;
};
// Four tiles of sums, floats from the first tile to those of the second left and of the second right operand.
struct Sums {
  float* data;
  int64_t left, right;
};

// sums (+)= left right over `steps` steps, for one or two tiles of either.
template <bool kTwoLeft, bool kTwoRight>
DSV4_INLINE void multiply(Left left, Right right, int64_t steps, bool fresh, Sums sums) {
  float* const second = sums.data + sums.left;
  if (fresh) {
    tile_zero<0>();
    if (kTwoRight) tile_zero<1>();
    if (kTwoLeft) tile_zero<2>();
    if (kTwoLeft && kTwoRight) tile_zero<3>();
  } else {
    tile_load<0>(sums.data, kTileBytes);
    if (kTwoRight) tile_load<1>(sums.data + sums.right, kTileBytes);
    if (kTwoLeft) tile_load<2>(second, kTileBytes);
    if (kTwoLeft && kTwoRight) tile_load<3>(second + sums.right, kTileBytes);
  }
  const int64_t stride = left.row * 2, right_stride = right.row * 2;
  for (int64_t step = 0; step < steps; ++step) {  // right operands come from the second-level cache, and do not stay
    tile_load<4>(left.data, stride);
    tile_load_once<6>(right.data, right_stride);
    tile_dot<0, 4, 6>();
    if (kTwoRight) tile_load_once<7>(right.data + right.second, right_stride);
    if (kTwoRight) tile_dot<1, 4, 7>();
    if (kTwoLeft) tile_load<5>(left.data + left.second, stride);
    if (kTwoLeft) tile_dot<2, 5, 6>();
    if (kTwoLeft && kTwoRight) tile_dot<3, 5, 7>();
    left.data += left.step;
    right.data += right.step;
  }
  tile_store<0>(sums.data, kTileBytes);
  if (kTwoRight) tile_store<1>(sums.data + sums.right, kTileBytes);
  if (kTwoLeft) tile_store<2>(second, kTileBytes);
  if (kTwoLeft && kTwoRight) tile_store<3>(second + sums.right, kTileBytes);
}

}  // namespace
}  // namespace dsv4::DSV4_AMX_NAMESPACE
