// Rows in 16-byte pieces: eight bfloat16 or four float32 elements, and their arithmetic in float32.
#pragma once

#include "cuda/common/ptx.h"

namespace dsv4::sm80 {

using ptx::Words4;

template <class X>
inline constexpr int kElements = 16 / static_cast<int>(sizeof(X));  // of a piece

DSV4_DEVICE void unpack(const Words4& piece, float (&value)[8]) {
  DSV4_UNROLL
  for (int i = 0; i < 4; ++i) {
    value[2 * i] = ptx::low_bf16(piece.word[i]);
    value[2 * i + 1] = ptx::high_bf16(piece.word[i]);
  }
}

DSV4_DEVICE void unpack(const Words4& piece, float (&value)[4]) {
  DSV4_UNROLL
  for (int i = 0; i < 4; ++i) value[i] = float_from_bits(piece.word[i]);
}

DSV4_DEVICE Words4 pack(const float (&value)[8]) {
  Words4 piece;
  DSV4_UNROLL
  for (int i = 0; i < 4; ++i) piece.word[i] = ptx::pack_bf16(value[2 * i], value[2 * i + 1]);
  return piece;
}

DSV4_DEVICE Words4 pack(const float (&value)[4]) {
  Words4 piece;
  DSV4_UNROLL
  for (int i = 0; i < 4; ++i) piece.word[i] = bits_from_float(value[i]);
  return piece;
}

// The `unit`th eight floats of a row in shared memory, which begins at a multiple of 16 bytes. Of the eight lanes that
// are served together, and read neighbouring eights, half begin with their second four: they meet no bank twice.
DSV4_DEVICE void load_shared_eight(uint32_t row, int unit, float (&value)[8]) {
  const bool late = (unit & 4) != 0;
  const uint32_t from = row + static_cast<uint32_t>(32 * unit);
  const Words4 first = ptx::load_shared_16(from + (late ? 16 : 0));
  const Words4 second = ptx::load_shared_16(from + (late ? 0 : 16));
  DSV4_UNROLL
  for (int i = 0; i < 4; ++i) {
    value[i] = float_from_bits(late ? second.word[i] : first.word[i]);
    value[4 + i] = float_from_bits(late ? first.word[i] : second.word[i]);
  }
}

// Element by element, for rows whose start or length is no multiple of 16 bytes. Zeros past the end of the row.
DSV4_DEVICE Words4 load_piece_slowly(const bf16* row, int64_t column, int64_t hidden) {
  Words4 piece;
  DSV4_UNROLL
  for (int i = 0; i < 4; ++i) {
    const uint32_t low = column + 2 * i < hidden ? row[column + 2 * i].bits : 0;
    const uint32_t high = column + 2 * i + 1 < hidden ? row[column + 2 * i + 1].bits : 0;
    piece.word[i] = low | high << 16;
  }
  return piece;
}

DSV4_DEVICE Words4 load_piece_slowly(const float* row, int64_t column, int64_t hidden) {
  Words4 piece;
  DSV4_UNROLL
  for (int i = 0; i < 4; ++i) piece.word[i] = column + i < hidden ? bits_from_float(row[column + i]) : 0;
  return piece;
}

DSV4_DEVICE void store_piece_slowly(bf16* row, int64_t column, int64_t hidden, const Words4& piece) {
  DSV4_UNROLL
  for (int i = 0; i < 8; ++i) {
    if (column + i < hidden) row[column + i] = bf16{static_cast<uint16_t>(piece.word[i / 2] >> (16 * (i % 2)))};
  }
}

DSV4_DEVICE void store_piece_slowly(float* row, int64_t column, int64_t hidden, const Words4& piece) {
  DSV4_UNROLL
  for (int i = 0; i < 4; ++i) {
    if (column + i < hidden) row[column + i] = float_from_bits(piece.word[i]);
  }
}

// column < hidden; vector: the launcher found all rows to be made of whole, aligned pieces.
template <class X>
DSV4_DEVICE Words4 load_piece(const X* row, int64_t column, int64_t hidden, bool vector) {
  return vector ? ptx::load_global_16(row + column) : load_piece_slowly(row, column, hidden);
}

template <class X>
DSV4_DEVICE void store_piece(X* row, int64_t column, int64_t hidden, bool vector, const Words4& piece) {
  if (vector) {
    ptx::store_global_16(row + column, piece);
  } else {
    store_piece_slowly(row, column, hidden, piece);
  }
}

}  // namespace dsv4::sm80
