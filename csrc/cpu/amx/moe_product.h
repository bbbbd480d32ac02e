// Outputs of an expert's matrices for that expert's rows of activations, in tiles. Weights are the left operand:
// 16 of their rows and 32 inputs make a tile as they expand. A row's sums go sum = sum + 32 products over all inputs in
// order, so a result depends on its two rows alone. Two ways, the same bits:
// * up to 32 rows of activations: 32 outputs go through all their inputs with the sums in tile registers, 128 inputs
//   being expanded while those before are multiplied.
// * more: a panel of 512 inputs of 32 outputs, 32 KiB, meets all rows, 32 at a time, whose sums wait in memory. As the
//   last of them leave it, the next panel is expanded in its place, in lines that the first-level cache has.
// Outputs expand singly, between two tile instructions. A product with its loads takes p0 and p5 some 14 times, an
// output 17 times, so the two overlap only in part: 8 outputs and two by two products 113 to 129 cycles, 75 and 81
// alone, but 185 one after the other, when the next products are further ahead than the processor looks. Rows of e2m1,
// 64 bytes a block, are asked for 32 outputs ahead; longer pieces it fetches better itself.
#pragma once

#include "cpu/amx/tile_product.h"
#include "cpu/avx512/code_tiles.h"
#include "cpu/moe_driver.h"

namespace dsv4::DSV4_AMX_NAMESPACE {
namespace {

using avx512::Block, avx512::blocks_of, avx512::kBlock, avx512::kBlockSteps, avx512::kStep;

constexpr int64_t kUnit = kTileRows;  // rows of activations of a tile
constexpr int64_t kPanelBlocks = 4, kPanelSteps = kPanelBlocks * kBlockSteps;
constexpr int64_t kPanelElements = kSide * kPanelSteps * kStep;
constexpr int64_t kScaledRows = 4;  // rows of activations that are multiplied at a time where scales do not fold

constexpr int64_t moe_row_bytes(int64_t in) {
  return (in + kBlock - 1) / kBlock * kBlock * static_cast<int64_t>(sizeof(bf16));
}

// Rows of activations of one expert, 16 of them a unit: [unit][step][pair of inputs][row][2]; a unit has as many rows
// as are left. What follows the last is read, 64 bytes of it, and does not count.
struct ExpertRows {
  const uint8_t* data;
  int64_t row_bytes, count;

  int64_t columns(int64_t unit) const { return count - unit * kUnit < kUnit ? count - unit * kUnit : kUnit; }
  const bf16* unit(int64_t index) const { return reinterpret_cast<const bf16*>(data + index * kUnit * row_bytes); }
};

// Sums of a product: [row / 32][output][row % 32].
inline constexpr int64_t kSumsOfSide = kMoeOutputs * kSide;

// Weights of a format: how 128 inputs of a row expand.
struct Fp8Tiles : avx512::Fp8Rows {
  using Rows = avx512::Fp8Rows;
  template <class... Count>
  DSV4_MEMBER Block expand(const uint8_t* codes, const Scale* scale, const Shared& shared, Count... count) const {
    const Packed packed = load(codes, scale, count...);
    Block block;
    half<0, true>(packed, shared, block.w);
    half<1, true>(packed, shared, block.w + 2);
    return block;
  }
};

// avx512::Fp4Rows with tables of bytes, in the same order. A permutation of 16-bit elements keeps two ports busy here
// and one of bytes a single one, so both bytes of a value are looked up: a nibble is brought into both bytes of a word,
// with a bit for the upper one. 8.5 cycles for 128 inputs instead of 12.
class Fp4Tiles {
 public:
  using Rows = avx512::Fp4Rows;
  using Scale = Rows::Scale;
  struct Shared {};
  static constexpr int64_t kBlockBytes = Rows::kBlockBytes, kScales = Rows::kScales;
  static constexpr int64_t bytes(int64_t inputs) { return Rows::bytes(inputs); }

  Fp4Tiles() {
    alignas(64) uint8_t table[64] = {}, even[64], odd[64], spread[64];
    for (int i = 0; i < 64; ++i) {
      if (i < 32) table[i] = static_cast<uint8_t>(i < 16 ? avx512::kE2m1[i] : avx512::kE2m1[i - 16] >> 8);
      even[i] = static_cast<uint8_t>(i % 16 / 2 * 2), odd[i] = static_cast<uint8_t>(even[i] + 1);
      spread[i] = static_cast<uint8_t>(2 * (i / 16) + i % 2);
    }
    table_ = _mm512_load_si512(table), even_ = _mm512_load_si512(even), odd_ = _mm512_load_si512(odd);
    spread_ = _mm512_load_si512(spread);
  }

