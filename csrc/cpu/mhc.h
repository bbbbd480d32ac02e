// The mHC kernels of each CPU instruction set. ops/mhc.cpp chooses among them and has checked the parameters.
#pragma once

#include "ops/mhc.h"

namespace dsv4 {

inline constexpr int64_t kMhcTokens = 32;  // that a thread takes together, at most

// What a backward pass over the tokens leaves for what follows it.
struct MhcTokenGradient {
  float product[kMixes];  // of fn r
  float logits[kMixes];
  float scale[3];  // logits * m, summed over the group
  float pre[kStreams];
  float rms;         // 1 / rms of the sublayer's input before its norm
  float norm_along;  // d input before its norm = rms * weight * grad_input - norm_along * that input
  float along;       // d streams has -along * streams
  float unused[6];   // 256 bytes in all, so that tokens start on cache lines
};
static_assert(sizeof(MhcTokenGradient) == 256);

}  // namespace dsv4

namespace dsv4::scalar {
Status mhc_pre(const MhcPreParams&, const Context&);
Status mhc_post(const MhcPostParams&, const Context&);
Status mhc_post_pre(const MhcPostPreParams&, const Context&);
Status mhc_head(const MhcHeadParams&, const Context&);
Status mhc_pre_backward(const MhcPreBackwardParams&, const Context&);
Status mhc_post_backward(const MhcPostBackwardParams&, const Context&);
Status mhc_head_backward(const MhcHeadBackwardParams&, const Context&);
}  // namespace dsv4::scalar

namespace dsv4::avx2 {
int64_t mhc_workspace_bytes(int64_t tokens, const Context&);
int64_t mhc_backward_bytes(int64_t tokens, int64_t hidden, const Context&);
Status mhc_pre(const MhcPreParams&, const Context&);
Status mhc_post(const MhcPostParams&, const Context&);
Status mhc_post_pre(const MhcPostPreParams&, const Context&);
Status mhc_head(const MhcHeadParams&, const Context&);
Status mhc_pre_backward(const MhcPreBackwardParams&, const Context&);
Status mhc_post_backward(const MhcPostBackwardParams&, const Context&);
Status mhc_head_backward(const MhcHeadBackwardParams&, const Context&);
}  // namespace dsv4::avx2

namespace dsv4::avx512 {
int64_t mhc_workspace_bytes(int64_t hidden, int mixes);  // packed fn
int64_t mhc_backward_bytes(int64_t tokens, int64_t hidden, int mixes, const Context&);
// What mhc_post_pre needs behind it, in any instruction set, where its new streams are too large for the caches.
int64_t mhc_kept_bytes(int64_t tokens, int64_t hidden, DType x, const Context&);
Status mhc_pre(const MhcPreParams&, const Context&);
Status mhc_post(const MhcPostParams&, const Context&);
Status mhc_post_pre(const MhcPostPreParams&, const Context&);
Status mhc_head(const MhcHeadParams&, const Context&);
Status mhc_pre_backward(const MhcPreBackwardParams&, const Context&);
Status mhc_post_backward(const MhcPostBackwardParams&, const Context&);
Status mhc_head_backward(const MhcHeadBackwardParams&, const Context&);
}  // namespace dsv4::avx512

// Bfloat16 streams only.
namespace dsv4::amx {
int64_t mhc_workspace_bytes(int64_t hidden, int mixes);  // packed fn
int64_t mhc_backward_bytes(int64_t tokens, int64_t hidden, int mixes, const Context&);
Status mhc_pre(const MhcPreParams&, const Context&);
Status mhc_post_pre(const MhcPostPreParams&, const Context&);
Status mhc_head(const MhcHeadParams&, const Context&);
Status mhc_pre_backward(const MhcPreBackwardParams&, const Context&);
Status mhc_head_backward(const MhcHeadBackwardParams&, const Context&);
}  // namespace dsv4::amx
