// The tile that linear layers and experts share: sums over K of weights [rows, K] times activations [tokens, K],
// float32 in registers. K goes by in blocks of 128: the tensor cores sum a block (and its planes, see activations.h),
// the sum is multiplied by the block's scale, and blocks are added one after another. That order is K's alone: a shape
// of the tile never shows in a result.
//
// A stage of shared memory holds kWarpsK neighbouring blocks of both operands as they are in memory; cp.async fills
// stages ahead of their use, with one barrier a stage. A warp takes one of the blocks, 16 kM rows and 8 kN tokens, and
// turns weights into bfloat16 in registers, on their way into the tensor cores. Where kWarpsK > 1, the warps leave a
// block's products in shared memory, and the fragment's owner adds them in order after the next barrier.
#pragma once

#include "cuda/sm80/stage_copies.h"

namespace dsv4::sm80 {

template <WeightForm kForm_, int kM_, int kN_, int kWarpsM_, int kWarpsN_, int kWarpsK_, int kStages_>
struct TileShape {
  static constexpr WeightForm kForm = kForm_;
  static constexpr int kM = kM_, kN = kN_, kWarpsM = kWarpsM_, kWarpsN = kWarpsN_, kWarpsK = kWarpsK_;
  static constexpr int kStages = kStages_;
  static constexpr int kRows = 16 * kM * kWarpsM, kTokens = 8 * kN * kWarpsN;
  static constexpr int kThreads = 32 * kWarpsM * kWarpsN * kWarpsK;
  static constexpr int kWeightBytes = kRows * WeightUnit<kForm>::kRowBytes;  // of a block
  static constexpr int kTokenBytes = kBlockInputs * 2;                       // of a block of a token
  static constexpr int kBlockBytes = kWeightBytes + kTokens * kTokenBytes;
  static constexpr int kStageBytes = kWarpsK * kBlockBytes;
  static constexpr int kExchangeBytes = kWarpsK > 1 ? kRows * kTokens * 4 * kWarpsK : 0;
  static constexpr int kSharedBytes = kStages * kStageBytes + 2 * kExchangeBytes;
  static constexpr int kFragments = kM * kN;  // of a warp, [16 rows, 8 tokens] each
  static constexpr int kOwned = (kFragments + kWarpsK - 1) / kWarpsK;

  // Where a 16-byte piece of a token of a block lies; rows that are eight apart lie alike.
  static constexpr int kTokenStep = kTokenBytes;
  static DSV4_DEVICE constexpr int token_place(int row, int piece) {
    // Two tokens' four pieces of a unit, which one access reads together, lie in different banks.
    return row * kTokenBytes + (piece ^ (row & 1) * 4) * 16;
  }
};

// What a block's sums and a lane's units are multiplied by; of each row of a lane, as stored, a block ahead.
template <WeightForm kForm, int kM>
struct TileScales {
  uint32_t stored[2 * kM];
  uint32_t factor[2 * kM];
  float scale[2 * kM];

  template <class Weights>
  DSV4_DEVICE void load(const Weights& weights, int first_row, int block, int blocks) {
    if (kIsPlain<kForm> || block >= blocks) return;
    const int lane = ptx::thread_index() % 32;
    constexpr bool kByRow = kForm != WeightForm::kFp8;
    const int column = kByRow ? 4 * block + lane % 4 : block;
    DSV4_UNROLL
    for (int i = 0; i < 2 * kM; ++i) {
      stored[i] = weights.scale(first_row + 8 * i + lane / 4, column, !kByRow);
    }
  }

  DSV4_DEVICE void open(bool wide) {
    DSV4_UNROLL
    for (int i = 0; i < 2 * kM; ++i) {
      if constexpr (kForm == WeightForm::kFp8) {
        factor[i] = 0x7B807B80u;  // 2^120
        scale[i] = wide ? float_from_bits(stored[i]) : e8m0_value(static_cast<uint8_t>(stored[i]));
      } else if constexpr (kForm == WeightForm::kFp4) {
        // Of the block's four scales the largest multiplies the sum, what the others fall short of it the weights.
        float largest = static_cast<float>(stored[i]);
        largest = ptx::maximum(largest, ptx::shuffle_xor(largest, 1));
        largest = ptx::maximum(largest, ptx::shuffle_xor(largest, 2));
        const int exponent = 253 + static_cast<int>(stored[i]) - static_cast<int>(largest);  // of 2^126 and the rest
        factor[i] = exponent > 0 ? static_cast<uint32_t>(exponent) * 0x00800080u : 0;
        scale[i] = e8m0_value(static_cast<uint8_t>(largest));
      } else {
        factor[i] = stored[i];
        scale[i] = 1.0f;
      }
    }
  }
};

template <class Shape_>
class WeightTile {
 public:
  using Shape = Shape_;
  static constexpr int kM = Shape::kM, kN = Shape::kN, kWarpsK = Shape::kWarpsK;
  static constexpr WeightForm kForm = Shape::kForm;
  using Unit = WeightUnit<kForm>;
  // Such weights meet quantised activations alone.
  static constexpr bool kOnePlane = kForm == WeightForm::kFp4 || kForm == WeightForm::kFp4Wide;

