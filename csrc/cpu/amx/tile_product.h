// Products of up to two by two tiles, for the linear layers and the experts. Tile registers 0 to 3 hold the sums
// (2 row + column), 4 and 5 the rows' operand, 6 and 7 the columns'. A product keeps the tile unit busy for 16 cycles
// and a tile from the first-level cache the two load ports for 8, so four of each leave the loads hidden; no other
// shape that fits eight registers loads less for a product.
#pragma once

#include "cpu/amx/tile.h"

namespace dsv4::DSV4_AMX_NAMESPACE {
namespace {

inline constexpr int kSide = 2 * kTileRows;  // rows, or columns, of two tiles
inline constexpr int64_t kTileElements = kTileRows * avx512::kStep;

// An operand's tiles of consecutive steps of 32 inputs.
struct TileSteps {
  const bf16* data;
  int64_t step = kTileElements;  // elements from one tile to the next
  int64_t stride = kTileBytes;   // bytes from one row of a tile to the next
};

template <int kRows, int kColumns>
DSV4_INLINE void zero_sums() {
  tile_zero<0>();
  if constexpr (kColumns == 2) tile_zero<1>();
  if constexpr (kRows == 2) tile_zero<2>();
  if constexpr (kRows == 2 && kColumns == 2) tile_zero<3>();
}

// Between registers and [row][kSide] in memory.
template <int kRows, int kColumns>
DSV4_INLINE void load_sums(const float (*from)[kSide]) {
  constexpr int64_t kStride = sizeof(from[0]);
  tile_load<0>(from[0], kStride);
  if constexpr (kColumns == 2) tile_load<1>(from[0] + kTileRows, kStride);
  if constexpr (kRows == 2) tile_load<2>(from[kTileRows], kStride);
  if constexpr (kRows == 2 && kColumns == 2) tile_load<3>(from[kTileRows] + kTileRows, kStride);
}
template <int kRows, int kColumns>
DSV4_INLINE void store_sums(float (*to)[kSide]) {
  constexpr int64_t kStride = sizeof(to[0]);
  tile_store<0>(to[0], kStride);
  if constexpr (kColumns == 2) tile_store<1>(to[0] + kTileRows, kStride);
  if constexpr (kRows == 2) tile_store<2>(to[kTileRows], kStride);
  if constexpr (kRows == 2 && kColumns == 2) tile_store<3>(to[kTileRows] + kTileRows, kStride);
}

// Adds the products of `steps` steps, in order. Both tiles of rows lie alike; columns need not. Tiles that a shape does
// not have are not looked at. `between` runs after each step: what it does goes on beside the products. kOnce: columns
// are not wanted again soon.
template <int kRows, int kColumns, bool kOnce = false, class Between>
DSV4_INLINE void add_products(const TileSteps (&rows)[2], const TileSteps (&columns)[2], int64_t steps,
                              const Between& between) {
  const bf16 *row = rows[0].data, *row2 = rows[1].data, *column = columns[0].data, *column2 = columns[1].data;
  const int64_t row_step = rows[0].step, row_stride = rows[0].stride;
  const int64_t column_step = columns[0].step, column2_step = columns[1].step;
  const int64_t column_stride = columns[0].stride, column2_stride = columns[1].stride;
  for (int64_t s = 0; s < steps; ++s, row += row_step, column += column_step) {
    tile_load<4>(row, row_stride);
    kOnce ? tile_load_once<6>(column, column_stride) : tile_load<6>(column, column_stride);
    tile_dot<0, 4, 6>();
    if constexpr (kColumns == 2) {
      kOnce ? tile_load_once<7>(column2, column2_stride) : tile_load<7>(column2, column2_stride);
      tile_dot<1, 4, 7>();
      column2 += column2_step;
    }
    if constexpr (kRows == 2) {
      tile_load<5>(row2, row_stride);
      tile_dot<2, 5, 6>();
      if constexpr (kColumns == 2) tile_dot<3, 5, 7>();
      row2 += row_step;
    }
    between(s);
  }
}
template <int kRows, int kColumns>
DSV4_INLINE void add_products(const TileSteps (&rows)[2], const TileSteps (&columns)[2], int64_t steps) {
  add_products<kRows, kColumns>(rows, columns, steps, [](int64_t) {});
}

template <int kRows_, int kColumns_>
struct TileShape {
  static constexpr int kRows = kRows_, kColumns = kColumns_;
};
// body(TileShape) of one or two tiles either way.
template <class Body>
DSV4_INLINE void with_shape(bool two_rows, bool two_columns, const Body& body) {
  if (two_rows) {
    two_columns ? body(TileShape<2, 2>{}) : body(TileShape<2, 1>{});
  } else {
    two_columns ? body(TileShape<1, 2>{}) : body(TileShape<1, 1>{});
  }
}

}  // namespace
}  // namespace dsv4::DSV4_AMX_NAMESPACE
