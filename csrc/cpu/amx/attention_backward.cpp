// sparse_attention_backward by AMX tiles, bfloat16, 2 x 2 tiles of sums, 32 dims, keys or (of keys' gradients) 16 heads
// a step. Scores and G . key are products as the forward kernel's scores: 32 decoded keys are the left operand. Their
// sums have 16 heads side by side, so probabilities and d s need no sums across a register; and a key's two weights of
// 16 heads, of query and of G, are the line of a left operand in which its gradient is a product with the heads' dims,
// query and G in pairs. d query is a product as the forward kernel's values. Of rows of up to 1,024 keys pairs of keys
// are kept from the first step to the second; of longer ones they are decoded again, as many at a time.
// 10 H D FLOPs a key and row; what keeps it from the tiles' rate are the keys' sums, 8 D bytes a key and row that come
// from the caches and go back.
#include "cpu/amx/attention_product.h"
#include "cpu/attention.h"
#include "cpu/attention_backward_driver.h"
#include "cpu/avx512/attention_gradient.h"

namespace dsv4::DSV4_AMX_NAMESPACE {
namespace {

constexpr int64_t kChunk = 1024;  // keys whose pairs lie in memory at a time

class BackwardRow {
 public:
  static constexpr int64_t kBlockBytes = 1 << 20;

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
        head_tiles_(tiles_of(heads_)),
        row_arena_{row_memory},
        slot_arena_{slot_memory},
        kept_(p_, most, row_arena_),
        passing_(p_, most, slot_arena_) {}

  void differentiate(int64_t row, const KeySums& key_sums, float* gates) {
    kept_.keys.list(p_, row, key_sums);
    const int64_t keys = kept_.keys.count->all;
    if (keys == 0) return clear_row<bf16>(grads_, row, gates);
    avx512::turn_gradient<bf16>(grads_, row, kept_.grad);
    pack_query(p_, row, passing_.query);
    pack_heads(kept_.grad, head_dim_, heads_, head_dim_, passing_.grad);
    score(keys);
    for (int64_t tile = 0; tile < head_tiles_; ++tile) weigh(row, tile, keys, gates);
    for (int64_t first = 0; first < keys; first += kChunk) mix(first, smaller(kChunk, keys - first), keys);
    for (int64_t h = 0; h < heads_; ++h) write(h, grads_.grad_query.as<bf16>().at(row, h));
  }

  void add_to_keys(int64_t row, int64_t first_dim, int64_t end_dim) {
    const int64_t keys = kept_.keys.count->all;
    if (keys == 0) return;
    pair_heads(row, first_dim, end_dim);
    configure();
    Block before{0, 0, 0}, next;
    float* sums = passing_.blocks[0];
    for (next.key = 0; next.key < keys; next.key += kStepKeys) {
      float* const* to = kept_.keys.sums + next.key;
      next.count = smaller(keys - next.key, kStepKeys);
      int64_t wanted = 0;
      for (int64_t i = 0; i < next.count; ++i) wanted += to[i] != nullptr;
      if (wanted == 0) continue;
      const bf16* words = reinterpret_cast<const bf16*>(scores(next.key));
      const Left left = {words, kStepKeys, kTileElements, 2 * kTileElements};
      for (next.dim = first_dim; next.dim < end_dim; next.dim += kStepDims) {
        const int64_t place = (next.dim - first_dim) / kTileRows * head_tiles_ * kTileElements;
        const Right right = {passing_.right + place, kStepKeys, head_tiles_ * kTileElements, kTileElements};
        multiply<true, true>(left, right, head_tiles_, true, {sums, 2 * kTileSums, kTileSums});
        sums = passing_.blocks[sums == passing_.blocks[0]];
        add_block(before, sums);  // of the block before: tiles that were just stored would have to be waited for
        before = next;
      }
    }
    tile_release();
    add_block(before, passing_.blocks[sums == passing_.blocks[0]]);
  }

  static void narrow(const float* sums, int64_t dims, bf16* to) {
    for (int64_t d = 0; d < dims; d += kStepDims) {
      const __m512 one = _mm512_set1_ps(1.f);
      _mm512_storeu_si512(to + d, pack_sums(_mm512_loadu_ps(sums + d), _mm512_loadu_ps(sums + d + kTileRows), one));
    }
  }

 private:
  // Between the two steps.
  struct Kept {
    TargetKeys keys;
    bf16* grad;     // [H, D], G
    float* scores;  // [keys / 32][tile of heads][32 keys][16 heads]; then weights of query and G, two bfloat16

