// The kernels of the indexer of each CPU instruction set. ops/index.cpp chooses among them and has checked the
// parameters.
#pragma once

#include "ops/index.h"

namespace dsv4::scalar {
Status index_query(const IndexQueryParams&, const Context&);
int64_t index_topk_workspace_bytes(const IndexTopkParams&, const Context&);
Status index_topk(const IndexTopkParams&, const Context&);
}  // namespace dsv4::scalar

// Dims that are multiples of 32.
namespace dsv4::avx2 {
int64_t index_topk_workspace_bytes(const IndexTopkParams&, const Context&);
Status index_topk(const IndexTopkParams&, const Context&);
}  // namespace dsv4::avx2

// D a multiple of 32; index_query: R as well.
namespace dsv4::avx512 {
Status index_query(const IndexQueryParams&, const Context&);
int64_t index_topk_workspace_bytes(const IndexTopkParams&, const Context&);
Status index_topk(const IndexTopkParams&, const Context&);
}  // namespace dsv4::avx512

// D a multiple of 32, a bfloat16 query, keys that are exact in bfloat16 (all but float32).
namespace dsv4::amx {
int64_t index_topk_workspace_bytes(const IndexTopkParams&, const Context&);
Status index_topk(const IndexTopkParams&, const Context&);
}  // namespace dsv4::amx
