// The linear layers in AMX tiles, for any number of rows: a tile unit's order of summation is its own, so rows that
// stand alone cannot go another way and keep their bits. That costs few rows nothing, because weights are the left
// operand here: 16 of their rows and 32 inputs make a tile as they expand, in registers, and only the activations,
// which are prepared once, have to be transposed into pairs. Up to 16 rows of those are the columns of a tile, which is
// as wide as there are rows. 512 weights take some 55 cycles to expand from e4m3, 28 from e2m1 (plain ones are copied:
// 16), and 16 for their products with 16 rows.
//
// A piece of work expands 512 inputs of 32 outputs at a time, 32 KiB in the first-level cache, and multiplies them with
// up to 512 rows, 32 at a time: 2 x 2 tiles of sums, which wait in memory for the next 512 inputs without losing their
// place in the order (sum = sum + 32 products, over all inputs). Of many rows a piece has 128 outputs, so that the
// activations of 512 inputs come into the second-level cache once for all four.
// Expected: the bandwidth of memory at few rows (a core takes 7 bytes of e4m3 codes a cycle, 5.8 of e2m1, 32 of plain
// weights), half of the tile peak at 64 rows, 80 % at 512: the other cycles expand weights and carry sums.
//
// Scales are e8m0 and go into the weights, exactly: 2^-60 to 1 with e4m3, 2^-63 to 2^63 with e2m1. 32 outputs with a
// scale beyond are multiplied row by row as the experts' are (avx512/weight_rows.h), slowly; quantisers do not produce
// them.
#include "cpu/linear.h"

#include "cpu/amx/tile_product.h"
#include "cpu/avx512/weight_rows.h"
#include "cpu/linear_driver.h"

namespace dsv4::DSV4_AMX_NAMESPACE {
namespace {

using avx512::Block, avx512::blocks_of, avx512::kBlock, avx512::kBlockSteps, avx512::kStep;

constexpr int64_t kInputs = 512;  // expanded at a time
constexpr int64_t kInputBlocks = kInputs / kBlock, kInputSteps = kInputs / kStep;
constexpr int64_t kMostRows = 512;  // whose sums wait in memory
constexpr int64_t kFewRows = 64;    // up to which pieces are small, for the threads' sake
constexpr int64_t kWide = 128;      // outputs of a piece of more

// Weights of a format: how 128 inputs of a row expand. kLeast to kMost are the scales that go into them.
template <class Rows>
struct Quantised : Rows {
  using Element = uint8_t;
  static constexpr int kLeast = avx512::kLeastScale, kMost = Rows::kMostScale;

  static void read_scales(const uint8_t* from, int64_t count, typename Rows::Scale* to) {
    Rows::fold(from, count, kInputBlocks * Rows::kScales, to);
  }
};
using Fp8Weights = Quantised<avx512::Fp8Rows>;
using Fp4Weights = Quantised<avx512::Fp4Rows>;

struct PlainWeights {
  using Element = bf16;
  using Scale = uint8_t;
  static constexpr int64_t kBlockBytes = kBlock * static_cast<int64_t>(sizeof(bf16)), kScales = 0;
  static constexpr int64_t bytes(int64_t inputs) { return inputs * static_cast<int64_t>(sizeof(bf16)); }

  static void read_scales(const uint8_t*, int64_t, Scale*) {}
  DSV4_MEMBER Block expand(const uint8_t* words, const Scale*) const {
    Block block;
    for (int64_t j = 0; j < kBlockSteps; ++j) block.w[j] = _mm512_loadu_si512(words + j * kTileBytes);
    return block;
  }
  DSV4_MEMBER Block expand(const uint8_t* words, const Scale*, int64_t count) const {
    Block block;
    for (int64_t j = 0; j < kBlockSteps; ++j) {
      block.w[j] = _mm512_maskz_loadu_epi8(avx512::mask64(count - j * kTileBytes), words + j * kTileBytes);
    }
    return block;
  }
  static void arrange(const bf16* x, bf16* to) { __builtin_memcpy(to, x, kBlock * sizeof(bf16)); }
};

template <class Weights, bool kQuantise>
class Kernel {
 public:
  static constexpr int64_t kUnit = kTileRows;
  static int64_t unit_bytes(const LinearParams& p) { return kUnit * row_bytes(p); }
  static int64_t panel(const LinearParams& p) { return p.x.size(0) <= kFewRows ? kSide : kWide; }
  static int64_t memory(const LinearParams& p) {
    return kSide * kInputs * static_cast<int64_t>(sizeof(bf16)) + panel(p) / kSide * pairs(p) * kSumsBytes +
           (Weights::kScales == 0 ? 0 : row_bytes(p) + scales_bytes(p));
  }

