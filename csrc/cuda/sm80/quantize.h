// Block quantisers and the Hadamard rotation for every NVIDIA GPU from Ampere on. ops/quantize.cpp chooses among the
// candidates and has checked the parameters.
#pragma once

#include "ops/quantize.h"

namespace dsv4::sm80 {

inline constexpr int64_t kMostHadamardDims = 8192;  // of a row that shared memory holds

Status quantize_fp8(const QuantizeParams&, const Context&);
Status quantize_fp4(const QuantizeParams&, const Context&);
Status dequantize(const DequantizeParams&, const Context&);
Status hadamard(const HadamardParams&, const Context&);

}  // namespace dsv4::sm80
