// Quantisers, their inverses and hadamard, portable.
#include "cpu/quantize.h"

#include "cpu/quantize_rows.h"
#include "cpu/scalar/rows.h"

namespace dsv4::scalar {

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

}  // namespace dsv4::scalar
