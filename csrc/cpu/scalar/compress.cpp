// compress, portable.
#include "cpu/compress.h"

#include "cpu/compressor.h"
#include "cpu/compressor_backward.h"
#include "cpu/scalar/rows.h"

namespace dsv4::scalar {

Status compress(const CompressParams& p, const Context& context) {
  return p.norm_weight.dtype == DType::kBFloat16 ? compress_rows<bf16>(Lanes(), p, context)
                                                 : compress_rows<float>(Lanes(), p, context);
}

Status compress_entries(const CompressEntriesParams& p, const Context& context) {
  return p.norm_weight.dtype == DType::kBFloat16 ? compress_entries_rows<bf16>(Lanes(), p, context)
                                                 : compress_entries_rows<float>(Lanes(), p, context);
}

Status compress_entries_backward(const CompressEntriesBackwardParams& p, const Context& context) {
  return p.grad.dtype == DType::kBFloat16 ? compress_entries_gradients<bf16>(Lanes(), p, context)
                                          : compress_entries_gradients<float>(Lanes(), p, context);
}

}  // namespace dsv4::scalar
