// hadamard: n log2 n additions in float64 registers of eight; rows of up to 128 never leave the registers. 4 n bytes a
// row of bfloat16; at n = 128 it is bound by the additions.
// quantize_*: a block's largest magnitude, then its codes, 16 values a register; the second reading comes from the
// first-level cache. dequantize_*: e4m3 by way of float16, whose denormals cover those of e4m3; e2m1 by a table of one
// register. 3 to 6 bytes a value in and out, 10 to 20 instructions for 16: bound by memory for rows beyond the caches.
#include "cpu/quantize.h"

#include "cpu/avx512/rows.h"
#include "cpu/quantize_rows.h"

namespace dsv4::avx512 {

Status quantize_fp8(const QuantizeParams& p, const Context& context) { return quantize_fp8_rows(Lanes(), p, context); }

Status quantize_fp4(const QuantizeParams& p, const Context& context) { return quantize_fp4_rows(Lanes(), p, context); }

Status dequantize(const DequantizeParams& p, const Context& context) {
  return p.result.dtype == DType::kBFloat16 ? dequantize_rows<bf16>(Lanes(), p, context)
                                            : dequantize_rows<float>(Lanes(), p, context);
}

Status hadamard(const HadamardParams& p, const Context& context) {
  return p.x.dtype == DType::kBFloat16 ? hadamard_rows<bf16>(Lanes(), p, context)
                                       : hadamard_rows<float>(Lanes(), p, context);
}

}  // namespace dsv4::avx512
