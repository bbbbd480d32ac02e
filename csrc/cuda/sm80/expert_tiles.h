// The products of the experts on the tiles of weight_tile.h.
//
// gate_up: a block takes 128 rows of w1 and the same of w3 (in passes, where their form is wide), for up to 64 rows of
// one expert, gathered by the map. A warp has 16 rows of both, so that gate and up of an output meet in one
// thread: clamp, SwiGLU and routing weight follow in registers, and the block quantises the 128 outputs, which share a
// scale, on their way out in the form that w2's tiles read. product: rows of w2 times those, to one row of outputs for
// each pair. w1 and w3 of different forms, for which gate_up has no tile, and those for few rows, which would make too
// few blocks of 128, are products too, and `activate` makes of their outputs what gate_up does in registers.
#pragma once

#include "cuda/sm80/moe_map.h"
#include "cuda/sm80/weight_tile.h"

namespace dsv4::sm80 {

// A matrix of every expert. Strides in bytes.
struct ExpertWeights {
  WeightMatrix matrix;  // of expert 0
  int64_t stride, scale_stride;

  DSV4_DEVICE WeightMatrix of(int64_t expert) const {
    WeightMatrix w = matrix;
    w.data += expert * stride;
    w.scales = static_cast<const uint8_t*>(w.scales) + expert * scale_stride;
    return w;
  }
};

struct ExpertArguments {
  ExpertWeights first, second;  // w1 and w3, or w2 and nothing
  ActivationRows x;
  const ExpertTile* tiles;   // none: consecutive rows of one expert, `rows` of them
  int64_t tile_count, rows;  // tile_count: of the launch
  int split;
  int64_t outputs;           // rows of each matrix
  const float* row_weights;  // none: 1
  float limit;
  bool narrow;  // gate, up and outputs are bfloat16
  // Of gate_up: rows of activations for w2, in the form that its weights ask for.
  uint8_t* inner;
  int64_t inner_stride, inner_plane_stride;  // bytes
  int inner_planes;
  bool quantise;
  // Of activate: [rows, outputs].
  const void *gate, *up;
  bool vector;  // rows of those are made of whole, aligned 16-byte pieces
  // Of product: [rows, outputs] of `first`; of `second`, or none.
  void *out, *second_out;
};

// A tile's rows of w1 and w3: 16 of each by turns.
struct PairedRows {
  WeightRows gate, up;

  static DSV4_DEVICE bool is_gate(int i) { return i / 16 % 2 == 0; }
  static DSV4_DEVICE int row(int i) { return i / 32 * 16 + i % 16; }
  DSV4_DEVICE uint32_t scale(int i, int column, bool rows_share) const {
    const int at = rows_share ? 0 : row(i);  // a tile has no more rows of a matrix than share a scale
    return is_gate(i) ? gate.scale(at, column, rows_share) : up.scale(at, column, rows_share);
  }
  DSV4_DEVICE const WeightMatrix& any() const { return gate.matrix; }

