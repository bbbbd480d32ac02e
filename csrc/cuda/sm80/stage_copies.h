// What the threads of a block copy into a stage of shared memory for weight_tile.h: of kBlocks neighbouring blocks of K
// the tile's rows of weights, then its tokens' activations. A thread has one piece of 16 bytes of a row, and the same
// piece of rows and blocks at constant distances, so that a stage costs it few addresses. Where both operands are made
// of whole, aligned pieces, cp.async copies them; else the threads do, byte by byte.
#pragma once

#include "cuda/sm80/activations.h"
#include "cuda/sm80/weight_forms.h"

namespace dsv4::sm80 {

// A matrix of weights as it is stored.
struct WeightMatrix {
  const uint8_t* data;
  int64_t stride, bytes;                  // of a row
  const void* scales;                     // none for plain weights
  int64_t scale_stride, scales_of_a_row;  // elements
  bool wide_scales;                       // float32, else e8m0
  bool vector;                            // rows are made of whole, aligned 16-byte pieces
};

// A tile's rows of a matrix: `count` from `first` on.
struct WeightRows {
  WeightMatrix matrix;
  int64_t first;
  int count;

  DSV4_DEVICE const uint8_t* row(int i) const { return matrix.data + (first + i) * matrix.stride; }

  // The bits of a float32 scale, or an e8m0 one; 0 where there is none.
  DSV4_DEVICE uint32_t scale(int i, int column, bool rows_share) const {
    if (i >= count || column >= matrix.scales_of_a_row) return 0;
    const int64_t row = first + static_cast<uint32_t>(i);
    const int64_t at = (rows_share ? row / 128 : row) * matrix.scale_stride + column;
    if (matrix.wide_scales) return static_cast<const uint32_t*>(matrix.scales)[at];
    return static_cast<const uint8_t*>(matrix.scales)[at];
  }

  DSV4_DEVICE const WeightMatrix& any() const { return matrix; }

  // The matrices that the tile's rows come from, and where in the tile a row of the first one lies.
  static constexpr int kMatrices = 1, kApart = 0;
  DSV4_DEVICE const WeightRows& of(int) const { return *this; }
  static DSV4_DEVICE constexpr int place(int row) { return row; }
};

// Copies 16 bytes of memory that may start anywhere, of which the first `count` exist; zeros for the others.
DSV4_DEVICE void stage_bytes(uint32_t to, const uint8_t* from, int count) {
  Words4 piece;
  DSV4_UNROLL
  for (int w = 0; w < 4; ++w) {
    piece.word[w] = 0;
    DSV4_UNROLL_IF(false)
    for (int i = 0; i < 4; ++i) {
      if (4 * w + i < count) piece.word[w] |= static_cast<uint32_t>(from[4 * w + i]) << (i * 8);
    }
  }
  ptx::store_shared_16(to, piece);
}

// A thread's share of kRows rows of kRowBytes, of kBlocks blocks that lie kBlockBytes apart: piece `piece` of the rows
// row, row + kRowStep and so on, of the blocks block, block + kBlockStep and so on.
template <int kThreads, int kRows, int kRowBytes, int kBlocks, int kBlockBytes>
struct StageShare {
  static constexpr int kPieces = kRowBytes / 16;
  static constexpr int kRowStep = kThreads / kPieces, kBlockStep = kRowStep > kRows ? kRowStep / kRows : 1;
  static constexpr int kTurns = kRowStep > kRows ? 1 : kRows / kRowStep;  // rows of a thread
  // Even: neighbouring rows lie in different banks by their parity.
  static_assert(kRowStep % 2 == 0 && kTurns * kRowStep == kRows * kBlockStep);
  int block, row, piece;

  DSV4_DEVICE StageShare()
      : block(ptx::thread_index() / kPieces / kRows % kBlockStep),
        row(ptx::thread_index() / kPieces % (kRows < kRowStep ? kRows : kRowStep)),
        piece(ptx::thread_index() % kPieces) {}

  // There may be more threads than pieces.
  DSV4_DEVICE bool any() const { return kBlockStep <= kBlocks || block < kBlocks; }

  DSV4_DEVICE int offset() const { return block * kRowBytes + piece * 16; }

  // How much of a row there is from the thread's first piece on. `bytes`: from the stage's first block on.
  DSV4_DEVICE int left(int64_t bytes) const {
    constexpr int kAll = kBlocks * kRowBytes;
    return (bytes < kAll ? static_cast<int>(bytes) : kAll) - offset();
  }

