// One row of sparse_attention in tiles: its memory and its work, which avx512::Call spreads over threads, and whose
// steps a block of rows takes in another order (attention.cpp).
#pragma once

#include "cpu/amx/attention_product.h"
#include "cpu/amx/attention_slots.h"

namespace dsv4::DSV4_AMX_NAMESPACE {
namespace {

constexpr int64_t kKeptBytes = 1 << 20;  // of decoded keys, of 2 MiB of second-level cache

// What one row's work leaves between its steps. Heads are padded to whole tiles.
struct RowMemory {
  Slots* slots;
  Key* keys;        // [slots]
  uint32_t* valid;  // [slots / 32], a bit for each that holds a key of this row
  bf16* query;      // as pack_query leaves it
  bf16* pairs;      // [keys kept / 32], pairs_stride apart
  float* scores;    // [keys / 32][tile of heads][32 keys][16 heads]
  float* maxima;    // [parts, H]
  float* totals;    // [parts, H]
  float* sums;      // [parts kept][tile of heads][tile of dims][16 heads][16 dims]
  int64_t most_kept;

  static int64_t bytes(const SparseAttentionParams& p, int64_t most, int64_t sums_kept) {
    Arena arena{nullptr};
    RowMemory(p, most, sums_kept, arena);
    return arena.used;
  }

  RowMemory() = default;
  RowMemory(const SparseAttentionParams& p, int64_t most, int64_t sums_kept, Arena& arena)
      : most_kept(kKeptBytes / (p.query.size(2) * 2)) {
    const int64_t heads = tiles_of(p.query.size(1)) * kTileRows, head_dim = p.query.size(2), parts = Plan(most).parts;
    slots = arena.take<Slots>(1);
    keys = arena.take<Key>(most);
    valid = arena.take<uint32_t>(round_up(most, kStepKeys) / kStepKeys);
    query = arena.take<bf16>(heads * head_dim);
    pairs = arena.take<bf16>(round_up(smaller(most, most_kept), kStepKeys) / kStepKeys * pairs_stride(head_dim));
    scores = arena.take<float>(round_up(most, kStepKeys) * heads);
    maxima = arena.take<float>(parts * heads);
    totals = arena.take<float>(parts * heads);
    sums = arena.take<float>(sums_kept * heads * head_dim);
  }
};

// A thread's memory.
struct Tiles {
  bf16* rows;        // [32 keys, row_stride], a slice of their dims
  bf16* pairs;       // [keys of a part / 32], pairs_stride apart, where the row does not keep them
  bf16* numerators;  // [tile of heads][keys of a part / 32][16 heads][32 keys]
  float* blocks[2];  // four tiles of sums, before they are added to those of other parts

  static int64_t bytes(const SparseAttentionParams& p) {
    Arena arena{nullptr};
    Tiles(p, arena);
    return arena.used;
  }

  Tiles(const SparseAttentionParams& p, Arena& arena) {
    const int64_t keys = avx512::kMostPartKeys, head_dim = p.query.size(2);
    rows = arena.take<bf16>(kStepKeys * row_stride(smaller(head_dim, kSliceDims)));
    pairs = arena.take<bf16>(keys / kStepKeys * pairs_stride(head_dim));
    numerators = arena.take<bf16>(keys * tiles_of(p.query.size(1)) * kTileRows);
    for (float*& x : blocks) x = arena.take<float>(4 * kTileSums);
  }
};

class RowWork {
 public:
  using Memory = RowMemory;
  using Tiles = DSV4_AMX_NAMESPACE::Tiles;

  static int64_t row_bytes(const SparseAttentionParams& p, int64_t most, int64_t sums_kept) {
    return Memory::bytes(p, most, sums_kept);
  }
  static Memory row_memory(const SparseAttentionParams& p, int64_t most, int64_t sums_kept, uint8_t* memory) {
    Arena arena{memory};
    return Memory(p, most, sums_kept, arena);
  }
  static int64_t tile_bytes(const SparseAttentionParams& p) { return Tiles::bytes(p); }
  static Tiles tile_memory(const SparseAttentionParams& p, uint8_t* memory) {
    Arena arena{memory};
    return Tiles(p, arena);
  }

  RowWork(const SparseAttentionParams& p, int64_t row, const Memory& memory)
      : p_(p),
        row_(row),
        heads_(p.query.size(1)),
        head_dim_(p.query.size(2)),
        head_tiles_(tiles_of(heads_)),
        memory_(memory),
        slots_(*memory.slots),
        kept_(slots_.keys <= memory.most_kept) {}

