// The gradients of keys: a block owns 64 dims of the keys of a class, and adds to them what the rows of this launch
// give, row by row, so a key's gradient is one sum over the rows in their order, of a sum over the heads each, however
// many blocks there are. Up to 64 (float32: 32) keys of a row at once: their weights [keys, 128], gathered, times
// operands [128, 64 dims] of 64 heads, or 32, on tensor cores, or by FMA. Both come by cp.async while the stage before
// is worked on; which keys these are is read one stage earlier still.
//
// In shared memory: two stages of operands and weights; the keys of four stages.
#pragma once

#include "cuda/sm80/attention_gradient.h"
#include "cuda/sm80/attention_load.h"

namespace dsv4::sm80 {

inline constexpr int kKeyThreads = 128;
inline constexpr int kRing = 4;

// Some keys of a row, and some of its groups.
struct KeyStage {
  int64_t row;          // in this launch; past the last: there is no such stage
  uint32_t first, end;  // in the row's list: this stage's first key, and the end of the class
  int64_t group;        // the first
};

// The stages of a class, in order. Where a row's keys begin is read one row ahead.
struct KeyStages {
  KeyStage stage;
  uint32_t next_first, next_end;  // of the row after stage.row
  int64_t class_of;

  DSV4_DEVICE KeyStages(const AttentionGradientArguments& g, int64_t which) : class_of(which) {
    stage.row = -1;
    look_ahead(g);
    next_row(g);
  }

  DSV4_DEVICE void advance(const AttentionGradientArguments& g, int keys, int groups) {
    if (stage.row >= g.rows) return;
    stage.group += groups;
    if (stage.group < g.call.groups) return;
    stage.group = 0;
    stage.first += static_cast<uint32_t>(keys);
    if (stage.first >= stage.end) next_row(g);
  }

 private:
  DSV4_DEVICE void look_ahead(const AttentionGradientArguments& g) {
    next_first = next_end = 0;
    if (stage.row + 1 >= g.rows) return;
    const uint32_t* begins = g.begins + (stage.row + 1) * (g.classes + 1) + class_of;
    next_first = begins[0];
    next_end = begins[1];
  }

  DSV4_DEVICE void next_row(const AttentionGradientArguments& g) {
    do {
      ++stage.row;
      stage.first = next_first;
      stage.end = next_end;
      stage.group = 0;
      look_ahead(g);
    } while (stage.row < g.rows && stage.first >= stage.end);
  }
};

// How a stage lies in shared memory, in pieces of 16 bytes, permuted so that eight rows' same piece lie in different
// banks.
template <class E, int kKeysOfStage, int kGroupsOfStage>
struct KeyShared {
  static constexpr int kKeys = kKeysOfStage, kGroups = kGroupsOfStage;
  static constexpr int kDepth = kGroups * kGroupWeights;  // of the product
  static constexpr int kElement = static_cast<int>(sizeof(E));
  static constexpr int kOperandRow = kSliceDims * kElement, kWeightRow = kDepth * kElement;
  static constexpr int kOperandBytes = kDepth * kOperandRow, kStageBytes = kOperandBytes + kKeys * kWeightRow;
  static constexpr int kEntry = static_cast<int>(sizeof(ListedKey));
  static constexpr int kBytes = 2 * kStageBytes + kRing * kKeys * kEntry;

  static DSV4_DEVICE uint32_t operand(int64_t stage, int row, int piece) {
    return start(stage) + static_cast<uint32_t>(row * kOperandRow + (piece ^ (row & 7)) * 16);
  }
  static DSV4_DEVICE uint32_t weight(int64_t stage, int key, int piece) {
    return start(stage) + static_cast<uint32_t>(kOperandBytes + key * kWeightRow + (piece ^ (key & 7)) * 16);
  }
  static DSV4_DEVICE uint32_t entry(int64_t stage, int key) {
    return ptx::shared_base() + static_cast<uint32_t>(2 * kStageBytes + ((stage % kRing) * kKeys + key) * kEntry);
  }

  static DSV4_DEVICE int keys(const KeyStage& stage) {
    const uint32_t left = stage.end - stage.first;
    return left < kKeys ? static_cast<int>(left) : kKeys;
  }
  static DSV4_DEVICE int groups(const AttentionGradientArguments& g, const KeyStage& stage) {
    const int64_t left = g.call.groups - stage.group;
    return left < kGroups ? static_cast<int>(left) : kGroups;
  }

  // A thread's key of a stage.
  static DSV4_DEVICE Words4 read_entry(const AttentionGradientArguments& g, const KeyStage& stage) {
    const int key = ptx::thread_index();
    if (stage.row >= g.rows || key >= kKeys || key >= keys(stage)) return Words4{};
    return ptx::load_global_16(g.lists + stage.row * g.slots + stage.first + key);
  }
  static DSV4_DEVICE void store_entry(int64_t number, const Words4& value) {
    if (ptx::thread_index() < kKeys) ptx::store_shared_16(entry(number, ptx::thread_index()), value);
  }

