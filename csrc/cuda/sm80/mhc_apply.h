// From the partial sums of the mixing product to mhc_pre's and mhc_head's outputs. Every sum over splits runs from
// split 0 upwards. Blocks of two kinds in one grid: the first ones make post and comb, 16 lanes a token with one
// element of comb each, so that Sinkhorn's long chain of divisions runs beside the others' reading; each of the rest
// makes one token's weighted sum of its streams, and its RMSNorm.
#pragma once

#include "cuda/sm80/mhc_mix.h"

namespace dsv4::sm80 {

struct ApplyArguments {
  AnyView<3> streams;  // [T, 4, D]
  MhcMixing mixing;
  AnyView<1> norm_weight;  // [D], optional
  float rms_eps;
  AnyView<2> output;    // [T, D]
  View<float, 2> post;  // [T, 4]; not written by mhc_head
  View<float, 3> comb;  // [T, 4, 4]
  const float* partial;
  int64_t first_token, end_token, hidden;
  int splits;
  int kept_trips;  // whose rounded sums and norm weights shared memory holds: a token's, or 0 where they do not fit
  bool vector;
};

inline constexpr int kApplyThreads = 128;
inline constexpr int kCombTokens = kApplyThreads / 16;  // of a block that makes post and comb
inline constexpr int kSumsBytes = kApplyThreads / 32 * 4;
inline constexpr int kTripsAhead = 4;  // whose streams are on their way

// Of shared memory: the warps' sums, then rows of one 16-byte piece a thread. kept_rows: of every kept trip.
constexpr int64_t apply_shared_bytes(int64_t kept_trips, int kept_rows) {
  return kSumsBytes + (kTripsAhead * kStreams + kept_trips * kept_rows) * kApplyThreads * 16;
}

// Elements of the mixing product of a token, or its sum of squares: each the sum over the splits. All loads of kAtOnce
// splits are on their way before the first is needed; past the last split they repeat it.
template <int kAtOnce, int kColumns>
DSV4_DEVICE void combine(const ApplyArguments& a, int64_t token, const int (&column)[kColumns],
                         float (&sum)[kColumns]) {
  const int64_t stride = (a.end_token - a.first_token) * kPartialRow;
  const float* split = a.partial + (token - a.first_token) * kPartialRow;
  DSV4_UNROLL
  for (int j = 0; j < kColumns; ++j) sum[j] = -0.0f;  // changes nothing that it is added to
  for (int first = 0; first < a.splits; first += kAtOnce) {
    float part[kAtOnce][kColumns];
    DSV4_UNROLL
    for (int i = 0; i < kAtOnce; ++i) {
      DSV4_UNROLL
      for (int j = 0; j < kColumns; ++j) part[i][j] = split[column[j]];
      split += first + i + 1 < a.splits ? stride : 0;
    }
    DSV4_UNROLL
    for (int i = 0; i < kAtOnce; ++i) {
      DSV4_UNROLL
      for (int j = 0; j < kColumns; ++j) sum[j] = first + i < a.splits ? ptx::add(sum[j], part[i][j]) : sum[j];
    }
  }
}

template <int kAtOnce = 8>  // what the gradients' registers hold
DSV4_DEVICE float combine(const ApplyArguments& a, int64_t token, int column) {
  float sum[1];
  combine<kAtOnce>(a, token, {column}, sum);
  return sum[0];
}

DSV4_DEVICE float inverse_rms(float squares, int64_t count, float eps) {
  const float mean = ptx::divide(squares, static_cast<float>(count));
  return ptx::divide(1.0f, ptx::square_root(ptx::add(mean, eps)));
}

DSV4_DEVICE float logit(const MhcMixing& mixing, int group, int row, float product, float inverse) {
  const float scale = mixing.scale.data[group * mixing.scale.stride[0]];
  const float base = mixing.base.data[row * mixing.base.stride[0]];
  return ptx::fma(ptx::multiply(product, inverse), scale, base);
}

DSV4_DEVICE float sigmoid(float x) { return ptx::divide(1.0f, ptx::add(1.0f, ptx::exponential(-x))); }

// Sums over the 4 lanes that differ in the two bits of the mask, the same in each of them.
DSV4_DEVICE float sum_of_row(float value) {
  value = ptx::add(value, ptx::shuffle_xor(value, 1));
  return ptx::add(value, ptx::shuffle_xor(value, 2));
}

DSV4_DEVICE float sum_of_column(float value) {
  value = ptx::add(value, ptx::shuffle_xor(value, 4));
  return ptx::add(value, ptx::shuffle_xor(value, 8));
}

// Lane 4 i + o of 16 holds the logit of comb[i, o].
DSV4_DEVICE float sinkhorn(float value, float eps, int iterations) {
  float largest = ptx::maximum(value, ptx::shuffle_xor(value, 1));
  largest = ptx::maximum(largest, ptx::shuffle_xor(largest, 2));
  value = ptx::exponential(ptx::add(value, -largest));
  value = ptx::add(ptx::divide(value, sum_of_row(value)), eps);
  value = ptx::divide(value, ptx::add(sum_of_column(value), eps));
  for (int i = 1; i < iterations; ++i) {
    value = ptx::divide(value, ptx::add(sum_of_row(value), eps));
    value = ptx::divide(value, ptx::add(sum_of_column(value), eps));
  }
  return value;
}

// Post and comb of the tokens of this block. Lanes without a token repeat the last one's work: shuffles need whole
// warps.
DSV4_DEVICE void make_weights(const ApplyArguments& a, int64_t block) {
  const int lane = ptx::thread_index() % 16;
  const int64_t mine = a.first_token + block * kCombTokens + ptx::thread_index() / 16;
  const int64_t token = mine < a.end_token ? mine : a.end_token - 1;
  const int row = 2 * kStreams + lane, post_row = kStreams + lane;
  float sum[2];  // the row's; post's in the first lanes and the sum of squares in the next
  combine<16>(a, token, {row, lane < kStreams ? post_row : kSquares}, sum);
  const float squares = ptx::shuffle(sum[1], ptx::thread_index() % 32 / 16 * 16 + kStreams);
  const float inverse = inverse_rms(squares, kStreams * a.hidden, a.mixing.norm_eps);
  const float comb_logit = logit(a.mixing, 2, row, sum[0], inverse);
  const float comb = sinkhorn(comb_logit, a.mixing.hc_eps, a.mixing.sinkhorn_iterations);
  if (mine >= a.end_token) return;
  a.comb.data[token * a.comb.stride[0] + lane] = comb;
  if (lane < kStreams) {
    const float post_logit = logit(a.mixing, 1, post_row, sum[1], inverse);
    a.post.data[token * a.post.stride[0] + lane] = 2.0f * sigmoid(post_logit);
  }
}

// What becomes row i < 4 of the mixing product of a token, in lane i; 1 / rms of its streams in every lane.
struct PreMix {
  float mix, sigmoid, inverse;
};

DSV4_DEVICE PreMix make_pre_mix(const ApplyArguments& a, int64_t token) {
  const int lane = ptx::thread_index() % 32;
  const int row = lane % kStreams;
  const float sum = combine<16>(a, token, lane == kStreams ? kSquares : row);
  const float squares = ptx::shuffle(sum, kStreams);
  const float inverse = inverse_rms(squares, kStreams * a.hidden, a.mixing.norm_eps);
  return {ptx::multiply(sum, inverse), sigmoid(logit(a.mixing, 0, row, sum, inverse)), inverse};
}

// The four pre weights of a token, in every lane.
DSV4_DEVICE void share_pre(const ApplyArguments& a, const PreMix& own, float (&pre)[kStreams]) {
  const float mine = ptx::add(own.sigmoid, a.mixing.hc_eps);
  DSV4_UNROLL
  for (int i = 0; i < kStreams; ++i) {
    pre[i] = ptx::shuffle(mine, i);
  }
}

// The sum over the block's threads, in every thread. Once a kernel: a second call would need a barrier before it.
DSV4_DEVICE float sum_of_block(float value) {
  DSV4_UNROLL
  for (int mask = 16; mask > 0; mask /= 2) {
    value = ptx::add(value, ptx::shuffle_xor(value, mask));
  }
  const uint32_t sums = ptx::shared_base();
  if (ptx::thread_index() % 32 == 0) ptx::store_shared_float(sums + ptx::thread_index() / 32 * 4, value);
  ptx::sync_threads();
  float total = 0.0f;
  DSV4_UNROLL
  for (int warp = 0; warp < kApplyThreads / 32; ++warp)
    total = ptx::add(total, ptx::load_shared_float(sums + warp * 4));
  return total;
}

// The norm's weights at one piece, in X or float32.
template <class X>
DSV4_DEVICE void load_norm_weight(const ApplyArguments& a, int64_t column, float (&weight)[kElements<X>]) {
  const float* wide = static_cast<const float*>(a.norm_weight.data) + column;
  const X* narrow = static_cast<const X*>(a.norm_weight.data) + column;
  const bool is_wide = a.norm_weight.dtype == DType::kFloat32;
  if (a.vector && !is_wide) {
    unpack(ptx::load_global_16(narrow), weight);
  } else if (a.vector) {
    DSV4_UNROLL
    for (int e = 0; e < kElements<X>; e += 4) {
      float part[4];
      unpack(ptx::load_global_16(wide + e), part);
      DSV4_UNROLL
      for (int i = 0; i < 4; ++i) weight[e + i] = part[i];
    }
  } else {
    DSV4_UNROLL
    for (int e = 0; e < kElements<X>; ++e) {
      weight[e] = column + e >= a.hidden ? 0.0f : is_wide ? wide[e] : to_float(narrow[e]);
    }
  }
}

// The four streams' pieces at one column.
template <class X>
DSV4_DEVICE void load_streams(const ApplyArguments& a, int64_t token, int64_t column, Words4 (&piece)[kStreams]) {
  if (column >= a.hidden) return;
  DSV4_UNROLL
  for (int s = 0; s < kStreams; ++s) piece[s] = load_piece(row_of<X>(a.streams, token, s), column, a.hidden, a.vector);
}

// A thread's pieces of one token: every kApplyThreads-th, one a trip. What it will need is copied to places in shared
// memory that are the thread's own, so its own wait is enough.
template <class X, bool kVector>
struct OwnPieces {
  static constexpr int n = kElements<X>;
  const ApplyArguments& a;
  int64_t token;