  // Up to 16 rows: [step][pair of inputs][row][2], in the order of the weights' inputs, zero beyond the last.
  static void prepare(const LinearParams& p, int64_t token, int64_t group, uint8_t* to) {
    const int64_t inputs = p.x.size(2), left = p.x.size(0) - token, rows = left < kUnit ? left : kUnit;
    uint32_t* pairs = reinterpret_cast<uint32_t*>(to);
    for (int64_t at = 0; at < inputs; at += kBlock) {
      const int64_t count = inputs - at < kBlock ? inputs - at : kBlock;
      alignas(64) bf16 blocks[kUnit][kBlock];
      for (int64_t i = 0; i < rows; ++i) {
        if (p.x.dtype == DType::kBFloat16) {
          arranged(p.x.as<const bf16>().at(token + i, group, at), count, blocks[i]);
        } else if constexpr (kQuantise) {
          arranged(p.x.as<const float>().at(token + i, group, at), count, blocks[i]);
        }
      }
      for (int64_t j = 0; j < kBlockSteps; ++j, pairs += kTileRows * rows) {
        __m512i words[kTileRows];
        for (int64_t i = 0; i < kTileRows; ++i) {
          words[i] = i < rows ? _mm512_load_si512(blocks[i] + j * kStep) : _mm512_setzero_si512();
        }
        if (rows == 1) {
          _mm512_storeu_si512(pairs, words[0]);
          continue;
        }
        avx512::transpose(words);
        for (int64_t k = 0; k < kTileRows; ++k) {
          _mm512_mask_storeu_epi32(pairs + k * rows, avx512::low16(rows), words[k]);
        }
      }
    }
  }

  Kernel(const LinearParams& p, uint8_t* memory)
      : p_(p),
        inputs_(p.x.size(2)),
        rows_(p.x.size(0)),
        weights_(reinterpret_cast<bf16*>(memory)),
        sums_(reinterpret_cast<Sums*>(weights_ + kSide * kInputs)),
        row_(reinterpret_cast<bf16*>(sums_ + panel(p) / kSide * pairs(p))),
        scales_(reinterpret_cast<float*>(reinterpret_cast<uint8_t*>(row_) + row_bytes(p))) {}

  void run(const uint8_t* units, int64_t group, int64_t begin, int64_t end) {
    const int64_t row = group * p_.weight.size(0) / p_.x.size(1) + begin;
    bool folded[kWide / kSide];
    for (int64_t side = 0; side * kSide < end - begin; ++side) {
      const Outputs out = outputs(group, begin, end, row, side);
      folded[side] = folds(out);
      if constexpr (Weights::kScales > 0) {
        if (!folded[side]) multiply_and_scale(units, out);
      }
    }
    columns_[0] = columns_[1] = 0;
    for (int64_t first = 0; first < rows_; first += kMostRows) {
      const int64_t last = rows_ - first < kMostRows ? rows_ : first + kMostRows;
      for (int64_t block = 0; block == 0 || block < blocks_of(inputs_); block += kInputBlocks) {
        for (int64_t side = 0; side * kSide < end - begin; ++side) {
          if (!folded[side]) continue;
          const Outputs out = outputs(group, begin, end, row, side);
          expand(out, block, end - begin);
          for (int64_t m = first; m < last; m += kSide) {
            multiply(units, m, out, block, sums_[side * pairs(p_) + (m - first) / kSide]);
          }
        }
      }
    }
    tile_release();
  }

 private:
  using Sums = float[kSide][kSide];  // [output][row of activations]
  static constexpr int64_t kSumsBytes = sizeof(Sums);

