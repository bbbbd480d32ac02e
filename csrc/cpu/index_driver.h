// What the index_topk kernels share: how rows and keys are cut into pieces of work, and what becomes of the scores. A
// block of up to kRows rows reads the keys of its sequence in chunks that are prepared once for all of them; where
// there are too few rows for the threads, the entries are cut into ranges too, each range leaves the best k of every
// row, and the best of those are taken. Scores depend on the row and the key alone and the selection is exact, so no
// cut can show in a result.
//
// A kernel is a class with
//   static int64_t memory(const IndexTopkParams&)   scratch memory of one, bytes
//   Kernel(const IndexTopkParams&, uint8_t* memory)  64-byte aligned
//   int64_t together() const   how many neighbouring rows it scores at once, at most kIndexTogether
//   void begin(int64_t row, int64_t end)   a block of rows; the first of its chunks comes next
//   void end()   the last of them has been scored
//   void prepare(const IndexKey* keys, int64_t count)   up to kIndexChunk keys; those not stored score anything
//   void expect(const IndexKey* keys, int64_t count)   those of the next chunk, which it may read meanwhile; fewer than
//   kIndexChunk prepared keys are the last
//   void score(int64_t row, int64_t count, float* scores)   of the first `count` keys, for the rows from `row` on that
//   it scores at once and that are below the end; kIndexScores a row, up to the next multiple of 64 may be written
//   static void offer(Selection&, const float* scores, const uint16_t* stored, int64_t count, int64_t first)
#pragma once

#include "cpu/index_selection.h"
#include "cpu/work.h"
#include "ops/index_keys.h"

namespace dsv4 {
namespace {

inline constexpr int64_t kIndexRows = 16;
inline constexpr int64_t kIndexChunk = 384;                // keys, a multiple of 16
inline constexpr int64_t kIndexRange = 4 * kIndexChunk;    // the fewest entries that are worth a range
inline constexpr int64_t kIndexScores = kIndexChunk + 64;  // room for the scores of a chunk
inline constexpr int64_t kIndexTogether = 4;

DSV4_HOST_DEVICE int64_t index_ceil(int64_t value, int64_t divisor) { return (value + divisor - 1) / divisor; }

// The cut of a call.
struct IndexPlan {
  int64_t tokens, blocks, longest, keep, ranges, slots, capacity;

  DSV4_HOST_DEVICE IndexPlan(const IndexTopkParams& p, const Context& context) : tokens(p.query.size(0)), longest(0) {
    const int64_t most = p.table.size(1) * p.page_size;
    const auto lengths = p.lengths.as<const int32_t>();
    for (int64_t row = 0; row < tokens; ++row) {
      const int64_t length = *lengths.at(row);
      longest = length > longest ? length : longest;
    }
    longest = longest < most ? longest : most;
    keep = p.k < longest ? p.k : longest;
    blocks = index_ceil(tokens, kIndexRows);
    const int64_t wanted = 4 * static_cast<int64_t>(context.threads);
    const int64_t most_ranges = index_ceil(longest, kIndexRange);
    ranges = context.threads == 1 || blocks >= wanted || blocks == 0 ? 1 : index_ceil(wanted, blocks);
    ranges = ranges < most_ranges ? ranges : most_ranges < 1 ? 1 : most_ranges;
    const int64_t pieces = blocks * ranges;
    slots = pieces < context.threads ? pieces : context.threads;
    capacity = Selection<PortableLanes>::capacity(keep, longest);
  }
};

template <class Kernel>
class IndexCall {
  using Best = Selection<typename Kernel::Lanes>;

 public:
  IndexCall(const IndexTopkParams& p, const Context& context)
      : p_(p),
        context_(context),
        plan_(p, context),
        pool_(p),
        sequence_(p.sequence.as<const int32_t>()),
        lengths_(p.lengths.as<const int32_t>()),
        selection_bytes_(round_up(Best::bytes(plan_.capacity), 64)),
        slot_bytes_(kIndexRows * selection_bytes_ + round_up(Kernel::memory(p), 64)),
        part_bytes_(round_up((2 * plan_.keep + 1) * static_cast<int64_t>(sizeof(int32_t)), 64)) {}

  int64_t bytes() const {
    const int64_t parts = plan_.ranges > 1 ? plan_.tokens * plan_.ranges * part_bytes_ : 0;
    return plan_.slots * slot_bytes_ + parts;
  }

  Status run() const {
    spread(context_, plan_.slots, plan_.blocks * plan_.ranges, [&](int64_t slot, int64_t piece) {
      Kernel kernel(p_, slot_memory(slot) + kIndexRows * selection_bytes_);
      const int64_t first = piece / plan_.ranges * kIndexRows;
      const int64_t end = first + kIndexRows < plan_.tokens ? first + kIndexRows : plan_.tokens;
      for (int64_t row = first; row < end;) {
        int64_t next = row + 1;
        while (next < end && *sequence_.at(next) == *sequence_.at(row)) ++next;
        select(kernel, slot, row, next, piece % plan_.ranges);
        row = next;
      }
    });
    if (plan_.ranges > 1) {
      spread(context_, plan_.slots, plan_.tokens, [&](int64_t slot, int64_t row) { join(slot, row); });
    }
    return Status::ok();
  }

