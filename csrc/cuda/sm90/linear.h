// The linear layers of quantised weights on Hopper, by the products of warpgroups where there are many tokens.
#pragma once

#include "ops/linear.h"

namespace dsv4::sm90 {

Status fp8_linear(const LinearParams&, const Context&);
Status fp4_linear(const LinearParams&, const Context&);
Status grouped_linear(const LinearParams&, const Context&);

// Whatever the number of tokens. FP4 weights with e8m0 scales, rows of grouped_linear in bfloat16.
Status fp8_linear_many(const LinearParams&, const Context&);
Status fp4_linear_many(const LinearParams&, const Context&);
Status grouped_linear_many(const LinearParams&, const Context&);

}  // namespace dsv4::sm90
