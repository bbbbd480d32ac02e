#include "ops/mhc.h"

#include "torch/glue.h"

namespace dsv4::binding {
namespace {

struct Sizes {
  int64_t tokens, hidden;
  ScalarType x;  // of the streams
};

Sizes check_streams(Check& check, const Tensor& streams) {
  const auto sizes = check.tensor("streams", streams, {kAny, kStreams, kAny}, {ScalarType::BFloat16, ScalarType::Float},
                                  {nullptr, {"tokens", nullptr, "hidden"}});
  return {sizes[0], sizes[2], streams.scalar_type()};
}

Sizes check_post(Check& check, const Tensor& sublayer, const Tensor& streams, const Tensor& post, const Tensor& comb) {
  const Sizes s = check_streams(check, streams);
  check.tensor("sublayer", sublayer, {s.tokens, s.hidden}, {s.x});
  check.tensor("post", post, {s.tokens, kStreams}, {ScalarType::Float});
  check.tensor("comb", comb, {s.tokens, kStreams, kStreams}, {ScalarType::Float});
  return s;
}

// The mixing weights of a call. Holds what had to be copied, so it must outlive the call.
struct Mixing {
  Tensor fn, scale, base;
  double norm_eps, hc_eps;
  int64_t iterations;

  Mixing(Check& check, int64_t hidden, const Tensor& fn_, const Tensor& scale_, const Tensor& base_, double norm_eps_,
         double hc_eps_, int64_t iterations_, bool head = false)
      : fn(dense(fn_)),
        scale(dense(scale_)),
        base(dense(base_)),
        norm_eps(norm_eps_),
        hc_eps(hc_eps_),
        iterations(iterations_) {
    const int64_t mixes = head ? kStreams : kMixes;
    check.tensor("fn", fn, {mixes, kStreams * hidden}, {ScalarType::Float});
    check.tensor("scale", scale, {head ? 1 : 3}, {ScalarType::Float});
    check.tensor("base", base, {mixes}, {ScalarType::Float});
  }