  DSV4_MEMBER Shared share(const Scale*) const { return {}; }
  DSV4_MEMBER Block expand(const uint8_t* codes, const Scale* scale, const Shared&) const {
    return expand(_mm512_loadu_si512(codes), scale);
  }
  DSV4_MEMBER Block expand(const uint8_t* codes, const Scale* scale, const Shared&, int64_t count) const {
    return expand(_mm512_maskz_loadu_epi8(avx512::mask64(count), codes), scale);
  }

 private:
  DSV4_MEMBER Block expand(__m512i codes, const Scale* scale) const {
    int64_t four;
    __builtin_memcpy(&four, scale, sizeof(four));
    const __m512i less = _mm512_shuffle_epi8(_mm512_set1_epi64(four), spread_);  // group g lies in lane g
    const auto value = [&](__m512i words) __attribute__((always_inline)) {
      const __m512i index =
          _mm512_ternarylogic_epi32(words, _mm512_set1_epi16(0x0F0F), _mm512_set1_epi16(0x1000), 0xEA);
      return _mm512_subs_epu16(_mm512_permutexvar_epi8(index, table_), less);
    };
    const __m512i even = _mm512_shuffle_epi8(codes, even_), odd = _mm512_shuffle_epi8(codes, odd_);
    return {{value(even), value(_mm512_srli_epi16(even, 4)), value(odd), value(_mm512_srli_epi16(odd, 4))}};
  }

  __m512i table_, even_, odd_, spread_;
};

struct PlainTiles {
  using Scale = uint8_t;
  struct Shared {};
  static constexpr int64_t kBlockBytes = kBlock * static_cast<int64_t>(sizeof(bf16)), kScales = 0;
  static constexpr int64_t bytes(int64_t inputs) { return inputs * static_cast<int64_t>(sizeof(bf16)); }

  DSV4_MEMBER Shared share(const Scale*) const { return {}; }
  DSV4_MEMBER Block expand(const uint8_t* words, const Scale*, const Shared&) const {
    Block block;
    for (int64_t j = 0; j < kBlockSteps; ++j) block.w[j] = _mm512_loadu_si512(words + j * kTileBytes);
    return block;
  }
  DSV4_MEMBER Block expand(const uint8_t* words, const Scale*, const Shared&, int64_t count) const {
    Block block;
    for (int64_t j = 0; j < kBlockSteps; ++j) {
      block.w[j] = _mm512_maskz_loadu_epi8(avx512::mask64(count - j * kTileBytes), words + j * kTileBytes);
    }
    return block;
  }
};

// load_sums of what will not be needed again soon.
template <int kRows, int kColumns>
DSV4_INLINE void stream_sums(const float (*from)[kSide]) {
  constexpr int64_t kStride = sizeof(from[0]);
  tile_load_once<0>(from[0], kStride);
  if constexpr (kColumns == 2) tile_load_once<1>(from[0] + kTileRows, kStride);
  if constexpr (kRows == 2) tile_load_once<2>(from[kTileRows], kStride);
  if constexpr (kRows == 2 && kColumns == 2) tile_load_once<3>(from[kTileRows] + kTileRows, kStride);
}

// Where an expert's row of a matrix begins.
inline const uint8_t* row_codes(const ExpertMatrix& w, int64_t expert, int64_t row) {
  const int64_t size = w.format == WeightFormat::kPlain ? static_cast<int64_t>(sizeof(bf16)) : 1;
  return static_cast<const uint8_t*>(w.data.data) + (expert * w.data.stride[0] + row * w.data.stride[1]) * size;
}

// Where the scales of an e2m1 row begin; they are as long as codes are in cold memory, and asked for too.
inline const uint8_t* row_scales(const ExpertMatrix& w, int64_t expert, int64_t row) {
  if (w.format != WeightFormat::kFp4 || w.scale.dtype != DType::kUInt8) return nullptr;
  return w.scale.as<const uint8_t>().at(expert, row);
}

// What will be wanted next: codes, and the scales of as many strips.
struct Later {
  const uint8_t *codes, *scales[2];
};

// The tiles of a product with `count` rows: no more columns than there are.
DSV4_INLINE void configure_tiles(int64_t count) {
  const int columns = static_cast<int>(count < kUnit ? count : kUnit) * 4;
  TileConfig config;
  for (int tile = 0; tile < kTiles; ++tile) {
    config.set(tile, kTileRows, tile == 4 || tile == 5 ? kTileBytes : columns);
  }
  tile_configure(config);
}

// Outputs [row, row + rows), at most 128, from a multiple of 128 on, and where their sums go.
struct Strip {
  const ExpertMatrix* w;
  int64_t row, rows;
  float* sums;
};
inline constexpr int kStrips = 2;

// Strips of matrices of one format that read the same activations.
template <class Weights>
class TileProduct {
  using Scale = typename Weights::Scale;

