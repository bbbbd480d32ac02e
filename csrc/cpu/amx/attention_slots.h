// Where the keys of a row stand. Rows that read the same memory - the window of their neighbours, and without indices
// all entries below one length - are laid out alike, so that keys decoded for one serve the others, and a row's bits do
// not depend on which rows those are:
//   slots  [window: positions from a multiple of 32 to a multiple of 32][entries]
// Rows whose positions lie in the same 32 have the same window slots; what is outside a row's own window, and what is
// not stored, is masked. A row with a wide window, or with indices and many heads, lists its keys one after another.
#pragma once

#include "cpu/amx/attention_tiles.h"

namespace dsv4::DSV4_AMX_NAMESPACE {
namespace {

using avx512::Plan;

inline constexpr int64_t kMostWindow = 225;  // of which slots are at most 256, less than the smallest of two parts
inline constexpr int64_t kMostHeads = 32;    // of rows with indices

// The slots of a row and their parts. These are cut by the number of entries alone (of keys, where they are listed).
struct Slots {
  int64_t from = 0, window = 0;  // the first window slot's position; how many there are
  int64_t keys = 0;              // all slots
  int64_t first = 0, size = 1;   // of the first part, of the others
  int64_t parts = 0;

  int64_t begin(int64_t part) const { return part == 0 ? 0 : first + (part - 1) * size; }
  int64_t end(int64_t part) const { return smaller(keys, first + part * size); }
  int64_t part_of(int64_t slot) const { return slot < first ? 0 : 1 + (slot - first) / size; }
};

// With indices only the window is shared, and up to 32 more slots have to be multiplied: with 64 heads of 512 dims a
// row takes 5 % longer, with 8 of 128 15 % less.
DSV4_INLINE bool has_window_slots(const SparseAttentionParams& p) {
  return p.window <= kMostWindow && (!p.indices.given() || p.query.size(1) <= kMostHeads);
}
inline int64_t most_window_slots(int64_t window) { return round_up(window - 1, kStepKeys) + kStepKeys; }

// At most how many slots a row has. No row with fewer has more parts than Plan says of as many keys.
inline int64_t most_slots(const SparseAttentionParams& p) {
  if (!has_window_slots(p)) return most_keys_of_any_row(p);
  int64_t most = 0;
  for (int64_t row = 0; row < p.query.size(0); ++row) most = larger(most, most_entries(p, row));
  return most_window_slots(p.window) + round_up(most, kStepKeys);
}

inline int64_t position_of(const SparseAttentionParams& p, int64_t row) {
  return *p.position.as<const int32_t>().at(row);
}

inline Slots listed_slots(int64_t keys) {
  const Plan plan(keys);
  Slots s;
  s.keys = keys, s.first = s.size = plan.part_keys, s.parts = plan.parts;
  return s;
}

// The window slots of a position, and as many entries.
inline Slots slots_of(const SparseAttentionParams& p, int64_t position, int64_t entries) {
  const int64_t cell = position / kStepKeys * kStepKeys, most = most_window_slots(p.window);
  const Plan plan(most + entries);
  const int64_t in_first = smaller(entries, plan.part_keys - most);  // a multiple of 32, or all entries
  Slots s;
  s.from = larger(0, cell - (p.window - 1)) / kStepKeys * kStepKeys;
  s.window = position < 0 ? 0 : cell + kStepKeys - s.from;
  s.keys = s.window + entries;
  s.first = s.window + in_first, s.size = plan.part_keys;
  s.parts = s.keys == 0 ? 0 : 1 + (entries - in_first + s.size - 1) / s.size;
  return s;
}

// The keys of positions `first` to `last` in their window slots, none in the others.
inline void put_window(const SparseAttentionParams& p, int64_t row, const Slots& s, int64_t first, int64_t last,
                       Key* keys) {
  for (int64_t i = 0; i < s.window; ++i) keys[i] = {nullptr, nullptr};
  first = larger(first, 0);
  if (first > last) return;
  const int64_t sequence = *p.sequence.as<const int32_t>().at(row);
  PoolReader(p.window_pool, sequence, p.query.size(2), p.rope_dim).place(first, last + 1, keys + (first - s.from));
}

// A row's entries; returns how many slots they take.
inline int64_t put_entries(const SparseAttentionParams& p, int64_t row, Key* keys) {
  int64_t count = 0;
  if (p.indices.given()) {
    list_indices(p, row, keys, count);
  } else if (p.compressed.given()) {
    count = most_entries(p, row);
    const int64_t sequence = *p.sequence.as<const int32_t>().at(row);
    PoolReader(p.compressed, sequence, p.query.size(2), p.rope_dim).place(0, count, keys);
  }
  return count;
}

// A bit for every slot that holds a key, 32 a word; returns whether there is any.
inline bool mark_keys(const Key* keys, int64_t count, uint32_t* valid) {
  uint32_t any = 0;
  for (int64_t slot = 0; slot < count; slot += kStepKeys) {
    uint32_t bits = 0;
    for (int64_t i = 0; i < smaller(kStepKeys, count - slot); ++i) {
      bits |= static_cast<uint32_t>(keys[slot + i].data != nullptr) << i;
    }
    valid[slot / kStepKeys] = bits;
    any |= bits;
  }
  return any != 0;
}

// Clears the bits of positions outside the window of a position; returns whether any is left.
inline bool keep_window(const Slots& s, int64_t window, int64_t position, uint32_t* valid) {
  uint32_t any = 0;
  for (int64_t slot = 0; slot < s.window; slot += kStepKeys) {
    const int64_t below = larger(0, position - window + 1 - s.from - slot), count = position + 1 - s.from - slot;
    const uint32_t upto = count >= kStepKeys ? ~0u : count <= 0 ? 0u : (1u << count) - 1;
    const uint32_t from = below >= kStepKeys ? 0u : ~0u << below;
    valid[slot / kStepKeys] &= upto & from;
    any |= valid[slot / kStepKeys];
  }
  return any != 0;
}

}  // namespace
}  // namespace dsv4::DSV4_AMX_NAMESPACE
