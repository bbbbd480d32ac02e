// How a block brings a row's keys into shared memory, tile by tile: as bfloat16 for the tensor cores, or as float32.
//
// A slot without a key (an index that is none, a page that is not stored) is filled with zeros: whatever its memory
// held would spoil the product even under a weight of zero.
#pragma once

#include "cuda/sm80/attention_keys.h"
#include "cuda/sm80/code_pairs.h"

namespace dsv4::sm80 {

// What a row's 16-byte pieces are permuted by, piece ^ turn. In different banks lie any eight rows' same piece, as one
// ldmatrix phase reads them, and of an even row and the next four neighbouring pieces, from a multiple of four on, and
// four of which every second is left out.
DSV4_DEVICE int turn_of_row(int row) { return 5 * row & 7; }

// Tiles of bfloat16. Eight threads that are served together are four of a key and four of the next.
struct Bf16Tile {
  static constexpr int kKeys = 32;
  static constexpr KeyForm kCopied = KeyForm::kBf16;  // rows that are copied as they are
  static constexpr int kPieceDims = 8;
  static constexpr int kNeighbours = 4;
  // Pieces of an FP8 row that a block has on their way for a key while the tile before is worked on: all of the
  // released rows' 36. Rows with wider rope parts have more; those are read late.
  static constexpr int kAhead = 36;

  static DSV4_DEVICE uint32_t address(const AttentionArguments& a, uint32_t tile, int key, int piece) {
    return tile + static_cast<uint32_t>(key * a.tile_row + (piece ^ turn_of_row(key)) * 16);
  }
  // Eight dims of a key.
  static DSV4_DEVICE void store(const AttentionArguments& a, uint32_t tile, int key, int eight, const Words4& bf16s) {
    ptx::store_shared_16(address(a, tile, key, eight), bf16s);
  }
  static DSV4_DEVICE void store(const AttentionArguments& a, uint32_t tile, int key, int eight,
                                const float (&value)[8]) {
    store(a, tile, key, eight,
          Words4{{pack_exact(value[0], value[1]), pack_exact(value[2], value[3]), pack_exact(value[4], value[5]),
                  pack_exact(value[6], value[7])}});
  }
};

// Tiles of float32. A warp reads consecutive pieces of one key.
struct F32Tile {
  static constexpr int kKeys = 16;
  static constexpr KeyForm kCopied = KeyForm::kF32;
  static constexpr int kPieceDims = 4;
  static constexpr int kNeighbours = 8;
  static constexpr int kAhead = 0;  // queries and sums take the registers; rows to be converted are read late

  static DSV4_DEVICE uint32_t address(const AttentionArguments& a, uint32_t tile, int key, int piece) {
    return tile + static_cast<uint32_t>(key * a.tile_row + piece * 16);
  }
  static DSV4_DEVICE void store(const AttentionArguments& a, uint32_t tile, int key, int eight, const Words4& bf16s) {
    float value[8];
    DSV4_UNROLL
    for (int i = 0; i < 4; ++i) {
      value[2 * i] = ptx::low_bf16(bf16s.word[i]);
      value[2 * i + 1] = ptx::high_bf16(bf16s.word[i]);
    }
    store(a, tile, key, eight, value);
  }
  static DSV4_DEVICE void store(const AttentionArguments& a, uint32_t tile, int key, int eight,
                                const float (&value)[8]) {
    DSV4_UNROLL
    for (int half = 0; half < 2; ++half) {
      Words4 piece;
      DSV4_UNROLL
      for (int i = 0; i < 4; ++i) piece.word[i] = bits_from_float(value[4 * half + i]);
      ptx::store_shared_16(address(a, tile, key, 2 * eight + half), piece);
    }
  }
};

// Two tiles, of which one is filled while the other is worked on; of each key, whether it counts.
template <class Tile>
struct TilePair {
  uint32_t tiles, counts;
  int tile_bytes;

  DSV4_DEVICE explicit TilePair(const AttentionArguments& a)
      : tiles(ptx::shared_base()), tile_bytes(Tile::kKeys * a.tile_row) {
    counts = tiles + static_cast<uint32_t>(2 * tile_bytes);
  }
  static constexpr int bytes(int tile_row) { return 2 * Tile::kKeys * (tile_row + 4); }

