// A row's keys, slot by slot: the window's positions first, then the row's indices, or all entries below its length.
// What a slot holds depends on the row alone.
#pragma once

#include "common/pages.h"
#include "cuda/common/ptx.h"
#include "ops/attention.h"

namespace dsv4::sm80 {

using ptx::Words4;

inline constexpr int kSplitSlots = 320;  // of a split, always
inline constexpr int kMaxHeadDim = 512;

// How rows lie in memory: FP8, bfloat16 or float32, in whole, aligned 16-byte pieces or else element by element.
enum class KeyForm { kNone, kFp8, kBf16, kF32, kFp8Slow, kBf16Slow, kF32Slow };

// A RowPool with what does not depend on the row worked out. Strides in bytes.
struct AttentionPool {
  const uint8_t* data;
  const int32_t* table;
  int64_t table_stride;  // elements
  int64_t page_stride, row_stride;
  int64_t scales;    // where a page's scales begin
  int scale_stride;  // of a row; 8 for kFp8
  uint32_t page_size;
  int64_t blocks, pages;
  KeyForm form;  // kNone: there is no such pool
};

struct AttentionArguments {
  SparseAttentionParams params;
  AttentionPool window, compressed;
  float* partial;     // [rows, splits, head groups, partial_floats], rows from first_row on; see attention_ends.h
  int64_t first_row;  // of this launch
  int64_t splits;     // of the row with most slots
  int64_t sequences, heads, groups;
  int head_dim;
  int nope, rope;     // dims of an FP8 row
  int padded_dim;     // to a multiple of 16
  int slice;          // dims of a warp, a multiple of 16
  int tile_row;       // bytes of a key in shared memory
  bool paired_query;  // two elements are one aligned word
  bool paired_out;
};

// One row's slots.
struct AttentionRow {
  const int32_t* window_table;
  const int32_t* compressed_table;
  const int32_t* indices;  // none: all entries
  int64_t first;           // position of slot 0
  int64_t window_slots, slots;
  int64_t length;

  DSV4_DEVICE void load(const AttentionArguments& a, int64_t row) {
    const SparseAttentionParams& p = a.params;
    const int64_t sequence = static_cast<const int32_t*>(p.sequence.data)[row * p.sequence.stride[0]];
    const int64_t end =
        static_cast<int64_t>(static_cast<const int32_t*>(p.position.data)[row * p.position.stride[0]]) + 1;
    first = end > p.window ? end - p.window : 0;
    // Not those that the table has no place for, however long the window: they would take splits and memory.
    const int64_t places = a.window.blocks * a.window.page_size;
    const int64_t last = end < places ? end : places;
    window_slots = last > first ? last - first : 0;
    length = 0;
    int64_t entries = 0;
    indices = nullptr;
    if (a.compressed.form != KeyForm::kNone) {
      length = static_cast<const int32_t*>(p.lengths.data)[row * p.lengths.stride[0]];
      if (p.indices.given()) {
        indices = static_cast<const int32_t*>(p.indices.data) + row * p.indices.stride[0];
        entries = length > 0 ? p.indices.shape[1] : 0;
      } else {
        const int64_t stored = a.compressed.blocks * a.compressed.page_size;
        entries = length < 0 ? 0 : length < stored ? length : stored;
      }
    }
    const bool known = sequence >= 0 && sequence < a.sequences;
    slots = known ? window_slots + entries : 0;
    window_table = a.window.table + (known ? sequence * a.window.table_stride : 0);
    compressed_table = a.compressed.table + (known ? sequence * a.compressed.table_stride : 0);
  }

  // At least one, so that a row without slots gets its result too.
  DSV4_DEVICE int64_t splits() const { return slots == 0 ? 1 : (slots + kSplitSlots - 1) / kSplitSlots; }
};

enum class Source { kNone, kWindow, kCompressed };

// What a slot refers to.
struct AttentionSlot {
  uint32_t entry;
  Source source;

  DSV4_DEVICE void load(const AttentionRow& row, int64_t slot) {
    source = Source::kNone;
    entry = 0;
    if (slot < row.window_slots && slot < row.slots) {
      source = Source::kWindow;
      entry = static_cast<uint32_t>(row.first + slot);
    } else if (slot < row.slots) {
      const int64_t index = slot - row.window_slots;
      const int64_t value = row.indices != nullptr ? row.indices[index] : index;
      if (value >= 0 && value < row.length) source = Source::kCompressed;
      entry = static_cast<uint32_t>(value);
    }
  }
};

// Where a key lies.
struct AttentionKey {
  const uint8_t* data;
  const uint8_t* scales;
  int64_t number;  // of its row in the pool, page after page
  KeyForm form;

  DSV4_DEVICE void clear() {
    data = scales = nullptr;
    number = 0;
    form = KeyForm::kNone;
  }

  DSV4_DEVICE void find(const AttentionPool& pool, const int32_t* table, uint32_t entry) {
    clear();
    const uint32_t block = entry / pool.page_size, offset = entry % pool.page_size;
    if (static_cast<int64_t>(block) >= pool.blocks) return;
    const int64_t page = table[block];
    if (page < 0 || page >= pool.pages) return;
    const uint8_t* start = pool.data + page * pool.page_stride;
    data = start + offset * pool.row_stride;
    scales = start + pool.scales + static_cast<int64_t>(offset) * pool.scale_stride;
    number = page * pool.page_size + offset;
    form = pool.form;
  }

  DSV4_DEVICE void find(const AttentionArguments& a, const AttentionRow& row, const AttentionSlot& slot) {
    if (slot.source == Source::kWindow) {
      find(a.window, row.window_table, slot.entry);
    } else if (slot.source == Source::kCompressed) {
      find(a.compressed, row.compressed_table, slot.entry);
    } else {
      clear();
    }
  }
};

}  // namespace dsv4::sm80
