// The streams' gradient and the sums over tokens, from what mhc_backward_tokens.h made of each token:
//   d streams = pre dx - along r + fn^T dz (+ residual), d fn = sum_t dz rT, d norm_weight = sum_t g u norm_inverse
//
// A block has 64 columns of each stream and a piece of the tokens, whose size follows from the shape alone; it goes
// through it 16 tokens at a time, two stages of shared memory filled by cp.async, and keeps its columns' share of fn
// and of d fn in registers throughout. The pieces' sums go to the workspace; a last kernel adds them in ascending
// order.
// - bfloat16: a warp has 32 columns of one stream. fn^T dz by mma.sync m16n8k16 from two parts of each (what their low
//   parts have in common is below 2^-16 of a result rounded to bfloat16), columns of fn dealt out so that a lane's
//   results are eight neighbours; d fn from three parts of dz, which leave nothing out.
// - float32: a thread has one column of one stream. By FMA.
#pragma once

#include "cuda/sm80/mhc_backward_tokens.h"
#include "cuda/sm80/row_lanes.h"

namespace dsv4::sm80 {

struct StreamArguments {
  AnyView<2> grad_input;                   // [T, D]
  AnyView<3> grad_residual;                // [T, 4, D], optional
  AnyView<3> streams, grad_streams;        // [T, 4, D]
  View<const float, 2> fn;                 // [kMixes, 4 D]
  AnyView<1> norm_weight;                  // [D], optional
  const void* factors;                     // of every token, as in TokenArguments
  const float *values, *summed;            //
  float *fn_sums, *norm_sums, *rest_sums;  // of pieces: [kMixes, 4 D] or none, [D up to fours], [kSummed, two floats]
  int64_t tokens, hidden, piece_tokens, column_blocks;
  bool vector;
};

inline constexpr int kStreamThreads = 256;
inline constexpr int kStreamColumns = 64;  // of each stream, of a block
inline constexpr int kStreamTokens = 16;   // of a stage

template <class X, int kMixes>
struct StreamStage {
  static constexpr int kPieces = kStreamColumns / kElements<X>;                                    // of a row
  static constexpr int kRowsBytes = kStreamTokens * kStreamColumns * static_cast<int>(sizeof(X));  // of one stream
  static constexpr int kGrad = 2 * kStreams;  // rows: streams, residual, gradient of the input
  static constexpr int kFactors = (kGrad + 1) * kRowsBytes;
  static constexpr int kFactorBytes = Factors<X, kMixes>::kBytes;
  static constexpr int kValues = kFactors + kStreamTokens * kFactorBytes;
  static constexpr int kBytes = kValues + kStreamTokens * kTokenValues * 4;

  // Pieces of a row are permuted so that neither eight rows' same piece, which one ldmatrix phase reads, nor four
  // neighbours of two rows have a bank in common.
  static DSV4_DEVICE uint32_t address(uint32_t stage, int row, int token, int piece) {
    const int permuted = piece ^ ((token & 1) << 2 | (token >> 1 & 3));
    return stage + static_cast<uint32_t>(row * kRowsBytes + (token * kPieces + permuted) * 16);
  }
  static DSV4_DEVICE uint32_t value(uint32_t stage, int token, int which) {
    return stage + static_cast<uint32_t>(kValues + (token * kTokenValues + which) * 4);
  }
};

// Behind the stages: dx of a stage in float32, [tokens, columns], four at a time; neighbouring tokens' in other banks.
inline constexpr int kMixedBytes = kStreamTokens * kStreamColumns * 4;
// Behind it, since registers are short: the sums of the norm's gradient, as dx is, and the norm's weight of the
// columns.
inline constexpr int kNormSums = kMixedBytes, kNormWeights = 2 * kMixedBytes;
inline constexpr int kFragments = kNormWeights + kStreamColumns * 4;
DSV4_DEVICE uint32_t mixed_address(uint32_t mixed, int token, int four) {
  return mixed + static_cast<uint32_t>((token * (kStreamColumns / 4) + (four ^ (token & 1))) * 16);
}

// Behind that: bfloat16 parts of the block's columns of fn as fragments, [part][tile of columns][thread] of a word for
// every eight rows; a lane reads its own.
template <class X, int kMixes>
inline constexpr int kFragmentBytes = sizeof(X) == 2 ? 2 * 4 * (kFnRows<X, kMixes> / 8) * kStreamThreads * 4 : 0;

template <class X, int kMixes>
inline constexpr int kStreamSharedBytes = 2 * StreamStage<X, kMixes>::kBytes + kFragments + kFragmentBytes<X, kMixes>;

// What a block works on.
template <class X, int kMixes, bool kVector>
struct StreamBlock {
  using Stage = StreamStage<X, kMixes>;
  static constexpr bool kWhole = kVector;  // rows are of whole, aligned pieces
  const StreamArguments& a;
  int64_t first_column, piece;
  uint32_t mixed;