    Kept(const SparseAttentionParams& p, int64_t most, Arena& arena)
        : keys(most, arena),
          grad(arena.take<bf16>(p.query.size(1) * p.query.size(2))),
          scores(arena.take<float>(round_up(most, kStepKeys) * tiles_of(p.query.size(1)) * kTileRows)) {}
  };

  // Within a step. Heads are padded to whole tiles.
  struct Passing {
    bf16 *query, *grad;  // as pack_heads leaves them
    bf16* rows;          // [32 keys, row_stride], a slice of their dims
    bf16* pairs;         // [keys of a chunk / 32], pairs_stride apart
    float* reach;        // G . key, as the scores
    bf16* slopes;        // scale d s: [tile of heads][keys / 32][16 heads][32 keys]
    float* sums;         // [tile of heads][tile of dims][16 heads][16 dims], of d query
    bf16* right;         // [tile of dims][tile of heads][16 heads][16 dims][2], query and G
    float* blocks[2];    // four tiles of sums

    Passing(const SparseAttentionParams& p, int64_t most, Arena& arena) {
      const int64_t heads = tiles_of(p.query.size(1)) * kTileRows, head_dim = p.query.size(2);
      const int64_t keys = round_up(most, kStepKeys);
      query = arena.take<bf16>(heads * head_dim);
      grad = arena.take<bf16>(heads * head_dim);
      rows = arena.take<bf16>(kStepKeys * row_stride(smaller(head_dim, kSliceDims)));
      pairs = arena.take<bf16>(smaller(keys, kChunk) / kStepKeys * pairs_stride(head_dim));
      reach = arena.take<float>(keys * heads);
      slopes = arena.take<bf16>(keys * heads);
      sums = arena.take<float>(heads * head_dim);
      right = arena.take<bf16>(2 * heads * head_dim);
      for (float*& block : blocks) block = arena.take<float>(4 * kTileSums);
    }
  };

  int64_t padded_heads() const { return head_tiles_ * kTileRows; }
  float* scores(int64_t key) const { return kept_.scores + key * padded_heads(); }
  float* reach(int64_t key) const { return passing_.reach + key * padded_heads(); }
  int64_t rows_stride() const { return row_stride(smaller(head_dim_, kSliceDims)); }
  static int64_t steps_of(int64_t keys) { return (keys + kStepKeys - 1) / kStepKeys; }

  // Two keys from `key` on: dims [d, last) into their rows and, from a row of pairs on, beside each other.
  template <bool kRows>
  void read(const KeyRows& keys, int64_t key, int64_t d, int64_t last, bf16* pairs) const {
    for (int64_t j = key + kAhead; d == 0 && j < smaller(key + kAhead + 2, keys.end); ++j) KeyRows::prefetch(keys, j);
    const int64_t i = key % kStepKeys / 2;
    bf16* rows = passing_.rows + (kRows ? 2 * i * rows_stride() : 0);
    bf16* to = pairs == nullptr ? nullptr : pairs + 2 * d + i * pair_stride(head_dim_);
    KeyRows::read<kRows>(keys, key, d, last, rows, rows_stride(), to);
  }

  // query . key and G . key of all keys.
  void score(int64_t keys) const {
    const KeyRows reader(p_, kept_.keys.keys, keys);
    for (int64_t j = 0; j < smaller(kAhead, keys); ++j) KeyRows::prefetch(reader, j);
    configure();
    for (int64_t key = 0; key < keys; key += kStepKeys) {
      bf16* pairs = keys > kChunk ? nullptr : passing_.pairs + key / kStepKeys * pairs_stride(head_dim_);
      for (int64_t d = 0; d < head_dim_; d += kSliceDims) {
        const int64_t last = smaller(d + kSliceDims, head_dim_);
        for (int64_t i = 0; i < kStepKeys; i += 2) read<true>(reader, key + i, d, last, pairs);
        score_slice(passing_.query, d, last, scores(key));
        score_slice(passing_.grad, d, last, reach(key));
      }
    }
    tile_release();
  }

