// compress, portable.
#include "cpu/compress.h"

#include "cpu/compressor.h"
#include "cpu/scalar/rows.h"

namespace dsv4::scalar {

Status compress(const CompressParams& p, const Context& context) {
  return p.norm_weight.dtype == DType::kBFloat16 ? compress_rows<bf16>(Lanes(), p, context)
                                                 : compress_rows<float>(Lanes(), p, context);
}

}  // namespace dsv4::scalar
