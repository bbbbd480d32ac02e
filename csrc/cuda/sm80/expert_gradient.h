// The gradients of plain experts on the tiles of product_tile.h; the kernels and their order: moe_backward.cu.
#pragma once

#include "cuda/sm80/expert_tiles.h"
#include "cuda/sm80/product_tile.h"

namespace dsv4::sm80 {

// The tiles of the map, or, with none, consecutive rows of one expert.
struct GradientTiles {
  static constexpr int split = 1;
  const ExpertTile* tiles;
  int64_t rows;
};

// A plain matrix of every expert, whose rows are those of K.
struct GradientMatrix {
  TileRows rows;          // of expert 0; first and count: all
  int64_t expert_stride;  // bytes

  DSV4_DEVICE TileRows of(int64_t expert, int64_t column_bytes) const {
    TileRows own = rows.from(column_bytes);
    own.data += expert * expert_stride;
    return own;
  }
};

struct InnerArguments {
  GradientTiles tiles;
  TileRows grad;      // of the result: [tokens, hidden], by the map
  GradientMatrix w2;  // [hidden, inter]
  int64_t hidden, inter;
  const float* row_weights;  // none: 1
  float limit;
  // [rows, inter] of X: gate and up as the forward pass rounds them, which give way to their gradients, and the rows
  // that w2 multiplied.
  void *gate, *up, *inner;
  float* parts;  // [rows, ceil(inter / 128)] of the gradients of the routing weights, or none
  bool vector;   // rows of gate, up and inner are made of whole, aligned 16-byte pieces
};

// What one inner value gives.
struct InnerGradient {
  float inner, grad_gate, grad_up, product;

