// mhc_pre, mhc_head: fn r by float32 FMA, 12 rows of fn x 2 tokens in 24 accumulators; fn packed once a call into
// blocks of 12 rows x 32 elements that the kernel reads straight through. Tiles of up to 16 tokens stay in the
// second-level cache, so the weighted sum finds their streams there and memory is read once: 10 D + 80 bytes a token
// for bfloat16. Against that stand 208 D FLOPs: with one FMA unit a core (Zen 4) they bind, at less than half of the
// copy bandwidth; 80 % of the FMA peak expected. fn as bfloat16 high + low would not help: vdpbf16ps does two products
// for one FMA at best, and needs both halves. mhc_post: one pass, 40 D FLOPs for 18 D + 80 bytes a token: bound by
// memory. Results of more than kStreamBytes bypass the caches, which saves reading what is about to be overwritten.
// mhc_post_pre makes a tile's streams just before it reads them.
#include "cpu/mhc.h"

#include "cpu/avx512/mhc_product.h"

namespace dsv4::avx512 {
namespace {

template <class X>
Status post(const MhcPostParams& p, const Context& context) {
  const bool past = past_caches(p.result, sizeof(X));
  const int64_t token = p.result.stride[0], stride = p.result.stride[1];
  parallel(context, p.streams.shape[0], [&](int64_t begin, int64_t end) {
    X* result = static_cast<X*>(p.result.data) + begin * token;
    if (past) {
      post_tokens<X, Store::kPastCaches>(p, begin, end, result, token, stride);
    } else {
      post_tokens<X, Store::kWhole>(p, begin, end, result, token, stride);
    }
  });
  return Status::ok();
}

}  // namespace

int64_t mhc_workspace_bytes(int64_t hidden, int mixes) { return Product::bytes(hidden, mixes); }

int64_t mhc_kept_bytes(int64_t tokens, int64_t hidden, DType x, const Context& context) {
  const int64_t token = kStreams * hidden * (x == DType::kBFloat16 ? 2 : 4);
  return tokens * token > kCachedBytes ? context.threads * kTile * token : 0;
}

Status mhc_post(const MhcPostParams& p, const Context& context) {
  return p.streams.dtype == DType::kBFloat16 ? post<bf16>(p, context) : post<float>(p, context);
}

Status mhc_pre(const MhcPreParams& p, const Context& context) {
  const PreOp op{p, nullptr};
  return p.streams.dtype == DType::kBFloat16 ? run<Product, bf16>(op, context) : run<Product, float>(op, context);
}

Status mhc_post_pre(const MhcPostPreParams& p, const Context& context) {
  const PreOp op{p.pre, &p.post};
  return p.pre.streams.dtype == DType::kBFloat16 ? run<Product, bf16>(op, context) : run<Product, float>(op, context);
}

Status mhc_head(const MhcHeadParams& p, const Context& context) {
  const HeadOp op{p};
  return p.streams.dtype == DType::kBFloat16 ? run<Product, bf16>(op, context) : run<Product, float>(op, context);
}

}  // namespace dsv4::avx512
