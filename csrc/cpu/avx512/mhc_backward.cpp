// The gradients of mHC. mhc_post: one pass, 80 D FLOPs for 28 D + 160 bytes a token: bound by memory.
// mhc_pre and mhc_head, with J = 24 or 4 rows of fn: a pass over tiles of 16 tokens takes the product again (as in the
// forward pass), then the gradients within a token, then d streams = pre dx + fn^T dz + c r, 4 tokens x 32 elements at
// a time in runs of 256, whose fn stays in the first-level cache; a pass over runs of 256 columns forms d fn = sum_t dz
// r^T from dense copies of 32 tokens. 24 J D FLOPs a token in all, three times the forward pass: bound by the FMA
// units; 70 % of their peak expected. Sums over tokens run in ascending order, in blocks of 32 tokens, whatever the
// number of threads.
#include <cmath>

#include "cpu/avx512/mhc_product.h"
#include "cpu/mhc.h"

namespace dsv4::avx512 {
namespace {

constexpr int kBlock = 32;    // tokens that a sum over tokens takes together
constexpr int kRunSteps = 8;  // steps of a row that are taken together
constexpr int kRun = kRunSteps * kStep;

template <class X>
struct Problem {
  Rows<X> streams;
  AnyView<2> grad_input;
  AnyView<3> grad_residual, grad_streams;
  const float *grad_post, *grad_comb;  // null: mhc_head
  int64_t grad_post_stride, grad_comb_stride;
  const MhcMixing& mixing;
  AnyView<1> norm_weight;
  float rms_eps;
  void* packed;
  MhcTokenGradient* tokens;

