// sparse_attention by vectors, and what the AMX kernel shares with it: the plan of a row's parts, how a call is spread
// over threads, and the end of a row.
//
// A row lists its keys, then goes twice over them in tiles: scores, and after the maximum over all keys is known the
// numerators and their product with the values. Decoding a key again costs less than moving it decoded through memory.
// The keys are cut into parts of at most 512, by their number alone, and the sums of the parts are added in order.
// Few rows are cut by heads, whose work has nothing in common but the decoded keys, or, where there are more threads
// than that gives work to, by parts. Either gives the bits that one thread gives. Parts run in one parallel region: on
// two threads a row of 640 keys took 9 to 26 % longer in four.
#pragma once

#include <sched.h>

#include <optional>

#include "cpu/avx512/attention_tiles.h"
#include "cpu/work.h"

namespace dsv4::avx512 {
namespace {

inline constexpr int64_t kMostPartKeys = 512;
inline constexpr int64_t kFinishHeads = 16;  // heads that are finished together
inline constexpr int64_t kSpins = 4096;

struct Plan {
  int64_t keys, part_keys, parts;

  explicit Plan(int64_t count) : keys(count), part_keys(kGroup), parts(0) {
    if (count == 0) return;
    const int64_t wanted = (count + kMostPartKeys - 1) / kMostPartKeys;
    part_keys = round_up((count + wanted - 1) / wanted, kGroup);
    parts = (count + part_keys - 1) / part_keys;
  }
  // Floats from the scores of one head to the next within a part: not a power of two, as of a tile's groups.
  int64_t stride() const { return part_keys + 16; }
  int64_t begin(int64_t part) const { return part * part_keys; }
  int64_t end(int64_t part) const { return smaller(keys, (part + 1) * part_keys); }
};

// What one row's work leaves between its steps.
template <class X>
struct RowMemory {
  Key* keys;  // [most keys]
  KeyCounts* count;
  X* query;       // [H, D], where it is not used as it lies
  float* scores;  // [parts, H, stride]; then the numerators, elements of type X from the begin of each head
  float* maxima;  // [parts, H]
  float* totals;  // [parts, H]
  float* sums;    // [parts kept, H, D]

  static int64_t bytes(const SparseAttentionParams& p, int64_t most, int64_t sums_kept) {
    Arena arena{nullptr};
    RowMemory(p, most, sums_kept, arena);
    return arena.used;
  }

