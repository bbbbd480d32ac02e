// sparse_attention_backward with AVX2 and FMA: scores and products with G of all keys (avx2/product.h), their weights,
// then d query and the keys' gradients (avx2/outer.h). The order of sums is that of cpu/attention_backward_driver.h.
#include <cmath>

#include "cpu/attention.h"
#include "cpu/attention_backward_driver.h"
#include "cpu/avx2/attention_key.h"
#include "cpu/avx2/product.h"
#include "cpu/scalar/attention_key.h"

namespace dsv4::avx2 {
namespace {

static_assert(kSliceDims == kOuterColumns, "a tile of a key's gradient");

template <class X>
class BackwardRow {
 public:
  static constexpr int64_t kBlockBytes = 256 << 10;

  static int64_t row_bytes(const SparseAttentionBackwardParams& p, int64_t most) {
    Arena arena{nullptr};
    RowMemory(p, most, arena);
    return arena.used;
  }
  static int64_t slot_bytes(const SparseAttentionBackwardParams& p, int64_t) {
    const int64_t heads = p.forward.query.size(1), head_dim = p.forward.query.size(2);
    return kPanelBytes + (heads + kValueKeys) * head_dim * static_cast<int64_t>(sizeof(float));
  }

  BackwardRow(const SparseAttentionBackwardParams& params, uint8_t* row_memory, int64_t most, uint8_t* slot_memory)
      : p_(params.forward),
        grads_(params),
        heads_(p_.query.size(1)),
        head_dim_(p_.query.size(2)),
        stride_(round_up(most, kLanes)),
        arena_{row_memory},
        memory_(params, most, arena_),
        panel_(reinterpret_cast<float*>(slot_memory)),
        values_(panel_ + kPanelFloats),
        sums_(values_ + kValueKeys * head_dim_) {}

  void differentiate(int64_t row, const KeySums& sums, float* gates) {
    memory_.keys.list(p_, row, sums);
    const int64_t count = memory_.keys.count->all;
    if (count == 0) return clear_row<X>(grads_, row, gates);
    for (int64_t h = 0; h < heads_; ++h) {
      float* grad = memory_.grad + h * head_dim_;
      widen(p_.query.as<const X>().at(row, h), head_dim_, memory_.query + h * head_dim_);
      widen(grads_.grad_out.template as<const X>().at(row, h), head_dim_, grad);
      if (p_.rope.given()) scalar::rotate<X>(grad, head_dim_, p_.rope.as<const float>().at(row), p_.rope.size(1));
    }
    // Queries and G follow one another, and so do what they give.
    product([&](int64_t j, int64_t first, int64_t n, float* to) { decode_key(j, first, n, to); }, count, head_dim_,
            panel_, [&](int64_t c) { return memory_.query + c * head_dim_; }, 2 * heads_,
            [&](int64_t c) { return memory_.at_query + c * stride_; });
    for (int64_t h = 0; h < heads_; ++h) gates[h] = weigh(row, h, count);
    sum_values([&](int64_t j, float* to) { decode_key(j, 0, head_dim_, to); }, count, memory_.at_query, stride_, heads_,
               head_dim_, values_, sums_);
    for (int64_t h = 0; h < heads_; ++h) {
      avx2::narrow(sums_ + h * head_dim_, head_dim_, grads_.grad_query.template as<X>().at(row, h));
    }
  }

  void add_to_keys(int64_t, int64_t first_dim, int64_t end_dim) {
    memory_.keys.ranges([&](int64_t begin, int64_t end) {
      for (int64_t j = begin; j < end; j += kOuterRows) {
        for (int64_t d = first_dim; d < end_dim; d += kSliceDims) add_step(j, smaller(end - j, kOuterRows), d);
      }
    });
  }

  static void narrow(const float* sums, int64_t dims, bf16* to) { avx2::narrow(sums, dims, to); }

 private:
  struct RowMemory {
    TargetKeys keys;
    float *query, *grad;        // [H, D], the latter G
    float *at_query, *at_grad;  // [H, stride_]: scores, then scale d s; G . key, then p g

    RowMemory(const SparseAttentionBackwardParams& p, int64_t most, Arena& arena) : keys(most, arena) {
      const int64_t heads = p.forward.query.size(1), stride = round_up(most, kLanes);
      query = arena.take<float>(2 * heads * p.forward.query.size(2));
      grad = query + heads * p.forward.query.size(2);
      at_query = arena.take<float>(2 * heads * stride);
      at_grad = at_query + heads * stride;
    }
  };

