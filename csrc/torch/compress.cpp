#include "ops/compress.h"

#include "torch/pool.h"

namespace dsv4::binding {
namespace {

constexpr const char* kFloats = "float32 or float64";

struct Sizes {
  int64_t tokens, channels, head_dim;
};

// `rope` has a row for each token, or for each of the entries of whole sequences.
Sizes check_inputs(Check& check, const Tensor& kv, const Tensor& gate, const Tensor& ape, const Tensor& norm_weight,
                   const Tensor& rope, int64_t ratio, bool rotate, bool entries) {
  if (ratio < 1) check.require(false, "ratio must be at least 1, got " + std::to_string(ratio));
  const auto sizes = check.tensor("kv", kv, {kAny, kAny}, {ScalarType::Float}, {kFloats, {"tokens", "c * head_dim"}});
  const int64_t tokens = sizes[0], channels = sizes[1];
  check.tensor("gate", gate, {tokens, channels}, {ScalarType::Float});
  check.tensor("ape", ape, {ratio, channels}, {ScalarType::Float});
  const int64_t head_dim = check.tensor("norm_weight", norm_weight, {kAny}, {ScalarType::BFloat16, ScalarType::Float},
                                        {"bfloat16 or float32 or float64", {"head_dim"}})[0];
  if (channels != head_dim && channels != 2 * head_dim) {
    check.require(false, "kv must have " + std::to_string(head_dim) + " or " + std::to_string(2 * head_dim) +
                             " channels, got " + std::to_string(channels));
  }
  check.rope(rope, entries ? tokens / ratio : tokens, head_dim);
  if (rotate && (head_dim & (head_dim - 1)) != 0) {
    check.require(false, "head_dim must be a power of two to be rotated, got " + std::to_string(head_dim));
  }
  return {tokens, channels, head_dim};
}

void compress(const Tensor& kv_, const Tensor& gate_, const Tensor& ape_, const Tensor& norm_weight_,
              const Tensor& rope_, const Tensor& state_, const Tensor& pages, const Tensor& table,
              const Tensor& sequence_, const Tensor& position_, int64_t ratio, double eps, int64_t page_size,
              bool rotate) {
  Check check("compress");
  const Sizes s = check_inputs(check, kv_, gate_, ape_, norm_weight_, rope_, ratio, rotate, false);
  check.tensor("table", table, {kAny, kAny}, {ScalarType::Int}, {nullptr, {"sequences", "blocks"}});
  const int64_t ring = check.tensor("state", state_, {table.size(0), kAny, 2, s.channels}, {ScalarType::Float},
                                    {nullptr, {nullptr, "ring"}})[1];
  const int64_t least = s.head_dim == 0 ? 0 : s.channels / s.head_dim * ratio;
  if (ring < least) {
    check.require(false, "state must have a ring of at least " + std::to_string(least) + " positions, got " +
                             std::to_string(ring));
  }
  check.written("state", state_);
  WrittenPool pool(check, rotate, pages, table, page_size, s.head_dim, 2 * rope_.size(1));
  check.tensor("sequence", sequence_, {s.tokens}, {ScalarType::Int});
  check.tensor("position", position_, {s.tokens}, {ScalarType::Int});
  const Tensor kv = dense(kv_), gate = dense(gate_), ape = dense(ape_), norm_weight = dense(norm_weight_),
               rope = dense(rope_, 2), sequence = dense(sequence_), position = dense(position_);
  Written state(state_);
  CompressParams params{view(kv),
                        view(gate),
                        view(ape),
                        view(norm_weight),
                        view(rope),
                        mutable_view(state.tensor()),
                        pool,
                        view(sequence),
                        view(position),
                        ratio,
                        eps,
                        rotate,
                        {}};
  check.run(dsv4::compress, dsv4::compress_workspace_bytes, params, kv);
  pool.finish();
  state.finish();
}
DSV4_OP(
    "compress(Tensor kv, Tensor gate, Tensor ape, Tensor norm_weight, Tensor rope, Tensor(a!) state, "
    "Tensor(b!) pages, Tensor table, Tensor sequence, Tensor position, int ratio, float eps=1e-06, "
    "int page_size=64, bool rotate=False) -> ()",
    compress)

Tensor compress_entries(const Tensor& kv_, const Tensor& gate_, const Tensor& ape_, const Tensor& norm_weight_,
                        const Tensor& rope_, int64_t ratio, double eps, bool rotate) {
  Check check("compress_entries");
  const Sizes s = check_inputs(check, kv_, gate_, ape_, norm_weight_, rope_, ratio, rotate, true);
  const Tensor kv = dense(kv_), gate = dense(gate_), ape = dense(ape_), norm_weight = dense(norm_weight_),
               rope = dense(rope_, 2);
  const Tensor result = empty({s.tokens / ratio, s.head_dim}, norm_weight.scalar_type(), kv);
  check.run(
      dsv4::compress_entries, dsv4::compress_entries_workspace_bytes,
      {view(kv), view(gate), view(ape), view(norm_weight), view(rope), ratio, eps, rotate, mutable_view(result), {}},
      kv);
  return result;
}
DSV4_OP(
    "compress_entries(Tensor kv, Tensor gate, Tensor ape, Tensor norm_weight, Tensor rope, int ratio, "
    "float eps=1e-06, bool rotate=False) -> Tensor",
    compress_entries)

std::tuple<Tensor, Tensor, Tensor, Tensor> compress_entries_backward(const Tensor& grad_, const Tensor& kv_,
                                                                     const Tensor& gate_, const Tensor& ape_,
                                                                     const Tensor& norm_weight_, const Tensor& rope_,
                                                                     int64_t ratio, double eps, bool rotate) {
  Check check("compress_entries_backward");
  const Sizes s = check_inputs(check, kv_, gate_, ape_, norm_weight_, rope_, ratio, rotate, true);
  check.tensor("grad", grad_, {s.tokens / ratio, s.head_dim}, {norm_weight_.scalar_type()});
  const Tensor grad = dense(grad_), kv = dense(kv_), gate = dense(gate_), ape = dense(ape_),
               norm_weight = dense(norm_weight_), rope = dense(rope_, 2);
  const Tensor grad_kv = empty({s.tokens, s.channels}, ScalarType::Float, kv);
  const Tensor grad_gate = empty({s.tokens, s.channels}, ScalarType::Float, kv);
  const Tensor grad_ape = empty({ratio, s.channels}, ScalarType::Float, kv);
  const Tensor grad_norm_weight = empty({s.head_dim}, norm_weight.scalar_type(), kv);
  const CompressEntriesParams forward{view(kv), view(gate), view(ape), view(norm_weight), view(rope), ratio, eps,
                                      rotate,   {},         {}};
  check.run(dsv4::compress_entries_backward, dsv4::compress_entries_backward_workspace_bytes,
            {view(grad), forward, mutable_view(grad_kv), mutable_view(grad_gate), mutable_view(grad_ape),
             mutable_view(grad_norm_weight)},
            kv);
  return {grad_kv, grad_gate, grad_ape, grad_norm_weight};
}
DSV4_OP(
    "compress_entries_backward(Tensor grad, Tensor kv, Tensor gate, Tensor ape, Tensor norm_weight, Tensor rope, "
    "int ratio, float eps=1e-06, bool rotate=False) -> (Tensor, Tensor, Tensor, Tensor)",
    compress_entries_backward)

}  // namespace
}  // namespace dsv4::binding
