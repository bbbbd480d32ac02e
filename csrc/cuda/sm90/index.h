// index_topk on Hopper: bfloat16 queries of 97 to 128 dims score by the products of warpgroups, all else as on sm_80.
#pragma once

#include "cuda/sm80/index.h"

namespace dsv4::sm90 {

bool scores_by_warpgroups(const IndexTopkParams&);
Status index_topk(const IndexTopkParams&, const sm80::IndexCut&, const Context&);
Status index_topk(const IndexTopkParams&, const Context&);

}  // namespace dsv4::sm90
