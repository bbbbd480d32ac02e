// Pools of pages: where the rows or index keys of sequences lie (python/dsv4/ops/layout.py is the definition).
#pragma once

#include "common/view.h"

namespace dsv4 {

// Rows or keys of D dims, and where a sequence's are: row e of sequence s lies in page table[s, e / page_size] at
// offset e % page_size; a page outside the pool (-1), or an entry past the table: not stored.
struct RowPool {
  AnyView<3> plain;  // bfloat16 or float32 [pages, page_size, D], or:
  AnyView<2> bytes;  // uint8 [pages, bytes]: rows fp8_page_bytes(page_size, D, rope_dim); keys FP4 or FP8
  AnyView<2> table;  // int32 [sequences, blocks]
  int64_t page_size;

  DSV4_HOST_DEVICE bool given() const { return plain.given() || bytes.given(); }
};

}  // namespace dsv4