 public:
  static int64_t memory(int64_t in) {
    return kPanelElements * static_cast<int64_t>(sizeof(bf16)) + kScaledRows * moe_row_bytes(in) +
           kStrips * kMoeOutputs * scale_stride(in) * static_cast<int64_t>(sizeof(uint16_t));
  }

  TileProduct(int64_t expert, int64_t in, const ExpertRows& x, uint8_t* memory)
      : expert_(expert),
        in_(in),
        blocks_(blocks_of(in)),
        x_(x),
        panel_(reinterpret_cast<bf16*>(memory)),
        near_(panel_ + kPanelElements),
        scales_(reinterpret_cast<Scale*>(memory + kPanelElements * static_cast<int64_t>(sizeof(bf16)) +
                                         kScaledRows * moe_row_bytes(in))) {}

  void run(const Strip* strips, int count, const Later& later) {
    next_ = later.codes;
    for (int i = 0; i < count; ++i) {
      Part part{strips[i], scales_ + count_ * kMoeOutputs * scale_stride(in_), later.scales[i]};
      if (part.rows <= 0) continue;
      if constexpr (Weights::kScales > 0) {
        if (!fold(part)) {
          multiply_and_scale(part);
          continue;
        }
      }
      parts_[count_++] = part;
    }
    if (count_ > 0) x_.count > kSide ? many() : few();
  }

 private:
  struct Part : Strip {
    Scale* scales;  // as weights take them
    const uint8_t* later_scales;
  };

  static int64_t scale_stride(int64_t in) { return round_up(blocks_of(in) * 4, 32); }

  static int64_t stride(const Part& p) { return row_codes(*p.w, 0, 1) - row_codes(*p.w, 0, 0); }
  const uint8_t* codes(const Part& p, int64_t r) const { return row_codes(*p.w, expert_, p.row + r); }
  static int64_t scale_index(const Part& p, int64_t r) { return Weights::kScales == 1 ? (p.row + r) / 128 : p.row + r; }

  // Brings the scales to the form in which weights take them; false where they are not powers of two of its range,
  // which is a matter of these weights alone.
  bool fold(const Part& p) const {
    const AnyView<3>& scale = p.w->scale;
    if (scale.dtype != DType::kUInt8) return false;
    const int64_t rows = Weights::kScales == 1 ? 1 : p.rows, stride = scale_stride(in_);
    const auto fold = [&](int64_t r, int64_t count, int64_t padded) {
      return Weights::Rows::fold(scale.as<const uint8_t>().at(expert_, scale_index(p, r)), count, padded,
                                 p.scales + r * stride);
    };
    if (scale.stride[1] == stride && scale.size(2) == stride) return fold(0, rows * stride, rows * stride);
    bool all = true;
    for (int64_t r = 0; r < rows; ++r) all &= fold(r, scale.size(2), blocks_ * Weights::kScales);
    return all;
  }

  // 32 outputs. Beyond the last it is there once more: nothing that memory might hold gets into a tile.
  struct Outputs {
    const uint8_t* codes[kSide];
    const Scale* scales[kSide];
  };
  void outputs_of(const Part& p, int64_t r, Outputs& o) const {
    for (int64_t i = 0; i < kSide; ++i) {
      const int64_t mine = r + i < p.rows ? r + i : p.rows - 1;
      o.codes[i] = codes(p, mine);
      o.scales[i] = p.scales + (Weights::kScales == 1 ? 0 : mine * scale_stride(in_));
    }
  }

