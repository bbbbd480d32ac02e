// The linear layers in AMX tiles, for any number of rows: a tile unit's order of summation is its own, so rows that
// stand alone cannot go another way and keep their bits. That costs few rows nothing, because weights are the left
// operand here: 16 of their rows and 32 inputs make a tile as they expand, in registers, and only the activations,
// which are prepared once, have to be transposed into pairs. Up to 16 rows of those are the columns of a tile, which is
// as wide as there are rows.
//
// Up to 32 rows: 32 outputs after another, their sums (2 x 1 or 2 x 2 tiles) in tile registers over all inputs. While
// 128 inputs are multiplied, the weights of the next 128 expand into a second buffer, and those of three blocks later
// come from memory. Buffers are 16 KiB together: rows of codes lie powers of two apart and share a few sets of the
// first-level cache, out of which they would drive larger buffers.
//
// More rows: a job, a range of inputs of 32 outputs, is multiplied with 32 rows after another, and sums wait nearby
// without losing their place in the order (sum = sum + 32 products, over all inputs). While the activations fit the
// second-level cache, ranges have 256 inputs and follow each other along 32 outputs. Where they do not, 512 inputs of
// all outputs of a piece come first and then the next 512: each range of activations is read once a piece, and sums
// wait in the second-level cache. The weights of one job fill the first level then, so they expand before it; of e4m3
// and plain ones of fewer rows those of the next job expand beside the products; e2m1 gains nothing by that, since
// its tables and the tiles want the same load ports.
//
// The limit: of few rows memory with e4m3, with e2m1 the expansion and the loads of tiles, 43 and 20 cycles for 512
// weights where memory takes 50; of many rows the second-level cache, which brings a tile of activations for every two
// products (past the first level, where it would drive out weights), and the sums.
//
// Scales are e8m0 and go into the weights, exactly: 2^-63 to 1 with e4m3, 2^-63 to 2^63 with e2m1. 32 outputs with a
// scale beyond are multiplied row by row as the experts' are (avx512/weight_rows.h), slowly; quantisers do not produce
// them.
#include "cpu/linear.h"

#include "cpu/amx/linear_weights.h"
#include "cpu/amx/tile_product.h"
#include "cpu/linear_driver.h"

namespace dsv4::DSV4_AMX_NAMESPACE {
namespace {

using avx512::blocks_of;

constexpr int64_t kFewInputs = 256, kManyInputs = 512;  // of a job
constexpr int64_t kMostRows = 512;                      // whose sums wait in memory
constexpr int64_t kMostBytes = 5 << 18;                 // of activations that stay in the second-level cache, about
constexpr int64_t kWide = 512;                          // outputs of a piece, at most
constexpr int64_t kPieces = 4;                          // for each thread, at least
constexpr int64_t kAheadBlocks = 3;                     // of codes asked for before they expand, for few rows
constexpr int64_t kGapBytes = 16 << 10;

template <class Weights, bool kQuantise>
class Kernel {
 public:
  static constexpr int64_t kUnit = kTileRows;
  // An odd number of 16 KiB, so that the same inputs of many units spread over the sets of the second-level cache.
  static int64_t unit_bytes(const LinearParams& p) {
    const int64_t bytes = columns(p) * row_bytes(p);
    return p.x.size(0) <= kUnit ? bytes : (round_up(bytes, kGapBytes) / kGapBytes | 1) * kGapBytes;
  }
  // Large pieces have long runs of weights and use activations often; every thread shall have some of them.
  static int64_t panel(const LinearParams& p, int64_t threads) {
    const int64_t share = p.weight.size(0) / (kPieces * threads) / kSide * kSide;
    return share < kSide ? kSide : share < kWide ? share : kWide;
  }
  static int64_t rows(const LinearParams&) { return kAllRows; }
  static int64_t memory(const LinearParams& p) {
    const int64_t sides = many(p) ? kWide / kSide : 1;
    return 2 * kSide * inputs_of_job(p) * static_cast<int64_t>(sizeof(bf16)) + sides * pairs(p) * kSumsBytes +
           (Weights::kScales == 0 ? 0 : row_bytes(p) + scales_bytes(p));
  }

