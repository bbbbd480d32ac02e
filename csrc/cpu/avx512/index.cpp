// index_topk: 48 keys (three registers of 16 lanes) times 8 heads in 24 accumulators. Keys lie dim by dim (or two dims
// by two) in a panel, the query is broadcast, so a head's relu and weight cost two instructions for 16 keys and no lane
// is ever summed across. bfloat16 queries with keys that are exact in bfloat16 use its dot product (exact products,
// float32 sums; it takes denormals for zero), all others float32 FMA. H D FLOPs a key, twice, for D / 2 + D / 32 bytes
// (FP4): at 64 heads of 128 dims 240 FLOPs a byte, so arithmetic is the bound even of a single row; 80 % of it
// expected, the rest goes into preparing the keys, which a block of rows of one sequence shares.
// index_query: a head in registers through rotation and Hadamard (float64, 7 additions a dim at 128), then FP4. 4 bytes
// a dim of bfloat16 in and out, some 15 operations: bound by arithmetic.
#include "cpu/index.h"

#include "cpu/avx512/index_scores.h"
#include "cpu/avx512/rows.h"
#include "cpu/index_query_rows.h"

namespace dsv4::avx512 {
namespace {

// A step is a pair of dims of bfloat16, or one dim of float32.
DSV4_INLINE __m512 index_fma(__m512 sum, const uint32_t* panel, const bf16* query, int64_t step) {
  int32_t pair;
  memcpy(&pair, query + 2 * step, sizeof(pair));
  return _mm512_dpbf16_ps(sum, reinterpret_cast<__m512bh>(_mm512_load_si512(panel)),
                          reinterpret_cast<__m512bh>(_mm512_set1_epi32(pair)));
}
DSV4_INLINE __m512 index_fma(__m512 sum, const float* panel, const float* query, int64_t step) {
  return _mm512_fmadd_ps(_mm512_load_ps(panel), _mm512_set1_ps(query[step]), sum);
}

// Adds kHeads heads to the scores of kGroups groups of keys.
template <int kHeads, int kGroups, class T, class Element>
static __attribute__((noinline)) void index_tile(const T* query, int64_t head_stride, const float* weights,
                                                 const Element* panel, int64_t group, int64_t steps, float* scores) {
  __m512 sums[kHeads][kGroups];
#pragma GCC unroll 8
  for (int h = 0; h < kHeads; ++h) {
#pragma GCC unroll 3
    for (int g = 0; g < kGroups; ++g) sums[h][g] = _mm512_setzero_ps();
  }
  for (int64_t s = 0; s < steps; ++s) {
#pragma GCC unroll 8
    for (int h = 0; h < kHeads; ++h) {
#pragma GCC unroll 3
      for (int g = 0; g < kGroups; ++g) {
        sums[h][g] = index_fma(sums[h][g], panel + g * group + s * kIndexLanes, query + h * head_stride, s);
      }
    }
  }
#pragma GCC unroll 3
  for (int g = 0; g < kGroups; ++g) {
    __m512 score = _mm512_load_ps(scores + g * kIndexLanes);
#pragma GCC unroll 8
    for (int h = 0; h < kHeads; ++h) score = index_add(score, weights[h], sums[h][g]);
    _mm512_store_ps(scores + g * kIndexLanes, score);
  }
}

// T: what is multiplied.
template <class T>
class Kernel {
 public:
  using Lanes = IndexLanes;

  static int64_t memory(const IndexTopkParams& p) { return query_bytes(p) + IndexKeys<T>::bytes(p); }

  Kernel(const IndexTopkParams& p, uint8_t* memory)
      : p_(p), keys_(p, memory + query_bytes(p)), wide_(reinterpret_cast<float*>(memory)) {}

  int64_t together() const { return 1; }
  void begin(int64_t, int64_t) {}
  void end() {}
  void prepare(const IndexKey* keys, int64_t count) { keys_.prepare(keys, count); }

  void expect(const IndexKey* keys, int64_t count) { keys_.expect(keys, count); }

