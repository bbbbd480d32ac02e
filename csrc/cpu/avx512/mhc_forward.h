// The forward mHC ops for any way of computing the product of fn with the streams. A Product is a struct of static
// functions:
//   slices(hidden)                            the slices of the hidden width that are summed by themselves
//   pack<kOutputs>(fn, hidden, part, to)      packs one of kParts parts of fn
//   many<X, kOutputs>(rows, packed, slice, traffic, out)
//                                             the products and squares of up to kGroups kTile tokens over a slice, fn
//                                             packed
//   few<X, kOutputs>(rows, fn, context, out)  the same over all slices of up to kTile tokens that are all there are, fn
//                                             as it is
// A token's result must be the same either way, in any company. Many tokens go in blocks of kGroups kTile, which stay
// in the second-level cache between the product and the weighted sum. kAhead: tokens from what is weighted to what is
// fetched meanwhile; 0: nothing.
#pragma once

#include <algorithm>

#include "cpu/avx512/mhc_mixing.h"
#include "cpu/mhc.h"

namespace dsv4::avx512 {

// Parts of the hidden width, cut at multiples of two steps.
struct Slices {
  struct Range {
    int64_t begin, end;
  };
  int64_t hidden;
  int count;

  __attribute__((always_inline)) Range operator[](int slice) const { return {cut(slice), cut(slice + 1)}; }
  DSV4_INLINE Range all(int64_t hidden) { return {0, hidden}; }

 private:
  __attribute__((always_inline)) int64_t cut(int slice) const {
    const int64_t at = (hidden + 2 * kStep - 1) / (2 * kStep) * slice / count * 2 * kStep;
    return at < hidden ? at : hidden;
  }
};

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
  Rows(const X* first, int64_t token_stride, int64_t stream_stride, int64_t count, int64_t width)
      : data(first), token(token_stride), stream(stream_stride), tokens(count), hidden(width) {}

  Rows part(int64_t first, int64_t count) const { return {data + first * token, token, stream, count, hidden}; }
};

// The memory traffic that goes on while a tile is multiplied, spread over the product so that it costs no time of its
// own.
template <class X>
struct Traffic {
  // Rows to fetch: those that the next tile is made of, element for element. Null: the tile's own, a chunk ahead, for
  // the whole of the next tile would not fit into the second-level cache beside it.
  const X* fetch;
  int64_t fetch_token, fetch_stream;
  // Where the tile's rows are to be written past the caches. Null: nowhere.
  X* write;
  int64_t write_token, write_stream;

  DSV4_INLINE const X* fetch_at(const Traffic& t, const Rows<X>& rows, int stream, int64_t d, int64_t chunk) {
    if (t.fetch != nullptr) return t.fetch + stream * t.fetch_stream + d;
    if (d + chunk < rows.hidden) return rows.data + stream * rows.stream + d + chunk;
    return stream + 1 < kStreams ? rows.data + (stream + 1) * rows.stream : rows.data + rows.tokens * rows.token;
  }
};

template <class Product>
inline constexpr int64_t kTokens = Product::kGroups * kTile;  // of a block

// Where the work takes no longer than waking threads.
DSV4_INLINE Context on_this_thread(Context context) {
  context.parallel_for = [](void*, int64_t count, void (*body)(void*, int64_t, int64_t), void* argument) {
    if (count > 0) body(argument, 0, count);
  };
  return context;
}

// Results of more than kCachedBytes are stored past the caches: to read them before they are overwritten would add to
// the traffic of what nobody will find there anyway.
constexpr int64_t kCachedBytes = int64_t{8} << 20;

template <int N>
DSV4_INLINE bool past_caches(const AnyView<N>& result, int64_t size) {
  uintptr_t misaligned = reinterpret_cast<uintptr_t>(result.data);
  int64_t bytes = size;
  for (int axis = 0; axis < N; ++axis) {
    if (axis + 1 < N) misaligned |= static_cast<uintptr_t>(result.stride[axis] * size);
    bytes *= result.shape[axis];
  }
  return misaligned % 64 == 0 && bytes > kCachedBytes;
}

// rows += the sums over a slice, or = them.
DSV4_INLINE void add(const float (*slice)[kSums], int64_t tokens, bool first, float (*rows)[kSums]) {
  for (int64_t t = 0; t < tokens; ++t) {
    for (int j = 0; j < kSums; j += 16) {
      const __m512 x = _mm512_load_ps(slice[t] + j);
      _mm512_store_ps(rows[t] + j, first ? x : _mm512_add_ps(_mm512_load_ps(rows[t] + j), x));
    }
  }
}

