#include "ops/moe.h"

#include "torch/glue.h"

namespace dsv4::binding {
namespace {

constexpr char kFloats[] = "bfloat16 or float32 or float64";
constexpr char kWeights[] = "float32 or float64";

std::tuple<Tensor, Tensor> moe_gate(const Tensor& x_, const Tensor& weight_, int64_t top_k,
                                    const std::optional<Tensor>& bias_, const std::optional<Tensor>& token_ids_,
                                    const std::optional<Tensor>& tid2eid_, double route_scale) {
  Check check("moe_gate");
  const auto sizes =
      check.tensor("x", x_, {kAny, kAny}, {ScalarType::BFloat16, ScalarType::Float}, {kFloats, {"tokens", "hidden"}});
  const int64_t tokens = sizes[0];
  const int64_t experts = check.tensor("weight", weight_, {kAny, sizes[1]}, {ScalarType::BFloat16, ScalarType::Float},
                                       {kFloats, {"experts"}})[0];
  check.require(top_k >= 1 && top_k <= experts, "top_k must be 1 to " + std::to_string(experts) +
                                                    ", the number of experts, got " + std::to_string(top_k));
  if (bias_.has_value()) check.tensor("bias", *bias_, {experts}, {ScalarType::Float}, {kWeights});
  check.require(token_ids_.has_value() == tid2eid_.has_value(), "token_ids and tid2eid must be given together");
  if (token_ids_.has_value()) {
    check.tensor("token_ids", *token_ids_, {tokens}, {ScalarType::Int, ScalarType::Long});
    check.tensor("tid2eid", *tid2eid_, {kAny, top_k}, {ScalarType::Int, ScalarType::Long}, {nullptr, {"vocabulary"}});
    check.require(!bias_.has_value(), "bias must be None where tid2eid chooses the experts");
  }
  const Tensor x = dense(x_), weight = dense(weight_);
  const std::optional<Tensor> bias = dense(bias_), token_ids = dense(token_ids_), tid2eid = dense(tid2eid_);
  Tensor weights = empty({tokens, top_k}, ScalarType::Float, x), indices = empty({tokens, top_k}, ScalarType::Int, x);
  MoeGateParams params{view(x),     view(weight),          top_k,
                       view(bias),  view(token_ids),       view(tid2eid),
                       route_scale, mutable_view(weights), mutable_view(indices),
                       {}};
  check.run(dsv4::moe_gate, dsv4::moe_gate_workspace_bytes, params, x);
  return {weights, indices};
}
DSV4_OP(
    "moe_gate(Tensor x, Tensor weight, int top_k, Tensor? bias=None, Tensor? token_ids=None, Tensor? tid2eid=None, "
    "float route_scale=1.0) -> (Tensor, Tensor)",
    moe_gate)

std::tuple<Tensor, Tensor> moe_map(const Tensor& indices_, int64_t experts) {
  Check check("moe_map");
  const auto sizes = check.tensor("indices", indices_, {kAny, kAny}, {ScalarType::Int, ScalarType::Long},
                                  {nullptr, {"tokens", "top_k"}});
  check.require(experts >= 1 && experts < INT32_MAX,
                "experts must be 1 to " + std::to_string(INT32_MAX - 1) + ", got " + std::to_string(experts));
  const Tensor indices = dense(indices_);
  Tensor offsets = empty({experts + 1}, ScalarType::Int, indices);
  Tensor rows = empty({sizes[0] * sizes[1]}, ScalarType::Int, indices);
  check.run(dsv4::moe_map, MoeMapParams{view(indices), experts, mutable_view(offsets), mutable_view(rows)}, indices);
  return {offsets, rows};
}
DSV4_OP("moe_map(Tensor indices, int experts) -> (Tensor, Tensor)", moe_map)

constexpr const char* kNames[] = {"w1", "w3", "w2"};

// A matrix and its scale as stored. Holds what had to be copied, so it must outlive the call.
struct Matrix {
  std::optional<Tensor> data, scale;

