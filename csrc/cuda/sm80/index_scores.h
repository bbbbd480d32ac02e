// Scores of 128 entries of a sequence for a few rows. The keys lie in shared memory as bfloat16, decoded once for rows
// that follow each other in one sequence; queries come in chunks of heads, the next by cp.async while a chunk is
// worked on. Here mma.sync multiplies 32 keys of a warp (m) by the 32 heads of a chunk (n); cuda/sm90/index_scores.h
// has Hopper's. Relu, weights and the sum over heads follow in registers. A score is summed over dims and then over
// heads in an order that depends on their numbers alone.
//
// Scores leave as integers that order like them: 0 for what can never be chosen (NaN, not stored), else from 1 on.
#pragma once

#include "cuda/sm80/index_pool.h"

namespace dsv4::sm80 {

inline constexpr int kIndexThreads = 128;
inline constexpr int kIndexTile = 128;  // entries of a block
inline constexpr int kIndexMaxDim = 128;
inline constexpr int kIndexRowBytes = kIndexMaxDim * 2;  // of a key or a head in shared memory

// Of two chunks of heads, the keys and their scales.
template <class Sums>
inline constexpr int kIndexScoresSharedBytes =
    Sums::kAlignment + 2 * Sums::kHeads * kIndexRowBytes + kIndexTile * (kIndexRowBytes + 4);

struct IndexArguments {
  IndexTopkParams params;
  IndexPool pool;
  uint32_t* scores;  // [rows of the group, entries]
  int64_t entries;   // that a row may have
  int64_t first_row, end_row, tiles;
  int rows_per_block;
  int heads;
  int units;  // of 32 dims
  bool vector_query;
};

struct IndexRow {
  int32_t sequence, visible;

  DSV4_DEVICE void load(const IndexTopkParams& p, int64_t sequences, int64_t entries, int64_t row) {
    sequence = static_cast<const int32_t*>(p.sequence.data)[row * p.sequence.stride[0]];
    visible = static_cast<const int32_t*>(p.lengths.data)[row * p.lengths.stride[0]];
    visible = visible < entries ? visible : static_cast<int32_t>(entries);
    if (visible < 0 || sequence < 0 || sequence >= sequences) visible = 0;
  }
};

// Integers that order like scores, 0 and -0 alike.
DSV4_DEVICE uint32_t index_order(float score) {
  if (score != score) return 0;
  const uint32_t bits = bits_from_float(ptx::add(score, 0.0f));
  return bits >> 31 != 0 ? ~bits : bits | 0x80000000u;
}

DSV4_DEVICE float index_relu(float value) { return value < 0.0f ? 0.0f : value; }  // NaN stays

// A chunk of kHeads heads of a row that sees some of the tile.
template <int kHeads>
struct IndexStep {
  int64_t row;  // at or past the block's last: there is none
  int head;
  IndexRow of;

  // The first row from `row` on that sees entry `first`.
  DSV4_DEVICE void seek(const IndexArguments& a, int64_t end, int64_t first) {
    head = 0;
    for (; row < end; ++row) {
      of.load(a.params, a.pool.sequences, a.entries, row);
      if (of.visible > first) return;
    }
  }