  float sum[Shape::kOwned][4];

  DSV4_DEVICE WeightTile() {
    const int warp = ptx::thread_index() / 32;
    lane_ = ptx::thread_index() % 32;
    part_ = warp % kWarpsK;
    pair_ = warp / kWarpsK;
    first_row_ = pair_ % Shape::kWarpsM * 16 * kM;
    first_token_ = pair_ / Shape::kWarpsM * 8 * kN;
    tokens_at_ =
        static_cast<uint32_t>(Shape::kWeightBytes + (first_token_ + lane_ / 4) * Shape::kTokenBytes + lane_ % 4 * 16);
  }

  // Calls use(row, token, sum) for this thread's results; rows and tokens of the tile.
  template <class Use>
  DSV4_DEVICE void each(const Use& use) const {
    DSV4_UNROLL
    for (int i = 0; i < Shape::kOwned; ++i) {
      const int fragment = i * kWarpsK + part_;
      if (fragment >= Shape::kFragments) break;
      DSV4_UNROLL
      for (int e = 0; e < 4; ++e) use(row(fragment / kN, e), token(fragment % kN, e), sum[i][e]);
    }
  }

  // Of element e of fragment [m, n].
  DSV4_DEVICE int row(int m, int e) const { return first_row_ + 16 * m + e / 2 * 8 + lane_ / 4; }
  DSV4_DEVICE int token(int n, int e) const { return first_token_ + 8 * n + lane_ % 4 * 2 + e % 2; }

  template <class Weights>
  DSV4_DEVICE void run(const Weights& weights, const ActivationRows& x) {
    const int planes = kOnePlane ? 1 : x.planes;
    const int blocks = static_cast<int>((x.inputs + kBlockInputs - 1) / kBlockInputs);
    DSV4_UNROLL
    for (int i = 0; i < 4 * Shape::kOwned; ++i) sum[i / 4][i % 4] = 0.0f;
    TileScales<kForm, kM> scales = {};
    scales.load(weights, first_row_, part_, blocks);
    const WeightCopies<Shape, Weights> weight_copies(weights);
    const TokenCopies<Shape> token_copies(x);
    const auto load = [&](const Step& ahead) {
      if (ahead.block >= blocks) return;
      weight_copies.load(weights, ahead.block, stage(ahead));
      token_copies.load(x, ahead.block, planes - 1 - ahead.plane, stage(ahead));
    };
    Step ahead = {};
    DSV4_UNROLL_IF(false)
    for (int i = 0; i < Shape::kStages - 1; ++i) {
      load(ahead);
      ptx::cp_async_commit();
      ahead.advance(planes);
    }
    Step step = {};
    DSV4_UNROLL_IF(false)
    for (; step.block < blocks; step.advance(planes)) {
      ptx::cp_async_wait<Shape::kStages - 2>();
      ptx::sync_threads();  // the stage is whole, the one before it and the products of its blocks are done with
      load(ahead);
      ptx::cp_async_commit();
      ahead.advance(planes);
      if (step.plane == 0 && step.block > 0) collect(step.block - kWarpsK, blocks);
      if (step.block + part_ >= blocks) continue;
      if (step.plane == 0) {
        scales.open(weights.any().wide_scales);
        scales.load(weights, first_row_, step.block + kWarpsK + part_, blocks);
        clear();
      }
      const uint32_t block = stage(step) + static_cast<uint32_t>(part_ * Shape::kBlockBytes);
      if (first_token_ < x.count) multiply(block, scales, planes - 1 - step.plane);
      if (step.plane == planes - 1) close(scales, step.block);
    }
    if constexpr (kWarpsK > 1) {
      ptx::sync_threads();  // the last products are there
      if (blocks > 0) collect(step.block - kWarpsK, blocks);
    }
  }

 private:
  // Of a stage: the first of its blocks, the plane of the activations (the last one first: small numbers are added
  // before large ones), where it lies.
  struct Step {
    int block, plane, slot;

    DSV4_DEVICE void advance(int planes) {
      slot = slot + 1 == Shape::kStages ? 0 : slot + 1;
      if (++plane < planes) return;
      plane = 0;
      block += kWarpsK;
    }
  };

  DSV4_DEVICE uint32_t stage(const Step& step) const {
    return ptx::shared_base() + static_cast<uint32_t>(step.slot) * Shape::kStageBytes;
  }

  DSV4_DEVICE void clear() {
    DSV4_UNROLL
    for (int i = 0; i < 4 * Shape::kFragments; ++i) {
      product_[i / 4 / kN][i / 4 % kN][i % 4] = 0.0f;
      if (kHasMinor) minor_[i / 4 / kN % kMinorM][i / 4 % kMinorN][i % 4] = 0.0f;
    }
  }