  DSV4_INLINE const X* r(const Problem& p, int64_t token, int i) {
    return p.streams.data + token * p.streams.token + i * p.streams.stream;
  }
  DSV4_INLINE const X* grad(const Problem& p, int64_t token) {
    return static_cast<const X*>(p.grad_input.data) + token * p.grad_input.stride[0];
  }
};

template <bool kPart, class X>
DSV4_INLINE Pair norm_weight(const AnyView<1>& weight, int64_t d, int64_t count) {
  if (weight.dtype == DType::kFloat32) return get<kPart>(static_cast<const float*>(weight.data) + d, count);
  return get<kPart>(static_cast<const X*>(weight.data) + d, count);
}

DSV4_INLINE Pair times(Pair x, Pair y) { return {_mm512_mul_ps(x.a, y.a), _mm512_mul_ps(x.b, y.b)}; }

// One step of the sublayer's input before its norm, as it was rounded.
template <class X>
DSV4_INLINE Pair mixed(const Pair* r, const float* pre) {
  Pair sum = scaled(r[0], _mm512_set1_ps(pre[0]));
  for (int i = 1; i < kStreams; ++i) sum = fma(r[i], _mm512_set1_ps(pre[i]), sum);
  return nearest<X>(sum);
}

// d input / d mixed of the optional RMSNorm: grad_mixed = rms * (w g) - along * mixed.
struct NormGradient {
  float rms, along;
};

template <bool kPart, class X>
DSV4_INLINE void add_dots(const Problem<X>& p, int64_t token, const float* pre, int64_t d, int64_t count,
                          __m512* sums) {
  Pair r[kStreams], g = get<kPart>(Problem<X>::grad(p, token) + d, count);
  for (int i = 0; i < kStreams; ++i) r[i] = get<kPart>(Problem<X>::r(p, token, i) + d, count);
  if (p.norm_weight.given()) {
    g = times(g, norm_weight<kPart, X>(p.norm_weight, d, count));
    const Pair u = mixed<X>(r, pre);
    for (int i = 0; i < kStreams; ++i) sums[4 + i] = dot(r[i], u, sums[4 + i]);
    sums[8] = dot(g, u, sums[8]);
    sums[9] = dot(u, u, sums[9]);
  }
  for (int i = 0; i < kStreams; ++i) sums[i] = dot(r[i], g, sums[i]);
}

// grad_pre[i] = <r_i, grad_mixed> of one token.
template <class X>
DSV4_INLINE NormGradient pre_dots(const Problem<X>& p, int64_t token, const float* pre, float* grad_pre) {
  const int64_t hidden = p.streams.hidden;
  __m512 sums[16];
  for (int k = 0; k < 16; ++k) sums[k] = _mm512_setzero_ps();
  int64_t d = 0;
  for (; d + kStep <= hidden; d += kStep) add_dots<false>(p, token, pre, d, kStep, sums);
  if (d < hidden) add_dots<true>(p, token, pre, d, hidden - d, sums);
  alignas(64) float s[16];
  _mm512_store_ps(s, sums16(sums));
  if (p.norm_weight.given()) {
    // In double: the two terms of grad_pre nearly cancel, and would show the rounding of rms.
    const double width = static_cast<double>(hidden), rms = 1 / std::sqrt(s[9] / width + p.rms_eps);
    const double along = rms * rms * rms * s[8] / width;
    for (int i = 0; i < kStreams; ++i) grad_pre[i] = static_cast<float>(rms * s[i] - along * s[4 + i]);
    return {static_cast<float>(rms), static_cast<float>(along)};
  }
  for (int i = 0; i < kStreams; ++i) grad_pre[i] = s[i];
  return {1.f, 0.f};
}

// grad: of comb, becomes that of its logits. 16 tokens, one a lane. The steps are taken again and kept in blocks, so
// that any number of them fits the stack.
void sinkhorn_backward(const __m512* logits, const MhcMixing& mixing, __m512* grad) {
  constexpr int kKept = 64;
  __m512 softmax[16], kept[kKept][16], divisors[kKept][4];
  for (int k = 0; k < 16; ++k) softmax[k] = logits[k];
  softmax_rows(softmax);
  const __m512 eps = _mm512_set1_ps(mixing.hc_eps);
  for (int end = 2 * mixing.sinkhorn_iterations - 1; end > 0;) {
    const int begin = (end - 1) / kKept * kKept;
    __m512 x[16];
    for (int k = 0; k < 16; ++k) x[k] = _mm512_add_ps(softmax[k], eps);
    for (int step = 0; step < end; ++step) {
      const int slot = step < begin ? 0 : step - begin;
      normalise(x, step % 2 == 1, eps, divisors[slot]);
      for (int k = 0; k < 16; ++k) kept[slot][k] = x[k];
    }
    for (int step = end - 1; step >= begin; --step) {
      const __m512* y = kept[step - begin];
      const int outer = step % 2 == 1 ? 4 : 1, inner = step % 2 == 1 ? 1 : 4;
      for (int line = 0; line < 4; ++line) {
        __m512* g = grad + line * outer;
        const __m512* at = y + line * outer;
        __m512 sum = _mm512_mul_ps(g[0], at[0]);
        for (int k = 1; k < 4; ++k) sum = _mm512_fmadd_ps(g[k * inner], at[k * inner], sum);
        const __m512 factor = _mm512_div_ps(_mm512_set1_ps(1.f), divisors[step - begin][line]);
        for (int k = 0; k < 4; ++k) g[k * inner] = _mm512_mul_ps(_mm512_sub_ps(g[k * inner], sum), factor);
      }
    }
    end = begin;
  }
  for (int line = 0; line < 4; ++line) {
    __m512* g = grad + 4 * line;
    const __m512* s = softmax + 4 * line;
    __m512 sum = _mm512_mul_ps(g[0], s[0]);
    for (int k = 1; k < 4; ++k) sum = _mm512_fmadd_ps(g[k], s[k], sum);
    for (int k = 0; k < 4; ++k) g[k] = _mm512_mul_ps(s[k], _mm512_sub_ps(g[k], sum));
  }
}

// The small part, 16 tokens a register: from the gradients of pre, post and comb (rows [token][j], j as in fn) to those
// of the products, logits and scales. along[token] = the factor of r in d streams.
template <int kOutputs>
void mixing_backward(const float (*rows)[kSums], const float (*grads)[kSums], const MhcMixing& mixing, int64_t width,
                     int64_t tokens, MhcTokenGradient* out, float* along) {
  const __m512 rms = reciprocal_rms(column(rows, kSquares), width, mixing.norm_eps);
  __m512 m[kOutputs], logits[kOutputs], grad[kOutputs], scale[3];
  for (int g = 0; g < 3; ++g) scale[g] = _mm512_setzero_ps();
  for (int j = 0; j < kOutputs; ++j) {
    const int group = j < 4 ? 0 : j < 8 ? 1 : 2;
    m[j] = _mm512_mul_ps(column(rows, j), rms);
    logits[j] = logit(rows, j, group, rms, mixing);
    grad[j] = column(grads, j);
    if (j < 8) {
      const __m512 s = sigmoid(logits[j]);
      const __m512 slope = _mm512_mul_ps(s, _mm512_sub_ps(_mm512_set1_ps(1.f), s));
      grad[j] = _mm512_mul_ps(grad[j], j < 4 ? slope : _mm512_add_ps(slope, slope));
    }
  }
  if constexpr (kOutputs == kMixes) sinkhorn_backward(logits + 8, mixing, grad + 8);
  __m512 total = _mm512_setzero_ps();
  for (int j = 0; j < kOutputs; ++j) {
    const int group = j < 4 ? 0 : j < 8 ? 1 : 2;
    const __m512 grad_m = _mm512_mul_ps(grad[j], _mm512_set1_ps(mixing.scale.data[group * mixing.scale.stride[0]]));
    scale[group] = _mm512_fmadd_ps(grad[j], m[j], scale[group]);
    total = _mm512_fmadd_ps(grad_m, m[j], total);
    logits[j] = grad[j];
    grad[j] = _mm512_mul_ps(grad_m, rms);
  }
  total = _mm512_div_ps(_mm512_mul_ps(total, _mm512_mul_ps(rms, rms)), _mm512_set1_ps(static_cast<float>(width)));
  const float *products = reinterpret_cast<const float*>(grad), *logit_lanes = reinterpret_cast<const float*>(logits),
              *scales = reinterpret_cast<const float*>(scale), *factors = reinterpret_cast<const float*>(&total);
  for (int64_t t = 0; t < tokens; ++t) {
    for (int j = 0; j < kMixes; ++j) {
      out[t].product[j] = j < kOutputs ? products[16 * j + t] : 0.f;
      out[t].logits[j] = j < kOutputs ? logit_lanes[16 * j + t] : 0.f;
    }
    for (int g = 0; g < 3; ++g) out[t].scale[g] = scales[16 * g + t];
    along[t] = factors[t];
  }
}

// The gradient of the sublayer's input before its norm: one step of a token, [32] float32.
template <bool kPart, class X>
DSV4_INLINE void mixed_gradient(const Problem<X>& p, int64_t token, const NormGradient& norm, int64_t d, int64_t count,
                                float* to) {
  Pair grad = get<kPart>(Problem<X>::grad(p, token) + d, count);
  if (p.norm_weight.given()) {
    Pair r[kStreams];
    for (int i = 0; i < kStreams; ++i) r[i] = get<kPart>(Problem<X>::r(p, token, i) + d, count);
    const Pair weighted = times(grad, norm_weight<kPart, X>(p.norm_weight, d, count));
    grad =
        fma(mixed<X>(r, p.tokens[token].pre), _mm512_set1_ps(-norm.along), scaled(weighted, _mm512_set1_ps(norm.rms)));
  }
  store(to, grad);
}

// One step of d streams for kTokens tokens and one stream. `grad` has their mixed_gradient.
template <class X, int kOutputs, int kTokens, Store kStore>
DSV4_INLINE void streams_step(const Problem<X>& p, int64_t first, const float* along, int i, int64_t step,
                              const float (*grad)[kRun], int64_t count) {
  constexpr int kColumns = Product::columns<kOutputs>();
  constexpr bool kPart = kStore == Store::kPart;
  const int64_t d = step * kStep, all = Product::steps(p.streams.hidden);
  Pair sum[kTokens];
#pragma GCC unroll 4
  for (int n = 0; n < kTokens; ++n) sum[n] = {_mm512_setzero_ps(), _mm512_setzero_ps()};
  for (int group = 0; group < kOutputs / kColumns; ++group) {
    const float* fn = static_cast<const float*>(p.packed) + Product::packed_step<kOutputs>(all, i, group, step);
#pragma GCC unroll 4
    for (int c = 0; c < kColumns; ++c) {
      const Pair row = load(fn + c * kStep);
#pragma GCC unroll 4
      for (int n = 0; n < kTokens; ++n) {
        __m512 factor = _mm512_set1_ps(p.tokens[first + n].product[group * kColumns + c]);
        __asm__("" : "+v"(factor));  // one load for two products
        sum[n] = fma(row, factor, sum[n]);
      }
    }
  }
#pragma GCC unroll 4
  for (int n = 0; n < kTokens; ++n) {
    // The largest terms come last: they would round the small ones.
    const Pair r = get<kPart>(Problem<X>::r(p, first + n, i) + d, count);
    sum[n] = fma(r, _mm512_set1_ps(-along[n]), sum[n]);
    sum[n] = fma(load(grad[n] + d % kRun), _mm512_set1_ps(p.tokens[first + n].pre[i]), sum[n]);
    if (p.grad_residual.given()) {
      const X* residual = static_cast<const X*>(p.grad_residual.data) + (first + n) * p.grad_residual.stride[0] +
                          i * p.grad_residual.stride[1] + d;
      const Pair add = get<kPart>(residual, count);
      sum[n] = {_mm512_add_ps(sum[n].a, add.a), _mm512_add_ps(sum[n].b, add.b)};
    }
    X* out = static_cast<X*>(p.grad_streams.data) + (first + n) * p.grad_streams.stride[0] +
             i * p.grad_streams.stride[1] + d;
    put<kStore>(out, sum[n], count);
  }
}

template <class X, int kOutputs, int kTokens, Store kStore>
DSV4_INLINE void streams_run(const Problem<X>& p, int64_t first, const float* along, int i, int64_t begin, int64_t end,
                             const float (*grad)[kRun]) {
  const int64_t whole = p.streams.hidden / kStep;
  for (int64_t step = begin; step < end; ++step) {
    if (step < whole) {
      streams_step<X, kOutputs, kTokens, kStore>(p, first, along, i, step, grad, kStep);
    } else {
      streams_step<X, kOutputs, kTokens, Store::kPart>(p, first, along, i, step, grad, p.streams.hidden % kStep);
    }
  }
}

// d streams of a tile in runs of kRun elements, whose fn stays in the first-level cache while the tokens pass.
template <class X, int kOutputs, Store kStore>
void tile_streams(const Problem<X>& p, int64_t first, int64_t tokens, const NormGradient* norm, const float* along) {
  const int64_t hidden = p.streams.hidden, steps = Product::steps(hidden);
  alignas(64) float grad[kTile][kRun];
  for (int64_t begin = 0; begin < steps; begin += kRunSteps) {
    const int64_t end = begin + kRunSteps < steps ? begin + kRunSteps : steps;
    for (int64_t t = 0; t < tokens; ++t) {
      for (int64_t d = begin * kStep; d < end * kStep; d += kStep) {
        if (d + kStep <= hidden) {
          mixed_gradient<false>(p, first + t, norm[t], d, kStep, grad[t] + d % kRun);
        } else {
          mixed_gradient<true>(p, first + t, norm[t], d, hidden - d, grad[t] + d % kRun);
        }
      }
    }
    for (int i = 0; i < kStreams; ++i) {
      int64_t t = 0;
      for (; t + 4 <= tokens; t += 4) {
        streams_run<X, kOutputs, 4, kStore>(p, first + t, along + t, i, begin, end, grad + t);
      }
      for (; t < tokens; ++t) {
        streams_run<X, kOutputs, 1, kStore>(p, first + t, along + t, i, begin, end, grad + t);
      }
    }
  }
  if (kStore == Store::kPastCaches) _mm_sfence();
}

template <class X, int kOutputs>
void tile_backward(const Problem<X>& p, int64_t first, int64_t tokens) {
  alignas(64) float sums[kTile][kSums] = {}, grads[kTile][kSums] = {};
  Product::many<X, kOutputs>(p.streams.part(first, tokens), p.packed, Slices::all(p.streams.hidden),
                             {nullptr, p.streams.token, 0, nullptr, 0, 0}, sums);
  const int64_t hidden = p.streams.hidden, width = kStreams * hidden;
  __m512 pre[4];
  pre_weights(sums, p.mixing, reciprocal_rms(column(sums, kSquares), width, p.mixing.norm_eps), pre);
  const float* lanes = reinterpret_cast<const float*>(pre);
  NormGradient norm[kTile];
  float along[kTile];
  for (int64_t t = 0; t < tokens; ++t) {
    MhcTokenGradient& out = p.tokens[first + t];
    for (int i = 0; i < kStreams; ++i) out.pre[i] = lanes[16 * i + t];
    norm[t] = pre_dots(p, first + t, out.pre, grads[t]);
    out.rms = norm[t].rms;
    if (kOutputs != kMixes) continue;
    for (int i = 0; i < 4; ++i) grads[t][4 + i] = p.grad_post[(first + t) * p.grad_post_stride + i];
    for (int k = 0; k < 16; ++k) grads[t][8 + k] = p.grad_comb[(first + t) * p.grad_comb_stride + k];
  }
  mixing_backward<kOutputs>(sums, grads, p.mixing, width, tokens, p.tokens + first, along);
  if (past_caches(p.grad_streams, sizeof(X))) {
    tile_streams<X, kOutputs, Store::kPastCaches>(p, first, tokens, norm, along);
  } else {
    tile_streams<X, kOutputs, Store::kWhole>(p, first, tokens, norm, along);
  }
}

// totals[column] += the sum over a block of tokens of product x r, one step of it.
template <class X, int kOutputs, int kColumns>
DSV4_INLINE void fn_step(const X (*r)[kRun], const float (*products)[kOutputs], int64_t tokens, int64_t d, int column,
                         float (*totals)[kRun]) {
  Pair sum[kColumns];
#pragma GCC unroll 12
  for (int c = 0; c < kColumns; ++c) sum[c] = {_mm512_setzero_ps(), _mm512_setzero_ps()};
  for (int64_t t = 0; t < tokens; ++t) {
    const Pair x = get<false>(r[t] + d);
#pragma GCC unroll 12
    for (int c = 0; c < kColumns; ++c) {
      __m512 factor = _mm512_set1_ps(products[t][column + c]);
      __asm__("" : "+v"(factor));  // one load for two products
      sum[c] = fma(x, factor, sum[c]);
    }
  }
#pragma GCC unroll 12
  for (int c = 0; c < kColumns; ++c) {
    const Pair old = load(totals[column + c] + d);
    store(totals[column + c] + d, {_mm512_add_ps(old.a, sum[c].a), _mm512_add_ps(old.b, sum[c].b)});
  }
}

// d fn over one run of one stream, all tokens. A block's rows are copied together, or they would push each other out
// of the first-level cache, where rows that lie a power of two apart compete for the same sets.
template <class X, int kOutputs>
void fn_run(const Problem<X>& p, const View<float, 2>& grad_fn, int64_t stream, int64_t run) {
  constexpr int kColumns = Product::columns<kOutputs>();
  const int64_t hidden = p.streams.hidden, first = run * kRun, count = p.streams.tokens;
  const int64_t width = first + kRun <= hidden ? kRun : hidden - first;
  alignas(64) X dense[kBlock][kRun];
  alignas(64) float products[kBlock][kOutputs], totals[kOutputs][kRun] = {};
  for (int64_t token = 0; token < count; token += kBlock) {
    const int64_t tokens = token + kBlock <= count ? kBlock : count - token;
    for (int64_t t = 0; t < tokens; ++t) {
      const X* r = Problem<X>::r(p, token + t, static_cast<int>(stream)) + first;
      for (int64_t d = 0; d < width; d += kStep) {
        prefetch(r + kBlock * p.streams.token + d);
        store(dense[t] + d, width - d >= kStep ? load(r + d) : load(r + d, width - d));
      }
      for (int j = 0; j < kOutputs; ++j) products[t][j] = p.tokens[token + t].product[j];
    }
    for (int64_t d = 0; d < width; d += kStep) {
      for (int column = 0; column < kOutputs; column += kColumns) {
        fn_step<X, kOutputs, kColumns>(dense, products, tokens, d, column, totals);
      }
    }
  }
  for (int j = 0; j < kOutputs; ++j) {
    float* to = grad_fn.data + j * grad_fn.stride[0] + stream * hidden + first;
    for (int64_t d = 0; d < width; ++d) to[d] = totals[j][d];
  }
}

// d norm_weight over one run, all tokens.
template <class X>
void norm_run(const Problem<X>& p, float* grad, int64_t run) {
  const int64_t hidden = p.streams.hidden, first = run * kRun;
  const int64_t width = first + kRun <= hidden ? kRun : hidden - first;
  alignas(64) float totals[kRun] = {}, sums[kRun];
  const auto step = [&](int64_t t, int64_t d, auto part) __attribute__((always_inline)) {
    constexpr bool kPart = decltype(part)::value;
    Pair r[kStreams];
    for (int i = 0; i < kStreams; ++i) r[i] = get<kPart>(Problem<X>::r(p, t, i) + first + d, width - d);
    const Pair u = mixed<X>(r, p.tokens[t].pre), g = get<kPart>(Problem<X>::grad(p, t) + first + d, width - d);
    store(sums + d, fma(times(u, g), _mm512_set1_ps(p.tokens[t].rms), load(sums + d)));
  };
  for (int64_t token = 0; token < p.streams.tokens; token += kBlock) {
    const int64_t end = token + kBlock <= p.streams.tokens ? token + kBlock : p.streams.tokens;
    for (float& sum : sums) sum = 0.f;
    for (int64_t t = token; t < end; ++t) {
      for (int64_t d = 0; d < width; d += kStep) {
        if (d + kStep <= width) {
          step(t, d, std::false_type());
        } else {
          step(t, d, std::true_type());
        }
      }
    }
    for (int k = 0; k < kRun; ++k) totals[k] += sums[k];
  }
  for (int64_t d = 0; d < width; ++d) grad[first + d] = totals[d];
}

void small_sums(const MhcTokenGradient* tokens, int64_t count, int mixes, const View<float, 1>& grad_scale,
                const View<float, 1>& grad_base) {
  double scale[3] = {}, base[kMixes] = {};
  for (int64_t t = 0; t < count; ++t) {
    for (int group = 0; group < 3; ++group) scale[group] += static_cast<double>(tokens[t].scale[group]);
    for (int j = 0; j < kMixes; ++j) base[j] += static_cast<double>(tokens[t].logits[j]);
  }
  for (int64_t group = 0; group < grad_scale.shape[0]; ++group) {
    grad_scale.data[group * grad_scale.stride[0]] = static_cast<float>(scale[group]);
  }
  for (int j = 0; j < mixes; ++j) grad_base.data[j * grad_base.stride[0]] = static_cast<float>(base[j]);
}

template <class X, int kOutputs>
void backward(const Problem<X>& p, const View<float, 2>& grad_fn, const View<float, 1>& grad_scale,
              const View<float, 1>& grad_base, float* grad_norm_weight, const Context& context) {
  const int64_t tokens = p.streams.tokens, hidden = p.streams.hidden;
  parallel(context, Product::kParts, [&](int64_t begin, int64_t end) {
    for (int64_t part = begin; part < end; ++part) Product::pack<kOutputs>(p.mixing.fn, hidden, part, p.packed);
  });
  parallel(context, (tokens + kTile - 1) / kTile, [&](int64_t begin, int64_t end) {
    for (int64_t index = begin; index < end; ++index) {
      const int64_t first = index * kTile;
      tile_backward<X, kOutputs>(p, first, first + kTile <= tokens ? kTile : tokens - first);
    }
  });
  const int64_t runs = (hidden + kRun - 1) / kRun;
  parallel(context, kStreams * runs, [&](int64_t begin, int64_t end) {
    for (int64_t index = begin; index < end; ++index) fn_run<X, kOutputs>(p, grad_fn, index / runs, index % runs);
  });
  if (p.norm_weight.given()) {
    parallel(context, runs, [&](int64_t begin, int64_t end) {
      for (int64_t run = begin; run < end; ++run) norm_run(p, grad_norm_weight, run);
    });
  }
  small_sums(p.tokens, tokens, kOutputs, grad_scale, grad_base);
}

// Sums over no tokens.
void zero(const View<float, 2>& grad_fn) {
  for (int64_t j = 0; j < grad_fn.shape[0]; ++j) {
    for (int64_t k = 0; k < grad_fn.shape[1]; ++k) grad_fn.data[j * grad_fn.stride[0] + k] = 0.f;
  }
}

MhcTokenGradient* token_gradients(const Workspace& workspace, int64_t hidden, int mixes) {
  return reinterpret_cast<MhcTokenGradient*>(static_cast<char*>(workspace.data) + mhc_workspace_bytes(hidden, mixes));
}

template <class X>
Status pre_backward(const MhcPreBackwardParams& a, const Context& context) {
  const Problem<X> p{Rows<X>(a.streams),
                     a.grad_input,
                     a.grad_residual,
                     a.grad_streams,
                     a.grad_post.data,
                     a.grad_comb.data,
                     a.grad_post.stride[0],
                     a.grad_comb.stride[0],
                     a.mixing,
                     a.norm_weight,
                     a.rms_eps,
                     a.workspace.data,
                     token_gradients(a.workspace, a.streams.shape[2], kMixes)};
  if (p.streams.tokens == 0) zero(a.grad_fn);
  backward<X, kMixes>(p, a.grad_fn, a.grad_scale, a.grad_base, a.grad_norm_weight.data, context);
  return Status::ok();
}

template <class X>
Status head_backward(const MhcHeadBackwardParams& a, const Context& context) {
  const Problem<X> p{Rows<X>(a.streams),
                     a.grad_output,
                     {},
                     a.grad_streams,
                     nullptr,
                     nullptr,
                     0,
                     0,
                     a.mixing,
                     {},
                     0.f,
                     a.workspace.data,
                     token_gradients(a.workspace, a.streams.shape[2], kStreams)};
  if (p.streams.tokens == 0) zero(a.grad_fn);
  backward<X, kStreams>(p, a.grad_fn, a.grad_scale, a.grad_base, nullptr, context);
  return Status::ok();
}

struct PostToken {
  const float *post, *comb;
  __m512 grad_post[4], grad_comb[16];
};

template <Store kStore, class X>
DSV4_INLINE void post_backward_step(const X* grad, int64_t grad_stride, const X* y, const X* r, int64_t stride,
                                    X* grad_y, X* grad_r, int64_t grad_r_stride, int64_t count, PostToken* token) {
  constexpr bool kPart = kStore == Store::kPart;
  Pair g[kStreams];
#pragma GCC unroll 4
  for (int o = 0; o < kStreams; ++o) g[o] = get<kPart>(grad + o * grad_stride, count);
  const Pair sublayer = get<kPart>(y, count);
  Pair sum = scaled(g[0], _mm512_set1_ps(token->post[0]));
#pragma GCC unroll 4
  for (int o = 0; o < kStreams; ++o) {
    if (o > 0) sum = fma(g[o], _mm512_set1_ps(token->post[o]), sum);
    token->grad_post[o] = dot(g[o], sublayer, token->grad_post[o]);
  }
  put<kStore>(grad_y, sum, count);
#pragma GCC unroll 4
  for (int i = 0; i < kStreams; ++i) {
    const Pair in = get<kPart>(r + i * stride, count);
    Pair back = scaled(g[0], _mm512_set1_ps(token->comb[4 * i]));
#pragma GCC unroll 4
    for (int o = 0; o < kStreams; ++o) {
      if (o > 0) back = fma(g[o], _mm512_set1_ps(token->comb[4 * i + o]), back);
      token->grad_comb[4 * i + o] = dot(in, g[o], token->grad_comb[4 * i + o]);
    }
    put<kStore>(grad_r + i * grad_r_stride, back, count);
  }
}

template <class X, Store kStore>
void post_tokens_backward(const MhcPostBackwardParams& a, int64_t begin, int64_t end) {
  const Rows<X> streams(a.streams), grads(a.grad_result);
  const int64_t hidden = streams.hidden, out_stride = a.grad_streams.stride[1];
  for (int64_t t = begin; t < end; ++t) {
    PostToken token;
    token.post = a.post.data + t * a.post.stride[0];
    token.comb = a.comb.data + t * a.comb.stride[0];
    for (__m512& x : token.grad_post) x = _mm512_setzero_ps();
    for (__m512& x : token.grad_comb) x = _mm512_setzero_ps();
    const X *g = grads.data + t * grads.token, *r = streams.data + t * streams.token;
    const X* y = static_cast<const X*>(a.sublayer.data) + t * a.sublayer.stride[0];
    X* grad_y = static_cast<X*>(a.grad_sublayer.data) + t * a.grad_sublayer.stride[0];
    X* grad_r = static_cast<X*>(a.grad_streams.data) + t * a.grad_streams.stride[0];
    int64_t d = 0;
    for (; d + kStep <= hidden; d += kStep) {
      post_backward_step<kStore>(g + d, grads.stream, y + d, r + d, streams.stream, grad_y + d, grad_r + d, out_stride,
                                 kStep, &token);
    }
    if (d < hidden) {
      post_backward_step<Store::kPart>(g + d, grads.stream, y + d, r + d, streams.stream, grad_y + d, grad_r + d,
                                       out_stride, hidden - d, &token);
    }
    float *grad_post = a.grad_post.data + t * a.grad_post.stride[0],
          *grad_comb = a.grad_comb.data + t * a.grad_comb.stride[0];
    for (int o = 0; o < kStreams; ++o) grad_post[o] = _mm512_reduce_add_ps(token.grad_post[o]);
    _mm512_storeu_ps(grad_comb, sums16(token.grad_comb));
  }
  if (kStore == Store::kPastCaches) _mm_sfence();
}

template <class X>
Status post_backward(const MhcPostBackwardParams& a, const Context& context) {
  const AnyView<2>& y = a.grad_sublayer;
  const bool aligned =
      (reinterpret_cast<uintptr_t>(y.data) | static_cast<uintptr_t>(y.stride[0]) * sizeof(X)) % 64 == 0;
  const bool past = aligned && past_caches(a.grad_streams, sizeof(X));
  parallel(context, a.streams.shape[0], [&](int64_t begin, int64_t end) {
    if (past) {
      post_tokens_backward<X, Store::kPastCaches>(a, begin, end);
    } else {
      post_tokens_backward<X, Store::kWhole>(a, begin, end);
    }
  });
  return Status::ok();
}

}  // namespace

Status mhc_pre_backward(const MhcPreBackwardParams& a, const Context& context) {
  return a.streams.dtype == DType::kBFloat16 ? pre_backward<bf16>(a, context) : pre_backward<float>(a, context);
}

Status mhc_head_backward(const MhcHeadBackwardParams& a, const Context& context) {
  return a.streams.dtype == DType::kBFloat16 ? head_backward<bf16>(a, context) : head_backward<float>(a, context);
}

Status mhc_post_backward(const MhcPostBackwardParams& a, const Context& context) {
  return a.streams.dtype == DType::kBFloat16 ? post_backward<bf16>(a, context) : post_backward<float>(a, context);
}

}  // namespace dsv4::avx512
