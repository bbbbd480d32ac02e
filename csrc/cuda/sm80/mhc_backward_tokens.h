// The gradients within a token, from the partial sums of the mixing product: first those of the products with fn (dz),
// of the logits and of the scales, then what the streams' gradient needs. Blocks of two kinds in one grid: the first
// ones take post and comb, 16 lanes a token with one element of comb each, so that Sinkhorn's long chain runs beside
// the others' reading; each of the rest reads one token's streams and the gradient of its input, for that of pre.
//
// Sinkhorn is taken again: what each step divides is kept in shared memory, kKeptSteps of them at a time, and a chain
// with more is begun again for each run of so many, the last one first.
#pragma once

#include "cuda/sm80/lane_sums.h"
#include "cuda/sm80/mhc_apply.h"
#include "cuda/sm80/two_floats.h"

namespace dsv4::sm80 {

// Parts that dz is cut into for the tensor cores; they leave nothing out.
inline constexpr int kFactorParts = 3;

// A token's dz: bfloat16 parts, eight rows of one in a 16-byte piece, zeros past kMixes; or float32. Parts' pieces lie
// so that two neighbours from an even one on are what one mma of fn^T dz takes.
template <class X, int kMixes>
struct Factors {
  static constexpr int kRows = sizeof(X) == 2 ? kFnRows<X, kMixes> : kMixes;
  static constexpr int kBytes = sizeof(X) == 2 ? kFactorParts * kRows * 2 : kRows * 4;  // a multiple of 16

  // Which piece has eight rows of a part.
  static DSV4_DEVICE constexpr int piece_of(int part, int tile) {
    return kRows == 8 ? part : part == 2 ? 6 + tile : tile < 2 ? 2 * part + tile : 4 + part;
  }