  void score(int64_t row, int64_t count, float* scores) {
    const T* query;
    int64_t head_stride;
    if constexpr (std::is_same_v<T, float>) {
      query = p_.query.dtype == DType::kFloat32 ? p_.query.as<const float>().at(row) : widen(row);
      head_stride = p_.query.dtype == DType::kFloat32 ? p_.query.stride[1] : p_.query.size(2);
    } else {
      query = p_.query.as<const bf16>().at(row);
      head_stride = p_.query.stride[1];
    }
    const float* weights = p_.weights.at(row);
    int64_t first = 0;
    for (; first + 2 * kIndexLanes < count; first += 3 * kIndexLanes) {
      keys_.fetch(3 * kIndexLanes);
      heads<3>(query, head_stride, weights, first, scores + first);
    }
    for (; first < count; first += kIndexLanes) heads<1>(query, head_stride, weights, first, scores + first);
    keys_.scale(count, scores);
  }

  static void offer(Selection<Lanes>& best, const float* scores, const uint16_t* stored, int64_t count, int64_t first) {
    index_offer(best, scores, stored, count, first);
  }

 private:
  static int64_t query_bytes(const IndexTopkParams& p) {
    const bool widened = std::is_same_v<T, float> && p.query.dtype == DType::kBFloat16;
    return widened ? round_up(p.query.size(1) * p.query.size(2) * 4, 64) : 0;
  }

  const float* widen(int64_t row) const {
    const auto query = p_.query.as<const bf16>();
    const int64_t dim = query.size(2);
    for (int64_t h = 0; h < query.size(1); ++h) {
      for (int64_t d = 0; d < dim; d += kStep) {
        avx512::store(wide_ + h * dim + d, natural(load(query.at(row, h, d)), static_cast<const bf16*>(nullptr)));
      }
    }
    return wide_;
  }

  template <int kGroups>
  void heads(const T* query, int64_t head_stride, const float* weights, int64_t first, float* scores) const {
    const auto* panel = keys_.group(first / kIndexLanes);
    const int64_t count = p_.query.size(1), group = keys_.group_elements(), steps = group / kIndexLanes;
    for (int g = 0; g < kGroups; ++g) _mm512_store_ps(scores + g * kIndexLanes, _mm512_setzero_ps());
    int64_t h = 0;
    const auto add = [&](auto tile, int heads) {
      tile(query + h * head_stride, head_stride, weights + h, panel, group, steps, scores);
      h += heads;
    };
    while (h + 8 <= count) add(index_tile<8, kGroups, T, typename IndexKeys<T>::Element>, 8);
    if (h + 4 <= count) add(index_tile<4, kGroups, T, typename IndexKeys<T>::Element>, 4);
    if (h + 2 <= count) add(index_tile<2, kGroups, T, typename IndexKeys<T>::Element>, 2);
    if (h < count) add(index_tile<1, kGroups, T, typename IndexKeys<T>::Element>, 1);
  }

  const IndexTopkParams& p_;
  IndexKeys<T> keys_;
  float* wide_;
};

bool in_bf16(const IndexTopkParams& p) { return p.query.dtype == DType::kBFloat16 && p.plain.dtype != DType::kFloat32; }

}  // namespace

int64_t index_topk_workspace_bytes(const IndexTopkParams& p, const Context& context) {
  return in_bf16(p) ? IndexCall<Kernel<bf16>>(p, context).bytes() : IndexCall<Kernel<float>>(p, context).bytes();
}

Status index_topk(const IndexTopkParams& p, const Context& context) {
  return in_bf16(p) ? IndexCall<Kernel<bf16>>(p, context).run() : IndexCall<Kernel<float>>(p, context).run();
}

Status index_query(const IndexQueryParams& p, const Context& context) {
  return p.query.dtype == DType::kBFloat16 ? index_query_rows<bf16>(Lanes(), p, context)
                                           : index_query_rows<float>(Lanes(), p, context);
}

}  // namespace dsv4::avx512