  // Tokens below are counted from the piece's first.
  DSV4_DEVICE int64_t first_token() const { return piece * a.piece_tokens; }
  DSV4_DEVICE int tokens() const {
    const int64_t left = a.tokens - first_token();
    return static_cast<int>(left < a.piece_tokens ? left : a.piece_tokens);
  }

  // This thread's place in a stage: the same piece of the same token in every `kRowStep`th row.
  static constexpr int kRowPieces = kStreamTokens * Stage::kPieces, kRowStep = kStreamThreads / kRowPieces;
  static DSV4_DEVICE int own_row() { return ptx::thread_index() / kRowPieces; }
  static DSV4_DEVICE int own_token() { return ptx::thread_index() / Stage::kPieces % kStreamTokens; }
  static DSV4_DEVICE int own_piece() { return ptx::thread_index() % Stage::kPieces; }
  // Columns that the block has.
  DSV4_DEVICE int columns() const {
    return a.hidden - first_column < kStreamColumns ? static_cast<int>(a.hidden - first_column) : kStreamColumns;
  }

  // Starts the copy of a 16-byte piece; what is beyond the tokens or the columns becomes zeros.
  DSV4_DEVICE void load_piece_of(uint32_t stage, int row, const X* source, const X* any, bool exists) const {
    const uint32_t destination = Stage::address(stage, row, own_token(), own_piece());
    if constexpr (kVector) {
      ptx::cp_async_16(destination, exists ? source : any, exists ? 16 : 0);
    } else {
      const int left = exists ? columns() - own_piece() * kElements<X> : 0;
      ptx::store_shared_16(destination, load_piece_slowly(exists ? source : any, 0, left));
    }
  }

  DSV4_DEVICE void load_streams(uint32_t stage, int first_row, const AnyView<3>& from, int first, bool exists) const {
    const X* any = static_cast<const X*>(from.data);
    const int64_t token = first_token() + first + own_token();
    const X* source =
        any + token * from.stride[0] + own_row() * from.stride[1] + first_column + own_piece() * kElements<X>;
    DSV4_UNROLL_IF(kVector)
    for (int stream = 0; stream < kStreams; stream += kRowStep) {
      load_piece_of(stage, first_row + stream + own_row(), source, any, exists);
      source += kRowStep * from.stride[1];
    }
  }

  template <int kRecordBytes>
  DSV4_DEVICE void load_records(uint32_t destination, const void* records, int first) const {
    const uint8_t* source = static_cast<const uint8_t*>(records) + (first_token() + first) * kRecordBytes;
    const int bytes = (tokens() - first) * kRecordBytes, at = ptx::thread_index() * 16;
    static_assert(kStreamTokens * kRecordBytes <= kStreamThreads * 16);
    if (at < kStreamTokens * kRecordBytes) {
      ptx::cp_async_16(destination + static_cast<uint32_t>(at), source + (at < bytes ? at : 0), at < bytes ? 16 : 0);
    }
  }

