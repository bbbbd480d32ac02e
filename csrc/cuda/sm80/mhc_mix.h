// The mixing product: partial sums of fn r and of r^2 over K = 4 hidden, for blocks of tokens. K is cut into splits of
// 256 columns of each stream, always, whatever the token count: a row's sums, and the order they are added in, never
// depend on the rows beside it or on how splits are shared among blocks.
//
// A block holds two stages of [4 streams, tokens, 32 columns] in shared memory, filled by cp.async; the fused kernel
// turns a stage into the new streams in place.
// - bfloat16: 128 tokens, 16 a warp. fn, cut into a high and a low bfloat16 part (relative error 2^-17), and the
//   rows of r go through mma.sync m16n8k16; so does r^2, as the diagonal of r rT.
// - float32: 32 tokens, one a lane; a warp has 3 of the 24 rows of fn. By FMA.
// Gradients are held to the error of torch's float32 sums (kExact): bfloat16 takes fn in three parts, which leave
// nothing out, the small ones first, and r^2 by FMA, since tensor cores round sums of one sign down; what a stage adds
// up to is added to totals in shared memory.
#pragma once

#include "cuda/sm80/mhc_rows.h"

namespace dsv4::sm80 {

struct MixArguments {
  AnyView<3> streams;       // [T, 4, D]; not read by the fused kernel, which has post.streams and makes post.result
  MhcPostParams post;       // read by the fused kernel alone
  View<const float, 2> fn;  // [kMixes, 4 D]
  float* partial;           // [splits, end_token - first_token, kPartialRow]
  int64_t first_token, end_token, hidden;
  int splits_per_block;
  bool vector;  // every row is made of whole, 16-byte aligned pieces
};

inline constexpr int kMixThreads = 256;
inline constexpr int kChunk = 32;  // columns of each stream in a stage
inline constexpr int kChunksPerSplit = 8;
inline constexpr int kPartialRow = 32;  // floats: 24 products, the sum of squares, padding to a 128-byte line
inline constexpr int kSquares = 24;     // where the sum of squares is in it
inline constexpr int kFnRowBytes = 4 * kChunk * 2;  // of a bfloat16 part in shared memory

// kFew: of mhc_mix_few.h.
template <class X, bool kPost, bool kFew = false>
struct MixStage {
  static constexpr int kTokens = kFew ? 16 : sizeof(X) == 2 ? 128 : 32;
  static constexpr int kPieces = kChunk / kElements<X>;                    // of a row: 4 or 8
  static constexpr int kThreads = kFew ? kTokens * kPieces : kMixThreads;  // that copy a stage
  static constexpr int kPiecesPerThread = kTokens * kPieces / kThreads;
  static constexpr int kRows = kPost ? kStreams + 1 : kStreams;  // the fused kernel also holds the sublayer's output
  static constexpr int kBytes = kRows * kTokens * kPieces * 16;

  // Pieces of a row are permuted so that eight rows' same piece, which one ldmatrix phase reads, lie in different
  // banks.
  static DSV4_DEVICE uint32_t address(uint32_t stage, int row, int token, int piece) {
    const int permuted = piece ^ (kPieces == 4 ? (token >> 1) & 3 : token & 7);
    return stage + static_cast<uint32_t>(((row * kTokens + token) * kPieces + permuted) * 16);
  }
};

template <class X, int kMixes>
inline constexpr int kFnRows = (kMixes + 7) / 8 * 8;

// All bfloat16 parts, or float32.
template <class X, int kMixes, bool kExact>
inline constexpr int kFnBytes = kFnRows<X, kMixes> * 4 * kChunk * (sizeof(X) == 2 && kExact ? 6 : 4);

// A thread's share of one chunk of fn on its way from global to shared memory.
template <class X, int kMixes, bool kExact, bool kVector>
struct FnChunk {
  static constexpr int kGroups = kFnRows<X, kMixes> * kChunk / kMixThreads;  // of 4 columns
  Words4 group[kGroups];

  DSV4_DEVICE void load(const MixArguments& a, int chunk) {
    DSV4_UNROLL
    for (int i = 0; i < kGroups; ++i) {
      const int index = ptx::thread_index() + i * kMixThreads;
      const int row = index / kChunk, stream = index % kChunk / 8;
      const int64_t column = static_cast<int64_t>(chunk) * kChunk + index % 8 * 4;
      group[i] = Words4{};
      if (row < kMixes && column < a.hidden) {
        group[i] = load_piece(a.fn.data + row * a.fn.stride[0] + stream * a.hidden, column, a.hidden, kVector);
      }
    }
  }