  RowMemory(const SparseAttentionParams& p, int64_t most, int64_t sums_kept, Arena& arena) {
    const int64_t heads = p.query.size(1), head_dim = p.query.size(2), parts = Plan(most).parts;
    // No smaller number of keys needs more.
    keys = arena.take<Key>(most);
    count = arena.take<KeyCounts>(1);
    query = arena.take<X>(p.query.dtype == DType::kBFloat16 && sizeof(X) == 4 ? heads * head_dim : 0);
    scores = arena.take<float>(parts * heads * Plan(most).stride());
    maxima = arena.take<float>(parts * heads);
    totals = arena.take<float>(parts * heads);
    sums = arena.take<float>(sums_kept * heads * head_dim);
  }
};

// Scales the scores of a part; those after its last key are none. Returns the largest.
DSV4_INLINE float settle_scores(float* scores, int64_t keys, float scale) {
  const __m512 factor = _mm512_set1_ps(scale), none = _mm512_set1_ps(-__builtin_inff());
  __m512 most = none;
  for (int64_t key = 0; key < keys; key += 16) {
    const __mmask16 valid = low16(smaller(keys - key, 16));
    const __m512 score = _mm512_mask_mul_ps(none, valid, _mm512_loadu_ps(scores + key), factor);
    _mm512_storeu_ps(scores + key, score);
    most = _mm512_max_ps(most, score);
  }
  for (int64_t key = round_up(keys, 16); key < round_up(keys, kGroup); key += 16) _mm512_storeu_ps(scores + key, none);
  return _mm512_reduce_max_ps(most);
}

DSV4_INLINE void put_numerators(Pair x, bf16* to) {
  _mm512_storeu_si512(to, reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(x.b, x.a)));
}
DSV4_INLINE void put_numerators(Pair x, float* to) { store(to, x); }

// Numerators over `keys` scores, in place, rounded to X and stored as M, and the sum of those not rounded. What is
// below e^-104 is 0.
template <class X, class M>
static float weigh(float* scores, int64_t keys, float maximum) {
  const __m512 most = _mm512_set1_ps(maximum), least = _mm512_set1_ps(-104.f);
  __m512 totals[2] = {_mm512_setzero_ps(), _mm512_setzero_ps()};
  M* to = reinterpret_cast<M*>(scores);
  for (int64_t key = 0; key < keys; key += kGroup) {
    const __m512 a = _mm512_sub_ps(_mm512_loadu_ps(scores + key), most);
    const __m512 b = _mm512_sub_ps(_mm512_loadu_ps(scores + key + 16), most);
    const Pair numerators = {_mm512_maskz_mov_ps(_mm512_cmp_ps_mask(a, least, _CMP_NLT_UQ), exp(a)),
                             _mm512_maskz_mov_ps(_mm512_cmp_ps_mask(b, least, _CMP_NLT_UQ), exp(b))};
    totals[0] = _mm512_add_ps(totals[0], numerators.a);
    totals[1] = _mm512_add_ps(totals[1], numerators.b);
    put_numerators(sizeof(X) == sizeof(M) ? numerators : rounded(numerators, static_cast<const X*>(nullptr)), to + key);
  }
  return _mm512_reduce_add_ps(_mm512_add_ps(totals[0], totals[1]));
}

// Undoes the rotation of pairs at the end of a head.
template <class X>
DSV4_INLINE void rotate_back(X* x, const float* rope, int64_t width) {
  const bf16* kPairs = nullptr;  // even and odd elements apart
  for (int64_t d = 0; d < width; d += kStep) {
    const int64_t count = smaller(width - d, kStep);
    const Pair turn = arrange(load(rope + d, count), kPairs);
    Pair value = load(x + d, count);
    if constexpr (sizeof(X) == 4) value = arrange(value, kPairs);
    Pair turned = {_mm512_fmadd_ps(value.b, turn.b, _mm512_mul_ps(value.a, turn.a)),
                   _mm512_fmsub_ps(value.b, turn.a, _mm512_mul_ps(value.a, turn.b))};
    if constexpr (sizeof(X) == 4) turned = natural(turned, kPairs);
    store(x + d, turned, count);
  }
}

DSV4_INLINE void add_all(float* to, const float* more, int64_t count) {
  for (int64_t i = 0; i < count; i += 16) {
    _mm512_storeu_ps(to + i, _mm512_add_ps(_mm512_loadu_ps(to + i), _mm512_loadu_ps(more + i)));
  }
}

// One row of queries with elements of type X, multiplied as elements of type M.
template <class Product, class X, class M>
class RowWork {
 public:
  using Memory = RowMemory<M>;
  using Tiles = TileMemory<M>;

  // Rows whose keys are compared, so that what neighbours have in common is decoded once. Of many heads decoding is a
  // small part of the work, and scores of many rows would leave the second-level cache.
  static constexpr int64_t kMostTogether = 8;
  static int64_t together(const SparseAttentionParams& p, int64_t slots) {
    const int64_t most = p.query.size(1) <= 16 ? kMostTogether : p.indices.given() ? 1 : 4;
    return smaller(most, p.query.size(0) / (4 * slots));
  }

  static int64_t row_bytes(const SparseAttentionParams& p, int64_t most, int64_t sums_kept) {
    return Memory::bytes(p, most, sums_kept);
  }
  static Memory row_memory(const SparseAttentionParams& p, int64_t most, int64_t sums_kept, uint8_t* memory) {
    Arena arena{memory};
    return Memory(p, most, sums_kept, arena);
  }
  static int64_t most_keys(const SparseAttentionParams& p) { return most_keys_of_any_row(p); }
  static int64_t most_parts(const SparseAttentionParams&, int64_t most) { return Plan(most).parts; }
  static int64_t least_heads(const SparseAttentionParams&) { return Product::kLeastHeads; }
  static int64_t tile_bytes(const SparseAttentionParams& p) { return Tiles::bytes(p.query.size(2)); }
  static Tiles tile_memory(const SparseAttentionParams& p, uint8_t* memory) { return Tiles(memory, p.query.size(2)); }