  // Starts the copies of a stage, whose keys are known.
  static DSV4_DEVICE void copy(const AttentionGradientArguments& g, const KeyStage& stage, int64_t number,
                               int64_t slice) {
    const int of_groups = groups(g, stage), of_keys = keys(stage);
    constexpr int kOperandPieces = kOperandRow / 16, kGroupPieces = kGroupWeights * kElement / 16;
    const E* operands = operand_of<E>(g, stage.row, stage.group, 0) + slice * kSliceDims;
    for (int i = ptx::thread_index(); i < of_groups * kGroupWeights * kOperandPieces; i += kKeyThreads) {
      const int row = i / kOperandPieces, piece = i % kOperandPieces;
      ptx::cp_async_16(operand(number, row, piece), operands + row * g.wide_dim + piece * (16 / kElement), 16);
    }
    for (int i = ptx::thread_index(); i < of_keys * kGroups * kGroupPieces; i += kKeyThreads) {
      const int key = i / (kGroups * kGroupPieces), piece = i % (kGroups * kGroupPieces);
      const int group = piece / kGroupPieces, within = piece % kGroupPieces;
      if (group >= of_groups) continue;
      const uint32_t slot = ptx::load_shared_word(entry(number, key));
      const E* from = weights_of<E>(g, stage.row, stage.group + group, slot) + within * (16 / kElement);
      ptx::cp_async_16(weight(number, key, piece), from, 16);
    }
  }

 private:
  static DSV4_DEVICE uint32_t start(int64_t stage) {
    return ptx::shared_base() + static_cast<uint32_t>((stage & 1) * kStageBytes);
  }
};

// A key's gradient so far, and how often a row's part of it counts.
struct KeySum {
  float* at;
  uint32_t times;

  DSV4_DEVICE KeySum(const AttentionGradientArguments& g, uint32_t entry) {
    const Words4 listed = ptx::load_shared_16(entry);
    const int64_t number = listed.word[1];
    const bool window = number < g.window_rows;
    at = (window ? g.window_sums : g.compressed_sums) + (window ? number : number - g.window_rows) * g.call.head_dim;
    times = listed.word[2];
  }

  DSV4_DEVICE ptx::Words2 load(int dim, bool paired) const {
    if (paired) return ptx::load_global_8(at + dim);
    return ptx::Words2{{bits_from_float(at[dim]), bits_from_float(at[dim + 1])}};
  }
  DSV4_DEVICE void add(int dim, const ptx::Words2& old, float even, float odd, bool paired) const {
    if (times == 0) return;  // another has this place
    float first = float_from_bits(old.word[0]), second = float_from_bits(old.word[1]);
    for (uint32_t i = 0; i < times; ++i) {
      first = ptx::add(first, even);
      second = ptx::add(second, odd);
    }
    OutPair<float>(first, second).store(at + dim, paired);
  }
};

// On tensor cores: a warp has 16 of the dims.
struct TensorKeySums {
  using Shared = KeyShared<bf16, 64, 4>;
  static constexpr int kTiles = Shared::kKeys / 16;
  float sum[kTiles][2][4];  // of [16 keys, 8 dims]
  ptx::Words2 old[kTiles][2][2];

  DSV4_DEVICE void clear() {
    DSV4_UNROLL
    for (int t = 0; t < kTiles; ++t) {
      DSV4_UNROLL
      for (int j = 0; j < 8; ++j) sum[t][j / 4][j % 4] = 0.0f;
    }
  }

  DSV4_DEVICE void multiply(int64_t stage, int keys, int groups) {
    const int lane = ptx::thread_index() % 32, warp = ptx::thread_index() / 32;
    DSV4_UNROLL_IF(false)
    for (int step = 0; step < 2 * groups; ++step) {
      uint32_t operands[4];
      const int row = 16 * step + lane / 8 % 2 * 8 + lane % 8;
      ptx::ldmatrix_x4_transposed(operands, Shared::operand(stage, row, 2 * warp + lane / 16));
      DSV4_UNROLL
      for (int t = 0; t < kTiles; ++t) {
        if (16 * t >= keys) break;
        uint32_t weights[4];
        const int key = 16 * t + lane % 16;  // past the last: any
        ptx::ldmatrix_x4(weights, Shared::weight(stage, key < keys ? key : 0, 2 * step + lane / 16));
        ptx::mma_m16n8k16(sum[t][0], weights, operands[0], operands[1]);
        ptx::mma_m16n8k16(sum[t][1], weights, operands[2], operands[3]);
      }
    }
  }

