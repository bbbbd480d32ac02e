// The tile of the products that gradients need: C = A B over K, [rows, 128], where the rows of B in memory are those of
// K, so B is read across, and A's are either the rows of C (along) or those of K too (across). Further products may be
// added to it.
//
// A stage of shared memory holds 128 bytes of K of each row, 64 bfloat16 or 32 float32; cp.async fills two stages ahead
// of their use, with one barrier a stage. A warp has 64 rows and 32 columns: bfloat16 by ldmatrix (transposed where an
// operand is read across) and mma.sync m16n8k16, six of the one for sixteen of the other; float32 by FMA, 8 x 8 a lane.
// K goes by in blocks of 128, each summed on its own and then added to the sums so far: that order is K's alone. The
// result leaves through shared memory, so that sixteen lanes have a row's 128 columns, eight a lane.
#pragma once

#include "cuda/sm80/row_lanes.h"
#include "cuda/sm80/stage_copies.h"

namespace dsv4::sm80 {

inline constexpr int kProductColumns = 128;
inline constexpr int kProductBlock = 128;  // of K
inline constexpr int kPieceBytes = 16;

// kAcross: of A. kWarpsM: of 64 rows each.
template <class X_, bool kAcross_, int kWarpsM>
struct ProductShape {
  using X = X_;
  static constexpr bool kAcross = kAcross_, kNarrow = sizeof(X) == 2;
  static constexpr int kRows = 64 * kWarpsM, kWarpsN = 4, kThreads = 32 * kWarpsM * kWarpsN;
  static constexpr int kStepBytes = 128, kStep = kStepBytes / static_cast<int>(sizeof(X));  // of K
  static constexpr int kStepsOfBlock = kProductBlock / kStep, kStages = 3;
  static constexpr int kLeftBytes = kRows * kStepBytes;
  static constexpr int kStageBytes = kLeftBytes + kProductColumns * kStepBytes;
  // Of the result; rows of a warp's one access lie in different banks.
  static constexpr int kResultRow = (kProductColumns + (kNarrow ? 8 : kAcross ? 4 : 16)) * 4;
  static constexpr int kResultBytes = kRows * kResultRow;
  static constexpr int kSharedBytes = kStages * kStageBytes > kResultBytes ? kStages * kStageBytes : kResultBytes;
};

// Rows of an operand from the tile's first column on.
struct TileRows {
  const uint8_t* data;  // row 0
  const int32_t* map;   // the row of data of each row; none: the same
  int64_t stride;       // bytes
  int64_t bytes;        // of a row that may be read
  int64_t first, count;
  bool vector;  // rows are made of whole, aligned 16-byte pieces

  // Null where there is no such row.
  DSV4_DEVICE const uint8_t* row(int64_t i) const {
    if (i >= count) return nullptr;
    return data + (map != nullptr ? map[first + i] : first + i) * stride;
  }
  DSV4_DEVICE TileRows of(int64_t the_first, int64_t the_count) const {
    TileRows some = *this;
    some.first = the_first;
    some.count = the_count;
    return some;
  }
  DSV4_DEVICE TileRows from(int64_t column_bytes) const {
    TileRows rest = *this;
    rest.data += column_bytes;
    rest.bytes -= column_bytes;
    return rest;
  }
};

template <class Shape>
class ProductTile {
 public:
  using X = typename Shape::X;

  // rows: of the tile, that matter; others may be left at zero.
  DSV4_DEVICE explicit ProductTile(int rows) {
    const int warp = ptx::thread_index() / 32;
    lane_ = ptx::thread_index() % 32;
    first_row_ = warp / Shape::kWarpsN * 64;
    first_column_ = warp % Shape::kWarpsN * 32;
    rows_ = rows - first_row_;
    clear(sum_);
    clear(product_);
  }