  DSV4_DEVICE void load(uint32_t stage, int first) const {
    const bool exists = first + own_token() < tokens() && own_piece() * kElements<X> < columns();
    load_streams(stage, 0, a.streams, first, exists);
    if (a.grad_residual.given()) load_streams(stage, kStreams, a.grad_residual, first, exists);
    if (own_row() == 0) {
      const X* any = static_cast<const X*>(a.grad_input.data);
      const int64_t token = first_token() + first + own_token();
      const X* source = any + token * a.grad_input.stride[0] + first_column + own_piece() * kElements<X>;
      load_piece_of(stage, Stage::kGrad, source, any, exists);
    }
    load_records<Stage::kFactorBytes>(stage + Stage::kFactors, a.factors, first);
    load_records<kTokenValues * 4>(stage + Stage::kValues, a.values, first);
  }
};

DSV4_DEVICE void load_four(uint32_t address, int part, float (&value)[4], bf16) {
  const ptx::Words2 words = ptx::load_shared_8(address + static_cast<uint32_t>(part * 8));
  DSV4_UNROLL
  for (int i = 0; i < 2; ++i) {
    value[2 * i] = ptx::low_bf16(words.word[i]);
    value[2 * i + 1] = ptx::high_bf16(words.word[i]);
  }
}
DSV4_DEVICE void load_four(uint32_t address, int, float (&value)[4], float) {
  unpack(ptx::load_shared_16(address), value);
}

// The norm's share: a thread has four columns of one token of every stage.
template <class X>
struct NormColumns {
  static constexpr int kFours = kStreamColumns / 4;
  static DSV4_DEVICE int four() { return ptx::thread_index() % kFours; }
  static DSV4_DEVICE int token() { return ptx::thread_index() / kFours; }
  // This thread's sums.
  static DSV4_DEVICE uint32_t sums(uint32_t mixed) { return mixed_address(mixed + kNormSums, token(), four()); }

  DSV4_DEVICE void begin(const StreamArguments& a, int64_t first_column, uint32_t mixed) const {
    if (!a.norm_weight.given()) return;
    ptx::store_shared_16(sums(mixed), Words4{});
    if (ptx::thread_index() >= kStreamColumns) return;
    const int64_t column = first_column + ptx::thread_index();
    const bool wide = a.norm_weight.dtype == DType::kFloat32;
    const float weight = column >= a.hidden ? 0.0f
                         : wide             ? static_cast<const float*>(a.norm_weight.data)[column]
                                            : to_float(static_cast<const X*>(a.norm_weight.data)[column]);
    ptx::store_shared_float(mixed + kNormWeights + static_cast<uint32_t>(ptx::thread_index() * 4), weight);
  }

  // dx of a stage.
  template <class Block>
  DSV4_DEVICE void make_mixed(const Block& block, uint32_t stage) const {
    using Stage = typename Block::Stage;
    constexpr int kFoursOfPiece = kElements<X> / 4;
    const int piece = four() / kFoursOfPiece, part = four() % kFoursOfPiece;
    float u[4], r[4], g[4], weight[4], sum[4];
    DSV4_UNROLL
    for (int s = 0; s < kStreams; ++s) {
      const float pre = ptx::load_shared_float(Stage::value(stage, token(), kTokenPre + s));
      load_four(Stage::address(stage, s, token(), piece), part, r, X{});
      DSV4_UNROLL
      for (int e = 0; e < 4; ++e) u[e] = s == 0 ? ptx::multiply(pre, r[e]) : ptx::fma(pre, r[e], u[e]);
    }
    load_four(Stage::address(stage, Stage::kGrad, token(), piece), part, g, X{});
    unpack(ptx::load_shared_16(block.mixed + kNormWeights + static_cast<uint32_t>(four() * 16)), weight);
    const float inverse = ptx::load_shared_float(Stage::value(stage, token(), kNormInverse));
    const float along = ptx::load_shared_float(Stage::value(stage, token(), kNormAlong));
    unpack(ptx::load_shared_16(sums(block.mixed)), sum);
    Words4 dx;
    DSV4_UNROLL
    for (int e = 0; e < 4; ++e) {
      u[e] = rounded_to<X>(u[e]);
      sum[e] = ptx::fma(ptx::multiply(g[e], u[e]), inverse, sum[e]);
      const float scaled = ptx::multiply(ptx::multiply(g[e], weight[e]), inverse);
      dx.word[e] = bits_from_float(ptx::fma(-along, u[e], scaled));
    }
    ptx::store_shared_16(sums(block.mixed), pack(sum));
    ptx::store_shared_16(mixed_address(block.mixed, token(), four()), dx);
  }

