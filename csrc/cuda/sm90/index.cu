// Scores of index_topk by warpgroups (index_scores.h); cut and selection are those of cuda/sm80/index.cu.
#include "cuda/common/launch.h"
#include "cuda/sm90/index.h"
#include "cuda/sm90/index_scores.h"

namespace dsv4::sm90 {

DSV4_KERNEL(kIndexThreads, 2) sm90_bf16_index_scores(const IndexArguments a) { index_scores<IndexGroupSums>(a); }

bool scores_by_warpgroups(const IndexTopkParams& p) {
  return p.query.dtype == DType::kBFloat16 && p.plain.dtype != DType::kFloat32 &&
         (p.query.size(2) + 31) / 32 == kIndexMaxDim / 32;
}

Status index_topk(const IndexTopkParams& p, const sm80::IndexCut& cut, const Context& context) {
  constexpr sm80::IndexScoresKernel kScores = {sm90_bf16_index_scores, kIndexScoresSharedBytes<IndexGroupSums>};
  static_assert(kScores.shared_bytes <= cuda::kMaxSharedBytes);
  return sm80::index_topk(p, cut, kScores, context);
}

Status index_topk(const IndexTopkParams& p, const Context& context) {
  return sm90::index_topk(p, sm80::index_cut(p), context);
}

}  // namespace dsv4::sm90
