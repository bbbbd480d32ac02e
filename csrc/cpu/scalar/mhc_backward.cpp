// The gradients of mHC, portable. A first pass takes the tokens one by one: all that stays within a token, and what the
// sums over tokens need, which goes to the workspace. A second pass forms those sums column by column, in ascending
// token order, so that no result depends on the number of threads.
#include "cpu/scalar/mhc_token_gradient.h"

namespace dsv4::scalar {
namespace {

template <class T>
NormGradient norm_gradient(const Problem& p, int64_t token, const float* pre) {
  NormGradient result;
  if (!p.norm_weight.given()) return result;
  const auto streams = p.streams.as<const T>();
  const auto grad = p.grad_input.as<const T>();
  const int64_t hidden = streams.size(2);
  double squares = 0, dot = 0;
  for (int64_t d = 0; d < hidden; ++d) {
    const double mixed = to_float(collapsed(streams, token, d, pre));
    squares += mixed * mixed;
    dot += mixed * norm_weight_at<T>(p.norm_weight, d) * to_float(*grad.at(token, d));
  }
  const double rms = 1 / std::sqrt(squares / static_cast<double>(hidden) + p.rms_eps);
  result.rms = static_cast<float>(rms);
  result.along = static_cast<float>(rms * rms * rms * dot / static_cast<double>(hidden));
  return result;
}

template <class T>
float grad_mixed(const Problem& p, int64_t token, int64_t d, const float* pre, const NormGradient& norm) {
  const float grad = to_float(*p.grad_input.as<const T>().at(token, d));
  if (!p.norm_weight.given()) return grad;
  const float mixed = to_float(collapsed(p.streams.as<const T>(), token, d, pre));
  return norm.rms * norm_weight_at<T>(p.norm_weight, d) * grad - norm.along * mixed;
}

// Everything about one token. `grad` holds the gradients of post and comb from index 4 on; pre's are found here.
template <class T>
void token_backward(const Problem& p, int64_t token, float* grad) {
  const auto streams = p.streams.as<const T>();
  const int64_t hidden = streams.size(2);
  const Mixes mixes = mixes_of(streams, token, p.mixing, p.mixes);
  const Weights weights = p.mixes == kStreams ? pre_alone(mixes, p.mixing) : weights_of(mixes, p.mixing);
  const NormGradient norm = norm_gradient<T>(p, token, weights.pre);
  double dots[kStreams] = {};
  for (int64_t d = 0; d < hidden; ++d) {
    const double g = grad_mixed<T>(p, token, d, weights.pre, norm);
    for (int i = 0; i < kStreams; ++i) dots[i] += g * to_float(*streams.at(token, i, d));
  }
  const MhcTokenGradient& out = p.tokens[token] = token_gradient(p, mixes, weights, norm, dots, grad);

  const auto grad_streams = p.grad_streams.as<T>();
  for (int64_t d = 0; d < hidden; ++d) {
    const float g = grad_mixed<T>(p, token, d, weights.pre, norm);
    for (int i = 0; i < kStreams; ++i) {
      float sum = 0;  // the largest terms come last: they would round the small ones
      for (int j = 0; j < p.mixes; ++j) sum += out.product[j] * *p.mixing.fn.at(j, i * hidden + d);
      sum += weights.pre[i] * g - out.along * to_float(*streams.at(token, i, d));
      if (p.grad_residual.given()) sum += to_float(*p.grad_residual.as<const T>().at(token, i, d));
      *grad_streams.at(token, i, d) = from_float<T>(sum);
    }
  }
}

template <class T>
void fn_columns(const Problem& p, const View<float, 2>& grad_fn, int64_t begin, int64_t end) {
  const auto streams = p.streams.as<const T>();
  const int64_t tokens = streams.size(0), hidden = streams.size(2);
  for (int64_t column = begin; column < end; ++column) {
    double sums[kMixes] = {};
    for (int64_t token = 0; token < tokens; ++token) {
      const double r = to_float(*streams.at(token, column / hidden, column % hidden));
      for (int j = 0; j < p.mixes; ++j) sums[j] += r * p.tokens[token].product[j];
    }
    for (int j = 0; j < p.mixes; ++j) *grad_fn.at(j, column) = static_cast<float>(sums[j]);
  }
}

// Unless it is none.
template <class T>
void fn_gradient(const Problem& p, const View<float, 2>& grad_fn, const Context& context) {
  if (!grad_fn.given()) return;
  parallel(context, kStreams * p.streams.size(2),
           [&](int64_t begin, int64_t end) { fn_columns<T>(p, grad_fn, begin, end); });
}

template <class T>
void norm_columns(const Problem& p, const View<float, 1>& grad_weight, int64_t begin, int64_t end) {
  const auto streams = p.streams.as<const T>();
  const auto grad = p.grad_input.as<const T>();
  for (int64_t d = begin; d < end; ++d) {
    double sum = 0;
    for (int64_t token = 0; token < streams.size(0); ++token) {
      const MhcTokenGradient& t = p.tokens[token];
      sum += static_cast<double>(to_float(*grad.at(token, d))) * to_float(collapsed(streams, token, d, t.pre)) * t.rms;
    }
    *grad_weight.at(d) = static_cast<float>(sum);
  }
}

template <class T>
void pre_backward(const MhcPreBackwardParams& params, const Context& context) {
  const Problem p{params.grad_input,
                  params.grad_residual,
                  params.streams,
                  params.grad_streams,
                  params.mixing,
                  params.norm_weight,
                  params.rms_eps,
                  kMixes,
                  static_cast<MhcTokenGradient*>(params.workspace.data)};
  const int64_t tokens = params.streams.size(0), hidden = params.streams.size(2);
  parallel(context, tokens, [&](int64_t begin, int64_t end) {
    for (int64_t token = begin; token < end; ++token) {
      float grad[kMixes];
      for (int i = 0; i < kStreams; ++i) grad[kStreams + i] = *params.grad_post.at(token, i);
      for (int k = 0; k < 16; ++k) grad[2 * kStreams + k] = *params.grad_comb.at(token, k / kStreams, k % kStreams);
      token_backward<T>(p, token, grad);
    }
  });
  fn_gradient<T>(p, params.grad_fn, context);
  if (p.norm_weight.given()) {
    parallel(context, hidden,
             [&](int64_t begin, int64_t end) { norm_columns<T>(p, params.grad_norm_weight, begin, end); });
  }
  small_sums(p, tokens, params.grad_scale, params.grad_base);
}

template <class T>
void head_backward(const MhcHeadBackwardParams& params, const Context& context) {
  const Problem p{params.grad_output,
                  {},
                  params.streams,
                  params.grad_streams,
                  params.mixing,
                  {},
                  0,
                  kStreams,
                  static_cast<MhcTokenGradient*>(params.workspace.data)};
  parallel(context, params.streams.size(0), [&](int64_t begin, int64_t end) {
    float grad[kMixes] = {};
    for (int64_t token = begin; token < end; ++token) token_backward<T>(p, token, grad);
  });
  fn_gradient<T>(p, params.grad_fn, context);
  small_sums(p, params.streams.size(0), params.grad_scale, params.grad_base);
}

template <class T>
void post_rows_backward(const MhcPostBackwardParams& params, int64_t begin, int64_t end) {
  const auto grad = params.grad_result.as<const T>(), streams = params.streams.as<const T>();
  const auto sublayer = params.sublayer.as<const T>();
  const auto grad_streams = params.grad_streams.as<T>();
  const auto grad_sublayer = params.grad_sublayer.as<T>();
  for (int64_t token = begin; token < end; ++token) {
    double post[kStreams] = {}, comb[kStreams][kStreams] = {};
    for (int64_t d = 0; d < streams.size(2); ++d) {
      float g[kStreams], sum = 0;
      for (int out = 0; out < kStreams; ++out) {
        g[out] = to_float(*grad.at(token, out, d));
        post[out] += static_cast<double>(g[out]) * to_float(*sublayer.at(token, d));
        sum += *params.post.at(token, out) * g[out];
      }
      *grad_sublayer.at(token, d) = from_float<T>(sum);
      for (int in = 0; in < kStreams; ++in) {
        const double r = to_float(*streams.at(token, in, d));
        float back = 0;
        for (int out = 0; out < kStreams; ++out) {
          comb[in][out] += r * g[out];
          back += *params.comb.at(token, in, out) * g[out];
        }
        *grad_streams.at(token, in, d) = from_float<T>(back);
      }
    }
    for (int out = 0; out < kStreams; ++out) *params.grad_post.at(token, out) = static_cast<float>(post[out]);
    for (int k = 0; k < 16; ++k) {
      *params.grad_comb.at(token, k / kStreams, k % kStreams) = static_cast<float>(comb[k / kStreams][k % kStreams]);
    }
  }
}

}  // namespace

Status mhc_pre_backward(const MhcPreBackwardParams& params, const Context& context) {
  (params.streams.dtype == DType::kBFloat16 ? pre_backward<bf16> : pre_backward<float>)(params, context);
  return Status::ok();
}

Status mhc_head_backward(const MhcHeadBackwardParams& params, const Context& context) {
  (params.streams.dtype == DType::kBFloat16 ? head_backward<bf16> : head_backward<float>)(params, context);
  return Status::ok();
}

Status mhc_post_backward(const MhcPostBackwardParams& params, const Context& context) {
  const auto rows = params.streams.dtype == DType::kBFloat16 ? post_rows_backward<bf16> : post_rows_backward<float>;
  parallel(context, params.streams.size(0), [&](int64_t begin, int64_t end) { rows(params, begin, end); });
  return Status::ok();
}

}  // namespace dsv4::scalar