  DSV4_DEVICE void add(const TileRows& a, const TileRows& b, int64_t k) {
    const int64_t steps = (k + Shape::kStep - 1) / Shape::kStep;
    DSV4_UNROLL_IF(false)
    for (int i = 0; i < Shape::kStages - 1; ++i) {
      if (i < steps) load(a, b, i, stage(i));
      ptx::cp_async_commit();
    }
    int slot = 0;
    DSV4_UNROLL_IF(false)
    for (int64_t step = 0; step < steps; ++step) {
      ptx::cp_async_wait<Shape::kStages - 2>();
      ptx::sync_threads();  // the stage is whole, the one before it done with
      const int64_t ahead = step + Shape::kStages - 1;
      if (ahead < steps) load(a, b, ahead, stage(slot == 0 ? Shape::kStages - 1 : slot - 1));
      ptx::cp_async_commit();
      const int64_t left = k - step * Shape::kStep;
      const int depth = left < Shape::kStep ? static_cast<int>(left) : Shape::kStep;
      if (rows_ > 0) multiply(stage(slot), depth);
      if ((step + 1) % Shape::kStepsOfBlock == 0 || step + 1 == steps) close();
      slot = slot + 1 == Shape::kStages ? 0 : slot + 1;
    }
    ptx::sync_threads();  // the stages are done with
  }

  // Calls use(row, unit, value) for the rows of the tile below `count`, with this thread's eight columns from 8 unit
  // on. Sixteen neighbouring lanes have a row; all threads call alike, for rows past the last too.
  template <class Use>
  DSV4_DEVICE void each(int count, const Use& use) const {
    store();
    ptx::sync_threads();  // the results are there
    const int unit = ptx::thread_index() % 16;
    DSV4_UNROLL_IF(false)
    for (int base = 0; base < count; base += Shape::kThreads / 16) {
      const int row = base + ptx::thread_index() / 16;
      float value[8];
      load_shared_eight(ptx::shared_base() + static_cast<uint32_t>(row * Shape::kResultRow), unit, value);
      use(row, unit, value);
    }
  }

 private:
  static constexpr int kFragments = 16;  // of a warp, four numbers a lane

  static DSV4_DEVICE void clear(float (&to)[kFragments][4]) {
    DSV4_UNROLL
    for (int i = 0; i < 4 * kFragments; ++i) to[i / 4][i % 4] = 0.0f;
  }
  DSV4_DEVICE void close() {
    DSV4_UNROLL
    for (int i = 0; i < 4 * kFragments; ++i) sum_[i / 4][i % 4] = ptx::add(sum_[i / 4][i % 4], product_[i / 4][i % 4]);
    clear(product_);
  }

  static DSV4_DEVICE uint32_t stage(int slot) {
    return ptx::shared_base() + static_cast<uint32_t>(slot * Shape::kStageBytes);
  }

  // A row's pieces are permuted, so that eight rows' same piece, which ldmatrix reads together, lie in different banks.
  static DSV4_DEVICE uint32_t place(int row, int row_bytes, int piece) {
    return static_cast<uint32_t>(row * row_bytes + (piece ^ (row & 7)) * kPieceBytes);
  }

  static DSV4_DEVICE void load(const TileRows& a, const TileRows& b, int64_t step, uint32_t to) {
    if (a.vector && b.vector) {
      load<true>(a, b, step, to);
    } else {
      load<false>(a, b, step, to);
    }
  }

  template <bool kVector>
  static DSV4_DEVICE void load(const TileRows& a, const TileRows& b, int64_t step, uint32_t to) {
    constexpr int kSize = static_cast<int>(sizeof(X));
    const int64_t row = step * Shape::kStep;
    if constexpr (Shape::kAcross) {
      load<kVector, Shape::kStep, Shape::kRows * kSize>(a, row, 0, to);
    } else {
      load<kVector, Shape::kRows, Shape::kStepBytes>(a, 0, step * Shape::kStepBytes, to);
    }
    load<kVector, Shape::kStep, kProductColumns * kSize>(b, row, 0, to + Shape::kLeftBytes);
  }

