// The forward mHC ops for any way of computing the product of fn with the streams. A Product is a struct of static
// functions:
//   bytes(hidden, mixes)                  what all of fn takes once packed
//   pack<X>(fn, mixes, hidden, part, to)  packs one of kParts parts of fn
//   segment<X>(...)                       the products and squares of up to 16 tokens over one stream
// A token's product is the sum over its 4 streams, first to last, each summed in an order that only D decides. So the
// result depends neither on the tile the token falls into nor on whether fn was packed before (many tokens) or on the
// way (few).
#pragma once

#include "cpu/avx512/mhc_mixing.h"

namespace dsv4::avx512 {

template <class X>
struct Rows {
  const X* data;
  int64_t token, stream;  // strides
  int64_t tokens, hidden;

  explicit Rows(const AnyView<3>& view)
      : data(static_cast<const X*>(view.data)),
        token(view.stride[0]),
        stream(view.stride[1]),
        tokens(view.shape[0]),
        hidden(view.shape[2]) {}
};

// A tile's streams should stay in the second-level cache between the product and the weighted sum.
template <class X>
DSV4_INLINE int64_t tile_tokens(int64_t hidden) {
  constexpr int64_t kBytes = 512 * 1024;
  const int64_t fit = kBytes / (kStreams * hidden * static_cast<int64_t>(sizeof(X))) & ~int64_t{1};
  return fit < 2 ? 2 : fit > kTile ? kTile : fit;
}

// sum_i pre[i] * streams[i] of one token, and the RMSNorm of it where norm_weight is given.
template <class X, class W>
DSV4_INLINE void collapse(const X* streams, int64_t stride, int64_t hidden, const float* pre, X* out,
                          const W* norm_weight, float rms_eps) {
  const __m512 w0 = _mm512_set1_ps(pre[0]), w1 = _mm512_set1_ps(pre[1]), w2 = _mm512_set1_ps(pre[2]),
               w3 = _mm512_set1_ps(pre[3]);
  __m512 squares = _mm512_setzero_ps();
  int64_t d = 0;
  for (; d + kStep <= hidden; d += kStep) {
    const X* r = streams + d;
    Pair sum = scaled(load(r), w0);
    sum = fma(load(r + stride), w1, sum);
    sum = fma(load(r + 2 * stride), w2, sum);
    sum = rounded(fma(load(r + 3 * stride), w3, sum), out);
    squares = dot(sum, sum, squares);
    store(out + d, sum);
  }
  const int64_t tail = hidden - d;
  if (tail > 0) {
    const X* r = streams + d;
    Pair sum = scaled(load(r, tail), w0);
    sum = fma(load(r + stride, tail), w1, sum);
    sum = fma(load(r + 2 * stride, tail), w2, sum);
    sum = rounded(fma(load(r + 3 * stride, tail), w3, sum), out);
    squares = dot(sum, sum, squares);
    store(out + d, sum, tail);
  }
  if (norm_weight == nullptr) return;
  const __m512 total = _mm512_set1_ps(_mm512_reduce_add_ps(squares));
  const __m512 rms = reciprocal_rms(total, hidden, rms_eps);
  for (d = 0; d + kStep <= hidden; d += kStep) {
    const Pair w = load_as(norm_weight + d, out), x = scaled(load(out + d), rms);
    store(out + d, Pair{_mm512_mul_ps(x.a, w.a), _mm512_mul_ps(x.b, w.b)});
  }
  if (tail > 0) {
    const Pair w = load_as(norm_weight + d, tail, out), x = scaled(load(out + d, tail), rms);
    store(out + d, Pair{_mm512_mul_ps(x.a, w.a), _mm512_mul_ps(x.b, w.b)}, tail);
  }
}

enum class Store { kWhole, kPastCaches, kPart };

// One step of the new streams of a token, `count` elements of it if kPart. Past the caches where the result is too
// large to be found there again.
template <class X, Store kStore>
DSV4_INLINE void post_step(const X* sublayer, const X* streams, int64_t stride, const float* post, const float* comb,
                           X* result, int64_t result_stride, int64_t count) {
  constexpr bool kPart = kStore == Store::kPart;
  const Pair y = kPart ? load(sublayer, count) : load(sublayer);
  Pair r[kStreams];
#pragma GCC unroll 4
  for (int i = 0; i < kStreams; ++i) r[i] = kPart ? load(streams + i * stride, count) : load(streams + i * stride);
#pragma GCC unroll 4
  for (int o = 0; o < kStreams; ++o) {
    Pair sum = scaled(y, _mm512_set1_ps(post[o]));
#pragma GCC unroll 4
    for (int i = 0; i < kStreams; ++i) sum = fma(r[i], _mm512_set1_ps(comb[4 * i + o]), sum);
    if (kPart) {
      store(result + o * result_stride, sum, count);
    } else if (kStore == Store::kPastCaches) {
      stream(result + o * result_stride, sum);
    } else {
      store(result + o * result_stride, sum);
    }
  }
}

template <class X, Store kStore>
DSV4_INLINE void post_tokens(const MhcPostParams& p, int64_t begin, int64_t end) {
  const Rows<X> rows(p.streams);
  const int64_t stride = p.result.stride[1];
  for (int64_t t = begin; t < end; ++t) {
    const X* sublayer = static_cast<const X*>(p.sublayer.data) + t * p.sublayer.stride[0];
    const X* streams = rows.data + t * rows.token;
    const float *post = p.post.data + t * p.post.stride[0], *comb = p.comb.data + t * p.comb.stride[0];
    X* result = static_cast<X*>(p.result.data) + t * p.result.stride[0];
    int64_t d = 0;
    for (; d + kStep <= rows.hidden; d += kStep) {
      post_step<X, kStore>(sublayer + d, streams + d, rows.stream, post, comb, result + d, stride, kStep);
    }
    if (d < rows.hidden) {
      post_step<X, Store::kPart>(sublayer + d, streams + d, rows.stream, post, comb, result + d, stride,
                                 rows.hidden - d);
    }
  }
  if (kStore == Store::kPastCaches) _mm_sfence();
}

// Adds up the streams' sums: parts[stream][token][kSums] to parts[0].
DSV4_INLINE void add_segments(float (*parts)[kTile][kSums], int64_t tokens) {
  for (int64_t t = 0; t < tokens; ++t) {
    for (int j = 0; j < kSums; j += 16) {
      __m512 sum = _mm512_load_ps(parts[0][t] + j);
      for (int s = 1; s < kStreams; ++s) sum = _mm512_add_ps(sum, _mm512_load_ps(parts[s][t] + j));
      _mm512_store_ps(parts[0][t] + j, sum);
    }
  }
}

// rows[token][0:4] = pre; post and comb go to their tensors.
DSV4_INLINE void tile_weights(const MhcPreParams& p, int64_t first, int64_t tokens, float (*rows)[kSums]) {
  MixingWeights weights;
  mixing_weights(rows, p.mixing, kStreams * p.streams.shape[2], &weights);
  const float* lanes = reinterpret_cast<const float*>(&weights);  // [24][16]
  for (int64_t t = 0; t < tokens; ++t) {
    float* post = p.post.data + (first + t) * p.post.stride[0];
    float* comb = p.comb.data + (first + t) * p.comb.stride[0];
    for (int i = 0; i < 4; ++i) rows[t][i] = lanes[16 * i + t];
    for (int i = 0; i < 4; ++i) post[i] = lanes[16 * (4 + i) + t];
    for (int i = 0; i < 16; ++i) comb[i] = lanes[16 * (8 + i) + t];
  }
}

template <class X>
DSV4_INLINE void pre_collapse(const MhcPreParams& p, int64_t token, const float* pre) {
  const Rows<X> rows(p.streams);
  X* out = static_cast<X*>(p.input.data) + token * p.input.stride[0];
  const X* r = rows.data + token * rows.token;
  if (p.norm_weight.dtype == DType::kFloat32) {
    collapse(r, rows.stream, rows.hidden, pre, out, static_cast<const float*>(p.norm_weight.data), p.rms_eps);
  } else {
    collapse(r, rows.stream, rows.hidden, pre, out, static_cast<const X*>(p.norm_weight.data), p.rms_eps);
  }
}

struct PreOp {
  static constexpr int kOutputs = kMixes;
  const MhcPreParams& p;
  const MhcPostParams* before;  // mhc_post_pre: makes the streams of a tile before they are read

