#include "ops/index.h"

#include "torch/glue.h"

namespace dsv4::binding {
namespace {

constexpr char kFloats[] = "bfloat16 or float16 or float32 or float64";

void check_pages(Check& check, const Tensor& pages, int64_t page_size, int64_t dim) {
  check.require(page_size >= 1, "the page size of pages must be at least 1, got " + std::to_string(page_size));
  if (pages.scalar_type() != ScalarType::Byte) {
    check.tensor("pages", pages, {kAny, page_size, dim}, {ScalarType::BFloat16, ScalarType::Float},
                 {kFloats, {"pages"}});
    return;
  }
  const bool has_fp4 = dim % 32 == 0;
  const int64_t fp4 = page_size * (dim / 2 + dim / 32), fp8 = page_size * (dim + 4);
  const bool is_fp4 = has_fp4 && pages.dim() == 2 && pages.size(1) == fp4;
  const std::string bytes = (has_fp4 ? std::to_string(fp4) + " or " : "") + std::to_string(fp8);
  check.tensor("pages", pages, {kAny, is_fp4 ? fp4 : fp8}, {ScalarType::Byte}, {nullptr, {"pages", bytes.c_str()}});
}

Tensor index_topk(const Tensor& query_, const Tensor& weights_, const Tensor& pages_, const Tensor& table_,
                  const Tensor& sequence_, const Tensor& lengths_, int64_t k, int64_t page_size) {
  Check check("index_topk");
  const auto sizes = check.tensor("query", query_, {kAny, kAny, kAny}, {ScalarType::BFloat16, ScalarType::Float},
                                  {kFloats, {"tokens", "index_heads", "dim"}});
  const int64_t tokens = sizes[0], heads = sizes[1], dim = sizes[2];
  check.tensor("weights", weights_, {tokens, heads}, {ScalarType::Float}, {"float32 or float64"});
  check_pages(check, pages_, page_size, dim);
  check.tensor("table", table_, {kAny, kAny}, {ScalarType::Int}, {nullptr, {"sequences", "blocks"}});
  check.tensor("sequence", sequence_, {tokens}, {ScalarType::Int});
  check.tensor("lengths", lengths_, {tokens}, {ScalarType::Int});
  check.require(k >= 1, "k must be at least 1, got " + std::to_string(k));
  const Tensor query = dense(query_), weights = dense(weights_), pages = dense(pages_), table = dense(table_),
               sequence = dense(sequence_), lengths = dense(lengths_);
  Tensor result = empty({tokens, k}, ScalarType::Int, query);
  IndexTopkParams params{};
  params.query = view(query);
  params.weights = view(weights);
  if (pages.scalar_type() == ScalarType::Byte) {
    params.bytes = view(pages);
  } else {
    params.plain = view(pages);
  }
  params.table = view(table);
  params.sequence = view(sequence);
  params.lengths = view(lengths);
  params.k = k;
  params.page_size = page_size;
  params.result = mutable_view(result);
  check.run(dsv4::index_topk, dsv4::index_topk_workspace_bytes, params, query);
  return result;
}
DSV4_OP(
    "index_topk(Tensor query, Tensor weights, Tensor pages, Tensor table, Tensor sequence, Tensor lengths, int k, "
    "int page_size=64) -> Tensor",
    index_topk)

Tensor index_query(const Tensor& query_, const Tensor& rope_) {
  Check check("index_query");
  const auto sizes = check.tensor("query", query_, {kAny, kAny, kAny}, {ScalarType::BFloat16, ScalarType::Float},
                                  {"bfloat16 or float32 or float64", {"tokens", "heads", "dim"}});
  check.rope(rope_, sizes[0], sizes[2]);
  const Tensor query = dense(query_), rope = dense(rope_, 2);
  const Tensor result = empty({sizes[0], sizes[1], sizes[2]}, query.scalar_type(), query);
  check.run(dsv4::index_query, {view(query), view(rope), mutable_view(result)}, query);
  return result;
}
DSV4_OP("index_query(Tensor query, Tensor rope) -> Tensor", index_query)

}  // namespace
}  // namespace dsv4::binding