  DSV4_DEVICE int64_t column(int trip) const {
    return (static_cast<int64_t>(trip) * kApplyThreads + ptx::thread_index()) * n;
  }
  DSV4_DEVICE bool exists(int trip) const { return column(trip) < a.hidden; }
  DSV4_DEVICE bool wide_weight() const { return a.norm_weight.dtype == DType::kFloat32; }

  static DSV4_DEVICE uint32_t place(int row) {
    return ptx::shared_base() + static_cast<uint32_t>(kSumsBytes + (row * kApplyThreads + ptx::thread_index()) * 16);
  }
  static DSV4_DEVICE uint32_t stream(int trip, int s) { return place(trip % kTripsAhead * kStreams + s); }
  DSV4_DEVICE uint32_t rounded(int trip) const { return place(kTripsAhead * kStreams + trip); }
  // part: of float32 weights of bfloat16 pieces.
  DSV4_DEVICE uint32_t weight(int trip, int part) const {
    return place(kTripsAhead * kStreams + (1 + part) * a.kept_trips + trip);
  }

  template <class T>
  DSV4_DEVICE void copy(uint32_t destination, const T* row, int64_t from) const {
    if constexpr (kVector) {
      ptx::cp_async_16(destination, row + from, 16);
    } else {
      ptx::store_shared_16(destination, load_piece_slowly(row, from, a.hidden));
    }
  }

