// Where the keys of a row stand. Rows that read the same memory - the window of their neighbours, and all entries below
// one length - are laid out alike, so that keys decoded for one serve the others, and a row's bits do not depend on
// which rows those are:
//   slots  [window: positions from a multiple of 32 to a multiple of 32][entries from 0 on]
// Rows whose positions lie in the same 32 have the same slots; those outside a row's own window, and what is not
// stored, are masked. A row with indices, or with a wide window, lists its keys one after another instead.
#pragma once

#include "cpu/amx/attention_tiles.h"

namespace dsv4::DSV4_AMX_NAMESPACE {
namespace {

using avx512::Plan;

inline constexpr int64_t kMostWindow = 225;  // of which slots are at most 256, less than the smallest of two parts

// The slots of a row and their parts. These are cut by the number of entries alone (of keys, where they are listed).
struct Slots {
  int64_t window = 0, keys = 0;                 // slots of the window; of all keys
  int64_t first = kStepKeys, size = kStepKeys;  // of the first part, of the others
  int64_t parts = 0;
  int64_t from = 0;    // the first window slot's position
  int64_t length = 0;  // of the compressed pool: what the row may read

  int64_t begin(int64_t part) const { return part == 0 ? 0 : first + (part - 1) * size; }
  int64_t end(int64_t part) const { return smaller(keys, first + part * size); }
  int64_t part_of(int64_t slot) const { return slot < first ? 0 : 1 + (slot - first) / size; }
};

DSV4_INLINE bool shares_keys(const SparseAttentionParams& p) { return !p.indices.given() && p.window <= kMostWindow; }
inline int64_t window_slots(int64_t window) { return round_up(window - 1, kStepKeys) + kStepKeys; }

// At most how many slots a row has. No row with fewer has more parts than Plan says of as many keys.
inline int64_t most_slots(const SparseAttentionParams& p) {
  if (!shares_keys(p)) return most_keys_of_any_row(p);
  int64_t most = 0;
  for (int64_t row = 0; row < p.query.size(0); ++row) most = larger(most, most_entries(p, row));
  return window_slots(p.window) + round_up(most, kStepKeys);
}
inline Slots listed_slots(int64_t keys) {
  const Plan plan(keys);
  Slots s;
  s.keys = keys, s.first = s.size = plan.part_keys, s.parts = plan.parts;
  return s;
}

inline Slots shared_slots(const SparseAttentionParams& p, int64_t row) {
  const int64_t position = *p.position.as<const int32_t>().at(row), entries = most_entries(p, row);
  Slots s;
  s.length = entries;
  if (position >= 0) {
    const int64_t cell = position / kStepKeys * kStepKeys;
    s.from = larger(0, cell - (p.window - 1)) / kStepKeys * kStepKeys;
    s.window = cell + kStepKeys - s.from;
  }
  const int64_t whole = window_slots(p.window);
  const Plan plan(whole + entries);
  const int64_t first = smaller(entries, plan.part_keys - whole);  // a multiple of 32, or all entries
  s.keys = s.window + entries;
  s.first = s.window + first, s.size = plan.part_keys;
  s.parts = s.keys == 0 ? 0 : 1 + (entries - first + s.size - 1) / s.size;
  return s;
}

// The keys of rows with these slots whose last position is at most `last`; those of the window from `first` on.
inline void put_keys(const SparseAttentionParams& p, int64_t row, const Slots& s, int64_t first, int64_t last,
                     Key* keys) {
  const int64_t head_dim = p.query.size(2), sequence = *p.sequence.as<const int32_t>().at(row);
  for (int64_t i = 0; i < s.window; ++i) keys[i] = {nullptr, nullptr};
  first = larger(first, 0);
  if (first <= last) {
    PoolReader(p.window_pool, sequence, head_dim, p.rope_dim).place(first, last + 1, keys + (first - s.from));
  }
  if (s.length > 0) {
    PoolReader(p.compressed, sequence, head_dim, p.rope_dim).place(0, s.length, keys + s.window);
  }
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

// Clears the bits of positions outside a row's window; returns whether any is left of the window.
inline bool keep_window(const SparseAttentionParams& p, int64_t row, const Slots& s, uint32_t* valid) {
  const int64_t position = *p.position.as<const int32_t>().at(row), first = position - p.window + 1;
  uint32_t any = 0;
  for (int64_t slot = 0; slot < s.window; slot += kStepKeys) {
    const int64_t below = larger(0, first - s.from - slot), count = smaller(kStepKeys, position + 1 - s.from - slot);
    const uint32_t upto = count >= kStepKeys ? ~0u : count <= 0 ? 0u : (1u << count) - 1;
    const uint32_t from = below >= kStepKeys ? 0u : ~0u << below;
    valid[slot / kStepKeys] &= upto & from;
    any |= valid[slot / kStepKeys];
  }
  return any != 0;
}

}  // namespace
}  // namespace dsv4::DSV4_AMX_NAMESPACE
