// hadamard, portable.
#include "cpu/quantize.h"

#include "cpu/hadamard_rows.h"
#include "cpu/scalar/rows.h"

namespace dsv4::scalar {

Status hadamard(const HadamardParams& p, const Context& context) {
  return p.x.dtype == DType::kBFloat16 ? hadamard_rows<bf16>(Lanes(), p, context)
                                       : hadamard_rows<float>(Lanes(), p, context);
}

}  // namespace dsv4::scalar
