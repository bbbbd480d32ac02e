// WeightTile (cuda/sm80/weight_tile.h) for many tokens on Hopper: 128 rows x 128 tokens by two warpgroups, 64 rows
// each, and the same definition of a sum: blocks of 128 inputs, each multiplied by its scale, added one after another
// in float32.
//
// Weights are turned into bfloat16 in registers, where a warpgroup's product takes its left operand from; activations
// come from shared memory, in the order of the product's steps (InputOrder::kSteps), 64 inputs a row of 128 bytes with
// the swizzle that the product asks for. cp.async fills stages ahead of their use, with one barrier a block. Codes are
// expanded while the products of the steps before run. For 128 x 128 x 128 the tensor cores need
// 1,024 clocks; 85 FLOP a byte from L2 with FP8 weights.
#pragma once

#include "cuda/common/wgmma.h"
#include "cuda/sm80/weight_tile.h"

namespace dsv4::sm90 {

using namespace sm80;

template <WeightForm kForm_, int kStages_>
struct GroupShape {
  static constexpr WeightForm kForm = kForm_;
  static constexpr int kRows = 128, kTokens = 128, kThreads = 256, kStages = kStages_, kWarpsK = 1;
  static constexpr int kWeightBytes = kRows * WeightUnit<kForm>::kRowBytes;  // of a block
  static constexpr int kTokenBytes = kBlockInputs * 2;                       // of a block of a token
  static constexpr int kBlockBytes = kWeightBytes + kTokens * kTokenBytes;
  static constexpr int kAlignment = 1024;  // of the swizzle's pattern
  static constexpr int kSharedBytes = kStages * kBlockBytes + kAlignment;
  static_assert(kWeightBytes % kAlignment == 0);

  // Each half of a block is a matrix of its own; rows that are eight apart lie alike.
  static constexpr int kHalfBytes = kTokens * 128, kTokenStep = 128;
  static DSV4_DEVICE constexpr int token_place(int row, int piece) {
    return piece / 8 * kHalfBytes + row * 128 + (piece % 8 ^ row % 8) * 16;
  }
};

template <class Shape_>
class GroupTile {
 public:
  using Shape = Shape_;
  static constexpr WeightForm kForm = Shape::kForm;
  using Unit = WeightUnit<kForm>;
  static constexpr int kFragments = Shape::kTokens / 8;

  DSV4_DEVICE GroupTile() : lane_(ptx::thread_index() % 32), first_row_(ptx::thread_index() / 32 * 16) {
    start_ = (ptx::shared_base() + Shape::kAlignment - 1) / Shape::kAlignment * Shape::kAlignment;
  }

  // Calls use(row, token, sum) for this thread's results; rows and tokens of the tile.
  template <class Use>
  DSV4_DEVICE void each(const Use& use) const {
    DSV4_UNROLL
    for (int i = 0; i < 4 * kFragments; ++i) {
      use(first_row_ + i % 4 / 2 * 8 + lane_ / 4, i / 4 * 8 + lane_ % 4 * 2 + i % 2, sum_[i / 4][i % 4]);
    }
  }

  // x: of one plane.
  template <class Weights>
  DSV4_DEVICE void run(const Weights& weights, const ActivationRows& x) {
    const int blocks = static_cast<int>((x.inputs + kBlockInputs - 1) / kBlockInputs);
    DSV4_UNROLL
    for (int i = 0; i < 4 * kFragments; ++i) sum_[i / 4][i % 4] = 0.0f;
    TileScales<kForm, 1> scales = {};
    scales.load(weights, first_row_, 0, blocks);
    const WeightCopies<Shape, Weights> weight_copies(weights);
    const TokenCopies<Shape> token_copies(x);
    const auto load = [&](int block, int slot) {
      if (block < blocks) {
        weight_copies.load(weights, block, stage(slot));
        token_copies.load(x, block, 0, stage(slot));
      }
      ptx::cp_async_commit();
    };
    DSV4_UNROLL_IF(false)
    for (int i = 0; i < Shape::kStages - 1; ++i) load(i, i);
    int slot = 0;
    DSV4_UNROLL_IF(false)
    for (int block = 0; block < blocks; ++block) {
      ptx::cp_async_wait<Shape::kStages - 2>();
      ptx::fence_async_proxy();
      ptx::sync_threads();  // the stage is whole, the one before it done with
      load(block + Shape::kStages - 1, slot == 0 ? Shape::kStages - 1 : slot - 1);
      scales.open(weights.any().wide_scales);
      scales.load(weights, first_row_, block + 1, blocks);
      multiply(stage(slot), scales);
      close(scales);
      slot = slot + 1 == Shape::kStages ? 0 : slot + 1;
    }
  }

 private:
  static constexpr int kBlockUnits = 2 * kUnits;

  DSV4_DEVICE uint32_t stage(int slot) const { return start_ + static_cast<uint32_t>(slot * Shape::kBlockBytes); }

  // A block: of each unit two steps of 16 inputs. The operands of a product must not change before it is waited for, so
  // that each has registers of its own.
  DSV4_DEVICE void multiply(uint32_t block, const TileScales<kForm, 1>& scales) {
    const uint64_t tokens = ptx::wgmma_matrix(block + Shape::kWeightBytes);
    Unit unit[2];
    DSV4_UNROLL
    for (int n = 0; n < kBlockUnits; ++n) {
      uint32_t a[2][4];
      DSV4_UNROLL
      for (int i = 0; i < 2; ++i) {
        const uint32_t rows = block + static_cast<uint32_t>((first_row_ + 8 * i) * Unit::kRowBytes);
        uint32_t pair[4];
        unit[i].load(rows, lane_ / 4, lane_ % 4, n / kUnits, n % kUnits, false);
        unit[i].pairs(n % kUnits, 0, scales.factor[i], pair);
        DSV4_UNROLL
        for (int j = 0; j < 4; ++j) a[j / 2][j % 2 * 2 + i] = pair[j];
      }
      ptx::wgmma_fence();
      DSV4_UNROLL
      for (int step = 0; step < 2; ++step) {
        const uint32_t at = static_cast<uint32_t>(n / kUnits * Shape::kHalfBytes + n % kUnits * 64 + step * 32);
        ptx::wgmma_m64n128k16(product_, a[step], ptx::wgmma_moved(tokens, at), n > 0 || step > 0);
      }
    }
    ptx::wgmma_commit();
    ptx::wgmma_wait<0>();
  }

  DSV4_DEVICE void close(const TileScales<kForm, 1>& scales) {
    DSV4_UNROLL
    for (int i = 0; i < 4 * kFragments; ++i) {
      const float scaled = ptx::multiply(product_[i / 4][i % 4], scales.scale[i % 4 / 2]);
      sum_[i / 4][i % 4] = ptx::add(sum_[i / 4][i % 4], scaled);
    }
  }

  int lane_, first_row_;
  uint32_t start_;
  float sum_[kFragments][4], product_[kFragments][4];
};

}  // namespace dsv4::sm90