  static int64_t most_keys(const SparseAttentionParams& p) { return most_slots(p); }
  static int64_t most_parts(const SparseAttentionParams&, int64_t most) { return Plan(most).parts; }
  // Products take less time than what they read takes to decode, which would be done again for other heads.
  static int64_t least_heads(const SparseAttentionParams& p) { return p.query.size(1); }

  // The part of a row's work that is done once, before any part.
  static void prepare(const SparseAttentionParams& p, int64_t row, const Memory& memory) {
    Slots slots;
    if (has_window_slots(p)) {
      const int64_t position = position_of(p, row);
      slots = slots_of(p, position, 0);
      put_window(p, row, slots, position - p.window + 1, position, memory.keys);
      slots = slots_of(p, position, put_entries(p, row, memory.keys + slots.window));
    } else {
      slots = listed_slots(list_keys(p, row, memory.keys).all);
    }
    if (!mark_keys(memory.keys, slots.keys, memory.valid)) slots = Slots();
    *memory.slots = slots;
    const KeyRows keys(p, memory.keys, slots.keys);
    for (int64_t j = 0; j < smaller(kAhead, keys.end); ++j) KeyRows::prefetch(keys, j);
    pack_query(p, row, memory.query);
  }

  int64_t parts() const { return slots_.parts; }

  // Every 32 keys are decoded, a slice of their dims at a time, then multiplied: both at once would take longer.
  void score(int64_t part, const Tiles& tiles) const {
    const int64_t begin = slots_.begin(part), end = slots_.end(part);
    const KeyRows keys(p_, memory_.keys, end);
    configure();
    for (int64_t slot = begin; slot < end; slot += kStepKeys) {
      for (int64_t d = 0; d < head_dim_; d += kSliceDims) {
        const int64_t last = smaller(d + kSliceDims, head_dim_);
        read(keys, slot, d, last, tiles.rows);
        score_slice(tiles.rows, d, (last - d) / kStepDims, scores(slot));
      }
      // Tiles that were just stored would have to be waited for.
      if (slot > begin) raise_maxima(slot - kStepKeys);
    }
    tile_release();
    raise_maxima(round_up(end, kStepKeys) - kStepKeys);
  }

  // Dims [first, last) of 32 keys, and their pairs where these are kept.
  void read(const KeyRows& keys, int64_t slot, int64_t first, int64_t last, bf16* rows) const {
    for (int64_t i = 0; i < kTileRows; ++i) {
      const int64_t key = slot + 2 * i;
      for (int64_t j = key + kAhead; first == 0 && j < smaller(key + kAhead + 2, slots_.keys); ++j) {
        KeyRows::prefetch(keys, j);
      }
      KeyRows::read<true>(keys, key, first, last, rows + 2 * i * rows_stride(), rows_stride(),
                          pair_row(pairs_of(slot), first, i));
    }
  }

  // After all parts have their scores. This part's sums go to place `place`.
  void mix(int64_t part, int64_t place, const Tiles& tiles) const {
    mix_steps<false>(part, values(part, tiles), memory_.sums + place * padded_heads() * head_dim_, tiles);
  }
  // The same, one part after another, each added to the sums of those before.
  void mix_after(int64_t part, const bf16* pairs, const Tiles& tiles) const {
    if (part == 0) {
      mix_steps<false>(part, pairs, memory_.sums, tiles);
    } else {
      mix_steps<true>(part, pairs, memory_.sums, tiles);
    }
  }
  bool kept() const { return kept_; }

  // The pairs of a part's keys: where they are kept, or decoded again.
  const bf16* values(int64_t part, const Tiles& tiles) const {
    const int64_t begin = slots_.begin(part), end = slots_.end(part);
    if (kept_) return memory_.pairs + begin / kStepKeys * pairs_stride(head_dim_);
    const KeyRows keys(p_, memory_.keys, end);
    for (int64_t i = 0; i < steps_of(part) * kTileRows; ++i) {
      const int64_t key = begin + 2 * i;
      for (int64_t j = key + kAhead; j < smaller(key + kAhead + 2, end); ++j) KeyRows::prefetch(keys, j);
      bf16* to = tiles.pairs + i / kTileRows * pairs_stride(head_dim_);
      for (int64_t d = 0; d < head_dim_; d += kSliceDims) {
        KeyRows::read<false>(keys, key, d, smaller(d + kSliceDims, head_dim_), tiles.rows, rows_stride(),
                             pair_row(to, d, i % kTileRows));
      }
    }
    return tiles.pairs;
  }
  // The scores of 32 keys whose rows are decoded in whole.
  void score_keys(int64_t slot, const bf16* rows) const { score_slice(rows, 0, head_dim_ / kStepDims, scores(slot)); }
  // Raises the maxima of their part by those scores.
  void raise_maxima(int64_t slot) const {
    const int64_t part = slots_.part_of(slot);
    const __m512 scale = _mm512_set1_ps(p_.scale);
    const uint32_t valid = memory_.valid[slot / kStepKeys];
    float* maxima = memory_.maxima + part * padded_heads();
    for (int64_t tile = 0; tile < head_tiles_; ++tile, maxima += kTileRows) {
      const __m512 before = slot == slots_.begin(part) ? _mm512_set1_ps(-__builtin_inff()) : _mm512_loadu_ps(maxima);
      _mm512_storeu_ps(maxima, largest(scores(slot) + tile * 2 * kTileSums, valid, scale, before));
    }
  }

