// Sums over rows (gradients of weights) in two kernels: the rows are cut into pieces, whose number depends on sizes
// alone; a kernel leaves each piece's sums in float32, and add_pieces adds them in one order. No two rows meet in an
// atomic addition, so the sums have the same bits every time.
#pragma once

#include "common/context.h"
#include "common/dtype.h"
#include "common/status.h"
#include "cuda/sm80/operands.h"

namespace dsv4::sm80 {

// Rows, or blocks of rows, of a piece: at least four, so that the pieces' sums are little beside the rows; enough
// pieces for every thread of a large GPU, where `work` is the threads that one piece keeps busy; at most 2048 pieces.
inline int64_t rows_of_piece(int64_t rows, int64_t work) {
  constexpr int64_t kLeastRows = 4, kThreads = int64_t{1} << 18, kMostPieces = 2048;
  const int64_t by_threads = rows / (kThreads / work > 0 ? kThreads / work : 1);
  const int64_t by_pieces = ceil_div(rows, kMostPieces), least = by_threads > by_pieces ? by_threads : by_pieces;
  return least > kLeastRows ? least : kLeastRows;
}
inline int64_t pieces_of(int64_t rows, int64_t work) {
  const int64_t of_piece = rows_of_piece(rows, work);
  return ceil_div(rows, of_piece);
}

// A row of sums, so that four neighbours are a 16-byte access.
inline int64_t padded_width(int64_t columns) { return round_up(columns, 4); }

struct PieceSums {
  const float* partial;  // [pieces, rows, sets, padded_width(columns)]
  int64_t pieces, rows, sets, columns;
  void* result;  // [rows, sets, columns], rows `stride` apart
  DType dtype;   // bfloat16 or float32
  int64_t stride;
};

// Each sum is rounded once; of no pieces it is 0.
Status add_pieces(const char* op, const PieceSums&, const Context&);

}  // namespace dsv4::sm80