  // Up to 16 rows: [step][pair of inputs][row][2], in the order of the weights' inputs, zero beyond the last.
  static void prepare(const LinearParams& p, int64_t token, int64_t group, uint8_t* to) {
    if (p.x.dtype == DType::kBFloat16) {
      prepare_rows<bf16>(p, token, group, to);
    } else if constexpr (kQuantise) {
      prepare_rows<float>(p, token, group, to);
    }
  }

  Kernel(const LinearParams& p, uint8_t* memory)
      : p_(p),
        inputs_(p.x.size(2)),
        rows_(p.x.size(0)),
        columns_(columns(p)),
        whole_(inputs_ / kBlock),
        many_(many(p)),
        beside_(!many_ && Weights::kScales != 4),
        range_(inputs_of_job(p)),
        ranges_(inputs_ <= range_ ? 1 : (inputs_ + range_ - 1) / range_),
        unit_stride_(round_up(unit_bytes(p), 64)),
        weights_(reinterpret_cast<bf16*>(memory)),
        sums_(reinterpret_cast<Sums*>(weights_ + 2 * kSide * range_)),
        row_(reinterpret_cast<bf16*>(sums_ + (many_ ? kWide / kSide : 1) * pairs(p))),
        scales_(reinterpret_cast<float*>(reinterpret_cast<uint8_t*>(row_) + row_bytes(p))) {}

  void run(const uint8_t* units, const LinearPiece& piece) {
    const int64_t row = piece.group * p_.weight.size(0) / p_.x.size(1) + piece.begin;
    piece_ = {piece.group, piece.begin, piece.end - piece.begin, row};
    sides_ = checked_ = 0;
    configure();
    if (rows_ <= kSide && !many_) {
      multiply_few(units);
    } else {
      find_sides(units, kWide / kSide);
      for (int64_t first = 0; first < rows_ && sides_ > 0; first += kMostRows) {
        multiply_rows(units, first, rows_ - first < kMostRows ? rows_ : first + kMostRows);
      }
    }
    tile_release();
  }

 private:
  using Sums = float[kSide][kSide];  // [output][row of activations]
  static constexpr int64_t kSumsBytes = sizeof(Sums);

  // Outputs [first, first + count) of a group, whose weights begin at `row`: a piece, or a side of it, at most kSide.
  struct Outputs {
    int64_t group, first, count, row;
  };
  // Looks through the piece until there are `count` sides whose scales fold. Others are multiplied at once.
  __attribute__((noinline)) void find_sides(const uint8_t* units, int64_t count) {
    for (; sides_ < count && checked_ * kSide < piece_.count; ++checked_) {
      const int64_t first = checked_ * kSide, left = piece_.count - first;
      const Outputs out = {piece_.group, piece_.first + first, left < kSide ? left : kSide, piece_.row + first};
      if (folds(out)) {
        side_[sides_++] = out;
      } else if constexpr (Weights::kScales > 0) {
        multiply_and_scale(units, out);
      }
    }
  }

  static int64_t row_bytes(const LinearParams& p) {
    return blocks_of(p.x.size(2)) * kBlock * static_cast<int64_t>(sizeof(bf16));
  }
  static int64_t scales_bytes(const LinearParams& p) {
    return round_up(blocks_of(p.x.size(2)) * Weights::kScales * static_cast<int64_t>(sizeof(float)), 64);
  }
  static int64_t columns(const LinearParams& p) { return p.x.size(0) < kUnit ? p.x.size(0) : kUnit; }  // of a unit
  // Whether the activations are too many to stay in the second-level cache.
  static bool many(const LinearParams& p) { return p.x.size(0) > kMostRows || p.x.size(0) * row_bytes(p) > kMostBytes; }
  static int64_t inputs_of_job(const LinearParams& p) { return many(p) ? kManyInputs : kFewInputs; }
  static int64_t pairs(const LinearParams& p) {  // of units
    return ((p.x.size(0) < kMostRows ? p.x.size(0) : kMostRows) + kSide - 1) / kSide;
  }

