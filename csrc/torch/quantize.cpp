#include "ops/quantize.h"

#include "torch/glue.h"

namespace dsv4::binding {
namespace {

Tensor hadamard(const Tensor& x_) {
  Check check("hadamard");
  const bool floating = x_.scalar_type() == ScalarType::BFloat16 || x_.scalar_type() == ScalarType::Float;
  if (x_.dim() < 1 || !floating) {
    check.tensor("x", x_, {kAny}, {ScalarType::BFloat16, ScalarType::Float},
                 {"bfloat16 or float32 or float64", {"..., n"}});
  }
  const Tensor x = dense(x_, static_cast<int>(x_.dim()));
  const Tensor result = empty(x.sizes(), x.scalar_type(), x);
  HadamardParams params{rows_view(x), mutable_rows_view(result), {}};
  check.run(dsv4::hadamard, dsv4::hadamard_workspace_bytes, params, x);
  return result;
}
DSV4_OP("hadamard(Tensor x) -> Tensor", hadamard)

constexpr const char* kFloats = "bfloat16 or float32 or float64";

using Quantize = Status (*)(const QuantizeParams&, const Context&);

void check_block(const Check& check, int64_t block, bool fp4) {
  if (block >= 1 && (!fp4 || block % 2 == 0)) return;
  check.require(false, (fp4 ? "block must be even and at least 2, got " : "block must be at least 1, got ") +
                           std::to_string(block));
}

std::vector<int64_t> with_last(std::vector<int64_t> sizes, int64_t last) {
  sizes.back() = last;
  return sizes;
}

int64_t ceil_div(int64_t value, int64_t divisor) { return value / divisor + (value % divisor != 0); }

std::tuple<Tensor, Tensor> quantize(Check& check, const Tensor& x_, int64_t block, bool fp4, Quantize run) {
  const auto sizes = check.rows("x", x_, "n", {ScalarType::BFloat16, ScalarType::Float}, kFloats);
  const int64_t n = sizes.back();
  if (fp4 && n % 2 != 0) check.require(false, "the last dimension of x must be even, got " + std::to_string(n));
  check_block(check, block, fp4);
  const Tensor x = dense(x_, static_cast<int>(x_.dim()));
  const Tensor codes = empty(with_last(sizes, fp4 ? n / 2 : n), fp4 ? ScalarType::Byte : ScalarType::Float8_e4m3fn, x);
  const Tensor scale = empty(with_last(sizes, ceil_div(n, block)), ScalarType::Float8_e8m0fnu, x);
  check.run(run, {rows_view(x), block, mutable_rows_view(codes), mutable_rows_view(scale)}, x);
  return {codes, scale};
}

std::tuple<Tensor, Tensor> quantize_fp8(const Tensor& x, int64_t block) {
  Check check("quantize_fp8");
  return quantize(check, x, block, false, dsv4::quantize_fp8);
}

std::tuple<Tensor, Tensor> quantize_fp4(const Tensor& x, int64_t block) {
  Check check("quantize_fp4");
  return quantize(check, x, block, true, dsv4::quantize_fp4);
}

DSV4_OP("quantize_fp8(Tensor x, int block=128) -> (Tensor, Tensor)", quantize_fp8)
DSV4_OP("quantize_fp4(Tensor x, int block=32) -> (Tensor, Tensor)", quantize_fp4)

using Dequantize = Status (*)(const DequantizeParams&, const Context&);

// Rows in groups: [rows, n] as [rows / group, group, n].
AnyView<3> grouped(AnyView<2> rows, int64_t group) {
  const int64_t n = rows.size(1), batch = group == 0 ? 0 : rows.size(0) / group;
  return {rows.data, rows.dtype, {batch, group, n}, {group * n, n, 1}};
}

// Checked codes [..., n or n / 2] and scales. Of each `rows` rows, `group` share a row of scales.
Tensor dequantize(const Check& check, const Tensor& codes_, const Tensor& scale_, bool fp4, int64_t rows, int64_t group,
                  int64_t block, ScalarType dtype, Dequantize run) {
  check.require(dtype == ScalarType::BFloat16 || dtype == ScalarType::Float,
                "dtype must be bfloat16, float32 or float64");
  const Tensor codes = dense(codes_, static_cast<int>(codes_.dim())),
               scale = dense(scale_, static_cast<int>(scale_.dim()));
  const auto shape = codes.sizes();
  const std::vector<int64_t> sizes(shape.begin(), shape.end());
  const Tensor result = empty(with_last(sizes, sizes.back() * (fp4 ? 2 : 1)), dtype, codes);
  check.run(run,
            {fp4, grouped(rows_view(codes), rows), grouped(rows_view(scale), ceil_div(rows, group)), group, block,
             grouped(mutable_rows_view(result), rows)},
            codes);
  return result;
}

Tensor dequantize_fp8(const Tensor& codes, const Tensor& scale, int64_t block, ScalarType dtype) {
  Check check("dequantize_fp8");
  const auto sizes = check.rows("codes", codes, "n", {ScalarType::Float8_e4m3fn});
  check_block(check, block, false);
  check.sized("scale", scale, with_last(sizes, ceil_div(sizes.back(), block)),
              {ScalarType::Float8_e8m0fnu, ScalarType::Float});
  return dequantize(check, codes, scale, false, 1, 1, block, dtype, dsv4::dequantize_fp8);
}

Tensor dequantize_fp4(const Tensor& codes, const Tensor& scale, int64_t block, ScalarType dtype) {
  Check check("dequantize_fp4");
  const auto sizes = check.rows("codes", codes, "n / 2", {ScalarType::Byte, ScalarType::Char});
  check_block(check, block, true);
  check.sized("scale", scale, with_last(sizes, ceil_div(2 * sizes.back(), block)),
              {ScalarType::Float8_e8m0fnu, ScalarType::Float});
  return dequantize(check, codes, scale, true, 1, 1, block, dtype, dsv4::dequantize_fp4);
}

Tensor dequantize_weight(const Tensor& weight, const Tensor& scale, ScalarType dtype) {
  Check check("dequantize_weight");
  auto blocks = check.rows("weight", weight, "out, in", {ScalarType::Float8_e4m3fn, ScalarType::Byte, ScalarType::Char},
                           nullptr, 2);
  const bool fp4 = weight.scalar_type() != ScalarType::Float8_e4m3fn;
  const int64_t rows = blocks[blocks.size() - 2], group = fp4 ? 1 : 128, block = fp4 ? 32 : 128;
  blocks[blocks.size() - 2] = ceil_div(rows, group);
  blocks.back() = ceil_div(blocks.back() * (fp4 ? 2 : 1), block);
  check.sized("scale", scale, blocks, {ScalarType::Float8_e8m0fnu, ScalarType::Float});
  return dequantize(check, weight, scale, fp4, rows, group, block, dtype, dsv4::dequantize_weight);
}

DSV4_OP("dequantize_fp8(Tensor codes, Tensor scale, int block=128, ScalarType dtype=15) -> Tensor", dequantize_fp8)
DSV4_OP("dequantize_fp4(Tensor codes, Tensor scale, int block=32, ScalarType dtype=15) -> Tensor", dequantize_fp4)
DSV4_OP("dequantize_weight(Tensor weight, Tensor scale, ScalarType dtype=15) -> Tensor", dequantize_weight)

}  // namespace
}  // namespace dsv4::binding
