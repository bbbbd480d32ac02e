#include "ops/linear.h"

#include "cpu/linear.h"
#include "cuda/sm80/linear.h"
#include "cuda/sm90/linear.h"
#include "ops/candidates.h"
#include "ops/validate.h"

namespace dsv4 {
namespace {

// What AMX takes, whatever the number of rows: a row's bits must not depend on it.
bool e8m0_scales(const LinearParams& p) { return p.scale.dtype == DType::kUInt8; }
bool narrow_with_e8m0_scales(const LinearParams& p) { return e8m0_scales(p) && p.x.dtype == DType::kBFloat16; }
bool both_narrow(const DenseLinearParams& p) {
  return p.x.dtype == DType::kBFloat16 && p.weight.dtype == DType::kBFloat16;
}

// What warpgroups take: activations that are one bfloat16.
bool narrow(const LinearParams& p) { return p.x.dtype == DType::kBFloat16; }

constexpr Candidate<LinearParams> kFp8Linear[] = {
    {"sm90", Isa::kSm90, DSV4_SM90(sm90::fp8_linear)},
    {"sm80", Isa::kSm80, DSV4_SM80(sm80::fp8_linear)},
    {"amx", Isa::kAmx, DSV4_AMX(amx::fp8_linear), e8m0_scales},
    {"avx512", Isa::kAvx512, DSV4_AVX512(avx512::fp8_linear)},
    {"avx2", Isa::kAvx2, DSV4_AVX2(avx2::fp8_linear)},
    {"scalar", Isa::kScalar, DSV4_SCALAR(scalar::fp8_linear)},
};
constexpr Candidate<LinearParams> kFp4Linear[] = {
    {"sm90", Isa::kSm90, DSV4_SM90(sm90::fp4_linear), e8m0_scales},
    {"sm80", Isa::kSm80, DSV4_SM80(sm80::fp4_linear)},
    {"amx", Isa::kAmx, DSV4_AMX(amx::fp4_linear), e8m0_scales},
    {"avx512", Isa::kAvx512, DSV4_AVX512(avx512::fp4_linear)},
    {"avx2", Isa::kAvx2, DSV4_AVX2(avx2::fp4_linear)},
    {"scalar", Isa::kScalar, DSV4_SCALAR(scalar::fp4_linear)},
};
constexpr Candidate<LinearParams> kGroupedLinear[] = {
    {"sm90", Isa::kSm90, DSV4_SM90(sm90::grouped_linear), narrow},
    {"sm80", Isa::kSm80, DSV4_SM80(sm80::grouped_linear)},
    {"amx", Isa::kAmx, DSV4_AMX(amx::grouped_linear), narrow_with_e8m0_scales},
    {"avx512", Isa::kAvx512, DSV4_AVX512(avx512::grouped_linear)},
    {"avx2", Isa::kAvx2, DSV4_AVX2(avx2::grouped_linear)},
    {"scalar", Isa::kScalar, DSV4_SCALAR(scalar::grouped_linear)},
};
constexpr Candidate<DenseLinearParams> kDenseLinear[] = {
    {"sm80", Isa::kSm80, DSV4_SM80(sm80::dense_linear)},
    {"amx", Isa::kAmx, DSV4_AMX(amx::dense_linear), both_narrow},
    {"avx512", Isa::kAvx512, DSV4_AVX512(avx512::dense_linear)},
    {"avx2", Isa::kAvx2, DSV4_AVX2(avx2::dense_linear)},
    {"scalar", Isa::kScalar, DSV4_SCALAR(scalar::dense_linear)},
};
const Op fp8_linear_op("fp8_linear", kFp8Linear);
const Op fp4_linear_op("fp4_linear", kFp4Linear);
const Op grouped_linear_op("grouped_linear", kGroupedLinear);
const Op dense_linear_op("dense_linear", kDenseLinear);

enum class Form { kFp8, kFp4, kGrouped };

int64_t ceil_div(int64_t value, int64_t divisor) { return (value + divisor - 1) / divisor; }

bool is_plain(const LinearParams& p, Form form) { return form == Form::kGrouped && !p.scale.given(); }

// One group of a plain product.
DenseLinearParams plain_group(const LinearParams& p, int64_t group) {
  const int64_t outputs = p.weight.size(0) / p.x.size(1);
  const auto moved = [](void* data, DType dtype, int64_t elements) {
    const int64_t bytes = elements * (dtype == DType::kBFloat16 ? 2 : 4);
    return data == nullptr ? nullptr : static_cast<uint8_t*>(data) + bytes;  // none where there is no element
  };
  DenseLinearParams one;
  one.x = {moved(p.x.data, p.x.dtype, group * p.x.stride[1]),
           p.x.dtype,
           {p.x.size(0), p.x.size(2)},
           {p.x.stride[0], p.x.stride[2]}};
  one.weight = {moved(p.weight.data, p.weight.dtype, group * outputs * p.weight.stride[0]),
                p.weight.dtype,
                {outputs, p.weight.size(1)},
                {p.weight.stride[0], p.weight.stride[1]}};
  one.out = {moved(p.out.data, p.out.dtype, group * p.out.stride[1]),
             p.out.dtype,
             {p.out.size(0), p.out.size(2)},
             {p.out.stride[0], p.out.stride[2]}};
  one.workspace = p.workspace;
  return one;
}

Status run_plain_groups(const Status& valid, const LinearParams& p, const Context& context) {
  Status status = valid;
  for (int64_t group = 0; status.is_ok() && group < p.x.size(1); ++group) {
    status = dense_linear(plain_group(p, group), context);
  }
  return status;
}

void validate_arguments(Validator& v, const LinearParams& p, Form form) {
  const int64_t groups = p.x.size(1), inputs = p.x.size(2), rows = p.weight.size(0);
  const bool fp4 = form == Form::kFp4;
  v.floats("x", p.x, {Validator::kAny, form == Form::kGrouped ? Validator::kAny : 1, Validator::kAny});
  v.require(groups >= 1, "x must have at least one group");
  v.require(inputs <= INT32_MAX && rows <= INT32_MAX, "the weight is too large");
  v.require(!fp4 || inputs % 2 == 0, "x must have an even number of inputs");
  if (!v.status().is_ok()) return;
  v.view("weight", p.weight, is_plain(p, form) ? p.x.dtype : DType::kUInt8,
         {Validator::kAny, fp4 ? inputs / 2 : inputs});
  v.require(rows % groups == 0, "weight must have a multiple of %lld rows", static_cast<long long>(groups));
  if (is_plain(p, form)) return;
  v.require(p.scale.dtype == DType::kUInt8 || p.scale.dtype == DType::kFloat32, "scale must be uint8 or float32");
  v.view("scale", p.scale, p.scale.dtype, {fp4 ? rows : ceil_div(rows, 128), ceil_div(inputs, fp4 ? 32 : 128)});
}

template <class Params>
using BytesOf = int64_t (*)(const Params&, const Context&);
using WorkspaceBytes = BytesOf<LinearParams>;

// Of the kernels in this library; null where there is none.
template <class Params>
struct Bytes {
  BytesOf<Params> scalar, avx2, avx512, amx, sm80;
};

// The most that a kernel which this context admits asks for.
template <class Params>
int64_t most_bytes(const Params& p, const Context& context, const Bytes<Params>& of, bool tiles) {
  if (context.device == Device::kCuda) return of.sm80 != nullptr ? of.sm80(p, context) : 0;
  int64_t most = 0;
  const auto at_least = [&](BytesOf<Params> bytes) {
    const int64_t needed = bytes != nullptr ? bytes(p, context) : 0;
    most = needed > most ? needed : most;
  };
  at_least(of.scalar);
  if (context.best >= Isa::kAvx2) at_least(of.avx2);
  if (context.best >= Isa::kAvx512) at_least(of.avx512);
  if (context.best >= Isa::kAmx && tiles) at_least(of.amx);
  return most;
}

int64_t workspace_bytes(const LinearParams& p, const Context& context, const char* op, Form form,
                        const Bytes<LinearParams>& of) {
  Validator v(op);
  validate_arguments(v, p, form);
  if (v.status().is_ok() && is_plain(p, form)) return dense_linear_workspace_bytes(plain_group(p, 0), context);
  const bool tiles = form == Form::kGrouped ? narrow_with_e8m0_scales(p) : e8m0_scales(p);
  return v.status().is_ok() ? most_bytes(p, context, of, tiles) : 0;
}

Status validate(const LinearParams& p, const Context& context, const char* op, Form form, WorkspaceBytes bytes) {
  Validator v(op);
  validate_arguments(v, p, form);
  if (!v.status().is_ok()) return v.status();
  v.floats("out", p.out, {p.x.size(0), p.x.size(1), p.weight.size(0) / p.x.size(1)});
  if (v.status().is_ok()) v.workspace(p.workspace.data, p.workspace.bytes, bytes(p, context));
  return v.status();
}

void validate_dense_arguments(Validator& v, const DenseLinearParams& p) {
  v.floating("x", p.x.dtype);
  v.floating("weight", p.weight.dtype);
  v.view("x", p.x, p.x.dtype, {Validator::kAny, Validator::kAny});
  v.view("weight", p.weight, p.weight.dtype, {Validator::kAny, p.x.size(1)});
}

Status validate_dense(const DenseLinearParams& p, const Context& context) {
  Validator v("dense_linear");
  validate_dense_arguments(v, p);
  if (!v.status().is_ok()) return v.status();
  v.floats("out", p.out, {p.x.size(0), p.weight.size(0)});
  if (v.status().is_ok()) v.workspace(p.workspace.data, p.workspace.bytes, dense_linear_workspace_bytes(p, context));
  return v.status();
}

}  // namespace

int64_t dense_linear_workspace_bytes(const DenseLinearParams& p, const Context& c) {
  Validator v("dense_linear");
  validate_dense_arguments(v, p);
  if (!v.status().is_ok()) return 0;
  return most_bytes<DenseLinearParams>(
      p, c,
      {DSV4_SCALAR(scalar::dense_linear_workspace_bytes), DSV4_AVX2(avx2::dense_linear_workspace_bytes),
       DSV4_AVX512(avx512::dense_linear_workspace_bytes), DSV4_AMX(amx::dense_linear_workspace_bytes),
       DSV4_SM80(sm80::dense_linear_workspace_bytes)},
      both_narrow(p));
}
int64_t fp8_linear_workspace_bytes(const LinearParams& p, const Context& c) {
  return workspace_bytes(p, c, "fp8_linear", Form::kFp8,
                         {DSV4_SCALAR(scalar::fp8_linear_workspace_bytes), DSV4_AVX2(avx2::fp8_linear_workspace_bytes),
                          DSV4_AVX512(avx512::fp8_linear_workspace_bytes), DSV4_AMX(amx::fp8_linear_workspace_bytes),
                          DSV4_SM80(sm80::quantised_linear_workspace_bytes)});
}
int64_t fp4_linear_workspace_bytes(const LinearParams& p, const Context& c) {
  return workspace_bytes(p, c, "fp4_linear", Form::kFp4,
                         {DSV4_SCALAR(scalar::fp4_linear_workspace_bytes), DSV4_AVX2(avx2::fp4_linear_workspace_bytes),
                          DSV4_AVX512(avx512::fp4_linear_workspace_bytes), DSV4_AMX(amx::fp4_linear_workspace_bytes),
                          DSV4_SM80(sm80::quantised_linear_workspace_bytes)});
}
int64_t grouped_linear_workspace_bytes(const LinearParams& p, const Context& c) {
  return workspace_bytes(
      p, c, "grouped_linear", Form::kGrouped,
      {DSV4_SCALAR(scalar::grouped_linear_workspace_bytes), DSV4_AVX2(avx2::grouped_linear_workspace_bytes),
       DSV4_AVX512(avx512::grouped_linear_workspace_bytes), DSV4_AMX(amx::grouped_linear_workspace_bytes),
       DSV4_SM80(sm80::grouped_linear_workspace_bytes)});
}

Status fp8_linear(const LinearParams& p, const Context& c) {
  return fp8_linear_op.run(validate(p, c, "fp8_linear", Form::kFp8, fp8_linear_workspace_bytes), p, c);
}
Status fp4_linear(const LinearParams& p, const Context& c) {
  return fp4_linear_op.run(validate(p, c, "fp4_linear", Form::kFp4, fp4_linear_workspace_bytes), p, c);
}
Status grouped_linear(const LinearParams& p, const Context& c) {
  const Status valid = validate(p, c, "grouped_linear", Form::kGrouped, grouped_linear_workspace_bytes);
  return is_plain(p, Form::kGrouped) ? run_plain_groups(valid, p, c) : grouped_linear_op.run(valid, p, c);
}
Status dense_linear(const DenseLinearParams& p, const Context& c) {
  return dense_linear_op.run(validate_dense(p, c), p, c);
}

}  // namespace dsv4