  // A block of outputs that is expanded, the first of them at codes[0], to the same rows of four tiles. What lies at
  // `ahead`, and again `apart` bytes further, may be asked for.
  struct Expansion {
    const uint8_t* const* codes;
    const Scale* const* scales;
    int64_t block;
    bf16* to;
    const uint8_t* ahead;
    int64_t apart;
  };
  bool is_whole(int64_t block) const { return (block + 1) * Weights::kBlockBytes <= Weights::bytes(in_); }

  // Whether what lies ahead is asked for, in many() or few(). Longer pieces of rows the processor fetches itself.
  template <bool kMany>
  static constexpr bool kAsks = Weights::kBlockBytes <= kTileBytes * (kMany ? 2 : 1);

  // Output `i` of it; `left` bytes of codes, if it is not a whole block.
  template <bool kMany, class... Left>
  DSV4_MEMBER static void expand_row(const Weights& weights, const typename Weights::Shared& shared, const Expansion& e,
                                     int64_t i, Left... left) {
    if (kAsks<kMany>) avx512::ask(e.ahead + i * e.apart, Weights::kBlockBytes);  // past the end it does nothing
    const Block w = weights.expand(e.codes[i] + e.block * Weights::kBlockBytes,
                                   e.scales[i] + e.block * Weights::kScales, shared, left...);
#pragma GCC unroll 4
    for (int64_t j = 0; j < kBlockSteps; ++j) _mm512_store_si512(e.to + i * kStep + j * kTileElements, w.w[j]);
  }
  DSV4_MEMBER static typename Weights::Shared share(const Weights& weights, const Expansion& e) {
    return weights.share(e.scales[0] + e.block * Weights::kScales);
  }

  // Outputs [0, count).
  template <bool kMany>
  DSV4_MEMBER void expand(const Weights& weights, const Expansion& e, int64_t count) const {
    const typename Weights::Shared shared = share(weights, e);
    const int64_t left = Weights::bytes(in_) - e.block * Weights::kBlockBytes;
    for (int64_t i = 0; i < count; ++i) {
      is_whole(e.block) ? expand_row<kMany>(weights, shared, e, i) : expand_row<kMany>(weights, shared, e, i, left);
    }
  }

  template <int kTile, bool kMany>
  DSV4_MEMBER static void load_x(TileSteps& x) {
    if constexpr (kMany) {
      tile_load_once<kTile>(x.data, x.stride);
    } else {
      tile_load<kTile>(x.data, x.stride);
    }
    x.data += x.step;
  }

  // One step: tiles of weights at `w` and `w2` with those of two units. between(i) runs after the i-th of the kOps
  // tile instructions.
  template <int kRows, int kColumns>
  static constexpr int kOps = kRows + kColumns + kRows * kColumns;
  template <int kRows, int kColumns, bool kMany, class Between>
  DSV4_MEMBER static void step(const void* w, const void* w2, TileSteps& x, TileSteps& x2, const Between& between) {
    load_x<6, kMany>(x);
    between(avx512::Constant<0>{});
    tile_load<4>(w, kTileBytes);
    between(avx512::Constant<1>{});
    tile_dot<0, 4, 6>();
    between(avx512::Constant<2>{});
    if constexpr (kColumns == 2) {
      load_x<7, kMany>(x2);
      between(avx512::Constant<3>{});
      tile_dot<1, 4, 7>();
      between(avx512::Constant<4>{});
    }
    if constexpr (kRows == 2) {
      constexpr int kFirst = 1 + 2 * kColumns;
      tile_load<5>(w2, kTileBytes);
      between(avx512::Constant<kFirst>{});
      tile_dot<2, 5, 6>();
      between(avx512::Constant<kFirst + 1>{});
      if constexpr (kColumns == 2) {
        tile_dot<3, 5, 7>();
        between(avx512::Constant<kFirst + 2>{});
      }
    }
  }
  template <int kRows, int kColumns, bool kMany>
  DSV4_MEMBER static void step(const void* w, const void* w2, TileSteps& x, TileSteps& x2) {
    step<kRows, kColumns, kMany>(w, w2, x, x2, [](auto) {});
  }
  // The same while kCount outputs of a whole block are expanded, an output or two after every tile instruction: more
  // together, and the processor looks no further ahead than one of the two.
  template <int kRows, int kColumns, bool kMany, int kCount>
  DSV4_MEMBER static void step_and_expand(const void* w, const void* w2, TileSteps& x, TileSteps& x2,
                                          const Weights& weights, const Expansion& e) {
    const typename Weights::Shared shared = share(weights, e);
    step<kRows, kColumns, kMany>(w, w2, x, x2, [&](auto op) __attribute__((always_inline)) {
      constexpr int kAll = kOps<kRows, kColumns>, kOp = decltype(op)::value;
#pragma GCC unroll 8
      for (int i = kCount * kOp / kAll; i < kCount * (kOp + 1) / kAll; ++i) {
        expand_row<kMany>(weights, shared, e, i);
      }
    });
  }

