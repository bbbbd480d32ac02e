// sparse_attention by AMX tiles, bfloat16. Scores: 32 keys, as they are decoded, are the left operand, the queries the
// right one. Values: numerators, transposed, are the left operand, pairs of keys the right one. H D / 256 tile cycles a
// key.
#include "cpu/attention.h"

#include "cpu/amx/attention_tiles.h"

namespace dsv4::DSV4_AMX_NAMESPACE {
namespace {

using avx512::Plan;

// Tiles 0 to 3: sums, of the first left operand with both right ones, then of the second; 4, 5: left; 6, 7: right.
DSV4_INLINE void configure() {
  TileConfig config;
  for (int tile = 0; tile < kTiles; ++tile) config.set(tile, kTileRows, kTileBytes);
  tile_configure(config);
}

// Strides in elements.
struct Left {
  const bf16* data;
  int64_t row, second, step;
};
struct Right {
  const bf16* data;
  int64_t second, step;
};

// Adds `steps` products to the tiles of sums, with a piece of other work beside each.
template <bool kTwoLeft, bool kTwoRight, class Beside>
DSV4_INLINE void multiply(Left left, Right right, int64_t steps, const Beside& beside) {
  const int64_t stride = left.row * 2;
  for (int64_t step = 0; step < steps; ++step) {
    tile_load<4>(left.data, stride);
    tile_load<6>(right.data, kTileBytes);
    tile_dot<0, 4, 6>();
    if (kTwoRight) {
      tile_load<7>(right.data + right.second, kTileBytes);
      tile_dot<1, 4, 7>();
    }
    if (kTwoLeft) {
      tile_load<5>(left.data + left.second, stride);
      tile_dot<2, 5, 6>();
      if (kTwoRight) tile_dot<3, 5, 7>();
    }
    left.data += left.step;
    right.data += right.step;
    beside();
  }
}

// Pieces of work to be done during a number of steps, as evenly as they go.
struct Pace {
  int64_t pieces, steps, due = 0, done = 0;

  template <class Piece>
  DSV4_INLINE void go(Pace& pace, const Piece& piece) {
    for (pace.due += pace.pieces; pace.due >= pace.steps; pace.due -= pace.steps) piece(pace.done++);
  }
};

constexpr int64_t kKeptBytes = 1 << 20;  // of decoded keys, of 2 MiB of second-level cache

// What one row's work leaves between its steps. Heads are padded to whole tiles.
struct RowMemory {
  Key* keys;  // [most keys]
  KeyCounts* count;
  bf16* query;    // pack_query's
  bf16* pairs;    // [keys kept / 32], pairs_stride apart
  float* scores;  // [keys / 32][tile of heads][32 keys][16 heads]
  float* maxima;  // [parts, H]
  float* totals;  // [parts, H]
  float* sums;    // [parts kept][tile of heads][tile of dims][16 heads][16 dims]
  int64_t most_kept;

  static int64_t bytes(const SparseAttentionParams& p, int64_t most, int64_t sums_kept) {
    Arena arena{nullptr};
    RowMemory(p, most, sums_kept, arena);
    return arena.used;
  }

  RowMemory(const SparseAttentionParams& p, int64_t most, int64_t sums_kept, Arena& arena)
      : most_kept(kKeptBytes / (p.query.size(2) * 2)) {
    const int64_t heads = tiles_of(p.query.size(1)) * kTileRows, head_dim = p.query.size(2);
    const int64_t parts = Plan(most).parts, padded = round_up(most, kStepKeys);
    keys = arena.take<Key>(most);
    count = arena.take<KeyCounts>(1);
    query = arena.take<bf16>(heads * head_dim);
    pairs = arena.take<bf16>(most <= most_kept ? padded / kStepKeys * pairs_stride(head_dim) : 0);
    scores = arena.take<float>(padded * heads);
    maxima = arena.take<float>(parts * heads);
    totals = arena.take<float>(parts * heads);
    sums = arena.take<float>(sums_kept * heads * head_dim);
  }
};

// A thread's memory.
struct Tiles {
  bf16* rows[2];     // [32, row_stride], of the step at hand and of the next
  bf16* pairs;       // [most keys of a part / 32], pairs_stride apart, where the row does not keep them
  bf16* numerators;  // [keys of a part / 32][tile of heads][16 heads][32 keys]

