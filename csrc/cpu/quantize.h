// The Hadamard kernels of each CPU instruction set. ops/quantize.cpp chooses among them and has checked the parameters.
#pragma once

#include "ops/quantize.h"

namespace dsv4::scalar {
Status hadamard(const HadamardParams&, const Context&);
}  // namespace dsv4::scalar

// Widths that are multiples of 32.
namespace dsv4::avx512 {
Status hadamard(const HadamardParams&, const Context&);
}  // namespace dsv4::avx512
