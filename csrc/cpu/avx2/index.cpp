// index_topk with AVX2 and FMA: 16 keys (two registers) times up to 6 heads in 12 accumulators. Keys lie dim by dim in
// a panel, the query is broadcast, so that no lane is ever summed across. A sum is float32 over the dims in their
// order.
#include "cpu/index.h"

#include "cpu/avx2/lanes.h"
#include "cpu/index_driver.h"

namespace dsv4::avx2 {
namespace {

constexpr int64_t kKeys = 2 * kLanes;  // of a group

// Adds kHeads heads to the scores of a group of keys: weight * relu(query . key).
template <int kHeads>
DSV4_INLINE void add_heads(const float* query, int64_t dim, const float* weights, const float* group, float* scores) {
  __m256 sums[kHeads][2];
#pragma GCC unroll 6
  for (int h = 0; h < kHeads; ++h) sums[h][0] = sums[h][1] = _mm256_setzero_ps();
  for (int64_t d = 0; d < dim; ++d) {
    const __m256 low = load(group + d * kKeys), high = load(group + d * kKeys + kLanes);
#pragma GCC unroll 6
    for (int h = 0; h < kHeads; ++h) {
      const __m256 q = _mm256_broadcast_ss(query + h * dim + d);
      sums[h][0] = _mm256_fmadd_ps(q, low, sums[h][0]);
      sums[h][1] = _mm256_fmadd_ps(q, high, sums[h][1]);
    }
  }
  for (int half = 0; half < 2; ++half) {
    __m256 score = load(scores + half * kLanes);
#pragma GCC unroll 6
    for (int h = 0; h < kHeads; ++h) {  // the second operand comes through where one is NaN
      const __m256 relu = _mm256_max_ps(_mm256_setzero_ps(), sums[h][half]);
      score = _mm256_add_ps(score, _mm256_mul_ps(_mm256_set1_ps(weights[h]), relu));
    }
    store(scores + half * kLanes, score);
  }
}

// x[j][i] = x[i][j]
DSV4_INLINE void transpose(__m256* x) {
  __m256 y[kLanes], z[kLanes];
  for (int i = 0; i < kLanes; i += 2) {
    y[i] = _mm256_unpacklo_ps(x[i], x[i + 1]);
    y[i + 1] = _mm256_unpackhi_ps(x[i], x[i + 1]);
  }
  for (int i = 0; i < kLanes; i += 4) {
    for (int j = 0; j < 2; ++j) {
      z[i + 2 * j] = _mm256_shuffle_ps(y[i + j], y[i + j + 2], 0x44);
      z[i + 2 * j + 1] = _mm256_shuffle_ps(y[i + j], y[i + j + 2], 0xEE);
    }
  }
  for (int i = 0; i < 4; ++i) {
    x[i] = _mm256_permute2f128_ps(z[i], z[i + 4], 0x20);
    x[i + 4] = _mm256_permute2f128_ps(z[i], z[i + 4], 0x31);
  }
}

class Kernel {
 public:
  using Lanes = PortableLanes;

  static int64_t memory(const IndexTopkParams& p) {
    return (kIndexChunk + p.query.size(1)) * p.query.size(2) * static_cast<int64_t>(sizeof(float));
  }

  Kernel(const IndexTopkParams& p, uint8_t* memory)
      : p_(p),
        format_(IndexKeyPool(p).format()),
        dim_(p.query.size(2)),
        panel_(reinterpret_cast<float*>(memory)),
        query_(panel_ + kIndexChunk * dim_) {}

  int64_t together() const { return 1; }
  void begin(int64_t, int64_t) {}
  void end() {}
  void expect(const IndexKey*, int64_t) {}

  // Keys of no entry score as zeros; nobody reads that.
  void prepare(const IndexKey* keys, int64_t count) {
    for (int64_t first = 0; first < count; first += kLanes) {
      float* to = panel_ + first / kKeys * kKeys * dim_ + first % kKeys;
      for (int64_t d = 0; d < dim_; d += kLanes) {
        __m256 x[kLanes];
        for (int64_t i = 0; i < kLanes; ++i) {
          const bool here = first + i < count && keys[first + i].values != nullptr;
          x[i] = here ? values(keys[first + i], d) : _mm256_setzero_ps();
        }
        transpose(x);
        for (int64_t i = 0; i < kLanes; ++i) store(to + (d + i) * kKeys, x[i]);
      }
    }
  }