  RowWork(const SparseAttentionParams& p, int64_t row, const RowMemory<M>& memory)
      : p_(p),
        row_(row),
        heads_(p.query.size(1)),
        head_dim_(p.query.size(2)),
        memory_(memory),
        plan_(memory.count->all),
        stride_(plan_.stride()),
        reader_(p, memory.keys, *memory.count) {
    if constexpr (sizeof(X) == sizeof(M)) {
      query_ = reinterpret_cast<const M*>(p.query.as<const X>().at(row));
      query_stride_ = p.query.stride[1];
    } else {
      query_ = memory.query;
      query_stride_ = head_dim_;
    }
  }

  // The part of a row's work that is done once, before any part.
  static void prepare(const SparseAttentionParams& p, int64_t row, const RowMemory<M>& memory) {
    if constexpr (sizeof(X) != sizeof(M)) {
      const int64_t head_dim = p.query.size(2);
      for (int64_t h = 0; h < p.query.size(1); ++h) {
        widen(p.query.as<const X>().at(row, h), head_dim, memory.query + h * head_dim);
      }
    }
    // A window's key has one place for as long as it stays: that of its position's remainder. So the next row has
    // another key in one place alone.
    const int64_t position = *p.position.as<const int32_t>().at(row), window = larger(p.window, 1);
    *memory.count = list_keys(p, row, memory.keys, position < 0 ? 0 : position / window * window);
  }

  template <class MemoryOf>
  static void run_rows(const SparseAttentionParams& p, int64_t first, int64_t end, const MemoryOf& memory,
                       const Tiles& tiles) {
    const auto sequence = p.sequence.as<const int32_t>();
    for (int64_t row = first, next; row < end; row = next) {
      for (next = row + 1; next < end && *sequence.at(next) == *sequence.at(row);) ++next;
      run_together(p, row, next - row, memory, tiles);
    }
  }

  // Every group of keys for all rows, then every slice of values.
  template <class MemoryOf>
  static void run_together(const SparseAttentionParams& p, int64_t first, int64_t count, const MemoryOf& memory,
                           const Tiles& tiles) {
    std::optional<RowWork> works[kMostTogether];
    int64_t groups = 0, parts = 0;
    for (int64_t i = 0; i < count; ++i) {
      prepare(p, first + i, memory(i));
      works[i].emplace(p, first + i, memory(i));
      groups = larger(groups, works[i]->groups()), parts = larger(parts, works[i]->parts());
    }
    Held held{count > 1 ? tiles.held : nullptr};
    works[0]->ask_for(0, tiles);
    for (int64_t group = 0; group < groups; ++group) {
      for (int64_t i = 0; i < count; ++i) {
        if (group >= works[i]->groups()) continue;
        const bool last = i + 1 == count;
        works[i]->score_group(group, tiles, held, *works[last ? 0 : i + 1], last ? group + 1 : group);
        held.known = held.keys != nullptr;
      }
    }
    for (int64_t i = 0; i < count; ++i) {
      for (int64_t part = 0; part < works[i]->parts(); ++part) works[i]->settle(part);
    }
    for (int64_t part = 0; part < parts; ++part) {
      for (int64_t i = 0; i < count; ++i) {
        if (part < works[i]->parts()) works[i]->weigh_part(part);
      }
      for (int64_t d = 0; d < p.query.size(2); d += kSliceDims) {
        for (int64_t i = 0, keys = 0; i < count; ++i) {
          if (part >= works[i]->parts()) continue;
          held.known &= keys == works[i]->part_keys(part);  // or the tile has other dims, or another form
          keys = works[i]->part_keys(part);
          part == 0 ? works[i]->template mix_slice<false>(part, d, tiles, held)
                    : works[i]->template mix_slice<true>(part, d, tiles, held);
          held.known = held.keys != nullptr;
        }
      }
    }
    for (int64_t i = 0; i < count; ++i) works[i]->finish(0, p.query.size(1), smaller(works[i]->parts(), 1));
  }

  int64_t parts() const { return plan_.parts; }
  int64_t groups() const { return (plan_.keys + kGroup - 1) / kGroup; }
  // Of a part, with those that fill its last group.
  int64_t part_keys(int64_t part) const { return round_up(plan_.end(part) - plan_.begin(part), kGroup); }

  void score(int64_t part, const TileMemory<M>& tiles) const {
    const int64_t first = plan_.begin(part) / kGroup, end = first + part_keys(part) / kGroup;
    ask_for(first, tiles);
    for (int64_t group = first; group < end; ++group) {
      score_group(group, tiles, Held(), *this, group + 1 < end ? group + 1 : groups());
    }
    settle(part);
  }

