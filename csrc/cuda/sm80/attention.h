// The attention kernels for every NVIDIA GPU from Ampere on. ops/attention.cpp chooses among the candidates and has
// checked the parameters.
#pragma once

#include "ops/attention.h"

namespace dsv4::sm80 {

// Queries and pools of any form the contract knows, even head_dim up to 512; any number of heads. On tensor cores where
// queries are bfloat16 and pools FP8 or bfloat16.
bool accepts_sparse_attention(const SparseAttentionParams&);
int64_t sparse_attention_workspace_bytes(const SparseAttentionParams&, const Context&);
Status sparse_attention(const SparseAttentionParams&, const Context&);

// The same with 16 or 32 heads a block, which changes no bit of the results. Without tensor cores it is always 16.
Status sparse_attention(const SparseAttentionParams&, const Context&, int heads_per_block);

// The same calls, if its pools have fewer than 2^32 - 1 rows.
bool accepts_sparse_attention_backward(const SparseAttentionBackwardParams&);
int64_t sparse_attention_backward_workspace_bytes(const SparseAttentionBackwardParams&, const Context&);
Status sparse_attention_backward(const SparseAttentionBackwardParams&, const Context&);
Status sparse_attention_backward(const SparseAttentionBackwardParams&, const Context&, int heads_per_block);

}  // namespace dsv4::sm80
