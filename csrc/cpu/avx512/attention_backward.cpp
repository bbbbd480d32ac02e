// sparse_attention_backward by dot products of vectors, in the shapes and tiles of the forward kernel. A row goes twice
// over its keys: queries and G by tiles decoded for scores, then, with the weights of all keys known, d s by tiles
// decoded for values. The keys' gradients follow a block of rows at a time: 8 keys x 32 dims in 16 accumulators, a word
// being one head's weights of query and G (float32: two words), added to the sums of the keys where they lie.
// 10 H D FLOPs a key and row, five products to the forward kernel's two, against 8 D bytes of sums read and written:
// bound by arithmetic from some 4 heads on. Weights are bfloat16 where queries and keys are, as in the products of any
// tensor core. Expected: the forward kernel's 80 % of the measured peak.
#include "cpu/attention.h"
#include "cpu/attention_backward_driver.h"
#include "cpu/avx512/attention_forward.h"
#include "cpu/avx512/attention_gradient.h"
#include "cpu/avx512/attention_product.h"

namespace dsv4::avx512 {
namespace {

// Of bfloat16 one word has a head's weights of query and G; of float32 they are two words, of neighbouring rows.
template <class M>
constexpr int64_t kWeightWords = sizeof(M) == 4 ? 2 : 1;

// sums[i][at : at + 32] += sum over words of left[word][i] * right[word][0:32].
template <class M, int kCount>
static __attribute__((noinline)) void add_products(const uint32_t* left, int64_t left_stride, const uint32_t* right,
                                                   int64_t words, float* const* sums, int64_t at) {
  __m512 acc[kCount][2];
#pragma GCC unroll 8
  for (int i = 0; i < kCount; ++i) acc[i][0] = acc[i][1] = _mm512_setzero_ps();
  for (int64_t word = 0; word < words; ++word, left += left_stride, right += kGroup) {
    const __m512i a = _mm512_loadu_si512(right), b = _mm512_loadu_si512(right + 16);
#pragma GCC unroll 8
    for (int i = 0; i < kCount; ++i) {
      const __m512i x = _mm512_set1_epi32(static_cast<int32_t>(left[i]));
      acc[i][0] = dot_words(acc[i][0], x, a, static_cast<const M*>(nullptr));
      acc[i][1] = dot_words(acc[i][1], x, b, static_cast<const M*>(nullptr));
    }
  }
#pragma GCC unroll 8
  for (int i = 0; i < kCount; ++i) {
    // One key after the other: two of them may be the same row.
    float* sum = sums[i] + at;
    _mm512_storeu_ps(sum, _mm512_add_ps(_mm512_loadu_ps(sum), acc[i][0]));
    _mm512_storeu_ps(sum + 16, _mm512_add_ps(_mm512_loadu_ps(sum + 16), acc[i][1]));
  }
}

template <class X, class M>
class BackwardRow {
 public:
  static constexpr int64_t kBlockBytes = 256 << 10;

  static int64_t row_bytes(const SparseAttentionBackwardParams& p, int64_t most) {
    Arena arena{nullptr};
    Kept(p.forward, most, arena);
    return arena.used;
  }
  static int64_t slot_bytes(const SparseAttentionBackwardParams& p, int64_t most) {
    Arena arena{nullptr};
    Passing(p.forward, most, arena);
    return arena.used;
  }

  BackwardRow(const SparseAttentionBackwardParams& params, uint8_t* row_memory, int64_t most, uint8_t* slot_memory)
      : p_(params.forward),
        grads_(params),
        heads_(p_.query.size(1)),
        head_dim_(p_.query.size(2)),
        stride_(weights_stride(most)),
        row_arena_{row_memory},
        slot_arena_{slot_memory},
        kept_(p_, most, row_arena_),
        passing_(p_, most, slot_arena_) {}

  void differentiate(int64_t row, const KeySums& key_sums, float* gates) {
    kept_.keys.list(p_, row, key_sums);
    const KeyCounts count = *kept_.keys.count;
    if (count.all == 0) return clear_row<X>(grads_, row, gates);
    prepare(row);
    const KeyReader<M> reader(p_, kept_.keys.keys, count);
    const TileMemory<M> tiles(passing_.tiles, head_dim_);
    for (int64_t begin = 0; begin < count.all; begin += kGroup) {
      const int64_t next = smaller(count.all, begin + kGroup);
      tile_for_scores(reader, begin, next, head_dim_, tiles);
      const Lookahead ahead = Lookahead::at(reader, next, smaller(count.all, next + kGroup),
                                            Products::template lookahead_steps<M>(heads_, head_dim_), tiles);
      Products::template score<M>(query(row), query_stride(), heads_, head_dim_, scores(0) + begin, head_stride(),
                                  tiles, ahead);
      Products::template score<M>(kept_.grad, head_dim_, heads_, head_dim_, reach(0) + begin, head_stride(), tiles,
                                  Lookahead());
    }
    for (int64_t h = 0; h < heads_; ++h) gates[h] = weigh(row, h, count.all);
    Products::template mix<M, false>(slopes(0), head_stride() * kWordElements<M>, heads_, reader, 0, count.all,
                                     head_dim_, passing_.sums, tiles);
    for (int64_t h = 0; h < heads_; ++h) {
      X* out = grads_.grad_query.template as<X>().at(row, h);
      for (int64_t d = 0; d < head_dim_; d += kGroup) {
        const Pair x = value_order(passing_.sums + h * head_dim_ + d, static_cast<const M*>(nullptr));
        store(out + d, arrange(x, static_cast<const X*>(nullptr)));
      }
    }
  }

