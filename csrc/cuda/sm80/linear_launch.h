// What the linear layers of every tile share: the arguments of a kernel, what a block does with its tile, and a launch.
#pragma once

#include "cuda/common/launch.h"
#include "cuda/sm80/activations.h"
#include "cuda/sm80/stage_copies.h"
#include "ops/linear.h"

namespace dsv4::sm80 {

struct LinearArguments {
  WeightMatrix weights;
  ActivationRows x;
  int64_t group_stride;  // of x, bytes
  AnyView<3> out;
  int64_t outputs;  // of a group
  int64_t row_tiles, token_tiles;
};

// Grid: groups, then tiles of tokens, then tiles of rows, the last fastest.
template <class Tile>
DSV4_DEVICE void linear_tile(const LinearArguments& a) {
  const int64_t tile = ptx::block_index_x() / a.row_tiles;
  const int64_t group = tile / a.token_tiles, first_token = tile % a.token_tiles * Tile::Shape::kTokens;
  const int64_t first = ptx::block_index_x() % a.row_tiles * Tile::Shape::kRows;
  const int64_t left = a.outputs - first;
  const int count = left < Tile::Shape::kRows ? static_cast<int>(left) : Tile::Shape::kRows;
  const WeightRows weights = {a.weights, group * a.outputs + first, count};
  ActivationRows x = a.x;
  x.data += group * a.group_stride;
  x.map = nullptr;  // so that the compiler knows
  x = x.from(first_token);
  Tile product;
  product.run(weights, x);
  const AnyView<3>& out = a.out;
  product.each([&](int row, int token, float value) {
    if (row >= weights.count || token >= x.count) return;
    const int64_t at = (first_token + token) * out.stride[0] + group * out.stride[1] + first + row;
    if (out.dtype == DType::kBFloat16) {
      static_cast<bf16*>(out.data)[at] = bf16{static_cast<uint16_t>(ptx::pack_bf16(value, 0.0f))};
    } else {
      static_cast<float*>(out.data)[at] = value;
    }
  });
}

// A kernel and the tile that a block of it takes.
struct LinearKernel {
  void (*run)(LinearArguments);
  int rows, tokens, threads, shared_bytes;
};

// A product, whatever the op: x [T, G, K], out [T, G, N].
struct LinearProduct {
  const char* name;
  AnyView<3> x, out;
  WeightMatrix weights;
  Workspace workspace;
  int64_t outputs;       // N
  bool quantise, plain;  // activations; weights

  int planes() const { return !quantise && x.dtype == DType::kFloat32 ? 3 : 1; }
  bool in_place() const { return plain && x.dtype == DType::kBFloat16; }
  int64_t row_bytes() const { return planes() * ceil_div(x.size(2), kBlockInputs) * 256; }
  int64_t workspace_bytes() const { return in_place() ? 0 : x.size(0) * x.size(1) * row_bytes(); }
};

// A row of `bytes` bytes.
inline WeightMatrix matrix_of(const AnyView<2>& weight, int64_t bytes) {
  WeightMatrix w = {};
  w.data = static_cast<const uint8_t*>(weight.data);
  w.stride = weight.stride[0] * (weight.shape[1] > 0 ? bytes / weight.shape[1] : 1);
  w.bytes = bytes;
  w.vector = aligned(w.data) && w.stride % 16 == 0 && w.bytes % 16 == 0;
  return w;
}

inline LinearProduct product_of(const char* name, const LinearParams& p, bool quantise) {
  LinearProduct product = {name, p.x, p.out, matrix_of(p.weight, p.weight.size(1)), p.workspace, 0, quantise, false};
  product.weights.scales = p.scale.data;
  product.weights.scale_stride = p.scale.stride[0];
  product.weights.scales_of_a_row = p.scale.size(1);
  product.weights.wide_scales = p.scale.dtype == DType::kFloat32;
  product.outputs = p.weight.size(0) / p.x.size(1);
  return product;
}

inline LinearProduct product_of(const DenseLinearParams& p) {
  const int64_t bytes = p.weight.size(1) * size_of(p.weight.dtype);
  return {"dense_linear",
          with_group(p.x),
          with_group(p.out),
          matrix_of(p.weight, bytes),
          p.workspace,
          p.weight.size(0),
          false,
          true};
}

inline ActivationRows rows_of(const LinearProduct& p) {
  ActivationRows x = {};
  x.planes = p.planes();
  if (p.in_place()) {
    x.data = static_cast<const uint8_t*>(p.x.data);
    x.stride = p.x.size(0) > 1 ? p.x.stride[0] * 2 : 0;
    x.bytes = p.x.size(2) * 2;
    x.vector = in_eights(p.x);
  } else {
    x.data = static_cast<const uint8_t*>(p.workspace.data);
    x.stride = p.x.size(1) * p.row_bytes();
    x.plane_stride = x.bytes = p.row_bytes() / x.planes;
    x.vector = true;
  }
  x.inputs = p.x.size(2);
  x.count = p.x.size(0);
  return x;
}

inline Status run(const LinearProduct& p, const Context& context, const LinearKernel& kernel, InputOrder order) {
  const int64_t tokens = p.x.size(0), groups = p.x.size(1);
  if (tokens == 0 || p.outputs == 0) return Status::ok();
  if (p.workspace.bytes < p.workspace_bytes()) {
    return Status::error("%s: workspace has %lld bytes, needs %lld", p.name, static_cast<long long>(p.workspace.bytes),
                         static_cast<long long>(p.workspace_bytes()));
  }
  const Status prepared =
      p.in_place() ? Status::ok()
                   : prepare_activations(p.name, p.x, p.workspace.data, p.planes(), p.quantise, order, context);
  if (!prepared.is_ok()) return prepared;
  LinearArguments a = {};
  a.weights = p.weights;
  a.x = rows_of(p);
  a.group_stride = p.row_bytes();
  a.out = p.out;
  a.outputs = p.outputs;
  a.row_tiles = ceil_div(a.outputs, kernel.rows);
  a.token_tiles = ceil_div(tokens, kernel.tokens);
  cuda::LaunchShape shape;
  shape.blocks_x = a.row_tiles * a.token_tiles * groups;
  shape.threads = kernel.threads;
  shape.shared_bytes = kernel.shared_bytes;
  return cuda::launch(p.name, kernel.run, shape, context, a);
}

}  // namespace dsv4::sm80