  DSV4_DEVICE void load_old(const AttentionGradientArguments& g, int64_t stage, int keys, int64_t slice) {
    each(g, stage, keys, slice,
         [&](const KeySum& key, int t, int n, int half, int dim) { old[t][n][half] = key.load(dim, g.paired_sums); });
  }
  DSV4_DEVICE void store(const AttentionGradientArguments& g, int64_t stage, int keys, int64_t slice) const {
    each(g, stage, keys, slice, [&](const KeySum& key, int t, int n, int half, int dim) {
      key.add(dim, old[t][n][half], sum[t][n][2 * half], sum[t][n][2 * half + 1], g.paired_sums);
    });
  }

 private:
  template <class Body>
  static DSV4_DEVICE void each(const AttentionGradientArguments& g, int64_t stage, int keys, int64_t slice,
                               const Body& body) {
    const int lane = ptx::thread_index() % 32, warp = ptx::thread_index() / 32;
    DSV4_UNROLL
    for (int t = 0; t < kTiles; ++t) {
      DSV4_UNROLL
      for (int half = 0; half < 2; ++half) {
        const int key = 16 * t + lane / 4 + 8 * half;
        if (key >= keys) continue;
        const KeySum sum_of(g, Shared::entry(stage, key));
        DSV4_UNROLL
        for (int n = 0; n < 2; ++n) {
          const int dim = static_cast<int>(slice * kSliceDims) + 16 * warp + 8 * n + lane % 4 * 2;
          if (dim < g.call.head_dim) body(sum_of, t, n, half, dim);
        }
      }
    }
  }
};

// By FMA: a thread has four of the dims of four keys.
struct FloatKeySums {
  using Shared = KeyShared<float, 32, 2>;
  static constexpr int kOwn = 4;
  float sum[kOwn][4];
  ptx::Words2 old[kOwn][2];

  DSV4_DEVICE void clear() {
    DSV4_UNROLL
    for (int i = 0; i < 4 * kOwn; ++i) sum[i / 4][i % 4] = 0.0f;
  }

  DSV4_DEVICE void multiply(int64_t stage, int keys, int groups) {
    const int piece = ptx::thread_index() % 16, first = ptx::thread_index() / 16 * kOwn;
    if (first >= keys) return;
    DSV4_UNROLL_IF(false)
    for (int depth = 0; depth < groups * kGroupWeights; depth += 4) {
      Words4 weight[kOwn];
      DSV4_UNROLL
      for (int i = 0; i < kOwn; ++i) {
        const int key = first + i < keys ? first + i : first;
        weight[i] = ptx::load_shared_16(Shared::weight(stage, key, depth / 4));
      }
      DSV4_UNROLL
      for (int d = 0; d < 4; ++d) {
        const Words4 operand = ptx::load_shared_16(Shared::operand(stage, depth + d, piece));
        DSV4_UNROLL
        for (int i = 0; i < 4 * kOwn; ++i) {
          sum[i / 4][i % 4] =
              ptx::fma(float_from_bits(weight[i / 4].word[d]), float_from_bits(operand.word[i % 4]), sum[i / 4][i % 4]);
        }
      }
    }
  }

  DSV4_DEVICE void load_old(const AttentionGradientArguments& g, int64_t stage, int keys, int64_t slice) {
    each(g, stage, keys, slice,
         [&](const KeySum& key, int i, int pair, int dim) { old[i][pair] = key.load(dim, g.paired_sums); });
  }
  DSV4_DEVICE void store(const AttentionGradientArguments& g, int64_t stage, int keys, int64_t slice) const {
    each(g, stage, keys, slice, [&](const KeySum& key, int i, int pair, int dim) {
      key.add(dim, old[i][pair], sum[i][2 * pair], sum[i][2 * pair + 1], g.paired_sums);
    });
  }

