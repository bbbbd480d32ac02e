#include "ops/index.h"

#include "torch/pool.h"

namespace dsv4::binding {
namespace {

constexpr char kFloats[] = "bfloat16 or float16 or float32 or float64";

Tensor index_topk(const Tensor& query_, const Tensor& weights_, const Tensor& pages_, const Tensor& table_,
                  const Tensor& sequence_, const Tensor& lengths_, int64_t k, int64_t page_size) {
  Check check("index_topk");
  const auto sizes = check.tensor("query", query_, {kAny, kAny, kAny}, {ScalarType::BFloat16, ScalarType::Float},
                                  {kFloats, {"tokens", "index_heads", "dim"}});
  const int64_t tokens = sizes[0], heads = sizes[1], dim = sizes[2];
  check.tensor("weights", weights_, {tokens, heads}, {ScalarType::Float}, {"float32 or float64"});
  check_pages(check, "pages", true, pages_, page_size, dim, 0);
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