  // `leading`: {experts}, or nothing for the shared expert.
  Matrix(Check& check, const std::string& name, const Tensor& data_, const std::optional<Tensor>& scale_, ScalarType x,
         const std::vector<int64_t>& leading, int64_t out, int64_t in)
      : data(dense(data_)), scale(dense(scale_)) {
    if (!scale_.has_value()) {
      shape(check, name, data_, leading, out, in, {x});
      return;
    }
    const ScalarType dtype = data_.defined() ? data_.scalar_type() : ScalarType::Undefined;
    const bool fp8 = dtype == ScalarType::Float8_e4m3fn, fp4 = dtype == ScalarType::Byte || dtype == ScalarType::Char;
    if (!fp8 && !fp4) {
      check.tensor(name.c_str(), data_, {kAny, kAny}, {ScalarType::Float8_e4m3fn, ScalarType::Byte, ScalarType::Char},
                   {nullptr, {"..., out", "in"}});
    }
    // The scale first, against the sizes of its own matrix.
    const auto sizes = data_.sizes();
    check.require(sizes.size() >= 2,
                  name + " must be [..., out, in], got " + std::to_string(sizes.size()) + " dimensions");
    const int64_t rows = sizes[sizes.size() - 2], columns = sizes[sizes.size() - 1] * (fp8 ? 1 : 2);
    shape(check, name + "_scale", *scale_, {sizes.begin(), sizes.end() - 2}, fp8 ? (rows + 127) / 128 : rows,
          fp8 ? (columns + 127) / 128 : (columns + 31) / 32, {ScalarType::Float8_e8m0fnu, ScalarType::Float});
    check.require(fp8 || in % 2 == 0, name + " in e2m1 needs an even number of inputs, got " + std::to_string(in));
    shape(check, name, data_, leading, out, fp8 ? in : in / 2, {dtype});
  }

  operator ExpertMatrix() const {
    ExpertMatrix matrix;
    if (!scale.has_value()) {
      matrix.format = WeightFormat::kPlain;
      matrix.data = three(*data);
      return matrix;
    }
    matrix.format = data->scalar_type() == ScalarType::Float8_e4m3fn ? WeightFormat::kFp8 : WeightFormat::kFp4;
    matrix.data = three(*data);
    matrix.scale = three(*scale);
    return matrix;
  }

  // [E, out, in] of what may lack the first axis; bytes of every kind are uint8.
  static AnyView<3> three(const Tensor& tensor) {
    AnyView<3> result;
    if (tensor.dim() == 3) {
      result = view(tensor);
    } else {
      const AnyView<2> matrix = view(tensor);
      result.data = matrix.data;
      result.dtype = matrix.dtype;
      result.shape[0] = 1;
      result.stride[0] = 0;
      for (int axis = 0; axis < 2; ++axis) {
        result.shape[axis + 1] = matrix.shape[axis];
        result.stride[axis + 1] = matrix.stride[axis];
      }
    }
    if (tensor.element_size() == 1) result.dtype = DType::kUInt8;
    return result;
  }