  // After all parts have their scores. This part's sums go to place `place`.
  void mix(int64_t part, int64_t place, const TileMemory<M>& tiles) const {
    weigh_part(part);
    Product::template mix<M, false>(part_weights(part), stride_ * kWordElements<M>, heads_, reader_, plan_.begin(part),
                                    plan_.end(part), head_dim_, memory_.sums + place * heads_ * head_dim_, tiles);
  }

  // Adds some heads' sums in a place to those in the first.
  void add(int64_t place, int64_t first_head, int64_t end_head) const {
    add_all(memory_.sums + first_head * head_dim_, memory_.sums + (place * heads_ + first_head) * head_dim_,
            (end_head - first_head) * head_dim_);
  }

  // out and lse of some heads from the sums in some places.
  void finish(int64_t first_head, int64_t end_head, int64_t places) const {
    for (int64_t place = 1; place < places; ++place) add(place, first_head, end_head);
    const float* sums = memory_.sums;
    for (int64_t h = first_head; h < end_head; ++h) {
      X* out = p_.out.as<X>().at(row_, h);
      float* lse = p_.lse.as<float>().at(row_, h);
      if (plan_.parts == 0) {
        memset(out, 0, static_cast<size_t>(head_dim_) * sizeof(X));
        *lse = __builtin_inff();
        continue;
      }
      float total = 0, most = maximum(h);
      for (int64_t part = 0; part < plan_.parts; ++part) total += memory_.totals[part * heads_ + h];
      *lse = static_cast<float>(static_cast<double>(most) + __builtin_log(static_cast<double>(total)));
      const float sink = _mm512_cvtss_f32(exp(_mm512_set1_ps(*p_.sink.as<const float>().at(h) - most)));
      const __m512 factor = _mm512_set1_ps(1.f / (total + sink));
      for (int64_t d = 0; d < head_dim_; d += kGroup) {
        const Pair x = scaled(value_order(sums + h * head_dim_ + d, static_cast<const M*>(nullptr)), factor);
        store(out + d, arrange(x, static_cast<const X*>(nullptr)));
      }
      const int64_t width = 2 * p_.rope.size(1);
      if (p_.rope.given()) rotate_back(out + head_dim_ - width, p_.rope.as<const float>().at(row_), width);
    }
  }

 private:
  float* part_scores(int64_t part) const { return memory_.scores + part * heads_ * stride_; }
  const M* part_weights(int64_t part) const { return reinterpret_cast<const M*>(part_scores(part)); }

  // At once.
  void ask_for(int64_t group, const TileMemory<M>& tiles) const {
    const int64_t begin = group * kGroup;
    Lookahead ahead = Lookahead::at(reader_, begin, smaller(plan_.keys, begin + kGroup), 1, tiles);
    Lookahead::step(ahead);
  }

  // The scores of 32 keys, while those of the group that comes next are asked for, of this row or another.
  void score_group(int64_t group, const TileMemory<M>& tiles, const Held& held, const RowWork& next,
                   int64_t next_group) const {
    const int64_t begin = group * kGroup, part = begin / plan_.part_keys;
    tile_for_scores(reader_, begin, smaller(plan_.keys, begin + kGroup), head_dim_, tiles, held);
    const int64_t ahead = next_group * kGroup;
    const Held there{held.keys, held.keys != nullptr && next_group == group};
    Product::template score<M>(query_, query_stride_, heads_, head_dim_,
                               part_scores(part) + (begin - plan_.begin(part)), stride_, tiles,
                               Lookahead::at(next.reader_, ahead, smaller(next.plan_.keys, ahead + kGroup),
                                             Product::template lookahead_steps<M>(heads_, head_dim_), tiles, there));
  }

  // After the scores of a part: scaled, and the largest of each head.
  void settle(int64_t part) const {
    float *maxima = memory_.maxima + part * heads_, *scores = part_scores(part);
    for (int64_t h = 0; h < heads_; ++h) {
      maxima[h] = settle_scores(scores + h * stride_, plan_.end(part) - plan_.begin(part), p_.scale);
    }
  }