  // The sums of the piece, after a barrier.
  template <class Block>
  DSV4_DEVICE void write(const Block& block) const {
    const StreamArguments& a = block.a;
    const int column = ptx::thread_index();
    if (column >= kStreamColumns || block.first_column + column >= a.hidden) return;
    float total = 0.0f;
    for (int t = 0; t < kStreamTokens; ++t) {
      const uint32_t address =
          mixed_address(block.mixed + kNormSums, t, column / 4) + static_cast<uint32_t>(column % 4 * 4);
      total = ptx::add(total, ptx::load_shared_float(address));
    }
    a.norm_sums[block.piece * ((a.hidden + 3) / 4 * 4) + block.first_column + column] = total;
  }
};

// fn^T dz becomes the streams' gradient but for the residual. The largest terms come last: they would round the small
// ones.
template <class Stage, int kCount>
DSV4_DEVICE void add_terms(uint32_t stage, int token, int stream, const float (&dx)[kCount], const float (&r)[kCount],
                           float (&value)[kCount]) {
  const float pre = ptx::load_shared_float(Stage::value(stage, token, kTokenPre + stream));
  const float along_pre = ptx::load_shared_float(Stage::value(stage, token, kAlongPre));
  const float along = ptx::add(along_pre, ptx::load_shared_float(Stage::value(stage, token, kAlongMixes)));
  DSV4_UNROLL
  for (int e = 0; e < kCount; ++e) value[e] = ptx::fma(pre, dx[e], ptx::fma(-along, r[e], value[e]));
}

// The streams' gradient and d fn of a warp's or a thread's columns.
template <class X, int kMixes>
struct StreamColumns;

template <int kMixes>
struct StreamColumns<bf16, kMixes> {
  using Stage = StreamStage<bf16, kMixes>;
  using Dz = Factors<bf16, kMixes>;
  static constexpr int kTiles = kFnRows<bf16, kMixes> / 8;  // of rows of fn
  float sum[2][kTiles][4];                                  // d fn, [16 columns]

  static DSV4_DEVICE int stream() { return ptx::thread_index() / 64; }
  static DSV4_DEVICE int column() { return ptx::thread_index() / 32 % 2 * 32; }  // the warp's first

  // This lane's words of fn: 16 bytes for each tile of columns and part, of which the last is unused.
  static DSV4_DEVICE uint32_t fragment(uint32_t mixed, int tile, int part) {
    const int at = ((part * 4 + tile) * kStreamThreads + ptx::thread_index()) * kTiles * 4;
    return mixed + kFragments + static_cast<uint32_t>(at);
  }

