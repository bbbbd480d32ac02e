#include "ops/norm_rope.h"

#include "torch/pool.h"

namespace dsv4::binding {
namespace {

constexpr const char* kFloats = "bfloat16 or float32 or float64";

Tensor query_norm_rope(const Tensor& q_, const Tensor& rope_, double eps) {
  Check check("query_norm_rope");
  const auto sizes = check.tensor("q", q_, {kAny, kAny, kAny}, {ScalarType::BFloat16, ScalarType::Float},
                                  {kFloats, {"tokens", "heads", "head_dim"}});
  check.rope(rope_, sizes[0], sizes[2]);
  const Tensor q = dense(q_), rope = dense(rope_, 2);
  Tensor result = empty({sizes[0], sizes[1], sizes[2]}, q.scalar_type(), q);
  check.run(dsv4::query_norm_rope, {view(q), view(rope), eps, mutable_view(result)}, q);
  return result;
}
DSV4_OP("query_norm_rope(Tensor q, Tensor rope, float eps=1e-06) -> Tensor", query_norm_rope)

Tensor query_norm_rope_backward(const Tensor& grad_, const Tensor& q_, const Tensor& rope_, double eps) {
  Check check("query_norm_rope_backward");
  const auto sizes = check.tensor("q", q_, {kAny, kAny, kAny}, {ScalarType::BFloat16, ScalarType::Float},
                                  {kFloats, {"tokens", "heads", "head_dim"}});
  check.tensor("grad", grad_, {sizes[0], sizes[1], sizes[2]}, {q_.scalar_type()});
  check.rope(rope_, sizes[0], sizes[2]);
  const Tensor grad = dense(grad_), q = dense(q_), rope = dense(rope_, 2);
  Tensor result = empty({sizes[0], sizes[1], sizes[2]}, q.scalar_type(), q);
  check.run(dsv4::query_norm_rope_backward, {view(grad), view(q), view(rope), eps, mutable_view(result)}, q);
  return result;
}
DSV4_OP("query_norm_rope_backward(Tensor grad, Tensor q, Tensor rope, float eps=1e-06) -> Tensor",
        query_norm_rope_backward)

void store_window(const Tensor& kv_, const Tensor& weight_, const Tensor& rope_, const Tensor& pages,
                  const Tensor& table, const Tensor& sequence_, const Tensor& position_, double eps,
                  int64_t page_size) {
  Check check("store_window");
  const auto sizes = check.tensor("kv", kv_, {kAny, kAny}, {ScalarType::BFloat16, ScalarType::Float},
                                  {kFloats, {"tokens", "head_dim"}});
  const int64_t tokens = sizes[0], head_dim = sizes[1];
  check.tensor("weight", weight_, {head_dim}, {ScalarType::BFloat16, ScalarType::Float}, {kFloats});
  check.rope(rope_, tokens, head_dim);
  WrittenPool pool(check, false, pages, table, page_size, head_dim, 2 * rope_.size(1));
  check.tensor("sequence", sequence_, {tokens}, {ScalarType::Int}, {"int32 or int64"});
  check.tensor("position", position_, {tokens}, {ScalarType::Int}, {"int32 or int64"});
  const Tensor kv = dense(kv_), weight = dense(weight_), rope = dense(rope_, 2), sequence = dense(sequence_),
               position = dense(position_);
  StoreWindowParams params{view(kv), view(weight), view(rope), pool, view(sequence), view(position), eps, {}};
  check.run(dsv4::store_window, dsv4::store_window_workspace_bytes, params, kv);
  pool.finish();
}
DSV4_OP(
    "store_window(Tensor kv, Tensor weight, Tensor rope, Tensor(a!) pages, Tensor table, Tensor sequence, "
    "Tensor position, float eps=1e-06, int page_size=256) -> ()",
    store_window)

Tensor rms_norm(const Tensor& x_, const std::optional<Tensor>& weight_, double eps) {
  Check check("rms_norm");
  const int64_t dim = check.rows("x", x_, "n", {ScalarType::BFloat16, ScalarType::Float}, kFloats).back();
  if (weight_.has_value()) {
    check.tensor("weight", *weight_, {dim}, {ScalarType::BFloat16, ScalarType::Float}, {kFloats});
  }
  const Tensor x = dense(x_, static_cast<int>(x_.dim()));
  const std::optional<Tensor> weight = dense(weight_);
  const Tensor result = empty(x.sizes(), x.scalar_type(), x);
  check.run(dsv4::rms_norm, {rows_view(x), view(weight), eps, mutable_rows_view(result)}, x);
  return result;
}
DSV4_OP("rms_norm(Tensor x, Tensor? weight=None, float eps=1e-06) -> Tensor", rms_norm)

Tensor kv_norm_rope(const Tensor& kv_, const Tensor& weight_, const Tensor& rope_, double eps) {
  Check check("kv_norm_rope");
  const auto sizes = check.tensor("kv", kv_, {kAny, kAny}, {ScalarType::BFloat16, ScalarType::Float},
                                  {kFloats, {"tokens", "head_dim"}});
  check.tensor("weight", weight_, {sizes[1]}, {ScalarType::BFloat16, ScalarType::Float}, {kFloats});
  check.rope(rope_, sizes[0], sizes[1]);
  const Tensor kv = dense(kv_), weight = dense(weight_), rope = dense(rope_, 2);
  const Tensor result = empty({sizes[0], sizes[1]}, kv.scalar_type(), kv);
  check.run(dsv4::kv_norm_rope, {view(kv), view(weight), view(rope), eps, mutable_view(result)}, kv);
  return result;
}
DSV4_OP("kv_norm_rope(Tensor kv, Tensor weight, Tensor rope, float eps=1e-06) -> Tensor", kv_norm_rope)

std::tuple<Tensor, Tensor> rms_norm_backward(const Tensor& grad_, const Tensor& x_,
                                             const std::optional<Tensor>& weight_, double eps) {
  Check check("rms_norm_backward");
  const auto sizes = check.rows("x", x_, "n", {ScalarType::BFloat16, ScalarType::Float}, kFloats);
  check.sized("grad", grad_, sizes, {x_.scalar_type()});
  if (weight_.has_value()) {
    check.tensor("weight", *weight_, {sizes.back()}, {ScalarType::BFloat16, ScalarType::Float}, {kFloats});
  }
  const int axes = static_cast<int>(sizes.size());
  const Tensor grad = dense(grad_, axes), x = dense(x_, axes);
  const std::optional<Tensor> weight = dense(weight_);
  const Tensor grad_x = empty(sizes, x.scalar_type(), x);
  const Tensor grad_weight =
      weight.has_value() ? empty({sizes.back()}, weight->scalar_type(), x) : empty({0}, x.scalar_type(), x);
  NormRopeBackwardParams params{
      rows_view(grad), rows_view(x), view(weight), {}, eps, mutable_rows_view(grad_x), {}, {}};
  if (weight.has_value()) params.grad_weight = mutable_view(grad_weight);
  check.run(dsv4::rms_norm_backward, dsv4::norm_rope_backward_workspace_bytes, params, x);
  return {grad_x, grad_weight};
}
DSV4_OP("rms_norm_backward(Tensor grad, Tensor x, Tensor? weight=None, float eps=1e-06) -> (Tensor, Tensor)",
        rms_norm_backward)

std::tuple<Tensor, Tensor> kv_norm_rope_backward(const Tensor& grad_, const Tensor& kv_, const Tensor& weight_,
                                                 const Tensor& rope_, double eps) {
  Check check("kv_norm_rope_backward");
  const auto sizes = check.tensor("kv", kv_, {kAny, kAny}, {ScalarType::BFloat16, ScalarType::Float},
                                  {kFloats, {"tokens", "head_dim"}});
  check.tensor("grad", grad_, {sizes[0], sizes[1]}, {kv_.scalar_type()});
  check.tensor("weight", weight_, {sizes[1]}, {ScalarType::BFloat16, ScalarType::Float}, {kFloats});
  check.rope(rope_, sizes[0], sizes[1]);
  const Tensor grad = dense(grad_), kv = dense(kv_), weight = dense(weight_), rope = dense(rope_, 2);
  const Tensor grad_kv = empty({sizes[0], sizes[1]}, kv.scalar_type(), kv);
  const Tensor grad_weight = empty({sizes[1]}, weight.scalar_type(), kv);
  const NormRopeBackwardParams params{
      view(grad), view(kv), view(weight), view(rope), eps, mutable_view(grad_kv), mutable_view(grad_weight), {}};
  check.run(dsv4::kv_norm_rope_backward, dsv4::norm_rope_backward_workspace_bytes, params, kv);
  return {grad_kv, grad_weight};
}
DSV4_OP(
    "kv_norm_rope_backward(Tensor grad, Tensor kv, Tensor weight, Tensor rope, float eps=1e-06) -> (Tensor, Tensor)",
    kv_norm_rope_backward)

// [tokens, head_dim] as [tokens, 1, head_dim].
AnyView<3> heads_view(const Tensor& tensor, AnyView<2> rows) {
  const int64_t tokens = tensor.size(0), heads = tensor.dim() == 3 ? tensor.size(1) : 1, dim = rows.size(1);
  return {rows.data, rows.dtype, {tokens, heads, dim}, {heads * dim, dim, 1}};
}

Tensor apply_rope(const Tensor& x_, const Tensor& rope_, bool inverse) {
  Check check("apply_rope");
  const auto sizes =
      check.rows("x", x_, "head_dim", {ScalarType::BFloat16, ScalarType::Float}, "bfloat16 or float32 or float64");
  if (sizes.size() != 2 && sizes.size() != 3) {
    check.require(false, "x must be [tokens, head_dim] or [tokens, heads, head_dim]");
  }
  check.rope(rope_, sizes.front(), sizes.back());
  const Tensor x = dense(x_, static_cast<int>(x_.dim())), rope = dense(rope_, 2);
  const Tensor result = empty(x.sizes(), x.scalar_type(), x);
  const AnyView<3> from = heads_view(x, rows_view(x)), to = heads_view(result, mutable_rows_view(result));
  check.run(dsv4::apply_rope, {from, view(rope), inverse, to}, x);
  return result;
}
DSV4_OP("apply_rope(Tensor x, Tensor rope, bool inverse=False) -> Tensor", apply_rope)

Tensor rope_rows(const Tensor& position_, const Tensor& inv_freq_) {
  Check check("rope_rows");
  const int64_t tokens =
      check.tensor("position", position_, {kAny}, {ScalarType::Int, ScalarType::Long}, {nullptr, {"tokens"}})[0];
  const int64_t pairs =
      check.tensor("inv_freq", inv_freq_, {kAny}, {ScalarType::Float}, {"float32 or float64", {"rope_dim / 2"}})[0];
  const Tensor position = dense(position_), inv_freq = dense(inv_freq_);
  const Tensor result = empty({tokens, pairs, 2}, ScalarType::Float, position);
  check.run(dsv4::rope_rows, {view(position), view(inv_freq), mutable_view(result)}, position);
  return result;
}
DSV4_OP("rope_rows(Tensor position, Tensor inv_freq) -> Tensor", rope_rows)

}  // namespace
}  // namespace dsv4::binding