  template <class X>
  static void prepare_rows(const LinearParams& p, int64_t token, int64_t group, uint8_t* to) {
    const int64_t inputs = p.x.size(2), left = p.x.size(0) - token, rows = left < kUnit ? left : kUnit;
    const int64_t width = columns(p);
    for (int64_t at = 0; at < inputs; at += kBlock, to += width * kBlock * static_cast<int64_t>(sizeof(bf16))) {
      const int64_t count = inputs - at < kBlock ? inputs - at : kBlock;
      if (width == 1) {
        alignas(64) bf16 block[kBlock];
        read_block(p.x.as<const X>().at(token, group, at), count, block);
        Weights::arrange(block, reinterpret_cast<bf16*>(to));
        continue;
      }
      alignas(64) uint32_t pairs[kBlockSteps][kUnit][kTileRows];
      for (int64_t i = 0; i < kUnit; ++i) {
        read_pairs(p.x.as<const X>().at(token + (i < rows ? i : 0), group, at), i < rows ? count : 0, pairs, i);
      }
      for (int64_t j = 0; j < kBlockSteps; ++j) {
        __m512i words[kTileRows];
        for (int64_t i = 0; i < kTileRows; ++i) words[i] = _mm512_load_si512(pairs[j][i]);
        avx512::transpose(words);
#pragma GCC unroll 16
        for (int64_t i = 0; i < kTileRows; ++i) {
          _mm512_mask_storeu_epi32(to + 4 * width * Weights::place(j, i), avx512::low16(width), words[i]);
        }
      }
    }
  }

  // Up to 128 activations, quantised or not, in the order of memory.
  template <class X>
  static void read_block(const X* x, int64_t count, bf16* to) {
    if constexpr (kQuantise) {
      avx512::quantise_block(x, count, to);
    } else {
      for (int64_t at = 0; at < kBlock; at += kStep) _mm512_store_si512(to + at, read_step(x, count, at));
    }
  }
  static __m512i read_step(const bf16* x, int64_t count, int64_t at) {
    const int64_t left = count - at < 0 ? 0 : count - at > kStep ? kStep : count - at;
    return _mm512_maskz_loadu_epi16(avx512::mask32(left), x + at);
  }
  // The same as pairs of row i.
  template <class X>
  DSV4_MEMBER static void read_pairs(const X* x, int64_t count, uint32_t (*to)[kUnit][kTileRows], int64_t i) {
    if constexpr (kQuantise) {
      avx512::Pair values[kBlockSteps];
      avx512::quantise_values(x, count, values);
      for (int64_t j = 0; j < kBlockSteps; ++j) {
        const bool apart = sizeof(X) == sizeof(bf16);
        const avx512::Pair value = apart ? values[j] : avx512::arrange(values[j], static_cast<const bf16*>(nullptr));
        _mm512_store_si512(to[j][i], Weights::pairs(value));
      }
    } else {
      for (int64_t j = 0; j < kBlockSteps; ++j) _mm512_store_si512(to[j][i], read_step(x, count, j * kStep));
    }
  }

  const uint8_t* codes(int64_t row) const {
    return reinterpret_cast<const uint8_t*>(p_.weight.as<const typename Weights::Element>().at(row));
  }
  const uint8_t* scale_row(int64_t row) const {
    return p_.scale.as<const uint8_t>().at(Weights::kScales == 1 ? row / 128 : row);
  }

