// The exact top-k of a row's scores, or of a range of them. The cut, the k-th highest score, is found two bits at a
// time from the highest on, by counting; whatever the scores are, that takes at most 17 readings of them, from the L1
// cache where a range fits there. Then the chosen are written in the order in which they lie, which is ascending.
#pragma once

#include "cuda/sm80/index_scores.h"

namespace dsv4::sm80 {

inline constexpr int kSelectThreads = 256;
inline constexpr int kSelectWarps = kSelectThreads / 32;
inline constexpr int kSelectCounts = 3;
inline constexpr int kSelectSharedBytes = 2 * kSelectWarps * kSelectCounts * 4;

// A selection of ranges has ranges > 1 and leaves candidates; a last one reads the scores, or the candidates.
struct SelectArguments {
  IndexTopkParams params;
  const uint32_t* scores;  // [rows of the group, entries]
  int64_t entries, sequences, first_row;
  int64_t range;               // entries of a range
  int64_t ranges;              // of a row
  uint32_t* candidate_scores;  // [rows of the group, ranges, k]: of a range the best, then 0
  int32_t* candidate_entries;
  bool last;
};

// Counts of the block's threads, and of the warps before the thread's own.
struct BlockCounts {
  uint32_t total[kSelectCounts], before[kSelectCounts];

  // `turn` tells apart calls that follow each other, which share no memory.
  DSV4_DEVICE void join(const uint32_t (&count)[kSelectCounts], int turn) {
    const int warp = ptx::thread_index() / 32;
    const uint32_t memory = ptx::shared_base() + static_cast<uint32_t>(turn % 2 * (kSelectWarps * kSelectCounts * 4));
    DSV4_UNROLL
    for (int c = 0; c < kSelectCounts; ++c) {
      const uint32_t sum = ptx::warp_sum(count[c]);
      if (ptx::thread_index() % 32 == 0) {
        ptx::store_shared_word(memory + static_cast<uint32_t>((warp * kSelectCounts + c) * 4), sum);
      }
    }
    ptx::sync_threads();
    DSV4_UNROLL
    for (int c = 0; c < kSelectCounts; ++c) {
      total[c] = before[c] = 0;
      DSV4_UNROLL
      for (int w = 0; w < kSelectWarps; ++w) {
        const uint32_t sum = ptx::load_shared_word(memory + static_cast<uint32_t>((w * kSelectCounts + c) * 4));
        total[c] += sum;
        if (w < warp) before[c] += sum;
      }
    }
  }
};

// A list of scores, of which each warp has a piece.
struct SelectList {
  const uint32_t* scores;
  int64_t begin, end;  // of the warp

  DSV4_DEVICE SelectList(const uint32_t* the_scores, int64_t count) : scores(the_scores) {
    const int64_t piece = (count + kSelectThreads - 1) / kSelectThreads * 32, warp = ptx::thread_index() / 32;
    begin = warp * piece < count ? warp * piece : count;
    end = begin + piece < count ? begin + piece : count;
  }

  // How many of the thread's scores reach each of three bounds.
  DSV4_DEVICE void reaching(const uint32_t (&bound)[kSelectCounts], uint32_t (&count)[kSelectCounts]) const {
    DSV4_UNROLL
    for (int c = 0; c < kSelectCounts; ++c) count[c] = 0;
    for (int64_t i = begin + ptx::thread_index() % 32; i < end; i += 32) {
      const uint32_t score = scores[i];
      DSV4_UNROLL
      for (int c = 0; c < kSelectCounts; ++c) count[c] += score >= bound[c] ? 1u : 0u;
    }
  }

  // The k-th highest score, or a bound that exactly k reach; 1 where no more than k can be chosen at all.
  DSV4_DEVICE uint32_t cut(int64_t k, int& turn) const {
    uint32_t count[kSelectCounts];
    BlockCounts counts;
    uint32_t low = 0;
    const uint32_t any[kSelectCounts] = {1, 1, 1};
    reaching(any, count);
    counts.join(count, turn++);
    if (counts.total[0] <= k) return 1;
    for (int shift = 30; shift >= 0; shift -= 2) {
      const uint32_t bound[kSelectCounts] = {low + (1u << shift), low + (2u << shift), low + (3u << shift)};
      reaching(bound, count);
      counts.join(count, turn++);
      DSV4_UNROLL
      for (int c = 0; c < kSelectCounts; ++c) {
        if (counts.total[c] < k) continue;
        low = bound[c];
        if (counts.total[c] == k) return low;
      }
    }
    return low;
  }
};

DSV4_DEVICE void index_select(const SelectArguments& a) {
  const int64_t k = a.params.k, blocks = a.last ? 1 : a.ranges;
  const int64_t index = ptx::block_index_x() / blocks, range = ptx::block_index_x() % blocks;
  const int64_t row = a.first_row + index;
  IndexRow of;
  of.load(a.params, a.sequences, a.entries, row);
  const bool from_candidates = a.last && a.ranges > 1;
  const int64_t first = range * a.range, candidates = (index * a.ranges + range) * k;
  int64_t count = of.visible - first;
  if (!a.last) {
    if (count <= 0) return;
    count = count < a.range ? count : a.range;
  } else if (from_candidates) {
    count = (count + a.range - 1) / a.range * k;
  }
  const SelectList list(from_candidates ? a.candidate_scores + candidates : a.scores + index * a.entries + first,
                        count);
  int turn = 0;
  const uint32_t cut = list.cut(k, turn);
  // Above the cut, and at it: of these the first that there is room for.
  const uint32_t bound[kSelectCounts] = {cut, cut + 1, cut + 1};
  uint32_t reaching[kSelectCounts];
  BlockCounts counts;
  list.reaching(bound, reaching);
  counts.join(reaching, turn);
  const int64_t chosen = counts.total[0] < k ? counts.total[0] : k, room = k - counts.total[1];
  int64_t above = counts.before[1], level = static_cast<int64_t>(counts.before[0]) - above;
  int32_t* result = static_cast<int32_t*>(a.params.result.data) + row * a.params.result.stride[0];
  int32_t* entries = a.last ? result : a.candidate_entries + candidates;
  const uint32_t lower = (1u << (ptx::thread_index() % 32)) - 1u;
  for (int64_t at = list.begin; at < list.end; at += 32) {
    const int64_t i = at + ptx::thread_index() % 32;
    const uint32_t score = i < list.end ? list.scores[i] : 0;
    const uint32_t all_above = ptx::ballot(score > cut);
    const uint32_t all_level = ptx::ballot(score == cut);
    const int64_t before = level + ptx::count_ones(all_level & lower);
    if (score > cut || (score == cut && before < room)) {
      const int64_t to = above + ptx::count_ones(all_above & lower) + (before < room ? before : room);
      entries[to] = from_candidates ? a.candidate_entries[candidates + i] : static_cast<int32_t>(first + i);
      if (!a.last) a.candidate_scores[candidates + to] = score;
    }
    above += ptx::count_ones(all_above);
    level += ptx::count_ones(all_level);
  }
  for (int64_t i = chosen + ptx::thread_index(); i < k; i += kSelectThreads) {
    entries[i] = -1;
    if (!a.last) a.candidate_scores[candidates + i] = 0;
  }
}

}  // namespace dsv4::sm80
