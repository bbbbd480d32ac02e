#include "ops/index.h"

#include "cpu/index.h"
#include "cuda/sm80/index.h"
#include "cuda/sm80/index_query.h"
#include "ops/candidates.h"
#include "ops/index_keys.h"
#include "ops/validate.h"

namespace dsv4 {
namespace {

// The vector kernels work on 32 dims at a time.
[[maybe_unused]] bool whole_steps(const IndexTopkParams& p) { return p.query.size(2) % 32 == 0; }

// The tile kernel multiplies bfloat16.
[[maybe_unused]] bool in_bf16(const IndexTopkParams& p) {
  return whole_steps(p) && p.query.dtype == DType::kBFloat16 && p.plain.dtype != DType::kFloat32;
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
  v.floating("query", p.query.dtype);
  v.view("query", p.query, p.query.dtype, {Validator::kAny, Validator::kAny, Validator::kAny});
  v.require(dim >= 2 && dim <= kMostIndexQueryDims && (dim & (dim - 1)) == 0,
            "dim must be a power of two from 2 to %lld, got %lld", static_cast<long long>(kMostIndexQueryDims),
            static_cast<long long>(dim));
  v.rope(p.rope, tokens, dim);
  v.view("result", p.result, p.query.dtype, {tokens, heads, dim});
  return v.status();
}

constexpr Candidate<IndexTopkParams> kIndexTopk[] = {
    {"sm80", Isa::kSm80, DSV4_SM80(sm80::index_topk)},
    {"amx", Isa::kAmx, DSV4_AMX(amx::index_topk), in_bf16},
    {"avx512", Isa::kAvx512, DSV4_AVX512(avx512::index_topk), whole_steps},
    {"scalar", Isa::kScalar, DSV4_SCALAR(scalar::index_topk)},
};
const Op index_topk_op("index_topk", kIndexTopk);

void validate_pages(Validator& v, const IndexTopkParams& p) {
  const int64_t dim = p.query.size(2);
  v.require(!(p.plain.given() && p.bytes.given()), "pages must be either plain keys or bytes");
  if (!v.status().is_ok()) return;
  if (p.bytes.given()) {
    v.require(dim < (int64_t{1} << 31), "the keys are too large");
    if (!v.status().is_ok()) return;
    const bool fp4 = holds_fp4_keys(p.bytes.size(1), p.page_size, dim);
    v.view("pages", p.bytes, DType::kUInt8,
           {Validator::kAny, p.page_size * (fp4 ? fp4_key_bytes(dim) : fp8_key_bytes(dim))});
  } else {
    v.floating("pages", p.plain.dtype);
    v.view("pages", p.plain, p.plain.dtype, {Validator::kAny, p.page_size, dim});
  }
}

// The lowest if it is negative, else the highest. Only where the values lie in this processor's memory.
void validate_sequences(Validator& v, const IndexTopkParams& p) {
  const auto sequence = p.sequence.as<const int32_t>();
  int64_t low = 0, high = -1;
  for (int64_t row = 0; row < sequence.size(0); ++row) {
    const int64_t value = *sequence.at(row);
    low = value < low ? value : low;
    high = value > high ? value : high;
  }
  const int64_t rows = p.table.size(0);
  v.require(low >= 0 && high < rows, "sequence must lie in [0, %lld), the rows of the table, got %lld",
            static_cast<long long>(rows), static_cast<long long>(low < 0 ? low : high));
}

void validate_arguments(Validator& v, const IndexTopkParams& p) {
  const int64_t tokens = p.query.size(0), heads = p.query.size(1);
  v.floating("query", p.query.dtype);
  v.view("query", p.query, p.query.dtype, {Validator::kAny, Validator::kAny, Validator::kAny});
  v.view("weights", p.weights, {tokens, heads});
  v.require(p.page_size >= 1, "the page size of pages must be at least 1, got %lld",
            static_cast<long long>(p.page_size));
  v.require(p.page_size <= INT32_MAX, "the page size of pages is too large");
  if (v.status().is_ok()) validate_pages(v, p);
  v.view("table", p.table, DType::kInt32, {Validator::kAny, Validator::kAny});
  v.view("sequence", p.sequence, DType::kInt32, {tokens});
  v.view("lengths", p.lengths, DType::kInt32, {tokens});
  v.at_least("k", p.k, 1);
}

Status validate(const IndexTopkParams& p, const Context& context) {
  Validator v("index_topk");
  validate_arguments(v, p);
  v.view("result", p.result, DType::kInt32, {p.query.size(0), p.k});
  if (v.status().is_ok() && context.device == Device::kCpu) validate_sequences(v, p);
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