  // Adds dims [d, last) of 32 keys.
  void score_slice(const bf16* heads, int64_t d, int64_t last, float* to) const {
    const int64_t stride = rows_stride(), steps = (last - d) / kStepDims;
    const Left left = {passing_.rows, stride, kTileRows * stride, kStepDims};
    heads += d * padded_heads();
    for (int64_t tile = 0; tile < head_tiles_; tile += 2, to += 4 * kTileSums, heads += 2 * steps * kTileElements) {
      const Sums sums = {to, kTileSums, 2 * kTileSums};
      if (tile + 1 < head_tiles_) {
        multiply<true, true>(left, {heads, kStepDims, kTileElements, 2 * kTileElements}, steps, d == 0, sums);
      } else {
        multiply<true, false>(left, {heads, kStepDims, 0, kTileElements}, steps, d == 0, sums);
      }
    }
  }

  // From the scores of 16 heads to their weights, and to scale d s as a left operand. gates[head] = delta (1 - g).
  void weigh(int64_t row, int64_t tile, int64_t keys, float* gates) const {
    const __mmask16 given = avx512::low16(smaller(heads_ - tile * kTileRows, kTileRows));
    const auto of_heads = [&](const float* at) { return _mm512_maskz_loadu_ps(given, at + tile * kTileRows); };
    const __m512 one = _mm512_set1_ps(1.f), scale = _mm512_set1_ps(p_.scale);
    const __m512 lse = of_heads(p_.lse.as<const float>().at(row));
    __m512 total[2] = {_mm512_setzero_ps(), _mm512_setzero_ps()}, along[2] = {total[0], total[0]};
    for (int64_t key = 0; key < keys; ++key) {
      const int64_t at = (key / kStepKeys * head_tiles_ + tile) * 2 * kTileSums + key % kStepKeys * kTileRows;
      const __m512 s = _mm512_fmsub_ps(_mm512_loadu_ps(kept_.scores + at), scale, lse), p = avx512::exp(s);
      _mm512_storeu_ps(kept_.scores + at, p);
      total[key % 2] = _mm512_add_ps(total[key % 2], p);
      along[key % 2] = _mm512_fmadd_ps(p, _mm512_loadu_ps(passing_.reach + at), along[key % 2]);
    }
    const __m512 once = _mm512_div_ps(one, _mm512_add_ps(total[0], total[1]));
    const __m512 mean = _mm512_mul_ps(_mm512_add_ps(along[0], along[1]), once);
    const __m512 above = _mm512_sub_ps(lse, of_heads(p_.sink.as<const float>().at(0)));
    const __m512 kept = avx512::sigmoid(above);
    const __m512 base =
        _mm512_fnmadd_ps(_mm512_mul_ps(kept, kept), mean, of_heads(grads_.grad_lse.as<const float>().at(row)));
    const __m512 gate = _mm512_div_ps(_mm512_mul_ps(kept, mean), _mm512_add_ps(one, avx512::exp(above)));
    _mm512_mask_storeu_ps(gates + tile * kTileRows, given, gate);
    bf16* to = passing_.slopes + tile * steps_of(keys) * kTileElements;
    for (int64_t key = 0; key < keys; key += kStepKeys, to += kTileElements) {
      const int64_t at = (key / kStepKeys * head_tiles_ + tile) * 2 * kTileSums;
      put_weights(kept_.scores + at, passing_.reach + at, once, kept, base, to);
    }
  }

  // Of 32 keys, whose probabilities become the words of their weights. Keys after the last have scores of 0.
  void put_weights(float* p, const float* reach, __m512 once, __m512 kept, __m512 base, bf16* to) const {
    const __m512 scale = _mm512_set1_ps(p_.scale);
    __m512i slopes[kTileRows];
    for (int64_t i = 0; i < kTileRows; ++i) {
      __m512 slope[2];
      for (int64_t j = 0; j < 2; ++j, p += kTileRows, reach += kTileRows) {
        const __m512 mine = _mm512_mul_ps(_mm512_loadu_ps(p), once), at_grad = _mm512_mul_ps(mine, kept);
        slope[j] = _mm512_mul_ps(mine, _mm512_mul_ps(_mm512_fmadd_ps(kept, _mm512_loadu_ps(reach), base), scale));
        _mm512_storeu_si512(p, avx512::pack({slope[j], at_grad}));
      }
      slopes[i] = avx512::pack({slope[0], slope[1]});
    }
    avx512::transpose(slopes);
    for (int64_t i = 0; i < kTileRows; ++i) _mm512_storeu_si512(to + i * kStepKeys, slopes[i]);
  }

