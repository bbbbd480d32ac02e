// The experts in AMX tiles. As in avx512/moe_panels.h weights take their scales while they expand, 1,024 inputs of 128
// outputs at a time into the second-level cache; here 16 outputs of 32 inputs make a tile, transposed as pairs. A step
// of 32 x 32 products is four tiles, and a tile register starts at zero with every chunk, so a result depends on its
// two rows alone. 16 rows of activations and fewer cost the same: every expansion of 16 x 32 weights takes some 60
// cycles (32 for the transposition) beside 16 for each product, so tokens that share an expert pay for it. Expected:
// 50 % of the tile peak at 64 rows an expert, 65 % at 256; one token, 3 bytes of FP4 codes a cycle and core. Plain
// matrices, the other scales, the activation and the quantiser are the AVX-512 kernel's.
#include "cpu/moe.h"

#include "cpu/amx/tile_product.h"
#include "cpu/avx512/moe_product.h"

namespace dsv4::DSV4_AMX_NAMESPACE {
namespace {

using avx512::kBlock, avx512::kBlockSteps, avx512::kChunk, avx512::kChunkBlocks, avx512::kStep;

template <class Panel>
class TileProduct : public avx512::Product<Panel> {
  using Base = avx512::Product<Panel>;
  using Base::codes, Base::count_, Base::expand_panel_, Base::in_, Base::kScales, Base::out_, Base::pack, Base::rows_;
  using typename Base::Four;
  using typename Base::Rows;

 public:
  static int64_t memory(int64_t in) {
    return round_up(Base::memory(in), 64) + kSide * kChunk * static_cast<int64_t>(sizeof(bf16));
  }

  TileProduct(const ExpertMatrix& w, int64_t expert, int64_t in, const uint8_t* const* x, int64_t count, float* out,
              uint8_t* memory)
      : Base(w, expert, in, x, count, out, memory),
        activations_(reinterpret_cast<bf16*>(memory + round_up(Base::memory(in), 64))) {}

  void run(int64_t row, int64_t rows) {
    this->row_ = row, this->rows_ = rows;
    if (!this->folds()) return this->multiply_and_scale();
    TileConfig config;
    for (int tile = 0; tile < kTiles; ++tile) config.set(tile, kTileRows, kTileBytes);
    tile_configure(config);
    const int64_t blocks = avx512::blocks_of(in_);
    for (int64_t first = 0; first < blocks; first += kChunkBlocks) {
      const int64_t some = blocks - first < kChunkBlocks ? blocks - first : kChunkBlocks;
      expand(first, some);
      for (int64_t m = 0; m < count_; m += kSide) {
        gather(m, first, some);
        for (int64_t r = 0; r < rows_; r += kSide) multiply(m, r, some * kBlockSteps, first == 0);
      }
    }
    tile_release();
  }

 private:
  // Blocks [first, first + blocks) of all weights: [output / 16][step][pair of inputs][output % 16][2].
  void expand(int64_t first, int64_t blocks) const {
    alignas(64) uint16_t scales[kTileRows][kChunkBlocks * 4];
    alignas(64) bf16 block[kBlockSteps][kTileRows][kStep];
    for (int64_t r = 0; r < rows_; r += kTileRows) {
      const int64_t left = rows_ - r < kTileRows ? rows_ - r : kTileRows;
      read_scales(r, left, first, blocks, scales);
      for (int64_t b = 0; b < blocks; ++b) {
        const int64_t bytes = Rows::bytes(in_) - (first + b) * Rows::kBlockBytes;
        for (int64_t i = 0; i < kTileRows; ++i) {
          // Beyond the last output the last once more: nothing that memory might hold gets into a tile.
          const int64_t mine = i < left ? i : left - 1;
          const uint8_t* from = codes(r + mine) + (first + b) * Rows::kBlockBytes;
          const uint16_t* scale = scales[mine] + 4 * b;
          const avx512::Block weights =
              bytes >= Rows::kBlockBytes ? expand_panel_.expand(from, scale) : expand_panel_.expand(from, scale, bytes);
          for (int j = 0; j < kBlockSteps; ++j) _mm512_store_si512(block[j][i], weights.w[j]);
        }
        for (int j = 0; j < kBlockSteps; ++j) {
          __m512i pairs[kTileRows];
          for (int i = 0; i < kTileRows; ++i) pairs[i] = _mm512_load_si512(block[j][i]);
          avx512::transpose(pairs);
          bf16* to = tile(r, b * kBlockSteps + j);
          for (int i = 0; i < kTileRows; ++i) _mm512_store_si512(to + i * kStep, pairs[i]);
        }
      }
    }
  }