  // grad: of the inner value as w2 multiplied it. NaN is clamped nowhere.
  DSV4_DEVICE InnerGradient(float gate, float up, float grad, float weight, float limit) {
    const bool cuts_gate = limit > 0.0f && gate > limit;
    const bool cuts_up = limit > 0.0f && (up > limit || up < -limit);
    const float g = cuts_gate ? limit : gate, u = !cuts_up ? up : up > 0.0f ? limit : -limit;
    const bool negative = g < 0.0f;
    // Of the sigmoid and of 1 - sigmoid neither loses digits.
    const float power = ptx::exponential(negative ? g : -g), large = ptx::divide(1.0f, ptx::add(1.0f, power));
    const float small = ptx::multiply(power, large);
    const float sigmoid = negative ? small : large, rest = negative ? large : small;
    const float silu = ptx::multiply(g, sigmoid), slope = ptx::multiply(sigmoid, ptx::fma(g, rest, 1.0f));
    const float weighted = ptx::multiply(grad, weight);
    product = ptx::multiply(silu, u);
    inner = ptx::multiply(product, weight);
    grad_gate = cuts_gate ? 0.0f : ptx::multiply(ptx::multiply(weighted, u), slope);
    grad_up = cuts_up ? 0.0f : ptx::multiply(weighted, silu);
  }
};

// Eight inner values of a row: `count` of the block's exist. Returns this lane's part of the gradient of the routing
// weight.
template <class X>
DSV4_DEVICE float inner_gradient(const InnerArguments& a, int64_t row, int64_t block, int unit,
                                 const float (&grad)[8]) {
  const int64_t left = a.inter - block * kProductColumns, at = row * a.inter + block * kProductColumns;
  const int count = left < kProductColumns ? static_cast<int>(left) : kProductColumns, column = 8 * unit;
  if (column >= count) return 0.0f;
  const float weight = a.row_weights != nullptr ? a.row_weights[row] : 1.0f;
  float gate[8], up[8], inner[8], part = 0.0f;
  load_eight(static_cast<const X*>(a.gate) + at, column, count, a.vector, gate);
  load_eight(static_cast<const X*>(a.up) + at, column, count, a.vector, up);
  DSV4_UNROLL
  for (int i = 0; i < 8; ++i) {
    const InnerGradient one(gate[i], up[i], grad[i], weight, a.limit);
    if (column + i < count) part = ptx::fma(grad[i], one.product, part);
    inner[i] = one.inner;
    gate[i] = one.grad_gate;
    up[i] = one.grad_up;
  }
  store_eight(static_cast<X*>(a.inner) + at, column, count, a.vector, inner);
  store_eight(static_cast<X*>(a.gate) + at, column, count, a.vector, gate);
  store_eight(static_cast<X*>(a.up) + at, column, count, a.vector, up);
  return part;
}

// Grid: tiles, and for each all blocks of 128 inner values: neighbours share rows, and weights where their tiles are
// one expert's.
template <class Shape>
DSV4_DEVICE void gradient_inner(const InnerArguments& a) {
  using X = typename Shape::X;
  const int64_t blocks = (a.inter + kProductColumns - 1) / kProductColumns, block = ptx::block_index_x() % blocks;
  const ExpertTile tile = tile_of(a.tiles, ptx::block_index_x() / blocks, Shape::kRows);
  if (tile.expert < 0) return;
  ProductTile<Shape> product(tile.count);
  product.add(a.grad.of(tile.first, tile.count),
              a.w2.of(tile.expert, block * kProductColumns * static_cast<int64_t>(sizeof(X))), a.hidden);
  product.each(tile.count, [&](int row, int unit, const float (&grad)[8]) {
    float part = row < tile.count ? inner_gradient<X>(a, tile.first + row, block, unit, grad) : 0.0f;
    DSV4_UNROLL
    for (int mask = 1; mask < 16; mask *= 2) {
      const float other = ptx::shuffle_xor(part, mask);
      part = ptx::add(part, other);
    }
    if (a.parts != nullptr && unit == 0 && row < tile.count) a.parts[(tile.first + row) * blocks + block] = part;
  });
}

struct InputArguments {
  GradientTiles tiles;
  TileRows gate, up;      // gradients: [rows, inter]
  GradientMatrix w1, w3;  // [inter, hidden], from the first column on
  int64_t inter, columns;
  float* out;  // [rows, out_stride], float32
  int64_t out_stride;
};

// Grid: tiles, and for each all blocks of 128 columns.
template <class Shape>
DSV4_DEVICE void gradient_inputs(const InputArguments& a) {
  const int64_t blocks = (a.columns + kProductColumns - 1) / kProductColumns;
  const ExpertTile tile = tile_of(a.tiles, ptx::block_index_x() / blocks, Shape::kRows);
  if (tile.expert < 0) return;
  const int64_t column = ptx::block_index_x() % blocks * kProductColumns;
  const int64_t bytes = column * static_cast<int64_t>(sizeof(typename Shape::X));
  ProductTile<Shape> product(tile.count);
  TileRows left = a.gate.of(tile.first, tile.count), right = a.w1.of(tile.expert, bytes);
  const TileRows other = a.w3.of(tile.expert, bytes);
  right.vector = right.vector && other.vector;
  DSV4_UNROLL_IF(false)
  for (int part = 0; part < 2; ++part) {
    product.add(left, right, a.inter);
    left.data = a.up.data;
    right.data = other.data;
    right.stride = other.stride;
  }
  product.each(tile.count, [&](int row, int unit, const float (&value)[8]) {
    const int64_t at = column + 8 * unit;
    if (row < tile.count && at < a.columns) {
      store_eight(a.out + (tile.first + row) * a.out_stride + at, 0, 8, true, value);
    }
  });
}

// The gradient of a matrix of every expert: left^T right over an expert's rows.
struct MatrixArguments {
  const int32_t* offsets;  // of the experts' rows; none: `rows` of one expert
  int64_t rows;
  TileRows left, right;  // first and count: of all rows
  int64_t outputs, inputs;
  uint8_t* out;
  int64_t out_stride, expert_stride;  // bytes
  bool vector;                        // rows of out are made of whole, aligned 16-byte pieces
};

// Grid: experts, and for each all tiles, of which neighbours share `left`.
template <class Shape>
DSV4_DEVICE void gradient_matrix(const MatrixArguments& a) {
  using X = typename Shape::X;
  constexpr int64_t kSize = static_cast<int64_t>(sizeof(X));
  const int64_t wide = (a.inputs + kProductColumns - 1) / kProductColumns;
  const int64_t tiles = (a.outputs + Shape::kRows - 1) / Shape::kRows * wide;
  const int64_t expert = ptx::block_index_x() / tiles, tile = ptx::block_index_x() % tiles;
  const int64_t first_row = tile / wide * Shape::kRows, first_column = tile % wide * kProductColumns;
  const int64_t first = a.offsets != nullptr ? a.offsets[expert] : 0;
  const int64_t count = a.offsets != nullptr ? a.offsets[expert + 1] - first : a.rows;
  const int64_t left_rows = a.outputs - first_row, left_columns = a.inputs - first_column;
  const int rows = left_rows < Shape::kRows ? static_cast<int>(left_rows) : Shape::kRows;
  const int columns = left_columns < kProductColumns ? static_cast<int>(left_columns) : kProductColumns;
  ProductTile<Shape> product(rows);
  product.add(a.left.of(first, count).from(first_row * kSize), a.right.of(first, count).from(first_column * kSize),
              count);
  product.each(rows, [&](int row, int unit, const float (&value)[8]) {
    if (row >= rows) return;
    uint8_t* to = a.out + expert * a.expert_stride + (first_row + row) * a.out_stride + first_column * kSize;
    store_eight(reinterpret_cast<X*>(to), 8 * unit, columns, a.vector, value);
  });
}

struct GradientSumArguments {
  const int32_t* places;  // [tokens, top_k]: rows of outputs, -1: none
  int64_t tokens;
  int top_k;
  const float *outputs, *shared;  // [pairs, stride], [tokens, stride] or none
  int64_t stride, columns;
  void* result;  // from the first column on
  int64_t result_stride;
  bool vector;
  const float* parts;  // [pairs, blocks]
  int64_t blocks;
  View<float, 2> weights;  // [tokens, top_k]
};

inline constexpr int kGradientSumThreads = 128;

// The gradient of x, by ascending expert, the shared one last. Grid: x over tokens, y over runs of eights of columns.
template <class X>
DSV4_DEVICE void gradient_sum(const GradientSumArguments& a) {
  const int64_t token = ptx::block_index_x();
  const int64_t column = (ptx::block_index_y() * kGradientSumThreads + ptx::thread_index()) * 8;
  if (column >= a.columns) return;
  float sum[8] = {};
  const auto add = [&](const float* outputs, int64_t row) {
    float value[8];
    load_eight(outputs + row * a.stride + column, 0, 8, true, value);
    DSV4_UNROLL
    for (int i = 0; i < 8; ++i) sum[i] = ptx::add(sum[i], value[i]);
  };
  for_ascending(a.places + token * a.top_k, a.top_k, [&](int32_t row) { add(a.outputs, row); });
  if (a.shared != nullptr) add(a.shared, token);
  const int64_t left = a.columns - column;
  store_eight(static_cast<X*>(a.result) + token * a.result_stride + column, 0, left < 8 ? static_cast<int>(left) : 8,
              a.vector, sum);
}

// The gradients of the routing weights: a thread a pair, blocks ascending.
DSV4_DEVICE void gradient_weights(const GradientSumArguments& a) {
  const int64_t pair = ptx::block_index_x() * kGradientSumThreads + ptx::thread_index();
  if (pair >= a.tokens * a.top_k) return;
  const int64_t place = a.places[pair];
  TwoFloats sum = {0.0f, 0.0f};
  for (int64_t i = 0; place >= 0 && i < a.blocks; ++i) sum = add(sum, a.parts[place * a.blocks + i]);
  a.weights.data[pair / a.top_k * a.weights.stride[0] + pair % a.top_k * a.weights.stride[1]] = nearest(sum);
}

}  // namespace dsv4::sm80
