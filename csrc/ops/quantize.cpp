#include "ops/quantize.h"

#include "cpu/norm_rope.h"
#include "cpu/quantize.h"
#include "cuda/sm80/quantize.h"
#include "ops/candidates.h"
#include "ops/validate.h"

namespace dsv4 {
namespace {

[[maybe_unused]] bool whole_steps(const HadamardParams& p) { return p.x.size(1) % 32 == 0; }

// The vector kernels work on 32 values at a time.
[[maybe_unused]] bool whole_blocks(const QuantizeParams& p) { return p.x.size(1) % 32 == 0 && p.block % 32 == 0; }
[[maybe_unused]] bool whole_codes(const DequantizeParams& p) { return p.result.size(2) % 32 == 0 && p.block % 32 == 0; }

// The CUDA kernels count values in 32 bits.
constexpr int64_t kMostValues = int64_t{1} << 28;
[[maybe_unused]] bool countable(const QuantizeParams& p) { return p.x.size(1) < kMostValues; }
[[maybe_unused]] bool countable(const DequantizeParams& p) {
  return p.result.size(2) < kMostValues && p.result.size(1) < kMostValues;
}

constexpr Candidate<QuantizeParams> kQuantizeFp8[] = {
    {"sm80", Isa::kSm80, DSV4_SM80(sm80::quantize_fp8), countable},
    {"avx512", Isa::kAvx512, DSV4_AVX512(avx512::quantize_fp8), whole_blocks},
    {"scalar", Isa::kScalar, DSV4_SCALAR(scalar::quantize_fp8)},
};
const Op quantize_fp8_op("quantize_fp8", kQuantizeFp8);

constexpr Candidate<QuantizeParams> kQuantizeFp4[] = {
    {"sm80", Isa::kSm80, DSV4_SM80(sm80::quantize_fp4), countable},
    {"avx512", Isa::kAvx512, DSV4_AVX512(avx512::quantize_fp4), whole_blocks},
    {"scalar", Isa::kScalar, DSV4_SCALAR(scalar::quantize_fp4)},
};
const Op quantize_fp4_op("quantize_fp4", kQuantizeFp4);

constexpr Candidate<DequantizeParams> kDequantize[] = {
    {"sm80", Isa::kSm80, DSV4_SM80(sm80::dequantize), countable},
    {"avx512", Isa::kAvx512, DSV4_AVX512(avx512::dequantize), whole_codes},
    {"scalar", Isa::kScalar, DSV4_SCALAR(scalar::dequantize)},
};
const Op dequantize_fp8_op("dequantize_fp8", kDequantize);
const Op dequantize_fp4_op("dequantize_fp4", kDequantize);
const Op dequantize_weight_op("dequantize_weight", kDequantize);

int64_t ceil_div(int64_t value, int64_t divisor) { return value / divisor + (value % divisor != 0); }

Status validate(const char* op, const QuantizeParams& p, bool fp4) {
  Validator v(op);
  const int64_t rows = p.x.size(0), n = p.x.size(1);
  v.floats("x", p.x, {Validator::kAny, Validator::kAny});
  v.at_least("block", p.block, 1);
  if (fp4) v.require(n % 2 == 0 && p.block % 2 == 0, "the last dimension of x and block must be even");
  if (!v.status().is_ok()) return v.status();
  v.view("codes", p.codes, DType::kUInt8, {rows, fp4 ? n / 2 : n});
  v.view("scale", p.scale, DType::kUInt8, {rows, ceil_div(n, p.block)});
  return v.status();
}

Status validate(const char* op, const DequantizeParams& p) {
  Validator v(op);
  const int64_t batch = p.codes.size(0), rows = p.codes.size(1), n = p.codes.size(2) * (p.fp4 ? 2 : 1);
  v.view("codes", p.codes, DType::kUInt8, {Validator::kAny, Validator::kAny, Validator::kAny});
  v.at_least("block", p.block, 1);
  v.at_least("group", p.group, 1);
  v.require(!p.fp4 || p.block % 2 == 0, "block must be even");
  v.require(p.scale.dtype == DType::kUInt8 || p.scale.dtype == DType::kFloat32, "scale must be uint8 or float32");
  if (!v.status().is_ok()) return v.status();
  v.view("scale", p.scale, p.scale.dtype, {batch, ceil_div(rows, p.group), ceil_div(n, p.block)});
  v.floats("result", p.result, {batch, rows, n});
  return v.status();
}

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
  v.floats("x", p.x, {Validator::kAny, Validator::kAny});
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

Status quantize_fp8(const QuantizeParams& p, const Context& c) {
  return quantize_fp8_op.run(validate("quantize_fp8", p, false), p, c);
}
Status quantize_fp4(const QuantizeParams& p, const Context& c) {
  return quantize_fp4_op.run(validate("quantize_fp4", p, true), p, c);
}

Status dequantize_fp8(const DequantizeParams& p, const Context& c) {
  return dequantize_fp8_op.run(validate("dequantize_fp8", p), p, c);
}
Status dequantize_fp4(const DequantizeParams& p, const Context& c) {
  return dequantize_fp4_op.run(validate("dequantize_fp4", p), p, c);
}
Status dequantize_weight(const DequantizeParams& p, const Context& c) {
  return dequantize_weight_op.run(validate("dequantize_weight", p), p, c);
}

Status hadamard(const HadamardParams& p, const Context& c) { return hadamard_op.run(validate(p, c), p, c); }

}  // namespace dsv4