  void add_to_keys(int64_t row, int64_t first_dim, int64_t end_dim) {
    const int64_t words = heads_ * kWeightWords<M>;
    for (int64_t d = first_dim; d < end_dim; d += kGroup) right_tile(row, d, right(d - first_dim));
    kept_.keys.ranges([&](int64_t begin, int64_t end) {
      int64_t j = begin;
      for (; j + 8 <= end; j += 8) add<8>(j, words, first_dim, end_dim, smaller(end - j - 8, 8));
      if (end - j >= 4) {
        add<4>(j, words, first_dim, end_dim, 0);
        j += 4;
      }
      if (end - j == 3) add<3>(j, words, first_dim, end_dim, 0);
      if (end - j == 2) add<2>(j, words, first_dim, end_dim, 0);
      if (end - j == 1) add<1>(j, words, first_dim, end_dim, 0);
    });
  }

  static void narrow(const float* sums, int64_t dims, bf16* to) {
    for (int64_t d = 0; d < dims; d += kGroup) {
      const Pair x = value_order(sums + d, static_cast<const M*>(nullptr));
      store(to + d, arrange(x, static_cast<const bf16*>(nullptr)));
    }
  }

 private:
  // Gradients are differences, and show what long rows of float32 lose; bfloat16 operands have lost more before.
  using Products = WordProduct<sizeof(M) == 4 ? 16 : 0>;

  static int64_t weights_stride(int64_t most) { return round_up(most, kGroup) + 16; }

  // Between the two steps.
  struct Kept {
    TargetKeys keys;
    M* query;           // [H, D], where it is not used as it lies
    M* grad;            // [H, D], G
    uint32_t* weights;  // [H words, stride]; before, scores and of float32 G . key

    Kept(const SparseAttentionParams& p, int64_t most, Arena& arena)
        : keys(most, arena),
          query(arena.take<M>(sizeof(X) == sizeof(M) ? 0 : p.query.size(1) * p.query.size(2))),
          grad(arena.take<M>(p.query.size(1) * p.query.size(2))),
          weights(arena.take<uint32_t>(p.query.size(1) * kWeightWords<M> * weights_stride(most))) {}
  };

  // Within a step.
  struct Passing {
    uint8_t* tiles;
    float* reach;     // [H, stride], G . key, then scale d s as elements of type M; of float32 they stand in `weights`
    float* sums;      // [H, D], of d query
    uint32_t* right;  // [D / 32] groups of H words: query and G

    Passing(const SparseAttentionParams& p, int64_t most, Arena& arena)
        : tiles(arena.take<uint8_t>(TileMemory<M>::bytes(p.query.size(2)))),
          reach(arena.take<float>(kWeightWords<M> == 1 ? p.query.size(1) * weights_stride(most) : 0)),
          sums(arena.take<float>(p.query.size(1) * p.query.size(2))),
          right(arena.take<uint32_t>(p.query.size(2) / kGroup * group_stride(p.query.size(1) * kWeightWords<M>))) {}
  };

  const M* query(int64_t row) const {
    if constexpr (sizeof(X) == sizeof(M)) return reinterpret_cast<const M*>(p_.query.as<const X>().at(row));
    return kept_.query;
  }
  int64_t query_stride() const { return sizeof(X) == sizeof(M) ? p_.query.stride[1] : head_dim_; }
  uint32_t* right(int64_t dim) const { return passing_.right + dim / kGroup * group_stride(heads_ * kWeightWords<M>); }

  // Of one head, by key; elements from one head to the next of either.
  float* scores(int64_t h) const { return reinterpret_cast<float*>(kept_.weights) + h * head_stride(); }
  float* reach(int64_t h) const { return kWeightWords<M> == 1 ? passing_.reach + h * stride_ : scores(h) + stride_; }
  M* slopes(int64_t h) const { return reinterpret_cast<M*>(kWeightWords<M> == 1 ? reach(h) : scores(h)); }
  int64_t head_stride() const { return kWeightWords<M> * stride_; }

  // What is done once, before any key: G, and query where it is wanted wider.
  void prepare(int64_t row) {
    if constexpr (sizeof(X) != sizeof(M)) {
      for (int64_t h = 0; h < heads_; ++h) {
        widen(p_.query.as<const X>().at(row, h), head_dim_, kept_.query + h * head_dim_);
      }
    }
    turn_gradient<X>(grads_, row, kept_.grad);
  }