  DSV4_DEVICE uint32_t tile(int64_t number) const { return tiles + static_cast<uint32_t>((number & 1) * tile_bytes); }
  DSV4_DEVICE uint32_t count(int64_t number) const {
    return counts + static_cast<uint32_t>((number & 1) * Tile::kKeys * 4);
  }
  DSV4_DEVICE uint32_t end() const { return counts + 2 * Tile::kKeys * 4; }
};

// Fills tiles, a few threads a key: kNeighbours side by side, then as many of the next key, then others of the first.
template <class Tile, int kThreads>
struct TileLoader {
  static constexpr int kThreadsPerKey = kThreads / Tile::kKeys;
  static constexpr int kAhead = (Tile::kAhead + kThreadsPerKey - 1) / kThreadsPerKey;

  static DSV4_DEVICE int key() { return thread() / (2 * kThreadsPerKey) * 2 + thread() / Tile::kNeighbours % 2; }
  static DSV4_DEVICE int member() {
    const int of_both = thread() % (2 * kThreadsPerKey);
    return of_both / (2 * Tile::kNeighbours) * Tile::kNeighbours + of_both % Tile::kNeighbours;
  }

  // Starts this thread's share: copies of rows that stay as they are, reads of FP8 rows, zeros where there is no key.
  DSV4_DEVICE void start(const AttentionArguments& a, const AttentionKey& from, uint32_t tile) {
    const int pieces = a.padded_dim / Tile::kPieceDims;
    if (from.form == KeyForm::kNone) {
      for (int piece = member(); piece < pieces; piece += kThreadsPerKey) {
        ptx::store_shared_16(Tile::address(a, tile, key(), piece), Words4{});
      }
    } else if (from.form == Tile::kCopied) {
      for (int piece = member(); piece < pieces; piece += kThreadsPerKey) {
        const bool exists = Tile::kPieceDims * piece < a.head_dim;
        ptx::cp_async_16(Tile::address(a, tile, key(), piece), from.data + (exists ? 16 * piece : 0), exists ? 16 : 0);
      }
    } else if (from.form == KeyForm::kFp8) {
      DSV4_UNROLL
      for (int i = 0; i < kAhead; ++i) {
        const int piece = member() + i * kThreadsPerKey;
        if (piece < fp8_pieces(a)) ahead[i] = ptx::load_global_16(from.data + 16 * piece);
      }
      scales = ptx::load_global_8(from.scales);
    }
  }

  // Ends it: rows of another form than the tile's are converted, rows of single elements gathered.
  DSV4_DEVICE void finish(const AttentionArguments& a, const AttentionKey& from, uint32_t tile) const {
    if (from.form == KeyForm::kNone || from.form == Tile::kCopied) return;
    if (from.form == KeyForm::kFp8) {
      bool exact = true;
      DSV4_UNROLL
      for (int i = 0; i < kAhead; ++i) {
        const int piece = member() + i * kThreadsPerKey;
        exact &= store_fp8(a, tile, piece, ahead[i]);
      }
      for (int piece = member() + kAhead * kThreadsPerKey; piece < fp8_pieces(a); piece += kThreadsPerKey) {
        exact &= store_fp8(a, tile, piece, ptx::load_global_16(from.data + 16 * piece));
      }
      pad(a, tile);
      if (exact) return;
      DSV4_UNROLL_IF(false)  // this thread's codes once more, one by one
      for (int eight = 2 * member(); eight < a.nope / 8; eight += eight % 2 == 0 ? 1 : 2 * kThreadsPerKey - 1) {
        gather(a, from, tile, eight);
      }
    } else if (Tile::kCopied != KeyForm::kBf16 && from.form == KeyForm::kBf16) {
      for (int piece = member(); piece < a.head_dim / 8; piece += kThreadsPerKey) {
        Tile::store(a, tile, key(), piece, ptx::load_global_16(from.data + 16 * piece));
      }
      pad(a, tile);
    } else {
      for (int eight = member(); eight < a.padded_dim / 8; eight += kThreadsPerKey) gather(a, from, tile, eight);
    }
  }

 private:
  static DSV4_DEVICE int thread() { return ptx::thread_index() & (kThreads - 1); }  // not negative, for the compiler

  // Of the released rows: codes, then rope dims.
  static DSV4_DEVICE int fp8_pieces(const AttentionArguments& a) { return a.nope / 16 + a.rope / 8; }

