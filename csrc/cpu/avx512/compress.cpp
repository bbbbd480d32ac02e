// compress: an entry at a time. Every row of kv and gate is read once from memory, 8 c D bytes, and pooled in c = 1 or
// 2 entries at one float64 exponential a channel, some 20 operations in registers of eight: about as long as the
// reading. Writing is 1/ratio of a row. Expected: half the read bandwidth of a core. The gradients read the rows twice,
// the second time from the cache, write as much, and take the exponential twice: bound by arithmetic.
#include "cpu/compress.h"

#include "cpu/avx512/rows.h"
#include "cpu/compressor.h"
#include "cpu/compressor_backward.h"

namespace dsv4::avx512 {

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

}  // namespace dsv4::avx512