  DSV4_DEVICE void begin(const StreamArguments& a, int64_t first_column, uint32_t mixed) {
    const int lane = ptx::thread_index() % 32, n = lane / 4;
    DSV4_UNROLL_IF(false)
    for (int tile = 0; tile < 4; ++tile) {
      const int64_t at = first_column + column() + n / 2 * 8 + tile * 2 + n % 2;
      DSV4_UNROLL
      for (int k = 0; k < kTiles; ++k) {
        float value[2];
        DSV4_UNROLL
        for (int e = 0; e < 2; ++e) {
          const int row = k * 8 + lane % 4 * 2 + e;
          value[e] = row < kMixes && at < a.hidden ? a.fn.data[row * a.fn.stride[0] + stream() * a.hidden + at] : 0.0f;
        }
        const uint32_t high = ptx::pack_bf16(value[0], value[1]);
        const uint32_t low =
            ptx::pack_bf16(ptx::add(value[0], -ptx::low_bf16(high)), ptx::add(value[1], -ptx::high_bf16(high)));
        ptx::store_shared_word(fragment(mixed, tile, 0) + static_cast<uint32_t>(k * 4), high);
        ptx::store_shared_word(fragment(mixed, tile, 1) + static_cast<uint32_t>(k * 4), low);
      }
    }
    DSV4_UNROLL
    for (int i = 0; i < 2 * kTiles * 4; ++i) sum[i / (kTiles * 4)][i / 4 % kTiles][i % 4] = 0.0f;
  }

  static DSV4_DEVICE uint32_t word_of_fn(uint32_t mixed, int tile, int part, int k) {
    return ptx::load_shared_word(fragment(mixed, tile, part) + static_cast<uint32_t>(k * 4));
  }

  // Where this lane's row of a piece of dz is, in lanes past 15 of the next one, for 16 tokens as rows or, transposed,
  // as columns. Past the last piece lies what nobody uses.
  static DSV4_DEVICE uint32_t factor(uint32_t stage, int piece) {
    const int lane = ptx::thread_index() % 32;
    return stage + static_cast<uint32_t>(Stage::kFactors + lane % 16 * Stage::kFactorBytes + (piece + lane / 16) * 16);
  }

  // fn^T dz, the smaller products first. What is in registers at a time is little: they are short.
  static DSV4_DEVICE void back(uint32_t stage, uint32_t mixed, float (&back)[4][4]) {
    uint32_t a[4];
    if constexpr (kTiles == 3) {
      ptx::ldmatrix_x4(a, factor(stage, 2));  // low parts of rows 0-15
      DSV4_UNROLL
      for (int tile = 0; tile < 4; ++tile) {
        DSV4_UNROLL
        for (int j = 0; j < 4; ++j) back[tile][j] = 0.0f;
        ptx::mma_m16n8k16(back[tile], a, word_of_fn(mixed, tile, 0, 0), word_of_fn(mixed, tile, 0, 1));
      }
      ptx::ldmatrix_x4(a, factor(stage, 4));  // high and low parts of rows 16-23
      DSV4_UNROLL
      for (int tile = 0; tile < 4; ++tile) {
        const uint32_t low = word_of_fn(mixed, tile, 1, 2), high = word_of_fn(mixed, tile, 0, 2);
        ptx::mma_m16n8k16(back[tile], a, low, low);
        ptx::mma_m16n8k16(back[tile], a, high, high);
      }
      ptx::ldmatrix_x4(a, factor(stage, 0));  // high parts of rows 0-15
      DSV4_UNROLL
      for (int tile = 0; tile < 4; ++tile) {
        ptx::mma_m16n8k16(back[tile], a, word_of_fn(mixed, tile, 1, 0), word_of_fn(mixed, tile, 1, 1));
        ptx::mma_m16n8k16(back[tile], a, word_of_fn(mixed, tile, 0, 0), word_of_fn(mixed, tile, 0, 1));
      }
    } else {
      ptx::ldmatrix_x4(a, factor(stage, 0));  // high and low parts
      DSV4_UNROLL
      for (int tile = 0; tile < 4; ++tile) {
        DSV4_UNROLL
        for (int j = 0; j < 4; ++j) back[tile][j] = 0.0f;
        const uint32_t low = word_of_fn(mixed, tile, 1, 0), high = word_of_fn(mixed, tile, 0, 0);
        ptx::mma_m16n8k16(back[tile], a, low, low);
        ptx::mma_m16n8k16(back[tile], a, high, high);
      }
    }
  }