  operator MhcMixing() const {
    return {view(fn), view(scale), view(base), static_cast<float>(norm_eps), static_cast<float>(hc_eps), iterations};
  }
};

// An op's need of scratch memory, as Check::run asks for it.
template <int64_t (*kBytes)(int64_t, int64_t, DType, const Context&), class Params>
int64_t scratch_bytes(const Params& p, const Context& context) {
  return kBytes(p.streams.size(0), p.streams.size(2), p.streams.dtype, context);
}
int64_t post_pre_scratch_bytes(const MhcPostPreParams& p, const Context& context) {
  return scratch_bytes<mhc_pre_workspace_bytes>(p.pre, context);
}

void check_norm(Check& check, const std::optional<Tensor>& weight, const Sizes& s) {
  if (!weight.has_value()) return;
  if (s.x == ScalarType::Float) {
    check.tensor("norm_weight", *weight, {s.hidden}, {ScalarType::Float});
  } else {
    check.tensor("norm_weight", *weight, {s.hidden}, {s.x, ScalarType::Float});
  }
}

Tensor float_tensor(std::initializer_list<int64_t> sizes, const Tensor& on) {
  return empty(sizes, ScalarType::Float, on);
}

Tensor mhc_post(const Tensor& sublayer_, const Tensor& streams_, const Tensor& post_, const Tensor& comb_) {
  Check check("mhc_post");
  const Sizes s = check_post(check, sublayer_, streams_, post_, comb_);
  const Tensor sublayer = dense(sublayer_), streams = dense(streams_), post = dense(post_), comb = dense(comb_, 2);
  Tensor result = empty({s.tokens, kStreams, s.hidden}, s.x, streams);
  const MhcPostParams params{view(sublayer), view(streams), view(post), view(comb), mutable_view(result)};
  check.run(dsv4::mhc_post, params, streams);
  return result;
}
DSV4_OP("mhc_post(Tensor sublayer, Tensor streams, Tensor post, Tensor comb) -> Tensor", mhc_post)

std::tuple<Tensor, Tensor, Tensor> mhc_pre(const Tensor& streams_, const Tensor& fn, const Tensor& scale,
                                           const Tensor& base, const std::optional<Tensor>& norm_weight_,
                                           double norm_eps, double hc_eps, int64_t sinkhorn_iterations,
                                           double rms_eps) {
  Check check("mhc_pre");
  const Sizes s = check_streams(check, streams_);
  const Mixing mixing(check, s.hidden, fn, scale, base, norm_eps, hc_eps, sinkhorn_iterations);
  check_norm(check, norm_weight_, s);
  const Tensor streams = dense(streams_);
  const std::optional<Tensor> norm_weight = dense(norm_weight_);
  Tensor input = empty({s.tokens, s.hidden}, s.x, streams);
  Tensor post = float_tensor({s.tokens, kStreams}, streams),
         comb = float_tensor({s.tokens, kStreams, kStreams}, streams);
  const MhcPreParams params{view(streams),       mixing,
                            view(norm_weight),   static_cast<float>(rms_eps),
                            mutable_view(input), mutable_view(post),
                            mutable_view(comb),  {}};
  check.run(dsv4::mhc_pre, scratch_bytes<mhc_pre_workspace_bytes>, params, streams);
  return {input, post, comb};
}
DSV4_OP(
    "mhc_pre(Tensor streams, Tensor fn, Tensor scale, Tensor base, Tensor? norm_weight=None, float norm_eps=1e-06, "
    "float hc_eps=1e-06, int sinkhorn_iterations=20, float rms_eps=1e-06) -> (Tensor, Tensor, Tensor)",
    mhc_pre)

std::tuple<Tensor, Tensor, Tensor, Tensor> mhc_post_pre(const Tensor& sublayer_, const Tensor& streams_,
                                                        const Tensor& post_, const Tensor& comb_, const Tensor& fn,
                                                        const Tensor& scale, const Tensor& base,
                                                        const std::optional<Tensor>& norm_weight_, double norm_eps,
                                                        double hc_eps, int64_t sinkhorn_iterations, double rms_eps) {
  Check check("mhc_post_pre");
  const Sizes s = check_post(check, sublayer_, streams_, post_, comb_);
  const Mixing mixing(check, s.hidden, fn, scale, base, norm_eps, hc_eps, sinkhorn_iterations);
  check_norm(check, norm_weight_, s);
  const Tensor sublayer = dense(sublayer_), streams = dense(streams_), post = dense(post_), comb = dense(comb_, 2);
  const std::optional<Tensor> norm_weight = dense(norm_weight_);
  Tensor result = empty({s.tokens, kStreams, s.hidden}, s.x, streams);
  Tensor input = empty({s.tokens, s.hidden}, s.x, streams);
  Tensor next_post = float_tensor({s.tokens, kStreams}, streams);
  Tensor next_comb = float_tensor({s.tokens, kStreams, kStreams}, streams);
  const MhcPostPreParams params{{view(sublayer), view(streams), view(post), view(comb), mutable_view(result)},
                                {view(result),
                                 mixing,
                                 view(norm_weight),
                                 static_cast<float>(rms_eps),
                                 mutable_view(input),
                                 mutable_view(next_post),
                                 mutable_view(next_comb),
                                 {}}};
  check.run(dsv4::mhc_post_pre, post_pre_scratch_bytes, params, streams);
  return {result, input, next_post, next_comb};
}
DSV4_OP(
    "mhc_post_pre(Tensor sublayer, Tensor streams, Tensor post, Tensor comb, Tensor fn, Tensor scale, Tensor base, "
    "Tensor? norm_weight=None, float norm_eps=1e-06, float hc_eps=1e-06, int sinkhorn_iterations=20, "
    "float rms_eps=1e-06) -> (Tensor, Tensor, Tensor, Tensor)",
    mhc_post_pre)

Tensor mhc_head(const Tensor& streams_, const Tensor& fn, const Tensor& scale, const Tensor& base, double norm_eps,
                double hc_eps) {
  Check check("mhc_head");
  const Sizes s = check_streams(check, streams_);
  const Mixing mixing(check, s.hidden, fn, scale, base, norm_eps, hc_eps, 0, true);
  const Tensor streams = dense(streams_);
  Tensor output = empty({s.tokens, s.hidden}, s.x, streams);
  const MhcHeadParams params{view(streams), mixing, mutable_view(output), {}};
  check.run(dsv4::mhc_head, scratch_bytes<mhc_head_workspace_bytes>, params, streams);
  return output;
}
DSV4_OP(
    "mhc_head(Tensor streams, Tensor fn, Tensor scale, Tensor base, float norm_eps=1e-06, float hc_eps=1e-06) "
    "-> Tensor",
    mhc_head)

std::tuple<Tensor, Tensor, Tensor, Tensor> mhc_post_backward(const Tensor& grad_result_, const Tensor& sublayer_,
                                                             const Tensor& streams_, const Tensor& post_,
                                                             const Tensor& comb_) {
  Check check("mhc_post_backward");
  const Sizes s = check_post(check, sublayer_, streams_, post_, comb_);
  check.tensor("grad_result", grad_result_, {s.tokens, kStreams, s.hidden}, {s.x});
  const Tensor grad_result = dense(grad_result_), sublayer = dense(sublayer_), streams = dense(streams_);
  const Tensor post = dense(post_), comb = dense(comb_, 2);
  Tensor grad_sublayer = empty({s.tokens, s.hidden}, s.x, streams);
  Tensor grad_streams = empty({s.tokens, kStreams, s.hidden}, s.x, streams);
  Tensor grad_post = float_tensor({s.tokens, kStreams}, streams);
  Tensor grad_comb = float_tensor({s.tokens, kStreams, kStreams}, streams);
  const MhcPostBackwardParams params{view(grad_result),
                                     view(sublayer),
                                     view(streams),
                                     view(post),
                                     view(comb),
                                     mutable_view(grad_sublayer),
                                     mutable_view(grad_streams),
                                     mutable_view(grad_post),
                                     mutable_view(grad_comb)};
  check.run(dsv4::mhc_post_backward, params, streams);
  return {grad_sublayer, grad_streams, grad_post, grad_comb};
}
DSV4_OP(
    "mhc_post_backward(Tensor grad_result, Tensor sublayer, Tensor streams, Tensor post, Tensor comb) "
    "-> (Tensor, Tensor, Tensor, Tensor)",
    mhc_post_backward)

// Empty, and none, where it is not needed.
struct FnGradient {
  Tensor tensor;
  View<float, 2> view = {};