  // kRows rows from `first` on, kRowBytes of each from `offset` on. Where there are steps there is a row 0; its number
  // stands for those of rows past the last, so that four numbers are asked for before the first is needed.
  template <bool kVector, int kRows, int kRowBytes>
  static DSV4_DEVICE void load(const TileRows& rows, int64_t first, int64_t offset, uint32_t to) {
    constexpr int kPieces = kRowBytes / kPieceBytes, kEach = kRows * kPieces / Shape::kThreads;
    static_assert(Shape::kThreads % kPieces == 0 && kEach % 4 == 0);
    const int piece = ptx::thread_index() % kPieces;
    const int64_t from = offset + piece * kPieceBytes;
    DSV4_UNROLL_IF(kVector)
    for (int at = 0; at < kEach; at += kVector ? 4 : 1) {
      const auto row_of = [at](int i) { return (ptx::thread_index() + (at + i) * Shape::kThreads) / kPieces; };
      if constexpr (kVector) {
        int64_t number[4];
        DSV4_UNROLL
        for (int i = 0; i < 4; ++i) number[i] = rows.first + (first + row_of(i) < rows.count ? first + row_of(i) : 0);
        if (rows.map != nullptr) {
          DSV4_UNROLL
          for (int i = 0; i < 4; ++i) number[i] = rows.map[number[i]];
        }
        DSV4_UNROLL
        for (int i = 0; i < 4; ++i) {
          const bool exists = first + row_of(i) < rows.count && from < rows.bytes;
          const uint8_t* source = exists ? rows.data + number[i] * rows.stride + from : rows.data;
          ptx::cp_async_16(to + place(row_of(i), kRowBytes, piece), source, exists ? 16 : 0);
        }
      } else {
        const uint32_t address = to + place(row_of(0), kRowBytes, piece);
        const uint8_t* source = rows.row(first + row_of(0));
        const int64_t left = source != nullptr ? rows.bytes - from : 0;
        stage_bytes(address, source != nullptr ? source + from : rows.data, static_cast<int>(left < 16 ? left : 16));
      }
    }
  }

  // `depth` of K. Of a warp with half of its rows the tensor cores are spared the rest.
  DSV4_DEVICE void multiply(uint32_t left, int depth) {
    if constexpr (!Shape::kNarrow) {
      DSV4_UNROLL_IF(false)
      for (int step = 0; 4 * step < depth; ++step) multiply_f32(left, left + Shape::kLeftBytes, step);
    } else if (rows_ > 32) {
      multiply_bf16<4>(left, depth);
    } else {
      multiply_bf16<2>(left, depth);
    }
  }

  // The first 16 kM rows of the warp.
  template <int kM>
  DSV4_DEVICE void multiply_bf16(uint32_t left, int depth) {
    DSV4_UNROLL
    for (int step = 0; step < Shape::kStep / 16; ++step) {
      if (16 * step < depth) multiply_bf16<kM>(left, left + Shape::kLeftBytes, step);
    }
  }

  // Fragment 4 m + n: rows 16 m ..., columns 8 n ... of the warp.
  template <int kM>
  DSV4_DEVICE void multiply_bf16(uint32_t left, uint32_t right, int step) {
    constexpr int kLeftRow = Shape::kRows * 2, kRightRow = kProductColumns * 2;
    uint32_t a[kM][4];
    DSV4_UNROLL
    for (int m = 0; m < kM; ++m) {
      const int row = first_row_ + 16 * m;
      if constexpr (Shape::kAcross) {
        const int k = 16 * step + lane_ / 16 * 8 + lane_ % 8;
        ptx::ldmatrix_x4_transposed(a[m], left + place(k, kLeftRow, row / 8 + lane_ / 8 % 2));
      } else {
        ptx::ldmatrix_x4(a[m], left + place(row + lane_ % 16, Shape::kStepBytes, 2 * step + lane_ / 16));
      }
    }
    DSV4_UNROLL
    for (int pair = 0; pair < 2; ++pair) {
      uint32_t b[4];
      const int k = 16 * step + lane_ % 16, piece = (first_column_ + 16 * pair) / 8 + lane_ / 16;
      ptx::ldmatrix_x4_transposed(b, right + place(k, kRightRow, piece));
      DSV4_UNROLL
      for (int i = 0; i < 2 * kM; ++i) {
        ptx::mma_m16n8k16(product_[i / 2 * 4 + 2 * pair + i % 2], a[i / 2], b[i % 2 * 2], b[i % 2 * 2 + 1]);
      }
    }
  }

