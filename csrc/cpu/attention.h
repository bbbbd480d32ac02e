// The attention kernels of each CPU instruction set. ops/attention.cpp chooses among them and has checked the
// parameters.
#pragma once

#include "ops/attention.h"

namespace dsv4::scalar {
int64_t sparse_attention_workspace_bytes(const SparseAttentionParams&, const Context&);
Status sparse_attention(const SparseAttentionParams&, const Context&);
int64_t sparse_attention_backward_workspace_bytes(const SparseAttentionBackwardParams&, const Context&);
Status sparse_attention_backward(const SparseAttentionBackwardParams&, const Context&);
}  // namespace dsv4::scalar

// Head dims that are multiples of 32.
namespace dsv4::avx2 {
int64_t sparse_attention_workspace_bytes(const SparseAttentionParams&, const Context&);
Status sparse_attention(const SparseAttentionParams&, const Context&);
int64_t sparse_attention_backward_workspace_bytes(const SparseAttentionBackwardParams&, const Context&);
Status sparse_attention_backward(const SparseAttentionBackwardParams&, const Context&);
}  // namespace dsv4::avx2

// The same.
namespace dsv4::avx512 {
int64_t sparse_attention_workspace_bytes(const SparseAttentionParams&, const Context&);
Status sparse_attention(const SparseAttentionParams&, const Context&);
int64_t sparse_attention_backward_workspace_bytes(const SparseAttentionBackwardParams&, const Context&);
Status sparse_attention_backward(const SparseAttentionBackwardParams&, const Context&);
}  // namespace dsv4::avx512

// Of those bfloat16 queries and no float32 pool.
namespace dsv4::amx {
int64_t sparse_attention_workspace_bytes(const SparseAttentionParams&, const Context&);
Status sparse_attention(const SparseAttentionParams&, const Context&);
int64_t sparse_attention_backward_workspace_bytes(const SparseAttentionBackwardParams&, const Context&);
Status sparse_attention_backward(const SparseAttentionBackwardParams&, const Context&);
}  // namespace dsv4::amx