  // bfloat16: [rows, 128] of the highest part, then of the next, the pieces of a row permuted as those of a stage are.
  DSV4_DEVICE void store(uint32_t fn, bf16) const {
    DSV4_UNROLL
    for (int i = 0; i < kGroups; ++i) {
      const int index = ptx::thread_index() + i * kMixThreads;
      const int row = index / kChunk, piece = index % kChunk / 2;
      float value[4];
      unpack(group[i], value);
      const uint32_t address = fn + static_cast<uint32_t>(row * kFnRowBytes + (piece ^ (row & 7)) * 16 + index % 2 * 8);
      DSV4_UNROLL
      for (int part = 0; part < (kExact ? 3 : 2); ++part) {
        ptx::Words2 words;
        DSV4_UNROLL
        for (int j = 0; j < 2; ++j) {
          float &a = value[2 * j], &b = value[2 * j + 1];
          words.word[j] = ptx::pack_bf16(a, b);
          a = ptx::add(a, -ptx::low_bf16(words.word[j]));
          b = ptx::add(b, -ptx::high_bf16(words.word[j]));
        }
        ptx::store_shared_8(address + static_cast<uint32_t>(part * kFnRows<X, kMixes> * kFnRowBytes), words);
      }
    }
  }

  // float32: [rows, 128].
  DSV4_DEVICE void store(uint32_t fn, float) const {
    DSV4_UNROLL
    for (int i = 0; i < kGroups; ++i) {
      ptx::store_shared_16(fn + static_cast<uint32_t>((ptx::thread_index() + i * kMixThreads) * 16), group[i]);
    }
  }
};

// A warp's sums, over one split; with kExact over one stage of it. Stage is a MixStage.
template <class X, int kMixes, bool kExact, class Stage>
struct Sums;

template <int kMixes, bool kExact, class Stage>
struct Sums<bf16, kMixes, kExact, Stage> {
  static constexpr int kTiles = kFnRows<bf16, kMixes> / 8;
  float product[kTiles][4];
  // Of tokens 0-7 with themselves, and 8-15: the diagonals are the sums of squares. kExact: this lane's share of those
  // of its two tokens, in [half][0].
  float square[2][4];

  // f(place, value) for each sum that kExact has.
  template <class F>
  DSV4_DEVICE void each(const F& f) {
    DSV4_UNROLL
    for (int i = 0; i < kTiles * 4; ++i) f(i, product[i / 4][i % 4]);
    f(kTiles * 4, square[0][0]);
    f(kTiles * 4 + 1, square[1][0]);
  }
  static constexpr int kCount = kTiles * 4 + 2;

  DSV4_DEVICE void clear() {
    DSV4_UNROLL
    for (int j = 0; j < 4; ++j) {
      DSV4_UNROLL
      for (int tile = 0; tile < kTiles; ++tile) product[tile][j] = 0.0f;
      square[0][j] = square[1][j] = 0.0f;
    }
  }

  // Whether a warp has any token: the whole warp agrees.
  static DSV4_DEVICE bool active(int64_t tokens) { return ptx::thread_index() / 32 * 16 < tokens; }

  DSV4_DEVICE void accumulate(uint32_t stage, uint32_t fn) {
    const int lane = ptx::thread_index() % 32, first = ptx::thread_index() / 32 * 16;
    const int token = first + lane % 16;
    constexpr int kRows = kFnRows<bf16, kMixes>, kFirst = kExact ? 1 : 0;  // of the two parts that are taken together
    const uint32_t fn_row = fn + static_cast<uint32_t>(((lane / 16 + kFirst) * kRows + lane % 8) * kFnRowBytes);
    DSV4_UNROLL
    for (int step = 0; step < 4 * kChunk / 16; ++step) {
      uint32_t r[4];
      ptx::ldmatrix_x4(r, Stage::address(stage, step / 2, token, step % 2 * 2 + lane / 16));
      DSV4_UNROLL
      for (int tile = 0; tile < kTiles; ++tile) {
        uint32_t f[4];  // the higher part's k 0-7 and 8-15, the lower one's alike
        const int piece = (2 * step + lane / 8 % 2) ^ (lane % 8);
        ptx::ldmatrix_x4(f, fn_row + static_cast<uint32_t>(tile * 8 * kFnRowBytes + piece * 16));
        ptx::mma_m16n8k16(product[tile], r, f[0], f[1]);
        ptx::mma_m16n8k16(product[tile], r, f[2], f[3]);
      }
      add_squares(r);
    }
    if constexpr (kExact) add_highest(stage, fn + static_cast<uint32_t>(lane % 8 * kFnRowBytes));
  }