  // out and lse of some heads, from a multiple of 16 on, from the sums in some places.
  void finish(int64_t first_head, int64_t end_head, int64_t places) const {
    for (int64_t tile = first_head / kTileRows; tile < tiles_of(end_head); ++tile) {
      alignas(64) float most[kTileRows], total[kTileRows], factor[kTileRows];
      if (slots_.parts > 0) divide(tile, most, total, factor);
      for (int64_t i = 0; i < smaller(kTileRows, end_head - tile * kTileRows); ++i) {
        bf16* out = p_.out.as<bf16>().at(row_, tile * kTileRows + i);
        float* lse = p_.lse.as<float>().at(row_, tile * kTileRows + i);
        if (slots_.parts == 0) {
          memset(out, 0, static_cast<size_t>(head_dim_) * sizeof(bf16));
          *lse = __builtin_inff();
          continue;
        }
        *lse = static_cast<float>(static_cast<double>(most[i]) + __builtin_log(static_cast<double>(total[i])));
        write(memory_.sums + (tile * head_dim_ + i) * kTileRows, places, _mm512_set1_ps(factor[i]), out);
        const int64_t width = 2 * p_.rope.size(1);
        if (p_.rope.given()) avx512::rotate_back(out + head_dim_ - width, p_.rope.as<const float>().at(row_), width);
      }
    }
  }

 private:
  int64_t padded_heads() const { return head_tiles_ * kTileRows; }
  float* scores(int64_t key) const { return memory_.scores + key * padded_heads(); }

  int64_t rows_stride() const { return row_stride(smaller(head_dim_, kSliceDims)); }
  int64_t steps_of(int64_t part) const { return (slots_.end(part) - slots_.begin(part) + kStepKeys - 1) / kStepKeys; }
  bf16* pairs_of(int64_t key) const {
    return kept_ ? memory_.pairs + key / kStepKeys * pairs_stride(head_dim_) : nullptr;
  }
  // Of pair `i` from dim `d` on.
  bf16* pair_row(bf16* pairs, int64_t d, int64_t i) const {
    return pairs == nullptr ? nullptr : pairs + 2 * d + i * pair_stride(head_dim_);
  }

  __m512 maxima(int64_t tile) const {
    __m512 most = _mm512_loadu_ps(memory_.maxima + tile * kTileRows);
    for (int64_t part = 1; part < slots_.parts; ++part) {
      most = _mm512_max_ps(most, _mm512_loadu_ps(memory_.maxima + (part * head_tiles_ + tile) * kTileRows));
    }
    return most;
  }

  // A tile of heads' maxima, totals, and reciprocals of the denominators.
  void divide(int64_t tile, float* most, float* total, float* factor) const {
    const __mmask16 given = avx512::low16(smaller(heads_ - tile * kTileRows, kTileRows));
    __m512 sum = _mm512_setzero_ps();
    for (int64_t part = 0; part < slots_.parts; ++part) {
      sum = _mm512_add_ps(sum, _mm512_loadu_ps(memory_.totals + (part * head_tiles_ + tile) * kTileRows));
    }
    const __m512 largest = maxima(tile),
                 sink = _mm512_maskz_loadu_ps(given, p_.sink.as<const float>().at(tile * kTileRows));
    const __m512 whole = _mm512_add_ps(sum, avx512::exp(_mm512_sub_ps(sink, largest)));
    _mm512_store_ps(most, largest);
    _mm512_store_ps(total, sum);
    _mm512_store_ps(factor, _mm512_div_ps(_mm512_set1_ps(1.f), whole));
  }