// One step of sum_i pre[i] * streams[i] as X keeps it; adds its square where a norm follows.
template <Store kStore, class X>
DSV4_INLINE void collapse_step(const X* r, int64_t stride, const __m512* pre, X* out, int64_t count, bool norm,
                               __m512* squares, int64_t ahead) {
  constexpr bool kPart = kStore == Store::kPart;
  for (int i = 0; i < kStreams && ahead != 0; ++i) prefetch(r + i * stride + ahead);
  Pair sum = scaled(get<kPart>(r, count), pre[0]);
#pragma GCC unroll 3
  for (int i = 1; i < kStreams; ++i) sum = fma(get<kPart>(r + i * stride, count), pre[i], sum);
  put<kStore>(out, sum, count);
  if (!norm) return;
  sum = nearest<X>(sum);
  *squares = dot(sum, sum, *squares);
}

template <bool kPart, class X, class W>
DSV4_INLINE void scale_step(X* out, const W* weight, __m512 rms, int64_t count) {
  const Pair w = get<kPart>(weight, count), x = scaled(get<kPart>(out, count), rms);
  put<kPart ? Store::kPart : Store::kWhole>(out, {_mm512_mul_ps(x.a, w.a), _mm512_mul_ps(x.b, w.b)}, count);
}

// sum_i pre[i] * streams[i] of one token, and the RMSNorm of it where norm_weight is given.
template <class X, class W>
DSV4_INLINE void collapse(const X* streams, int64_t stride, int64_t hidden, const float* pre, X* out,
                          const W* norm_weight, float rms_eps, int64_t ahead, bool past_caches) {
  const bool norm = norm_weight != nullptr;
  const int64_t whole = hidden / kStep * kStep, tail = hidden - whole;
  __m512 weights[kStreams], squares = _mm512_setzero_ps();
  for (int i = 0; i < kStreams; ++i) weights[i] = _mm512_set1_ps(pre[i]);
  if (past_caches && !norm) {
    for (int64_t d = 0; d < whole; d += kStep) {
      collapse_step<Store::kPastCaches>(streams + d, stride, weights, out + d, kStep, false, &squares, ahead);
    }
  } else {
    for (int64_t d = 0; d < whole; d += kStep) {
      collapse_step<Store::kWhole>(streams + d, stride, weights, out + d, kStep, norm, &squares, ahead);
    }
  }
  if (tail > 0) {
    collapse_step<Store::kPart>(streams + whole, stride, weights, out + whole, tail, norm, &squares, ahead);
  }
  if (!norm) return;
  const __m512 rms = reciprocal_rms(_mm512_set1_ps(_mm512_reduce_add_ps(squares)), hidden, rms_eps);
  for (int64_t d = 0; d < whole; d += kStep) scale_step<false>(out + d, norm_weight + d, rms, kStep);
  if (tail > 0) scale_step<true>(out + whole, norm_weight + whole, rms, tail);
}

// One step of the new streams of a token, `count` elements of it if kPart.
template <class X, Store kStore>
DSV4_INLINE void post_step(const X* sublayer, const X* streams, int64_t stride, const float* post, const float* comb,
                           X* result, int64_t result_stride, int64_t count) {
  constexpr bool kPart = kStore == Store::kPart;
  const Pair y = get<kPart>(sublayer, count);
  Pair r[kStreams];
#pragma GCC unroll 4
  for (int i = 0; i < kStreams; ++i) r[i] = get<kPart>(streams + i * stride, count);
#pragma GCC unroll 4
  for (int o = 0; o < kStreams; ++o) {
    Pair sum = scaled(y, _mm512_set1_ps(post[o]));
#pragma GCC unroll 4
    for (int i = 0; i < kStreams; ++i) sum = fma(r[i], _mm512_set1_ps(comb[4 * i + o]), sum);
    put<kStore>(result + o * result_stride, sum, count);
  }
}