  // Whether the scales of these outputs go into their weights: a matter of the weights alone.
  bool folds(const Outputs& out) const {
    __mmask64 beyond = 0;
    if constexpr (Weights::kScales > 0) {
      const __m512i least = _mm512_set1_epi8(Weights::kLeast),
                    most = _mm512_set1_epi8(static_cast<char>(Weights::kMost));
      for (int64_t r = 0; r < out.count; r += Weights::kScales == 1 ? 128 - (out.row + r) % 128 : 1) {
        const uint8_t* scales = scale_row(out.row + r);
        for (int64_t i = 0; i < p_.scale.size(1); i += 64) {
          const __m512i some = _mm512_mask_loadu_epi8(least, avx512::mask64(p_.scale.size(1) - i), scales + i);
          beyond |= _mm512_cmplt_epu8_mask(some, least) | _mm512_cmpgt_epu8_mask(some, most);
        }
      }
    }
    return beyond == 0;
  }

  // A range of inputs of up to 32 outputs.
  struct Job {
    const Outputs* out;
    bool first, last;  // of the ranges
    int64_t side, block;
  };
  int64_t steps(const Job& job) const {
    const int64_t left = blocks_of(inputs_) - job.block, most = range_ / kBlock;
    return (left < most ? left : most) * kBlockSteps;
  }

  // The weights of a job on their way to [output / 16][step][output % 16][32], a row at a time.
  struct Expansion {
    const Outputs* out;
    int64_t block, blocks;  // the job's inputs
    int64_t ahead;          // bytes from its codes to those of the job after it
    int64_t row, rows;
    bf16* to;
  };
  void begin(const Job& job, const Job& after, bf16* to) {
    const int64_t blocks = steps(job) / kBlockSteps, rows = blocks == 0 ? 0 : round_up(job.out->count, kTileRows);
    const int64_t ahead =
        codes(after.out->row) - codes(job.out->row) + (after.block - job.block) * Weights::kBlockBytes;
    expansion_ = {job.out, job.block, blocks, ahead, 0, rows, to};
  }
  __attribute__((noinline)) void expand(int64_t rows) {
    const Expansion e = expansion_;
    const int64_t end = e.rows - e.row < rows ? e.rows : e.row + rows;
    expansion_.row = end;
    if (e.block + e.blocks <= whole_ && e.blocks == kFewInputs / kBlock) {
      expand_rows<kFewInputs / kBlock>(*e.out, e.row, end, e.block, e.ahead, e.to, range_);
    } else if (e.block + e.blocks <= whole_ && e.blocks == kManyInputs / kBlock) {
      expand_rows<kManyInputs / kBlock>(*e.out, e.row, end, e.block, e.ahead, e.to, range_);
    } else {
      for (int64_t b = 0; b < e.blocks; ++b) {
        expand_rows<1>(*e.out, e.row, end, e.block + b, e.ahead, e.to + b * kBlockSteps * kTileElements, range_);
      }
    }
  }
  // Blocks of some outputs. Beyond the last output it is there once more: nothing that memory might hold gets into a
  // tile.
  template <int64_t kBlocks>
  DSV4_MEMBER void expand_rows(const Outputs& out, int64_t row, int64_t end, int64_t block, int64_t ahead, bf16* buffer,
                               int64_t range) const {
    if (kBlocks == 1 && block >= whole_) return expand_last_rows(out, row, end, buffer, range);
    const Weights expand = expand_;  // in registers
    const int64_t stride = p_.weight.stride[0] * kElementBytes, scale_stride = p_.scale.stride[0];
    const int64_t last = out.count - 1, first = out.row + (row < last ? row : last);
    const uint8_t *from = codes(first) + block * Weights::kBlockBytes, *scales = nullptr;
    if constexpr (Weights::kScales > 0) scales = scale_row(first) + block * Weights::kScales;
    bf16* to = tile_row(buffer, row, range);
    while (row < end) {
#pragma GCC unroll 4
      for (int64_t b = 0; b < kBlocks; ++b) {
        avx512::ask(from + b * Weights::kBlockBytes + ahead, Weights::kBlockBytes);
        put_block(expand.expand(from + b * Weights::kBlockBytes, StoredScales{scales + b * Weights::kScales}),
                  to + b * kBlockSteps * kTileElements);
      }
      if (row < last) {
        from += stride;
        if (Weights::kScales == 4 || (Weights::kScales == 1 && (out.row + row + 1) % 128 == 0)) scales += scale_stride;
      }
      to += kStep;
      if (++row == kTileRows) to = tile_row(buffer, row, range);
    }
  }
  static bf16* tile_row(bf16* buffer, int64_t row, int64_t range) {
    return buffer + (row < kTileRows ? 0 : kTileRows * (range - kStep)) + row * kStep;
  }
  // Of the last block, where it is not whole.
  __attribute__((noinline)) void expand_last_rows(const Outputs& out, int64_t row, int64_t end, bf16* buffer,
                                                  int64_t range) const {
    for (; row < end; ++row) {
      const int64_t at = out.row + (row < out.count ? row : out.count - 1), first = whole_ * Weights::kScales;
      uint8_t some[4] = {Weights::kLeast, Weights::kLeast, Weights::kLeast, Weights::kLeast};
      for (int64_t n = 0; first + n < p_.scale.size(1); ++n) some[n] = scale_row(at)[first + n];
      const int64_t done = whole_ * Weights::kBlockBytes, bytes = Weights::bytes(inputs_) - done;
      put_block(expand_.expand(codes(at) + done, StoredScales{some}, bytes), tile_row(buffer, row, range));
    }
  }
  DSV4_MEMBER static void put_block(const Block& w, bf16* to) {
    for (int64_t j = 0; j < kBlockSteps; ++j) _mm512_store_si512(to + j * kTileElements, w.w[j]);
  }

