// sparse_attention, portable: scores of all keys, their maximum, numerators, then the values; float32 sums in the order
// of the keys. A key is decoded once for all heads in either pass. Also the yardstick for the other kernels.
#include "cpu/attention.h"

#include <algorithm>
#include <cmath>
#include <limits>

#include "cpu/scalar/attention_key.h"

namespace dsv4::scalar {
namespace {

// One row's work and its memory.
template <class X>
class Row {
 public:
  static int64_t bytes(const SparseAttentionParams& p, int64_t most) {
    const int64_t heads = p.query.size(1), head_dim = p.query.size(2);
    const int64_t floats = head_dim + heads * (most + head_dim + 1);
    return round_up(most * static_cast<int64_t>(sizeof(Key)) + floats * 4, 64);
  }

  Row(const SparseAttentionParams& params, uint8_t* memory, int64_t most)
      : p_(params),
        heads_(params.query.size(1)),
        head_dim_(params.query.size(2)),
        keys_(reinterpret_cast<Key*>(memory)),
        values_(reinterpret_cast<float*>(keys_ + most)),
        scores_(values_ + head_dim_),
        sums_(scores_ + heads_ * most),
        divisors_(sums_ + heads_ * head_dim_) {}

  void attend(int64_t row) {
    count_ = list_keys(p_, row, keys_);
    score(row);
    weigh(row);
    std::fill_n(sums_, heads_ * head_dim_, 0.f);
    for (int64_t j = 0; j < count_.all; ++j) {
      decode_key(j);
      for (int64_t h = 0; h < heads_; ++h) {
        const float weight = scores_[h * count_.all + j];
        for (int64_t d = 0; d < head_dim_; ++d) sums_[h * head_dim_ + d] += weight * values_[d];
      }
    }
    for (int64_t h = 0; h < heads_; ++h) {
      X* out = p_.out.as<X>().at(row, h);
      for (int64_t d = 0; d < head_dim_; ++d) out[d] = from_float<X>(sums_[h * head_dim_ + d] / divisors_[h]);
      if (p_.rope.given()) rotate_back(out, head_dim_, p_.rope.as<const float>().at(row), p_.rope.size(1));
    }
  }

 private:
  void decode_key(int64_t j) {
    decode(keys_[j], j < count_.window ? p_.window_pool : p_.compressed, head_dim_, p_.rope_dim, values_);
  }

  void score(int64_t row) {
    for (int64_t j = 0; j < count_.all; ++j) {
      decode_key(j);
      for (int64_t h = 0; h < heads_; ++h) {
        const X* q = p_.query.as<const X>().at(row, h);
        scores_[h * count_.all + j] = dot(q, values_, head_dim_) * p_.scale;
      }
    }
  }

  // Scores become numerators; lse and what the sums are to be divided by.
  void weigh(int64_t row) {
    constexpr float kInfinity = std::numeric_limits<float>::infinity();
    for (int64_t h = 0; h < heads_; ++h) {
      float* scores = scores_ + h * count_.all;
      float most = -kInfinity, total = 0;
      for (int64_t j = 0; j < count_.all; ++j) most = std::max(most, scores[j]);
      for (int64_t j = 0; j < count_.all; ++j) {
        const float numerator = std::exp(scores[j] - most);
        total += numerator;
        scores[j] = to_float(from_float<X>(numerator));
      }
      const bool none = count_.all == 0;
      const double lse = static_cast<double>(most) + std::log(static_cast<double>(total));
      *p_.lse.as<float>().at(row, h) = none ? kInfinity : static_cast<float>(lse);
      divisors_[h] = none ? 1.f : total + std::exp(*p_.sink.as<const float>().at(h) - most);
    }
  }

  const SparseAttentionParams& p_;
  int64_t heads_, head_dim_;
  Key* keys_;
  float* values_;    // [D], one key
  float* scores_;    // [H, keys], then the numerators
  float* sums_;      // [H, D]
  float* divisors_;  // [H]
  KeyCounts count_ = {};
};

template <class X>
Status run(const SparseAttentionParams& p, const Context& context) {
  const int64_t most = most_keys_of_any_row(p), bytes = Row<X>::bytes(p, most), rows = p.query.size(0);
  const int64_t slots = std::min<int64_t>(context.threads, rows);
  parallel(context, slots, [&](int64_t begin, int64_t end) {
    for (int64_t slot = begin; slot < end; ++slot) {
      Row<X> work(p, static_cast<uint8_t*>(p.workspace.data) + slot * bytes, most);
      for (int64_t row = slot; row < rows; row += slots) work.attend(row);
    }
  });
  return Status::ok();
}

}  // namespace

int64_t sparse_attention_workspace_bytes(const SparseAttentionParams& p, const Context& context) {
  return Row<float>::bytes(p, most_keys_of_any_row(p)) * std::min<int64_t>(context.threads, p.query.size(0));
}

Status sparse_attention(const SparseAttentionParams& p, const Context& context) {
  return p.query.dtype == DType::kBFloat16 ? run<bf16>(p, context) : run<float>(p, context);
}

}  // namespace dsv4::scalar
