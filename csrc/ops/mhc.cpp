#include "ops/mhc.h"

#include "cpu/mhc.h"
#include "ops/candidates.h"

namespace dsv4 {
namespace {

constexpr Candidate<MhcPostParams> kMhcPost[] = {
    {"scalar", Isa::kScalar, DSV4_SCALAR(scalar::mhc_post)},
};
const Op mhc_post_op("mhc_post", kMhcPost);

Status validate(const MhcPostParams& p) {
  const int64_t tokens = p.streams.size(0), hidden = p.streams.size(2);
  if (p.streams.dtype != DType::kBFloat16 && p.streams.dtype != DType::kFloat32) {
    return Status::error("mhc_post: streams must be bfloat16 or float32");
  }
  if (p.sublayer.dtype != p.streams.dtype || p.result.dtype != p.streams.dtype) {
    return Status::error("mhc_post: sublayer, streams and result must have one dtype");
  }
  if (p.streams.size(1) != kStreams || p.sublayer.size(0) != tokens || p.sublayer.size(1) != hidden ||
      p.post.size(0) != tokens || p.comb.size(0) != tokens || p.result.size(0) != tokens ||
      p.result.size(2) != hidden) {
    return Status::error("mhc_post: sizes disagree: streams [%lld, %lld, %lld], sublayer [%lld, %lld]",
                         static_cast<long long>(tokens), static_cast<long long>(p.streams.size(1)),
                         static_cast<long long>(hidden), static_cast<long long>(p.sublayer.size(0)),
                         static_cast<long long>(p.sublayer.size(1)));
  }
  return Status::ok();
}

}  // namespace

Status mhc_post(const MhcPostParams& p, const Context& c) { return mhc_post_op.run(validate(p), p, c); }

}  // namespace dsv4