  // The highest part, two steps at a time. fn_row: this lane's in the first tile.
  DSV4_DEVICE void add_highest(uint32_t stage, uint32_t fn_row) {
    const int lane = ptx::thread_index() % 32, token = ptx::thread_index() / 32 * 16 + lane % 16;
    DSV4_UNROLL
    for (int step = 0; step < 4 * kChunk / 16; step += 2) {
      uint32_t r[4], next[4];
      ptx::ldmatrix_x4(r, Stage::address(stage, step / 2, token, lane / 16));
      ptx::ldmatrix_x4(next, Stage::address(stage, step / 2, token, 2 + lane / 16));
      DSV4_UNROLL
      for (int tile = 0; tile < kTiles; ++tile) {
        uint32_t f[4];  // k 0-31
        const int piece = (2 * step + lane / 8) ^ (lane % 8);
        ptx::ldmatrix_x4(f, fn_row + static_cast<uint32_t>(tile * 8 * kFnRowBytes + piece * 16));
        ptx::mma_m16n8k16(product[tile], r, f[0], f[1]);
        ptx::mma_m16n8k16(product[tile], next, f[2], f[3]);
      }
    }
  }

  DSV4_DEVICE void add_squares(const uint32_t (&r)[4]) {
    if constexpr (kExact) {
      DSV4_UNROLL
      for (int j = 0; j < 4; ++j) {
        float& sum = square[j % 2][0];
        sum = ptx::fma(ptx::low_bf16(r[j]), ptx::low_bf16(r[j]), sum);
        sum = ptx::fma(ptx::high_bf16(r[j]), ptx::high_bf16(r[j]), sum);
      }
    } else {
      ptx::mma_m16n8k16(square[0], r, r[0], r[2]);
      ptx::mma_m16n8k16(square[1], r, r[1], r[3]);
    }
  }

  // rows: the partial sums of this block's tokens in this split, of which the first `tokens` exist. first_row: of fn.
  DSV4_DEVICE void write(float* rows, int64_t tokens, int first_row = 0) const {
    const int lane = ptx::thread_index() % 32, first = ptx::thread_index() / 32 * 16;
    DSV4_UNROLL
    for (int half = 0; half < 2; ++half) {
      float squares = lane / 4 % 2 ? square[half][2 * half + 1] : square[half][2 * half];
      bool has_squares = lane / 8 == lane % 4;
      if constexpr (kExact) {
        squares = ptx::add(square[half][0], ptx::shuffle_xor(square[half][0], 1));
        squares = ptx::add(squares, ptx::shuffle_xor(squares, 2));
        has_squares = lane % 4 == 0;
      }
      const int token = first + lane / 4 + 8 * half;
      if (token >= tokens) continue;
      float* row = rows + static_cast<int64_t>(token) * kPartialRow;
      DSV4_UNROLL
      for (int tile = 0; tile < kTiles; ++tile) {
        row[first_row + 8 * tile + lane % 4 * 2] = product[tile][2 * half];
        row[first_row + 8 * tile + lane % 4 * 2 + 1] = product[tile][2 * half + 1];
      }
      if (has_squares && first_row == 0) row[kSquares] = squares;
    }
  }
};

template <int kMixes, bool kExact, class Stage>
struct Sums<float, kMixes, kExact, Stage> {
  static constexpr int kRows = kFnRows<float, kMixes> / 8;  // of a warp
  static constexpr int kChains = kExact ? 4 : 1;            // that a sum is made of: shorter ones round less
  float product[kRows][kChains];
  float square[kChains];

  // f(place, value) for each sum that kExact has, once `join` has made one of its chains.
  template <class F>
  DSV4_DEVICE void each(const F& f) {
    DSV4_UNROLL
    for (int j = 0; j < kRows; ++j) f(j, product[j][0]);
    f(kRows, square[0]);
  }
  static constexpr int kCount = kRows + 1;

  DSV4_DEVICE void clear() {
    DSV4_UNROLL
    for (int e = 0; e < kChains; ++e) {
      DSV4_UNROLL
      for (int j = 0; j < kRows; ++j) product[j][e] = 0.0f;
      square[e] = 0.0f;
    }
  }

  static DSV4_DEVICE bool active(int64_t) { return true; }