  // A unit's tiles from a block on.
  TileSteps operand(int64_t unit, int64_t block) const {
    const int64_t columns = x_.columns(unit);
    if (columns <= 0) return {};
    return {x_.unit(unit) + block * kBlockSteps * columns * kStep, columns * kStep, columns * 4};
  }

  static float (*sums_of(const Part& p, int64_t side, int64_t r))
      [kSide] { return reinterpret_cast<float (*)[kSide]>(p.sums + side * kSumsOfSide + r * kSide); }

  void few() const {
    for (int i = 0; i < count_; ++i) {
      const Part& p = parts_[i];
      for (int64_t r = 0; r < p.rows; r += kSide) {
        // The next 32 outputs are asked for in four runs side by side, in the order of memory each: the processor looks
        // ahead of every run by itself, so that 6 to 12 % more arrive than of a single one.
        const uint8_t* ahead = r + kSide < p.rows ? codes(p, r + kSide)
                               : i + 1 < count_   ? codes(parts_[i + 1], 0)
                                                  : next_;
        with_shape(p.rows - r > kTileRows, x_.count > kUnit, [&](auto shape) __attribute__((always_inline)) {
          multiply_through<shape.kRows, shape.kColumns>(p, r, ahead);
        });
      }
    }
  }

  template <int kRows, int kColumns>
  void multiply_through(const Part& p, int64_t r, const uint8_t* ahead) const {
    constexpr int64_t kHeight = kRows * kTileRows, kQuarter = kHeight / kBlockSteps;
    const Weights made, weights = made;  // the copy stays in registers: no tile instruction can write to it
    const int64_t blocks = blocks_, whole_blocks = Weights::bytes(in_) / Weights::kBlockBytes;
    bf16* const panel = panel_;
    TileSteps x = operand(0, 0), x2 = operand(1, 0);
    Outputs outputs;
    outputs_of(p, r, outputs);
    const auto expansion = [&](int64_t block, int64_t first) __attribute__((always_inline)) {
      bf16* to =
          panel + block % 2 * kSide * kBlock + first / kTileRows * kTileRows * kBlock + first % kTileRows * kStep;
      const Expansion e{outputs.codes + first,
                        outputs.scales + first,
                        block,
                        to,
                        ahead + (first * blocks + block * kQuarter) * Weights::kBlockBytes,
                        Weights::kBlockBytes};
      return e;
    };
    const uint8_t* later_scales = p.later_scales + r * blocks * Weights::kScales;
    zero_sums<kRows, kColumns>();
    int64_t block = 0;
    for (int64_t first = 0; block < blocks && first < kHeight; first += kQuarter) {
      expand<false>(weights, expansion(block, first), kQuarter);
    }
    for (; block < blocks; ++block) {
      const bf16* w = panel + block % 2 * kSide * kBlock;
      if (Weights::kScales > 1)
        avx512::ask(later_scales + block * kHeight * Weights::kScales, kHeight * Weights::kScales);
      for (int64_t j = 0; j < kBlockSteps; ++j, w += kTileElements) {
        const bf16* w2 = w + kTileRows * kBlock;
        if (block + 1 < whole_blocks) {
          step_and_expand<kRows, kColumns, false, kQuarter>(w, w2, x, x2, weights, expansion(block + 1, j * kQuarter));
        } else {
          step<kRows, kColumns, false>(w, w2, x, x2);
          if (block + 1 < blocks) expand<false>(weights, expansion(block + 1, j * kQuarter), kQuarter);
        }
      }
    }
    store_sums<kRows, kColumns>(sums_of(p, 0, r));
  }

