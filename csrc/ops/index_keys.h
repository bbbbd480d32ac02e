// Where index keys lie (python/dsv4/ops/layout.py is the definition). A page of b keys of D dims holds, in FP4: b times
// D / 2 bytes of e2m1 codes (even dim in the low nibble), then b times D / 32 e8m0 scales; in FP8: b times D e4m3
// codes, then b float32 scales; else b rows of D floats.
#pragma once

#include "common/pages.h"
#include "ops/index.h"

namespace dsv4 {

enum class IndexKeyFormat : int8_t { kFloat32, kBFloat16, kFp8, kFp4 };

struct IndexKey {
  const uint8_t* values;  // null: not stored
  const uint8_t* scales;  // FP4, FP8
};

class IndexKeyPool {
 public:
  DSV4_HOST_DEVICE explicit IndexKeyPool(const IndexTopkParams& p)
      : dim_(p.query.size(2)), page_size_(p.page_size), blocks_(p.table.size(1)), table_(p.table.as<const int32_t>()) {
    if (p.bytes.given()) {
      const bool fp4 = holds_fp4_keys(p.bytes.size(1), page_size_, dim_);
      format_ = fp4 ? IndexKeyFormat::kFp4 : IndexKeyFormat::kFp8;
      data_ = static_cast<const uint8_t*>(p.bytes.data);
      pages_ = p.bytes.size(0);
      page_stride_ = p.bytes.stride[0];
      key_stride_ = fp4 ? dim_ / 2 : dim_;
      scale_bytes_ = fp4 ? dim_ / kIndexScaleDims : 4;
    } else {
      const bool wide = p.plain.dtype == DType::kFloat32;
      format_ = wide ? IndexKeyFormat::kFloat32 : IndexKeyFormat::kBFloat16;
      data_ = static_cast<const uint8_t*>(p.plain.data);
      pages_ = p.plain.size(0);
      page_stride_ = p.plain.stride[0] * (wide ? 4 : 2);
      key_stride_ = p.plain.stride[1] * (wide ? 4 : 2);
      scale_bytes_ = 0;
    }
  }

  DSV4_HOST_DEVICE IndexKeyFormat format() const { return format_; }
  DSV4_HOST_DEVICE int64_t dim() const { return dim_; }
  // Of the values of a key.
  DSV4_HOST_DEVICE int64_t value_bytes() const {
    const bool wide = format_ == IndexKeyFormat::kFloat32, half = format_ == IndexKeyFormat::kBFloat16;
    return format_ == IndexKeyFormat::kFp4 ? dim_ / 2 : dim_ * (wide ? 4 : half ? 2 : 1);
  }
  // Entries that a sequence can have.
  DSV4_HOST_DEVICE int64_t entries() const { return blocks_ * page_size_; }

  // Keys of the entries [first, first + count) of a sequence, all below entries().
  DSV4_HOST_DEVICE void locate(int64_t sequence, int64_t first, int64_t count, IndexKey* keys) const {
    const int32_t* block = table_.at(sequence) + first / page_size_;
    int64_t offset = first % page_size_;
    for (int64_t i = 0; i < count; ++block, offset = 0) {
      const int64_t page = *block;
      const int64_t end = i + page_size_ - offset < count ? i + page_size_ - offset : count;
      if (page < 0 || page >= pages_) {
        for (; i < end; ++i) keys[i] = IndexKey{nullptr, nullptr};
        continue;
      }
      const uint8_t* at = data_ + page * page_stride_;
      const uint8_t *values = at + offset * key_stride_,
                    *scales = at + page_size_ * key_stride_ + offset * scale_bytes_;
      for (; i < end; ++i, values += key_stride_, scales += scale_bytes_) keys[i] = IndexKey{values, scales};
    }
  }

 private:
  int64_t dim_, page_size_, blocks_;
  View<const int32_t, 2> table_;
  IndexKeyFormat format_;
  const uint8_t* data_;
  int64_t pages_, page_stride_, key_stride_, scale_bytes_;
};

}  // namespace dsv4
