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
  const Tensor result = torch::stable::empty_like(x);
  HadamardParams params{rows_view(x), mutable_rows_view(result), {}};
  const Scratch scratch(dsv4::hadamard_workspace_bytes(params, check.context(x)), x);
  params.workspace = scratch;
  check.run(dsv4::hadamard, params, x);
  return result;
}
DSV4_OP("hadamard(Tensor x) -> Tensor", hadamard)

}  // namespace
}  // namespace dsv4::binding
