// sparse_attention with AVX2 and FMA. A piece of work is a row's heads, or some of them where there are fewer rows than
// threads: scores of all keys, their maximum, numerators, then the values. Keys are decoded to float32 twice, which is
// little beside the products of many heads: 2 of 8 lanes a cycle for each dim of a key and a head in either pass.
#include "cpu/attention.h"

#include <cmath>
#include <limits>

#include "cpu/avx2/product.h"
#include "cpu/scalar/attention_key.h"
#include "cpu/work.h"

namespace dsv4::avx2 {
namespace {

constexpr int64_t kKeys = 16;      // whose values are decoded together
constexpr int64_t kDims = 32;      // of a tile of sums
constexpr int64_t kTileHeads = 3;  // of a tile of sums

// Dims [first, first + count) of a key; `first` is a multiple of 64.
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

// sums[h][0, kDims) += the weights of `count` keys times their values, for kHeads heads.
template <int kHeads>
DSV4_INLINE void add_values(const float* weights, int64_t stride, const float* values, int64_t head_dim, int64_t count,
                            float* sums) {
  __m256 tile[kHeads][kDims / kLanes];
#pragma GCC unroll 3
  for (int h = 0; h < kHeads; ++h) {
#pragma GCC unroll 4
    for (int i = 0; i < kDims / kLanes; ++i) tile[h][i] = load(sums + h * head_dim + i * kLanes);
  }
  for (int64_t j = 0; j < count; ++j, values += head_dim) {
    __m256 weight[kHeads];
#pragma GCC unroll 3
    for (int h = 0; h < kHeads; ++h) weight[h] = _mm256_broadcast_ss(weights + h * stride + j);
#pragma GCC unroll 4
    for (int i = 0; i < kDims / kLanes; ++i) {
      const __m256 value = load(values + i * kLanes);
#pragma GCC unroll 3
      for (int h = 0; h < kHeads; ++h) tile[h][i] = _mm256_fmadd_ps(weight[h], value, tile[h][i]);
    }
  }
#pragma GCC unroll 3
  for (int h = 0; h < kHeads; ++h) {
#pragma GCC unroll 4
    for (int i = 0; i < kDims / kLanes; ++i) store(sums + h * head_dim + i * kLanes, tile[h][i]);
  }
}

// How a call is cut: heads of a row that one thread takes, and the pieces.
struct Plan {
  int64_t most, part, parts, slots;

  Plan(const SparseAttentionParams& p, const Context& context) : most(most_keys_of_any_row(p)) {
    const int64_t rows = p.query.size(0), heads = p.query.size(1);
    const int64_t wanted = rows == 0 ? 1 : smaller((context.threads + rows - 1) / rows, heads);
    part = (heads + larger(wanted, 1) - 1) / larger(wanted, 1);
    parts = (heads + part - 1) / part;
    slots = smaller(larger(context.threads, 1), rows * parts);
  }
};

// One piece's work and its memory.
template <class X>
class Heads {
 public:
  static int64_t bytes(const SparseAttentionParams& p, const Plan& plan) {
    const int64_t head_dim = p.query.size(2);
    const int64_t floats = plan.part * (2 * head_dim + round_up(plan.most, kLanes) + kLanes) + kKeys * head_dim;
    return round_up(plan.most * static_cast<int64_t>(sizeof(Key)), 64) + kPanelBytes + round_up(floats * 4, 64);
  }

  Heads(const SparseAttentionParams& p, const Plan& plan, uint8_t* memory)
      : p_(p),
        head_dim_(p.query.size(2)),
        keys_(reinterpret_cast<Key*>(memory)),
        panel_(reinterpret_cast<float*>(memory + round_up(plan.most * static_cast<int64_t>(sizeof(Key)), 64))),
        values_(panel_ + kPanelRows * kPanelInputs),
        query_(values_ + kKeys * head_dim_),
        sums_(query_ + plan.part * head_dim_),
        divisors_(sums_ + plan.part * head_dim_),
        scores_(divisors_ + plan.part * kLanes) {}

  void attend(int64_t row, int64_t head, int64_t heads) {
    heads_ = heads;
    count_ = list_keys(p_, row, keys_);
    stride_ = round_up(count_.all, kLanes);
    for (int64_t h = 0; h < heads; ++h) {
      widen(p_.query.as<const X>().at(row, head + h), head_dim_, query_ + h * head_dim_);
    }
    product([&](int64_t j, int64_t first, int64_t n, float* to) { decode_key(j, first, n, to); }, count_.all, head_dim_,
            panel_, [&](int64_t h) { return query_ + h * head_dim_; }, heads,
            [&](int64_t h) { return scores_ + h * stride_; });
    for (int64_t h = 0; h < heads; ++h) weigh(row, head, h);
    sum_values();
    for (int64_t h = 0; h < heads; ++h) write(p_.out.as<X>().at(row, head + h), row, h);
  }

 private:
  void decode_key(int64_t j, int64_t first, int64_t count, float* to) const {
    decode(keys_[j], j < count_.window ? p_.window_pool : p_.compressed, head_dim_, p_.rope_dim, first, count, to);
  }

