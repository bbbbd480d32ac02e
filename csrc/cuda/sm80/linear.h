// The linear layers for every NVIDIA GPU from Ampere on. ops/linear.cpp chooses among the candidates and has checked
// the parameters.
#pragma once

#include "ops/linear.h"

namespace dsv4::sm80 {

// For activations as the kernels read them.
int64_t quantised_linear_workspace_bytes(const LinearParams&, const Context&);
int64_t grouped_linear_workspace_bytes(const LinearParams&, const Context&);
int64_t dense_linear_workspace_bytes(const DenseLinearParams&, const Context&);
Status fp8_linear(const LinearParams&, const Context&);
Status fp4_linear(const LinearParams&, const Context&);
Status grouped_linear(const LinearParams&, const Context&);
Status dense_linear(const DenseLinearParams&, const Context&);

// How a product is cut into blocks, which changes no bit of the results. Rows of weights x tokens: 16 x 8, K dealt out
// to four warps; 32 x 32, K dealt out to two (float32 weights: 32 x 16); 128 x 128 (bfloat16 weights, and FP4 with
// float32 scales, 128 x 64, float32 64 x 64).
enum class LinearTile { kFew, kSome, kMany };

Status fp8_linear(const LinearParams&, const Context&, LinearTile);
Status fp4_linear(const LinearParams&, const Context&, LinearTile);
Status grouped_linear(const LinearParams&, const Context&, LinearTile);
Status dense_linear(const DenseLinearParams&, const Context&, LinearTile);

}  // namespace dsv4::sm80
