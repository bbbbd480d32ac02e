// sparse_attention by dot products of vectors: 8 heads x 32 keys of scores, or 8 heads x 32 dims of values, in 16
// accumulators; a word of queries or numerators is broadcast, the keys come from a tile. Bfloat16 pairs by vdpbf16ps
// where queries and keys are at most that wide, else float32 FMA. 4 H D FLOPs a key against its 584 bytes (FP8, D 512):
// bound by arithmetic from 2 heads on. Decoding and transposing, twice for all heads, are 10 % of the work at 64 heads.
// Expected: 80 % of the measured peak of vdpbf16ps.
#include "cpu/attention.h"

#include "cpu/avx512/attention_forward.h"
#include "cpu/avx512/attention_product.h"

namespace dsv4::avx512 {

int64_t sparse_attention_workspace_bytes(const SparseAttentionParams& p, const Context& context) {
  int64_t bytes = 0;
  with_types(p, [&](auto x, auto m) { bytes = Call<RowWork<Product, decltype(x), decltype(m)>>(p, context).bytes(); });
  return bytes;
}

Status sparse_attention(const SparseAttentionParams& p, const Context& context) {
  with_types(p, [&](auto x, auto m) { Call<RowWork<Product, decltype(x), decltype(m)>>(p, context).run(); });
  return Status::ok();
}

}  // namespace dsv4::avx512
