// The mHC kernels for every NVIDIA GPU from Ampere on. ops/mhc.cpp chooses among the candidates and has checked the
// parameters. Every hidden >= 1 and any token count; the backward passes have no CUDA kernel.
#pragma once

#include "ops/mhc.h"

namespace dsv4::sm80 {

Status mhc_post(const MhcPostParams&, const Context&);
Status mhc_pre(const MhcPreParams&, const Context&);
Status mhc_post_pre(const MhcPostPreParams&, const Context&);
Status mhc_head(const MhcHeadParams&, const Context&);

// What mhc_pre, mhc_post_pre and mhc_head need: the partial sums of the mixing product.
int64_t mhc_workspace_bytes(int64_t tokens, int64_t hidden);

}  // namespace dsv4::sm80