  // Numerators and totals of the keys of a part.
  void weigh_part(int64_t part, int64_t steps, bf16* numerators) const {
    const int64_t begin = slots_.begin(part), end = slots_.end(part);
    for (int64_t tile = 0; tile < head_tiles_; ++tile) {
      const __m512 none = _mm512_setzero_ps();
      Softmax s = {_mm512_set1_ps(p_.scale), maxima(tile), {none, none}};
      bf16* to = numerators + tile * steps * kTileElements;
      for (int64_t key = begin; key < end; key += kStepKeys, to += kTileElements) {
        const float* from = scores(key) + tile * 2 * kTileSums;
        const uint32_t valid = memory_.valid[key / kStepKeys];
        if (valid == ~0u) {
          weigh<true>(from, valid, s, to);
        } else {
          weigh<false>(from, valid, s, to);
        }
      }
      _mm512_storeu_ps(memory_.totals + (part * head_tiles_ + tile) * kTileRows,
                       _mm512_add_ps(s.totals[0], s.totals[1]));
    }
  }

  // The output of a head from its first two tiles of sums.
  void write(const float* sums, int64_t places, __m512 factor, bf16* out) const {
    const int64_t apart = padded_heads() * head_dim_;
    for (int64_t d = 0; d < head_dim_; d += kStepDims, sums += 2 * kTileSums) {
      __m512 a = _mm512_loadu_ps(sums), b = _mm512_loadu_ps(sums + kTileSums);
      for (int64_t place = 1; place < places; ++place) {
        a = _mm512_add_ps(a, _mm512_loadu_ps(sums + place * apart));
        b = _mm512_add_ps(b, _mm512_loadu_ps(sums + place * apart + kTileSums));
      }
      _mm512_storeu_si512(out + d, pack_sums(a, b, factor));
    }
  }

  // Adds a slice of dims from `d` on to the scores of 32 keys.
  void score_slice(const bf16* rows, int64_t d, int64_t steps, float* to) const {
    const int64_t stride = rows_stride();
    const Left left = {rows, stride, kTileRows * stride, kStepDims};
    const bf16* query = memory_.query + d * padded_heads();
    for (int64_t tile = 0; tile < head_tiles_; tile += 2, to += 4 * kTileSums, query += 2 * steps * kTileElements) {
      const Sums sums = {to, kTileSums, 2 * kTileSums};
      if (tile + 1 < head_tiles_) {
        multiply<true, true>(left, {query, kStepDims, kTileElements, 2 * kTileElements}, steps, d == 0, sums);
      } else {
        multiply<true, false>(left, {query, kStepDims, 0, kTileElements}, steps, d == 0, sums);
      }
    }
  }

  // sums (+)= numerators * values. The numerators of two tiles of heads stay in the first-level cache. What is added
  // goes through a block of its own, so that a part's sums do not depend on those before; it is added one block later,
  // since tiles that were just stored would have to be waited for.
  template <bool kAdds>
  void mix_steps(int64_t part, const bf16* pairs, float* sums, const Tiles& tiles) const {
    const bf16* numerators = tiles.numerators;
    const int64_t steps = steps_of(part);
    weigh_part(part, steps, tiles.numerators);
    configure();
    const int64_t below = kTileRows * head_dim_, second = steps * kTileElements;
    float *to = nullptr, *block = tiles.blocks[0];
    int64_t rows = 0;
    const auto add = [&](const float* from) {
      for (int64_t i = 0; i < rows; ++i) avx512::add_all(to + i * below, from + 2 * i * kTileSums, 2 * kTileSums);
    };
    for (int64_t tile = 0; tile < head_tiles_; tile += 2, numerators += 2 * second, sums += 2 * below) {
      const Left left = {numerators, kStepKeys, second, kTileElements};
      for (int64_t d = 0; d < head_dim_; d += kStepDims) {
        const Right right = {pairs + 2 * d, pair_stride(head_dim_), kStepDims, pairs_stride(head_dim_)};
        float* const place = sums + d * kTileRows;
        const Sums out = kAdds ? Sums{block, 2 * kTileSums, kTileSums} : Sums{place, below, kTileSums};
        if (tile + 1 < head_tiles_) {
          multiply<true, true>(left, right, steps, true, out);
        } else {
          multiply<false, true>(left, right, steps, true, out);
        }
        if (!kAdds) continue;
        block = block == tiles.blocks[0] ? tiles.blocks[1] : tiles.blocks[0];
        add(block);
        to = place, rows = smaller(2, head_tiles_ - tile);
      }
    }
    tile_release();
    if (kAdds) add(block == tiles.blocks[0] ? tiles.blocks[1] : tiles.blocks[0]);
  }

  const SparseAttentionParams& p_;
  int64_t row_, heads_, head_dim_, head_tiles_;
  Memory memory_;
  Slots slots_;
  bool kept_;
};

}  // namespace
}  // namespace dsv4::DSV4_AMX_NAMESPACE