  // A piece of an FP8 row, if there is such a piece: 16 codes, or 8 rope dims. Whether that was exact: not of a NaN,
  // nor of a scale whose factor bfloat16 does not hold or that makes some code denormal in bfloat16.
  DSV4_DEVICE bool store_fp8(const AttentionArguments& a, uint32_t tile, int piece, const Words4& value) const {
    constexpr uint32_t kLeastScale = 10, kMostScale = 134;
    const int codes = a.nope / 16;
    if (piece < codes) {
      const uint32_t block = static_cast<uint32_t>(piece) / 4;
      const uint32_t scale = ptx::select_bytes(scales.word[0], scales.word[1], block) & 0xFFu;
      const uint32_t factors = bf16_twice((scale + 120u) << 7);
      Tile::store(a, tile, key(), 2 * piece, decode_e4m3(value.word[0], value.word[1], factors));
      Tile::store(a, tile, key(), 2 * piece + 1, decode_e4m3(value.word[2], value.word[3], factors));
      return e4m3_nans(value) == 0 && scale - kLeastScale <= kMostScale - kLeastScale;
    }
    if (piece < fp8_pieces(a)) Tile::store(a, tile, key(), piece + codes, value);
    return true;
  }

  // Zeros after a row of an odd number of eights.
  static DSV4_DEVICE void pad(const AttentionArguments& a, uint32_t tile) {
    if (member() == 0 && a.padded_dim > a.head_dim) Tile::store(a, tile, key(), a.head_dim / 8, Words4{});
  }

  // Eight dims, one by one.
  static DSV4_DEVICE void gather(const AttentionArguments& a, const AttentionKey& from, uint32_t tile, int eight) {
    float value[8];
    DSV4_UNROLL
    for (int i = 0; i < 8; ++i) value[i] = element(a, from, 8 * eight + i);
    Tile::store(a, tile, key(), eight, value);
  }

  // Zero past the row's end.
  static DSV4_DEVICE float element(const AttentionArguments& a, const AttentionKey& from, int dim) {
    if (dim >= a.head_dim) return 0.0f;
    if (Tile::kCopied == KeyForm::kF32 && from.form == KeyForm::kF32Slow) {
      return reinterpret_cast<const float*>(from.data)[dim];
    }
    if (from.form == KeyForm::kBf16Slow) return to_float(reinterpret_cast<const bf16*>(from.data)[dim]);
    if (dim < a.nope) {
      const float scale = e8m0_value(from.scales[dim / static_cast<int>(kRowBlock)]);
      return ptx::high_bf16(bits_from_float(ptx::multiply(e4m3_value(from.data[dim]), scale)));
    }
    const uint8_t* bytes = from.data + a.nope + 2 * (dim - a.nope);
    return ptx::low_bf16(bytes[0] | static_cast<uint32_t>(bytes[1]) << 8);
  }

  Words4 ahead[kAhead > 0 ? kAhead : 1];
  ptx::Words2 scales = {};
};

// Does `work` on each tile of [begin, end) of a row's slots, the next on its way meanwhile. All threads are past a
// barrier, and the tile is whole, when it begins.
template <class Tile, int kThreads, class Work>
DSV4_DEVICE void walk_tiles(const AttentionArguments& a, const AttentionRow& row, int64_t begin, int64_t end,
                            const TilePair<Tile>& shared, const Work& work) {
  using Loader = TileLoader<Tile, kThreads>;
  // A slot is looked up two tiles before its key is needed, its page one tile before: each waits for the one before it.
  Loader loader;
  AttentionSlot slot;
  AttentionKey key, next;
  const auto look_up = [&](int64_t tile) { slot.load(row, tile * Tile::kKeys + Loader::key()); };
  const auto finish = [&](int64_t tile) {
    loader.finish(a, key, shared.tile(tile));
    if (Loader::member() == 0) {
      const float counts = key.form == KeyForm::kNone ? 0.0f : 1.0f;
      ptx::store_shared_float(shared.count(tile) + static_cast<uint32_t>(Loader::key() * 4), counts);
    }
  };
  look_up(begin);
  key.find(a, row, slot);
  look_up(begin + 1);
  if (begin < end) {
    loader.start(a, key, shared.tile(begin));
    finish(begin);
  }
  ptx::cp_async_commit();
  next.find(a, row, slot);
  look_up(begin + 2);
  DSV4_UNROLL_IF(false)
  for (int64_t tile = begin; tile < end; ++tile) {
    ptx::cp_async_wait<0>();
    ptx::sync_threads();  // the tile is whole; nobody reads the other one, nor what work left in shared memory
    key = next;
    if (tile + 1 < end) loader.start(a, key, shared.tile(tile + 1));
    ptx::cp_async_commit();
    next.find(a, row, slot);
    look_up(tile + 3);
    work(tile);
    if (tile + 1 < end) finish(tile + 1);
  }
}

}  // namespace dsv4::sm80
