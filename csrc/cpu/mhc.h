// The mHC kernels of each CPU instruction set. ops/mhc.cpp chooses among them and has checked the parameters.
#pragma once

#include "ops/mhc.h"

namespace dsv4::scalar {
Status mhc_post(const MhcPostParams&, const Context&);
}  // namespace dsv4::scalar
