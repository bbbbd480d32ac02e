// sparse_attention_backward, portable: scores and products with G of all keys, their weights, then d query; float32
// sums in the order of keys and heads. A key is decoded once for all heads in either pass. Also the yardstick for the
// other kernels.
#include <algorithm>
#include <cmath>

#include "cpu/attention.h"
#include "cpu/attention_backward_driver.h"
#include "cpu/scalar/attention_key.h"

namespace dsv4::scalar {
namespace {

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
    return (heads + 1) * head_dim * static_cast<int64_t>(sizeof(float));
  }

  BackwardRow(const SparseAttentionBackwardParams& params, uint8_t* row_memory, int64_t most, uint8_t* slot_memory)
      : p_(params.forward),
        grads_(params),
        heads_(p_.query.size(1)),
        head_dim_(p_.query.size(2)),
        most_(most),
        arena_{row_memory},
        memory_(params, most, arena_),
        key_(reinterpret_cast<float*>(slot_memory)),
        sums_(key_ + head_dim_) {}

  void differentiate(int64_t row, const KeySums& sums, float* gates) {
    memory_.keys.list(p_, row, sums);
    const KeyCounts count = *memory_.keys.count;
    std::fill_n(sums_, heads_ * head_dim_, 0.f);
    std::fill_n(gates, heads_, 0.f);
    turn_gradients(row);
    for (int64_t j = 0; j < count.all; ++j) {
      decode_key(j);
      for (int64_t h = 0; h < heads_; ++h) {
        memory_.at_query[h * most_ + j] = dot(p_.query.as<const X>().at(row, h), key_, head_dim_);
        memory_.at_grad[h * most_ + j] = dot(memory_.grad + h * head_dim_, key_, head_dim_);
      }
    }
    for (int64_t h = 0; h < heads_ && count.all > 0; ++h) gates[h] = weigh(row, h, count.all);
    for (int64_t j = 0; j < count.all; ++j) {
      decode_key(j);
      for (int64_t h = 0; h < heads_; ++h) {
        const float weight = memory_.at_query[h * most_ + j];
        for (int64_t d = 0; d < head_dim_; ++d) sums_[h * head_dim_ + d] += weight * key_[d];
      }
    }
    for (int64_t h = 0; h < heads_; ++h) {
      X* out = grads_.grad_query.template as<X>().at(row, h);
      for (int64_t d = 0; d < head_dim_; ++d) out[d] = from_float<X>(sums_[h * head_dim_ + d]);
    }
  }

  void add_to_keys(int64_t row, int64_t first_dim, int64_t end_dim) {
    memory_.keys.ranges([&](int64_t begin, int64_t end) {
      for (int64_t j = begin; j < end; ++j) {
        for (int64_t d = first_dim; d < end_dim; d += kSliceDims)
          add_step(row, j, d, std::min(end_dim - d, kSliceDims));
      }
    });
  }

  static void narrow(const float* sums, int64_t dims, bf16* to) {
    for (int64_t d = 0; d < dims; ++d) to[d] = bf16_from_float(sums[d]);
  }

 private:
  struct RowMemory {
    TargetKeys keys;
    float* grad;      // [H, D], G
    float* at_query;  // [H, most], scores, then scale d s
    float* at_grad;   // [H, most], G . key, then p g

    RowMemory(const SparseAttentionBackwardParams& p, int64_t most, Arena& arena)
        : keys(most, arena),
          grad(arena.take<float>(p.forward.query.size(1) * p.forward.query.size(2))),
          at_query(arena.take<float>(p.forward.query.size(1) * most)),
          at_grad(arena.take<float>(p.forward.query.size(1) * most)) {}
  };

  void decode_key(int64_t j) {
    decode(memory_.keys.keys[j], j < memory_.keys.count->window ? p_.window_pool : p_.compressed, head_dim_,
           p_.rope_dim, key_);
  }

  void turn_gradients(int64_t row) {
    for (int64_t h = 0; h < heads_; ++h) {
      const X* grad_out = grads_.grad_out.template as<X>().at(row, h);
      float* grad = memory_.grad + h * head_dim_;
      for (int64_t d = 0; d < head_dim_; ++d) grad[d] = to_float(grad_out[d]);
      if (p_.rope.given()) rotate<X>(grad, head_dim_, p_.rope.as<const float>().at(row), p_.rope.size(1));
    }
  }

  // From the products of a head to its weights. Returns delta (1 - g).
  float weigh(int64_t row, int64_t h, int64_t keys) {
    const float lse = *p_.lse.as<const float>().at(row, h), sink = *p_.sink.as<const float>().at(h);
    float *at_query = memory_.at_query + h * most_, *at_grad = memory_.at_grad + h * most_, total = 0, mean = 0;
    for (int64_t j = 0; j < keys; ++j) {
      at_query[j] = std::exp(at_query[j] * p_.scale - lse);
      total += at_query[j];
      mean += at_query[j] * at_grad[j];
    }
    mean /= total;
    const float kept = 1.f / (1.f + std::exp(sink - lse));
    const float base = *grads_.grad_lse.template as<const float>().at(row, h) - kept * kept * mean;
    for (int64_t j = 0; j < keys; ++j) {
      const float p = at_query[j] / total;
      at_query[j] = p * (kept * at_grad[j] + base) * p_.scale;
      at_grad[j] = p * kept;
    }
    return kept * mean / (1.f + std::exp(lse - sink));
  }

  // Some dims of one key: the sum over the heads, then the rows before.
  void add_step(int64_t row, int64_t j, int64_t first, int64_t dims) {
    float step[kSliceDims] = {};
    for (int64_t h = 0; h < heads_; ++h) {
      const X* query = p_.query.as<const X>().at(row, h) + first;
      const float *grad = memory_.grad + h * head_dim_ + first, at_query = memory_.at_query[h * most_ + j],
                  at_grad = memory_.at_grad[h * most_ + j];
      for (int64_t d = 0; d < dims; ++d) step[d] += at_query * to_float(query[d]) + at_grad * grad[d];
    }
    float* sums = memory_.keys.sums[j] + first;
    for (int64_t d = 0; d < dims; ++d) sums[d] += step[d];
  }

  const SparseAttentionParams& p_;
  const SparseAttentionBackwardParams& grads_;
  int64_t heads_, head_dim_, most_;
  Arena arena_;
  RowMemory memory_;
  float* key_;   // [D], decoded
  float* sums_;  // [H, D], of d query
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

}  // namespace dsv4::scalar
