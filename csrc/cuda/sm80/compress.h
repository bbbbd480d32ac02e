// The compressor for every NVIDIA GPU from Ampere on. ops/compress.cpp chooses among the candidates and has checked the
// parameters, but not the values of `sequence` and `position`: a row whose sequence is none of the table, or whose
// position is negative, is dropped. Any ratio, any number of rows and sequences.
#pragma once

#include "ops/compress.h"

namespace dsv4::sm80 {

// What shared memory, and for the Hadamard rotation of keys registers hold.
inline constexpr int64_t kMostEntryDims = 8192, kMostKeyDims = 1024;
inline constexpr int64_t kMostRatio = int64_t{1} << 24;

// Rows that a block looks through for entries to make and for rows to keep, on which no result depends.
struct CompressRows {
  int entries, state;
};
CompressRows compress_rows_per_block(const CompressParams&);
Status compress(const CompressParams&, CompressRows rows_per_block, const Context&);

Status compress(const CompressParams&, const Context&);

// The same kernels: the rows are one sequence, whose entries have a row of the result and of rope each.
Status compress_entries(const CompressEntriesParams&, int rows_per_block, const Context&);
Status compress_entries(const CompressEntriesParams&, const Context&);

// The workspace holds a few rows of an entry each, and sums of pieces of entries (piece_sums.h).
int64_t compress_entries_backward_workspace_bytes(const CompressEntriesBackwardParams&, const Context&);
Status compress_entries_backward(const CompressEntriesBackwardParams&, const Context&);

}  // namespace dsv4::sm80
