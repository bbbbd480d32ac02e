// hadamard: n log2 n additions in float64 registers of eight; rows of up to 128 never leave the registers. 4 n bytes a
// row of bfloat16; at n = 128 it is bound by the additions.
#include "cpu/quantize.h"

#include "cpu/avx512/rows.h"
#include "cpu/hadamard_rows.h"

namespace dsv4::avx512 {

Status hadamard(const HadamardParams& p, const Context& context) {
  return p.x.dtype == DType::kBFloat16 ? hadamard_rows<bf16>(Lanes(), p, context)
                                       : hadamard_rows<float>(Lanes(), p, context);
}

}  // namespace dsv4::avx512
