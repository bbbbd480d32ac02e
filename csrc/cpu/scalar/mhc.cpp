// mHC, portable: the arithmetic in the order the contract gives it. Also the yardstick for the other kernels.
#include "cpu/scalar/mhc_token.h"

namespace dsv4::scalar {
namespace {

template <class T>
void post_rows(const MhcPostParams& params, int64_t begin, int64_t end) {
  const auto sublayer = params.sublayer.as<const T>();
  const auto streams = params.streams.as<const T>();
  const auto result = params.result.as<T>();
  const int64_t hidden = sublayer.size(1);
  for (int64_t token = begin; token < end; ++token) {
    for (int out = 0; out < kStreams; ++out) {
      for (int64_t column = 0; column < hidden; ++column) {
        float sum = *params.post.at(token, out) * to_float(*sublayer.at(token, column));
        for (int in = 0; in < kStreams; ++in) {
          sum += *params.comb.at(token, in, out) * to_float(*streams.at(token, in, column));
        }
        *result.at(token, out, column) = from_float<T>(sum);
      }
    }
  }
}

template <class T>
void collapse(const View<const T, 3>& streams, int64_t token, const float* pre, T* out) {
  for (int64_t d = 0; d < streams.size(2); ++d) out[d] = collapsed(streams, token, d, pre);
}

template <class T>
void rms_norm(T* row, int64_t hidden, const AnyView<1>& weight, float eps) {
  double squares = 0;
  for (int64_t d = 0; d < hidden; ++d) squares += static_cast<double>(to_float(row[d])) * to_float(row[d]);
  const float rms = static_cast<float>(1 / std::sqrt(squares / static_cast<double>(hidden) + eps));
  for (int64_t d = 0; d < hidden; ++d) row[d] = from_float<T>(to_float(row[d]) * rms * norm_weight_at<T>(weight, d));
}

template <class T>
void pre_rows(const MhcPreParams& params, int64_t begin, int64_t end) {
  const auto streams = params.streams.as<const T>();
  const auto input = params.input.as<T>();
  for (int64_t token = begin; token < end; ++token) {
    const Weights weights = weights_of(mixes_of(streams, token, params.mixing, kMixes), params.mixing);
    for (int i = 0; i < kStreams; ++i) *params.post.at(token, i) = weights.post[i];
    for (int k = 0; k < kStreams * kStreams; ++k) *params.comb.at(token, k / kStreams, k % kStreams) = weights.comb[k];
    T* row = input.at(token);
    collapse(streams, token, weights.pre, row);
    if (params.norm_weight.given()) rms_norm(row, streams.size(2), params.norm_weight, params.rms_eps);
  }
}

template <class T>
void head_rows(const MhcHeadParams& params, int64_t begin, int64_t end) {
  const auto streams = params.streams.as<const T>();
  const auto output = params.output.as<T>();
  for (int64_t token = begin; token < end; ++token) {
    float pre[kStreams];
    pre_weights(mixes_of(streams, token, params.mixing, kStreams), params.mixing, pre);
    collapse(streams, token, pre, output.at(token));
  }
}

}  // namespace

Status mhc_post(const MhcPostParams& params, const Context& context) {
  const auto rows = params.streams.dtype == DType::kBFloat16 ? post_rows<bf16> : post_rows<float>;
  parallel(context, params.streams.size(0), [&](int64_t begin, int64_t end) { rows(params, begin, end); });
  return Status::ok();
}

Status mhc_pre(const MhcPreParams& params, const Context& context) {
  const auto rows = params.streams.dtype == DType::kBFloat16 ? pre_rows<bf16> : pre_rows<float>;
  parallel(context, params.streams.size(0), [&](int64_t begin, int64_t end) { rows(params, begin, end); });
  return Status::ok();
}

Status mhc_post_pre(const MhcPostPreParams& params, const Context& context) {
  const Status status = scalar::mhc_post(params.post, context);
  return status.is_ok() ? scalar::mhc_pre(params.pre, context) : status;
}

Status mhc_head(const MhcHeadParams& params, const Context& context) {
  const auto rows = params.streams.dtype == DType::kBFloat16 ? head_rows<bf16> : head_rows<float>;
  parallel(context, params.streams.size(0), [&](int64_t begin, int64_t end) { rows(params, begin, end); });
  return Status::ok();
}

}  // namespace dsv4::scalar