  // Adds scale d s * key over some keys to d query.
  void mix(int64_t first, int64_t count, int64_t keys) const {
    const int64_t steps = steps_of(count), second = steps_of(keys) * kTileElements;
    if (keys > kChunk) {
      const KeyRows reader(p_, kept_.keys.keys, first + count);
      for (int64_t key = first; key < first + steps * kStepKeys; key += 2) {
        bf16* pairs = passing_.pairs + (key - first) / kStepKeys * pairs_stride(head_dim_);
        for (int64_t d = 0; d < head_dim_; d += kSliceDims) {
          read<false>(reader, key, d, smaller(d + kSliceDims, head_dim_), pairs);
        }
      }
    }
    configure();
    const bf16* slopes = passing_.slopes + first / kStepKeys * kTileElements;
    const int64_t below = kTileRows * head_dim_;
    for (int64_t tile = 0; tile < head_tiles_; tile += 2, slopes += 2 * second) {
      const Left left = {slopes, kStepKeys, second, kTileElements};
      for (int64_t d = 0; d < head_dim_; d += kStepDims) {
        const Right right = {passing_.pairs + 2 * d, pair_stride(head_dim_), kStepDims, pairs_stride(head_dim_)};
        const Sums sums = {passing_.sums + tile * below + d * kTileRows, below, kTileSums};
        if (tile + 1 < head_tiles_) {
          multiply<true, true>(left, right, steps, first == 0, sums);
        } else {
          multiply<false, true>(left, right, steps, first == 0, sums);
        }
      }
    }
    tile_release();
  }

  void write(int64_t head, bf16* out) const {
    const float* sums = passing_.sums + (head / kTileRows * head_dim_ + head % kTileRows) * kTileRows;
    for (int64_t d = 0; d < head_dim_; d += kStepDims, sums += 2 * kTileSums) {
      _mm512_storeu_si512(out + d,
                          pack_sums(_mm512_loadu_ps(sums), _mm512_loadu_ps(sums + kTileSums), _mm512_set1_ps(1.f)));
    }
  }

  // Dims of query and G of all heads in pairs, the right operand of the keys' gradients; 32 of them by fours.
  void pair_heads(int64_t row, int64_t first_dim, int64_t end_dim) const {
    bf16* to = passing_.right;
    const int64_t tile = head_tiles_ * kTileElements;
    for (int64_t d = first_dim; d < end_dim; d += kStepDims, to += 2 * tile) {
      for (int64_t h = 0; h < padded_heads(); ++h) {
        __m512i query = _mm512_setzero_si512(), grad = query;
        if (h < heads_) {
          query = _mm512_loadu_si512(p_.query.as<const bf16>().at(row, h) + d);
          grad = _mm512_loadu_si512(kept_.grad + h * head_dim_ + d);
        }
        _mm512_storeu_si512(to + h * kStepKeys, _mm512_unpacklo_epi16(query, grad));
        _mm512_storeu_si512(to + tile + h * kStepKeys, _mm512_unpackhi_epi16(query, grad));
      }
    }
  }

  // 32 dims of the gradients of up to 32 keys.
  struct Block {
    int64_t key, count, dim;
  };
  // One key after the other: two of them may be the same row.
  void add_block(const Block& b, const float* sums) const {
    for (int64_t i = 0; i < b.count; ++i, sums += kTileRows) {
      float* to = kept_.keys.sums[b.key + i];
      if (to == nullptr) continue;
      const float* from = i < kTileRows ? sums : sums + kTileSums;
      for (int64_t half = 0; half < 2; ++half) {
        float* at = to + b.dim + half * kTileRows;
        _mm512_storeu_ps(at, _mm512_add_ps(_mm512_loadu_ps(at), _mm512_loadu_ps(from + half * kTileSums)));
      }
    }
  }

  const SparseAttentionParams& p_;
  const SparseAttentionBackwardParams& grads_;
  int64_t heads_, head_dim_, head_tiles_;
  Arena row_arena_, slot_arena_;
  Kept kept_;
  Passing passing_;
};

}  // namespace

int64_t sparse_attention_backward_workspace_bytes(const SparseAttentionBackwardParams& p, const Context& context) {
  return AttentionBackward<BackwardRow>(p, context).bytes();
}

Status sparse_attention_backward(const SparseAttentionBackwardParams& p, const Context& context) {
  AttentionBackward<BackwardRow>(p, context).run();
  return Status::ok();
}

}  // namespace dsv4::DSV4_AMX_NAMESPACE
