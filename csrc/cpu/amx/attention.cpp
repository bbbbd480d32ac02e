// sparse_attention by AMX tiles, bfloat16, 2 x 2 tiles of sums, 32 dims or 32 keys a step. Scores: 32 keys, as they are
// decoded, are the left operand, the queries, packed once a row, the right one; so a register holds the scores of 16
// heads, and maxima and numerators need no sums across one. Values: the numerators, transposed, are the left operand,
// pairs of keys, written when they were decoded, the right one. Two passes, as the AVX-512 kernel, whose plan of parts,
// threads and the end of a row this one shares.
// H D / 256 tile cycles a key, 128 at 64 heads of 512 dims, are the roof of prefill; a quarter of the tile rate is
// reached. Products with all loads from the first-level cache run at the full rate, at 0.9 to 0.95 of it with half of
// them from the second, and with 32 vector operations beside each of 16 cycles they take 21. What binds is decoding,
// most of all its traffic with the second-level cache: a pair of keys of 512 dims takes 40 ns within the first level,
// 95 where its pairs are written to the second, 105 to 140 in a row's place. A row of 512 keys takes 191 ns a key, one
// of 1,024, whose pairs, scores and sums fill that cache, 232.
#include "cpu/attention.h"

#include <optional>

#include "cpu/amx/attention_row.h"

namespace dsv4::DSV4_AMX_NAMESPACE {
namespace {

// Rows that have the same slots: every 32 keys are decoded once for all of them.
class Block {
 public:
  static constexpr int64_t kMost = 8;

  static bool alike(const SparseAttentionParams& p, int64_t a, int64_t b) {
    const auto sequence = p.sequence.as<const int32_t>(), position = p.position.as<const int32_t>();
    return *sequence.at(a) == *sequence.at(b) && *position.at(a) >= 0 && *position.at(b) >= 0 &&
           *position.at(a) / kStepKeys == *position.at(b) / kStepKeys && most_entries(p, a) == most_entries(p, b);
  }

  // memory(i): of row first + i. Keys and pairs are in that of the first.
  template <class MemoryOf>
  Block(const SparseAttentionParams& p, int64_t first, int64_t end, const MemoryOf& memory, const RowWork::Tiles& tiles)
      : p_(p), first_(first), count_(end - first), tiles_(tiles) {
    for (int64_t i = 0; i < count_; ++i) memory_[i] = memory(i);
  }

  // False where rows have to be taken singly: one has no keys, or a key that not all of them have is not finite, so
  // that it would show in their products although its numerators are 0.
  bool run(const E4m3Table& table) {
    if (!prepare()) return false;
    std::optional<RowWork> rows[kMost];
    for (int64_t i = 0; i < count_; ++i) rows[i].emplace(p_, table, first_ + i, memory_[i]);
    if (!score(rows)) return false;
    const int64_t heads = p_.query.size(1), parts = slots_.parts;
    const auto mix = [&](const RowWork& row, int64_t part, const bf16* pairs) {
      row.mix(part, part == 0 ? 0 : 1, pairs, tiles_);
      if (part > 0 && part + 1 < parts) row.add(1, 0, heads);
      if (part + 1 == parts) row.finish(0, heads, smaller(parts, 2));
    };
    if (kept()) {
      for (int64_t i = 0; i < count_; ++i) {
        for (int64_t part = 0; part < parts; ++part) mix(*rows[i], part, rows[0]->values(part, tiles_));
      }
    } else {
      for (int64_t part = 0; part < parts; ++part) {
        const bf16* pairs = rows[0]->values(part, tiles_);
        for (int64_t i = 0; i < count_; ++i) mix(*rows[i], part, pairs);
      }
    }
    return true;
  }

 private:
  bool kept() const { return slots_.keys <= memory_[0].most_kept; }

  bool prepare() {
    const auto position = p_.position.as<const int32_t>();
    int64_t least = *position.at(first_), most = least;
    for (int64_t i = 1; i < count_; ++i) {
      least = smaller(least, *position.at(first_ + i)), most = larger(most, *position.at(first_ + i));
    }
    slots_ = shared_slots(p_, first_);
    put_keys(p_, first_, slots_, least - p_.window + 1, most, memory_[0].keys);
    const int64_t window = slots_.window / kStepKeys, words = (slots_.keys + kStepKeys - 1) / kStepKeys;
    uint32_t* valid = memory_[0].valid;
    mark_keys(memory_[0].keys, slots_.keys, valid);
    uint32_t entries = 0;
    for (int64_t i = window; i < words; ++i) entries |= valid[i];
    for (int64_t i = count_ - 1; i >= 0; --i) {
      const RowMemory& memory = memory_[i];
      *memory.slots = slots_;
      if (kept()) memory_[i].sums = memory_[0].sums;  // a row is finished before the next
      if (i > 0) memcpy(memory.valid, valid, static_cast<size_t>(words) * sizeof(uint32_t));
      if (!keep_window(p_, first_ + i, slots_, memory.valid) && entries == 0) return false;
      pack_query(p_, first_ + i, memory.query);
    }
    return true;
  }

  bool score(const std::optional<RowWork>* rows) const {
    const KeyRows keys(p_, memory_[0].keys, slots_.keys);
    for (int64_t j = 0; j < smaller(kAhead, slots_.keys); ++j) KeyRows::prefetch(keys, j);
    configure();
    for (int64_t slot = 0; slot < slots_.keys; slot += kStepKeys) {
      rows[0]->read(keys, slot, 0, p_.query.size(2), tiles_.rows);
      if (slot < slots_.window && !are_finite(tiles_.rows, p_.query.size(2))) {
        tile_release();
        return false;
      }
      for (int64_t i = 0; i < count_; ++i) {
        rows[i]->score_keys(slot, tiles_.rows);
        // Tiles that were just stored would have to be waited for.
        if (i > 0) rows[i - 1]->raise_maxima(slot);
      }
      rows[count_ - 1]->raise_maxima(slot);
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
  Slots slots_;
  RowMemory memory_[kMost];
};

// What avx512::Call runs.
struct Rows : RowWork {
  using RowWork::RowWork;
  static constexpr int64_t kTogether = Block::kMost;

  template <class MemoryOf>
  static void run_rows(const SparseAttentionParams& p, const E4m3Table& table, int64_t first, int64_t end,
                       const MemoryOf& memory, const Tiles& tiles) {
    const bool shares = shares_keys(p) && p.query.size(2) <= kSliceDims;
    for (int64_t row = first; row < end;) {
      int64_t next = row + 1;
      while (shares && next < end && Block::alike(p, row, next)) ++next;
      if (next - row > 1 && Block(p, row, next, memory, tiles).run(table)) {
        row = next;
        continue;
      }
      for (; row < next; ++row) {
        prepare(p, row, memory(0));
        avx512::run_row(RowWork(p, table, row, memory(0)), p.query.size(1), tiles);
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