// A slice of the new streams of tokens [begin, end), the first of them at `result`.
template <class X, Store kStore>
DSV4_INLINE void post_tokens(const MhcPostParams& p, int64_t begin, int64_t end, Slices::Range slice, X* result,
                             int64_t token, int64_t stride) {
  const Rows<X> rows(p.streams);
  const int64_t tail = (slice.end - slice.begin) % kStep, whole = slice.end - tail;
  for (int64_t t = begin; t < end; ++t, result += token) {
    const X* sublayer = static_cast<const X*>(p.sublayer.data) + t * p.sublayer.stride[0];
    const X* streams = rows.data + t * rows.token;
    const float *post = p.post.data + t * p.post.stride[0], *comb = p.comb.data + t * p.comb.stride[0];
    for (int64_t d = slice.begin; d < whole; d += kStep) {
      prefetch(sublayer + p.sublayer.stride[0] + d);
      post_step<X, kStore>(sublayer + d, streams + d, rows.stream, post, comb, result + d, stride, kStep);
    }
    if (tail > 0) {
      post_step<X, Store::kPart>(sublayer + whole, streams + whole, rows.stream, post, comb, result + whole, stride,
                                 tail);
    }
  }
  if (kStore == Store::kPastCaches) _mm_sfence();
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
DSV4_INLINE void pre_collapse(const MhcPreParams& p, int64_t token, const X* r, int64_t stride, const float* pre,
                              int64_t ahead) {
  X* out = static_cast<X*>(p.input.data) + token * p.input.stride[0];
  const int64_t hidden = p.streams.shape[2];
  const bool past = past_caches(p.input, sizeof(X));
  if (p.norm_weight.dtype == DType::kFloat32) {
    collapse(r, stride, hidden, pre, out, static_cast<const float*>(p.norm_weight.data), p.rms_eps, ahead, past);
  } else {
    collapse(r, stride, hidden, pre, out, static_cast<const X*>(p.norm_weight.data), p.rms_eps, ahead, past);
  }
}

struct PreOp {
  static constexpr int kOutputs = kMixes;
  const MhcPreParams& p;
  const MhcPostParams* before;  // mhc_post_pre: makes the streams of a block before they are read

  DSV4_INLINE bool keeps(const PreOp& op) {
    return op.before != nullptr && past_caches(op.before->result, op.p.streams.dtype == DType::kBFloat16 ? 2 : 4);
  }
  // The streams of tokens [first, first + count). New ones that will be written past the caches are in `kept`, which
  // has room for a block.
  template <class X>
  DSV4_INLINE Rows<X> rows(const PreOp& op, int64_t first, int64_t count, X* kept) {
    const Rows<X> streams = Rows<X>(op.p.streams).part(first, count);
    return keeps(op) ? Rows<X>(kept, kStreams * streams.hidden, streams.hidden, count, streams.hidden) : streams;
  }
  // Makes a slice of them.
  template <class X>
  DSV4_INLINE void make(const PreOp& op, int64_t first, const Rows<X>& rows, Slices::Range slice) {
    if (op.before == nullptr) return;
    post_tokens<X, Store::kWhole>(*op.before, first, first + rows.tokens, slice, const_cast<X*>(rows.data), rows.token,
                                  rows.stream);
  }
  template <class X>
  DSV4_INLINE Traffic<X> traffic(const PreOp& op, int64_t first, int64_t next) {
    if (op.before == nullptr) return {nullptr, op.p.streams.stride[0], 0, nullptr, 0, 0};
    const Rows<X> from(op.before->streams), to(op.before->result);
    X* write = keeps(op) ? static_cast<X*>(op.before->result.data) + first * to.token : nullptr;
    return {from.data + next * from.token, from.token, from.stream, write, to.token, to.stream};
  }
  DSV4_INLINE void weights(const PreOp& op, int64_t first, int64_t tokens, float (*rows)[kSums]) {
    tile_weights(op.p, first, tokens, rows);
  }
  template <class X>
  DSV4_INLINE void finish(const PreOp& op, int64_t token, const X* r, int64_t stride, const float* pre, int64_t ahead) {
    pre_collapse(op.p, token, r, stride, pre, ahead);
  }
};

struct HeadOp {
  static constexpr int kOutputs = kStreams;
  const MhcHeadParams& p;

  DSV4_INLINE bool keeps(const HeadOp&) { return false; }
  template <class X>
  DSV4_INLINE Rows<X> rows(const HeadOp& op, int64_t first, int64_t count, X*) {
    return Rows<X>(op.p.streams).part(first, count);
  }
  template <class X>
  DSV4_INLINE void make(const HeadOp&, int64_t, const Rows<X>&, Slices::Range) {}
  template <class X>
  DSV4_INLINE Traffic<X> traffic(const HeadOp& op, int64_t, int64_t) {
    return {nullptr, op.p.streams.stride[0], 0, nullptr, 0, 0};
  }
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
  DSV4_INLINE void finish(const HeadOp& op, int64_t token, const X* r, int64_t stride, const float* pre,
                          int64_t ahead) {
    X* out = static_cast<X*>(op.p.output.data) + token * op.p.output.stride[0];
    collapse(r, stride, op.p.streams.shape[2], pre, out, static_cast<const X*>(nullptr), 0.f, ahead,
             past_caches(op.p.output, sizeof(X)));
  }
};

// Few tokens: every step is spread over the threads.
template <class Product, class X, class Op>
void run_few(const Op& op, const Context& all_threads) {
  constexpr int64_t kSmall = 8192;  // elements of fn and tokens together, a stream: 10 to 20 us
  const int64_t tokens = op.p.streams.shape[0], hidden = op.p.streams.shape[2];
  const Context context = (tokens + 2) * hidden <= kSmall ? on_this_thread(all_threads) : all_threads;
  alignas(64) float sums[kTile][kSums] = {};
  const Rows<X> rows(op.p.streams);
  parallel(context, tokens, [&](int64_t begin, int64_t end) {
    Op::make(op, begin, rows.part(begin, end - begin), Slices::all(hidden));
  });
  Product::template few<X, Op::kOutputs>(rows, op.p.mixing.fn, context, sums);
  Op::weights(op, 0, tokens, sums);
  parallel(context, tokens, [&](int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; ++t)
      Op::finish(op, t, rows.data + t * rows.token, rows.stream, sums[t], rows.token);
    _mm_sfence();
  });
}