  DSV4_DEVICE void accumulate(uint32_t stage, uint32_t fn) {
    const int lane = ptx::thread_index() % 32, warp = ptx::thread_index() / 32;
    DSV4_UNROLL
    for (int stream = 0; stream < kStreams; ++stream) {
      DSV4_UNROLL
      for (int piece = 0; piece < Stage::kPieces; ++piece) {
        float r[4];
        unpack(ptx::load_shared_16(Stage::address(stage, stream, lane, piece)), r);
        DSV4_UNROLL
        for (int e = 0; e < 4; ++e) square[e % kChains] = ptx::fma(r[e], r[e], square[e % kChains]);
        DSV4_UNROLL
        for (int j = 0; j < kRows; ++j) {
          float f[4];
          const int group = (warp * kRows + j) * kChunk + stream * 8 + piece;
          unpack(ptx::load_shared_16(fn + static_cast<uint32_t>(group * 16)), f);
          DSV4_UNROLL
          for (int e = 0; e < 4; ++e) product[j][e % kChains] = ptx::fma(r[e], f[e], product[j][e % kChains]);
        }
      }
    }
    if constexpr (kExact) {
      DSV4_UNROLL
      for (int j = 0; j < kRows; ++j) join(product[j]);
      join(square);
    }
  }

  static DSV4_DEVICE void join(float (&chain)[kChains]) {
    chain[0] = ptx::add(ptx::add(chain[0], chain[1 % kChains]), ptx::add(chain[2 % kChains], chain[3 % kChains]));
  }

  DSV4_DEVICE void write(float* rows, int64_t tokens) const {
    const int lane = ptx::thread_index() % 32, warp = ptx::thread_index() / 32;
    if (lane >= tokens) return;
    float* row = rows + static_cast<int64_t>(lane) * kPartialRow;
    DSV4_UNROLL
    for (int j = 0; j < kRows; ++j) row[warp * kRows + j] = product[j][0];
    if (warp == 0) row[kSquares] = square[0];
  }
};

// With kExact, behind fn: each thread's totals.
template <class X, int kMixes, bool kPost, bool kExact = false>
inline constexpr int kMixSharedBytes =
    2 * MixStage<X, kPost>::kBytes + kFnBytes<X, kMixes, kExact> +
    (kExact ? Sums<X, kMixes, true, MixStage<X, kPost>>::kCount * kMixThreads * 4 : 0);

DSV4_DEVICE uint32_t own_total(uint32_t totals, int place) {
  return totals + static_cast<uint32_t>((place * kMixThreads + ptx::thread_index()) * 4);
}

// Adds a stage's sums to the totals, or begins these with them.
template <class Sums>
DSV4_DEVICE void add_to_totals(Sums& sums, uint32_t totals, bool begin) {
  sums.each([&](int place, float value) {
    const uint32_t total = own_total(totals, place);
    ptx::store_shared_float(total, begin ? value : ptx::add(ptx::load_shared_float(total), value));
  });
}

template <class Sums>
DSV4_DEVICE void take_totals(Sums& sums, uint32_t totals) {
  sums.each([&](int place, float& value) { value = ptx::load_shared_float(own_total(totals, place)); });
}

template <class X, bool kPost, bool kVector, bool kFew = false>
struct MixBlock {
  using Stage = MixStage<X, kPost, kFew>;
  const MixArguments& a;
  int64_t first_token;  // of the block
  bool stores_streams;  // the new ones: of the blocks that make the same, one does

  DSV4_DEVICE int token(int i) const {
    const int thread = kFew ? ptx::thread_index() % Stage::kThreads : ptx::thread_index();
    return (thread + i * Stage::kThreads) / Stage::kPieces;
  }
  DSV4_DEVICE int piece() const { return ptx::thread_index() % Stage::kPieces; }
  DSV4_DEVICE int64_t column(int chunk) const { return static_cast<int64_t>(chunk) * kChunk + piece() * kElements<X>; }
  DSV4_DEVICE bool exists(int chunk, int i) const {
    return first_token + token(i) < a.end_token && column(chunk) < a.hidden;
  }

  // Starts this thread's copies into a stage; pieces beyond the tokens or the columns become zeros.
  DSV4_DEVICE void load(uint32_t stage, int chunk) const {
    DSV4_UNROLL
    for (int i = 0; i < Stage::kPiecesPerThread; ++i) {
      DSV4_UNROLL_IF(kVector)
      for (int row = 0; row < Stage::kRows; ++row) {
        const int64_t t = exists(chunk, i) ? first_token + token(i) : first_token;
        const X* source = row == kStreams ? row_of<X>(a.post.sublayer, t)
                                          : row_of<X>(kPost ? a.post.streams : a.streams, t, row % kStreams);
        const uint32_t destination = Stage::address(stage, row, token(i), piece());
        if constexpr (kVector) {
          ptx::cp_async_16(destination, source + (exists(chunk, i) ? column(chunk) : 0), exists(chunk, i) ? 16 : 0);
        } else {
          const int64_t length = exists(chunk, i) ? a.hidden : 0;
          ptx::store_shared_16(destination, load_piece_slowly(source, column(chunk), length));
        }
      }
    }
  }