 private:
  uint8_t* slot_memory(int64_t slot) const { return static_cast<uint8_t*>(p_.workspace.data) + slot * slot_bytes_; }
  Best selection(int64_t slot, int64_t index) const {
    return Best(slot_memory(slot) + index * selection_bytes_, plan_.capacity, plan_.keep);
  }
  int32_t* part(int64_t row, int64_t range) const {
    uint8_t* parts = slot_memory(plan_.slots);
    return reinterpret_cast<int32_t*>(parts + (row * plan_.ranges + range) * part_bytes_);
  }
  int64_t length(int64_t row) const {
    const int64_t value = *lengths_.at(row);
    return value < plan_.longest ? value : plan_.longest;
  }

  // Rows of one sequence, over one range of their entries.
  void select(Kernel& kernel, int64_t slot, int64_t row, int64_t end, int64_t range) const {
    Best best[kIndexRows] = {selection(slot, 0),  selection(slot, 1),  selection(slot, 2),  selection(slot, 3),
                             selection(slot, 4),  selection(slot, 5),  selection(slot, 6),  selection(slot, 7),
                             selection(slot, 8),  selection(slot, 9),  selection(slot, 10), selection(slot, 11),
                             selection(slot, 12), selection(slot, 13), selection(slot, 14), selection(slot, 15)};
    int64_t longest = 0;
    for (int64_t r = row; r < end; ++r) longest = length(r) > longest ? length(r) : longest;
    const int64_t width = round_up(index_ceil(longest, plan_.ranges), kIndexChunk);
    const int64_t first = range * width, last = first + width < longest ? first + width : longest;
    IndexKey keys[2][kIndexChunk];
    const auto locate = [&](int64_t at, IndexKey* to) {
      const int64_t count = last - at < kIndexChunk ? last - at : kIndexChunk;
      if (count > 0) pool_.locate(*sequence_.at(row), at, count, to);
      return count > 0 ? count : 0;
    };
    kernel.begin(row, end);
    int64_t count = locate(first, keys[0]);
    for (int64_t at = first, turn = 0; at < last; at += kIndexChunk, turn = 1 - turn) {
      uint16_t stored[kIndexChunk / 16];
      mark(keys[turn], count, stored);
      kernel.prepare(keys[turn], count);
      const int64_t following = locate(at + kIndexChunk, keys[1 - turn]);
      kernel.expect(keys[1 - turn], following);
      for (int64_t r = row; r < end; r += kernel.together()) {
        const int64_t next = r + kernel.together() < end ? r + kernel.together() : end;
        int64_t visible[kIndexTogether], most = 0;
        for (int64_t i = r; i < next; ++i) {
          visible[i - r] = length(i) - at < count ? length(i) - at : count;
          most = visible[i - r] > most ? visible[i - r] : most;
        }
        if (most == 0) continue;
        alignas(64) float scores[kIndexTogether * kIndexScores];
        kernel.score(r, most, scores);
        for (int64_t i = r; i < next; ++i) {
          if (visible[i - r] <= 0) continue;
          Kernel::offer(best[i - row], scores + (i - r) * kIndexScores, stored, visible[i - r], at);
        }
      }
      count = following;
    }
    kernel.end();
    for (int64_t r = row; r < end; ++r) {
      Best& chosen = best[r - row];
      chosen.finish();
      if (plan_.ranges == 1) {
        write(chosen, r);
        continue;
      }
      int32_t* to = part(r, range);
      to[0] = static_cast<int32_t>(chosen.count());
      for (int64_t i = 0; i < chosen.count(); ++i) {
        to[1 + i] = chosen.keys()[i];
        to[1 + plan_.keep + i] = chosen.entries()[i];
      }
    }
  }

  // Which keys are stored, a bit each. Sixteen that lie in at most two pages are as their first and their last.
  void mark(const IndexKey* keys, int64_t count, uint16_t* stored) const {
    for (int64_t i = 0; i < count; i += 16) {
      const int64_t here = count - i < 16 ? count - i : 16;
      if (p_.page_size >= here && keys[i].values != nullptr && keys[i + here - 1].values != nullptr) {
        stored[i / 16] = 0xFFFF;
        continue;
      }
      uint32_t bits = 0;
      for (int64_t j = 0; j < here; ++j) bits |= keys[i + j].values != nullptr ? 1u << j : 0u;
      stored[i / 16] = static_cast<uint16_t>(bits);
    }
  }

  // The best of what a row's ranges left.
  void join(int64_t slot, int64_t row) const {
    Best chosen = selection(slot, 0);
    for (int64_t range = 0; range < plan_.ranges; ++range) {
      const int32_t* from = part(row, range);
      for (int64_t i = 0; i < from[0]; ++i) chosen.add(from[1 + i], from[1 + plan_.keep + i]);
    }
    chosen.finish();
    write(chosen, row);
  }

  void write(const Best& chosen, int64_t row) const {
    int32_t* result = p_.result.as<int32_t>().at(row);
    for (int64_t i = 0; i < chosen.count(); ++i) result[i] = chosen.entries()[i];
    for (int64_t i = chosen.count(); i < p_.k; ++i) result[i] = -1;
  }

  const IndexTopkParams& p_;
  const Context& context_;
  IndexPlan plan_;
  IndexKeyPool pool_;
  View<const int32_t, 1> sequence_, lengths_;
  int64_t selection_bytes_, slot_bytes_, part_bytes_;
};

}  // namespace
}  // namespace dsv4