  DSV4_DEVICE void copy_streams(int trip) const {
    if (exists(trip)) {
      DSV4_UNROLL_IF(kVector)
      for (int s = 0; s < kStreams; ++s) copy(stream(trip, s), row_of<X>(a.streams, token, s), column(trip));
    }
    ptx::cp_async_commit();
  }

  // Into the next group.
  DSV4_DEVICE void copy_weight(int trip) const {
    if (wide_weight()) {
      DSV4_UNROLL_IF(kVector)
      for (int part = 0; part < n / 4; ++part) {
        copy(weight(trip, part), static_cast<const float*>(a.norm_weight.data), column(trip) + 4 * part);
      }
    } else {
      copy(weight(trip, 0), static_cast<const X*>(a.norm_weight.data), column(trip));
    }
  }

  DSV4_DEVICE void load_weight(int trip, float (&value)[n]) const {
    if (wide_weight()) {
      DSV4_UNROLL
      for (int e = 0; e < n; e += 4) {
        float part[4];
        unpack(ptx::load_shared_16(weight(trip, e / 4)), part);
        DSV4_UNROLL
        for (int i = 0; i < 4; ++i) value[e + i] = part[i];
      }
    } else {
      unpack(ptx::load_shared_16(weight(trip, 0)), value);
    }
  }
};

// output = sum_i pre_i streams_i of one token, and with a norm weight its RMSNorm.
template <class X, bool kVector>
DSV4_DEVICE void make_output(const ApplyArguments& a, int64_t token) {
  constexpr int n = kElements<X>;
  X* output = row_of<X>(a.output, token);
  const OwnPieces<X, kVector> own{a, token};
  const bool kept = a.kept_trips > 0;
  // All on their way while the partial sums are read.
  DSV4_UNROLL_IF(kVector)
  for (int trip = 0; trip < kTripsAhead; ++trip) own.copy_streams(trip);
  for (int trip = 0; kept && own.exists(trip); ++trip) own.copy_weight(trip);
  float pre[kStreams];
  share_pre(a, make_pre_mix(a, token), pre);
  float squares = 0.0f;
  for (int trip = 0; own.exists(trip); ++trip) {
    float r[n], sum[n];
    ptx::cp_async_wait<kTripsAhead - 1>();
    DSV4_UNROLL
    for (int s = 0; s < kStreams; ++s) {
      unpack(ptx::load_shared_16(own.stream(trip, s)), r);
      DSV4_UNROLL
      for (int e = 0; e < n; ++e) sum[e] = s == 0 ? ptx::multiply(pre[0], r[e]) : ptx::fma(pre[s], r[e], sum[e]);
    }
    own.copy_streams(trip + kTripsAhead);
    const Words4 rounded = pack(sum);
    if (kept) {
      ptx::store_shared_16(own.rounded(trip), rounded);
    } else {
      store_piece(output, own.column(trip), a.hidden, kVector, rounded);
    }
    unpack(rounded, sum);
    DSV4_UNROLL
    for (int e = 0; e < n; ++e) squares = ptx::fma(sum[e], sum[e], squares);
  }
  if (!a.norm_weight.given()) return;
  const float inverse = inverse_rms(sum_of_block(squares), a.hidden, a.rms_eps);
  ptx::cp_async_wait<0>();  // for the weights
  for (int trip = 0; own.exists(trip); ++trip) {
    const int64_t column = own.column(trip);
    float value[n], weight[n];
    if (kept) {
      own.load_weight(trip, weight);
      unpack(ptx::load_shared_16(own.rounded(trip)), value);
    } else {
      load_norm_weight<X>(a, column, weight);
      unpack(load_piece(output, column, a.hidden, kVector), value);  // what this thread wrote
    }
    DSV4_UNROLL
    for (int e = 0; e < n; ++e) value[e] = ptx::multiply(ptx::multiply(value[e], inverse), weight[e]);
    store_piece(output, column, a.hidden, kVector, pack(value));
  }
}

// Grid: kWeights: one block for every kCombTokens tokens, then one a token.
template <class X, bool kWeights>
DSV4_DEVICE void apply(const ApplyArguments& a) {
  const int64_t weight_blocks = kWeights ? (a.end_token - a.first_token + kCombTokens - 1) / kCombTokens : 0;
  const int64_t block = ptx::block_index_x();
  if (block < weight_blocks) {
    make_weights(a, block);
  } else {
    const int64_t token = a.first_token + block - weight_blocks;
    if (a.vector) {
      make_output<X, true>(a, token);
    } else {
      make_output<X, false>(a, token);
    }
  }
}

}  // namespace dsv4::sm80
