#include "ops/quantize.h"

#include "cpu/norm_rope.h"
#include "cpu/quantize.h"
#include "cuda/sm80/quantize.h"
#include "ops/candidates.h"
#include "ops/validate.h"

namespace dsv4 {
namespace {

[[maybe_unused]] bool whole_steps(const HadamardParams& p) { return p.x.size(1) % 32 == 0; }

[[maybe_unused]] bool in_shared_memory(const HadamardParams& p) { return p.x.size(1) <= sm80::kMostHadamardDims; }

constexpr Candidate<HadamardParams> kHadamard[] = {
    {"sm80", Isa::kSm80, DSV4_SM80(sm80::hadamard), in_shared_memory},
    {"avx512", Isa::kAvx512, DSV4_AVX512(avx512::hadamard), whole_steps},
    {"scalar", Isa::kScalar, DSV4_SCALAR(scalar::hadamard)},
};
const Op hadamard_op("hadamard", kHadamard);

Status validate(const HadamardParams& p, const Context& context) {
  Validator v("hadamard");
  const int64_t rows = p.x.size(0), size = p.x.size(1);
  v.floating("x", p.x.dtype);
  v.view("x", p.x, p.x.dtype, {Validator::kAny, Validator::kAny});
  v.require(size > 0 && (size & (size - 1)) == 0, "the last dimension of x must be a power of two, got %lld",
            static_cast<long long>(size));
  v.view("result", p.result, p.x.dtype, {rows, size});
  if (v.status().is_ok()) v.workspace(p.workspace.data, p.workspace.bytes, hadamard_workspace_bytes(p, context));
  return v.status();
}

}  // namespace

int64_t hadamard_workspace_bytes(const HadamardParams& p, const Context& context) {
  if (context.device != Device::kCpu || p.x.size(1) <= 0) return 0;
  return row_workspace_bytes(p.x.size(0), 2 * p.x.size(1), context);
}

Status hadamard(const HadamardParams& p, const Context& c) { return hadamard_op.run(validate(p, c), p, c); }

}  // namespace dsv4