  FnGradient(bool needed, int64_t mixes, int64_t hidden, const Tensor& device_of)
      : tensor(needed ? float_tensor({mixes, kStreams * hidden}, device_of) : float_tensor({0}, device_of)) {
    if (needed) view = mutable_view(tensor);
  }
};

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> mhc_pre_backward(
    const Tensor& grad_input_, const Tensor& grad_post_, const Tensor& grad_comb_,
    const std::optional<Tensor>& grad_residual_, const Tensor& streams_, const Tensor& fn, const Tensor& scale,
    const Tensor& base, const std::optional<Tensor>& norm_weight_, double norm_eps, double hc_eps,
    int64_t sinkhorn_iterations, double rms_eps, bool needs_fn) {
  Check check("mhc_pre_backward");
  const Sizes s = check_streams(check, streams_);
  check.tensor("grad_input", grad_input_, {s.tokens, s.hidden}, {s.x});
  check.tensor("grad_post", grad_post_, {s.tokens, kStreams}, {ScalarType::Float});
  check.tensor("grad_comb", grad_comb_, {s.tokens, kStreams, kStreams}, {ScalarType::Float});
  if (grad_residual_.has_value()) {
    check.tensor("grad_residual", *grad_residual_, {s.tokens, kStreams, s.hidden}, {s.x});
  }
  const Mixing mixing(check, s.hidden, fn, scale, base, norm_eps, hc_eps, sinkhorn_iterations);
  check_norm(check, norm_weight_, s);
  const Tensor grad_input = dense(grad_input_), grad_post = dense(grad_post_), grad_comb = dense(grad_comb_, 2);
  const std::optional<Tensor> grad_residual = dense(grad_residual_), norm_weight = dense(norm_weight_);
  const Tensor streams = dense(streams_);
  Tensor grad_streams = empty({s.tokens, kStreams, s.hidden}, s.x, streams);
  FnGradient grad_fn(needs_fn, kMixes, s.hidden, streams);
  Tensor grad_scale = float_tensor({3}, streams), grad_base = float_tensor({kMixes}, streams);
  Tensor grad_norm_weight = float_tensor({norm_weight.has_value() ? s.hidden : 0}, streams);
  const MhcPreBackwardParams params{view(grad_input),
                                    view(grad_post),
                                    view(grad_comb),
                                    view(grad_residual),
                                    view(streams),
                                    mixing,
                                    view(norm_weight),
                                    static_cast<float>(rms_eps),
                                    mutable_view(grad_streams),
                                    grad_fn.view,
                                    mutable_view(grad_scale),
                                    mutable_view(grad_base),
                                    mutable_view(grad_norm_weight),
                                    {}};
  check.run(dsv4::mhc_pre_backward, scratch_bytes<mhc_pre_backward_workspace_bytes>, params, streams);
  return {grad_streams, grad_fn.tensor, grad_scale, grad_base, grad_norm_weight};
}
DSV4_OP(
    "mhc_pre_backward(Tensor grad_input, Tensor grad_post, Tensor grad_comb, Tensor? grad_residual, Tensor streams, "
    "Tensor fn, Tensor scale, Tensor base, Tensor? norm_weight, float norm_eps, float hc_eps, "
    "int sinkhorn_iterations, float rms_eps, bool needs_fn=True) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    mhc_pre_backward)

std::tuple<Tensor, Tensor, Tensor, Tensor> mhc_head_backward(const Tensor& grad_output_, const Tensor& streams_,
                                                             const Tensor& fn, const Tensor& scale, const Tensor& base,
                                                             double norm_eps, double hc_eps, bool needs_fn) {
  Check check("mhc_head_backward");
  const Sizes s = check_streams(check, streams_);
  check.tensor("grad_output", grad_output_, {s.tokens, s.hidden}, {s.x});
  const Mixing mixing(check, s.hidden, fn, scale, base, norm_eps, hc_eps, 0, true);
  const Tensor grad_output = dense(grad_output_), streams = dense(streams_);
  Tensor grad_streams = empty({s.tokens, kStreams, s.hidden}, s.x, streams);
  FnGradient grad_fn(needs_fn, kStreams, s.hidden, streams);
  Tensor grad_scale = float_tensor({1}, streams), grad_base = float_tensor({kStreams}, streams);
  const MhcHeadBackwardParams params{
      view(grad_output),        view(streams),           mixing, mutable_view(grad_streams), grad_fn.view,
      mutable_view(grad_scale), mutable_view(grad_base), {}};
  check.run(dsv4::mhc_head_backward, scratch_bytes<mhc_head_backward_workspace_bytes>, params, streams);
  return {grad_streams, grad_fn.tensor, grad_scale, grad_base};
}
DSV4_OP(
    "mhc_head_backward(Tensor grad_output, Tensor streams, Tensor fn, Tensor scale, Tensor base, float norm_eps, "
    "float hc_eps, bool needs_fn=True) -> (Tensor, Tensor, Tensor, Tensor)",
    mhc_head_backward)

}  // namespace
}  // namespace dsv4::binding
