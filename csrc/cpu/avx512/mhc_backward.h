// The gradients of mhc_pre and mhc_head for any way of computing the products with fn, J = 24 or 4 rows of it:
//   1. blocks of tokens: the product fn r again, as in the forward pass, and what follows from it within a token
//   2. runs of 256 columns of all streams, by groups of 1024 tokens: d streams = pre dx + fn^T dz + c r, and the
//      group's sums d fn = sum_t dz r^T and d norm_weight, from dense copies of 128 tokens' rows, since rows that lie a
//      power of two apart compete for the same sets of the caches. Memory is read twice in all, fn's part of a run
//      once.
//   3. the sums of the groups, if there are several
// Sums over tokens run in ascending order, in blocks and groups of fixed size, whatever the number of threads.
//
// A Gradient is a struct of static functions, beside the forward pass's Product:
//   bytes(hidden, mixes), pack<kOutputs>(fn, hidden, part, to)   fn for d streams, a quarter of a stream a part
//   Factors<kOutputs>, prepare(tokens, count, factors)           dz of a block
//   streams<kOutputs>(factors, first, count, fn, hidden, run, row)
//                                                                fn^T dz of up to 32 tokens of a block, which the
//                                                                StreamRow row(stream, token) finishes
//   kTotals<kOutputs>                                            floats of a run's sums d fn, one stream
//   add_fn<kOutputs>(factors, rows, count, steps, totals)        adds those of a block
//   total<kOutputs>(totals, step, j)                             32 of them
#pragma once

#include <cmath>

#include "cpu/avx512/mhc_forward.h"
#include "cpu/avx512/mhc_mixing_backward.h"
#include "cpu/work.h"

namespace dsv4::avx512 {
namespace {

constexpr int kRunSteps = 8;             // steps of a row that are taken together
constexpr int kRun = kRunSteps * kStep;  // elements of it
constexpr int kFew = 32;                 // tokens whose d streams are taken together
constexpr int kBlock = 4 * kFew;         // tokens whose rows are copied together
constexpr int64_t kGroup = 8 * kBlock;   // tokens whose sums are formed together

struct Steps {
  int64_t begin, end;
  int64_t width;  // elements of them
};

template <class X>
struct BackwardProblem {
  Rows<X> streams;
  AnyView<2> grad_input;
  AnyView<3> grad_residual, grad_streams;
  const float *grad_post, *grad_comb;  // null: mhc_head
  int64_t grad_post_stride, grad_comb_stride;
  const MhcMixing& mixing;
  AnyView<1> norm_weight;
  float rms_eps;
  View<float, 2> grad_fn;  // or none
  float* grad_norm_weight;

  const X* r(int64_t token, int stream) const { return streams.data + token * streams.token + stream * streams.stream; }
  const X* grad(int64_t token) const { return static_cast<const X*>(grad_input.data) + token * grad_input.stride[0]; }
  bool wants_fn() const { return grad_fn.given(); }
  int64_t groups() const { return (streams.tokens + kGroup - 1) / kGroup; }
};

// What a thread holds of a block of tokens, over one run. Rows are zero past the hidden width.
template <class X>
struct Held {
  X (*rows)[kBlock][kRun];  // [stream]
  float (*grad)[kRun];      // [kFew]  of the sublayer's input before its norm
  float* totals;            // d fn, as the Gradient keeps it
  float *norm, *norm_few;   // d norm_weight, and its sums over kFew tokens
  void* factors;
};

template <class Product, class Gradient, class X, int kOutputs>
struct BackwardMemory {
  void *packed, *fn;
  MhcTokenGradient* tokens;
  float *fn_sums, *norm_sums;  // [group], where there are several
  Arena slots;
  int64_t slot_bytes, bytes;