 private:
  template <class Body>
  static DSV4_DEVICE void each(const AttentionGradientArguments& g, int64_t stage, int keys, int64_t slice,
                               const Body& body) {
    const int first = ptx::thread_index() / 16 * kOwn;
    DSV4_UNROLL
    for (int i = 0; i < kOwn; ++i) {
      if (first + i >= keys) continue;
      const KeySum sum_of(g, Shared::entry(stage, first + i));
      DSV4_UNROLL
      for (int pair = 0; pair < 2; ++pair) {
        const int dim = static_cast<int>(slice * kSliceDims) + ptx::thread_index() % 16 * 4 + 2 * pair;
        if (dim < g.call.head_dim) body(sum_of, i, pair, dim);
      }
    }
  }
};

template <class Sums>
DSV4_DEVICE void add_to_keys(const AttentionGradientArguments& g, int64_t slice, int64_t which) {
  using Shared = typename Sums::Shared;
  KeyStages ahead(g, which);
  const auto next = [&] {
    const KeyStage stage = ahead.stage;
    ahead.advance(g, Shared::kKeys, Shared::kGroups);
    return stage;
  };
  KeyStage now = next(), copied = next();
  Shared::store_entry(0, Shared::read_entry(g, now));
  Shared::store_entry(1, Shared::read_entry(g, copied));
  ptx::sync_threads();  // the keys of both are there
  if (now.row < g.rows) Shared::copy(g, now, 0, slice);
  ptx::cp_async_commit();
  Sums sums;
  sums.clear();
  DSV4_UNROLL_IF(false)
  for (int64_t number = 0; now.row < g.rows; ++number) {
    const KeyStage later = next();
    const Words4 entry = Shared::read_entry(g, later);
    ptx::cp_async_wait<0>();
    ptx::sync_threads();  // the stage is there, and the next one's keys; nobody works on the stage before
    if (copied.row < g.rows) Shared::copy(g, copied, number + 1, slice);
    ptx::cp_async_commit();
    const int keys = Shared::keys(now), groups = Shared::groups(g, now);
    const bool last = now.group + groups >= g.call.groups;
    if (last) sums.load_old(g, number, keys, slice);
    sums.multiply(number, keys, groups);
    if (last) {
      sums.store(g, number, keys, slice);
      sums.clear();
    }
    Shared::store_entry(number + 2, entry);
    now = copied;
    copied = later;
  }
}

// The number of each of a row's keys.
DSV4_DEVICE void number_keys(const AttentionGradientArguments& g, int64_t index) {
  AttentionRow row;
  row.load(g.call, g.call.first_row + index);
  for (int64_t i = ptx::thread_index(); i < row.slots; i += kKeyThreads) {
    AttentionSlot slot;
    slot.load(row, i);
    g.numbers[index * g.slots + i] = number_of(g, row, slot);
  }
}

// Which keys of a row take a gradient, class by class: a block's work.
DSV4_DEVICE void list_keys(const AttentionGradientArguments& g, int64_t index) {
  AttentionRow row;
  row.load(g.call, g.call.first_row + index);
  const int lane = ptx::thread_index() % 32, warp = ptx::thread_index() / 32;
  const uint32_t* numbers = g.numbers + index * g.slots;
  ListedKey* list = g.lists + index * g.slots;
  const uint32_t mask = static_cast<uint32_t>(g.classes - 1), counts = ptx::shared_base();
  const auto is_of = [&](int64_t slot, int which, uint32_t& number) {
    number = slot < row.slots ? numbers[slot] : kNoNumber;
    return number != kNoNumber && (number & mask) == static_cast<uint32_t>(which);
  };
  for (int which = warp; which < g.classes; which += kKeyThreads / 32) {
    uint32_t count = 0, number;
    for (int64_t first = 0; first < row.slots; first += 32) {
      const uint32_t found = ptx::ballot(is_of(first + lane, which, number));
      count += static_cast<uint32_t>(ptx::count_ones(found));
    }
    if (lane == 0) ptx::store_shared_word(counts + static_cast<uint32_t>(which * 4), count);
  }
  ptx::sync_threads();  // the sizes of all classes are there
  for (int which = warp; which < g.classes; which += kKeyThreads / 32) {
    uint32_t before = 0;
    for (int c = lane; c < which; c += 32) before += ptx::load_shared_word(counts + static_cast<uint32_t>(c * 4));
    const uint32_t begin = ptx::warp_sum(before);
    uint32_t end = begin, number;
    for (int64_t first = 0; first < row.slots; first += 32) {
      const bool mine = is_of(first + lane, which, number);
      const uint32_t found = ptx::ballot(mine);
      const uint32_t rank = static_cast<uint32_t>(ptx::count_ones(found & ((1u << lane) - 1)));
      if (mine) list[end + rank] = ListedKey{static_cast<uint32_t>(first + lane), number, 1, 0};
      end += static_cast<uint32_t>(ptx::count_ones(found));
    }
    if (lane == 0) g.begins[index * (g.classes + 1) + which] = begin;
    if (lane == 0 && which == g.classes - 1) g.begins[index * (g.classes + 1) + g.classes] = end;
    ptx::sync_warp();  // the class is whole
    for (uint32_t i = begin + static_cast<uint32_t>(lane); i < end; i += 32) {
      uint32_t times = 0;
      bool earlier = false;
      for (uint32_t j = begin; j < end; ++j) {
        const bool same = list[j].number == list[i].number;
        times += same ? 1 : 0;
        earlier = earlier || (same && j < i);
      }
      list[i].times = earlier ? 0 : times;
    }
  }
}

}  // namespace dsv4::sm80