  static constexpr int kMatrices = 2, kApart = 16;
  DSV4_DEVICE const WeightRows& of(int i) const { return i == 0 ? gate : up; }
  static DSV4_DEVICE constexpr int place(int row) { return row / 16 * 32 + row % 16; }
};

// A shape of fewer tokens than the map's tiles have takes them in `split` parts.
template <class Arguments>
DSV4_DEVICE ExpertTile tile_of(const Arguments& a, int64_t number, int tokens) {
  ExpertTile tile = {0, 0, static_cast<int32_t>(a.rows)};
  if (a.tiles != nullptr) tile = a.tiles[number / a.split];
  const int32_t begin = static_cast<int32_t>(a.tiles != nullptr ? number % a.split : number) * tokens;
  const int32_t left = tile.count - begin;
  return {left > 0 ? tile.expert : -1, tile.first + begin, left < tokens ? left : tokens};
}

// `first`: so that rows of the tile which share a scale are rows of the matrix which do.
template <WeightForm kForm>
DSV4_DEVICE WeightRows rows_of(const ExpertWeights& weights, const ExpertTile& tile, int64_t first, int64_t outputs,
                               int rows) {
  const int64_t left = outputs - first, scale_row = kForm == WeightForm::kFp8 ? first / 128 : first;
  WeightMatrix w = weights.of(tile.expert);
  w.data += first * w.stride;
  w.scales = ptx::kept(static_cast<const uint8_t*>(w.scales) + scale_row * w.scale_stride * (w.wide_scales ? 4 : 1));
  return {w, 0, left < 0 ? 0 : left < rows ? static_cast<int>(left) : rows};
}

DSV4_DEVICE ActivationRows rows_of(const ActivationRows& all, const ExpertTile& tile) {
  ActivationRows x = all.from(tile.first);
  x.count = tile.count;
  return x;
}

DSV4_DEVICE float rounded(float value, bool narrow) {
  return narrow ? ptx::low_bf16(ptx::pack_bf16(value, 0.0f)) : value;
}

DSV4_DEVICE float swiglu(const ExpertArguments& a, float gate, float up, float weight) {
  gate = rounded(gate, a.narrow);
  up = rounded(up, a.narrow);
  if (a.limit > 0.0f) {  // comparisons that let NaN pass
    gate = gate > a.limit ? a.limit : gate;
    up = up > a.limit ? a.limit : up < -a.limit ? -a.limit : up;
  }
  const float silu = ptx::divide(gate, ptx::add(1.0f, ptx::exponential(-gate)));
  return rounded(ptx::multiply(ptx::multiply(silu, up), weight), a.narrow);
}

// The inner activations of a block, float32 [tokens, 128], rows padded so that fragments meet no bank twice.
inline constexpr int kInnerRow = (kBlockInputs + 4) * 4;

// kPasses x Shape::kRows / 2 = 128.
template <class Shape>
struct GateUpShape {
  static constexpr int kPassRows = Shape::kRows / 2, kPasses = kBlockInputs / kPassRows;
  // With one pass, where the stages were.
  static constexpr int kInnerAt = kPasses == 1 ? 0 : Shape::kSharedBytes;
  static constexpr int kInnerBytes = Shape::kTokens * kInnerRow;
  static constexpr int kSharedBytes =
      kInnerAt + kInnerBytes > Shape::kSharedBytes ? kInnerAt + kInnerBytes : Shape::kSharedBytes;
};

// A row's activations for w2: this lane's eight of a block of 128 that sixteen lanes hold. Lanes without such a row
// take part.
DSV4_DEVICE void store_inner(const ExpertArguments& a, const ExpertTile& tile, int token, int64_t block, int unit,
                             float (&value)[8]) {
  if (a.quantise) round_trip_fp8(value);
  if (token >= tile.count) return;
  const InputOrder order = a.quantise ? InputOrder::kUnits : InputOrder::kPlain;
  store_unit(a.inner + (tile.first + token) * a.inner_stride, a.inner_plane_stride, a.inner_planes, block, unit, order,
             value);
}

// Sixteen lanes take a row of 128, eight a lane.
template <class Shape>
DSV4_DEVICE void write_inner(const ExpertArguments& a, const ExpertTile& tile, int64_t block, uint32_t inner) {
  const int unit = ptx::thread_index() % 16;
  DSV4_UNROLL_IF(false)
  for (int base = 0; base < Shape::kTokens; base += Shape::kThreads / 16) {
    const int token = base + ptx::thread_index() / 16;
    float value[8] = {};
    if (token < tile.count) {
      load_shared_eight(inner + static_cast<uint32_t>(token * kInnerRow), unit, value);
    }
    store_inner(a, tile, token, block, unit, value);
  }
}

inline constexpr int kActivateRows = 8, kActivateThreads = 16 * kActivateRows;

// Grid: blocks of 128 outputs, and for each all tiles.
template <class X>
DSV4_DEVICE void activate(const ExpertArguments& a) {
  const ExpertTile tile = tile_of(a, ptx::block_index_x() % a.tile_count, kActivateRows);
  if (tile.expert < 0) return;
  const int64_t block = ptx::block_index_x() / a.tile_count, outputs = a.outputs - block * kBlockInputs;
  const int token = ptx::thread_index() / 16, unit = ptx::thread_index() % 16;
  float value[8] = {};
  if (token < tile.count) {
    const int64_t at = (tile.first + token) * a.outputs + block * kBlockInputs;
    const int count = outputs < kBlockInputs ? static_cast<int>(outputs) : kBlockInputs;
    const float weight = a.row_weights != nullptr ? a.row_weights[tile.first + token] : 1.0f;
    float gate[8], up[8];
    load_eight(static_cast<const X*>(a.gate) + at, 8 * unit, count, a.vector, gate);
    load_eight(static_cast<const X*>(a.up) + at, 8 * unit, count, a.vector, up);
    DSV4_UNROLL
    for (int i = 0; i < 8; ++i) value[i] = 8 * unit + i < count ? swiglu(a, gate[i], up[i], weight) : 0.0f;
  }
  store_inner(a, tile, token, block, unit, value);
}

// Grid: blocks of 128 outputs, and for each all tiles, so that neighbours share weights.
template <class Shape>
DSV4_DEVICE void gate_up(const ExpertArguments& a) {
  using Plan = GateUpShape<Shape>;
  const ExpertTile tile = tile_of(a, ptx::block_index_x() % a.tile_count, Shape::kTokens);
  if (tile.expert < 0) return;
  const int64_t block = ptx::block_index_x() / a.tile_count;
  const uint32_t inner = ptx::shared_base() + Plan::kInnerAt;
  const ActivationRows x = rows_of(a.x, tile);
  WeightTile<Shape> product;
  DSV4_UNROLL_IF(false)
  for (int pass = 0; pass < Plan::kPasses; ++pass) {
    const int64_t first = block * kBlockInputs + pass * Plan::kPassRows;
    const PairedRows weights = {rows_of<Shape::kForm>(a.first, tile, first, a.outputs, Plan::kPassRows),
                                rows_of<Shape::kForm>(a.second, tile, first, a.outputs, Plan::kPassRows)};
    product.run(weights, x);
    ptx::sync_threads();  // the stages are done with
    DSV4_UNROLL
    for (int n = 0; n < Shape::kN; ++n) {
      DSV4_UNROLL
      for (int e = 0; e < 4; ++e) {
        const int token = product.token(n, e), row = PairedRows::row(product.row(0, e));
        if (token >= tile.count) continue;
        const float weight = a.row_weights != nullptr ? a.row_weights[tile.first + token] : 1.0f;
        const float value = swiglu(a, product.sum[n][e], product.sum[Shape::kN + n][e], weight);
        const uint32_t to = inner + static_cast<uint32_t>(token * kInnerRow + (pass * Plan::kPassRows + row) * 4);
        ptx::store_shared_float(to, row < weights.gate.count ? value : 0.0f);
      }
    }
  }
  ptx::sync_threads();  // the block's outputs are there
  write_inner<Shape>(a, tile, block, inner);
}

// Grid: tiles of rows of `first`, then of `second` if it has an output, and for each all tiles of the map.
template <class Shape>
DSV4_DEVICE void product(const ExpertArguments& a) {
  const ExpertTile tile = tile_of(a, ptx::block_index_x() % a.tile_count, Shape::kTokens);
  if (tile.expert < 0) return;
  const int64_t number = ptx::block_index_x() / a.tile_count, row_tiles = (a.outputs + Shape::kRows - 1) / Shape::kRows;
  const bool second = number >= row_tiles;
  const int64_t first = (second ? number - row_tiles : number) * Shape::kRows;
  const ExpertWeights matrix = second ? a.second : a.first;
  const WeightRows weights = rows_of<Shape::kForm>(matrix, tile, first, a.outputs, Shape::kRows);
  void* out = second ? a.second_out : a.out;
  WeightTile<Shape> sums;
  sums.run(weights, rows_of(a.x, tile));
  sums.each([&](int row, int token, float value) {
    if (row >= weights.count || token >= tile.count) return;
    const int64_t at = (tile.first + token) * a.outputs + first + row;
    if (a.narrow) {
      static_cast<bf16*>(out)[at] = bf16{static_cast<uint16_t>(ptx::pack_bf16(value, 0.0f))};
    } else {
      static_cast<float*>(out)[at] = value;
    }
  });
}

}  // namespace dsv4::sm80