  static int64_t bytes(const SparseAttentionParams& p, int64_t most) {
    Arena arena{nullptr};
    Tiles(p, most, arena);
    return arena.used;
  }

  Tiles(const SparseAttentionParams& p, int64_t most, Arena& arena) {
    const int64_t heads = tiles_of(p.query.size(1)) * kTileRows, head_dim = p.query.size(2);
    const int64_t keys = smaller(round_up(most, kStepKeys), avx512::kMostPartKeys);
    for (bf16*& step : rows) step = arena.take<bf16>(kStepKeys * row_stride(head_dim));
    pairs = arena.take<bf16>(keys / kStepKeys * pairs_stride(head_dim));
    numerators = arena.take<bf16>(keys * heads);
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
  static int64_t tile_bytes(const SparseAttentionParams& p, int64_t most) { return Tiles::bytes(p, most); }
  static Tiles tile_memory(const SparseAttentionParams& p, int64_t most, uint8_t* memory) {
    Arena arena{memory};
    return Tiles(p, most, arena);
  }

  RowWork(const SparseAttentionParams& p, const E4m3Table& table, int64_t row, const Memory& memory)
      : p_(p),
        row_(row),
        heads_(p.query.size(1)),
        head_dim_(p.query.size(2)),
        head_tiles_(tiles_of(heads_)),
        memory_(memory),
        plan_(memory.count->all),
        kept_(plan_.keys <= memory.most_kept),
        reader_(p, table, memory.keys, *memory.count, nullptr) {}

  // The part of a row's work that is done once, before any part.
  static void prepare(const SparseAttentionParams& p, int64_t row, const Memory& memory) {
    *memory.count = list_keys(p, row, memory.keys);
    pack_query(p, row, memory.query);
  }

  int64_t parts() const { return plan_.parts; }

  void score(int64_t part, const Tiles& tiles) const {
    const int64_t begin = plan_.begin(part), end = plan_.end(part);
    configure();
    KeyLoad load = this->load(end);
    const auto select = [&](int64_t key) {
      load.rows = tiles.rows[key / kStepKeys % 2];
      load.pairs = kept_ ? memory_.pairs + key / kStepKeys * pairs_stride(head_dim_) : nullptr;
    };
    select(begin);
    for (int64_t i = 0; i < kStepKeys; ++i) KeyLoad::load(load, begin + i, i);
    for (int64_t key = begin; key < end; key += kStepKeys) {
      const bf16* rows = load.rows;
      const int64_t next = key + kStepKeys;
      select(next);
      Pace pace{next < end ? kStepKeys : 0, (head_tiles_ + 1) / 2 * (head_dim_ / kStepDims)};
      const auto beside = [&] { Pace::go(pace, [&](int64_t i) { KeyLoad::load(load, next + i, i); }); };
      score_step(rows, scores(key), beside);
    }
    tile_release();
    for (int64_t tile = 0; tile < head_tiles_; ++tile) {
      __m512 most = _mm512_set1_ps(-__builtin_inff());
      for (int64_t key = begin; key < end; key += kStepKeys) {
        most =
            largest(scores(key) + tile * 2 * kTileSums, smaller(end - key, kStepKeys), _mm512_set1_ps(p_.scale), most);
      }
      _mm512_storeu_ps(memory_.maxima + (part * head_tiles_ + tile) * kTileRows, most);
    }
  }

  // After all parts have their scores. This part's sums go to place `place`.
  void mix(int64_t part, int64_t place, const Tiles& tiles) const {
    const int64_t begin = plan_.begin(part), end = plan_.end(part), steps = (end - begin + kStepKeys - 1) / kStepKeys;
    for (int64_t tile = 0; tile < head_tiles_; ++tile) {
      const __m512 none = _mm512_setzero_ps();
      Softmax s = {_mm512_set1_ps(p_.scale), maxima(tile), {none, none}};
      for (int64_t step = 0; step < steps; ++step) {
        const int64_t key = begin + step * kStepKeys;
        const float* from = scores(key) + tile * 2 * kTileSums;
        bf16* to = tiles.numerators + (step * head_tiles_ + tile) * kTileElements;
        if (end - key >= kStepKeys) {
          weigh<true>(from, kStepKeys, s, to);
        } else {
          weigh<false>(from, end - key, s, to);
        }
      }
      _mm512_storeu_ps(memory_.totals + (part * head_tiles_ + tile) * kTileRows,
                       _mm512_add_ps(s.totals[0], s.totals[1]));
    }
    const bf16* pairs = memory_.pairs + begin / kStepKeys * pairs_stride(head_dim_);
    if (!kept_) {
      KeyLoad load = this->load(end);
      load.rows = tiles.rows[0];
      for (int64_t key = begin; key < begin + steps * kStepKeys; ++key) {
        load.pairs = tiles.pairs + (key - begin) / kStepKeys * pairs_stride(head_dim_);
        KeyLoad::load(load, key, key % kStepKeys);
      }
      pairs = tiles.pairs;
    }
    configure();
    mix_steps(tiles.numerators, pairs, steps, memory_.sums + place * padded_heads() * head_dim_);
    tile_release();
  }

  // Adds some heads' sums in a place to those in the first.
  void add(int64_t place, int64_t first_head, int64_t end_head) const {
    const int64_t count = round_up(end_head - first_head, kTileRows) * head_dim_;
    float* to = memory_.sums + first_head * head_dim_;
    avx512::add_all(to, to + place * padded_heads() * head_dim_, count);
  }

  // out and lse of some heads, from a multiple of 16 on, from the sums of the whole row, in the first place.
  void finish(int64_t first_head, int64_t end_head) const {
    for (int64_t tile = first_head / kTileRows; tile < tiles_of(end_head); ++tile) {
      alignas(64) float most[kTileRows], total[kTileRows], factor[kTileRows];
      if (plan_.parts > 0) divide(tile, most, total, factor);
      for (int64_t i = 0; i < smaller(kTileRows, end_head - tile * kTileRows); ++i) {
        bf16* out = p_.out.as<bf16>().at(row_, tile * kTileRows + i);
        float* lse = p_.lse.as<float>().at(row_, tile * kTileRows + i);
        if (plan_.parts == 0) {
          memset(out, 0, static_cast<size_t>(head_dim_) * sizeof(bf16));
          *lse = __builtin_inff();
          continue;
        }
        *lse = static_cast<float>(static_cast<double>(most[i]) + __builtin_log(static_cast<double>(total[i])));
        const float* sums = memory_.sums + (tile * head_dim_ + i) * kTileRows;
        for (int64_t d = 0; d < head_dim_; d += kStepDims, sums += 2 * kTileSums) {
          _mm512_storeu_si512(out + d, pack_sums(sums, _mm512_set1_ps(factor[i])));
        }
        const int64_t width = 2 * p_.rope.size(1);
        if (p_.rope.given()) avx512::rotate_back(out + head_dim_ - width, p_.rope.as<const float>().at(row_), width);
      }
    }
  }

 private:
  int64_t padded_heads() const { return head_tiles_ * kTileRows; }
  float* scores(int64_t key) const { return memory_.scores + key * padded_heads(); }
  KeyLoad load(int64_t end) const { return {reader_, head_dim_, end, plan_.keys, nullptr, nullptr}; }

  __m512 maxima(int64_t tile) const {
    __m512 most = _mm512_loadu_ps(memory_.maxima + tile * kTileRows);
    for (int64_t part = 1; part < plan_.parts; ++part) {
      most = _mm512_max_ps(most, _mm512_loadu_ps(memory_.maxima + (part * head_tiles_ + tile) * kTileRows));
    }
    return most;
  }

  // A tile of heads' maxima, totals, and reciprocals of the denominators.
  void divide(int64_t tile, float* most, float* total, float* factor) const {
    const __mmask16 given = avx512::low16(smaller(heads_ - tile * kTileRows, kTileRows));
    __m512 sum = _mm512_setzero_ps();
    for (int64_t part = 0; part < plan_.parts; ++part) {
      sum = _mm512_add_ps(sum, _mm512_loadu_ps(memory_.totals + (part * head_tiles_ + tile) * kTileRows));
    }
    const __m512 largest = maxima(tile),
                 sink = _mm512_maskz_loadu_ps(given, p_.sink.as<const float>().at(tile * kTileRows));
    const __m512 whole = _mm512_add_ps(sum, avx512::exp(_mm512_sub_ps(sink, largest)));
    _mm512_store_ps(most, largest);
    _mm512_store_ps(total, sum);
    _mm512_store_ps(factor, _mm512_div_ps(_mm512_set1_ps(1.f), whole));
  }

  template <class Beside>
  void score_step(const bf16* rows, float* to, const Beside& beside) const {
    const int64_t steps = head_dim_ / kStepDims, stride = row_stride(head_dim_);
    const Left left = {rows, stride, kTileRows * stride, kStepDims};
    const bf16* query = memory_.query;
    for (int64_t tile = 0; tile < head_tiles_; tile += 2, query += 2 * kTileRows * head_dim_, to += 4 * kTileSums) {
      tile_zero<0>();
      tile_zero<2>();
      if (tile + 1 < head_tiles_) {
        tile_zero<1>();
        tile_zero<3>();
        multiply<true, true>(left, {query, kTileElements, 2 * kTileElements}, steps, beside);
        tile_store<1>(to + 2 * kTileSums, kTileBytes);
        tile_store<3>(to + 3 * kTileSums, kTileBytes);
      } else {
        multiply<true, false>(left, {query, 0, kTileElements}, steps, beside);
      }
      tile_store<0>(to, kTileBytes);
      tile_store<2>(to + kTileSums, kTileBytes);
    }
  }

  // sums = numerators * values over `steps` steps of keys.
  void mix_steps(const bf16* numerators, const bf16* pairs, int64_t steps, float* sums) const {
    const int64_t left_step = head_tiles_ * kTileElements, right_step = pairs_stride(head_dim_);
    const int64_t below = kTileRows * head_dim_;
    const auto nothing = [] {};
    for (int64_t d = 0; d < head_dim_; d += kStepDims, pairs += 2 * kTileElements, sums += 2 * kTileSums) {
      const Right right = {pairs, kTileElements, right_step};
      for (int64_t tile = 0; tile < head_tiles_; tile += 2) {
        const Left left = {numerators + tile * kTileElements, kStepKeys, kTileElements, left_step};
        float* to = sums + tile * below;
        tile_zero<0>();
        tile_zero<1>();
        if (tile + 1 < head_tiles_) {
          tile_zero<2>();
          tile_zero<3>();
          multiply<true, true>(left, right, steps, nothing);
          tile_store<2>(to + below, kTileBytes);
          tile_store<3>(to + below + kTileSums, kTileBytes);
        } else {
          multiply<false, true>(left, right, steps, nothing);
        }
        tile_store<0>(to, kTileBytes);
        tile_store<1>(to + kTileSums, kTileBytes);
      }
    }
  }

  const SparseAttentionParams& p_;
  int64_t row_, heads_, head_dim_, head_tiles_;
  Memory memory_;
  Plan plan_;
  bool kept_;
  KeyReader<bf16> reader_;
};

}  // namespace

int64_t sparse_attention_workspace_bytes(const SparseAttentionParams& p, const Context& context) {
  return avx512::Call<RowWork>(p, context).bytes();
}

Status sparse_attention(const SparseAttentionParams& p, const Context& context) {
  avx512::Call<RowWork>(p, context).run();
  return Status::ok();
}

}  // namespace dsv4::DSV4_AMX_NAMESPACE