  template <class X>
  DSV4_INLINE void prepare(const PreOp& op, int64_t begin, int64_t end) {
    if (op.before != nullptr) post_tokens<X, Store::kWhole>(*op.before, begin, end);
  }
  DSV4_INLINE void weights(const PreOp& op, int64_t first, int64_t tokens, float (*rows)[kSums]) {
    tile_weights(op.p, first, tokens, rows);
  }
  template <class X>
  DSV4_INLINE void finish(const PreOp& op, int64_t token, const float* pre) {
    pre_collapse<X>(op.p, token, pre);
  }
};

struct HeadOp {
  static constexpr int kOutputs = kStreams;
  const MhcHeadParams& p;

  template <class X>
  DSV4_INLINE void prepare(const HeadOp&, int64_t, int64_t) {}
  DSV4_INLINE void weights(const HeadOp& op, int64_t, int64_t tokens, float (*rows)[kSums]) {
    __m512 pre[4];
    const int64_t width = kStreams * op.p.streams.shape[2];
    pre_weights(rows, op.p.mixing, reciprocal_rms(column(rows, kSquares), width, op.p.mixing.norm_eps), pre);
    const float* lanes = reinterpret_cast<const float*>(pre);
    for (int64_t t = 0; t < tokens; ++t) {
      for (int i = 0; i < 4; ++i) rows[t][i] = lanes[16 * i + t];
    }
  }
  template <class X>
  DSV4_INLINE void finish(const HeadOp& op, int64_t token, const float* pre) {
    const Rows<X> rows(op.p.streams);
    X* out = static_cast<X*>(op.p.output.data) + token * op.p.output.stride[0];
    collapse(rows.data + token * rows.token, rows.stream, rows.hidden, pre, out, static_cast<const X*>(nullptr), 0.f);
  }
};

// Few tokens: the streams are spread over the threads, and fn is packed on the way.
template <class Product, class X, class Op>
void run_single_tile(const Op& op, const Context& context) {
  const Rows<X> rows(op.p.streams);
  alignas(64) float parts[kStreams][kTile][kSums] = {};
  parallel(context, rows.tokens, [&](int64_t begin, int64_t end) { Op::template prepare<X>(op, begin, end); });
  parallel(context, kStreams, [&](int64_t begin, int64_t end) {
    for (int64_t s = begin; s < end; ++s) {
      Product::template segment<X, Op::kOutputs>(rows, 0, rows.tokens, s, op.p.mixing.fn, nullptr, parts[s]);
    }
  });
  add_segments(parts, rows.tokens);
  Op::weights(op, 0, rows.tokens, parts[0]);
  parallel(context, rows.tokens, [&](int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; ++t) Op::template finish<X>(op, t, parts[0][t]);
  });
}