  void configure() const {
    TileConfig config;
    for (int tile = 0; tile < kTiles; ++tile) {
      config.set(tile, kTileRows, tile == 4 || tile == 5 ? kTileBytes : static_cast<int>(columns_) * 4);
    }
    tile_configure(config);
  }

  const bf16* unit(const uint8_t* units, int64_t m) const {
    return reinterpret_cast<const bf16*>(units + m / kUnit * unit_stride_);
  }

  // One side after another, or of many rows one range of inputs after another.
  Job job(int64_t index) const {
    const int64_t side = many_ ? index % sides_ : index / ranges_, range = many_ ? index / sides_ : index % ranges_;
    return {side_ + side, range == 0, range + 1 == ranges_, side, range * range_ / kBlock};
  }
  // multiply(job, its weights) for every job in order. Of many rows the weights of two jobs would not fit the
  // first-level cache, and expand before their job; of fewer beside the one before it.
  template <class Multiply>
  void pipeline(const Multiply& multiply) {
    const int64_t jobs = sides_ * ranges_;
    for (int64_t j = beside_ ? -1 : 0; j < jobs; ++j) {
      const int64_t coming = beside_ ? j + 1 : j;
      if (coming < jobs) begin(job(coming), job(coming + 1 < jobs ? coming + 1 : coming), buffer(coming));
      if (!beside_ || j < 0) expand(kAll);
      if (j < 0) continue;
      multiply(job(j), buffer(j));
      expand(kAll);  // what is left
    }
  }
  static constexpr int64_t kAll = kSide;
  bf16* buffer(int64_t job) const { return weights_ + (beside_ ? job % 2 * kSide * range_ : 0); }

