// The lightning indexer: the k compressed entries of a row's sequence with the highest scores. T rows of queries, H
// index heads, D dims. Keys lie in pages (common/pages.h). The last axis of every tensor is contiguous.
#pragma once

#include "common/context.h"
#include "common/status.h"
#include "common/view.h"

namespace dsv4 {

// score[t, j] = sum_h weights[t, h] * relu(query[t, h] . key_j), in float32; a row's scores depend on the row and its
// keys alone. Result: the k entries of the highest scores among those visible, ascending, then -1. Of equal scores (0
// and -0 are equal) the lower entry wins; an entry whose score is NaN is never taken. Visible: j < lengths[t] and
// stored, which entry j of sequence s is in page table[s, j / page_size] at offset j % page_size; a page outside the
// pool (-1), or an entry past the table: not stored. No other memory has any influence.
struct IndexTopkParams {
  AnyView<3> query;              // bfloat16 or float32 [T, H, D]
  View<const float, 2> weights;  // [T, H]
  AnyView<3> plain;              // bfloat16 or float32 [pages, page_size, D], or:
  AnyView<2> bytes;              // uint8 [pages, page_size * (D / 2 + D / 32)] FP4, or [pages, page_size * (D + 4)] FP8
  AnyView<2> table;              // int32 [sequences, blocks]
  AnyView<1> sequence;           // int32 [T], a row of the table
  AnyView<1> lengths;            // int32 [T], any value
  int64_t k;                     // >= 1
  int64_t page_size;             // >= 1
  AnyView<2> result;             // int32 [T, k]
  Workspace workspace;
};

// What the call needs in workspace.bytes under this context; result and workspace are not read. 0 for parameters that
// are not valid.
int64_t index_topk_workspace_bytes(const IndexTopkParams&, const Context&);

Status index_topk(const IndexTopkParams&, const Context&);

}  // namespace dsv4
