// mhc_pre, mhc_post_pre and mhc_head with bfloat16 streams: everything but the product is the AVX-512 kernels'.
#include "cpu/mhc.h"

#include "cpu/amx/mhc_product.h"

namespace dsv4::DSV4_AMX_NAMESPACE {

int64_t mhc_workspace_bytes(int64_t hidden, int mixes) { return Product::bytes(hidden, mixes); }

Status mhc_pre(const MhcPreParams& p, const Context& context) {
  return avx512::run<Product, bf16>(avx512::PreOp{p, nullptr}, context);
}

Status mhc_post_pre(const MhcPostPreParams& p, const Context& context) {
  return avx512::run<Product, bf16>(avx512::PreOp{p.pre, &p.post}, context);
}

Status mhc_head(const MhcHeadParams& p, const Context& context) {
  return avx512::run<Product, bf16>(avx512::HeadOp{p}, context);
}

}  // namespace dsv4::DSV4_AMX_NAMESPACE
