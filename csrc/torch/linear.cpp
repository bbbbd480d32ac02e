#include "ops/linear.h"

#include "torch/glue.h"

namespace dsv4::binding {
namespace {

constexpr char kFloats[] = "bfloat16 or float32 or float64";

int64_t ceil_div(int64_t value, int64_t divisor) { return (value + divisor - 1) / divisor; }

// Codes and e8m0 scales are bytes to the kernels.
AnyView<2> bytes_view(const Tensor& tensor) {
  AnyView<2> result = view(tensor);
  if (result.dtype == DType::kNone) result.dtype = DType::kUInt8;
  return result;
}

void check_scale(Check& check, const Tensor& scale, int64_t rows, int64_t columns) {
  check.tensor("scale", scale, {rows, columns}, {ScalarType::Float8_e8m0fnu, ScalarType::Float});
}

using Run = Status (*)(const LinearParams&, const Context&);
using WorkspaceBytes = int64_t (*)(const LinearParams&, const Context&);

// Checked activations whose rows `rows_view` can address.
Tensor dense_rows(const Tensor& x) {
  const int axes = static_cast<int>(x.dim());
  return dense(x, axes > 2 ? axes : 1);
}

// [..., n] as [rows, n], without a reshape: calls into torch cost more than a small product.
template <bool kMutable = false>
AnyView<2> rows_view(const Tensor& tensor) {
  const auto sizes = tensor.sizes();
  const int64_t axes = tensor.dim(), last = sizes[axes - 1];
  AnyView<2> rows;
  rows.data = kMutable ? tensor.mutable_data_ptr() : const_cast<void*>(tensor.const_data_ptr());
  rows.dtype = dtype_of(tensor);
  rows.shape[0] = 1;
  for (int64_t axis = 0; axis + 1 < axes; ++axis) rows.shape[0] *= sizes[axis];
  rows.shape[1] = last;
  rows.stride[0] = axes == 2 ? tensor.strides()[0] : last;
  rows.stride[1] = tensor.strides()[axes - 1];
  return rows;
}

// One group of rows.
AnyView<3> with_group(const AnyView<2>& rows) {
  AnyView<3> view;
  view.data = rows.data;
  view.dtype = rows.dtype;
  view.shape[0] = rows.shape[0];
  view.shape[1] = 1;
  view.shape[2] = rows.shape[1];
  view.stride[0] = view.stride[1] = rows.stride[0];
  view.stride[2] = rows.stride[1];
  return view;
}

// What x [..., in] becomes: [..., outputs].
Tensor output(const Check& check, const Tensor& x, int64_t outputs, std::optional<ScalarType> out_dtype) {
  const auto shape = x.sizes();
  std::vector<int64_t> sizes(shape.begin(), shape.end());
  sizes.back() = outputs;
  const ScalarType dtype = out_dtype.value_or(x.scalar_type());
  check.require(dtype == ScalarType::BFloat16 || dtype == ScalarType::Float,
                "out_dtype must be bfloat16, float32 or float64");
  return empty(sizes, dtype, x);
}

// `outputs` rows of checked weights.
Tensor linear(Check& check, const Tensor& x_, const Tensor& weight_, const Tensor& scale_, int64_t outputs,
              std::optional<ScalarType> out_dtype, Run run, WorkspaceBytes workspace_bytes) {
  Tensor out = output(check, x_, outputs, out_dtype);
  const Tensor x = dense_rows(x_), weight = dense(weight_), scale = dense(scale_);
  LinearParams params{};
  params.x = with_group(rows_view(x));
  params.out = with_group(rows_view<true>(out));
  params.weight = bytes_view(weight);
  params.scale = bytes_view(scale);
  check.run(run, workspace_bytes, params, x);
  return out;
}

Tensor fp8_linear(const Tensor& x, const Tensor& weight, const Tensor& scale, std::optional<ScalarType> out_dtype) {
  Check check("fp8_linear");
  const int64_t inputs = check.rows("x", x, "in", {ScalarType::BFloat16, ScalarType::Float}, kFloats).back();
  const int64_t outputs =
      check.tensor("weight", weight, {kAny, inputs}, {ScalarType::Float8_e4m3fn}, {nullptr, {"out"}})[0];
  check_scale(check, scale, ceil_div(outputs, 128), ceil_div(inputs, 128));
  return linear(check, x, weight, scale, outputs, out_dtype, dsv4::fp8_linear, dsv4::fp8_linear_workspace_bytes);
}

Tensor fp4_linear(const Tensor& x, const Tensor& weight, const Tensor& scale, std::optional<ScalarType> out_dtype) {
  Check check("fp4_linear");
  const int64_t inputs = check.rows("x", x, "in", {ScalarType::BFloat16, ScalarType::Float}, kFloats).back();
  check.require(inputs % 2 == 0, "the last dimension of x must be even, got " + std::to_string(inputs));
  const int64_t outputs =
      check.tensor("weight", weight, {kAny, inputs / 2}, {ScalarType::Byte, ScalarType::Char}, {nullptr, {"out"}})[0];
  check_scale(check, scale, outputs, ceil_div(inputs, 32));
  return linear(check, x, weight, scale, outputs, out_dtype, dsv4::fp4_linear, dsv4::fp4_linear_workspace_bytes);
}

Tensor grouped_linear(const Tensor& x_, const Tensor& weight_, const std::optional<Tensor>& scale_) {
  Check check("grouped_linear");
  const auto sizes = check.tensor("x", x_, {kAny, kAny, kAny}, {ScalarType::BFloat16, ScalarType::Float},
                                  {kFloats, {"tokens", "groups", "in"}});
  const int64_t tokens = sizes[0], groups = sizes[1], inputs = sizes[2];
  check.require(groups >= 1, "x must have at least one group, got " + std::to_string(groups));
  const ScalarType weights = scale_.has_value() ? ScalarType::Float8_e4m3fn : x_.scalar_type();
  const int64_t rows = check.tensor("weight", weight_, {kAny, inputs}, {weights}, {nullptr, {"groups * out"}})[0];
  check.require(rows % groups == 0, "weight must have a multiple of " + std::to_string(groups) +
                                        " rows, one part a group, got " + std::to_string(rows));
  if (scale_.has_value()) check_scale(check, *scale_, ceil_div(rows, 128), ceil_div(inputs, 128));
  const Tensor x = dense(x_), weight = dense(weight_);
  const std::optional<Tensor> scale = dense(scale_);
  Tensor out = empty({tokens, groups, rows / groups}, x.scalar_type(), x);
  LinearParams params{};
  params.x = view(x);
  params.out = mutable_view(out);
  params.weight = bytes_view(weight);
  if (scale.has_value()) params.scale = bytes_view(*scale);
  check.run(dsv4::grouped_linear, dsv4::grouped_linear_workspace_bytes, params, x);
  return out;
}

Tensor dense_linear(const Tensor& x_, const Tensor& weight_, std::optional<ScalarType> out_dtype) {
  Check check("dense_linear");
  const auto sizes = check.rows("x", x_, "in", {ScalarType::BFloat16, ScalarType::Float}, kFloats);
  const int64_t inputs = sizes.back();
  const int64_t outputs =
      check.tensor("weight", weight_, {kAny, inputs}, {ScalarType::BFloat16, ScalarType::Float}, {kFloats, {"out"}})[0];
  Tensor out = output(check, x_, outputs, out_dtype);
  const Tensor x = dense_rows(x_), weight = dense(weight_);
  DenseLinearParams params{};
  params.x = rows_view(x);
  params.weight = view(weight);
  params.out = rows_view<true>(out);
  check.run(dsv4::dense_linear, dsv4::dense_linear_workspace_bytes, params, x);
  return out;
}

DSV4_OP("fp8_linear(Tensor x, Tensor weight, Tensor scale, ScalarType? out_dtype=None) -> Tensor", fp8_linear)
DSV4_OP("fp4_linear(Tensor x, Tensor weight, Tensor scale, ScalarType? out_dtype=None) -> Tensor", fp4_linear)
DSV4_OP("grouped_linear(Tensor x, Tensor weight, Tensor? scale=None) -> Tensor", grouped_linear)
DSV4_OP("dense_linear(Tensor x, Tensor weight, ScalarType? out_dtype=None) -> Tensor", dense_linear)

}  // namespace
}  // namespace dsv4::binding
