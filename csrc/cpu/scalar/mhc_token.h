// mHC of one token, in the order in which the contract states it: what the portable kernels share. Sums over the hidden
// width run in double.
#pragma once

#include <cmath>

#include "cpu/mhc.h"

namespace dsv4::scalar {
namespace {

struct Mixes {
  float m[kMixes];  // fn r / rms
  float rms;        // 1 / sqrt(mean(r^2) + eps)
};

struct Weights {
  float pre[kStreams], post[kStreams], softmax[kStreams * kStreams], comb[kStreams * kStreams];
};

inline int group_of(int mix) { return mix < kStreams ? 0 : mix < 2 * kStreams ? 1 : 2; }

inline float logit(const Mixes& mixes, const MhcMixing& mixing, int j) {
  return mixes.m[j] * *mixing.scale.at(group_of(j)) + *mixing.base.at(j);
}

inline float sigmoid(float x) { return 1 / (1 + std::exp(-x)); }

template <class T>
Mixes mixes_of(const View<const T, 3>& streams, int64_t token, const MhcMixing& mixing, int count) {
  const int64_t hidden = streams.size(2);
  double products[kMixes] = {}, squares = 0;
  for (int stream = 0; stream < kStreams; ++stream) {
    const T* r = streams.at(token, stream);
    for (int64_t d = 0; d < hidden; ++d) squares += static_cast<double>(to_float(r[d])) * to_float(r[d]);
    for (int j = 0; j < count; ++j) {
      const float* row = mixing.fn.at(j, stream * hidden);
      for (int64_t d = 0; d < hidden; ++d) products[j] += static_cast<double>(to_float(r[d])) * row[d];
    }
  }
  Mixes mixes = {};
  mixes.rms = static_cast<float>(1 / std::sqrt(squares / static_cast<double>(kStreams * hidden) + mixing.norm_eps));
  for (int j = 0; j < count; ++j) mixes.m[j] = static_cast<float>(products[j]) * mixes.rms;
  return mixes;
}

// One Sinkhorn division of x[4 * read + written]: by the sums over the streams read (columns), or over those written.
inline void normalise(float* x, bool columns, float eps, float* divisors) {
  const int line_stride = columns ? 1 : kStreams, step = columns ? kStreams : 1;
  for (int line = 0; line < kStreams; ++line) {
    float* first = x + line * line_stride;
    divisors[line] = first[0] + first[step] + first[2 * step] + first[3 * step] + eps;
    for (int k = 0; k < kStreams; ++k) first[k * step] /= divisors[line];
  }
}

inline void softmax_rows(const float* logits, float* softmax) {
  for (int row = 0; row < kStreams; ++row) {
    const float* x = logits + row * kStreams;
    float top = x[0], sum = 0;
    for (int k = 1; k < kStreams; ++k) top = std::fmax(top, x[k]);
    for (int k = 0; k < kStreams; ++k) sum += softmax[row * kStreams + k] = std::exp(x[k] - top);
    for (int k = 0; k < kStreams; ++k) softmax[row * kStreams + k] /= sum;
  }
}

inline void pre_weights(const Mixes& mixes, const MhcMixing& mixing, float* pre) {
  for (int i = 0; i < kStreams; ++i) pre[i] = sigmoid(logit(mixes, mixing, i)) + mixing.hc_eps;
}

inline Weights weights_of(const Mixes& mixes, const MhcMixing& mixing) {
  Weights weights;
  float logits[kStreams * kStreams], divisors[kStreams];
  pre_weights(mixes, mixing, weights.pre);
  for (int i = 0; i < kStreams; ++i) weights.post[i] = 2 * sigmoid(logit(mixes, mixing, kStreams + i));
  for (int k = 0; k < kStreams * kStreams; ++k) logits[k] = logit(mixes, mixing, 2 * kStreams + k);
  softmax_rows(logits, weights.softmax);
  for (int k = 0; k < kStreams * kStreams; ++k) weights.comb[k] = weights.softmax[k] + mixing.hc_eps;
  for (int step = 0; step < 2 * mixing.sinkhorn_iterations - 1; ++step) {
    normalise(weights.comb, step % 2 == 0, mixing.hc_eps, divisors);
  }
  return weights;
}

// sum_i pre[i] * streams[i], rounded to T.
template <class T>
T collapsed(const View<const T, 3>& streams, int64_t token, int64_t d, const float* pre) {
  float sum = 0;
  for (int i = 0; i < kStreams; ++i) sum += pre[i] * to_float(*streams.at(token, i, d));
  return from_float<T>(sum);
}

// Element d of a weight that has the dtype of the streams or float32.
template <class T>
float norm_weight_at(const AnyView<1>& weight, int64_t d) {
  return weight.dtype == DType::kFloat32 ? static_cast<const float*>(weight.data)[d]
                                         : to_float(static_cast<const T*>(weight.data)[d]);
}

}  // namespace
}  // namespace dsv4::scalar
