#include "ops/moe.h"

#include "cpu/moe.h"
#include "cuda/sm80/moe.h"
#include "ops/candidates.h"
#include "ops/validate.h"

namespace dsv4 {
namespace {

// Tiles multiply bfloat16.
bool fits_tiles(const MoeGateParams& p) { return p.x.dtype == DType::kBFloat16 && p.weight.dtype == DType::kBFloat16; }

constexpr Candidate<MoeGateParams> kMoeGate[] = {
    {"sm80", Isa::kSm80, DSV4_SM80(sm80::moe_gate)},         {"amx", Isa::kAmx, DSV4_AMX(amx::moe_gate), fits_tiles},
    {"avx512", Isa::kAvx512, DSV4_AVX512(avx512::moe_gate)}, {"avx2", Isa::kAvx2, DSV4_AVX2(avx2::moe_gate)},
    {"scalar", Isa::kScalar, DSV4_SCALAR(scalar::moe_gate)},
};
const Op moe_gate_op("moe_gate", kMoeGate);

// Values of codes are bfloat16 too; plain matrices of float32 stay with the vectors.
bool fits_tiles(const MoeExpertsParams& p) {
  if (p.x.dtype == DType::kBFloat16) return true;
  for (const ExpertMatrix* w : {&p.w1, &p.w3, &p.w2, &p.shared[0], &p.shared[1], &p.shared[2]}) {
    if (w->format == WeightFormat::kPlain) return false;
  }
  return true;
}

constexpr Candidate<MoeExpertsParams> kMoeExperts[] = {
    {"sm80", Isa::kSm80, DSV4_SM80(sm80::moe_experts)},
    {"amx", Isa::kAmx, DSV4_AMX(amx::moe_experts), fits_tiles},
    {"avx512", Isa::kAvx512, DSV4_AVX512(avx512::moe_experts)},
    {"avx2", Isa::kAvx2, DSV4_AVX2(avx2::moe_experts)},
    {"scalar", Isa::kScalar, DSV4_SCALAR(scalar::moe_experts)},
};
const Op moe_experts_op("moe_experts", kMoeExperts);

bool fits_tiles(const MoeExpertsBackwardParams& p) { return p.x.dtype == DType::kBFloat16; }

constexpr Candidate<MoeExpertsBackwardParams> kMoeExpertsBackward[] = {
    {"sm80", Isa::kSm80, DSV4_SM80(sm80::moe_experts_backward), DSV4_SM80(sm80::accepts_moe_experts_backward)},
    {"amx", Isa::kAmx, DSV4_AMX(amx::moe_experts_backward), fits_tiles},
    {"avx512", Isa::kAvx512, DSV4_AVX512(avx512::moe_experts_backward)},
    {"avx2", Isa::kAvx2, DSV4_AVX2(avx2::moe_experts_backward)},
    {"scalar", Isa::kScalar, DSV4_SCALAR(scalar::moe_experts_backward)},
};
const Op moe_experts_backward_op("moe_experts_backward", kMoeExpertsBackward);

constexpr Candidate<MoeMapParams> kMoeMap[] = {
    {"sm80", Isa::kSm80, DSV4_SM80(sm80::moe_map)},
    {"scalar", Isa::kScalar, DSV4_SCALAR(scalar::moe_map)},
};
const Op moe_map_op("moe_map", kMoeMap);

int64_t blocks(int64_t size, int64_t block) { return (size + block - 1) / block; }

template <int N>
void validate_integer(Validator& v, const char* name, const AnyView<N>& view, std::initializer_list<int64_t> sizes) {
  v.view(name, view, view.dtype == DType::kInt64 ? DType::kInt64 : DType::kInt32, sizes);
}

template <int N>
int64_t integer(const AnyView<N>& view, int64_t row, int64_t column = 0) {
  const int64_t offset = row * view.stride[0] + (N > 1 ? column * view.stride[N - 1] : 0);
  return view.dtype == DType::kInt64 ? static_cast<const int64_t*>(view.data)[offset]
                                     : static_cast<const int32_t*>(view.data)[offset];
}

// The lowest value if one is negative, else the highest.
struct Range {
  int64_t low = 0, high = -1;
  void add(int64_t value) {
    low = value < low ? value : low;
    high = value > high ? value : high;
  }
  void validate(Validator& v, const char* name, int64_t limit) const {
    v.require(low >= 0 && high < limit, "%s must lie in [0, %lld), got %lld", name, static_cast<long long>(limit),
              static_cast<long long>(low < 0 ? low : high));
  }
};

// Only where the values lie in this processor's memory. Rows of the table that no token reads are not looked at.
void validate_hash(Validator& v, const MoeGateParams& p) {
  if (!v.status().is_ok() || !p.token_ids.given()) return;
  Range ids, experts;
  for (int64_t t = 0; t < p.x.size(0); ++t) ids.add(integer(p.token_ids, t));
  ids.validate(v, "token_ids", p.tid2eid.size(0));
  if (!v.status().is_ok()) return;
  for (int64_t t = 0; t < p.x.size(0); ++t) {
    for (int64_t k = 0; k < p.top_k; ++k) experts.add(integer(p.tid2eid, integer(p.token_ids, t), k));
  }
  experts.validate(v, "tid2eid", p.weight.size(0));
}

void validate_arguments(Validator& v, const MoeGateParams& p) {
  v.floats("x", p.x, {Validator::kAny, Validator::kAny});
  v.floats("weight", p.weight, {Validator::kAny, p.x.size(1)});
  const int64_t experts = p.weight.size(0);
  v.require(p.top_k >= 1 && p.top_k <= experts, "top_k must be 1 to %lld, the number of experts, got %lld",
            static_cast<long long>(experts), static_cast<long long>(p.top_k));
  v.require(experts <= INT32_MAX, "weight has too many experts");
  if (p.bias.data != nullptr) v.view("bias", p.bias, {experts});
  v.require(p.token_ids.given() == p.tid2eid.given(), "token_ids and tid2eid must be given together");
  if (!v.status().is_ok() || !p.token_ids.given()) return;
  v.require(p.bias.data == nullptr, "bias must be None where tid2eid chooses the experts");
  validate_integer(v, "token_ids", p.token_ids, {p.x.size(0)});
  validate_integer(v, "tid2eid", p.tid2eid, {Validator::kAny, p.top_k});
}

Status validate(const MoeGateParams& p, const Context& context) {
  Validator v("moe_gate");
  validate_arguments(v, p);
  v.view("weights", p.weights, {p.x.size(0), p.top_k});
  v.view("indices", p.indices, DType::kInt32, {p.x.size(0), p.top_k});
  if (context.device == Device::kCpu) validate_hash(v, p);
  if (!v.status().is_ok()) return v.status();
  v.workspace(p.workspace.data, p.workspace.bytes, moe_gate_workspace_bytes(p, context));
  return v.status();
}

void validate_matrix(Validator& v, const char* name, const ExpertMatrix& w, DType plain, int64_t experts, int64_t out,
                     int64_t in) {
  if (!v.status().is_ok()) return;
  v.require(w.format != WeightFormat::kNone, "%s must not be missing", name);
  if (w.format == WeightFormat::kPlain) {
    v.view(name, w.data, plain, {experts, out, in});
    return;
  }
  const bool fp4 = w.format == WeightFormat::kFp4;
  v.require(!fp4 || in % 2 == 0, "%s in e2m1 needs an even number of inputs, got %lld", name,
            static_cast<long long>(in));
  v.view(name, w.data, DType::kUInt8, {experts, out, fp4 ? in / 2 : in});
  const DType scale = w.scale.dtype == DType::kFloat32 ? DType::kFloat32 : DType::kUInt8;
  const int64_t rows = fp4 ? out : blocks(out, 128), columns = blocks(in, fp4 ? 32 : 128);
  char scale_name[32];
  int at = 0;
  for (; name[at] != 0 && at < 20; ++at) scale_name[at] = name[at];
  for (const char* suffix = "_scale"; *suffix != 0; ++suffix) scale_name[at++] = *suffix;
  scale_name[at] = 0;
  v.view(scale_name, w.scale, scale, {experts, rows, columns});
}

void validate_arguments(Validator& v, const MoeExpertsParams& p) {
  v.floats("x", p.x, {Validator::kAny, Validator::kAny});
  const int64_t tokens = p.x.size(0), hidden = p.x.size(1);
  v.view("weights", p.weights, {tokens, Validator::kAny});
  validate_integer(v, "indices", p.indices, {tokens, p.weights.size(1)});
  const int64_t experts = p.w1.data.size(0), inter = p.w1.data.size(1);
  validate_matrix(v, "w1", p.w1, p.x.dtype, experts, inter, hidden);
  validate_matrix(v, "w3", p.w3, p.x.dtype, experts, inter, hidden);
  validate_matrix(v, "w2", p.w2, p.x.dtype, experts, hidden, inter);
  if (p.shared[0].format != WeightFormat::kNone) {
    const int64_t own = p.shared[0].data.size(1);
    validate_matrix(v, "shared w1", p.shared[0], p.x.dtype, 1, own, hidden);
    validate_matrix(v, "shared w3", p.shared[1], p.x.dtype, 1, own, hidden);
    validate_matrix(v, "shared w2", p.shared[2], p.x.dtype, 1, hidden, own);
  }
  v.not_negative("swiglu_limit", p.swiglu_limit);
}

Status validate(const MoeExpertsParams& p, const Context& context) {
  Validator v("moe_experts");
  validate_arguments(v, p);
  v.view("result", p.result, p.x.dtype, {p.x.size(0), p.x.size(1)});
  if (!v.status().is_ok()) return v.status();
  v.workspace(p.workspace.data, p.workspace.bytes, moe_experts_workspace_bytes(p, context));
  return v.status();
}

constexpr const char* kMatrixNames[] = {"w1", "w3", "w2"};
constexpr const char* kSharedNames[] = {"shared w1", "shared w3", "shared w2"};
constexpr const char* kGradNames[] = {"grad_w1", "grad_w3", "grad_w2"};
constexpr const char* kGradSharedNames[] = {"grad_shared w1", "grad_shared w3", "grad_shared w2"};

// w1, w3 and w2 of `experts` experts.
void validate_matrices(Validator& v, const char* const* names, const AnyView<3>* matrices, DType x, int64_t experts,
                       int64_t inter, int64_t hidden, bool optional = false) {
  for (int i = 0; i < 3; ++i) {
    if (optional && !matrices[i].given()) continue;
    v.view(names[i], matrices[i], x, {experts, i == 2 ? hidden : inter, i == 2 ? inter : hidden});
  }
}

void validate_arguments(Validator& v, const MoeExpertsBackwardParams& p) {
  v.floats("x", p.x, {Validator::kAny, Validator::kAny});
  const int64_t tokens = p.x.size(0), hidden = p.x.size(1);
  v.view("grad", p.grad, p.x.dtype, {tokens, hidden});
  v.view("weights", p.weights, {tokens, Validator::kAny});
  validate_integer(v, "indices", p.indices, {tokens, p.weights.size(1)});
  validate_matrices(v, kMatrixNames, p.matrices, p.x.dtype, p.matrices[0].size(0), p.matrices[0].size(1), hidden);
  if (p.shared[0].given()) validate_matrices(v, kSharedNames, p.shared, p.x.dtype, 1, p.shared[0].size(1), hidden);
  v.not_negative("swiglu_limit", p.swiglu_limit);
}

Status validate(const MoeExpertsBackwardParams& p, const Context& context) {
  Validator v("moe_experts_backward");
  validate_arguments(v, p);
  const int64_t tokens = p.x.size(0), hidden = p.x.size(1);
  if (p.grad_x.given()) v.view("grad_x", p.grad_x, p.x.dtype, {tokens, hidden});
  if (p.grad_weights.given()) v.view("grad_weights", p.grad_weights, {tokens, p.weights.size(1)});
  const AnyView<3>&w1 = p.matrices[0], &shared = p.shared[0];
  validate_matrices(v, kGradNames, p.grad_matrices, p.x.dtype, w1.size(0), w1.size(1), hidden, true);
  if (shared.given()) {
    validate_matrices(v, kGradSharedNames, p.grad_shared, p.x.dtype, 1, shared.size(1), hidden, true);
  }
  if (!v.status().is_ok()) return v.status();
  v.workspace(p.workspace.data, p.workspace.bytes, moe_experts_backward_workspace_bytes(p, context));
  return v.status();
}

Status validate(const MoeMapParams& p) {
  Validator v("moe_map");
  validate_integer(v, "indices", p.indices, {Validator::kAny, Validator::kAny});
  v.at_least("experts", p.experts, 1);
  const int64_t pairs = p.indices.size(0) * p.indices.size(1);
  v.require(p.experts < INT32_MAX && pairs <= INT32_MAX, "indices and experts must be fewer than 2^31");
  if (!v.status().is_ok()) return v.status();
  v.view("offsets", p.offsets, DType::kInt32, {p.experts + 1});
  v.view("rows", p.rows, DType::kInt32, {pairs});
  return v.status();
}

// What a kernel needs; null where this library has none.
template <class Params>
using Bytes = int64_t (*)(const Params&, const Context&);

// The most that a kernel which may run needs.
template <class Params>
int64_t workspace_bytes(const char* op, const Params& p, const Context& context, Bytes<Params> scalar,
                        Bytes<Params> avx2, Bytes<Params> avx512, Bytes<Params> cuda) {
  Validator v(op);
  validate_arguments(v, p);
  if (!v.status().is_ok()) return 0;
  if (context.device == Device::kCuda) return cuda == nullptr ? 0 : cuda(p, context);
  int64_t most = 0;
  const auto at_least = [&](Bytes<Params> bytes, Isa isa) {
    const int64_t needed = bytes != nullptr && context.best >= isa ? bytes(p, context) : 0;
    most = needed > most ? needed : most;
  };
  at_least(scalar, Isa::kScalar);
  at_least(avx2, Isa::kAvx2);
  at_least(avx512, Isa::kAvx512);
  return most;
}

}  // namespace

int64_t moe_gate_workspace_bytes(const MoeGateParams& p, const Context& context) {
  const int64_t bytes = workspace_bytes<MoeGateParams>(
      "moe_gate", p, context, DSV4_SCALAR(scalar::moe_gate_workspace_bytes), DSV4_AVX2(avx2::moe_gate_workspace_bytes),
      DSV4_AVX512(avx512::moe_gate_workspace_bytes), DSV4_SM80(sm80::moe_gate_workspace_bytes));
#if defined(DSV4_WITH_AMX)
  if (bytes > 0 && context.device == Device::kCpu && context.best >= Isa::kAmx && fits_tiles(p)) {
    const int64_t tiles = amx::moe_gate_workspace_bytes(p, context);
    return tiles > bytes ? tiles : bytes;
  }
#endif
  return bytes;
}

int64_t moe_experts_workspace_bytes(const MoeExpertsParams& p, const Context& context) {
  const int64_t bytes = workspace_bytes<MoeExpertsParams>(
      "moe_experts", p, context, DSV4_SCALAR(scalar::moe_experts_workspace_bytes),
      DSV4_AVX2(avx2::moe_experts_workspace_bytes), DSV4_AVX512(avx512::moe_experts_workspace_bytes),
      DSV4_SM80(sm80::moe_experts_workspace_bytes));
#if defined(DSV4_WITH_AMX)
  if (bytes > 0 && context.device == Device::kCpu && context.best >= Isa::kAmx && fits_tiles(p)) {
    const int64_t tiles = amx::moe_experts_workspace_bytes(p, context);
    return tiles > bytes ? tiles : bytes;
  }
#endif
  return bytes;
}

int64_t moe_experts_backward_workspace_bytes(const MoeExpertsBackwardParams& p, const Context& context) {
  const int64_t bytes = workspace_bytes<MoeExpertsBackwardParams>(
      "moe_experts_backward", p, context, DSV4_SCALAR(scalar::moe_experts_backward_workspace_bytes),
      DSV4_AVX2(avx2::moe_experts_backward_workspace_bytes), DSV4_AVX512(avx512::moe_experts_backward_workspace_bytes),
      DSV4_SM80(sm80::moe_experts_backward_workspace_bytes));
#if defined(DSV4_WITH_AMX)
  if (bytes > 0 && context.device == Device::kCpu && context.best >= Isa::kAmx && fits_tiles(p)) {
    const int64_t tiles = amx::moe_experts_backward_workspace_bytes(p, context);
    return tiles > bytes ? tiles : bytes;
  }
#endif
  return bytes;
}

Status moe_gate(const MoeGateParams& p, const Context& c) { return moe_gate_op.run(validate(p, c), p, c); }
Status moe_map(const MoeMapParams& p, const Context& c) { return moe_map_op.run(validate(p), p, c); }
Status moe_experts(const MoeExpertsParams& p, const Context& c) { return moe_experts_op.run(validate(p, c), p, c); }
Status moe_experts_backward(const MoeExpertsBackwardParams& p, const Context& c) {
  return moe_experts_backward_op.run(validate(p, c), p, c);
}

}  // namespace dsv4
