// The quantisers' and the Hadamard kernels of each CPU instruction set. ops/quantize.cpp chooses among them and has
// checked the parameters.
#pragma once

#include "ops/quantize.h"

namespace dsv4::scalar {
Status quantize_fp8(const QuantizeParams&, const Context&);
Status quantize_fp4(const QuantizeParams&, const Context&);
Status dequantize(const DequantizeParams&, const Context&);
Status hadamard(const HadamardParams&, const Context&);
}  // namespace dsv4::scalar

// Widths and blocks that are multiples of 32.
namespace dsv4::avx512 {
Status quantize_fp8(const QuantizeParams&, const Context&);
Status quantize_fp4(const QuantizeParams&, const Context&);
Status dequantize(const DequantizeParams&, const Context&);
Status hadamard(const HadamardParams&, const Context&);
}  // namespace dsv4::avx512
