// The kernels of the linear layers for each CPU instruction set. ops/linear.cpp chooses among them and has checked the
// parameters.
#pragma once

#include "ops/linear.h"

namespace dsv4::scalar {
int64_t fp8_linear_workspace_bytes(const LinearParams&, const Context&);
int64_t fp4_linear_workspace_bytes(const LinearParams&, const Context&);
int64_t grouped_linear_workspace_bytes(const LinearParams&, const Context&);
Status fp8_linear(const LinearParams&, const Context&);
Status fp4_linear(const LinearParams&, const Context&);
Status grouped_linear(const LinearParams&, const Context&);
int64_t dense_linear_workspace_bytes(const DenseLinearParams&, const Context&);
Status dense_linear(const DenseLinearParams&, const Context&);
}  // namespace dsv4::scalar

namespace dsv4::avx2 {
int64_t fp8_linear_workspace_bytes(const LinearParams&, const Context&);
int64_t fp4_linear_workspace_bytes(const LinearParams&, const Context&);
int64_t grouped_linear_workspace_bytes(const LinearParams&, const Context&);
Status fp8_linear(const LinearParams&, const Context&);
Status fp4_linear(const LinearParams&, const Context&);
Status grouped_linear(const LinearParams&, const Context&);
int64_t dense_linear_workspace_bytes(const DenseLinearParams&, const Context&);
Status dense_linear(const DenseLinearParams&, const Context&);
}  // namespace dsv4::avx2

// Operands below 2^-126 count as zero (dense_linear: where both are bfloat16).
namespace dsv4::avx512 {
int64_t fp8_linear_workspace_bytes(const LinearParams&, const Context&);
int64_t fp4_linear_workspace_bytes(const LinearParams&, const Context&);
int64_t grouped_linear_workspace_bytes(const LinearParams&, const Context&);
Status fp8_linear(const LinearParams&, const Context&);
Status fp4_linear(const LinearParams&, const Context&);
Status grouped_linear(const LinearParams&, const Context&);
int64_t dense_linear_workspace_bytes(const DenseLinearParams&, const Context&);
Status dense_linear(const DenseLinearParams&, const Context&);
}  // namespace dsv4::avx512

// Operands and sums below 2^-126 count as zero. Of scales only e8m0, of operands that are not quantised bfloat16 alone.
namespace dsv4::amx {
int64_t fp8_linear_workspace_bytes(const LinearParams&, const Context&);
int64_t fp4_linear_workspace_bytes(const LinearParams&, const Context&);
int64_t grouped_linear_workspace_bytes(const LinearParams&, const Context&);
Status fp8_linear(const LinearParams&, const Context&);
Status fp4_linear(const LinearParams&, const Context&);
Status grouped_linear(const LinearParams&, const Context&);
int64_t dense_linear_workspace_bytes(const DenseLinearParams&, const Context&);
Status dense_linear(const DenseLinearParams&, const Context&);
}  // namespace dsv4::amx