  // Outputs [first, first + count) of a group, whose weights begin at `row`; at most kSide.
  struct Outputs {
    int64_t group, first, count, row;
  };
  static Outputs outputs(int64_t group, int64_t begin, int64_t end, int64_t row, int64_t side) {
    const int64_t first = begin + side * kSide;
    return {group, first, end - first < kSide ? end - first : kSide, row + side * kSide};
  }

  static int64_t row_bytes(const LinearParams& p) {
    return blocks_of(p.x.size(2)) * kBlock * static_cast<int64_t>(sizeof(bf16));
  }
  static int64_t scales_bytes(const LinearParams& p) {
    return round_up(blocks_of(p.x.size(2)) * Weights::kScales * static_cast<int64_t>(sizeof(float)), 64);
  }
  static int64_t pairs(const LinearParams& p) {  // of tiles of rows
    const int64_t rows = p.x.size(0) < kMostRows ? p.x.size(0) : kMostRows;
    return (rows + kSide - 1) / kSide;
  }

  // Up to 128 activations in the order of the weights' inputs.
  template <class X>
  static void arranged(const X* x, int64_t count, bf16* to) {
    alignas(64) bf16 block[kBlock];
    if constexpr (kQuantise) {
      avx512::quantise_block(x, count, block);
    } else {
      for (int64_t at = 0; at < kBlock; at += kStep) {
        const int64_t left = count - at < 0 ? 0 : count - at > kStep ? kStep : count - at;
        _mm512_store_si512(block + at, _mm512_maskz_loadu_epi16(avx512::mask32(left), x + at));
      }
    }
    Weights::arrange(block, to);
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

  // Blocks [block, block + kInputBlocks) of the weights: [output / 16][step][output % 16][32]. Beyond the last output
  // it is there once more: nothing that memory might hold gets into a tile. `rows` of weights are the piece's.
  void expand(const Outputs& out, int64_t block, int64_t rows) const {
    const int64_t all = blocks_of(inputs_), left = all - block, blocks = left < kInputBlocks ? left : kInputBlocks;
    const int64_t bytes = Weights::bytes(inputs_) - block * Weights::kBlockBytes;
    const int64_t next = left > kInputBlocks ? kInputBlocks * Weights::kBlockBytes : -block * Weights::kBlockBytes;
    for (int64_t i = 0; i < round_up(out.count, kTileRows); ++i) {
      const int64_t row = out.row + (i < out.count ? i : out.count - 1);
      const uint8_t* from = codes(row) + block * Weights::kBlockBytes;
      const uint8_t* later = from + next + (next > 0 ? 0 : rows * p_.weight.stride[0] * kElementBytes);
      alignas(64) typename Weights::Scale scales[kInputBlocks * 4];
      if constexpr (Weights::kScales > 0) {
        const int64_t here = p_.scale.size(1) - block * Weights::kScales, most = kInputBlocks * Weights::kScales;
        Weights::read_scales(scale_row(row) + block * Weights::kScales, here < most ? here : most, scales);
      }
      bf16* to = weights_ + i / kTileRows * kTileRows * kInputs + i % kTileRows * kStep;
      for (int64_t b = 0; b < blocks; ++b, from += Weights::kBlockBytes, later += Weights::kBlockBytes) {
        avx512::ask(later, Weights::kBlockBytes);  // past the end it does nothing
        const typename Weights::Scale* scale = scales + b * Weights::kScales;
        const int64_t here = bytes - b * Weights::kBlockBytes;
        const Block w = here >= Weights::kBlockBytes ? expand_.expand(from, scale) : expand_.expand(from, scale, here);
        for (int64_t j = 0; j < kBlockSteps; ++j, to += kTileElements) _mm512_store_si512(to, w.w[j]);
      }
    }
  }

  // Tiles for rows of activations m and on: columns that are not there are not multiplied.
  void configure(int64_t first, int64_t second) {
    if (columns_[0] == first && columns_[1] == second) return;
    columns_[0] = first, columns_[1] = second;
    TileConfig config;
    for (int tile = 0; tile < 4; ++tile) {
      if (columns_[tile % 2] > 0) config.set(tile, kTileRows, static_cast<int>(columns_[tile % 2]) * 4);
    }
    config.set(4, kTileRows, kTileBytes);
    config.set(5, kTileRows, kTileBytes);
    for (int tile = 0; tile < 2; ++tile) {
      if (columns_[tile] > 0) config.set(6 + tile, kTileRows, static_cast<int>(columns_[tile]) * 4);
    }
    tile_configure(config);
  }

  int64_t columns_of(int64_t m) const { return rows_ - m < 0 ? 0 : rows_ - m < kUnit ? rows_ - m : kUnit; }
  const bf16* unit(const uint8_t* units, int64_t m) const {
    return reinterpret_cast<const bf16*>(units + m / kUnit * unit_bytes(p_));
  }

  // A range of inputs of up to 32 outputs with up to 32 rows of activations from m on.
  void multiply(const uint8_t* units, int64_t m, const Outputs& out, int64_t block, Sums& sums) {
    const int64_t left = blocks_of(inputs_) - block, steps = (left < kInputBlocks ? left : kInputBlocks) * kBlockSteps;
    configure(columns_of(m), columns_of(m + kUnit));
    const TileSteps w[2] = {{weights_}, {weights_ + kTileRows * kInputs}};
    TileSteps x[2] = {};
    for (int64_t i = 0; i < 2 && columns_[i] > 0; ++i) {
      const int64_t tile = columns_[i] * kStep;
      x[i] = {unit(units, m + i * kUnit) + block * kBlockSteps * tile, tile, columns_[i] * 4};
    }
    with_shape(out.count > kTileRows, columns_[1] > 0, [&](auto shape) __attribute__((always_inline)) {
      if (block == 0) {
        zero_sums<shape.kRows, shape.kColumns>();
      } else {
        load_sums<shape.kRows, shape.kColumns>(sums);
      }
      add_products<shape.kRows, shape.kColumns>(w, x, steps);
      store_sums<shape.kRows, shape.kColumns>(sums);
    });
    if (left > kInputBlocks) return;
    p_.out.dtype == DType::kBFloat16 ? put<bf16>(m, out, sums) : put<float>(m, out, sums);
  }

  template <class Y>
  void put(int64_t m, const Outputs& out, const Sums& sums) const {
    const View<Y, 3> to = p_.out.as<Y>();
    for (int64_t i = 0; i < 2 && columns_[i] > 0; ++i) {
      __m512i halves[2][kTileRows] = {};
      for (int64_t half = 0; half * kTileRows < out.count; ++half) {
        for (int64_t n = 0; n < kTileRows; ++n) {
          halves[half][n] =
              _mm512_maskz_loadu_epi32(avx512::low16(columns_[i]), sums[half * kTileRows + n] + i * kTileRows);
        }
        avx512::transpose(halves[half]);
      }
      for (int64_t row = 0; row < columns_[i]; ++row) {
        Y* place = to.at(m + i * kUnit + row, out.group, out.first);
        const avx512::Pair values = {_mm512_castsi512_ps(halves[0][row]), _mm512_castsi512_ps(halves[1][row])};
        avx512::store(place, avx512::arrange(values, place), out.count);
      }
    }
  }

  // Sums of blocks, each multiplied by its scale, one row of activations after another.
  void multiply_and_scale(const uint8_t* units, const Outputs& out) const {
    const int64_t words = blocks_of(inputs_) * kBlock / 2, padded = blocks_of(inputs_) * Weights::kScales;
    for (int64_t m = 0; m < rows_; ++m) {
      const int64_t i = m % kUnit, columns = columns_of(m - i);
      for (int64_t k = 0; k < words; ++k) __builtin_memcpy(row_ + 2 * k, unit(units, m) + 2 * (k * columns + i), 4);
      for (int64_t n = 0; n < out.count; ++n) {
        avx512::widen_scales(scale_row(out.row + n), p_.scale.size(1), padded, scales_);
        float sum;
        avx512::dot_row<1>(expand_, codes(out.row + n), Weights::bytes(inputs_), scales_, row_, 0, &sum);
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
  int64_t inputs_, rows_, columns_[2] = {};  // columns of the tiles now set up
  bf16* weights_;
  Sums* sums_;
  bf16* row_;
  float* scales_;
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