  // A block of inputs of a side on its way to [output / 16][step][output % 16][32].
  struct Next {
    const Outputs* out;           // null: there is none
    int64_t block, ahead, share;  // share: outputs to expand beside one of the four steps
    bf16* to;
  };
  Next next(int64_t side, int64_t block, int64_t blocks, bf16* to) const {
    if (block == blocks) {
      ++side;
      block = 0;
    }
    if (side >= sides_) return {};
    const Outputs* out = side_ + side;
    const int64_t later = block + kAheadBlocks;
    int64_t ahead = kAheadBlocks * Weights::kBlockBytes;
    if (later >= blocks) {
      ahead =
          side + 1 < sides_ ? codes(out[1].row) - codes(out->row) + (later - blocks - block) * Weights::kBlockBytes : 0;
    }
    return {out, block, ahead, out->count > kTileRows ? 8 : 4, to};
  }
  __attribute__((noinline)) void expand(const Next& e, int64_t step) const {
    expand_rows<1>(*e.out, step * e.share, (step + 1) * e.share, e.block, e.ahead, e.to, kBlock);
  }

  // A block's share of those that are looked at after this side; of e4m3 there are few.
  DSV4_MEMBER void ask_for_scales(int64_t block) const {
    if constexpr (Weights::kScales == 4) {
      avx512::ask(scale_row(piece_.row + checked_ * kSide) + block * kSide * Weights::kScales,
                  kSide * Weights::kScales);
    }
  }

  // Up to 32 rows: a side after another, block by block over all inputs, while the next block expands.
  void multiply_few(const uint8_t* units) {
    const int64_t blocks = blocks_of(inputs_), tile = columns_ * kStep;
    const bool two = rows_ > kUnit;
    int64_t turn = 0;
    const auto buffer = [&] { return weights_ + turn * kSide * kBlock; };
    find_sides(units, 2);
    if (blocks > 0 && sides_ > 0) {
      const Next e = next(0, 0, blocks, buffer());
      for (int64_t s = 0; s < kBlockSteps; ++s) expand(e, s);
    }
    for (int64_t side = 0; side < sides_; ++side) {
      find_sides(units, side + 3);  // `next` looks at two more
      with_shape(side_[side].count > kTileRows, two, [&](auto shape) __attribute__((always_inline)) {
        zero_sums<shape.kRows, shape.kColumns>();
        for (int64_t block = 0; block < blocks; ++block) {
          const TileSteps w[2] = {{buffer()}, {buffer() + kTileRows * kBlock}};
          TileSteps x[2] = {};
          for (int64_t i = 0; i < 1 + two; ++i) {
            x[i] = {unit(units, i * kUnit) + block * kBlockSteps * tile, tile, columns_ * 4};
          }
          turn = 1 - turn;
          const Next e = next(side, block + 1, blocks, buffer());
          ask_for_scales(block);
          const auto between = [&](int64_t s) __attribute__((always_inline)) {
            if (e.out != nullptr) expand(e, s);
          };
          if (columns_ == kUnit) {
            add_products<shape.kRows, shape.kColumns, true>(w, x, kBlockSteps, between);
          } else {
            add_products<shape.kRows, shape.kColumns>(w, x, kBlockSteps, between);
          }
        }
        store_sums<shape.kRows, shape.kColumns>(sums_[0]);
      });
      write(0, side_[side], sums_[0]);
    }
  }

  // Rows [first, last), whose sums wait in memory for the next range of inputs. Results of many rows, which lie pages
  // apart, are written when all outputs of a row are there.
  void multiply_rows(const uint8_t* units, int64_t first, int64_t last) {
    const int64_t pairs = (last - first + kSide - 1) / kSide;
    pipeline([&](const Job& job, const bf16* weights) {
      const int64_t rows = expansion_.rows - expansion_.row;
      for (int64_t m = first; m < last; m += kSide) {
        Sums& sums = sums_[(many_ ? job.side * pairs : 0) + (m - first) / kSide];
        multiply(units, m, job, weights, (rows + pairs - 1) / pairs, sums);
        if (job.last && !many_) write(m, *job.out, sums);
      }
    });
    if (!many_) return;
    for (int64_t m = first; m < last; m += kSide) {
      for (int64_t side = 0; side < sides_; ++side) write(m, side_[side], sums_[side * pairs + (m - first) / kSide]);
    }
  }