  static DSV4_DEVICE void store(void* factors, int64_t token, int row, float value) {
    uint8_t* own = static_cast<uint8_t*>(factors) + token * kBytes;
    if constexpr (sizeof(X) == 2) {
      DSV4_UNROLL
      for (int part = 0; part < kFactorParts; ++part) {
        const uint32_t bits = ptx::pack_bf16(value, 0.0f);
        reinterpret_cast<bf16*>(own)[piece_of(part, row / 8) * 8 + row % 8] = bf16{static_cast<uint16_t>(bits)};
        value = ptx::add(value, -ptx::low_bf16(bits));
      }
    } else {
      reinterpret_cast<float*>(own)[row] = value;
    }
  }
};

// Floats of a token's record for the streams' gradient: pre dx - (along + along) r + fn^T dz, where dx, the gradient of
// the input before its norm, is norm_inverse weight g - norm_along u. 48 bytes: in shared memory eight neighbours' lie
// in different banks.
enum TokenValue { kTokenPre = 0, kNormInverse = 4, kNormAlong, kAlongPre, kAlongMixes, kTokenValues = 12 };

// Floats of a token's record of what is summed over tokens: gradients of the logits, then logits times mixes.
inline constexpr int kSummed = 32, kSummedScales = 24;

struct TokenArguments {
  ApplyArguments forward;  // all but its outputs
  AnyView<2> grad_input;   // [T, D]
  View<const float, 2> grad_post;
  View<const float, 3> grad_comb;
  void* factors;  // Factors of every token
  float* values;  // [T, kTokenValues]
  float* summed;  // [T, kSummed]
};

inline constexpr int kKeptSteps = 40;                                     // all of 20 iterations'
inline constexpr int kTokenSharedBytes = kKeptSteps * kApplyThreads * 4;  // of either kind

// The sum over the row of a comb's element, or its column.
DSV4_DEVICE float sum_of_line(float value, bool columns) {
  const int mask = columns ? 4 : 1;
  value = ptx::add(value, ptx::shuffle_xor(value, mask));
  return ptx::add(value, ptx::shuffle_xor(value, 2 * mask));
}

// Lane 4 i + o of 16 holds a logit of comb and the gradient of comb's element, and receives that of the logit.
DSV4_DEVICE float sinkhorn_backward(float value, float grad, float eps, int iterations) {
  const uint32_t own = ptx::shared_base() + static_cast<uint32_t>(ptx::thread_index() * 4);
  float largest = ptx::maximum(value, ptx::shuffle_xor(value, 1));
  largest = ptx::maximum(largest, ptx::shuffle_xor(largest, 2));
  value = ptx::exponential(ptx::add(value, -largest));
  const float softmax = ptx::divide(value, sum_of_row(value));
  for (int end = 2 * iterations - 1; end > 0;) {
    const int begin = (end - 1) / kKeptSteps * kKeptSteps;
    value = ptx::add(softmax, eps);
    for (int step = 0; step < end; ++step) {
      if (step >= begin)
        ptx::store_shared_float(own + static_cast<uint32_t>((step - begin) * kApplyThreads * 4), value);
      value = ptx::divide(value, ptx::add(sum_of_line(value, step % 2 == 0), eps));
    }
    for (int step = end - 1; step >= begin; --step) {
      const float before = ptx::load_shared_float(own + static_cast<uint32_t>((step - begin) * kApplyThreads * 4));
      const float divisor = ptx::add(sum_of_line(before, step % 2 == 0), eps);
      const float along = sum_of_line(ptx::multiply(grad, value), step % 2 == 0);
      grad = ptx::divide(ptx::add(grad, -along), divisor);
      value = before;
    }
    end = begin;
  }
  return ptx::multiply(softmax, ptx::add(grad, -sum_of_row(ptx::multiply(grad, softmax))));
}

// By the length of the streams: r's gradient along r, from that of the logits times the mixes and their scale.
DSV4_DEVICE float along_streams(float scaled, float inverse, int64_t hidden) {
  const float square = ptx::multiply(inverse, inverse);
  return ptx::divide(ptx::multiply(scaled, square), static_cast<float>(kStreams * hidden));
}

// Gradients through post and comb of the tokens of this block. Lanes without a token repeat the last one's work.
template <class X>
DSV4_DEVICE void weights_backward(const TokenArguments& a, int64_t block) {
  const ApplyArguments& f = a.forward;
  const int lane = ptx::thread_index() % 16, post_lane = lane % kStreams;
  const int64_t mine = f.first_token + block * kCombTokens + ptx::thread_index() / 16;
  const int64_t token = mine < f.end_token ? mine : f.end_token - 1;
  const float inverse = inverse_rms(combine(f, token, kSquares), kStreams * f.hidden, f.mixing.norm_eps);

  const int row = 2 * kStreams + lane;
  const float product = combine(f, token, row), mix = ptx::multiply(product, inverse);
  const float comb_grad = a.grad_comb.data[token * a.grad_comb.stride[0] + lane];
  const float grad = sinkhorn_backward(logit(f.mixing, 2, row, product, inverse), comb_grad, f.mixing.hc_eps,
                                       f.mixing.sinkhorn_iterations);
  const float times_mix = sum_of_column(sum_of_row(ptx::multiply(grad, mix)));

  const int post_row = kStreams + post_lane;
  const float post_product = combine(f, token, post_row), post_mix = ptx::multiply(post_product, inverse);
  const float s = sigmoid(logit(f.mixing, 1, post_row, post_product, inverse));
  const float slope = ptx::multiply(ptx::multiply(2.0f, s), ptx::add(1.0f, -s));
  const float post_grad = ptx::multiply(a.grad_post.data[token * a.grad_post.stride[0] + post_lane], slope);
  const float post_times_mix = sum_of_row(ptx::multiply(post_grad, post_mix));
  if (mine >= f.end_token) return;

  const float post_scale = f.mixing.scale.data[f.mixing.scale.stride[0]];
  const float comb_scale = f.mixing.scale.data[2 * f.mixing.scale.stride[0]];
  float* summed = a.summed + token * kSummed;
  Factors<X, kMixes>::store(a.factors, token, row, ptx::multiply(ptx::multiply(grad, comb_scale), inverse));
  summed[row] = grad;
  if (lane < kStreams) {
    Factors<X, kMixes>::store(a.factors, token, post_row, ptx::multiply(ptx::multiply(post_grad, post_scale), inverse));
    summed[post_row] = post_grad;
  }
  if (lane == 0) {
    summed[kSummedScales + 1] = post_times_mix;
    summed[kSummedScales + 2] = times_mix;
    const float scaled = ptx::fma(times_mix, comb_scale, ptx::multiply(post_times_mix, post_scale));
    a.values[token * kTokenValues + kAlongMixes] = along_streams(scaled, inverse, f.hidden);
  }
}

// One token's sums over the hidden width: of r_i w g; with a norm those of r_i u, w g u and u^2 as well.
inline constexpr int kDots = 16;
inline constexpr int kDotsSharedBytes = kApplyThreads / 32 * kDots * 4;
inline constexpr int kWithMixed = 4, kGradMixed = 8, kMixedMixed = 9;

template <class X>
DSV4_DEVICE void add_dots(const TokenArguments& a, int64_t token, int64_t column, const float (&pre)[kStreams],
                          float (&dots)[kDots]) {
  constexpr int n = kElements<X>;
  const ApplyArguments& f = a.forward;
  Words4 piece[kStreams];
  load_streams<X>(f, token, column, piece);
  float g[n], r[kStreams][n];
  unpack(load_piece(row_of<X>(a.grad_input, token), column, f.hidden, f.vector), g);
  DSV4_UNROLL
  for (int s = 0; s < kStreams; ++s) unpack(piece[s], r[s]);
  if (f.norm_weight.given()) {
    float weight[n], u[n];
    load_norm_weight<X>(f, column, weight);
    DSV4_UNROLL
    for (int e = 0; e < n; ++e) {
      g[e] = ptx::multiply(g[e], weight[e]);
      u[e] = ptx::multiply(pre[0], r[0][e]);
      DSV4_UNROLL
      for (int s = 1; s < kStreams; ++s) u[e] = ptx::fma(pre[s], r[s][e], u[e]);
    }
    unpack(pack(u), u);
    DSV4_UNROLL
    for (int e = 0; e < n; ++e) {
      DSV4_UNROLL
      for (int s = 0; s < kStreams; ++s) dots[kWithMixed + s] = ptx::fma(r[s][e], u[e], dots[kWithMixed + s]);
      dots[kGradMixed] = ptx::fma(g[e], u[e], dots[kGradMixed]);
      dots[kMixedMixed] = ptx::fma(u[e], u[e], dots[kMixedMixed]);
    }
  }
  DSV4_UNROLL
  for (int e = 0; e < n; ++e) {
    DSV4_UNROLL
    for (int s = 0; s < kStreams; ++s) dots[s] = ptx::fma(r[s][e], g[e], dots[s]);
  }
}

// Gradients through pre of one token. From the sums on by the first warp alone.
template <class X, int kMixes>
DSV4_DEVICE void pre_backward(const TokenArguments& a, int64_t token) {
  const ApplyArguments& f = a.forward;
  const PreMix own = make_pre_mix(f, token);
  float pre[kStreams], dots[kDots] = {};
  share_pre(f, own, pre);
  for (int64_t column = ptx::thread_index() * kElements<X>; column < f.hidden; column += kApplyThreads * kElements<X>) {
    add_dots<X>(a, token, column, pre, dots);
  }
  const float sum = sum_of_block<kApplyThreads>(dots);
  if (ptx::thread_index() >= 32) return;

  const int lane = ptx::thread_index(), stream = lane % kStreams;
  float grad = ptx::shuffle(sum, stream), norm_inverse = 1.0f, norm_along = 0.0f;
  const float with_mixed = ptx::shuffle(sum, kWithMixed + stream);
  const float grad_mixed = ptx::shuffle(sum, kGradMixed);
  const float mixed_mixed = ptx::shuffle(sum, kMixedMixed);
  if (f.norm_weight.given()) {
    // rms (r_i w g - (w g u) / (u^2 + D eps) r_i u): the two nearly cancel, so the quotient is taken in two floats.
    const float width = static_cast<float>(f.hidden);
    const TwoFloats squares = add(two_product(f.rms_eps, width), mixed_mixed);
    norm_inverse = nearest(inverse_root(divide(squares, width)));
    const TwoFloats along = quotient(grad_mixed, squares);
    grad = ptx::fma(-along.high, with_mixed, grad);
    grad = ptx::multiply(ptx::fma(-along.low, with_mixed, grad), norm_inverse);
    norm_along = ptx::multiply(along.high, norm_inverse);
  }
  grad = ptx::multiply(grad, ptx::multiply(own.sigmoid, ptx::add(1.0f, -own.sigmoid)));
  const float times_mix = sum_of_row(ptx::multiply(grad, own.mix));
  const float scale = f.mixing.scale.data[0];
  float *values = a.values + token * kTokenValues, *summed = a.summed + token * kSummed;
  if (lane < kStreams) {
    values[kTokenPre + lane] = ptx::add(own.sigmoid, f.mixing.hc_eps);
    summed[lane] = grad;
    Factors<X, kMixes>::store(a.factors, token, lane, ptx::multiply(ptx::multiply(grad, scale), own.inverse));
  } else if (kMixes == kStreams && lane < Factors<X, kMixes>::kRows) {
    Factors<X, kMixes>::store(a.factors, token, lane, 0.0f);
  }
  if (lane == 0) {
    values[kNormInverse] = norm_inverse;
    values[kNormAlong] = norm_along;
    values[kAlongPre] = along_streams(ptx::multiply(times_mix, scale), own.inverse, f.hidden);
    if (kMixes == kStreams) values[kAlongMixes] = 0.0f;
    summed[kSummedScales] = times_mix;
  }
}

// Grid: kMixes == 24: one block for every kCombTokens tokens, then one a token.
template <class X, int kMixes>
DSV4_DEVICE void token_gradients(const TokenArguments& a) {
  const ApplyArguments& f = a.forward;
  const int64_t weight_blocks = kMixes == kStreams ? 0 : (f.end_token - f.first_token + kCombTokens - 1) / kCombTokens;
  const int64_t block = ptx::block_index_x();
  if (block < weight_blocks) {
    weights_backward<X>(a, block);
  } else {
    pre_backward<X, kMixes>(a, f.first_token + block - weight_blocks);
  }
}

}  // namespace dsv4::sm80