  // Without inputs.
  void zero() const {
    for (int i = 0; i < count_; ++i) {
      for (int64_t side = 0; side * kSide < x_.count; ++side) {
        memset(sums_of(parts_[i], side, 0), 0, static_cast<size_t>(parts_[i].rows) * kSide * sizeof(float));
      }
    }
  }

  // A panel: 32 outputs and 512 inputs.
  struct Panel {
    const Part* part = nullptr;
    int64_t first = 0, blocks = 0, r = 0;  // blocks of inputs, output
    int64_t index = 0;                     // of the panels of these inputs
    const uint8_t* codes = nullptr;
  };
  int64_t panels() const {  // of the same inputs
    int64_t all = 0;
    for (int i = 0; i < count_; ++i) all += (parts_[i].rows + kSide - 1) / kSide;
    return all;
  }
  Panel panel_after(const Panel& p) const {
    Panel next = p;
    next.r += kSide, ++next.index;
    if (next.r >= p.part->rows) {
      next.r = 0;
      if (++next.part == parts_ + count_) {
        next.part = parts_, next.index = 0, next.first += kPanelBlocks;
      }
    }
    const int64_t left = blocks_ - next.first;
    next.blocks = left < 0 ? 0 : left < kPanelBlocks ? left : kPanelBlocks;
    next.codes = left > 0 ? codes(*next.part, next.r) + next.first * Weights::kBlockBytes : next_;
    return next;
  }

  // One of its blocks from an output on; the same of the panel after it are asked for.
  DSV4_MEMBER Expansion expansion(const Panel& p, const Outputs& outputs, const Panel& later, int64_t block,
                                  int64_t first) const {
    const int64_t apart = stride(*later.part);
    bf16* to = panel_ + first / kTileRows * kTileRows * kPanelSteps * kStep + block * kBlockSteps * kTileElements +
               first % kTileRows * kStep;
    return {outputs.codes + first,
            outputs.scales + first,
            p.first + block,
            to,
            later.codes + first * apart + block * Weights::kBlockBytes,
            apart};
  }

  void many() const {
    if (blocks_ == 0) return zero();
    const Weights weights;
    const int64_t all = panels() * ((blocks_ + kPanelBlocks - 1) / kPanelBlocks);
    const int64_t sides = (x_.count + kSide - 1) / kSide;
    Panel p;
    p.part = parts_, p.blocks = blocks_ < kPanelBlocks ? blocks_ : kPanelBlocks, p.codes = codes(parts_[0], 0);
    Panel next = panel_after(p);
    Outputs outputs;  // of the panel that is expanded
    outputs_of(*p.part, p.r, outputs);
    for (int64_t block = 0; block < p.blocks; ++block) {
      for (int64_t first = 0; first < kSide; first += kTileRows) {
        expand<true>(weights, expansion(p, outputs, next, block, first), kTileRows);
      }
    }
    for (int64_t index = 0; index < all; ++index) {
      const Panel later = next.blocks > 0 ? panel_after(next) : next;
      if (next.blocks > 0) outputs_of(*next.part, next.r, outputs);
      for (int64_t side = 0; side < sides; ++side) {
        with_shape(p.part->rows - p.r > kTileRows, x_.count - side * kSide > kUnit,
                   [&](auto shape) __attribute__((always_inline)) {
                     if (side + 1 < sides) {
                       multiply<shape.kRows, shape.kColumns, false>(weights, p, side, next, outputs, later);
                     } else {
                       multiply<shape.kRows, shape.kColumns, true>(weights, p, side, next, outputs, later);
                     }
                   });
      }
      p = next, next = later;
    }
  }