  // d fn: the streams as rows, dz as columns.
  DSV4_DEVICE void add_fn(uint32_t stage) {
    const int lane = ptx::thread_index() % 32, token = lane / 16 * 8 + lane % 8;
    uint32_t r[2][4];
    DSV4_UNROLL
    for (int half = 0; half < 2; ++half) {
      const int piece = column() / 8 + half * 2 + lane / 8 % 2;
      ptx::ldmatrix_x4_transposed(r[half], Stage::address(stage, stream(), token, piece));
    }
    if constexpr (kTiles == 3) {
      add_tiles<2, 0>(stage, r, {6, 2, 0});
      add_tiles<1, 2>(stage, r, {8, 5, 4});
    } else {
      add_tiles<1, 0>(stage, r, {2, 1, 0});
    }
  }

  // kCount tiles of rows of fn from kFirst on; pieces: the first one's of each part, the lowest first. A stage's sum is
  // taken for itself, so that the sum over a piece rounds once a stage.
  template <int kCount, int kFirst>
  DSV4_DEVICE void add_tiles(uint32_t stage, const uint32_t (&r)[2][4], const int (&pieces)[kFactorParts]) {
    float of_stage[2][kCount][4] = {};
    DSV4_UNROLL
    for (int part = 0; part < kFactorParts; ++part) {
      uint32_t dz[4];
      ptx::ldmatrix_x4_transposed(dz, factor(stage, pieces[part]));
      DSV4_UNROLL
      for (int i = 0; i < 2 * kCount; ++i) {
        ptx::mma_m16n8k16(of_stage[i % 2][i / 2], r[i % 2], dz[i / 2 * 2], dz[i / 2 * 2 + 1]);
      }
    }
    DSV4_UNROLL
    for (int i = 0; i < 2 * kCount * 4; ++i) {
      float& total = sum[i % 2][kFirst + i / 8][i / 2 % 4];
      total = ptx::add(total, of_stage[i % 2][i / 8][i / 2 % 4]);
    }
  }

  template <class Block>
  DSV4_DEVICE void step(const Block& block, uint32_t stage, int first, bool norm) {
    const StreamArguments& a = block.a;
    const int lane = ptx::thread_index() % 32, piece = column() / 8 + lane % 4;
    const int left = block.columns() - piece * 8;  // of the row, from this lane's piece on
    add_fn(stage);
    float sums[4][4];
    back(stage, block.mixed, sums);
    DSV4_UNROLL
    for (int half = 0; half < 2; ++half) {
      const int token = lane / 4 + 8 * half;
      float value[8], dx[8], r[8];
      DSV4_UNROLL
      for (int e = 0; e < 8; ++e) value[e] = sums[e / 2][2 * half + e % 2];
      if (norm) {
        load_mixed(block.mixed, token, piece, dx);
      } else {
        unpack(ptx::load_shared_16(Stage::address(stage, Stage::kGrad, token, piece)), dx);
      }
      unpack(ptx::load_shared_16(Stage::address(stage, stream(), token, piece)), r);
      add_terms<Stage>(stage, token, stream(), dx, r, value);
      if (a.grad_residual.given()) {
        unpack(ptx::load_shared_16(Stage::address(stage, kStreams + stream(), token, piece)), r);
        DSV4_UNROLL
        for (int e = 0; e < 8; ++e) value[e] = ptx::add(value[e], r[e]);
      }
      if (first + token < block.tokens() && left > 0) {
        bf16* row = row_of<bf16>(a.grad_streams, block.first_token() + first + token, stream());
        store_piece(row + block.first_column + piece * 8, 0, left, Block::kWhole, pack(value));
      }
    }
  }

  static DSV4_DEVICE void load_mixed(uint32_t mixed, int token, int piece, float (&dx)[8]) {
    DSV4_UNROLL
    for (int half = 0; half < 2; ++half) {
      float part[4];
      unpack(ptx::load_shared_16(mixed_address(mixed, token, 2 * piece + half)), part);
      DSV4_UNROLL
      for (int e = 0; e < 4; ++e) dx[4 * half + e] = part[e];
    }
  }

