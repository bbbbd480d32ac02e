// The lightning indexer: the k compressed entries of a row's sequence with the highest scores. T rows of queries, H
// index heads, D dims. Keys lie in pages (common/pages.h). The last axis of every tensor is contiguous.
#pragma once

#include "common/context.h"
#include "common/status.h"
#include "common/view.h"

namespace dsv4 {

// X, the type of the query, is bfloat16 or float32. Each head: the last R dims rotated in pairs (x[2i], x[2i + 1]) by
// (cos, sin), rounded to X; the head times the Sylvester Hadamard matrix over sqrt(D), rounded to X; then each 32 dims,
// or all where D is less, to e2m1 with the scale 2^ceil(log2(max(amax, 6 * 2^-126) / 6)) and back.
struct IndexQueryParams {
  AnyView<3> query;   // X [T, H, D], D a power of two from 2 to kMostIndexQueryDims
  AnyView<3> rope;    // float32 [T, R / 2, 2]
  AnyView<3> result;  // X [T, H, D]
};
inline constexpr int64_t kMostIndexQueryDims = 1024;

Status index_query(const IndexQueryParams&, const Context&);

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