  // After all parts are settled: scores become numerators.
  void weigh_part(int64_t part) const {
    for (int64_t h = 0; h < heads_; ++h) {
      float* scores = part_scores(part) + h * stride_;
      memory_.totals[part * heads_ + h] = weigh<X, M>(scores, part_keys(part), maximum(h));
    }
  }

  // kAdds: to the sums that are there.
  template <bool kAdds>
  void mix_slice(int64_t part, int64_t d, const TileMemory<M>& tiles, const Held& held) const {
    Product::template mix_slice<M, kAdds>(part_weights(part), stride_ * kWordElements<M>, heads_, reader_,
                                          plan_.begin(part), plan_.end(part), d, head_dim_, !kAdds, memory_.sums, tiles,
                                          held);
  }

  float maximum(int64_t head) const {
    float most = memory_.maxima[head];
    for (int64_t part = 1; part < plan_.parts; ++part) {
      const float other = memory_.maxima[part * heads_ + head];
      most = other > most ? other : most;
    }
    return most;
  }

  const SparseAttentionParams& p_;
  int64_t row_, heads_, head_dim_;
  RowMemory<M> memory_;
  Plan plan_;
  int64_t stride_;
  KeyReader<M> reader_;
  const M* query_;
  int64_t query_stride_;
};

// How a call is spread over threads; results do not depend on it. A piece of work is some heads of a row, a part of all
// its heads, or `together` rows.
struct Schedule {
  // Decoding a key takes as long as multiplying it by so many heads; handing the sums of a part to another thread, as a
  // part of so many keys more.
  static constexpr int64_t kDecodeHeads = 10, kHandedKeys = 80;

  int64_t most, parts, slots;  // keys and parts of a row, at most; pieces of work at a time
  int64_t block, blocks;       // heads of a piece; pieces of a row
  bool by_parts;
  int64_t together = 1;

  Schedule(int64_t rows, int64_t heads, int64_t least_heads, int64_t most_keys, int64_t most_parts,
           const Context& context)
      : most(most_keys), parts(larger(most_parts, 1)), slots(larger(context.threads, 1)), block(heads), blocks(1) {
    int64_t least = pieces_each(rows) * most * (heads + kDecodeHeads);
    for (int64_t some = least_heads; some < heads; some += least_heads) {
      const int64_t pieces = (heads + some - 1) / some;
      const int64_t time = pieces_each(rows * pieces) * most * (some + kDecodeHeads);
      if (time < least) least = time, block = some, blocks = pieces;
    }
    by_parts =
        rows < 4 * slots && pieces_each(rows * parts) * (most / parts + kHandedKeys) * (heads + kDecodeHeads) < least;
    if (by_parts) {
      block = heads, blocks = 1;
      return;
    }
    slots = smaller(slots, rows * blocks);
  }
  int64_t row_memories(int64_t rows) const { return by_parts ? rows : slots * together; }
  int64_t sums_kept() const { return by_parts ? parts : 1; }

 private:
  // Of so many pieces, at most how many a thread takes.
  int64_t pieces_each(int64_t pieces) const { return (pieces + slots - 1) / slots; }
};

// The same call for heads [begin, begin + count).
DSV4_INLINE SparseAttentionParams some_heads(SparseAttentionParams p, int64_t begin, int64_t count) {
  p.query = p.query.part(1, begin, count), p.out = p.out.part(1, begin, count);
  p.sink = p.sink.part(0, begin, count), p.lse = p.lse.part(1, begin, count);
  return p;
}

// A call whose rows are the work of `Work`, in its memory of a row and of a thread; together() rows are handed to its
// run_rows at once, which may share what they have in common.
template <class Work>
class Call {
 public:
  Call(const SparseAttentionParams& p, const Context& context)
      : p_(p),
        context_(context),
        schedule_(scheduled(p, context)),
        row_bytes_(Work::row_bytes(heads(0), schedule_.most, schedule_.sums_kept())),
        tile_bytes_(round_up(Work::tile_bytes(p), 64)) {}

  int64_t bytes() const {
    const int64_t rows = p_.query.size(0), counts = schedule_.by_parts ? kStages * rows : 0;
    return schedule_.row_memories(rows) * row_bytes_ + schedule_.slots * tile_bytes_ +
           counts * static_cast<int64_t>(sizeof(int64_t));
  }

  void run() const {
    if (schedule_.by_parts) {
      run_parts();
    } else {
      run_rows();
    }
  }

