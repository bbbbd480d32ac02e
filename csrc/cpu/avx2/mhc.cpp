// mHC with AVX2 and FMA: blocks of tokens, whose streams are widened to float32 and multiplied with fn by
// cpu/avx2/product.h.
#include "cpu/mhc.h"

#include <cmath>

#include "cpu/avx2/mhc_mixing.h"
#include "cpu/avx2/mhc_product.h"

namespace dsv4::avx2 {
namespace {

// The mixing weights of `count` tokens from `token` on, by eights, from their streams. kRows: of fn.
template <int kRows, class T>
void weigh(const View<const T, 3>& streams, const MhcMixing& mixing, int64_t token, int64_t count, uint8_t* memory,
           MixingWeights* out) {
  MhcProducts<kRows> products;
  products.find(streams, mixing, token, count, memory);
  for (int64_t t = 0; t < count; t += kLanes, ++out) {
    float mixes[kRows][kLanes] = {};
    for (int64_t i = 0; i < kLanes && t + i < count; ++i) {
      for (int j = 0; j < kRows; ++j) mixes[j][i] = products.sums[t + i][j] * products.rms[t + i];
    }
    __m256 lanes[kRows];
    for (int j = 0; j < kRows; ++j) lanes[j] = load(mixes[j]);
    mixing_weights<kRows == kStreams>(lanes, mixing, out);
  }
}

// sum_i pre[i] * streams[i] of a token that is lane `lane` of the weights.
template <class T>
DSV4_INLINE void collapse(const View<const T, 3>& streams, int64_t token, const MixingWeights& weights, int64_t lane,
                          T* out) {
  const int64_t hidden = streams.size(2);
  for (int64_t d = 0; d < hidden; d += kLanes) {
    __m256 sum = _mm256_setzero_ps();
    for (int i = 0; i < kStreams; ++i) {
      const __m256 stream = load_some(streams.at(token, i, d), hidden - d);
      sum = _mm256_fmadd_ps(_mm256_set1_ps(weights.pre[i][lane]), stream, sum);
    }
    store_some(out + d, sum, hidden - d);
  }
}

// RMSNorm of a row in place, its weight of type W.
template <class T, class W>
DSV4_INLINE void rms_norm(T* row, int64_t hidden, const W* weight, float eps) {
  double all = 0;
  float wide[kPanelInputs];
  for (int64_t first = 0; first < hidden; first += kPanelInputs) {
    const int64_t n = hidden - first < kPanelInputs ? hidden - first : kPanelInputs;
    widen(row + first, n, wide);
    all += static_cast<double>(squares(wide, n));
  }
  const __m256 rms = _mm256_set1_ps(static_cast<float>(1 / std::sqrt(all / static_cast<double>(hidden) + eps)));
  for (int64_t d = 0; d < hidden; d += kLanes) {
    const int64_t left = hidden - d;
    store_some(row + d, _mm256_mul_ps(_mm256_mul_ps(load_some(row + d, left), rms), load_some(weight + d, left)), left);
  }
}

template <class T>
void pre_block(const MhcPreParams& p, int64_t token, int64_t count, uint8_t* memory) {
  MixingWeights weights[kMhcTokens / kLanes];
  weigh<kMixes>(p.streams.as<const T>(), p.mixing, token, count, memory, weights);
  for (int64_t t = 0; t < count; ++t) {
    const MixingWeights& mine = weights[t / kLanes];
    const int64_t lane = t % kLanes;
    for (int i = 0; i < kStreams; ++i) *p.post.at(token + t, i) = mine.post[i][lane];
    for (int k = 0; k < kStreams * kStreams; ++k) {
      *p.comb.at(token + t, k / kStreams, k % kStreams) = mine.comb[k][lane];
    }
    T* row = p.input.as<T>().at(token + t);
    collapse(p.streams.as<const T>(), token + t, mine, lane, row);
    if (p.norm_weight.dtype == DType::kFloat32) {
      rms_norm(row, p.streams.size(2), static_cast<const float*>(p.norm_weight.data), p.rms_eps);
    } else if (p.norm_weight.given()) {
      rms_norm(row, p.streams.size(2), static_cast<const T*>(p.norm_weight.data), p.rms_eps);
    }
  }
}

template <class T>
void head_block(const MhcHeadParams& p, int64_t token, int64_t count, uint8_t* memory) {
  MixingWeights weights[kMhcTokens / kLanes];
  weigh<kStreams>(p.streams.as<const T>(), p.mixing, token, count, memory, weights);
  for (int64_t t = 0; t < count; ++t) {
    collapse(p.streams.as<const T>(), token + t, weights[t / kLanes], t % kLanes, p.output.as<T>().at(token + t));
  }
}

template <class Params>
Status run(const Params& p, const Context& context, void (*block)(const Params&, int64_t, int64_t, uint8_t*)) {
  mhc_blocks(p.streams.size(0), context, [&](int64_t slot, int64_t token, int64_t count) {
    block(p, token, count, static_cast<uint8_t*>(p.workspace.data) + slot * kMhcProductBytes);
  });
  return Status::ok();
}

template <class T>
void post_rows(const MhcPostParams& p, int64_t begin, int64_t end) {
  const auto sublayer = p.sublayer.as<const T>();
  const auto streams = p.streams.as<const T>();
  const auto result = p.result.as<T>();
  const int64_t hidden = sublayer.size(1);
  for (int64_t token = begin; token < end; ++token) {
    for (int64_t d = 0; d < hidden; d += kLanes) {
      const int64_t left = hidden - d;
      const __m256 inner = load_some(sublayer.at(token, d), left);
      __m256 in[kStreams];
      for (int i = 0; i < kStreams; ++i) in[i] = load_some(streams.at(token, i, d), left);
      for (int o = 0; o < kStreams; ++o) {
        __m256 sum = _mm256_mul_ps(_mm256_broadcast_ss(p.post.at(token, o)), inner);
        for (int i = 0; i < kStreams; ++i) {
          sum = _mm256_fmadd_ps(_mm256_broadcast_ss(p.comb.at(token, i, o)), in[i], sum);
        }
        store_some(result.at(token, o, d), sum, left);
      }
    }
  }
}

}  // namespace

int64_t mhc_workspace_bytes(int64_t tokens, const Context& context) {
  return mhc_slots(tokens, context) * kMhcProductBytes;
}

Status mhc_post(const MhcPostParams& p, const Context& context) {
  const auto rows = p.streams.dtype == DType::kBFloat16 ? post_rows<bf16> : post_rows<float>;
  parallel(context, p.streams.size(0), [&](int64_t begin, int64_t end) { rows(p, begin, end); });
  return Status::ok();
}

Status mhc_pre(const MhcPreParams& p, const Context& context) {
  return run(p, context, p.streams.dtype == DType::kBFloat16 ? pre_block<bf16> : pre_block<float>);
}

Status mhc_post_pre(const MhcPostPreParams& p, const Context& context) {
  const Status status = avx2::mhc_post(p.post, context);
  return status.is_ok() ? avx2::mhc_pre(p.pre, context) : status;
}

Status mhc_head(const MhcHeadParams& p, const Context& context) {
  return run(p, context, p.streams.dtype == DType::kBFloat16 ? head_block<bf16> : head_block<float>);
}

}  // namespace dsv4::avx2
