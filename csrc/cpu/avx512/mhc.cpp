// mhc_pre, mhc_head: fn r by float32 FMA (mhc_product.h). 208 D FLOPs a token against 10 D + 80 bytes (bfloat16): with
// one FMA of 16 lanes a cycle the arithmetic binds, at less than half of the copy bandwidth. fn as bfloat16 high + low
// would not help: vdpbf16ps does two products for one FMA at best, and needs both halves. Tiles of 16 tokens: the
// weighted sum finds their streams in the second-level cache, memory is read once, and what the next tile needs is
// fetched while this one multiplies. 85 % of the FMA peak expected. mhc_post: one pass, 40 D FLOPs for 18 D + 80 bytes
// a token: bound by memory. mhc_post_pre: 248 D FLOPs for 20 D + 160 bytes; a tile's new streams are made in a buffer
// that stays in the cache, and written to memory from there while they are multiplied. docs/investigations/mhc_cpu.md
// has the measurements.
#include "cpu/mhc.h"

#include "cpu/avx512/mhc_product.h"

namespace dsv4::avx512 {
namespace {

template <class X>
Status post(const MhcPostParams& p, const Context& context) {
  const bool past = past_caches(p.result, sizeof(X));
  const int64_t token = p.result.stride[0], stride = p.result.stride[1];
  constexpr int64_t kSmall = 16384;  // elements of one stream: 10 us
  const bool small = p.streams.shape[0] * p.streams.shape[2] <= kSmall;
  parallel(small ? on_this_thread(context) : context, p.streams.shape[0], [&](int64_t begin, int64_t end) {
    X* result = static_cast<X*>(p.result.data) + begin * token;
    const Slices::Range columns = Slices::all(p.streams.shape[2]);
    if (past) {
      post_tokens<X, Store::kPastCaches>(p, begin, end, columns, result, token, stride);
    } else {
      post_tokens<X, Store::kWhole>(p, begin, end, columns, result, token, stride);
    }
  });
  return Status::ok();
}

}  // namespace

int64_t mhc_workspace_bytes(int64_t hidden, int mixes) { return Product::bytes(hidden, mixes); }

int64_t mhc_kept_bytes(int64_t tokens, int64_t hidden, DType x, const Context& context) {
  const int64_t token = kStreams * hidden * (x == DType::kBFloat16 ? 2 : 4);
  return tokens * token > kCachedBytes ? context.threads * kMhcTokens * token : 0;
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
