#include "ops/norm_rope.h"

#include "cpu/norm_rope.h"
#include "cuda/sm80/norm_rope.h"
#include "ops/candidates.h"
#include "ops/pool_checks.h"

namespace dsv4 {
namespace {

// The vector kernels work on 32 dims at a time.
template <class Params>
bool whole_heads(const Params& p) {
  return p.query.size(2) % 32 == 0 && p.rope.size(1) % 16 == 0;
}
[[maybe_unused]] bool whole_rows(const StoreWindowParams& p) {
  return p.kv.size(1) % 32 == 0 && p.rope.size(1) % 16 == 0;
}

// The CUDA kernels count dims in 32 bits.
constexpr int64_t kMostDims = int64_t{1} << 28;
[[maybe_unused]] bool countable(const RmsNormParams& p) { return p.x.size(1) < kMostDims; }
[[maybe_unused]] bool countable(const KvNormRopeParams& p) { return p.kv.size(1) < kMostDims; }
[[maybe_unused]] bool countable(const ApplyRopeParams& p) { return p.x.size(2) < kMostDims; }
[[maybe_unused]] bool countable(const QueryNormRopeParams& p) { return p.query.size(2) < kMostDims; }
[[maybe_unused]] bool countable(const QueryNormRopeBackwardParams& p) { return p.query.size(2) < kMostDims; }
[[maybe_unused]] bool countable(const NormRopeBackwardParams& p) { return p.x.size(1) < kMostDims; }

[[maybe_unused]] bool whole_norms(const RmsNormParams& p) { return p.x.size(1) % 32 == 0; }

constexpr Candidate<RmsNormParams> kRmsNorm[] = {
    {"sm80", Isa::kSm80, DSV4_SM80(sm80::rms_norm), countable},
    {"avx512", Isa::kAvx512, DSV4_AVX512(avx512::rms_norm), whole_norms},
    {"scalar", Isa::kScalar, DSV4_SCALAR(scalar::rms_norm)},
};
const Op rms_norm_op("rms_norm", kRmsNorm);

constexpr Candidate<QueryNormRopeParams> kQueryNormRope[] = {
    {"sm80", Isa::kSm80, DSV4_SM80(sm80::query_norm_rope), countable},
    {"avx512", Isa::kAvx512, DSV4_AVX512(avx512::query_norm_rope), whole_heads<QueryNormRopeParams>},
    {"scalar", Isa::kScalar, DSV4_SCALAR(scalar::query_norm_rope)},
};
const Op query_norm_rope_op("query_norm_rope", kQueryNormRope);

constexpr Candidate<QueryNormRopeBackwardParams> kQueryNormRopeBackward[] = {
    {"sm80", Isa::kSm80, DSV4_SM80(sm80::query_norm_rope_backward), countable},
    {"avx512", Isa::kAvx512, DSV4_AVX512(avx512::query_norm_rope_backward), whole_heads<QueryNormRopeBackwardParams>},
    {"scalar", Isa::kScalar, DSV4_SCALAR(scalar::query_norm_rope_backward)},
};
const Op query_norm_rope_backward_op("query_norm_rope_backward", kQueryNormRopeBackward);

[[maybe_unused]] bool whole_gradients(const NormRopeBackwardParams& p) {
  return p.x.size(1) % 32 == 0 && p.rope.size(1) % 16 == 0;
}

constexpr Candidate<NormRopeBackwardParams> kNormRopeBackward[] = {
    {"sm80", Isa::kSm80, DSV4_SM80(sm80::norm_rope_backward), countable},
    {"avx512", Isa::kAvx512, DSV4_AVX512(avx512::norm_rope_backward), whole_gradients},
    {"scalar", Isa::kScalar, DSV4_SCALAR(scalar::norm_rope_backward)},
};
const Op rms_norm_backward_op("rms_norm_backward", kNormRopeBackward);
const Op kv_norm_rope_backward_op("kv_norm_rope_backward", kNormRopeBackward);

[[maybe_unused]] bool whole_kv(const KvNormRopeParams& p) { return p.kv.size(1) % 32 == 0 && p.rope.size(1) % 16 == 0; }
[[maybe_unused]] bool whole_turns(const ApplyRopeParams& p) { return p.rope.size(1) % 16 == 0; }
[[maybe_unused]] bool whole_tables(const RopeRowsParams& p) { return p.frequency.size(0) % 16 == 0; }

constexpr Candidate<KvNormRopeParams> kKvNormRope[] = {
    {"sm80", Isa::kSm80, DSV4_SM80(sm80::kv_norm_rope), countable},
    {"avx512", Isa::kAvx512, DSV4_AVX512(avx512::kv_norm_rope), whole_kv},
    {"scalar", Isa::kScalar, DSV4_SCALAR(scalar::kv_norm_rope)},
};
const Op kv_norm_rope_op("kv_norm_rope", kKvNormRope);

constexpr Candidate<ApplyRopeParams> kApplyRope[] = {
    {"sm80", Isa::kSm80, DSV4_SM80(sm80::apply_rope), countable},
    {"avx512", Isa::kAvx512, DSV4_AVX512(avx512::apply_rope), whole_turns},
    {"scalar", Isa::kScalar, DSV4_SCALAR(scalar::apply_rope)},
};
const Op apply_rope_op("apply_rope", kApplyRope);

constexpr Candidate<RopeRowsParams> kRopeRows[] = {
    {"sm80", Isa::kSm80, DSV4_SM80(sm80::rope_rows)},
    {"avx512", Isa::kAvx512, DSV4_AVX512(avx512::rope_rows), whole_tables},
    {"scalar", Isa::kScalar, DSV4_SCALAR(scalar::rope_rows)},
};
const Op rope_rows_op("rope_rows", kRopeRows);

constexpr Candidate<StoreWindowParams> kStoreWindow[] = {
    {"sm80", Isa::kSm80, DSV4_SM80(sm80::store_window)},
    {"avx512", Isa::kAvx512, DSV4_AVX512(avx512::store_window), whole_rows},
    {"scalar", Isa::kScalar, DSV4_SCALAR(scalar::store_window)},
};
const Op store_window_op("store_window", kStoreWindow);

Status validate(const RmsNormParams& p) {
  Validator v("rms_norm");
  const int64_t rows = p.x.size(0), dim = p.x.size(1);
  v.floats("x", p.x, {Validator::kAny, Validator::kAny});
  if (p.weight.given()) {
    v.floats("weight", p.weight, {dim});
  }
  v.view("result", p.result, p.x.dtype, {rows, dim});
  return v.status();
}

Status validate(const QueryNormRopeParams& p) {
  Validator v("query_norm_rope");
  const int64_t tokens = p.query.size(0), heads = p.query.size(1), head_dim = p.query.size(2);
  v.floats("q", p.query, {Validator::kAny, Validator::kAny, Validator::kAny});
  v.rope(p.rope, tokens, head_dim);
  v.view("result", p.result, p.query.dtype, {tokens, heads, head_dim});
  return v.status();
}

Status validate(const QueryNormRopeBackwardParams& p) {
  Validator v("query_norm_rope_backward");
  const int64_t tokens = p.query.size(0), heads = p.query.size(1), head_dim = p.query.size(2);
  v.floats("q", p.query, {Validator::kAny, Validator::kAny, Validator::kAny});
  v.view("grad", p.grad, p.query.dtype, {tokens, heads, head_dim});
  v.rope(p.rope, tokens, head_dim);
  v.view("result", p.result, p.query.dtype, {tokens, heads, head_dim});
  return v.status();
}

Status validate(const KvNormRopeParams& p) {
  Validator v("kv_norm_rope");
  const int64_t tokens = p.kv.size(0), head_dim = p.kv.size(1);
  v.floats("kv", p.kv, {Validator::kAny, Validator::kAny});
  v.floats("weight", p.weight, {head_dim});
  v.rope(p.rope, tokens, head_dim);
  v.view("result", p.result, p.kv.dtype, {tokens, head_dim});
  return v.status();
}

void validate_arguments(Validator& v, bool rotated, const NormRopeBackwardParams& p) {
  const int64_t rows = p.x.size(0), dim = p.x.size(1);
  v.floats(rotated ? "kv" : "x", p.x, {Validator::kAny, Validator::kAny});
  v.view("grad", p.grad, p.x.dtype, {rows, dim});
  if (rotated || p.weight.given()) {
    v.floats("weight", p.weight, {dim});
    v.view("grad_weight", p.grad_weight, p.weight.dtype, {dim});
  }
  if (rotated) v.rope(p.rope, rows, dim);
  v.view(rotated ? "grad_kv" : "grad_x", p.grad_x, p.x.dtype, {rows, dim});
}

Status validate(const char* op, bool rotated, const NormRopeBackwardParams& p, const Context& context) {
  Validator v(op);
  validate_arguments(v, rotated, p);
  if (v.status().is_ok()) {
    v.workspace(p.workspace.data, p.workspace.bytes, norm_rope_backward_workspace_bytes(p, context));
  }
  return v.status();
}

Status validate(const ApplyRopeParams& p) {
  Validator v("apply_rope");
  const int64_t tokens = p.x.size(0), heads = p.x.size(1), head_dim = p.x.size(2);
  v.floats("x", p.x, {Validator::kAny, Validator::kAny, Validator::kAny});
  v.rope(p.rope, tokens, head_dim);
  v.view("result", p.result, p.x.dtype, {tokens, heads, head_dim});
  return v.status();
}

Status validate(const RopeRowsParams& p) {
  Validator v("rope_rows");
  v.require(p.position.dtype == DType::kInt32 || p.position.dtype == DType::kInt64, "position must be int32 or int64");
  v.view("position", p.position, p.position.dtype, {Validator::kAny});
  v.view("inv_freq", p.frequency, DType::kFloat32, {Validator::kAny});
  v.view("result", p.result, DType::kFloat32, {p.position.size(0), p.frequency.size(0), 2}, 2);
  return v.status();
}

void validate_arguments(Validator& v, const StoreWindowParams& p) {
  const int64_t tokens = p.kv.size(0), head_dim = p.kv.size(1);
  v.floats("kv", p.kv, {Validator::kAny, Validator::kAny});
  v.floats("weight", p.weight, {head_dim});
  v.rope(p.rope, tokens, head_dim);
  validate_pool(v, "pages", "table", p.pool, PoolKind::kRows, Validator::kAny, head_dim, 2 * p.rope.size(1));
  v.view("sequence", p.sequence, DType::kInt32, {tokens});
  v.view("position", p.position, DType::kInt32, {tokens});
}

Status validate(const StoreWindowParams& p, const Context& context) {
  Validator v("store_window");
  validate_arguments(v, p);
  if (context.device == Device::kCpu) validate_sequences(v, p.sequence, p.pool.table.size(0));
  if (v.status().is_ok()) v.workspace(p.workspace.data, p.workspace.bytes, store_window_workspace_bytes(p, context));
  return v.status();
}

}  // namespace

Status rms_norm(const RmsNormParams& p, const Context& c) { return rms_norm_op.run(validate(p), p, c); }

Status query_norm_rope(const QueryNormRopeParams& p, const Context& c) {
  return query_norm_rope_op.run(validate(p), p, c);
}

Status query_norm_rope_backward(const QueryNormRopeBackwardParams& p, const Context& c) {
  return query_norm_rope_backward_op.run(validate(p), p, c);
}

Status kv_norm_rope(const KvNormRopeParams& p, const Context& c) { return kv_norm_rope_op.run(validate(p), p, c); }

int64_t norm_rope_backward_workspace_bytes(const NormRopeBackwardParams& p, const Context& context) {
  Validator v("norm_rope_backward");
  validate_arguments(v, p.rope.given(), p);
  if (!v.status().is_ok() || !p.weight.given()) return 0;
  if (context.device == Device::kCuda) {
#if defined(DSV4_WITH_SM80)
    return sm80::norm_rope_backward_workspace_bytes(p);
#else
    return 0;
#endif
  }
  return row_sums_bytes(p.x.size(0), p.x.size(1));
}

Status rms_norm_backward(const NormRopeBackwardParams& p, const Context& c) {
  return rms_norm_backward_op.run(validate("rms_norm_backward", false, p, c), p, c);
}

Status kv_norm_rope_backward(const NormRopeBackwardParams& p, const Context& c) {
  return kv_norm_rope_backward_op.run(validate("kv_norm_rope_backward", true, p, c), p, c);
}

Status apply_rope(const ApplyRopeParams& p, const Context& c) { return apply_rope_op.run(validate(p), p, c); }

Status rope_rows(const RopeRowsParams& p, const Context& c) { return rope_rows_op.run(validate(p), p, c); }

int64_t store_window_workspace_bytes(const StoreWindowParams& p, const Context& context) {
  Validator v("store_window");
  validate_arguments(v, p);
  return v.status().is_ok() && context.device == Device::kCpu ? row_workspace_bytes(p.kv.size(0), p.kv.size(1), context)
                                                              : 0;
}

Status store_window(const StoreWindowParams& p, const Context& c) { return store_window_op.run(validate(p, c), p, c); }

}  // namespace dsv4
