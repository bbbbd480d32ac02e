// Rows of the residual streams, and mhc_post's arithmetic on one 16-byte piece of them, which the fused kernel shares
// so that both round alike.
#pragma once

#include "cuda/sm80/pieces.h"
#include "ops/mhc.h"

namespace dsv4::sm80 {

template <class X>
DSV4_DEVICE X* row_of(const AnyView<3>& streams, int64_t token, int stream) {
  return static_cast<X*>(streams.data) + token * streams.stride[0] + stream * streams.stride[1];
}

template <class X>
DSV4_DEVICE X* row_of(const AnyView<2>& rows, int64_t token) {
  return static_cast<X*>(rows.data) + token * rows.stride[0];
}

// One token's weights of mhc_post.
struct PostWeights {
  float post[kStreams];
  float comb[kStreams][kStreams];

  DSV4_DEVICE void load(const MhcPostParams& p, int64_t token) { load(p.post, p.comb, token); }
  DSV4_DEVICE void load(const View<const float, 2>& all_post, const View<const float, 3>& all_comb, int64_t token) {
    const float* post_row = all_post.data + token * all_post.stride[0];
    const float* comb_row = all_comb.data + token * all_comb.stride[0];
    DSV4_UNROLL
    for (int o = 0; o < kStreams; ++o) post[o] = post_row[o];
    DSV4_UNROLL
    for (int i = 0; i < kStreams; ++i) {
      DSV4_UNROLL
      for (int o = 0; o < kStreams; ++o) comb[i][o] = comb_row[kStreams * i + o];
    }
  }

  DSV4_DEVICE void clear() {
    DSV4_UNROLL
    for (int i = 0; i < kStreams; ++i) {
      post[i] = 0.0f;
      DSV4_UNROLL
      for (int o = 0; o < kStreams; ++o) comb[i][o] = 0.0f;
    }
  }
};

// One piece of a token's streams and of the sublayer's output. Named one by one: nvcc keeps an array of pieces in
// memory.
struct TokenPiece {
  Words4 r0, r1, r2, r3, y;
};

DSV4_DEVICE float mixed_element(const PostWeights& weights, int o, float y, float r0, float r1, float r2, float r3) {
  float mixed = ptx::multiply(weights.post[o], y);
  mixed = ptx::fma(weights.comb[0][o], r0, mixed);
  mixed = ptx::fma(weights.comb[1][o], r1, mixed);
  mixed = ptx::fma(weights.comb[2][o], r2, mixed);
  return ptx::fma(weights.comb[3][o], r3, mixed);
}

// The new stream o: post[o] * y + sum_i comb[i][o] * r_i, rounded to X.
template <class X>
DSV4_DEVICE Words4 mixed_piece(const PostWeights& weights, const TokenPiece& p, int o) {
  Words4 mixed;
  DSV4_UNROLL
  for (int w = 0; w < 4; ++w) {
    const uint32_t y = p.y.word[w], r0 = p.r0.word[w], r1 = p.r1.word[w], r2 = p.r2.word[w], r3 = p.r3.word[w];
    if constexpr (sizeof(X) == 2) {
      const float low = mixed_element(weights, o, ptx::low_bf16(y), ptx::low_bf16(r0), ptx::low_bf16(r1),
                                      ptx::low_bf16(r2), ptx::low_bf16(r3));
      const float high = mixed_element(weights, o, ptx::high_bf16(y), ptx::high_bf16(r0), ptx::high_bf16(r1),
                                       ptx::high_bf16(r2), ptx::high_bf16(r3));
      mixed.word[w] = ptx::pack_bf16(low, high);
    } else {
      mixed.word[w] = bits_from_float(mixed_element(weights, o, float_from_bits(y), float_from_bits(r0),
                                                    float_from_bits(r1), float_from_bits(r2), float_from_bits(r3)));
    }
  }
  return mixed;
}

}  // namespace dsv4::sm80
