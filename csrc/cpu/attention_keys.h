// What the attention kernels share: the list of a row's keys, and what its length may be at most.
#pragma once

#include "common/pages.h"
#include "ops/attention.h"

namespace dsv4 {

// A stored row: its bytes, and its scales in an FP8 pool.
struct Key {
  const uint8_t* data;
  const uint8_t* scales;
};

DSV4_HOST_DEVICE int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
DSV4_HOST_DEVICE int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }

// At most how many keys a row has of each pool.
DSV4_HOST_DEVICE int64_t most_window_keys(const SparseAttentionParams& p, int64_t row) {
  const int64_t reach = static_cast<int64_t>(*p.position.as<const int32_t>().at(row)) + 1;
  return larger(0, smaller(smaller(reach, p.window), p.window_pool.table.size(1) * p.window_pool.page_size));
}
DSV4_HOST_DEVICE int64_t most_entries(const SparseAttentionParams& p, int64_t row) {
  if (!p.compressed.given()) return 0;
  const int64_t length = *p.lengths.as<const int32_t>().at(row);
  const int64_t most = p.indices.given() ? p.indices.size(1) : p.compressed.table.size(1) * p.compressed.page_size;
  return length <= 0 ? 0 : p.indices.given() ? most : smaller(length, most);
}
DSV4_HOST_DEVICE int64_t most_keys_of_any_row(const SparseAttentionParams& p) {
  int64_t most = 0;
  for (int64_t row = 0; row < p.query.size(0); ++row)
    most = larger(most, most_window_keys(p, row) + most_entries(p, row));
  return most;
}

// Reads entries of one sequence in one pool.
class PoolReader {
 public:
  DSV4_HOST_DEVICE PoolReader(const RowPool& pool, int64_t sequence, int64_t head_dim, int64_t rope_dim)
      : table_(pool.table.as<const int32_t>().at(sequence)),
        blocks_(pool.table.size(1)),
        pages_(pool.bytes.given() ? pool.bytes.size(0) : pool.plain.size(0)),
        page_size_(pool.page_size),
        fp8_(pool.bytes.given()),
        head_dim_(head_dim),
        rope_dim_(rope_dim) {
    const int64_t element = pool.plain.dtype == DType::kFloat32 ? 4 : 2;
    data_ = static_cast<const uint8_t*>(fp8_ ? pool.bytes.data : pool.plain.data);
    page_stride_ = fp8_ ? pool.bytes.stride[0] : pool.plain.stride[0] * element;
    row_stride_ = fp8_ ? fp8_row_bytes(head_dim, rope_dim) : pool.plain.stride[1] * element;
  }

  // Appends the entry, from 0 on, if it is stored.
  DSV4_HOST_DEVICE void append(int64_t entry, Key* keys, int64_t& count) const {
    const int64_t block = entry / page_size_;
    if (block >= blocks_ || !stored(block)) return;
    keys[count++] = key_at(table_[block], entry - block * page_size_);
  }

  // Puts each of [begin, end) in its place; what is not stored has no data.
  DSV4_HOST_DEVICE void place(int64_t begin, int64_t end, Key* keys) const {
    for (int64_t entry = begin; entry < end;) {
      const int64_t block = entry / page_size_, last = smaller(end, (block + 1) * page_size_);
      const bool here = block < blocks_ && stored(block);
      for (; entry < last; ++entry) {
        *keys++ = here ? key_at(table_[block], entry - block * page_size_) : Key{nullptr, nullptr};
      }
    }
  }

  // Appends those of [begin, end) that are stored.
  DSV4_HOST_DEVICE void append_range(int64_t begin, int64_t end, Key* keys, int64_t& count) const {
    for (int64_t block = begin / page_size_; block < blocks_ && block * page_size_ < end; ++block) {
      if (!stored(block)) continue;
      const int64_t first = larger(begin - block * page_size_, 0), last = smaller(end - block * page_size_, page_size_);
      for (int64_t offset = first; offset < last; ++offset) keys[count++] = key_at(table_[block], offset);
    }
  }

 private:
  DSV4_HOST_DEVICE bool stored(int64_t block) const { return table_[block] >= 0 && table_[block] < pages_; }

  DSV4_HOST_DEVICE Key key_at(int64_t page, int64_t offset) const {
    const uint8_t* data = data_ + page * page_stride_;
    return {data + offset * row_stride_,
            fp8_ ? data + fp8_scales_at(offset, page_size_, head_dim_, rope_dim_) : nullptr};
  }

  const int32_t* table_;
  int64_t blocks_, pages_, page_size_;
  bool fp8_;
  int64_t head_dim_, rope_dim_;
  const uint8_t* data_;
  int64_t page_stride_, row_stride_;
};

struct KeyCounts {
  int64_t window, all;  // the window's keys come first
};

// Appends a row's indices that are entries of its own.
DSV4_HOST_DEVICE void list_indices(const SparseAttentionParams& p, int64_t row, Key* keys, int64_t& count) {
  const PoolReader reader(p.compressed, *p.sequence.as<const int32_t>().at(row), p.query.size(2), p.rope_dim);
  const int64_t length = *p.lengths.as<const int32_t>().at(row);
  const int32_t* indices = p.indices.as<const int32_t>().at(row);
  for (int64_t i = 0; i < p.indices.size(1); ++i) {
    if (indices[i] >= 0 && indices[i] < length) reader.append(indices[i], keys, count);
  }
}

// The keys of a row in the order of their positions, those of the window from position `turn` on before the others;
// then those of its indices. `keys` has room for the most of them.
DSV4_HOST_DEVICE KeyCounts list_keys(const SparseAttentionParams& p, int64_t row, Key* keys, int64_t turn = 0) {
  const int64_t head_dim = p.query.size(2), sequence = *p.sequence.as<const int32_t>().at(row);
  const int64_t end = static_cast<int64_t>(*p.position.as<const int32_t>().at(row)) + 1;
  int64_t count = 0;
  const PoolReader near(p.window_pool, sequence, head_dim, p.rope_dim);
  const int64_t begin = larger(end - p.window, 0);
  near.append_range(larger(begin, turn), end, keys, count);
  near.append_range(begin, turn, keys, count);
  const int64_t window = count;
  if (p.compressed.given() && p.indices.given()) {
    list_indices(p, row, keys, count);
  } else if (p.compressed.given()) {
    const int64_t length = *p.lengths.as<const int32_t>().at(row);
    PoolReader(p.compressed, sequence, head_dim, p.rope_dim).append_range(0, length, keys, count);
  }
  return {window, count};
}

}  // namespace dsv4
