// The mHC kernels for every NVIDIA GPU from Ampere on. ops/mhc.cpp chooses among the candidates and has checked the
// parameters. Every hidden >= 1 and any token count.
#pragma once

#include "ops/mhc.h"

namespace dsv4::sm80 {

Status mhc_post(const MhcPostParams&, const Context&);
Status mhc_pre(const MhcPreParams&, const Context&);
Status mhc_post_pre(const MhcPostPreParams&, const Context&);
Status mhc_head(const MhcHeadParams&, const Context&);
Status mhc_post_backward(const MhcPostBackwardParams&, const Context&);
Status mhc_pre_backward(const MhcPreBackwardParams&, const Context&);
Status mhc_head_backward(const MhcHeadBackwardParams&, const Context&);

// What mhc_pre, mhc_post_pre and mhc_head need: the partial sums of the mixing product.
int64_t mhc_workspace_bytes(int64_t tokens, int64_t hidden);
// What mhc_pre_backward and mhc_head_backward need: those, records of the tokens and sums over pieces of them.
int64_t mhc_backward_workspace_bytes(int64_t tokens, int64_t hidden, DType x, bool head);

}  // namespace dsv4::sm80
