// The exact top-k of a stream of scores: candidates that may still be among the best, in ascending order of their
// entries, and a bound that all others have failed. When the candidates fill their memory, the best k stay and the
// bound rises to the k-th. Whatever the order and distribution of the scores, the selection is exact and takes linear
// time.
#pragma once

#include <cstdint>

#include "common/dtype.h"

namespace dsv4 {
namespace {

inline constexpr int64_t kSelectionStep = 16;  // candidates that a kernel may write beyond the last one

// Orders like the floats, 0 and -0 alike. NaN must not come in: a kernel leaves those out.
DSV4_HOST_DEVICE int32_t score_key(float score) {
  const int32_t bits = static_cast<int32_t>(bits_from_float(score + 0.0f));
  return bits ^ ((bits >> 31) & 0x7FFFFFFF);
}

// What a selection does to whole lists of candidates. A kernel may bring its own.
struct PortableLanes {
  // The lowest and the highest of them.
  static void range(const int32_t* keys, int64_t count, int32_t* low, int32_t* high) {
    *low = INT32_MAX, *high = INT32_MIN;
    for (int64_t i = 0; i < count; ++i) {
      *low = keys[i] < *low ? keys[i] : *low;
      *high = keys[i] > *high ? keys[i] : *high;
    }
  }

  // How many are at least `value`.
  static int64_t reaching(const int32_t* keys, int64_t count, int32_t value) {
    int32_t found = 0;
    for (int64_t i = 0; i < count; ++i) found += keys[i] >= value ? 1 : 0;
    return found;
  }

  // Leaves those above `value` and the first `room` of those at it, in their order; how many they are.
  static int64_t keep(int32_t* keys, int32_t* entries, int64_t count, int32_t value, int64_t room) {
    int64_t kept = 0;
    for (int64_t i = 0; i < count; ++i) {
      const int32_t key = keys[i], entry = entries[i];
      const bool level = key == value && room > 0;
      keys[kept] = key;
      entries[kept] = entry;
      kept += key > value || level ? 1 : 0;
      room -= level ? 1 : 0;
    }
    return kept;
  }
};

template <class Lanes>
class Selection {
 public:
  // Candidates to hold for the best `keep` of `stream` scores.
  DSV4_HOST_DEVICE static int64_t capacity(int64_t keep, int64_t stream) {
    const int64_t spare = keep > 2048 ? keep : 2048, wanted = keep + spare;
    return ((wanted < stream ? wanted : stream) + 2 * kSelectionStep - 1) / kSelectionStep * kSelectionStep;
  }
  DSV4_HOST_DEVICE static int64_t bytes(int64_t capacity) {
    return capacity * 2 * static_cast<int64_t>(sizeof(int32_t));
  }

  DSV4_HOST_DEVICE Selection(void* memory, int64_t capacity, int64_t keep)
      : keys_(static_cast<int32_t*>(memory)), entries_(keys_ + capacity), capacity_(capacity), keep_(keep) {}

  DSV4_HOST_DEVICE void clear() { count_ = 0, bound_ = INT32_MIN; }
  DSV4_HOST_DEVICE int64_t count() const { return count_; }
  DSV4_HOST_DEVICE const int32_t* keys() const { return keys_; }
  DSV4_HOST_DEVICE const int32_t* entries() const { return entries_; }

  // A candidate must be above it: later entries lose ties.
  DSV4_HOST_DEVICE int32_t bound() const { return bound_; }

  // Entries must come in ascending order.
  DSV4_HOST_DEVICE void add(int32_t key, int32_t entry) {
    if (key <= bound_) return;
    if (count_ + kSelectionStep > capacity_) {
      shrink();
      if (key <= bound_) return;
    }
    keys_[count_] = key;
    entries_[count_++] = entry;
  }

  // For kernels that write up to kSelectionStep candidates at once: where to, and how many they were. Compare with
  // bound() after place(): it may have risen.
  DSV4_HOST_DEVICE void place(int32_t** keys, int32_t** entries) {
    if (count_ + kSelectionStep > capacity_) shrink();
    *keys = keys_ + count_;
    *entries = entries_ + count_;
  }
  DSV4_HOST_DEVICE void placed(int64_t count) { count_ += count; }

  // Leaves the best k, in ascending order of their entries.
  DSV4_HOST_DEVICE void finish() {
    if (count_ > keep_) shrink();
  }

 private:
  // A value that exactly keep_ candidates reach, or else the keep_-th highest; how many are above it. By turns the
  // middle of what is left and where the value would be if the candidates in it lay evenly.
  int32_t cut(int64_t* above) const {
    int32_t least, most;
    Lanes::range(keys_, count_, &least, &most);
    int64_t low = least, high = most;             // at least keep_ candidates reach low, fewer reach high + 1
    int64_t reach_low = count_, reach_above = 0;  // how many do
    for (bool evenly = true; low < high; evenly = !evenly) {
      const int64_t span = high - low;  // below 2^32, and counts below 2^31
      const int64_t part = evenly ? span * (reach_low - keep_) / (reach_low - reach_above) : span / 2;
      const int64_t middle = low + 1 + (part < span ? part : span - 1);
      const int64_t reaching = Lanes::reaching(keys_, count_, static_cast<int32_t>(middle));
      if (reaching == keep_) {
        *above = keep_;
        return static_cast<int32_t>(middle - 1);
      }
      if (reaching > keep_) {
        low = middle, reach_low = reaching;
      } else {
        high = middle - 1, reach_above = reaching;
      }
    }
    *above = reach_above;
    return static_cast<int32_t>(low);
  }

  __attribute__((noinline)) void shrink() {
    int64_t above;
    const int32_t value = cut(&above);
    count_ = Lanes::keep(keys_, entries_, count_, value, keep_ - above);
    bound_ = value;
  }

  int32_t* keys_;
  int32_t* entries_;
  int64_t capacity_, keep_, count_ = 0;
  int32_t bound_ = INT32_MIN;
};

}  // namespace
}  // namespace dsv4