  // Of 16 outputs, four at a time, from [block][row][4].
  void read_scales(int64_t r, int64_t left, int64_t first, int64_t blocks, uint16_t (*scales)[kChunkBlocks * 4]) const {
    if constexpr (!Panel::kScalesActivations) {
      alignas(64) uint16_t four[kChunkBlocks * 4 * avx512::kColumns];
      const int64_t stored = this->w_.scale.size(2) - first * kScales, most = blocks * kScales;
      for (int64_t n = 0; n < left; n += avx512::kColumns) {
        Panel::read_scales(Four(*this, r + n, first).scales, stored < most ? stored : most, four);
        for (int64_t i = 0; i < avx512::kColumns * blocks; ++i) {
          __builtin_memcpy(scales[n + i % avx512::kColumns] + i / avx512::kColumns * 4, four + 4 * i, 8);
        }
      }
    }
  }

  bf16* tile(int64_t r, int64_t step) const { return this->panel_ + r * kChunk + step * kTileElements; }

  // Up to 32 rows of activations: [row / 16][step][row % 16][32], zero beyond the last.
  void gather(int64_t m, int64_t first, int64_t blocks) const {
    const int64_t steps = blocks * kBlockSteps, left = count_ - m < kSide ? count_ - m : kSide;
    const int64_t rows = left > kTileRows ? kSide : kTileRows;
    for (int64_t i = 0; i < rows; ++i) {
      bf16* to = activations_ + i / kTileRows * kTileRows * kChunk + i % kTileRows * kStep;
      if (i < left) {
        pack(m + i, first * kBlockSteps, steps, to, kTileElements);
      } else {
        for (int64_t s = 0; s < steps; ++s) _mm512_store_si512(to + s * kTileElements, _mm512_setzero_si512());
      }
    }
  }

  void multiply(int64_t m, int64_t r, int64_t steps, bool first) const {
    alignas(64) float products[kSide][kSide];
    const TileSteps x[2] = {{activations_}, {activations_ + kTileRows * kChunk}};
    const TileSteps w[2] = {{tile(r, 0)}, {tile(r + kTileRows, 0)}};
    with_shape(count_ - m > kTileRows, rows_ - r > kTileRows, [&](auto shape) __attribute__((always_inline)) {
      zero_sums<shape.kRows, shape.kColumns>();
      add_products<shape.kRows, shape.kColumns>(x, w, steps);
      store_sums<shape.kRows, shape.kColumns>(products);
    });
    const int64_t columns = rows_ - r < kSide ? rows_ - r : kSide;
    for (int64_t i = 0; i < kSide && m + i < count_; ++i) {
      float* to = out_ + (m + i) * kMoeOutputs + r;
      avx512::Pair sums = avx512::load(products[i], columns);
      if (!first) {
        const avx512::Pair before = avx512::load(to, columns);
        sums = {_mm512_add_ps(before.a, sums.a), _mm512_add_ps(before.b, sums.b)};
      }
      avx512::store(to, sums, columns);
    }
  }

  bf16* activations_;
};

using Kernel = avx512::MoeKernel<TileProduct>;

}  // namespace

int64_t moe_experts_workspace_bytes(const MoeExpertsParams& p, const Context& c) { return moe_bytes<Kernel>(p, c); }
Status moe_experts(const MoeExpertsParams& p, const Context& c) { return moe_run<Kernel>(p, c); }

}  // namespace dsv4::DSV4_AMX_NAMESPACE