  DSV4_DEVICE void multiply(uint32_t block, const TileScales<kForm, kM>& scales, int plane) {
    constexpr bool kKeep = kM * kN < 16;  // else the sums need the registers
    Unit unit[kM][2];
    DSV4_UNROLL_IF(false)
    for (int half = 0; half < 2; ++half) {
      DSV4_UNROLL
      for (int u = 0; u < kUnits; ++u) {
        DSV4_UNROLL
        for (int i = 0; i < 2 * kM; ++i) {
          const uint32_t rows = block + static_cast<uint32_t>((first_row_ + 8 * i) * Unit::kRowBytes);
          unit[i / 2][i % 2].load(rows, lane_ / 4, lane_ % 4, half, u, kKeep);
        }
        const uint32_t tokens = block + tokens_at_ + static_cast<uint32_t>(half * 128 + (u ^ lane_ / 4 % 2) * 64);
        DSV4_UNROLL
        for (int part = 0; part < Unit::kParts; ++part) {
          // The product of a float32 weight's and activation's last parts is below the rounding of the first's.
          if (kForm == WeightForm::kFloat32 && part + plane >= Unit::kParts) break;
          multiply(unit, scales, u, part, tokens);
        }
      }
    }
  }

  // One part of a unit: two steps.
  DSV4_DEVICE void multiply(const Unit (&unit)[kM][2], const TileScales<kForm, kM>& scales, int u, int part,
                            uint32_t tokens) {
    uint32_t a[kM][2][4];
    DSV4_UNROLL
    for (int i = 0; i < 2 * kM; ++i) {
      uint32_t pair[4];
      unit[i / 2][i % 2].pairs(u, part, scales.factor[i], pair);
      DSV4_UNROLL
      for (int j = 0; j < 4; ++j) a[i / 2][j / 2][j % 2 * 2 + i % 2] = pair[j];
    }
    DSV4_UNROLL
    for (int n = 0; n < kN; ++n) {
      const Words4 b = ptx::load_shared_16(tokens + static_cast<uint32_t>(n * 8 * Shape::kTokenBytes));
      DSV4_UNROLL
      for (int i = 0; i < 2 * kM; ++i) {
        float (&to)[4] = kHasMinor && part > 0 ? minor_[i / 2 % kMinorM][n % kMinorN] : product_[i / 2][n];
        ptx::mma_m16n8k16(to, a[i / 2][i % 2], b.word[i % 2 * 2], b.word[i % 2 * 2 + 1]);
      }
    }
  }

  // Ends a block: its sums, scaled, go to the sums of K, or to where their owners find them.
  DSV4_DEVICE void close(const TileScales<kForm, kM>& scales, int block) {
    DSV4_UNROLL
    for (int f = 0; f < Shape::kFragments; ++f) {
      Words4 scaled;
      DSV4_UNROLL
      for (int e = 0; e < 4; ++e) {
        float value = product_[f / kN][f % kN][e];
        if (kHasMinor) value = ptx::add(value, minor_[f / kN % kMinorM][f % kMinorN][e]);
        if constexpr (kForm == WeightForm::kFp8 || kForm == WeightForm::kFp4) {
          value = ptx::multiply(value, scales.scale[f / kN * 2 + e / 2]);
        }
        if constexpr (kWarpsK == 1) {
          sum[f][e] = ptx::add(sum[f][e], value);
        } else {
          scaled.word[e] = bits_from_float(value);
        }
      }
      if constexpr (kWarpsK > 1) ptx::store_shared_16(exchange(block, part_, f), scaled);
    }
  }

  DSV4_DEVICE uint32_t exchange(int block, int part, int fragment) const {
    const int at = (pair_ * kWarpsK + part) * Shape::kFragments + fragment;
    return ptx::shared_base() + Shape::kStages * Shape::kStageBytes +
           static_cast<uint32_t>(block / kWarpsK % 2) * Shape::kExchangeBytes +
           static_cast<uint32_t>((at * 32 + lane_) * 16);
  }

  // Adds the products of a stage's blocks, the first of which is `block`, to the fragments that this warp owns.
  DSV4_DEVICE void collect(int block, int blocks) {
    if constexpr (kWarpsK > 1) {
      DSV4_UNROLL
      for (int i = 0; i < Shape::kOwned; ++i) {
        const int fragment = i * kWarpsK + part_;
        if (fragment >= Shape::kFragments) break;
        DSV4_UNROLL
        for (int part = 0; part < kWarpsK; ++part) {
          if (block + part >= blocks) break;
          const Words4 scaled = ptx::load_shared_16(exchange(block, part, fragment));
          DSV4_UNROLL
          for (int e = 0; e < 4; ++e) sum[i][e] = ptx::add(sum[i][e], float_from_bits(scaled.word[e]));
        }
      }
    }
  }

  int lane_, part_, pair_, first_row_, first_token_;
  uint32_t tokens_at_;  // this lane's, in a block
  // Products with a weight's later parts, which the first part's would swallow, have sums of their own.
  static constexpr bool kHasMinor = Unit::kParts > 1;
  static constexpr int kMinorM = kHasMinor ? kM : 1, kMinorN = kHasMinor ? kN : 1;
  float product_[kM][kN][4], minor_[kMinorM][kMinorN][4];
};

}  // namespace dsv4::sm80
