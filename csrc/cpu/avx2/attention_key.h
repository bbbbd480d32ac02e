// Keys as the AVX2 attention kernels read them, and sums over them.
#pragma once

#include "cpu/attention_keys.h"
#include "cpu/avx2/outer.h"

namespace dsv4::avx2 {
namespace {

// Dims [first, first + count) of a key as float32; `first` is a multiple of 64.
DSV4_INLINE void decode(const Key& key, const RowPool& pool, int64_t head_dim, int64_t rope_dim, int64_t first,
                        int64_t count, float* to) {
  if (key.scales == nullptr) {
    if (pool.plain.dtype == DType::kFloat32) return widen(reinterpret_cast<const float*>(key.data) + first, count, to);
    return widen(reinterpret_cast<const bf16*>(key.data) + first, count, to);
  }
  const int64_t codes = head_dim - rope_dim, end = first + count, code_end = smaller(codes, end);
  int64_t d = first;
  for (; d + kLanes <= code_end; d += kLanes) {
    const __m256 scale = _mm256_set1_ps(e8m0_value(key.scales[d / kRowBlock]));
    store(to + d - first, _mm256_mul_ps(e4m3_values(key.data + d), scale));
  }
  for (; d < code_end; ++d) to[d - first] = e4m3_value(key.data[d]) * e8m0_value(key.scales[d / kRowBlock]);
  if (d < end) widen(reinterpret_cast<const bf16*>(key.data + codes) + (d - codes), end - d, to + d - first);
}

// Products become scores: times the scale, and minus infinity up to the next multiple of eight.
DSV4_INLINE void scale_scores(float* scores, int64_t count, float scale) {
  for (int64_t j = 0; j < count; j += kLanes) store(scores + j, _mm256_mul_ps(load(scores + j), _mm256_set1_ps(scale)));
  for (int64_t j = count; j % kLanes != 0; ++j) scores[j] = -__builtin_inff();
}

inline constexpr int64_t kValueKeys = 16;  // whose values are decoded together

// sums[h] = the sum over keys j < count of weights[h * stride + j] times their values, which decode_key(j, to) gives;
// `values` has room for kValueKeys of them.
template <class DecodeKey>
DSV4_INLINE void sum_values(const DecodeKey& decode_key, int64_t count, const float* weights, int64_t stride,
                            int64_t heads, int64_t head_dim, float* values, float* sums) {
  memset(sums, 0, static_cast<size_t>(heads * head_dim) * sizeof(float));
  for (int64_t j = 0; j < count; j += kValueKeys) {
    const int64_t keys = smaller(kValueKeys, count - j);
    for (int64_t i = 0; i < keys; ++i) decode_key(j + i, values + i * head_dim);
    for (int64_t h = 0; h < heads; h += kOuterRows) {
      for (int64_t d = 0; d < head_dim; d += kOuterColumns) {
        add_outer({weights + h * stride + j, stride, 1, values + d, head_dim, keys}, heads - h, sums + h * head_dim + d,
                  head_dim);
      }
    }
  }
}

}  // namespace
}  // namespace dsv4::avx2
