// sparse_attention with AVX2 and FMA. A piece of work is a row's heads, or some of them where there are fewer rows than
// threads: scores of all keys, their maximum, numerators, then the values. Keys are decoded to float32 twice, which is
// little beside the products of many heads: 2 of 8 lanes a cycle for each dim of a key and a head in either pass.
#include "cpu/attention.h"

#include <cmath>
#include <limits>

#include "cpu/avx2/attention_key.h"
#include "cpu/avx2/product.h"
#include "cpu/scalar/attention_key.h"
#include "cpu/work.h"

namespace dsv4::avx2 {
namespace {

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
    const int64_t floats = plan.part * (2 * head_dim + round_up(plan.most, kLanes) + kLanes) + kValueKeys * head_dim;
    return round_up(plan.most * static_cast<int64_t>(sizeof(Key)), 64) + kPanelBytes + round_up(floats * 4, 64);
  }

  Heads(const SparseAttentionParams& p, const Plan& plan, uint8_t* memory)
      : p_(p),
        head_dim_(p.query.size(2)),
        keys_(reinterpret_cast<Key*>(memory)),
        panel_(reinterpret_cast<float*>(memory + round_up(plan.most * static_cast<int64_t>(sizeof(Key)), 64))),
        values_(panel_ + kPanelFloats),
        query_(values_ + kValueKeys * head_dim_),
        sums_(query_ + plan.part * head_dim_),
        divisors_(sums_ + plan.part * head_dim_),
        scores_(divisors_ + plan.part * kLanes) {}

  void attend(int64_t row, int64_t head, int64_t heads) {
    count_ = list_keys(p_, row, keys_);
    stride_ = round_up(count_.all, kLanes);
    for (int64_t h = 0; h < heads; ++h) {
      widen(p_.query.as<const X>().at(row, head + h), head_dim_, query_ + h * head_dim_);
    }
    product([&](int64_t j, int64_t first, int64_t n, float* to) { decode_key(j, first, n, to); }, count_.all, head_dim_,
            panel_, [&](int64_t h) { return query_ + h * head_dim_; }, heads,
            [&](int64_t h) { return scores_ + h * stride_; });
    for (int64_t h = 0; h < heads; ++h) weigh(row, head, h);
    sum_values([&](int64_t j, float* to) { decode_key(j, 0, head_dim_, to); }, count_.all, scores_, stride_, heads,
               head_dim_, values_, sums_);
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
    scale_scores(scores, count_.all, p_.scale);
    __m256 largest = _mm256_set1_ps(-kInfinity);
    for (int64_t j = 0; j < stride_; j += kLanes) {
      largest = _mm256_max_ps(load(scores + j), largest);  // the second operand comes through where one is NaN
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

  void write(X* out, int64_t row, int64_t h) const {
    const __m256 divisor = _mm256_set1_ps(divisors_[h]);
    const float* sums = sums_ + h * head_dim_;
    for (int64_t d = 0; d < head_dim_; d += kLanes) store(out + d, _mm256_div_ps(load(sums + d), divisor));
    if (p_.rope.given()) scalar::rotate_back(out, head_dim_, p_.rope.as<const float>().at(row), p_.rope.size(1));
  }

  const SparseAttentionParams& p_;
  int64_t head_dim_, stride_ = 0;
  Key* keys_;
  float* panel_;          // of keys
  float* values_;         // [kValueKeys, D]
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
