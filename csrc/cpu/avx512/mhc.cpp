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

constexpr int64_t kStreamBytes = int64_t{8} << 20;
template <class X>
Status post(const MhcPostParams& p, const Context& context) {
  const int64_t tokens = p.streams.shape[0], hidden = p.streams.shape[2], size = sizeof(X);
  const bool aligned = (reinterpret_cast<uintptr_t>(p.result.data) | static_cast<uintptr_t>(p.result.stride[0] * size) |
                        static_cast<uintptr_t>(p.result.stride[1] * size)) %
                           64 ==
                       0;
  const bool past_caches = aligned && tokens * kStreams * hidden * size > kStreamBytes;
  parallel(context, tokens, [&](int64_t begin, int64_t end) {
    if (past_caches) {
      post_tokens<X, Store::kPastCaches>(p, begin, end);
    } else {
      post_tokens<X, Store::kWhole>(p, begin, end);
    }
  });
  return Status::ok();
}

}  // namespace

int64_t mhc_workspace_bytes(int64_t hidden, int mixes) {
  return mixes * kStreams * Product::steps(hidden) * kStep * static_cast<int64_t>(sizeof(float));
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
