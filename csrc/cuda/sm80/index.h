// index_topk for every NVIDIA GPU from Ampere on. ops/index.cpp chooses among the candidates and has checked the
// parameters, but not the values of `sequence`: a row whose sequence is none of the table sees no entry. Any number of
// heads, dims, entries, any k and page size. bfloat16 queries of up to 128 dims on bfloat16, FP8 or FP4 keys go through
// the tensor cores; float32 operands and wider keys through plain, much slower, FMA.
#pragma once

#include "ops/index.h"

namespace dsv4::sm80 {

// How a call is cut, which no result depends on.
struct IndexCut {
  int64_t entries;     // that a row may have
  int64_t group_rows;  // rows whose scores lie in the workspace at a time
  int rows_per_block;  // that share the keys a block has decoded
  int64_t range;       // entries of a first selection; at least `entries`: there is just one selection
};

// A kernel that scores by tensor cores, 128 threads a block.
struct IndexArguments;
struct IndexScoresKernel {
  void (*run)(IndexArguments);
  int shared_bytes;
};

IndexCut index_cut(const IndexTopkParams&);
int64_t index_topk_workspace_bytes(const IndexTopkParams&, const IndexCut&);
Status index_topk(const IndexTopkParams&, const IndexCut&, const Context&);
Status index_topk(const IndexTopkParams&, const IndexCut&, const IndexScoresKernel&, const Context&);

int64_t index_topk_workspace_bytes(const IndexTopkParams&);
Status index_topk(const IndexTopkParams&, const Context&);

}  // namespace dsv4::sm80
