// Activations as the tiles of weight_tile.h read them: bfloat16, in planes. One plane where a value is a bfloat16:
// plain ones, and all that went through the quantiser, times its scale (e4m3 times a power of two is exact). Three
// where it is a float32, which is their sum. Plain bfloat16 rows are read where they lie; `prepare_activations` writes
// the others, padded with zeros to whole blocks of 128.
#pragma once

#include "common/context.h"
#include "common/status.h"
#include "cuda/sm80/operands.h"
#include "cuda/sm80/row_lanes.h"
#include "cuda/sm80/weight_forms.h"

namespace dsv4::sm80 {

struct ActivationRows {
  const uint8_t* data;           // row 0
  const int32_t* map;            // the row of data of each row of the tile; none: the same
  int64_t stride, plane_stride;  // bytes; aligned as `vector` says also where there is one row
  int64_t bytes;                 // of a row of a plane that may be read
  int64_t inputs;
  int64_t count;  // of the tile's rows
  int planes;
  bool vector;  // rows are made of whole, aligned 16-byte pieces

  // The rows from `row` on.
  DSV4_DEVICE ActivationRows from(int64_t row) const {
    ActivationRows rest = *this;
    if (map != nullptr) {
      rest.map += row;
    } else {
      rest.data += row * stride;
    }
    rest.count -= row;
    return rest;
  }

  // The row of data of row i; with a map, 0 where there is no row i.
  DSV4_DEVICE int number(int i) const { return map == nullptr ? i : i < count ? map[i] : 0; }
};

// In which order the inputs of a block lie.
enum class InputOrder {
  kPlain,
  kUnits,  // as a lane meets its units of quantised weights: see weight_forms.h
  kSteps,  // as the steps of a warpgroup's product meet those units: see cuda/sm90/group_tile.h
};

struct PrepareArguments {
  AnyView<3> x;   // [T, G, K]; row t G + g of the result is x[t, g]
  uint8_t* to;    // [T G, planes, padded K]
  int64_t units;  // of 8 inputs, of a row
  int64_t rows;
  int planes;
  bool quantise;
  InputOrder order;
  bool vector;  // rows are made of whole, aligned 16-byte pieces
};

inline constexpr int kPrepareThreads = 128;

// What the e4m3 code of a finite value stands for: clamped to +-448, and rounded to nearest even by adding a power of
// two whose last bit is the code's.
DSV4_DEVICE float e4m3_nearest(float value) {
  constexpr uint32_t kMost = 0x43E00000u, kLeastNormal = 0x3C800000u, kSteps = 20u << 23;
  const uint32_t sign = bits_from_float(value) & 0x80000000u, magnitude = bits_from_float(value) ^ sign;
  const uint32_t clamped = magnitude < kMost ? magnitude : kMost, power = clamped & 0x7F800000u;
  const float large = float_from_bits((power < kLeastNormal ? kLeastNormal : power) + kSteps);
  return float_from_bits(bits_from_float(ptx::add(ptx::add(float_from_bits(clamped), large), -large)) | sign);
}

// The 16 lanes of a half warp hold a block of 128: what its values are after quantising to e4m3 with one power-of-two
// scale, NaN where one of them is not finite.
DSV4_DEVICE void round_trip_fp8(float (&value)[8]) {
  uint32_t most = 0;
  DSV4_UNROLL
  for (int i = 0; i < 8; ++i) {
    const uint32_t magnitude = bits_from_float(value[i]) & 0x7FFFFFFFu;
    most = magnitude > most ? magnitude : most;
  }
  DSV4_UNROLL
  for (int mask = 8; mask > 0; mask /= 2) {
    const uint32_t other = ptx::shuffle_xor(most, mask);
    most = other > most ? other : most;
  }
  const uint8_t scale = fp8_scale(most);
  DSV4_UNROLL
  for (int i = 0; i < 8; ++i) {
    value[i] = ptx::multiply(e4m3_nearest(ptx::multiply(value[i], inverse_scale(scale))), e8m0_value(scale));
  }
  if (scale != 255) return;
  DSV4_UNROLL
  for (int i = 0; i < 8; ++i) value[i] = float_from_bits(0x7FC00000u);
}

// A block's unit, inputs 8 unit ..., of a row.
DSV4_DEVICE void store_unit(uint8_t* row, int64_t plane_bytes, int planes, int64_t block, int unit, InputOrder order,
                            const float (&value)[8]) {
  const bool pairs = order != InputOrder::kPlain;
  const int64_t place = block * 16 + (pairs ? unit % 4 * 4 + unit / 4 : unit);
  for (int plane = 0; plane < planes; ++plane) {
    float part[8];
    DSV4_UNROLL
    for (int i = 0; i < 8; ++i) {
      part[i] = planes == 1 ? value[i] : float_from_bits(float_part(value[i], plane) << 16);
    }
    Words4 words;
    DSV4_UNROLL
    for (int w = 0; w < 4; ++w) {
      words.word[w] = pairs ? ptx::pack_bf16(part[w], part[w + 4]) : ptx::pack_bf16(part[2 * w], part[2 * w + 1]);
    }
    uint8_t* to = row + plane * plane_bytes;
    if (order != InputOrder::kSteps) {
      ptx::store_global_16(to + place * 16, words);
      continue;
    }
    DSV4_UNROLL
    for (int w = 0; w < 4; ++w) {  // 64 bytes a unit of four lanes: words of one number side by side
      ptx::store_global_4(to + block * 256 + unit % 4 * 64 + w * 16 + unit / 4 * 4, words.word[w]);
    }
  }
}

// A thread takes eight inputs.
template <class X>
DSV4_DEVICE void prepare(const PrepareArguments& a) {
  // Of blocks of 128 inputs 2^32 fit in no memory.
  const uint32_t at = static_cast<uint32_t>(ptx::block_index_x() * (kPrepareThreads / 16) + ptx::thread_index() / 16);
  const uint32_t blocks = static_cast<uint32_t>(a.units / 16), groups = static_cast<uint32_t>(a.x.shape[1]);
  const uint32_t row = at / blocks, block = at % blocks;
  const int unit = ptx::thread_index() % 16;
  const bool exists = row < a.rows;
  float value[8] = {};
  if (exists) {
    const X* from = static_cast<const X*>(a.x.data) + row / groups * a.x.stride[0] + row % groups * a.x.stride[1];
    const int column = static_cast<int>(block) * kBlockInputs + 8 * unit;
    load_eight(from, column, static_cast<int>(a.x.shape[2]), a.vector, value);
  }
  if (a.quantise) round_trip_fp8(value);
  if (!exists) return;
  const int64_t plane_bytes = 16 * a.units;
  store_unit(a.to + static_cast<int64_t>(row) * a.planes * plane_bytes, plane_bytes, a.planes, block, unit, a.order,
             value);
}

// Writes x [T, G, K] as rows t G + g of `planes` planes, quantised or not.
Status prepare_activations(const char* op, const AnyView<3>& x, void* to, int planes, bool quantise, InputOrder order,
                           const Context&);

// Rows [T, K] as one group.
inline AnyView<3> with_group(const AnyView<2>& rows) {
  return {rows.data, rows.dtype, {rows.shape[0], 1, rows.shape[1]}, {rows.stride[0], 0, rows.stride[1]}};
}

}  // namespace dsv4::sm80