 private:
  static void shape(Check& check, const std::string& name, const Tensor& tensor, const std::vector<int64_t>& leading,
                    int64_t out, int64_t in, std::initializer_list<ScalarType> dtypes) {
    if (leading.empty()) {
      check.tensor(name.c_str(), tensor, {out, in}, dtypes);
    } else {
      check.tensor(name.c_str(), tensor, {leading[0], out, in}, dtypes);
    }
  }
};

void check_rank(const Check& check, const Tensor& w1) {
  check.require(w1.defined(), "w1 must be [experts, inter, hidden], got None");
  if (w1.dim() == 3) return;
  std::string shape;
  for (const int64_t size : w1.sizes()) shape += (shape.empty() ? "" : ", ") + std::to_string(size);
  check.require(false, "w1 must be [experts, inter, hidden], got [" + shape + "]");
}

Tensor moe_experts(const Tensor& x_, const Tensor& weights_, const Tensor& indices_, const Tensor& w1, const Tensor& w3,
                   const Tensor& w2, const std::optional<Tensor>& w1_scale, const std::optional<Tensor>& w3_scale,
                   const std::optional<Tensor>& w2_scale, const std::optional<std::vector<Tensor>>& shared_,
                   double swiglu_limit) {
  Check check("moe_experts");
  const auto sizes =
      check.tensor("x", x_, {kAny, kAny}, {ScalarType::BFloat16, ScalarType::Float}, {kFloats, {"tokens", "hidden"}});
  const int64_t tokens = sizes[0], hidden = sizes[1];
  const int64_t top_k =
      check.tensor("weights", weights_, {tokens, kAny}, {ScalarType::Float}, {kWeights, {nullptr, "top_k"}})[1];
  check.tensor("indices", indices_, {tokens, top_k}, {ScalarType::Int, ScalarType::Long});
  check_rank(check, w1);
  const int64_t experts = w1.size(0), inter = w1.size(1);
  const ScalarType x_type = x_.scalar_type();
  const Matrix routed[] = {{check, "w1", w1, w1_scale, x_type, {experts}, inter, hidden},
                           {check, "w3", w3, w3_scale, x_type, {experts}, inter, hidden},
                           {check, "w2", w2, w2_scale, x_type, {experts}, hidden, inter}};
  const std::vector<Tensor> given = shared_.value_or(std::vector<Tensor>{});
  check.require(given.empty() || given.size() == 3 || given.size() == 6,
                "shared must hold 0, 3 or 6 tensors, got " + std::to_string(given.size()));
  std::vector<Matrix> shared;
  for (size_t i = 0; i < (given.empty() ? 0u : 3u); ++i) {
    const bool plain = given.size() == 3;
    const int64_t own = given[0].dim() > 0 ? given[0].size(0) : 0;
    const std::optional<Tensor> scale = plain ? std::nullopt : std::optional<Tensor>(given[2 * i + 1]);
    shared.emplace_back(check, std::string("shared ") + kNames[i], given[plain ? i : 2 * i], scale, x_type,
                        std::vector<int64_t>{}, i == 2 ? hidden : own, i == 2 ? own : hidden);
  }
  check.require(swiglu_limit >= 0, "swiglu_limit must not be negative, got " + std::to_string(swiglu_limit));
  const Tensor x = dense(x_), weights = dense(weights_), indices = dense(indices_);
  Tensor result = empty({tokens, hidden}, x_type, x);
  MoeExpertsParams params{};
  params.x = view(x);
  params.weights = view(weights);
  params.indices = view(indices);
  params.w1 = routed[0];
  params.w3 = routed[1];
  params.w2 = routed[2];
  for (size_t i = 0; i < shared.size(); ++i) params.shared[i] = shared[i];
  params.swiglu_limit = static_cast<float>(swiglu_limit);
  params.result = mutable_view(result);
  check.run(dsv4::moe_experts, dsv4::moe_experts_workspace_bytes, params, x);
  return result;
}
DSV4_OP(
    "moe_experts(Tensor x, Tensor weights, Tensor indices, Tensor w1, Tensor w3, Tensor w2, Tensor? w1_scale=None, "
    "Tensor? w3_scale=None, Tensor? w2_scale=None, Tensor[]? shared=None, float swiglu_limit=0.0) -> Tensor",
    moe_experts)

// Of x, weights, w1, w3, w2 and the shared matrices; empty where `needed` says no.
std::vector<Tensor> moe_experts_backward(const Tensor& grad_, const Tensor& x_, const Tensor& weights_,
                                         const Tensor& indices_, const Tensor& w1, const Tensor& w3, const Tensor& w2,
                                         const std::vector<Tensor>& shared_, double swiglu_limit,
                                         const std::optional<std::vector<bool>>& needed) {
  Check check("moe_experts_backward");
  const auto sizes =
      check.tensor("x", x_, {kAny, kAny}, {ScalarType::BFloat16, ScalarType::Float}, {kFloats, {"tokens", "hidden"}});
  const int64_t tokens = sizes[0], hidden = sizes[1];
  const ScalarType x_type = x_.scalar_type();
  check.tensor("grad", grad_, {tokens, hidden}, {x_type});
  const int64_t top_k =
      check.tensor("weights", weights_, {tokens, kAny}, {ScalarType::Float}, {kWeights, {nullptr, "top_k"}})[1];
  check.tensor("indices", indices_, {tokens, top_k}, {ScalarType::Int, ScalarType::Long});
  check_rank(check, w1);
  check.require(shared_.empty() || shared_.size() == 3,
                "shared must hold 0 or 3 tensors, got " + std::to_string(shared_.size()));
  const size_t gradients = 5 + shared_.size();
  check.require(!needed.has_value() || needed->size() == gradients,
                "needed must hold " + std::to_string(gradients) + " flags, got " +
                    std::to_string(needed.has_value() ? needed->size() : 0));
  const Tensor grad = dense(grad_), x = dense(x_), weights = dense(weights_), indices = dense(indices_);
  MoeExpertsBackwardParams params{};
  std::vector<Tensor> results;
  const auto add = [&](const std::vector<int64_t>& size, ScalarType type) {
    const bool wanted = !needed.has_value() || (*needed)[results.size()];
    results.push_back(empty(wanted ? size : std::vector<int64_t>{0}, type, x));
    return wanted;
  };
  if (add({tokens, hidden}, x_type)) params.grad_x = mutable_view(results.back());
  if (add({tokens, top_k}, ScalarType::Float)) params.grad_weights = mutable_view(results.back());
  std::vector<Matrix> matrices;  // hold what was copied
  const auto take = [&](const std::string& prefix, const std::array<const Tensor*, 3>& given,
                        const std::vector<int64_t>& leading, int64_t inter, AnyView<3>* views, AnyView<3>* to) {
    for (int i = 0; i < 3; ++i) {
      matrices.emplace_back(check, prefix + kNames[i], *given[i], std::nullopt, x_type, leading,
                            i == 2 ? hidden : inter, i == 2 ? inter : hidden);
      views[i] = static_cast<ExpertMatrix>(matrices.back()).data;
      const auto size = given[i]->sizes();
      if (add({size.begin(), size.end()}, x_type)) to[i] = Matrix::three(results.back());
    }
  };
  take("", {&w1, &w3, &w2}, {w1.size(0)}, w1.size(1), params.matrices, params.grad_matrices);
  if (!shared_.empty()) {
    take("shared ", {&shared_[0], &shared_[1], &shared_[2]}, {}, shared_[0].dim() > 0 ? shared_[0].size(0) : 0,
         params.shared, params.grad_shared);
  }
  check.require(swiglu_limit >= 0, "swiglu_limit must not be negative, got " + std::to_string(swiglu_limit));
  params.grad = view(grad);
  params.x = view(x);
  params.weights = view(weights);
  params.indices = view(indices);
  params.swiglu_limit = static_cast<float>(swiglu_limit);
  check.run(dsv4::moe_experts_backward, dsv4::moe_experts_backward_workspace_bytes, params, x);
  return results;
}
DSV4_OP(
    "moe_experts_backward(Tensor grad, Tensor x, Tensor weights, Tensor indices, Tensor w1, Tensor w3, Tensor w2, "
    "Tensor[] shared, float swiglu_limit, bool[]? needed=None) -> Tensor[]",
    moe_experts_backward)

}  // namespace
}  // namespace dsv4::binding
