// sparse_attention by AMX tiles, bfloat16, 2 x 2 tiles of sums, 32 dims or 32 keys a step. Scores: 32 keys, as they are
// decoded, are the left operand, the queries, packed once a row, the right one; so a register holds the scores of 16
// heads, and maxima and numerators need no sums across one. Values: the numerators, transposed, are the left operand,
// pairs of keys, written when they were decoded, the right one. Two passes, as the AVX-512 kernel, whose threads this
// one shares. Up to 8 neighbouring rows are taken together where they read the same keys (attention_slots.h): of
// entries without indices, and of the window, each is decoded once for all of them.
// H D / 256 tile cycles a key, 128 at 64 heads of 512 dims, are the roof of prefill: 56 ns on one core of Emerald
// Rapids. A row of 512 entries and a window, 672 slots, takes 106 us there: scores 25 and values 28, whose right
// operands come from the second-level cache and would take 23 and 22 by themselves, numerators 14, decoding 12, the end
// 6, the query 6. What is decoded for one row costs 60 ns a key; so 512 entries by indices take 149 us. A row of 8,192
// entries takes 1.35 ms: its scores do not stay in the second-level cache, and keys are decoded again for the values.
#include "cpu/attention.h"

#include <optional>

#include "cpu/amx/attention_row.h"

namespace dsv4::DSV4_AMX_NAMESPACE {
namespace {

// The values of rows that have the same slots and all scores, and the ends of these rows. Kept pairs serve a row after
// another; others are decoded part by part, for all rows.
void mix_rows(const RowWork* const* rows, int64_t count, int64_t heads, const RowWork::Tiles& tiles) {
  const RowWork& first = *rows[0];
  const int64_t parts = first.parts();
  const auto mix = [&](int64_t row, int64_t part, const bf16* pairs) {
    rows[row]->mix_after(part, pairs, tiles);
    if (part + 1 == parts) rows[row]->finish(0, heads, 1);
  };
  if (parts == 0) first.finish(0, heads, 0);
  for (int64_t row = 0; first.kept() && row < count; ++row) {
    for (int64_t part = 0; part < parts; ++part) mix(row, part, first.values(part, tiles));
  }
  for (int64_t part = 0; !first.kept() && part < parts; ++part) {
    const bf16* pairs = first.values(part, tiles);
    for (int64_t row = 0; row < count; ++row) mix(row, part, pairs);
  }
}

// Rows that have the same window slots, and without indices the same entries: every 32 of them are decoded once for
// all.
class Block {
 public:
  static constexpr int64_t kMost = 8;

  static bool alike(const SparseAttentionParams& p, int64_t a, int64_t b) {
    const auto sequence = p.sequence.as<const int32_t>();
    return *sequence.at(a) == *sequence.at(b) && position_of(p, a) >= 0 && position_of(p, b) >= 0 &&
           position_of(p, a) / kStepKeys == position_of(p, b) / kStepKeys &&
           (p.indices.given() || most_entries(p, a) == most_entries(p, b));
  }

  // memory(i): of row first + i. Shared keys and all pairs are in that of the first.
  template <class MemoryOf>
  Block(const SparseAttentionParams& p, int64_t first, int64_t end, const MemoryOf& memory, const RowWork::Tiles& tiles)
      : p_(p), first_(first), count_(end - first), tiles_(tiles) {
    for (int64_t i = 0; i < count_; ++i) memory_[i] = memory(i);
  }

  // False where rows have to be taken singly: one has no keys, or a key that not all of them have is not finite, so
  // that it would show in their products although its numerators are 0.
  bool run() {
    if (!prepare()) return false;
    std::optional<RowWork> made[kMost];
    const RowWork* rows[kMost];
    for (int64_t i = 0; i < count_; ++i) rows[i] = &made[i].emplace(p_, first_ + i, memory_[i]);
    if (!score(rows)) return false;
    const int64_t heads = p_.query.size(1);
    if (!p_.indices.given()) {
      mix_rows(rows, count_, heads, tiles_);
      return true;
    }
    for (int64_t i = 0; i < count_; ++i) {
      score_from(shared_, rows + i, 1, memory_[i].keys, memory_[i].slots->keys);
      mix_rows(rows + i, 1, heads, tiles_);
    }
    return true;
  }

 private:
  bool prepare() {
    int64_t least = position_of(p_, first_), most = least;
    for (int64_t i = 1; i < count_; ++i) {
      least = smaller(least, position_of(p_, first_ + i)), most = larger(most, position_of(p_, first_ + i));
    }
    const Slots window = slots_of(p_, least, 0);
    window_ = window.window;
    put_window(p_, first_, window, least - p_.window + 1, most, memory_[0].keys);
    mark_keys(memory_[0].keys, window_, memory_[0].valid);
    bool whole = true;
    for (int64_t i = 0; i < count_; ++i) whole &= put_entries_of(i);
    for (int64_t i = count_ - 1; i >= 0; --i) {  // the first, whose bits the others begin with, comes last
      const RowMemory& memory = memory_[i];
      const int64_t row = first_ + i, words = window_ / kStepKeys;
      if (i > 0) memcpy(memory.valid, memory_[0].valid, static_cast<size_t>(words) * sizeof(uint32_t));
      pack_query(p_, row, memory.query);
      whole &= keep_window(*memory.slots, p_.window, position_of(p_, row), memory.valid) || has_entries_[i];
    }
    shared_ = p_.indices.given() ? window_ : memory_[0].slots->keys;
    return whole;
  }