  BackwardMemory(void* data, int64_t count, int64_t hidden, int threads) {
    Arena arena{static_cast<uint8_t*>(data)};
    packed = arena.take<uint8_t>(Product::bytes(hidden, kOutputs));
    fn = arena.take<uint8_t>(Gradient::bytes(hidden, kOutputs));
    tokens = arena.take<MhcTokenGradient>(count);
    const int64_t groups = (count + kGroup - 1) / kGroup, kept = groups > 1 ? groups : 0;
    fn_sums = arena.take<float>(kept * kOutputs * kStreams * hidden);
    norm_sums = arena.take<float>(kept * hidden);
    Arena counted{nullptr};
    held(&counted);
    slot_bytes = counted.used;
    slots = {arena.base == nullptr ? nullptr : arena.base + arena.used};
    bytes = arena.used + threads * slot_bytes;
  }
  Held<X> held(Arena* arena) const {
    Held<X> h;
    h.rows = reinterpret_cast<X(*)[kBlock][kRun]>(arena->take<X>(kStreams * kBlock * kRun));
    h.grad = reinterpret_cast<float (*)[kRun]>(arena->take<float>(kFew * kRun));
    h.totals = arena->take<float>(kStreams * Gradient::template kTotals<kOutputs>);
    h.norm = arena->take<float>(kRun);
    h.norm_few = arena->take<float>(kRun);
    h.factors = arena->take<uint8_t>(sizeof(typename Gradient::template Factors<kOutputs>));
    return h;
  }
  Held<X> slot(int64_t index) const {
    Arena arena{slots.base + index * slot_bytes};
    return held(&arena);
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

template <bool kPart, class X>
DSV4_INLINE void add_dots(const BackwardProblem<X>& p, int64_t token, const float* pre, int64_t d, int64_t count,
                          __m512* sums) {
  Pair r[kStreams], g = get<kPart>(p.grad(token) + d, count);
  for (int i = 0; i < kStreams; ++i) r[i] = get<kPart>(p.r(token, i) + d, count);
  if (p.norm_weight.given()) {
    g = times(g, norm_weight<kPart, X>(p.norm_weight, d, count));
    const Pair u = mixed<X>(r, pre);
    for (int i = 0; i < kStreams; ++i) sums[4 + i] = dot(r[i], u, sums[4 + i]);
    sums[8] = dot(g, u, sums[8]);
    sums[9] = dot(u, u, sums[9]);
  }
  for (int i = 0; i < kStreams; ++i) sums[i] = dot(r[i], g, sums[i]);
}

// grad_pre[i] = <r_i, gradient of the input before its norm> of one token, and the factors of that gradient.
template <class X>
DSV4_INLINE void pre_dots(const BackwardProblem<X>& p, int64_t token, MhcTokenGradient* out, float* grad_pre) {
  const int64_t hidden = p.streams.hidden;
  __m512 sums[16];
  for (int k = 0; k < 16; ++k) sums[k] = _mm512_setzero_ps();
  int64_t d = 0;
  for (; d + kStep <= hidden; d += kStep) add_dots<false>(p, token, out->pre, d, kStep, sums);
  if (d < hidden) add_dots<true>(p, token, out->pre, d, hidden - d, sums);
  alignas(64) float s[16];
  _mm512_store_ps(s, totals<16>(sums));
  out->rms = 1, out->norm_along = 0;
  for (int i = 0; i < kStreams; ++i) grad_pre[i] = s[i];
  if (!p.norm_weight.given()) return;
  // In double: the two terms of grad_pre nearly cancel, and would show the rounding of rms.
  const double width = static_cast<double>(hidden), rms = 1 / std::sqrt(s[9] / width + p.rms_eps);
  const double along = rms * rms * rms * s[8] / width;
  for (int i = 0; i < kStreams; ++i) grad_pre[i] = static_cast<float>(rms * s[i] - along * s[4 + i]);
  out->rms = static_cast<float>(rms), out->norm_along = static_cast<float>(along);
}

// Tokens [first, first + count) up to their MhcTokenGradient. `backwards`: the last slice of fn first, as in the
// forward pass.
template <class Product, class X, int kOutputs>
void token_gradients(const BackwardProblem<X>& p, int64_t first, int64_t count, bool backwards, const void* packed,
                     MhcTokenGradient* out) {
  constexpr int kTokens = Product::kGroups * kTile;
  alignas(64) float sums[kTokens][kSums] = {}, parts[Product::kMaxSlices][kTokens][kSums], grads[kTile][kSums];
  const Slices slices = Product::slices(p.streams.hidden);
  for (int i = 0; i < slices.count; ++i) {
    const int s = backwards ? slices.count - 1 - i : i;
    Product::template many<X, kOutputs>(p.streams.part(first, count), packed, slices[s],
                                        {nullptr, p.streams.token, 0, nullptr, 0, 0}, parts[s]);
  }
  for (int s = 0; s < slices.count; ++s) add(parts[s], count, s == 0, sums);
  const int64_t width = kStreams * p.streams.hidden;
  for (int64_t tile = 0; tile < count; tile += kTile) {
    const float (*rows)[kSums] = sums + tile;
    __m512 pre[4];
    pre_weights(rows, p.mixing, reciprocal_rms(column(rows, kSquares), width, p.mixing.norm_eps), pre);
    const float* lanes = reinterpret_cast<const float*>(pre);
    const int64_t tokens = std::min<int64_t>(kTile, count - tile);
    memset(grads, 0, sizeof(grads));
    for (int64_t t = 0; t < tokens; ++t) {
      const int64_t token = first + tile + t;
      for (int i = 0; i < kStreams; ++i) out[token].pre[i] = lanes[16 * i + t];
      pre_dots(p, token, out + token, grads[t]);
      if (kOutputs != kMixes) continue;
      for (int i = 0; i < 4; ++i) grads[t][4 + i] = p.grad_post[token * p.grad_post_stride + i];
      for (int k = 0; k < 16; ++k) grads[t][8 + k] = p.grad_comb[token * p.grad_comb_stride + k];
    }
    mixing_backward<kOutputs>(rows, grads, p.mixing, width, tokens, out + first + tile);
  }
}

// The gradient of the input of up to kFew tokens before its norm over a run, and the sums over them of d norm_weight.
template <class X>
void input_gradients(const BackwardProblem<X>& p, const MhcTokenGradient* tokens, int64_t first, int64_t count,
                     Steps run, const Held<X>& held) {
  const bool norm = p.norm_weight.given();
  if (norm) memset(held.norm_few, 0, sizeof(float) * kRun);
  for (int64_t t = 0; t < count; ++t) {
    const int64_t token = first + t;
    const __m512 rms = _mm512_set1_ps(tokens[token].rms), along = _mm512_set1_ps(-tokens[token].norm_along);
    const auto step = [&](int64_t d, int64_t left, auto part) __attribute__((always_inline)) {
      constexpr bool kPart = decltype(part)::value;
      const int64_t to = d - run.begin * kStep;
      Pair grad = get<kPart>(p.grad(token) + d, left);
      if (norm) {
        Pair r[kStreams];
        for (int i = 0; i < kStreams; ++i) r[i] = get<kPart>(p.r(token, i) + d, left);
        const Pair u = mixed<X>(r, tokens[token].pre);
        store(held.norm_few + to, fma(times(u, grad), rms, load(held.norm_few + to)));
        grad = fma(u, along, scaled(times(grad, norm_weight<kPart, X>(p.norm_weight, d, left)), rms));
      }
      store(held.grad[t] + to, grad);
    };
    for (int64_t d = run.begin * kStep; d < run.end * kStep; d += kStep) {
      const int64_t left = p.streams.hidden - d;
      if (left >= kStep) {
        step(d, kStep, std::false_type());
      } else {
        step(d, left, std::true_type());
      }
    }
  }
  for (int64_t d = 0; norm && d < kRun; ++d) held.norm[d] += held.norm_few[d];
}

// A token's d streams over a run, one stream: what they are made of beside fn^T dz, and where they go. `held` becomes a
// copy of the row.
template <class X, Store kStore>
struct StreamRow {
  const X *r, *next;                  // next: of the token that has this place later, fetched
  const X *residual, *next_residual;  // or null
  const float* grad;
  X *held, *out;
  float along, pre;

  __attribute__((always_inline)) StreamRow(const BackwardProblem<X>& p, const MhcTokenGradient* tokens, int64_t token,
                                           int stream, Steps run, X* held_row, const float* held_grad)
      : r(p.r(token, stream) + run.begin * kStep),
        next(r + kFew * p.streams.token),
        residual(nullptr),
        next_residual(nullptr),
        grad(held_grad),
        held(held_row),
        along(-tokens[token].along),
        pre(tokens[token].pre[stream]) {
    const AnyView<3>&more = p.grad_residual, &to = p.grad_streams;
    if (more.given()) {
      residual =
          static_cast<const X*>(more.data) + token * more.stride[0] + stream * more.stride[1] + run.begin * kStep;
      next_residual = residual + kFew * more.stride[0];
    }
    out = static_cast<X*>(to.data) + token * to.stride[0] + stream * to.stride[1] + run.begin * kStep;
  }

  template <Store kTo>
  __attribute__((always_inline)) void put_step(int64_t d, int64_t count, Pair sum) const {
    constexpr bool kPart = kTo == Store::kPart;
    prefetch(next + d);
    const Pair x = copy<kPart>(r + d, held + d, count);
    // The largest terms come last: they would round the small ones.
    sum = fma(x, _mm512_set1_ps(along), sum);
    sum = fma(load(grad + d), _mm512_set1_ps(pre), sum);
    if (residual != nullptr) {
      prefetch(next_residual + d);
      const Pair more = get<kPart>(residual + d, count);
      sum = {_mm512_add_ps(sum.a, more.a), _mm512_add_ps(sum.b, more.b)};
    }
    put<kTo>(out + d, sum, count);
  }
  // Of `width` elements, sum those from d on.
  __attribute__((always_inline)) void finish(int64_t d, int64_t width, Pair sum) const {
    if (d + kStep <= width) {
      put_step<kStore>(d, kStep, sum);
    } else {
      put_step<Store::kPart>(d, width - d, sum);
    }
  }
};

// A run over the tokens of a group: d streams, and the sums over the group.
template <class Gradient, class X, int kOutputs, Store kStore>
void run_gradients(const BackwardProblem<X>& p, const MhcTokenGradient* tokens, const void* fn, int64_t group,
                   Steps run, const Held<X>& held) {
  auto& factors = *static_cast<typename Gradient::template Factors<kOutputs>*>(held.factors);
  const int64_t end = std::min((group + 1) * kGroup, p.streams.tokens);
  constexpr int64_t kTotals = Gradient::template kTotals<kOutputs>;
  memset(held.totals, 0, sizeof(float) * kStreams * kTotals);
  memset(held.norm, 0, sizeof(float) * kRun);
  for (int64_t first = group * kGroup; first < end; first += kBlock) {
    const int64_t count = std::min<int64_t>(kBlock, end - first);
    Gradient::template prepare<kOutputs>(tokens + first, count, &factors);
    for (int64_t at = 0; at < count; at += kFew) {
      const int64_t few = std::min<int64_t>(kFew, count - at);
      input_gradients(p, tokens, first + at, few, run, held);
      const auto row = [&](int stream, int64_t t) __attribute__((always_inline)) {
        return StreamRow<X, kStore>(p, tokens, first + at + t, stream, run, held.rows[stream][at + t], held.grad[t]);
      };
      Gradient::template streams<kOutputs>(factors, at, few, fn, p.streams.hidden, run, row);
    }
    for (int stream = 0; p.wants_fn() && stream < kStreams; ++stream) {
      Gradient::template add_fn<kOutputs>(factors, held.rows[stream], count, run.end - run.begin,
                                          held.totals + stream * kTotals);
    }
  }
  if (kStore == Store::kPastCaches) _mm_sfence();
}

// The sums over all tokens, where one group does not have them.
template <int kOutputs, class X>
void sum_groups(const BackwardProblem<X>& p, const float* fn, const float* norm, const Context& context) {
  const int64_t groups = p.groups(), hidden = p.streams.hidden, width = kStreams * hidden;
  if (groups == 1) return;
  const auto sum = [&](const float* from, int64_t stride, int64_t count, float* to) {
    for (int64_t d = 0; d < count; ++d) to[d] = groups == 0 ? 0.f : from[d];
    for (int64_t group = 1; group < groups; ++group) {
      for (int64_t d = 0; d < count; ++d) to[d] += from[group * stride + d];
    }
  };
  parallel(context, p.wants_fn() ? kOutputs : 0, [&](int64_t begin, int64_t end) {
    for (int64_t j = begin; j < end; ++j) sum(fn + j * width, kOutputs * width, width, p.grad_fn.at(j));
  });
  if (p.norm_weight.given()) sum(norm, hidden, hidden, p.grad_norm_weight);
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

template <class Product, class Gradient, class X, int kOutputs>
void backward(const BackwardProblem<X>& p, const View<float, 1>& grad_scale, const View<float, 1>& grad_base,
              const Workspace& workspace, const Context& context) {
  const int64_t tokens = p.streams.tokens, hidden = p.streams.hidden, groups = p.groups();
  const BackwardMemory<Product, Gradient, X, kOutputs> memory(workspace.data, tokens, hidden, context.threads);
  parallel(context, Product::kParts, [&](int64_t begin, int64_t end) {
    for (int64_t part = begin; part < end; ++part) {
      Product::template pack<kOutputs>(p.mixing.fn, hidden, part, memory.packed);
      Gradient::template pack<kOutputs>(p.mixing.fn, hidden, part, memory.fn);
    }
  });
  constexpr int64_t kTokens = Product::kGroups * kTile;
  parallel(context, (tokens + kTokens - 1) / kTokens, [&](int64_t begin, int64_t end) {
    for (int64_t block = begin; block < end; ++block) {
      const int64_t first = block * kTokens;
      token_gradients<Product, X, kOutputs>(p, first, std::min(kTokens, tokens - first), block % 2 == 1, memory.packed,
                                            memory.tokens);
    }
  });
  const int64_t steps = (hidden + kStep - 1) / kStep, runs = (steps + kRunSteps - 1) / kRunSteps;
  const void* fn = Gradient::bytes(hidden, kOutputs) > 0 ? memory.fn : memory.packed;
  const bool past = past_caches(p.grad_streams, sizeof(X));
  spread(context, context.threads, groups * runs, [&](int64_t slot, int64_t item) {
    const int64_t group = item / runs, first = item % runs * kRunSteps;
    const Steps run{first, std::min(first + kRunSteps, steps), std::min<int64_t>(kRun, hidden - first * kStep)};
    const Held<X> held = memory.slot(slot);
    if (past) {
      run_gradients<Gradient, X, kOutputs, Store::kPastCaches>(p, memory.tokens, fn, group, run, held);
    } else {
      run_gradients<Gradient, X, kOutputs, Store::kWhole>(p, memory.tokens, fn, group, run, held);
    }
    for (int stream = 0; p.wants_fn() && stream < kStreams; ++stream) {
      for (int j = 0; j < kOutputs; ++j) {
        float* to = groups == 1 ? p.grad_fn.at(j) : memory.fn_sums + (group * kOutputs + j) * kStreams * hidden;
        for (int64_t step = run.begin; step < run.end; ++step) {
          const float* totals = held.totals + stream * Gradient::template kTotals<kOutputs>;
          const Pair sum = Gradient::template total<kOutputs>(totals, step - run.begin, j);
          store(to + stream * hidden + step * kStep, sum, std::min<int64_t>(kStep, hidden - step * kStep));
        }
      }
    }
    if (!p.norm_weight.given()) return;
    float* to = groups == 1 ? p.grad_norm_weight : memory.norm_sums + group * hidden;
    const int64_t at = run.begin * kStep;
    memcpy(to + at, held.norm, static_cast<size_t>(run.width) * sizeof(float));
  });
  sum_groups<kOutputs>(p, memory.fn_sums, memory.norm_sums, context);
  small_sums(memory.tokens, tokens, kOutputs, grad_scale, grad_base);
}

template <class Product, class Gradient, class X>
Status pre_backward(const MhcPreBackwardParams& a, const Context& context) {
  const BackwardProblem<X> p{Rows<X>(a.streams),
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
                             a.grad_fn,
                             a.grad_norm_weight.data};
  backward<Product, Gradient, X, kMixes>(p, a.grad_scale, a.grad_base, a.workspace, context);
  return Status::ok();
}

template <class Product, class Gradient, class X>
Status head_backward(const MhcHeadBackwardParams& a, const Context& context) {
  const BackwardProblem<X> p{
      Rows<X>(a.streams), a.grad_output, {}, a.grad_streams, nullptr, nullptr, 0, 0, a.mixing, {}, 0.f,
      a.grad_fn,          nullptr};
  backward<Product, Gradient, X, kStreams>(p, a.grad_scale, a.grad_base, a.workspace, context);
  return Status::ok();
}

template <class Product, class Gradient, class X>
int64_t backward_bytes(int64_t tokens, int64_t hidden, int mixes, const Context& context) {
  return mixes == kMixes
             ? BackwardMemory<Product, Gradient, X, kMixes>(nullptr, tokens, hidden, context.threads).bytes
             : BackwardMemory<Product, Gradient, X, kStreams>(nullptr, tokens, hidden, context.threads).bytes;
}

}  // namespace
}  // namespace dsv4::avx512