  void decode_key(int64_t j, int64_t first, int64_t count, float* to) const {
    const RowPool& pool = j < memory_.keys.count->window ? p_.window_pool : p_.compressed;
    decode(memory_.keys.keys[j], pool, head_dim_, p_.rope_dim, first, count, to);
  }

  // From the products of a head to its weights. Returns delta (1 - g).
  float weigh(int64_t row, int64_t h, int64_t keys) const {
    const float lse = *p_.lse.as<const float>().at(row, h), sink = *p_.sink.as<const float>().at(h);
    float *at_query = memory_.at_query + h * stride_, *at_grad = memory_.at_grad + h * stride_;
    const int64_t end = round_up(keys, kLanes);
    scale_scores(at_query, keys, p_.scale);
    for (int64_t j = keys; j < end; ++j) at_grad[j] = 0;
    __m256 total_lanes = _mm256_setzero_ps(), mean_lanes = total_lanes;
    for (int64_t j = 0; j < end; j += kLanes) {
      const __m256 p = exp(_mm256_sub_ps(load(at_query + j), _mm256_set1_ps(lse)));
      store(at_query + j, p);
      total_lanes = _mm256_add_ps(total_lanes, p);
      mean_lanes = _mm256_fmadd_ps(p, load(at_grad + j), mean_lanes);
    }
    const float all = total(total_lanes), mean = total(mean_lanes) / all;
    const float kept = 1.f / (1.f + std::exp(sink - lse));
    const float base = *grads_.grad_lse.template as<const float>().at(row, h) - kept * kept * mean;
    for (int64_t j = 0; j < end; j += kLanes) {
      const __m256 p = _mm256_div_ps(load(at_query + j), _mm256_set1_ps(all));
      const __m256 slope = _mm256_fmadd_ps(_mm256_set1_ps(kept), load(at_grad + j), _mm256_set1_ps(base));
      store(at_query + j, _mm256_mul_ps(_mm256_mul_ps(p, slope), _mm256_set1_ps(p_.scale)));
      store(at_grad + j, _mm256_mul_ps(p, _mm256_set1_ps(kept)));
    }
    return kept * mean / (1.f + std::exp(lse - sink));
  }

  // Some dims of up to kOuterRows keys, of which one may be listed twice: the sum over the heads, then the rows before.
  void add_step(int64_t j, int64_t keys, int64_t first) const {
    float step[kOuterRows][kOuterColumns] = {};
    add_outer({memory_.at_query + j, 1, stride_, memory_.query + first, head_dim_, heads_}, keys, step[0],
              kOuterColumns);
    add_outer({memory_.at_grad + j, 1, stride_, memory_.grad + first, head_dim_, heads_}, keys, step[0], kOuterColumns);
    for (int64_t i = 0; i < keys; ++i) {
      float* sums = memory_.keys.sums[j + i] + first;
      for (int64_t d = 0; d < kOuterColumns; d += kLanes)
        store(sums + d, _mm256_add_ps(load(sums + d), load(step[i] + d)));
    }
  }

  const SparseAttentionParams& p_;
  const SparseAttentionBackwardParams& grads_;
  int64_t heads_, head_dim_, stride_;
  Arena arena_;
  RowMemory memory_;
  float *panel_, *values_;  // of keys; [kValueKeys, D]
  float* sums_;             // [H, D], of d query
};

}  // namespace

int64_t sparse_attention_backward_workspace_bytes(const SparseAttentionBackwardParams& p, const Context& context) {
  if (p.forward.query.dtype == DType::kBFloat16) return AttentionBackward<BackwardRow<bf16>>(p, context).bytes();
  return AttentionBackward<BackwardRow<float>>(p, context).bytes();
}

Status sparse_attention_backward(const SparseAttentionBackwardParams& p, const Context& context) {
  if (p.forward.query.dtype == DType::kBFloat16) {
    AttentionBackward<BackwardRow<bf16>>(p, context).run();
  } else {
    AttentionBackward<BackwardRow<float>>(p, context).run();
  }
  return Status::ok();
}

}  // namespace dsv4::avx2