  // False where the row is not to be kept as the first is.
  bool put_entries_of(int64_t i) {
    const RowMemory &shared = memory_[0], &memory = memory_[i];
    const int64_t words = window_ / kStepKeys;
    if (i == 0 || p_.indices.given()) {
      const int64_t entries = put_entries(p_, first_ + i, memory.keys + window_);
      *memory.slots = slots_of(p_, position_of(p_, first_ + i), entries);
      has_entries_[i] = mark_keys(memory.keys + window_, entries, memory.valid + words);
    } else {
      *memory.slots = *shared.slots, has_entries_[i] = has_entries_[0];
      const int64_t rest = (shared.slots->keys + kStepKeys - 1) / kStepKeys - words;
      memcpy(memory.valid + words, shared.valid + words, static_cast<size_t>(rest) * sizeof(uint32_t));
    }
    if (i > 0) {
      memcpy(memory.keys, shared.keys, static_cast<size_t>(window_) * sizeof(Key));
      memory_[i].pairs = shared.pairs;
      if (is_kept(i)) memory_[i].sums = shared.sums;  // a row is finished before the next
    }
    return is_kept(i) == is_kept(0);
  }
  bool is_kept(int64_t i) const { return memory_[i].slots->keys <= memory_[i].most_kept; }

  // Shared slots. Their pairs are kept where each row keeps its own.
  bool score(const RowWork* const* rows) const { return score_from(0, rows, count_, memory_[0].keys, shared_); }
  bool score_from(int64_t first, const RowWork* const* rows, int64_t count, const Key* list, int64_t end) const {
    const KeyRows keys(p_, list, end);
    for (int64_t j = first; j < smaller(first + kAhead, end); ++j) KeyRows::prefetch(keys, j);
    configure();
    for (int64_t slot = first; slot < end; slot += kStepKeys) {
      rows[0]->read(keys, slot, 0, p_.query.size(2), tiles_.rows);
      if (slot < window_ && !are_finite(tiles_.rows, p_.query.size(2))) {
        tile_release();
        return false;
      }
      for (int64_t i = 0; i < count; ++i) {
        rows[i]->score_keys(slot, tiles_.rows);
        // Tiles that were just stored would have to be waited for.
        if (i > 0) rows[i - 1]->raise_maxima(slot);
      }
      rows[count - 1]->raise_maxima(slot);
    }
    tile_release();
    return true;
  }

  static bool are_finite(const bf16* rows, int64_t head_dim) {
    __m512i most = _mm512_setzero_si512();
    for (int64_t i = 0; i < kStepKeys; ++i, rows += row_stride(head_dim)) {
      for (int64_t d = 0; d < head_dim; d += kStepDims) {
        most = _mm512_max_epu16(most, _mm512_add_epi16(_mm512_loadu_si512(rows + d), _mm512_loadu_si512(rows + d)));
      }
    }
    return _mm512_cmpge_epu16_mask(most, _mm512_set1_epi16(static_cast<int16_t>(0xFF00))) == 0;
  }

  const SparseAttentionParams& p_;
  int64_t first_, count_;
  const RowWork::Tiles& tiles_;
  int64_t window_ = 0, shared_ = 0;  // slots
  RowMemory memory_[kMost];
  bool has_entries_[kMost];
};

// What avx512::Call runs.
struct Rows : RowWork {
  using RowWork::RowWork;
  static int64_t together(const SparseAttentionParams& p, int64_t slots) {
    return smaller(Block::kMost, p.query.size(0) / slots);
  }

  template <class MemoryOf>
  static void run_rows(const SparseAttentionParams& p, int64_t first, int64_t end, const MemoryOf& memory,
                       const Tiles& tiles) {
    const bool shares = has_window_slots(p) && p.query.size(2) <= kSliceDims;
    for (int64_t row = first; row < end;) {
      int64_t next = row + 1;
      while (shares && next < end && Block::alike(p, row, next)) ++next;
      if (next - row > 1 && Block(p, row, next, memory, tiles).run()) {
        row = next;
        continue;
      }
      for (; row < next; ++row) {
        prepare(p, row, memory(0));
        const RowWork work(p, row, memory(0)), *one = &work;
        for (int64_t part = 0; part < work.parts(); ++part) work.score(part, tiles);
        mix_rows(&one, 1, p.query.size(1), tiles);
      }
    }
  }
};

}  // namespace

int64_t sparse_attention_workspace_bytes(const SparseAttentionParams& p, const Context& context) {
  return avx512::Call<Rows>(p, context).bytes();
}

Status sparse_attention(const SparseAttentionParams& p, const Context& context) {
  avx512::Call<Rows>(p, context).run();
  return Status::ok();
}

}  // namespace dsv4::DSV4_AMX_NAMESPACE