 private:
  static Schedule scheduled(const SparseAttentionParams& p, const Context& context) {
    Schedule s(p.query.size(0), p.query.size(1), Work::least_heads(p), Work::most_keys(p),
               Work::most_parts(p, Work::most_keys(p)), context);
    if (!s.by_parts && s.blocks == 1) s.together = larger(1, Work::together(p, larger(s.slots, 1)));
    return s;
  }

  uint8_t* base() const { return static_cast<uint8_t*>(p_.workspace.data); }
  // Heads of a block.
  SparseAttentionParams heads(int64_t block) const {
    const int64_t first = block * schedule_.block;
    return some_heads(p_, first, smaller(schedule_.block, p_.query.size(1) - first));
  }
  typename Work::Memory row_memory(int64_t index, const SparseAttentionParams& p) const {
    return Work::row_memory(p, schedule_.most, schedule_.sums_kept(),
                            base() + schedule_.slots * tile_bytes_ + index * row_bytes_);
  }
  typename Work::Tiles tile_memory(int64_t slot) const { return Work::tile_memory(p_, base() + slot * tile_bytes_); }

  void run_rows() const {
    const int64_t rows = p_.query.size(0), together = schedule_.together, blocks = schedule_.blocks;
    spread(context_, schedule_.slots, (rows + together - 1) / together * blocks, [&](int64_t slot, int64_t item) {
      const int64_t first = item / blocks * together;
      const SparseAttentionParams p = heads(item % blocks);
      const auto memory = [&](int64_t i) { return row_memory(slot * together + i, p); };
      Work::run_rows(p, first, smaller(rows, first + together), memory, tile_memory(slot));
    });
  }

  // One parallel region: starting one takes as long as a part. The items of a stage wait for those of the stage before
  // it of their row. They are taken in order, so what is waited for is being run.
  void run_parts() const {
    const int64_t rows = p_.query.size(0), heads = p_.query.size(1), parts = schedule_.parts,
                  blocks = (heads + kFinishHeads - 1) / kFinishHeads;
    const int64_t scores = rows, mixes = scores + rows * parts, ends = mixes + rows * parts;
    for (int64_t i = 0; i < kStages * rows; ++i) done()[i] = 0;
    spread(context_, schedule_.slots, ends + rows * blocks, [&](int64_t slot, int64_t item) {
      const int64_t stage = item < scores ? 0 : item < mixes ? 1 : item < ends ? 2 : 3;
      const int64_t of_row = stage == 0 ? 1 : stage == 3 ? blocks : parts;
      const int64_t at = item - (stage == 0 ? 0 : stage == 1 ? scores : stage == 2 ? mixes : ends);
      const int64_t row = at / of_row, piece = at % of_row;
      if (stage > 0) wait(stage - 1, row, stage == 1 ? 1 : parts);
      if (stage == 0) {
        Work::prepare(p_, row, row_memory(row, p_));
      } else {
        const Work work(p_, row, row_memory(row, p_));
        if (stage == 1 && piece < work.parts()) work.score(piece, tile_memory(slot));
        if (stage == 2 && piece < work.parts()) work.mix(piece, piece, tile_memory(slot));
        if (stage == 3) {
          work.finish(piece * kFinishHeads, smaller(heads, (piece + 1) * kFinishHeads), work.parts());
        }
      }
      if (stage < kStages) __atomic_fetch_add(done() + stage * rows + row, 1, __ATOMIC_RELEASE);
    });
  }

  static constexpr int64_t kStages = 3;  // that are waited for

  // [stage, row]: how many pieces are done.
  int64_t* done() const {
    return reinterpret_cast<int64_t*>(base() + schedule_.slots * tile_bytes_ + p_.query.size(0) * row_bytes_);
  }
  void wait(int64_t stage, int64_t row, int64_t pieces) const {
    const int64_t* at = done() + stage * p_.query.size(0) + row;
    for (int64_t i = 0; __atomic_load_n(at, __ATOMIC_ACQUIRE) < pieces; ++i) {
      if (i < kSpins) {
        _mm_pause();
      } else {
        sched_yield();  // there may be fewer processors than threads
      }
    }
  }

  const SparseAttentionParams& p_;
  const Context& context_;
  Schedule schedule_;
  int64_t row_bytes_, tile_bytes_;
};

}  // namespace
}  // namespace dsv4::avx512