  // A panel with one side of activations. The last one leaves the next panel in its place, a block behind: those are
  // lines that the first-level cache has, and units multiply meanwhile. Every panel asks for its share of the next
  // inputs of these activations, and every side for the sums of the next one.
  template <int kRows, int kColumns, bool kLast>
  void multiply(const Weights& made, const Panel& p, int64_t side, const Panel& next, const Outputs& outputs,
                const Panel& later) const {
    const Weights weights = made;  // the copy stays in registers: no tile instruction can write to it
    TileSteps x = operand(2 * side, p.first), x2 = operand(2 * side + 1, p.first);
    float (*sums)[kSide] = sums_of(*p.part, side, p.r);
    const float* later_sums = kLast ? sums_of(*next.part, 0, next.r)[0] : sums[0] + kSumsOfSide;
    if (p.first == 0) {
      zero_sums<kRows, kColumns>();
    } else {
      stream_sums<kRows, kColumns>(sums);
    }
    constexpr int64_t kQuarter = kSide / kBlockSteps, kLines = 2, kSumsOfStep = kSide * kSide / kPanelSteps;
    // After the last inputs come the first ones again, for the next strips of this expert.
    const int64_t later_steps = p.first + kPanelBlocks < blocks_ ? kPanelSteps : -p.first * kBlockSteps;
    const int64_t ahead = later_steps * x.step + kLines * kStep * p.index;
    const int64_t ahead2 = later_steps * x2.step + kLines * kStep * p.index;
    const bool asks = kLines * p.index < kTileRows;
    const bf16* w = panel_;
    for (int64_t block = 0; block < p.blocks; ++block) {
      for (int64_t j = 0; j < kBlockSteps; ++j, w += kTileElements) {
        if (asks) {
          avx512::ask(reinterpret_cast<const uint8_t*>(x.data + ahead), kLines * kTileBytes);
          if (kColumns == 2) avx512::ask(reinterpret_cast<const uint8_t*>(x2.data + ahead2), kLines * kTileBytes);
        }
        const bf16* w2 = w + kTileRows * kPanelSteps * kStep;
        for (int64_t i = 0; i < kSumsOfStep; i += 16) _mm_prefetch(later_sums + i, _MM_HINT_T0);
        later_sums += kSumsOfStep;
        if (kLast && block > 0 && block <= next.blocks) {
          const Expansion e = expansion(next, outputs, later, block - 1, j * kQuarter);
          if (is_whole(e.block)) {
            step_and_expand<kRows, kColumns, true, kQuarter>(w, w2, x, x2, weights, e);
          } else {
            step<kRows, kColumns, true>(w, w2, x, x2);
            expand<true>(weights, e, kQuarter);
          }
        } else {
          step<kRows, kColumns, true>(w, w2, x, x2);
        }
      }
    }
    for (int64_t first = 0; kLast && p.blocks <= next.blocks && first < kSide; first += kTileRows) {
      expand<true>(weights, expansion(next, outputs, later, p.blocks - 1, first), kTileRows);
    }
    store_sums<kRows, kColumns>(sums);
  }

  // Sums of blocks, each multiplied by its scale.
  void multiply_and_scale(const Part& p) const {
    const int64_t width = moe_row_bytes(in_) / static_cast<int64_t>(sizeof(bf16)), padded = blocks_ * Weights::kScales;
    const AnyView<3>& scale = p.w->scale;
    float* scales = reinterpret_cast<float*>(p.scales);
    for (int64_t m = 0; m < x_.count; m += kScaledRows) {
      const int64_t some = x_.count - m < kScaledRows ? x_.count - m : kScaledRows;
      for (int64_t i = 0; i < some; ++i) {
        const int64_t columns = x_.columns((m + i) / kUnit);
        const bf16* from = x_.unit((m + i) / kUnit) + 2 * ((m + i) % kUnit);
        for (int64_t k = 0; k < width / 2; ++k) {
          __builtin_memcpy(near_ + i * width + 2 * k, from + 2 * k * columns, 2 * sizeof(bf16));
        }
      }
      for (int64_t r = 0; r < p.rows; ++r) {
        if (scale.dtype == DType::kUInt8) {
          avx512::widen_scales(scale.as<const uint8_t>().at(expert_, scale_index(p, r)), scale.size(2), padded, scales);
        } else {
          avx512::widen_scales(scale.as<const float>().at(expert_, scale_index(p, r)), scale.size(2), padded, scales);
        }
        float sums[kScaledRows];
        const typename Weights::Rows rows;
        avx512::with_constant<kScaledRows>(some, [&](auto height) {
          avx512::dot_row<decltype(height)::value>(rows, codes(p, r), Weights::bytes(in_), scales, near_, width, sums);
        });
        for (int64_t i = 0; i < some; ++i) sums_of(p, (m + i) / kSide, r)[0][(m + i) % kSide] = sums[i];
      }
    }
  }

  int64_t expert_, in_, blocks_;
  const ExpertRows x_;
  Part parts_[kStrips];
  int count_ = 0;
  const uint8_t* next_ = nullptr;
  bf16 *panel_, *near_;
  Scale* scales_;
};

}  // namespace
}  // namespace dsv4::DSV4_AMX_NAMESPACE