  DSV4_DEVICE void advance(const IndexArguments& a, int64_t end, int64_t first) {
    head += kHeads;
    if (head < a.heads) return;
    ++row;
    seek(a, end, first);
  }
};

// Pieces of 16 bytes, permuted so that eight rows' same piece, which one ldmatrix phase reads, lie in different banks.
DSV4_DEVICE uint32_t index_piece(uint32_t rows, int row, int piece) {
  return rows + static_cast<uint32_t>(row * kIndexRowBytes + (piece ^ (row & 7)) * 16);
}

// Starts copying a chunk of heads to where Sums looks for it; heads past the last are zeros.
template <class Sums>
DSV4_DEVICE void start_index_query(const IndexArguments& a, const IndexStep<Sums::kHeads>& step, uint32_t to) {
  const AnyView<3>& query = a.params.query;
  const bf16* rows = static_cast<const bf16*>(query.data) + step.row * query.stride[0];
  const int pieces = 4 * a.units;
  for (int i = ptx::thread_index(); i < Sums::kHeads * pieces; i += kIndexThreads) {
    const int head = i / pieces, piece = i % pieces;
    const bool exists = step.head + head < a.heads;
    const bf16* from = rows + (exists ? (step.head + head) * query.stride[1] : 0);
    const uint32_t address = Sums::query_piece(to, head, piece);
    if (a.vector_query) {
      ptx::cp_async_16(address, exists ? from + 8 * piece : static_cast<const bf16*>(query.data), exists ? 16 : 0);
      continue;
    }
    Words4 value;
    DSV4_UNROLL
    for (int w = 0; w < 4; ++w) {
      const int d = 8 * piece + 2 * w;
      const uint32_t low = exists && d < a.pool.dim ? from[d].bits : 0;
      const uint32_t high = exists && d + 1 < a.pool.dim ? from[d + 1].bits : 0;
      value.word[w] = low | high << 16;
    }
    ptx::store_shared_16(address, value);
  }
}

// Starts copying a warp's bfloat16 keys, eight lanes together 128 bytes of one; zeros for those that are not stored.
DSV4_DEVICE void start_index_keys(const IndexArguments& a, const IndexKey& own, uint32_t keys) {
  const int t = ptx::thread_index();
  const uint64_t address = reinterpret_cast<uintptr_t>(own.values);
  DSV4_UNROLL_IF(false)
  for (int i = 0; i < 8; ++i) {
    const int owner = t / 8 * 8 + i;
    const uint64_t low = ptx::shuffle(static_cast<uint32_t>(address), owner % 32);
    const uint64_t high = ptx::shuffle(static_cast<uint32_t>(address >> 32), owner % 32);
    const auto* values = reinterpret_cast<const uint8_t*>(static_cast<uintptr_t>(high << 32 | low));
    const bool stored = values != nullptr;
    for (int piece = t % 8; piece < 4 * a.units; piece += 8) {
      ptx::cp_async_16(index_piece(keys, owner, piece), stored ? values + 16 * piece : a.pool.data, stored ? 16 : 0);
    }
  }
}

// One key a thread: its dims to `keys`, its scale to `scales`, where NaN marks one that is not stored.
DSV4_DEVICE void stage_index_keys(const IndexArguments& a, int64_t sequence, int64_t first, uint32_t keys,
                                  uint32_t scales) {
  const int t = ptx::thread_index();
  const IndexPool& pool = a.pool;
  IndexKey key = {nullptr, nullptr};
  if (first + t < a.entries) key = find_index_key(pool, sequence, static_cast<uint32_t>(first + t));
  const bool stored = key.values != nullptr;
  ptx::store_shared_float(scales + static_cast<uint32_t>(4 * t),
                          stored ? index_key_scale(pool, key) : float_from_bits(0x7FC00000u));
  if (pool.vector && pool.format == IndexKeyFormat::kBFloat16) return start_index_keys(a, key, keys);
  const auto store = [&](int piece, const Words4& value) { ptx::store_shared_16(index_piece(keys, t, piece), value); };
  bool whole = stored && pool.vector;
  if (!stored) {
    for (int piece = 0; piece < 4 * a.units; ++piece) store(piece, Words4{});
  } else if (whole && pool.format == IndexKeyFormat::kFp4) {
    Words4 codes[kIndexMaxDim / 32];
    uint8_t scale[kIndexMaxDim / 32];
    DSV4_UNROLL
    for (int unit = 0; unit < kIndexMaxDim / 32; ++unit) {
      if (unit >= a.units) continue;
      codes[unit] = ptx::load_constant_16(key.values + 16 * unit);
      scale[unit] = key.scales[unit];
    }
    DSV4_UNROLL
    for (int unit = 0; unit < kIndexMaxDim / 32; ++unit) {
      if (unit >= a.units) continue;
      const uint32_t twice = bf16_twice(bits_from_float(e8m0_value(scale[unit])) >> 16);
      DSV4_UNROLL
      for (int w = 0; w < 4; ++w) store(4 * unit + w, decode_e2m1(codes[unit].word[w], twice));
    }
  } else if (whole) {
    Words4 codes[kIndexMaxDim / 16];
    DSV4_UNROLL
    for (int i = 0; i < kIndexMaxDim / 16; ++i) {
      if (i < 2 * a.units) codes[i] = ptx::load_constant_16(key.values + 16 * i);
    }
    uint32_t nans = 0;
    DSV4_UNROLL
    for (int i = 0; i < kIndexMaxDim / 16; ++i) {
      if (i >= 2 * a.units) continue;
      const uint32_t twice = bf16_twice(0x7B80u);  // 2^120
      store(2 * i, decode_e4m3(codes[i].word[0], codes[i].word[1], twice));
      store(2 * i + 1, decode_e4m3(codes[i].word[2], codes[i].word[3], twice));
      nans |= e4m3_nans(codes[i]);
    }
    whole = nans == 0;
  }
  if (whole || !stored) return;
  for (int piece = 0; piece < 4 * a.units; ++piece) store(piece, gather_index_key(pool, key, 8 * piece));
}

DSV4_DEVICE float index_key_scale_at(uint32_t scales, int key) {
  return ptx::load_shared_float(scales + static_cast<uint32_t>(4 * key));
}

// Adds a chunk of heads to a thread's sums of keys [m, half]: of products d [m, n, 2 half + e] with heads 8 n + 2 (lane
// % 4) + e, those times the key's scale, cut off below zero, times the head's weight.
template <class Key, int kHeads>
DSV4_DEVICE void add_index_heads(const IndexArguments& a, const IndexStep<kHeads>& step,
                                 const float (&d)[2][kHeads / 8][4], uint32_t scales, const Key& key,
                                 float (&sum)[2][2]) {
  float scale[2][2];
  DSV4_UNROLL
  for (int i = 0; i < 4; ++i) scale[i / 2][i % 2] = index_key_scale_at(scales, key(i / 2, i % 2));
  const View<const float, 2>& weights = a.params.weights;
  const float* weight = weights.data + step.row * weights.stride[0];
  DSV4_UNROLL
  for (int i = 0; i < kHeads / 4; ++i) {
    const int n = i / 2, e = i % 2, head = step.head + n * 8 + ptx::thread_index() % 4 * 2 + e;
    if (head >= a.heads) continue;  // its products are zero, but for a key that is not finite
    const float w = weight[head];
    DSV4_UNROLL
    for (int m = 0; m < 2; ++m) {
      DSV4_UNROLL
      for (int half = 0; half < 2; ++half) {
        const float product = ptx::multiply(d[m][n][2 * half + e], scale[m][half]);
        sum[m][half] = ptx::fma(w, index_relu(product), sum[m][half]);
      }
    }
  }
}

// Joins the lanes' shares of keys [m, half] and writes the scores of the row's entries: entry key(m, half) from `first`
// on.
template <class Key, int kHeads>
DSV4_DEVICE void write_index_scores(const IndexArguments& a, const IndexStep<kHeads>& step, int64_t first,
                                    const float (&sum)[2][2], uint32_t scales, const Key& key) {
  const int lane = ptx::thread_index() % 32;
  uint32_t* scores = a.scores + (step.row - a.first_row) * a.entries;
  DSV4_UNROLL
  for (int m = 0; m < 2; ++m) {
    DSV4_UNROLL
    for (int half = 0; half < 2; ++half) {
      float score = sum[m][half];
      score = ptx::add(score, ptx::shuffle_xor(score, 1));
      score = ptx::add(score, ptx::shuffle_xor(score, 2));
      const float scale = index_key_scale_at(scales, key(m, half));
      const int64_t entry = first + key(m, half);
      if (lane % 4 == 0 && entry < step.of.visible) scores[entry] = scale != scale ? 0 : index_order(score);
    }
  }
}

// A thread's share of the scores of its warp's 32 keys: keys 16 m + lane / 4 + 8 half, and of each 8 heads two.
struct IndexSums {
  static constexpr int kHeads = 32, kAlignment = 0;
  using Step = IndexStep<kHeads>;
  float sum[2][2];

