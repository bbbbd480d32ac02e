#include "ops/norm_rope.h"

#include "torch/pool.h"

namespace dsv4::binding {
namespace {

#if !defined(DSV4_TORCH_CUDA)  // no CUDA kernel yet: there Python's formulas run

constexpr const char* kFloats = "bfloat16 or float32 or float64";

void check_rope(Check& check, const Tensor& rope, int64_t tokens, int64_t head_dim) {
  check.tensor("rope", rope, {tokens, kAny, 2}, {ScalarType::Float}, {"float32 or float64", {nullptr, "rope_dim / 2"}});
  if (2 * rope.size(1) <= head_dim) return;
  check.require(false, "rope has " + std::to_string(rope.size(1)) + " pairs, more than half of the " +
                           std::to_string(head_dim) + " dims of a head");
}

Tensor query_norm_rope(const Tensor& q_, const Tensor& rope_, double eps) {
  Check check("query_norm_rope");
  const auto sizes = check.tensor("q", q_, {kAny, kAny, kAny}, {ScalarType::BFloat16, ScalarType::Float},
                                  {kFloats, {"tokens", "heads", "head_dim"}});
  check_rope(check, rope_, sizes[0], sizes[2]);
  const Tensor q = dense(q_), rope = dense(rope_, 2);
  Tensor result = empty({sizes[0], sizes[1], sizes[2]}, q.scalar_type(), q);
  check.run(dsv4::query_norm_rope, {view(q), view(rope), eps, mutable_view(result)}, q);
  return result;
}
DSV4_OP("query_norm_rope(Tensor q, Tensor rope, float eps=1e-06) -> Tensor", query_norm_rope)

void store_window(const Tensor& kv_, const Tensor& weight_, const Tensor& rope_, const Tensor& pages,
                  const Tensor& table, const Tensor& sequence_, const Tensor& position_, double eps,
                  int64_t page_size) {
  Check check("store_window");
  const auto sizes = check.tensor("kv", kv_, {kAny, kAny}, {ScalarType::BFloat16, ScalarType::Float},
                                  {kFloats, {"tokens", "head_dim"}});
  const int64_t tokens = sizes[0], head_dim = sizes[1];
  check.tensor("weight", weight_, {head_dim}, {ScalarType::BFloat16, ScalarType::Float}, {kFloats});
  check_rope(check, rope_, tokens, head_dim);
  if (page_size < 1) check.require(false, "page_size must be at least 1, got " + std::to_string(page_size));
  WrittenPool pool(check, false, pages, table, page_size, head_dim, 2 * rope_.size(1));
  check.tensor("sequence", sequence_, {tokens}, {ScalarType::Int}, {"int32 or int64"});
  check.tensor("position", position_, {tokens}, {ScalarType::Int}, {"int32 or int64"});
  const Tensor kv = dense(kv_), weight = dense(weight_), rope = dense(rope_, 2), sequence = dense(sequence_),
               position = dense(position_);
  StoreWindowParams params{view(kv), view(weight), view(rope), pool, view(sequence), view(position), eps, {}};
  const Scratch scratch(dsv4::store_window_workspace_bytes(params, check.context(kv)), kv);
  params.workspace = scratch;
  check.run(dsv4::store_window, params, kv);
  pool.finish();
}
DSV4_OP(
    "store_window(Tensor kv, Tensor weight, Tensor rope, Tensor(a!) pages, Tensor table, Tensor sequence, "
    "Tensor position, float eps=1e-06, int page_size=256) -> ()",
    store_window)

#endif

}  // namespace
}  // namespace dsv4::binding
