// A row's keys, slot by slot, and how a block brings a tile of them into shared memory as bfloat16.
//
// Slots: the window's positions first, then the row's indices, or all entries below its length. What a slot holds
// depends on the row alone. A slot without a key (an index that is none, a page that is not stored) is filled with
// zeros: whatever its memory held would spoil the product even under a weight of zero.
#pragma once

#include "common/pages.h"
#include "cuda/common/ptx.h"
#include "ops/attention.h"

namespace dsv4::sm80 {

using ptx::Words4;

inline constexpr int kTileKeys = 32;
inline constexpr int kSplitTiles = 10;  // of a split: 320 slots, always
inline constexpr int kMaxHeadDim = 512;

// A RowPool with what does not depend on the row worked out. Strides in bytes.
struct AttentionPool {
  const uint8_t* data;
  const int32_t* table;
  int64_t table_stride;  // elements
  int64_t page_stride, row_stride;
  int64_t scales;    // where a page's scales begin
  int scale_stride;  // of a row; 8 where `vector`
  uint32_t page_size;
  int64_t blocks, pages;
  bool given, fp8;
  bool vector;  // rows are made of whole, aligned 16-byte pieces
};

struct AttentionArguments {
  SparseAttentionParams params;
  AttentionPool window, compressed;
  float* partial;     // [rows, splits, head groups, partial_floats], rows from first_row on; see attention_tile.h
  int64_t first_row;  // of this launch
  int64_t splits;     // of the row with most slots
  int64_t sequences, heads, groups;
  int head_dim;
  int nope, rope;     // dims of an FP8 row
  int padded_dim;     // to a multiple of 16
  int slice;          // dims of a warp, a multiple of 16
  int tile_row;       // bytes of a key in shared memory, a multiple of 128
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
    window_slots = end > first ? end - first : 0;
    length = 0;
    int64_t entries = 0;
    indices = nullptr;
    if (a.compressed.given) {
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

  DSV4_DEVICE int64_t tiles() const { return (slots + kTileKeys - 1) / kTileKeys; }
  // At least one, so that a row without slots gets its result too.
  DSV4_DEVICE int64_t splits() const { return slots == 0 ? 1 : (tiles() + kSplitTiles - 1) / kSplitTiles; }
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

enum class KeyForm { kNone, kPlain, kFp8, kPlainSlow, kFp8Slow };

// Where a key lies.
struct AttentionKey {
  const uint8_t* data;
  const uint8_t* scales;
  KeyForm form;

  DSV4_DEVICE void clear() {
    data = scales = nullptr;
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
    form = pool.fp8 ? (pool.vector ? KeyForm::kFp8 : KeyForm::kFp8Slow)
                    : (pool.vector ? KeyForm::kPlain : KeyForm::kPlainSlow);
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

// Two floats that bfloat16 holds exactly.
DSV4_DEVICE uint32_t pack_exact(float low, float high) {
  return bits_from_float(low) >> 16 | (bits_from_float(high) & 0xFFFF0000u);
}

// Four e4m3 codes times 2^(scale - 127), as bfloat16. A code's exponent and mantissa, moved into a float's fields, are
// the value times 2^-120, denormals too; one multiplication mends that and applies the scale. Exact where bfloat16
// holds the result as a normal number.
DSV4_DEVICE ptx::Words2 decode_e4m3(uint32_t codes, uint32_t scale) {
  // Beyond 2^7 the factor would be no float: the scale comes in a second multiplication.
  const bool large = scale > 134;
  const float factor = float_from_bits((large ? 247u : scale + 120u) << 23);
  float value[4];
  DSV4_UNROLL
  for (int i = 0; i < 4; ++i) {
    const uint32_t code = codes >> (8 * i);
    value[i] = ptx::multiply(float_from_bits((code & 0x80u) << 24 | (code & 0x7Fu) << 20), factor);
  }
  if (large) {
    DSV4_UNROLL
    for (int i = 0; i < 4; ++i) value[i] = ptx::multiply(value[i], e8m0_value(static_cast<uint8_t>(scale)));
  }
  if ((((codes & 0x7F7F7F7Fu) + 0x01010101u) & 0x80808080u) != 0) {  // some code is NaN
    DSV4_UNROLL
    for (int i = 0; i < 4; ++i) {
      if ((codes >> (8 * i) & 0x7Fu) == 0x7Fu) value[i] = float_from_bits(0x7FC00000u);
    }
  }
  return ptx::Words2{{pack_exact(value[0], value[1]), pack_exact(value[2], value[3])}};
}

// Fills tiles: 4 or 8 threads a key. A piece is 16 bytes. Tile rows are bfloat16, their pieces permuted so that the
// eight rows of one ldmatrix phase lie in different banks.
template <int kThreads>
struct TileLoader {
  static constexpr int kThreadsPerKey = kThreads / kTileKeys;
  // Pieces of an FP8 row that a thread has on their way while the tile before is worked on: all of the released rows'
  // 36. Rows with wider rope parts have more; those are read late.
  static constexpr int kAhead = (36 + kThreadsPerKey - 1) / kThreadsPerKey;
  Words4 ahead[kAhead];
  ptx::Words2 scales;

  static DSV4_DEVICE int key() { return ptx::thread_index() / kThreadsPerKey; }
  static DSV4_DEVICE int member() { return ptx::thread_index() % kThreadsPerKey; }

  static DSV4_DEVICE uint32_t address(const AttentionArguments& a, uint32_t tile, int key, int piece) {
    return tile + static_cast<uint32_t>(key * a.tile_row + (piece ^ (key & 7)) * 16);
  }

  // Starts this thread's share: copies of bfloat16 rows, reads of FP8 rows, zeros where there is no key.
  DSV4_DEVICE void start(const AttentionArguments& a, const AttentionKey& from, uint32_t tile) {
    const int pieces = a.padded_dim / 8;
    if (from.form == KeyForm::kNone) {
      for (int piece = member(); piece < pieces; piece += kThreadsPerKey) {
        ptx::store_shared_16(address(a, tile, key(), piece), Words4{});
      }
    } else if (from.form == KeyForm::kPlain) {
      for (int piece = member(); piece < pieces; piece += kThreadsPerKey) {
        const bool exists = 8 * piece < a.head_dim;
        ptx::cp_async_16(address(a, tile, key(), piece), from.data + (exists ? 16 * piece : 0), exists ? 16 : 0);
      }
    } else if (from.form == KeyForm::kFp8) {
      DSV4_UNROLL
      for (int i = 0; i < kAhead; ++i) {
        const int piece = member() + i * kThreadsPerKey;
        if (piece < a.nope / 16 + a.rope / 8) ahead[i] = ptx::load_global_16(from.data + 16 * piece);
      }
      const uint32_t* words = reinterpret_cast<const uint32_t*>(from.scales);
      scales = ptx::Words2{{words[0], words[1]}};
    }
  }

  // Ends it: FP8 rows are decoded, rows of single elements gathered.
  DSV4_DEVICE void finish(const AttentionArguments& a, const AttentionKey& from, uint32_t tile) {
    if (from.form == KeyForm::kFp8) {
      DSV4_UNROLL
      for (int i = 0; i < kAhead; ++i) {
        const int piece = member() + i * kThreadsPerKey;
        if (piece < a.nope / 16 + a.rope / 8) store(a, tile, piece, ahead[i]);
      }
      for (int piece = member() + kAhead * kThreadsPerKey; piece < a.nope / 16 + a.rope / 8; piece += kThreadsPerKey) {
        store(a, tile, piece, ptx::load_global_16(from.data + 16 * piece));
      }
      if (member() == 0 && a.padded_dim > a.head_dim) {
        ptx::store_shared_16(address(a, tile, key(), a.head_dim / 8), Words4{});
      }
    } else if (from.form == KeyForm::kPlainSlow || from.form == KeyForm::kFp8Slow) {
      for (int piece = member(); piece < a.padded_dim / 8; piece += kThreadsPerKey) {
        ptx::store_shared_16(address(a, tile, key(), piece), gather(a, from, 8 * piece));
      }
    }
  }

 private:
  // A piece of an FP8 row: 16 codes, or 8 rope dims.
  DSV4_DEVICE void store(const AttentionArguments& a, uint32_t tile, int piece, const Words4& value) const {
    const int codes = a.nope / 16;
    if (piece >= codes) {
      ptx::store_shared_16(address(a, tile, key(), piece + codes), value);
      return;
    }
    const int block = piece / 4;
    const uint32_t scale = (block < 4 ? scales.word[0] : scales.word[1]) >> (8 * (block % 4)) & 0xFFu;
    const ptx::Words2 a0 = decode_e4m3(value.word[0], scale), a1 = decode_e4m3(value.word[1], scale);
    const ptx::Words2 b0 = decode_e4m3(value.word[2], scale), b1 = decode_e4m3(value.word[3], scale);
    ptx::store_shared_16(address(a, tile, key(), 2 * piece), Words4{{a0.word[0], a0.word[1], a1.word[0], a1.word[1]}});
    ptx::store_shared_16(address(a, tile, key(), 2 * piece + 1),
                         Words4{{b0.word[0], b0.word[1], b1.word[0], b1.word[1]}});
  }

  // Eight dims, element by element; zeros past the row's end.
  static DSV4_DEVICE Words4 gather(const AttentionArguments& a, const AttentionKey& from, int dim) {
    Words4 piece;
    DSV4_UNROLL
    for (int i = 0; i < 4; ++i) {
      piece.word[i] = element(a, from, dim + 2 * i) | element(a, from, dim + 2 * i + 1) << 16;
    }
    return piece;
  }

  static DSV4_DEVICE uint32_t element(const AttentionArguments& a, const AttentionKey& from, int dim) {
    if (dim >= a.head_dim) return 0;
    if (from.form == KeyForm::kPlainSlow) return reinterpret_cast<const bf16*>(from.data)[dim].bits;
    if (dim < a.nope) {
      return decode_e4m3(from.data[dim], from.scales[dim / static_cast<int>(kRowBlock)]).word[0] & 0xFFFFu;
    }
    const uint8_t* bytes = from.data + a.nope + 2 * (dim - a.nope);
    return bytes[0] | static_cast<uint32_t>(bytes[1]) << 8;
  }
};

}  // namespace dsv4::sm80