  static DSV4_DEVICE uint32_t query_piece(uint32_t queries, int head, int piece) {
    return index_piece(queries, head, piece);
  }
  // Where the first key is that a warp multiplies, of those from `first` on.
  static DSV4_DEVICE int64_t first_key(int64_t first) { return first + ptx::thread_index() / 32 * 32; }
  // Of what this thread has written, before the barrier after which others multiply it.
  static DSV4_DEVICE void show() {}
  DSV4_DEVICE void take_keys(uint32_t) {}

  DSV4_DEVICE void clear() {
    DSV4_UNROLL
    for (int i = 0; i < 4; ++i) sum[i / 2][i % 2] = 0.0f;
  }

  // Adds a chunk of heads.
  DSV4_DEVICE void add(const IndexArguments& a, const Step& step, uint32_t keys, uint32_t scales, uint32_t queries) {
    const int lane = ptx::thread_index() % 32, warp = ptx::thread_index() / 32;
    float d[2][4][4] = {};
    DSV4_UNROLL_IF(false)
    for (int unit = 0; unit < a.units; ++unit) {
      uint32_t key[2][2][4];
      DSV4_UNROLL
      for (int i = 0; i < 4; ++i) {
        const int row = warp * 32 + i / 2 * 16 + lane / 8 % 2 * 8 + lane % 8;
        ptx::ldmatrix_x4(key[i / 2][i % 2], index_piece(keys, row, 4 * unit + i % 2 * 2 + lane / 16));
      }
      DSV4_UNROLL
      for (int n = 0; n < 4; ++n) {
        uint32_t query[4];
        ptx::ldmatrix_x4(query, index_piece(queries, n * 8 + lane % 8, 4 * unit + lane / 8));
        DSV4_UNROLL
        for (int i = 0; i < 4; ++i) {
          ptx::mma_m16n8k16(d[i / 2][n], key[i / 2][i % 2], query[i % 2 * 2], query[i % 2 * 2 + 1]);
        }
      }
    }
    add_index_heads(a, step, d, scales, key, sum);
  }

