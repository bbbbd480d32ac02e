// The gradients of mHC that stay within one token, in the order of the contract: what the portable kernels share.
#pragma once

#include "cpu/scalar/mhc_token.h"

namespace dsv4::scalar {
namespace {

// What mhc_pre and mhc_head have in common here.
struct Problem {
  AnyView<2> grad_input;
  AnyView<3> grad_residual, streams, grad_streams;
  MhcMixing mixing;
  AnyView<1> norm_weight;
  float rms_eps;
  int mixes;
  MhcTokenGradient* tokens;
};

// Gradient of the logits of comb. The steps are taken again and kept in blocks, so that any number of them fits the
// stack.
inline void sinkhorn_backward(const Weights& weights, const MhcMixing& mixing, float* grad) {
  constexpr int kBlock = 64, kEntries = kStreams * kStreams;
  float kept[kBlock][kEntries], divisors[kBlock][kStreams];
  for (int end = 2 * mixing.sinkhorn_iterations - 1; end > 0;) {
    const int begin = (end - 1) / kBlock * kBlock;
    float x[kEntries];
    for (int k = 0; k < kEntries; ++k) x[k] = weights.softmax[k] + mixing.hc_eps;
    for (int step = 0; step < end; ++step) {
      const int slot = step < begin ? 0 : step - begin;
      normalise(x, step % 2 == 0, mixing.hc_eps, divisors[slot]);
      for (int k = 0; k < kEntries; ++k) kept[slot][k] = x[k];
    }
    for (int step = end - 1; step >= begin; --step) {
      const bool columns = step % 2 == 0;
      for (int line = 0; line < kStreams; ++line) {
        float dot = 0;
        for (int k = 0; k < kStreams; ++k) {
          const int at = columns ? k * kStreams + line : line * kStreams + k;
          dot += grad[at] * kept[step - begin][at];
        }
        for (int k = 0; k < kStreams; ++k) {
          float& g = grad[columns ? k * kStreams + line : line * kStreams + k];
          g = (g - dot) / divisors[step - begin][line];
        }
      }
    }
    end = begin;
  }
  for (int row = 0; row < kStreams; ++row) {
    const float* p = weights.softmax + row * kStreams;
    float *g = grad + row * kStreams, dot = 0;
    for (int k = 0; k < kStreams; ++k) dot += g[k] * p[k];
    for (int k = 0; k < kStreams; ++k) g[k] = p[k] * (g[k] - dot);
  }
}

// d input / d mixed for the optional RMSNorm: grad_mixed = rms * (w g) - along * mixed.
struct NormGradient {
  float rms = 1, along = 0;
};

// What one token gives beside the gradient of its streams. `grad` holds the gradients of post and comb from index 4 on;
// pre's follow from dots, the products of the gradient of their sum with each stream.
inline MhcTokenGradient token_gradient(const Problem& p, const Mixes& mixes, const Weights& weights,
                                       const NormGradient& norm, const double* dots, float* grad) {
  if (p.mixes > kStreams) sinkhorn_backward(weights, p.mixing, grad + 2 * kStreams);
  MhcTokenGradient out = {};
  for (int j = 0; j < p.mixes; ++j) {
    const float s = sigmoid(logit(mixes, p.mixing, j));
    if (j < kStreams) grad[j] = static_cast<float>(dots[j]) * s * (1 - s);
    if (j >= kStreams && j < 2 * kStreams) grad[j] *= 2 * s * (1 - s);
    const float grad_m = grad[j] * *p.mixing.scale.at(group_of(j));
    out.logits[j] = grad[j];
    out.product[j] = grad_m * mixes.rms;
    out.scale[group_of(j)] += grad[j] * mixes.m[j];
    out.along += grad_m * mixes.m[j];
  }
  for (int i = 0; i < kStreams; ++i) out.pre[i] = weights.pre[i];
  out.rms = norm.rms;
  out.along *= mixes.rms * mixes.rms / static_cast<float>(kStreams * p.streams.size(2));
  return out;
}

inline Weights pre_alone(const Mixes& mixes, const MhcMixing& mixing) {
  Weights weights = {};
  pre_weights(mixes, mixing, weights.pre);
  return weights;
}

// The sums over the tokens that have no columns.
inline void small_sums(const Problem& p, int64_t tokens, const View<float, 1>& grad_scale,
                       const View<float, 1>& grad_base) {
  double scale[3] = {}, base[kMixes] = {};
  for (int64_t token = 0; token < tokens; ++token) {
    for (int group = 0; group < 3; ++group) scale[group] += p.tokens[token].scale[group];
    for (int j = 0; j < p.mixes; ++j) base[j] += p.tokens[token].logits[j];
  }
  for (int64_t group = 0; group < grad_scale.size(0); ++group) *grad_scale.at(group) = static_cast<float>(scale[group]);
  for (int j = 0; j < p.mixes; ++j) *grad_base.at(j) = static_cast<float>(base[j]);
}

}  // namespace
}  // namespace dsv4::scalar
