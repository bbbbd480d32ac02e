// sparse_attention by dot products of vectors: 8 heads x 32 keys of scores, or 8 heads x 32 dims of values, in 16
// accumulators; a word of queries or numerators is broadcast, the keys come from a tile. Bfloat16 pairs by vdpbf16ps
// where queries and keys are at most that wide, else float32 FMA. 4 H D FLOPs a key against its 584 bytes (FP8, D 512):
// bound by arithmetic from 2 heads on. Decoding and transposing, twice for all heads, are 5 % of the work at 64 heads.
// Expected: 80 % of the measured peak of vdpbf16ps.
#include "cpu/attention.h"

#include "cpu/avx512/attention_forward.h"
#include "cpu/avx512/attention_product.h"

namespace dsv4::avx512 {
namespace {

bool in_bf16(const SparseAttentionParams& p) {
  return p.window_pool.plain.dtype != DType::kFloat32 && p.compressed.plain.dtype != DType::kFloat32;
}

template <class Body>
DSV4_INLINE void with_types(const SparseAttentionParams& p, const Context& context, const Body& body) {
  if (p.query.dtype == DType::kFloat32) {
    body(Call<Product, float, float>(p, context));
  } else if (in_bf16(p)) {
    body(Call<Product, bf16, bf16>(p, context));
  } else {
    body(Call<Product, bf16, float>(p, context));
  }
}

}  // namespace

int64_t sparse_attention_workspace_bytes(const SparseAttentionParams& p, const Context& context) {
  int64_t bytes = 0;
  with_types(p, context, [&](const auto& call) { bytes = call.bytes(); });
  return bytes;
}

Status sparse_attention(const SparseAttentionParams& p, const Context& context) {
  with_types(p, context, [](const auto& call) { call.run(); });
  return Status::ok();
}

}  // namespace dsv4::avx512