  // A step's share of those of the next rows, into the first-level cache.
  DSV4_INLINE void ask_for_sums(const Sums* sums, int64_t step) {
    constexpr int64_t kShare = kSumsBytes / (kManyInputs / kStep);
    const uint8_t* from = reinterpret_cast<const uint8_t*>(sums) + step * kShare;
    for (int64_t at = 0; at < kShare; at += 64) _mm_prefetch(from + at, _MM_HINT_T0);
  }

  // A job with up to 32 rows of activations from m on, while `rows` of the next one's weights expand.
  DSV4_MEMBER void multiply(const uint8_t* units, int64_t m, const Job& job, const bf16* weights, int64_t rows,
                            Sums& sums) {
    const int64_t count = steps(job), some = count == 0 ? 0 : (rows + count - 1) / count, tile = columns_ * kStep;
    const TileSteps w[2] = {{weights}, {weights + kTileRows * range_}};
    TileSteps x[2] = {};
    const bool two = rows_ - m > kUnit;
    for (int64_t i = 0; i < 1 + two; ++i) {
      x[i] = {unit(units, m + i * kUnit) + job.block * kBlockSteps * tile, tile, columns_ * 4};
    }
    with_shape(job.out->count > kTileRows, two, [&](auto shape) __attribute__((always_inline)) {
      job.first ? zero_sums<shape.kRows, shape.kColumns>() : load_sums<shape.kRows, shape.kColumns>(sums);
      const auto between = [&](int64_t s) __attribute__((always_inline)) {
        if (many_) ask_for_sums(&sums + 1, s);
        if (s * some < rows) expand(some);
      };
      if (columns_ == kUnit) {
        add_products<shape.kRows, shape.kColumns, true>(w, x, count, between);
      } else {
        add_products<shape.kRows, shape.kColumns>(w, x, count, between);
      }
      store_sums<shape.kRows, shape.kColumns>(sums);
    });
  }

  void write(int64_t m, const Outputs& out, const Sums& sums) const {
    p_.out.dtype == DType::kBFloat16 ? put<bf16>(m, out, sums) : put<float>(m, out, sums);
  }

  // Sums lie by output, results by row: bfloat16 is turned over as pairs of neighbouring outputs.
  template <class Y>
  void put(int64_t m, const Outputs& out, const Sums& sums) const {
    const View<Y, 3> to = p_.out.as<Y>();
    for (int64_t i = 0; i < 2 && rows_ - m > i * kUnit; ++i) {
      const int64_t rows = rows_ - m - i * kUnit < kUnit ? rows_ - m - i * kUnit : kUnit;
      const auto outputs = [&](int64_t n) __attribute__((always_inline)) {
        return _mm512_maskz_loadu_ps(avx512::low16(rows), sums[n] + i * kTileRows);
      };
      __m512i words[2][kTileRows];
      for (int64_t n = 0; n < kTileRows; ++n) {
        if constexpr (sizeof(Y) == sizeof(bf16)) {
          words[0][n] = avx512::pack({outputs(2 * n), outputs(2 * n + 1)});
        } else {
          words[0][n] = _mm512_castps_si512(outputs(n));
          words[1][n] = _mm512_castps_si512(outputs(kTileRows + n));
        }
      }
      avx512::transpose(words[0]);
      if constexpr (sizeof(Y) != sizeof(bf16)) avx512::transpose(words[1]);
      for (int64_t row = 0; row < rows; ++row) {
        Y* place = to.at(m + i * kUnit + row, out.group, out.first);
        if constexpr (sizeof(Y) == sizeof(bf16)) {
          _mm512_mask_storeu_epi16(place, avx512::mask32(out.count), words[0][row]);
        } else {
          avx512::store(place, {_mm512_castsi512_ps(words[0][row]), _mm512_castsi512_ps(words[1][row])}, out.count);
        }
      }
    }
  }