// A block of tokens on one thread, in rows that are there or will be made. `backwards`: the last slice first, whose
// part of fn the block before has left in the cache.
template <class Product, class X, class Op>
void run_block(const Op& op, int64_t first, const Rows<X>& rows, bool backwards) {
  alignas(64) float sums[kTokens<Product>][kSums] = {}, parts[Product::kMaxSlices][kTokens<Product>][kSums];
  const Slices slices = Product::slices(rows.hidden);
  const Traffic<X> traffic = Op::template traffic<X>(op, first, first + rows.tokens);
  for (int i = 0; i < slices.count; ++i) {
    const int s = backwards ? slices.count - 1 - i : i;
    Op::make(op, first, rows, slices[s]);
    Product::template many<X, Op::kOutputs>(rows, op.p.workspace.data, slices[s], traffic, parts[s]);
  }
  for (int s = 0; s < slices.count; ++s) add(parts[s], rows.tokens, s == 0, sums);
  for (int64_t t = 0; t < rows.tokens; t += kTile) {
    Op::weights(op, first + t, std::min<int64_t>(kTile, rows.tokens - t), sums + t);
  }
  for (int64_t t = 0; t < rows.tokens; ++t) {
    Op::finish(op, first + t, rows.data + t * rows.token, rows.stream, sums[t], Product::kAhead * rows.token);
  }
}

// Many tokens: every thread takes some blocks. Behind the packed fn, the workspace has room for the new streams of one.
template <class Product, class X, class Op>
void run_many(const Op& op, const Context& context) {
  constexpr int64_t kBlock = kTokens<Product>;
  static_assert(kBlock <= kMhcTokens);
  const int64_t tokens = op.p.streams.shape[0], hidden = op.p.streams.shape[2];
  char* packed = static_cast<char*>(op.p.workspace.data);
  parallel(context, Product::kParts, [&](int64_t begin, int64_t end) {
    for (int64_t part = begin; part < end; ++part) {
      Product::template pack<Op::kOutputs>(op.p.mixing.fn, hidden, part, packed);
    }
  });
  X* kept = reinterpret_cast<X*>(packed + Product::bytes(hidden, Op::kOutputs));
  const int64_t blocks = (tokens + kBlock - 1) / kBlock, pieces = std::min<int64_t>(blocks, context.threads);
  parallel(context, pieces, [&](int64_t begin, int64_t end) {
    for (int64_t piece = begin; piece < end; ++piece) {
      for (int64_t block = blocks * piece / pieces; block < blocks * (piece + 1) / pieces; ++block) {
        const int64_t first = block * kBlock, count = std::min(kBlock, tokens - first);
        const Rows<X> rows = Op::rows(op, first, count, kept + piece * kBlock * kStreams * hidden);
        run_block<Product>(op, first, rows, block % 2 == 1);
      }
    }
    _mm_sfence();  // after what was written past the caches
  });
}

template <class Product, class X, class Op>
Status run(const Op& op, const Context& context) {
  if (op.p.streams.shape[0] == 0) return Status::ok();
  if (op.p.streams.shape[0] <= kTile) {
    run_few<Product, X>(op, context);
  } else {
    run_many<Product, X>(op, context);
  }
  return Status::ok();
}

}  // namespace dsv4::avx512