  // Joins the threads' shares and writes the scores of the row's entries.
  DSV4_DEVICE void write(const IndexArguments& a, const Step& step, int64_t first, uint32_t scales) const {
    write_index_scores(a, step, first, sum, scales, key);
  }

 private:
  static DSV4_DEVICE int key(int m, int half) {
    return ptx::thread_index() / 32 * 32 + m * 16 + half * 8 + ptx::thread_index() % 32 / 4;
  }
};

// Grid: tiles of entries, and for each all blocks of rows.
template <class Sums>
DSV4_DEVICE void index_scores(const IndexArguments& a) {
  const int64_t first = ptx::block_index_x() % a.tiles * kIndexTile;
  const int64_t row = a.first_row + ptx::block_index_x() / a.tiles * a.rows_per_block;
  const int64_t end = row + a.rows_per_block < a.end_row ? row + a.rows_per_block : a.end_row;
  const int64_t warp_first = Sums::first_key(first);
  constexpr uint32_t kAlignment = Sums::kAlignment > 0 ? Sums::kAlignment : 1, kBytes = Sums::kHeads * kIndexRowBytes;
  const uint32_t keys = ptx::shared_base(), scales = keys + kIndexTile * kIndexRowBytes;
  uint32_t queries = (scales + kIndexTile * 4 + kAlignment - 1) / kAlignment * kAlignment,
           next_queries = queries + kBytes;
  typename Sums::Step step = {row, 0, {}};
  step.seek(a, end, first);
  if (step.row >= end) return;
  start_index_query<Sums>(a, step, queries);
  int32_t staged = -1;
  Sums sums;
  sums.clear();
  while (step.row < end) {
    const bool other_keys = step.of.sequence != staged;
    if (other_keys) {
      ptx::sync_threads();  // all are done with the keys before
      stage_index_keys(a, step.of.sequence, first, keys, scales);
      staged = step.of.sequence;
    }
    ptx::cp_async_commit();
    ptx::cp_async_wait<0>();
    Sums::show();
    ptx::sync_threads();  // keys and queries are there, and all are done with the queries before
    if (other_keys) sums.take_keys(keys);
    typename Sums::Step next = step;
    next.advance(a, end, first);
    if (next.row < end) start_index_query<Sums>(a, next, next_queries);
    const bool sees = warp_first < step.of.visible;
    if (sees) sums.add(a, step, keys, scales, queries);
    if (next.row != step.row) {
      if (sees) sums.write(a, step, first, scales);
      sums.clear();
    }
    step = next;
    const uint32_t other = queries;
    queries = next_queries;
    next_queries = other;
  }
}

// The same scores for operands that are float32, or wider than kIndexMaxDim: an entry a thread, by FMA.
template <class X>
DSV4_DEVICE void index_scores_plainly(const IndexArguments& a) {
  constexpr int kAtOnce = 4;
  const int64_t entry = ptx::block_index_x() % a.tiles * kIndexTile + ptx::thread_index();
  const int64_t row = a.first_row + ptx::block_index_x() / a.tiles;
  IndexRow of;
  of.load(a.params, a.pool.sequences, a.entries, row);
  if (entry >= of.visible) return;
  uint32_t* to = a.scores + (row - a.first_row) * a.entries + entry;
  const IndexKey key = find_index_key(a.pool, of.sequence, static_cast<uint32_t>(entry));
  if (key.values == nullptr) {
    *to = 0;
    return;
  }
  const AnyView<3>& query = a.params.query;
  const float* weight = a.params.weights.data + row * a.params.weights.stride[0];
  const float scale = index_key_scale(a.pool, key);
  float score = 0.0f;
  for (int head = 0; head < a.heads; head += kAtOnce) {
    const X* q = static_cast<const X*>(query.data) + row * query.stride[0] + head * query.stride[1];
    float product[kAtOnce] = {};
    for (int d = 0; d < a.pool.dim; ++d) {
      const float value = index_key_value(a.pool, key, d);
      DSV4_UNROLL
      for (int i = 0; i < kAtOnce; ++i) {
        if (head + i < a.heads) product[i] = ptx::fma(to_float(q[i * query.stride[1] + d]), value, product[i]);
      }
    }
    DSV4_UNROLL
    for (int i = 0; i < kAtOnce; ++i) {
      if (head + i >= a.heads) continue;
      score = ptx::fma(weight[head + i], index_relu(ptx::multiply(product[i], scale)), score);
    }
  }
  *to = index_order(score);
}

}  // namespace dsv4::sm80