  // Fragment 2 i + j: the lane's row i, its columns 4 j ... 4 j + 3.
  DSV4_DEVICE int row_f32(int i) const {
    return first_row_ + (Shape::kAcross ? i / 4 * 32 + lane_ / 4 * 4 + i % 4 : 8 * i + lane_ / 4);
  }
  DSV4_DEVICE int column_f32(int j) const { return first_column_ + 16 * j + lane_ % 4 * 4; }

  // Four of K.
  DSV4_DEVICE void multiply_f32(uint32_t left, uint32_t right, int step) {
    constexpr int kLeftRow = Shape::kRows * 4, kRightRow = kProductColumns * 4;
    Words4 along[8];
    if constexpr (!Shape::kAcross) {
      DSV4_UNROLL
      for (int i = 0; i < 8; ++i) {
        along[i] = ptx::load_shared_16(left + place(row_f32(i), Shape::kStepBytes, step));
      }
    }
    DSV4_UNROLL
    for (int e = 0; e < 4; ++e) {
      const int k = 4 * step + e;
      Words4 a[2], b[2];
      DSV4_UNROLL
      for (int j = 0; j < 2; ++j) {
        b[j] = ptx::load_shared_16(right + place(k, kRightRow, column_f32(j) / 4));
        if constexpr (Shape::kAcross) a[j] = ptx::load_shared_16(left + place(k, kLeftRow, row_f32(4 * j) / 4));
      }
      DSV4_UNROLL
      for (int i = 0; i < 8; ++i) {
        const float factor = float_from_bits(Shape::kAcross ? a[i / 4].word[i % 4] : along[i].word[e]);
        DSV4_UNROLL
        for (int j = 0; j < 8; ++j) {
          float& to = product_[2 * i + j / 4][j % 4];
          to = ptx::fma(factor, float_from_bits(b[j / 4].word[j % 4]), to);
        }
      }
    }
  }

  DSV4_DEVICE void store() const {
    const auto at = [](int row, int column) {
      return ptx::shared_base() + static_cast<uint32_t>(row * Shape::kResultRow + column * 4);
    };
    DSV4_UNROLL
    for (int f = 0; f < kFragments; ++f) {
      uint32_t bits[4];
      DSV4_UNROLL
      for (int e = 0; e < 4; ++e) bits[e] = bits_from_float(sum_[f][e]);
      if constexpr (Shape::kNarrow) {
        const int row = first_row_ + f / 4 * 16 + lane_ / 4, column = first_column_ + f % 4 * 8 + lane_ % 4 * 2;
        ptx::store_shared_8(at(row, column), ptx::Words2{{bits[0], bits[1]}});
        ptx::store_shared_8(at(row + 8, column), ptx::Words2{{bits[2], bits[3]}});
      } else {
        ptx::store_shared_16(at(row_f32(f / 2), column_f32(f % 2)), Words4{{bits[0], bits[1], bits[2], bits[3]}});
      }
    }
  }

  int lane_, first_row_, first_column_;
  int rows_;  // of the warp, that matter
  float sum_[kFragments][4], product_[kFragments][4];
};

}  // namespace dsv4::sm80
