// Where rows and index keys of a pool are written, for kernels of every device.
#pragma once

#include "common/pages.h"
#include "ops/pool.h"

namespace dsv4 {

enum class PageFormat : int8_t { kFloat32, kBFloat16, kFp8Rows, kFp8Keys, kFp4Keys };

// Strides in bytes.
struct PagePlaces {
  struct Place {
    uint8_t* data;    // null: not stored
    uint8_t* scales;  // of bytes
  };

  PagePlaces() = default;
  DSV4_HOST_DEVICE PagePlaces(const RowPool& pool, int64_t the_dim, int64_t the_rope_dim, bool keys)
      : dim(the_dim), rope_dim(the_rope_dim), page_size(pool.page_size), table(pool.table.as<const int32_t>()) {
    if (pool.bytes.given()) {
      data = static_cast<uint8_t*>(pool.bytes.data);
      pages = pool.bytes.size(0);
      page_stride = pool.bytes.stride[0];
      if (!keys) {
        format = PageFormat::kFp8Rows;
        row_stride = fp8_row_bytes(dim, rope_dim);
        scale_stride = fp8_row_scale_bytes(dim, rope_dim);
      } else {
        const bool fp4 = holds_fp4_keys(pool.bytes.size(1), page_size, dim);
        format = fp4 ? PageFormat::kFp4Keys : PageFormat::kFp8Keys;
        row_stride = fp4 ? dim / 2 : dim;
        scale_stride = fp4 ? dim / kIndexScaleDims : 4;
      }
    } else {
      const bool wide = pool.plain.dtype == DType::kFloat32;
      format = wide ? PageFormat::kFloat32 : PageFormat::kBFloat16;
      data = static_cast<uint8_t*>(pool.plain.data);
      pages = pool.plain.size(0);
      page_stride = pool.plain.stride[0] * (wide ? 4 : 2);
      row_stride = pool.plain.stride[1] * (wide ? 4 : 2);
      scale_stride = 0;
    }
  }

  // A sequence that is no row of the table stores nothing.
  DSV4_HOST_DEVICE Place find(int64_t sequence, int64_t entry) const {
    if (sequence < 0 || sequence >= table.size(0) || entry < 0 || entry > INT32_MAX) return {nullptr, nullptr};
    const int64_t block = static_cast<uint32_t>(entry) / static_cast<uint32_t>(page_size);
    if (block >= table.size(1)) return {nullptr, nullptr};
    const int64_t page = *table.at(sequence, block), offset = entry - block * page_size;
    if (page < 0 || page >= pages) return {nullptr, nullptr};
    uint8_t* start = data + page * page_stride;
    return {start + offset * row_stride, start + page_size * row_stride + offset * scale_stride};
  }

  int64_t dim, rope_dim, page_size;
  View<const int32_t, 2> table;
  PageFormat format;
  uint8_t* data;
  int64_t pages, page_stride, row_stride, scale_stride;
};

}  // namespace dsv4