  // A head's scores become numerators; its lse and what its sums are to be divided by.
  void weigh(int64_t row, int64_t head, int64_t h) {
    constexpr float kInfinity = std::numeric_limits<float>::infinity();
    float *scores = scores_ + h * stride_, *lse = p_.lse.as<float>().at(row, head + h);
    if (count_.all == 0) {
      *lse = kInfinity;
      divisors_[h] = 1;
      return;
    }
    for (int64_t j = count_.all; j < stride_; ++j) scores[j] = -kInfinity;
    const __m256 scale = _mm256_set1_ps(p_.scale);
    __m256 largest = _mm256_set1_ps(-kInfinity);
    for (int64_t j = 0; j < stride_; j += kLanes) {
      const __m256 score = j + kLanes <= count_.all ? _mm256_mul_ps(load(scores + j), scale) : scaled_tail(scores, j);
      store(scores + j, score);
      largest = _mm256_max_ps(score, largest);  // the second operand comes through where one is NaN
    }
    float lanes[kLanes];
    store(lanes, largest);
    float most = lanes[0];
    for (const float lane : lanes) most = lane > most ? lane : most;
    __m256 sum = _mm256_setzero_ps();
    for (int64_t j = 0; j < stride_; j += kLanes) {
      const __m256 numerator = exp(_mm256_sub_ps(load(scores + j), _mm256_set1_ps(most)));
      sum = _mm256_add_ps(sum, numerator);
      store(scores + j, rounded(numerator, static_cast<const X*>(nullptr)));
    }
    const float all = total(sum);
    *lse = static_cast<float>(static_cast<double>(most) + std::log(static_cast<double>(all)));
    divisors_[h] = all + std::exp(*p_.sink.as<const float>().at(head + h) - most);
  }

  // The last scores of a row: the padding behind them stays minus infinity whatever the scale.
  __m256 scaled_tail(const float* scores, int64_t from) const {
    float some[kLanes];
    for (int64_t i = 0; i < kLanes; ++i)
      some[i] = from + i < count_.all ? scores[from + i] * p_.scale : scores[from + i];
    return load(some);
  }

  void sum_values() {
    memset(sums_, 0, static_cast<size_t>(heads_ * head_dim_) * sizeof(float));
    for (int64_t j = 0; j < count_.all; j += kKeys) {
      const int64_t count = smaller(kKeys, count_.all - j);
      for (int64_t i = 0; i < count; ++i) decode_key(j + i, 0, head_dim_, values_ + i * head_dim_);
      for (int64_t h = 0; h < heads_; h += kTileHeads) {
        const float* weights = scores_ + h * stride_ + j;
        for (int64_t d = 0; d < head_dim_; d += kDims) {
          float* sums = sums_ + h * head_dim_ + d;
          if (heads_ - h >= 3) {
            add_values<3>(weights, stride_, values_ + d, head_dim_, count, sums);
          } else if (heads_ - h == 2) {
            add_values<2>(weights, stride_, values_ + d, head_dim_, count, sums);
          } else {
            add_values<1>(weights, stride_, values_ + d, head_dim_, count, sums);
          }
        }
      }
    }
  }

  void write(X* out, int64_t row, int64_t h) const {
    const __m256 divisor = _mm256_set1_ps(divisors_[h]);
    const float* sums = sums_ + h * head_dim_;
    for (int64_t d = 0; d < head_dim_; d += kLanes) store(out + d, _mm256_div_ps(load(sums + d), divisor));
    if (p_.rope.given()) scalar::rotate_back(out, head_dim_, p_.rope.as<const float>().at(row), p_.rope.size(1));
  }

  const SparseAttentionParams& p_;
  int64_t head_dim_, heads_ = 0, stride_ = 0;
  Key* keys_;
  float* panel_;          // of keys
  float* values_;         // [kKeys, D]
  float *query_, *sums_;  // [heads, D]
  float* divisors_;       // [heads]
  float* scores_;         // [heads, stride_], then the numerators
  KeyCounts count_ = {};
};

template <class X>
Status run(const SparseAttentionParams& p, const Context& context) {
  const Plan plan(p, context);
  const int64_t bytes = Heads<X>::bytes(p, plan), heads = p.query.size(1);
  spread(context, plan.slots, p.query.size(0) * plan.parts, [&](int64_t slot, int64_t piece) {
    const int64_t head = piece % plan.parts * plan.part;
    Heads<X>(p, plan, static_cast<uint8_t*>(p.workspace.data) + slot * bytes)
        .attend(piece / plan.parts, head, smaller(plan.part, heads - head));
  });
  return Status::ok();
}

}  // namespace

int64_t sparse_attention_workspace_bytes(const SparseAttentionParams& p, const Context& context) {
  const Plan plan(p, context);
  return Heads<float>::bytes(p, plan) * plan.slots;
}

Status sparse_attention(const SparseAttentionParams& p, const Context& context) {
  return p.query.dtype == DType::kBFloat16 ? run<bf16>(p, context) : run<float>(p, context);
}

}  // namespace dsv4::avx2