  // From the scores of a head to its weights; those of the keys after the last are 0. Returns delta (1 - g).
  float weigh(int64_t row, int64_t h, int64_t keys) {
    const __m512 one = _mm512_set1_ps(1.f), scale = _mm512_set1_ps(p_.scale);
    const __m512 lse = _mm512_set1_ps(*p_.lse.as<const float>().at(row, h));
    float *score = scores(h), *products = reach(h);
    __m512 total = _mm512_setzero_ps(), along = _mm512_setzero_ps();
    for (int64_t key = 0; key < round_up(keys, kGroup); key += 16) {
      const __m512 s = _mm512_fmsub_ps(_mm512_loadu_ps(score + key), scale, lse);
      const __m512 p = _mm512_maskz_mov_ps(low16(larger(0, smaller(keys - key, 16))), exp(s));
      _mm512_storeu_ps(score + key, p);
      total = _mm512_add_ps(total, p);
      along = _mm512_fmadd_ps(p, _mm512_loadu_ps(products + key), along);
    }
    const float once = 1 / _mm512_reduce_add_ps(total), mean = _mm512_reduce_add_ps(along) * once;
    const __m512 above = _mm512_sub_ps(lse, _mm512_set1_ps(*p_.sink.as<const float>().at(h)));
    const float g = _mm512_cvtss_f32(sigmoid(above));
    const __m512 base = _mm512_set1_ps(*grads_.grad_lse.as<const float>().at(row, h) - g * g * mean);
    const __m512 kept = _mm512_set1_ps(g), whole = _mm512_set1_ps(once);
    for (int64_t key = 0; key < keys; key += kGroup) {
      Pair slope;
      slope.a = put_weights(score + key, products + key, whole, kept, base, scale);
      slope.b = put_weights(score + key + 16, products + key + 16, whole, kept, base, scale);
      put_numerators(slope, slopes(h) + key);
    }
    return g * mean * _mm512_cvtss_f32(_mm512_div_ps(one, _mm512_add_ps(one, exp(above))));
  }

  // The words of 16 keys, in the place of their probabilities. Returns scale d s.
  DSV4_INLINE __m512 put_weights(float* score, float* products, __m512 whole, __m512 kept, __m512 base, __m512 scale) {
    const __m512 p = _mm512_mul_ps(_mm512_loadu_ps(score), whole);
    const __m512 slope = _mm512_fmadd_ps(kept, _mm512_loadu_ps(products), base);
    const __m512 at_query = _mm512_mul_ps(p, _mm512_mul_ps(slope, scale)), at_grad = _mm512_mul_ps(p, kept);
    if constexpr (kWeightWords<M> == 1) {
      _mm512_storeu_si512(score, pack({at_query, at_grad}));
    } else {
      _mm512_storeu_ps(products, at_grad);
    }
    return at_query;
  }

  // 32 dims of query and G of all heads, as the words are paired; dims in the order of `value_order`.
  void right_tile(int64_t row, int64_t d, uint32_t* to) const {
    const M *query_head = query(row) + d, *grad = kept_.grad + d;
    for (int64_t h = 0; h < heads_; ++h, query_head += query_stride(), grad += head_dim_) {
      if constexpr (sizeof(M) == 2) {
        const __m512i q = _mm512_loadu_si512(query_head), g = _mm512_loadu_si512(grad);
        _mm512_storeu_si512(to, _mm512_unpacklo_epi16(q, g));
        _mm512_storeu_si512(to + 16, _mm512_unpackhi_epi16(q, g));
        to += kGroup;
      } else {
        store(reinterpret_cast<float*>(to), load(query_head));
        store(reinterpret_cast<float*>(to + kGroup), load(grad));
        to += 2 * kGroup;
      }
    }
  }

  // The gradients of kCount keys, with a look at the `ahead` next.
  template <int kCount>
  void add(int64_t j, int64_t words, int64_t first_dim, int64_t end_dim, int64_t ahead) const {
    for (int64_t d = first_dim; d < end_dim; d += kGroup) {
      for (int64_t i = 0; i < ahead; ++i) {
        __builtin_prefetch(kept_.keys.sums[j + kCount + i] + d, 1);
        __builtin_prefetch(kept_.keys.sums[j + kCount + i] + d + 16, 1);
      }
      add_products<M, kCount>(kept_.weights + j, stride_, right(d - first_dim), words, kept_.keys.sums + j, d);
    }
  }

  const SparseAttentionParams& p_;
  const SparseAttentionBackwardParams& grads_;
  int64_t heads_, head_dim_, stride_;
  Arena row_arena_, slot_arena_;
  Kept kept_;
  Passing passing_;
};

}  // namespace

int64_t sparse_attention_backward_workspace_bytes(const SparseAttentionBackwardParams& p, const Context& context) {
  int64_t bytes = 0;
  with_types(p.forward, [&](auto x, auto m) {
    bytes = AttentionBackward<BackwardRow<decltype(x), decltype(m)>>(p, context).bytes();
  });
  return bytes;
}

Status sparse_attention_backward(const SparseAttentionBackwardParams& p, const Context& context) {
  with_types(p.forward,
             [&](auto x, auto m) { AttentionBackward<BackwardRow<decltype(x), decltype(m)>>(p, context).run(); });
  return Status::ok();
}

}  // namespace dsv4::avx512