  void score(int64_t row, int64_t count, float* scores) const {
    const int64_t heads = p_.query.size(1);
    for (int64_t h = 0; h < heads; ++h) {
      if (p_.query.dtype == DType::kBFloat16) {
        widen(p_.query.as<const bf16>().at(row, h), dim_, query_ + h * dim_);
      } else {
        widen(p_.query.as<const float>().at(row, h), dim_, query_ + h * dim_);
      }
    }
    const float* weights = p_.weights.at(row);
    for (int64_t first = 0; first < count; first += kKeys) {
      const float* group = panel_ + first * dim_;
      float* to = scores + first;
      store(to, _mm256_setzero_ps());
      store(to + kLanes, _mm256_setzero_ps());
      int64_t h = 0;
      for (; h + 6 <= heads; h += 6) add_heads<6>(query_ + h * dim_, dim_, weights + h, group, to);
      for (; h + 4 <= heads; h += 4) add_heads<4>(query_ + h * dim_, dim_, weights + h, group, to);
      for (; h < heads; ++h) add_heads<1>(query_ + h * dim_, dim_, weights + h, group, to);
    }
  }

  static void offer(Selection<Lanes>& best, const float* scores, const uint16_t* stored, int64_t count, int64_t first) {
    for (int64_t i = 0; i < count; i += kLanes) {
      const __m256 score = _mm256_add_ps(load(scores + i), _mm256_setzero_ps());  // as score_key() has it
      const __m256i bits = _mm256_castps_si256(score);
      const __m256i flip = _mm256_and_si256(_mm256_srai_epi32(bits, 31), _mm256_set1_epi32(0x7FFFFFFF));
      const __m256i above = _mm256_cmpgt_epi32(_mm256_xor_si256(bits, flip), _mm256_set1_epi32(best.bound()));
      const __m256 number = _mm256_cmp_ps(score, score, _CMP_ORD_Q);
      uint32_t lanes = static_cast<uint32_t>(_mm256_movemask_ps(_mm256_and_ps(_mm256_castsi256_ps(above), number)));
      lanes &= static_cast<uint32_t>(stored[i / 16]) >> i % 16;
      if (count - i < kLanes) lanes &= (1u << (count - i)) - 1;
      for (; lanes != 0; lanes &= lanes - 1) {
        const int64_t j = i + __builtin_ctz(lanes);
        best.add(score_key(scores[j]), static_cast<int32_t>(first + j));
      }
    }
  }

 private:
  // Eight dims of a key.
  __m256 values(const IndexKey& key, int64_t d) const {
    switch (format_) {
      case IndexKeyFormat::kFp4:
        return _mm256_mul_ps(e2m1_values(key.values + d / 2),
                             _mm256_set1_ps(e8m0_value(key.scales[d / kIndexScaleDims])));
      case IndexKeyFormat::kFp8: {
        float scale;
        memcpy(&scale, key.scales, sizeof(scale));
        return _mm256_mul_ps(e4m3_values(key.values + d), _mm256_set1_ps(scale));
      }
      case IndexKeyFormat::kBFloat16:
        return load(reinterpret_cast<const bf16*>(key.values) + d);
      case IndexKeyFormat::kFloat32:
        return load(reinterpret_cast<const float*>(key.values) + d);
    }
    return _mm256_setzero_ps();
  }

  const IndexTopkParams& p_;
  IndexKeyFormat format_;
  int64_t dim_;
  float* panel_;  // [groups of kKeys][dims][kKeys]
  float* query_;  // [heads][dims]
};

}  // namespace

int64_t index_topk_workspace_bytes(const IndexTopkParams& p, const Context& context) {
  return IndexCall<Kernel>(p, context).bytes();
}

Status index_topk(const IndexTopkParams& p, const Context& context) { return IndexCall<Kernel>(p, context).run(); }

}  // namespace dsv4::avx2