  // mhc_post on the pieces that this thread itself copied: its own wait is enough to see them.
  DSV4_DEVICE void apply_post(uint32_t stage, int chunk, const PostWeights (&weights)[Stage::kPiecesPerThread]) const {
    DSV4_UNROLL
    for (int i = 0; i < Stage::kPiecesPerThread; ++i) {
      const TokenPiece old = {ptx::load_shared_16(Stage::address(stage, 0, token(i), piece())),
                              ptx::load_shared_16(Stage::address(stage, 1, token(i), piece())),
                              ptx::load_shared_16(Stage::address(stage, 2, token(i), piece())),
                              ptx::load_shared_16(Stage::address(stage, 3, token(i), piece())),
                              ptx::load_shared_16(Stage::address(stage, kStreams, token(i), piece()))};
      DSV4_UNROLL
      for (int o = 0; o < kStreams; ++o) {
        const Words4 mixed = mixed_piece<X>(weights[i], old, o);
        ptx::store_shared_16(Stage::address(stage, o, token(i), piece()), mixed);
        if (stores_streams && exists(chunk, i)) {
          store_piece(row_of<X>(a.post.result, first_token + token(i), o), column(chunk), a.hidden, kVector, mixed);
        }
      }
    }
  }
};

// Grid: x over blocks of tokens, y over runs of splits_per_block splits.
template <class X, int kMixes, bool kPost, bool kExact, bool kVector>
DSV4_DEVICE void mix(const MixArguments& a) {
  using Stage = MixStage<X, kPost>;
  const uint32_t stages = ptx::shared_base();
  const uint32_t fn = stages + 2 * Stage::kBytes, totals = fn + kFnBytes<X, kMixes, kExact>;
  const int chunks = static_cast<int>((a.hidden + kChunk - 1) / kChunk);
  const int first = static_cast<int>(ptx::block_index_y()) * a.splits_per_block * kChunksPerSplit;
  const int end =
      first + a.splits_per_block * kChunksPerSplit < chunks ? first + a.splits_per_block * kChunksPerSplit : chunks;
  const MixBlock<X, kPost, kVector> block{a, a.first_token + ptx::block_index_x() * Stage::kTokens, true};
  const int64_t tokens = a.end_token - block.first_token;

  PostWeights weights[Stage::kPiecesPerThread];
  if constexpr (kPost) {
    DSV4_UNROLL
    for (int i = 0; i < Stage::kPiecesPerThread; ++i) {
      weights[i].clear();
      if (block.token(i) < tokens) weights[i].load(a.post, block.first_token + block.token(i));
    }
  }
  FnChunk<X, kMixes, kExact, kVector> fn_chunk;
  Sums<X, kMixes, kExact, Stage> sums;
  sums.clear();
  block.load(stages, first);
  ptx::cp_async_commit();
  fn_chunk.load(a, first);
  DSV4_UNROLL_IF(false)
  for (int chunk = first; chunk < end; ++chunk) {
    const uint32_t stage = stages + (chunk & 1) * Stage::kBytes;
    if (chunk + 1 < end) block.load(stages + (~chunk & 1) * Stage::kBytes, chunk + 1);
    ptx::cp_async_commit();
    fn_chunk.store(fn, X{});
    if (chunk + 1 < end) fn_chunk.load(a, chunk + 1);
    ptx::cp_async_wait<1>();
    if constexpr (kPost) block.apply_post(stage, chunk, weights);
    ptx::sync_threads();  // the stage and fn are whole
    if (sums.active(tokens)) sums.accumulate(stage, fn);
    ptx::sync_threads();  // both may be overwritten
    if constexpr (kExact) {
      add_to_totals(sums, totals, chunk % kChunksPerSplit == 0);
      sums.clear();
    }
    if (chunk + 1 == end || (chunk + 1) % kChunksPerSplit == 0) {
      const int64_t split = chunk / kChunksPerSplit;
      const int64_t row = split * (a.end_token - a.first_token) + block.first_token - a.first_token;
      if constexpr (kExact) take_totals(sums, totals);
      sums.write(a.partial + row * kPartialRow, tokens);
      sums.clear();
    }
  }
}

template <class X, int kMixes, bool kPost, bool kExact = false>
DSV4_DEVICE void mix(const MixArguments& a) {
  if (a.vector) {
    mix<X, kMixes, kPost, kExact, true>(a);
  } else {
    mix<X, kMixes, kPost, kExact, false>(a);
  }
}

}  // namespace dsv4::sm80
