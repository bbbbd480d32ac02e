#include "ops/index.h"

#include "cpu/index.h"
#include "cuda/sm80/index.h"
#include "cuda/sm80/index_query.h"
#include "cuda/sm90/index.h"
#include "ops/candidates.h"
#include "ops/pool_checks.h"

namespace dsv4 {
namespace {

// The vector kernels work on 32 dims at a time.
[[maybe_unused]] bool whole_steps(const IndexTopkParams& p) { return p.query.size(2) % 32 == 0; }

// The tile kernel multiplies bfloat16.
[[maybe_unused]] bool in_bf16(const IndexTopkParams& p) {
  return whole_steps(p) && p.query.size(1) > 0 && p.query.dtype == DType::kBFloat16 && p.plain.dtype != DType::kFloat32;
}

[[maybe_unused]] bool whole_heads(const IndexQueryParams& p) {
  return p.query.size(2) % 32 == 0 && p.rope.size(1) % 16 == 0;
}

constexpr Candidate<IndexQueryParams> kIndexQuery[] = {
    {"sm80", Isa::kSm80, DSV4_SM80(sm80::index_query)},
    {"avx512", Isa::kAvx512, DSV4_AVX512(avx512::index_query), whole_heads},
    {"scalar", Isa::kScalar, DSV4_SCALAR(scalar::index_query)},
};
const Op index_query_op("index_query", kIndexQuery);

Status validate(const IndexQueryParams& p) {
  Validator v("index_query");
  const int64_t tokens = p.query.size(0), heads = p.query.size(1), dim = p.query.size(2);
  v.floats("query", p.query, {Validator::kAny, Validator::kAny, Validator::kAny});
  v.require(dim >= 2 && dim <= kMostIndexQueryDims && (dim & (dim - 1)) == 0,
            "dim must be a power of two from 2 to %lld, got %lld", static_cast<long long>(kMostIndexQueryDims),
            static_cast<long long>(dim));
  v.rope(p.rope, tokens, dim);
  v.view("result", p.result, p.query.dtype, {tokens, heads, dim});
  return v.status();
}

constexpr Candidate<IndexTopkParams> kIndexTopk[] = {
    {"sm90", Isa::kSm90, DSV4_SM90(sm90::index_topk), DSV4_SM90(sm90::scores_by_warpgroups)},
    {"sm80", Isa::kSm80, DSV4_SM80(sm80::index_topk)},
    {"amx", Isa::kAmx, DSV4_AMX(amx::index_topk), in_bf16},
    {"avx512", Isa::kAvx512, DSV4_AVX512(avx512::index_topk), whole_steps},
    {"avx2", Isa::kAvx2, DSV4_AVX2(avx2::index_topk), whole_steps},
    {"scalar", Isa::kScalar, DSV4_SCALAR(scalar::index_topk)},
};
const Op index_topk_op("index_topk", kIndexTopk);

void validate_arguments(Validator& v, const IndexTopkParams& p) {
  const int64_t tokens = p.query.size(0), heads = p.query.size(1);
  v.floats("query", p.query, {Validator::kAny, Validator::kAny, Validator::kAny});
  v.view("weights", p.weights, {tokens, heads});
  const RowPool pool{p.plain, p.bytes, p.table, p.page_size};
  validate_pool(v, "pages", "table", pool, PoolKind::kKeys, Validator::kAny, p.query.size(2), 0);
  v.view("sequence", p.sequence, DType::kInt32, {tokens});
  v.view("lengths", p.lengths, DType::kInt32, {tokens});
  v.at_least("k", p.k, 1);
}

Status validate(const IndexTopkParams& p, const Context& context) {
  Validator v("index_topk");
  validate_arguments(v, p);
  v.view("result", p.result, DType::kInt32, {p.query.size(0), p.k});
  if (context.device == Device::kCpu) validate_sequences(v, p.sequence, p.table.size(0));
  if (!v.status().is_ok()) return v.status();
  v.workspace(p.workspace.data, p.workspace.bytes, index_topk_workspace_bytes(p, context));
  return v.status();
}

}  // namespace

int64_t index_topk_workspace_bytes(const IndexTopkParams& p, const Context& context) {
  Validator v("index_topk");
  validate_arguments(v, p);
  if (!v.status().is_ok()) return 0;
  int64_t bytes = 0;
  [[maybe_unused]] const auto at_least = [&](int64_t needed) { bytes = needed > bytes ? needed : bytes; };
  if (context.device == Device::kCpu) {
#if defined(DSV4_WITH_CPU)
    at_least(scalar::index_topk_workspace_bytes(p, context));
#endif
#if defined(DSV4_WITH_AVX2)
    if (context.best >= Isa::kAvx2 && whole_steps(p)) at_least(avx2::index_topk_workspace_bytes(p, context));
#endif
#if defined(DSV4_WITH_AVX512)
    if (context.best >= Isa::kAvx512 && whole_steps(p)) at_least(avx512::index_topk_workspace_bytes(p, context));
#endif
#if defined(DSV4_WITH_AMX)
    if (context.best >= Isa::kAmx && in_bf16(p)) at_least(amx::index_topk_workspace_bytes(p, context));
#endif
  }
#if defined(DSV4_WITH_SM80)
  if (context.device == Device::kCuda) at_least(sm80::index_topk_workspace_bytes(p));
#endif
  return bytes;
}

Status index_query(const IndexQueryParams& p, const Context& c) { return index_query_op.run(validate(p), p, c); }

Status index_topk(const IndexTopkParams& p, const Context& c) { return index_topk_op.run(validate(p, c), p, c); }

}  // namespace dsv4