  // Of one row, zeros where there is nothing.
  template <bool kVector>
  static DSV4_DEVICE void copy(uint32_t to, const uint8_t* from, bool exists, int left) {
    DSV4_UNROLL_IF(kVector)
    for (int b = 0; b < kBlocks; b += kBlockStep) {
      const uint32_t address = to + static_cast<uint32_t>(b * kBlockBytes);
      if constexpr (kVector) {
        ptx::cp_async_16(address, from + b * kRowBytes, exists && left > b * kRowBytes ? 16 : 0);
      } else {
        stage_bytes(address, from + b * kRowBytes, exists ? left - b * kRowBytes : 0);
      }
    }
  }
};

template <class Shape, class Weights>
class WeightCopies {
  using Unit = WeightUnit<Shape::kForm>;
  using Share = StageShare<Shape::kThreads, Shape::kRows / Weights::kMatrices, Unit::kRowBytes, Shape::kWarpsK,
                           Shape::kBlockBytes>;

 public:
  DSV4_DEVICE explicit WeightCopies(const Weights& weights) {
    to_ = static_cast<uint32_t>(share_.block * Shape::kBlockBytes + Weights::place(share_.row) * Unit::kRowBytes +
                                Unit::place(share_.row, share_.piece) * 16);
    DSV4_UNROLL
    for (int m = 0; m < Weights::kMatrices; ++m) {
      from_[m] = ptx::kept(weights.of(m).row(share_.row) + share_.offset());
    }
  }

  // The stage that begins with `block`.
  DSV4_DEVICE void load(const Weights& weights, int block, uint32_t stage) const {
    if (weights.any().vector) {
      load<true>(weights, block, stage);
    } else {
      load<false>(weights, block, stage);
    }
  }

 private:
  template <bool kVector>
  DSV4_DEVICE void load(const Weights& weights, int block, uint32_t stage) const {
    const int64_t offset = static_cast<int64_t>(block) * Unit::kRowBytes;
    const int left = share_.left(weights.any().bytes - offset);
    DSV4_UNROLL
    for (int m = 0; m < Weights::kMatrices; ++m) {
      const WeightRows& rows = weights.of(m);
      const int count = rows.count - share_.row;
      const uint8_t* from = from_[m] + offset;
      DSV4_UNROLL_IF(kVector)
      for (int turn = 0; turn < Share::kTurns; ++turn) {
        const int row = turn * Share::kRowStep, place = m * Weights::kApart + Weights::place(row);
        const uint32_t to = stage + to_ + static_cast<uint32_t>(place * Unit::kRowBytes);
        Share::template copy<kVector>(to, from, row < count, left);
        from += Share::kRowStep * rows.matrix.stride;
      }
    }
  }

  Share share_;
  const uint8_t* from_[Weights::kMatrices];  // in the first block
  uint32_t to_;                              // in a stage
};

template <class Shape>
class TokenCopies {
  using Share = StageShare<Shape::kThreads, Shape::kTokens, Shape::kTokenBytes, Shape::kWarpsK, Shape::kBlockBytes>;

 public:
  DSV4_DEVICE explicit TokenCopies(const ActivationRows& x) {
    count_ = (x.count < Shape::kTokens ? static_cast<int>(x.count) : Shape::kTokens) - share_.row;
    to_ = static_cast<uint32_t>(Shape::kWeightBytes + share_.block * Shape::kBlockBytes +
                                Shape::token_place(share_.row, share_.piece));
  }

  DSV4_DEVICE void load(const ActivationRows& x, int block, int plane, uint32_t stage) const {
    if (!share_.any()) return;
    if (x.vector) {
      load<true>(x, block, plane, stage);
    } else {
      load<false>(x, block, plane, stage);
    }
  }

 private:
  template <bool kVector>
  DSV4_DEVICE void load(const ActivationRows& x, int block, int plane, uint32_t stage) const {
    const int64_t offset = static_cast<int64_t>(block) * Shape::kTokenBytes;
    const int left = share_.left(x.bytes - offset);
    const uint8_t* from = x.data + plane * x.plane_stride + offset + share_.offset();
    DSV4_UNROLL_IF(kVector)
    for (int turn = 0; turn < Share::kTurns; ++turn) {
      const int row = turn * Share::kRowStep;
      const uint32_t to = stage + to_ + static_cast<uint32_t>(row * Shape::kTokenStep);
      Share::template copy<kVector>(to, from + x.number(share_.row + row) * x.stride, row < count_, left);
    }
  }

  Share share_;
  int count_;
  uint32_t to_;
};

}  // namespace dsv4::sm80
