// index_query and index_topk, portable. index_topk: sums in double precision, rounded to float32 once, as the
// definition has them. Also the yardstick for the other kernels.
#include "cpu/index.h"

#include "cpu/index_driver.h"
#include "cpu/index_query_rows.h"
#include "cpu/scalar/rows.h"

namespace dsv4::scalar {
namespace {

class Kernel {
 public:
  using Lanes = PortableLanes;

  static int64_t memory(const IndexTopkParams& p) {
    return kIndexChunk * p.query.size(2) * static_cast<int64_t>(sizeof(float));
  }

  Kernel(const IndexTopkParams& p, uint8_t* memory)
      : p_(p), format_(IndexKeyPool(p).format()), dim_(p.query.size(2)), keys_(reinterpret_cast<float*>(memory)) {}

  int64_t together() const { return 1; }
  void begin(int64_t, int64_t) {}
  void end() {}
  void prepare(const IndexKey* keys, int64_t count) {
    for (int64_t i = 0; i < count; ++i) {
      if (keys[i].values != nullptr) decode(keys[i], keys_ + i * dim_);
    }
    stored_ = keys;
  }

  void expect(const IndexKey*, int64_t) {}

  void score(int64_t row, int64_t count, float* scores) const {
    for (int64_t i = 0; i < count; ++i) {
      if (stored_[i].values == nullptr) continue;
      scores[i] =
          p_.query.dtype == DType::kBFloat16 ? one<bf16>(row, keys_ + i * dim_) : one<float>(row, keys_ + i * dim_);
    }
  }

  static void offer(Selection<Lanes>& best, const float* scores, const uint16_t* stored, int64_t count, int64_t first) {
    for (int64_t i = 0; i < count; ++i) {
      if ((stored[i / 16] >> (i % 16) & 1) == 0 || scores[i] != scores[i]) continue;
      best.add(score_key(scores[i]), static_cast<int32_t>(first + i));
    }
  }

 private:
  void decode(const IndexKey& key, float* to) const {
    switch (format_) {
      case IndexKeyFormat::kFp4:
        for (int64_t d = 0; d < dim_; ++d) {
          const uint8_t pair = key.values[d / 2];
          to[d] = e2m1_value(d % 2 == 0 ? pair & 15 : pair >> 4) * e8m0_value(key.scales[d / kIndexScaleDims]);
        }
        break;
      case IndexKeyFormat::kFp8: {
        float scale;
        memcpy(&scale, key.scales, sizeof(scale));
        for (int64_t d = 0; d < dim_; ++d) to[d] = e4m3_value(key.values[d]) * scale;
        break;
      }
      case IndexKeyFormat::kBFloat16:
        for (int64_t d = 0; d < dim_; ++d) to[d] = to_float(reinterpret_cast<const bf16*>(key.values)[d]);
        break;
      case IndexKeyFormat::kFloat32:
        for (int64_t d = 0; d < dim_; ++d) to[d] = reinterpret_cast<const float*>(key.values)[d];
        break;
    }
  }

  template <class X>
  float one(int64_t row, const float* key) const {
    const auto query = p_.query.as<const X>();
    double score = 0;
    for (int64_t h = 0; h < query.size(1); ++h) {
      const X* q = query.at(row, h);
      double product = 0;
      for (int64_t d = 0; d < dim_; ++d) product += static_cast<double>(to_float(q[d])) * key[d];
      score += *p_.weights.at(row, h) * (product < 0 ? 0 : product);
    }
    return static_cast<float>(score);
  }

  const IndexTopkParams& p_;
  IndexKeyFormat format_;
  int64_t dim_;
  float* keys_;
  const IndexKey* stored_ = nullptr;
};

}  // namespace

int64_t index_topk_workspace_bytes(const IndexTopkParams& p, const Context& context) {
  return IndexCall<Kernel>(p, context).bytes();
}

Status index_topk(const IndexTopkParams& p, const Context& context) { return IndexCall<Kernel>(p, context).run(); }

Status index_query(const IndexQueryParams& p, const Context& context) {
  return p.query.dtype == DType::kBFloat16 ? index_query_rows<bf16>(Lanes(), p, context)
                                           : index_query_rows<float>(Lanes(), p, context);
}

}  // namespace dsv4::scalar