  // Sums of blocks, each multiplied by its scale, one row of activations after another.
  void multiply_and_scale(const uint8_t* units, const Outputs& out) const {
    const int64_t words = blocks_of(inputs_) * kBlock / 2, padded = blocks_of(inputs_) * Weights::kScales;
    for (int64_t m = 0; m < rows_; ++m) {
      const int64_t i = m % kUnit;
      for (int64_t k = 0; k < words; ++k) __builtin_memcpy(row_ + 2 * k, unit(units, m) + 2 * (k * columns_ + i), 4);
      for (int64_t k = 0; k < words * 2; k += kBlock) Weights::restore(row_ + k);
      for (int64_t n = 0; n < out.count; ++n) {
        avx512::widen_scales(scale_row(out.row + n), p_.scale.size(1), padded, scales_);
        float sum;
        avx512::dot_row<1, typename Weights::Rows>(expand_, codes(out.row + n), Weights::bytes(inputs_), scales_, row_,
                                                   0, &sum);
        if (p_.out.dtype == DType::kBFloat16) {
          *p_.out.as<bf16>().at(m, out.group, out.first + n) = bf16_from_float(sum);
        } else {
          *p_.out.as<float>().at(m, out.group, out.first + n) = sum;
        }
      }
    }
  }

  static constexpr int64_t kElementBytes = sizeof(typename Weights::Element);

  const LinearParams& p_;
  const Weights expand_{};
  int64_t inputs_, rows_, columns_, whole_;  // whole_: blocks of 128 inputs
  bool many_, beside_;                       // beside_: weights expand while those before them are multiplied
  int64_t range_, ranges_, unit_stride_;     // inputs of a job, and such ranges
  bf16* weights_;                            // of two jobs
  Sums* sums_;
  bf16* row_;
  float* scales_;
  Outputs piece_{};
  Outputs side_[kWide / kSide];      // those whose scales fold, as far as they were looked for
  int64_t sides_ = 0, checked_ = 0;  // checked_: of the piece's sides
  Expansion expansion_{};
};

using Fp8 = Kernel<Fp8Weights, true>;
using Fp4 = Kernel<Fp4Weights, true>;
using Grouped = Kernel<Fp8Weights, false>;
using Dense = Kernel<PlainWeights, false>;

AnyView<3> one_group(const AnyView<2>& rows) {
  return {rows.data, rows.dtype, {rows.shape[0], 1, rows.shape[1]}, {rows.stride[0], 0, rows.stride[1]}};
}
LinearParams as_linear(const DenseLinearParams& p) {
  return {one_group(p.x), p.weight, {}, one_group(p.out), p.workspace};
}

}  // namespace

int64_t fp8_linear_workspace_bytes(const LinearParams& p, const Context& c) {
  return linear_workspace_bytes<Fp8>(p, c);
}
int64_t fp4_linear_workspace_bytes(const LinearParams& p, const Context& c) {
  return linear_workspace_bytes<Fp4>(p, c);
}
int64_t grouped_linear_workspace_bytes(const LinearParams& p, const Context& c) {
  return linear_workspace_bytes<Grouped>(p, c);
}
Status fp8_linear(const LinearParams& p, const Context& c) { return run_linear<Fp8>(p, c); }
Status fp4_linear(const LinearParams& p, const Context& c) { return run_linear<Fp4>(p, c); }
Status grouped_linear(const LinearParams& p, const Context& c) { return run_linear<Grouped>(p, c); }

int64_t dense_linear_workspace_bytes(const DenseLinearParams& p, const Context& c) {
  return linear_workspace_bytes<Dense>(as_linear(p), c);
}
Status dense_linear(const DenseLinearParams& p, const Context& c) { return run_linear<Dense>(as_linear(p), c); }

}  // namespace dsv4::DSV4_AMX_NAMESPACE
