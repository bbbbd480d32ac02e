// compress: an entry at a time. Every row of kv and gate is read once from memory, 8 c D bytes, and pooled in c = 1 or
// 2 entries at one float64 exponential a channel, some 20 operations in registers of eight: about as long as the
// reading. Writing is 1/ratio of a row. Expected: half the read bandwidth of a core.
#include "cpu/compress.h"

#include "cpu/avx512/rows.h"
#include "cpu/compressor.h"

namespace dsv4::avx512 {

Status compress(const CompressParams& p, const Context& context) {
  return p.norm_weight.dtype == DType::kBFloat16 ? compress_rows<bf16>(Lanes(), p, context)
                                                 : compress_rows<float>(Lanes(), p, context);
}

}  // namespace dsv4::avx512
