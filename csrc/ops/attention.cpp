#include "ops/attention.h"

#include "cpu/attention.h"
#include "cuda/sm80/attention.h"
#include "ops/candidates.h"
#include "ops/pool_checks.h"

namespace dsv4 {
namespace {

// The vector kernels work on 32 dims at a time, and spread what they ask of memory over the heads' products.
bool whole_steps(const SparseAttentionParams& p) { return p.query.size(1) > 0 && p.query.size(2) % 32 == 0; }

// The tile kernel multiplies bfloat16.
bool in_bf16(const SparseAttentionParams& p) {
  return whole_steps(p) && p.query.dtype == DType::kBFloat16 && p.window_pool.plain.dtype != DType::kFloat32 &&
         p.compressed.plain.dtype != DType::kFloat32;
}

constexpr Candidate<SparseAttentionParams> kSparseAttention[] = {
    {"sm80", Isa::kSm80, DSV4_SM80(sm80::sparse_attention), DSV4_SM80(sm80::accepts_sparse_attention)},
    {"amx", Isa::kAmx, DSV4_AMX(amx::sparse_attention), in_bf16},
    {"avx512", Isa::kAvx512, DSV4_AVX512(avx512::sparse_attention), whole_steps},
    {"avx2", Isa::kAvx2, DSV4_AVX2(avx2::sparse_attention), whole_steps},
    {"scalar", Isa::kScalar, DSV4_SCALAR(scalar::sparse_attention)},
};
const Op sparse_attention_op("sparse_attention", kSparseAttention);

bool whole_steps_backward(const SparseAttentionBackwardParams& p) { return whole_steps(p.forward); }
bool in_bf16_backward(const SparseAttentionBackwardParams& p) { return in_bf16(p.forward); }

constexpr Candidate<SparseAttentionBackwardParams> kSparseAttentionBackward[] = {
    {"sm80", Isa::kSm80, DSV4_SM80(sm80::sparse_attention_backward),
     DSV4_SM80(sm80::accepts_sparse_attention_backward)},
    {"amx", Isa::kAmx, DSV4_AMX(amx::sparse_attention_backward), in_bf16_backward},
    {"avx512", Isa::kAvx512, DSV4_AVX512(avx512::sparse_attention_backward), whole_steps_backward},
    {"avx2", Isa::kAvx2, DSV4_AVX2(avx2::sparse_attention_backward), whole_steps_backward},
    {"scalar", Isa::kScalar, DSV4_SCALAR(scalar::sparse_attention_backward)},
};
const Op sparse_attention_backward_op("sparse_attention_backward", kSparseAttentionBackward);

void validate_arguments(Validator& v, const SparseAttentionParams& p) {
  const int64_t tokens = p.query.size(0), heads = p.query.size(1), head_dim = p.query.size(2);
  v.floats("query", p.query, {Validator::kAny, Validator::kAny, Validator::kAny});
  v.at_least("head_dim", head_dim, 1);
  v.at_least("window", p.window, 1);
  v.view("sequence", p.sequence, DType::kInt32, {tokens});
  v.view("position", p.position, DType::kInt32, {tokens});
  v.view("sink", p.sink, DType::kFloat32, {heads});
  validate_pool(v, "window_pages", "window_table", p.window_pool, PoolKind::kRows, Validator::kAny, head_dim,
                p.rope_dim);
  if (p.compressed.given()) {
    validate_pool(v, "compressed_pages", "compressed_table", p.compressed, PoolKind::kRows, p.window_pool.table.size(0),
                  head_dim, p.rope_dim);
    v.view("lengths", p.lengths, DType::kInt32, {tokens});
    if (p.indices.given()) v.view("indices", p.indices, DType::kInt32, {tokens, Validator::kAny});
  } else {
    v.require(!p.indices.given() && !p.lengths.given(), "indices and lengths need compressed_pages");
  }
  if (p.rope.given()) v.rope(p.rope, tokens, head_dim);
}

// A call and its lse.
void validate_call(Validator& v, const SparseAttentionParams& p, const Context& context) {
  validate_arguments(v, p);
  v.view("lse", p.lse, DType::kFloat32, {p.query.size(0), p.query.size(1)});
  if (context.device == Device::kCpu) validate_sequences(v, p.sequence, p.window_pool.table.size(0));
}

Status validate(const SparseAttentionParams& p, const Context& context) {
  Validator v("sparse_attention");
  validate_call(v, p, context);
  v.view("out", p.out, p.query.dtype, {p.query.size(0), p.query.size(1), p.query.size(2)});
  if (!v.status().is_ok()) return v.status();
  v.workspace(p.workspace.data, p.workspace.bytes, sparse_attention_workspace_bytes(p, context));
  return v.status();
}

void validate_pool_gradient(Validator& v, const char* pages, const char* grad, const RowPool& pool,
                            const AnyView<3>& view) {
  if (!pool.plain.given()) {
    v.require(!view.given(), "%s must not be given: %s are not plain rows", grad, pages);
    return;
  }
  const AnyView<3>& p = pool.plain;
  v.view(pages, p, p.dtype, {p.size(0), p.size(1), p.size(2)}, 3);
  v.view(grad, view, p.dtype, {p.size(0), p.size(1), p.size(2)}, 3);
}

void validate_backward(Validator& v, const SparseAttentionBackwardParams& p, const Context& context) {
  const AnyView<3>& query = p.forward.query;
  validate_call(v, p.forward, context);
  v.view("grad_out", p.grad_out, query.dtype, {query.size(0), query.size(1), query.size(2)});
  v.view("grad_lse", p.grad_lse, DType::kFloat32, {query.size(0), query.size(1)});
  v.view("grad_query", p.grad_query, query.dtype, {query.size(0), query.size(1), query.size(2)});
  validate_pool_gradient(v, "window_pages", "grad_window", p.forward.window_pool, p.grad_window);
  validate_pool_gradient(v, "compressed_pages", "grad_compressed", p.forward.compressed, p.grad_compressed);
  v.view("grad_sink", p.grad_sink, DType::kFloat32, {query.size(1)});
}

Status validate(const SparseAttentionBackwardParams& p, const Context& context) {
  Validator v("sparse_attention_backward");
  validate_backward(v, p, context);
  if (!v.status().is_ok()) return v.status();
  v.workspace(p.workspace.data, p.workspace.bytes, sparse_attention_backward_workspace_bytes(p, context));
  return v.status();
}

}  // namespace

int64_t sparse_attention_workspace_bytes(const SparseAttentionParams& p, const Context& context) {
  Validator v("sparse_attention");
  validate_arguments(v, p);
  if (!v.status().is_ok()) return 0;
  // The largest need of the implementations that this library may choose: which one runs is the candidate list's
  // business.
  int64_t bytes = 0;
  [[maybe_unused]] const auto at_least = [&](int64_t needed) { bytes = needed > bytes ? needed : bytes; };
  if (context.device == Device::kCuda) {
#if defined(DSV4_WITH_SM80)
    at_least(sm80::sparse_attention_workspace_bytes(p, context));
#endif
    return bytes;
  }
  if (context.device == Device::kCpu) {
#if defined(DSV4_WITH_CPU)
    at_least(scalar::sparse_attention_workspace_bytes(p, context));
#endif
#if defined(DSV4_WITH_AVX2)
    if (context.best >= Isa::kAvx2 && whole_steps(p)) at_least(avx2::sparse_attention_workspace_bytes(p, context));
#endif
#if defined(DSV4_WITH_AVX512)
    if (context.best >= Isa::kAvx512 && whole_steps(p)) at_least(avx512::sparse_attention_workspace_bytes(p, context));
#endif
#if defined(DSV4_WITH_AMX)
    if (context.best >= Isa::kAmx && in_bf16(p)) at_least(amx::sparse_attention_workspace_bytes(p, context));
#endif
  }
  return bytes;
}

Status sparse_attention(const SparseAttentionParams& p, const Context& c) {
  return sparse_attention_op.run(validate(p, c), p, c);
}

int64_t sparse_attention_backward_workspace_bytes(const SparseAttentionBackwardParams& p, const Context& context) {
  Validator v("sparse_attention_backward");
  validate_arguments(v, p.forward);
  int64_t bytes = 0;
  if (!v.status().is_ok()) return bytes;
  [[maybe_unused]] const auto at_least = [&](int64_t needed) { bytes = needed > bytes ? needed : bytes; };
  if (context.device == Device::kCuda) {
#if defined(DSV4_WITH_SM80)
    at_least(sm80::sparse_attention_backward_workspace_bytes(p, context));
#endif
    return bytes;
  }
#if defined(DSV4_WITH_CPU)
  at_least(scalar::sparse_attention_backward_workspace_bytes(p, context));
#endif
#if defined(DSV4_WITH_AVX2)
  if (context.best >= Isa::kAvx2 && whole_steps(p.forward)) {
    at_least(avx2::sparse_attention_backward_workspace_bytes(p, context));
  }
#endif
#if defined(DSV4_WITH_AVX512)
  if (context.best >= Isa::kAvx512 && whole_steps(p.forward)) {
    at_least(avx512::sparse_attention_backward_workspace_bytes(p, context));
  }
#endif
#if defined(DSV4_WITH_AMX)
  if (context.best >= Isa::kAmx && in_bf16(p.forward)) {
    at_least(amx::sparse_attention_backward_workspace_bytes(p, context));
  }
#endif
  return bytes;
}

Status sparse_attention_backward(const SparseAttentionBackwardParams& p, const Context& c) {
  return sparse_attention_backward_op.run(validate(p, c), p, c);
}

}  // namespace dsv4