  DSV4_DEVICE void write(const StreamArguments& a, int64_t first_column, float* sums) const {
    const int lane = ptx::thread_index() % 32;
    DSV4_UNROLL
    for (int i = 0; i < 2 * kTiles * 4; ++i) {
      const int half = i / (kTiles * 4), tile = i / 4 % kTiles, j = i % 4;
      const int row = tile * 8 + lane % 4 * 2 + j % 2;
      const int64_t at = first_column + column() + half * 16 + lane / 4 + 8 * (j / 2);
      if (row < kMixes && at < a.hidden) {
        sums[row * kStreams * a.hidden + stream() * a.hidden + at] = sum[half][tile][j];
      }
    }
  }
};

template <int kMixes>
struct StreamColumns<float, kMixes> {
  using Stage = StreamStage<float, kMixes>;
  float fn[kMixes], sum[kMixes];

  static DSV4_DEVICE int stream() { return ptx::thread_index() / kStreamColumns; }
  static DSV4_DEVICE int column() { return ptx::thread_index() % kStreamColumns; }

  DSV4_DEVICE void begin(const StreamArguments& a, int64_t first_column, uint32_t) {
    const int64_t at = first_column + column();
    DSV4_UNROLL
    for (int row = 0; row < kMixes; ++row) {
      fn[row] = at < a.hidden ? a.fn.data[row * a.fn.stride[0] + stream() * a.hidden + at] : 0.0f;
      sum[row] = 0.0f;
    }
  }

  // One element of a row of a stage.
  static DSV4_DEVICE float element(uint32_t stage, int row, int token) {
    const uint32_t piece = Stage::address(stage, row, token, column() / 4);
    return ptx::load_shared_float(piece + static_cast<uint32_t>(column() % 4 * 4));
  }

  template <class Block>
  DSV4_DEVICE void token(const Block& block, uint32_t stage, int first, bool norm, int token) {
    const StreamArguments& a = block.a;
    const int64_t at = block.first_column + column();
    const float r[1] = {element(stage, stream(), token)};
    float value[1] = {0.0f}, dx[1];
    DSV4_UNROLL
    for (int four = 0; four < kMixes; four += 4) {
      float dz[4];
      const int offset = Stage::kFactors + token * Stage::kFactorBytes + four * 4;
      unpack(ptx::load_shared_16(stage + static_cast<uint32_t>(offset)), dz);
      DSV4_UNROLL
      for (int j = 0; j < 4; ++j) {
        value[0] = ptx::fma(dz[j], fn[four + j], value[0]);
        sum[four + j] = ptx::fma(dz[j], r[0], sum[four + j]);
      }
    }
    if (norm) {
      const uint32_t mixed = mixed_address(block.mixed, token, column() / 4);
      dx[0] = ptx::load_shared_float(mixed + static_cast<uint32_t>(column() % 4 * 4));
    } else {
      dx[0] = element(stage, Stage::kGrad, token);
    }
    add_terms<Stage>(stage, token, stream(), dx, r, value);
    if (a.grad_residual.given()) value[0] = ptx::add(value[0], element(stage, kStreams + stream(), token));
    if (first + token < block.tokens() && at < a.hidden) {
      row_of<float>(a.grad_streams, block.first_token() + first + token, stream())[at] = value[0];
    }
  }

  template <class Block>
  DSV4_DEVICE void step(const Block& block, uint32_t stage, int first, bool norm) {
    DSV4_UNROLL_IF(false)
    for (int pair = 0; pair < kStreamTokens; pair += 2) {
      token(block, stage, first, norm, pair);
      token(block, stage, first, norm, pair + 1);
    }
  }