template <class Product, class X, class Op>
void run_tiles(const Op& op, const Context& context) {
  const Rows<X> rows(op.p.streams);
  void* packed = op.p.workspace.data;
  parallel(context, Product::kParts, [&](int64_t begin, int64_t end) {
    for (int64_t part = begin; part < end; ++part) {
      Product::template pack<X, Op::kOutputs>(op.p.mixing.fn, rows.hidden, part, packed);
    }
  });
  const int64_t tile = tile_tokens<X>(rows.hidden), tiles = (rows.tokens + tile - 1) / tile;
  parallel(context, tiles, [&](int64_t begin, int64_t end) {
    alignas(64) float parts[kStreams][kTile][kSums] = {};
    for (int64_t index = begin; index < end; ++index) {
      const int64_t first = index * tile, count = first + tile <= rows.tokens ? tile : rows.tokens - first;
      Op::template prepare<X>(op, first, first + count);
      for (int s = 0; s < kStreams; ++s) {
        Product::template segment<X, Op::kOutputs>(rows, first, count, s, op.p.mixing.fn, packed, parts[s]);
      }
      add_segments(parts, count);
      Op::weights(op, first, count, parts[0]);
      for (int64_t t = 0; t < count; ++t) Op::template finish<X>(op, first + t, parts[0][t]);
    }
  });
}

template <class Product, class X, class Op>
Status run(const Op& op, const Context& context) {
  if (op.p.streams.shape[0] == 0) return Status::ok();
  if (op.p.streams.shape[0] <= tile_tokens<X>(op.p.streams.shape[2])) {
    run_single_tile<Product, X>(op, context);
  } else {
    run_tiles<Product, X>(op, context);
  }
  return Status::ok();
}

}  // namespace dsv4::avx512
