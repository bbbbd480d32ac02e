// The mixing weights of eight tokens at a time, a token a lane (ops/mhc.h has the definition).
#pragma once

#include "cpu/avx2/lanes.h"
#include "cpu/mhc.h"

namespace dsv4::avx2 {
namespace {

// By kind, then by lane. post and comb are not set by mhc_head.
struct MixingWeights {
  float pre[kStreams][kLanes], post[kStreams][kLanes], comb[kStreams * kStreams][kLanes];
};

DSV4_INLINE __m256 mhc_logit(__m256 mix, const MhcMixing& mixing, int j) {
  const int group = j < kStreams ? 0 : j < 2 * kStreams ? 1 : 2;
  return _mm256_fmadd_ps(mix, _mm256_set1_ps(*mixing.scale.at(group)), _mm256_set1_ps(*mixing.base.at(j)));
}

// One Sinkhorn division of comb[4 * read + written]: by the sums over the streams read (columns), or over those
// written.
DSV4_INLINE void mhc_normalise(__m256* comb, bool columns, __m256 eps) {
  const int line_stride = columns ? 1 : kStreams, step = columns ? kStreams : 1;
  for (int line = 0; line < kStreams; ++line) {
    __m256* x = comb + line * line_stride;
    const __m256 sum = _mm256_add_ps(_mm256_add_ps(x[0], x[step]), _mm256_add_ps(x[2 * step], x[3 * step]));
    const __m256 divisor = _mm256_add_ps(sum, eps);
    for (int k = 0; k < kStreams; ++k) x[k * step] = _mm256_div_ps(x[k * step], divisor);
  }
}

// mixes[j]: mix j of eight tokens; kPre: pre weights alone.
template <bool kPre>
DSV4_INLINE void mixing_weights(const __m256* mixes, const MhcMixing& mixing, MixingWeights* out) {
  const __m256 eps = _mm256_set1_ps(mixing.hc_eps);
  for (int i = 0; i < kStreams; ++i) {
    store(out->pre[i], _mm256_add_ps(sigmoid(mhc_logit(mixes[i], mixing, i)), eps));
  }
  if (kPre) return;
  for (int i = 0; i < kStreams; ++i) {
    const __m256 half = sigmoid(mhc_logit(mixes[kStreams + i], mixing, kStreams + i));
    store(out->post[i], _mm256_add_ps(half, half));
  }
  __m256 comb[kStreams * kStreams];
  for (int k = 0; k < kStreams * kStreams; ++k) {
    comb[k] = mhc_logit(mixes[2 * kStreams + k], mixing, 2 * kStreams + k);
  }
  for (__m256* row = comb; row < comb + kStreams * kStreams; row += kStreams) {
    const __m256 top = _mm256_max_ps(_mm256_max_ps(row[0], row[1]), _mm256_max_ps(row[2], row[3]));
    for (int k = 0; k < kStreams; ++k) row[k] = exp(_mm256_sub_ps(row[k], top));
    const __m256 sum = _mm256_add_ps(_mm256_add_ps(row[0], row[1]), _mm256_add_ps(row[2], row[3]));
    for (int k = 0; k < kStreams; ++k) row[k] = _mm256_add_ps(_mm256_div_ps(row[k], sum), eps);
  }
  for (int64_t step = 0; step < 2 * mixing.sinkhorn_iterations - 1; ++step) {
    mhc_normalise(comb, step % 2 == 0, eps);
  }
  for (int k = 0; k < kStreams * kStreams; ++k) store(out->comb[k], comb[k]);
}

}  // namespace
}  // namespace dsv4::avx2