  DSV4_DEVICE void write(const StreamArguments& a, int64_t first_column, float* sums) const {
    const int64_t at = first_column + column();
    if (at >= a.hidden) return;
    DSV4_UNROLL
    for (int row = 0; row < kMixes; ++row) sums[row * kStreams * a.hidden + stream() * a.hidden + at] = sum[row];
  }
};

template <class X, int kMixes, bool kVector>
DSV4_DEVICE void stream_columns(const StreamArguments& a, int64_t first_column, int64_t piece) {
  using Stage = StreamStage<X, kMixes>;
  const uint32_t stages = ptx::shared_base();
  const StreamBlock<X, kMixes, kVector> block{a, first_column, piece, stages + 2 * Stage::kBytes};
  const bool norm = kMixes != kStreams && a.norm_weight.given();
  StreamColumns<X, kMixes> columns;
  NormColumns<X> norm_columns;
  block.load(stages, 0);
  ptx::cp_async_commit();
  columns.begin(a, first_column, block.mixed);
  norm_columns.begin(a, first_column, block.mixed);
  int turn = 0;
  DSV4_UNROLL_IF(false)
  for (int first = 0; first < block.tokens(); first += kStreamTokens, turn ^= 1) {
    const uint32_t stage = stages + static_cast<uint32_t>(turn * Stage::kBytes);
    const int next = first + kStreamTokens;
    if (next < block.tokens()) block.load(stages + static_cast<uint32_t>((turn ^ 1) * Stage::kBytes), next);
    ptx::cp_async_commit();
    ptx::cp_async_wait<1>();
    ptx::sync_threads();  // the stage is whole
    if (norm) {
      norm_columns.make_mixed(block, stage);
      ptx::sync_threads();  // dx is whole
    }
    columns.step(block, stage, first, norm);
    ptx::sync_threads();  // both may be overwritten
  }
  if (a.fn_sums != nullptr) columns.write(a, first_column, a.fn_sums + piece * kMixes * kStreams * a.hidden);
  if (norm) norm_columns.write(block);
}

// The piece's sums of the tokens' records: every eighth token a warp, a column a lane.
DSV4_DEVICE void sum_records(const StreamArguments& a, int64_t piece) {
  constexpr int kWarps = kStreamThreads / 32;
  const int lane = ptx::thread_index() % 32, warp = ptx::thread_index() / 32;
  const int64_t first = piece * a.piece_tokens;
  const int64_t end = first + a.piece_tokens < a.tokens ? first + a.piece_tokens : a.tokens;
  TwoFloats sum = {0.0f, 0.0f};
  for (int64_t token = first + warp; token < end; token += kWarps) sum = add(sum, a.summed[token * kSummed + lane]);
  const uint32_t own = ptx::shared_base() + static_cast<uint32_t>(lane * 8);
  ptx::store_shared_8(own + static_cast<uint32_t>(warp * 256), {{bits_from_float(sum.high), bits_from_float(sum.low)}});
  ptx::sync_threads();
  if (warp != 0) return;
  sum = {0.0f, 0.0f};
  DSV4_UNROLL
  for (int other = 0; other < kWarps; ++other) {
    const ptx::Words2 words = ptx::load_shared_8(own + static_cast<uint32_t>(other * 256));
    sum = add(sum, {float_from_bits(words.word[0]), float_from_bits(words.word[1])});
  }
  const ptx::Words2 words = {{bits_from_float(sum.high), bits_from_float(sum.low)}};
  ptx::store_global_8(a.rest_sums + (piece * kSummed + lane) * 2, words);
}

// Grid: x over blocks of columns and one more for the records, y over pieces.
template <class X, int kMixes>
DSV4_DEVICE void stream_gradients(const StreamArguments& a) {
  const int64_t block = ptx::block_index_x(), piece = ptx::block_index_y();
  if (block == a.column_blocks) {
    sum_records(a, piece);
  } else if (a.vector) {
    stream_columns<X, kMixes, true>(a, block * kStreamColumns, piece);
  } else {
    stream_columns<X, kMixes, false>(a, block * kStreamColumns, piece);
  }
}

}  // namespace dsv4::sm80
