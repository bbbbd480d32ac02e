// The forms in which weights are stored, and how a lane turns eight of them into the tensor cores' bfloat16. K is taken
// in blocks of 128. In a block, unit u (0 to 3: two of each half) of lane quarter q is eight inputs: 32 q + 8 u ... of
// quantised weights, 32 u + 8 q ... of plain ones, so that a lane finds its units in few 16-byte pieces of the row, and
// FP4 inputs that share a scale in one lane. A unit makes two steps of mma.sync m16n8k16. Which inputs those multiply
// together is free as long as both operands agree; of quantised weights they are (0, 4) (1, 5) and (2, 6) (3, 7), the
// pairs that come out of packed codes with fewest instructions, and activations.h lays the activations out alike.
#pragma once

#include "cuda/sm80/code_pairs.h"

namespace dsv4::sm80 {

inline constexpr int kBlockInputs = 128;
inline constexpr int kUnits = 2;  // of a lane and half block

enum class WeightForm {
  kFp8,      // e4m3, a scale for 128 x 128
  kFp4,      // e2m1, an e8m0 scale for 32 inputs of a row
  kFp4Wide,  // e2m1, a float32 scale for 32 inputs of a row
  kBFloat16,
  kFloat32,
};

template <WeightForm kForm>
inline constexpr bool kIsPlain = kForm == WeightForm::kBFloat16 || kForm == WeightForm::kFloat32;

// The upper halves of three floats that add up to `value`: 8 significant bits each, taken off by truncation. Where it
// is not finite, the first one is it.
DSV4_DEVICE uint32_t float_part(float value, int part) {
  if ((bits_from_float(value) & 0x7F800000u) == 0x7F800000u) {
    return part > 0 ? 0 : value != value ? 0x7FC0u : bits_from_float(value) >> 16;
  }
  for (int i = 0; i < part; ++i) value = ptx::add(value, -float_from_bits(bits_from_float(value) & 0xFFFF0000u));
  return bits_from_float(value) >> 16;
}

// Of a form: the bytes of a row of a block, the bfloat16 parts that a weight is the sum of, and a lane's eight weights
// at a time. `load` reads shared memory where the unit (0 or 1 of a half) begins a piece; `pairs` gives the operands of
// the unit's two steps, each step's lower k first. `factor` comes from scale_factor below.
template <WeightForm>
struct WeightUnit;

template <>
struct WeightUnit<WeightForm::kFp8> {
  static constexpr int kRowBytes = kBlockInputs, kParts = 1;
  Words4 codes;
  uint32_t special;  // not 0: there may be NaN codes

  static DSV4_DEVICE int place(int row, int piece) { return piece ^ (row & 1); }

  DSV4_DEVICE void load(uint32_t rows, int row, int quarter, int half, int unit, bool) {
    if (unit != 0) return;
    codes = ptx::load_shared_16(rows + static_cast<uint32_t>(row * kRowBytes + place(row, 2 * quarter + half) * 16));
    special = e4m3_nans(codes);
  }

  // Moved into the fields of a bfloat16 a code is its value times 2^-120, NaN 480.
  DSV4_DEVICE void pairs(int unit, int, uint32_t factor, uint32_t (&pair)[4]) const {
    const uint32_t low = codes.word[2 * unit], high = codes.word[2 * unit + 1];
    DSV4_UNROLL
    for (int i = 0; i < 4; ++i) {
      const uint32_t both = ptx::select_bytes(low, high, 0x4000u + 0x1010u * static_cast<uint32_t>(i));
      pair[i] = ptx::multiply_bf16_pairs((both & 0x80008000u) | (both >> 4 & 0x07F007F0u), factor);
    }
    if (special == 0) return;
    DSV4_UNROLL
    for (int i = 0; i < 4; ++i) {
      if ((pair[i] & 0x7FFFu) == 0x43F0u) pair[i] |= 0x7FC0u;
      if ((pair[i] & 0x7FFF0000u) == 0x43F00000u) pair[i] |= 0x7FC00000u;
    }
  }
};

struct Fp4Unit {
  static constexpr int kRowBytes = kBlockInputs / 2;
  Words4 codes;

  static DSV4_DEVICE int place(int, int piece) { return piece; }

  // keep: both halves are read at once and kept, since eight bytes of each lane meet half of the banks, twice.
  DSV4_DEVICE void load(uint32_t rows, int row, int quarter, int half, int unit, bool keep) {
    if (unit != 0) return;
    const uint32_t from = rows + static_cast<uint32_t>(row * kRowBytes + quarter * 16);
    if (!keep) {
      const ptx::Words2 own = ptx::load_shared_8(from + static_cast<uint32_t>(half * 8));
      codes.word[0] = own.word[0], codes.word[1] = own.word[1];
    } else if (half == 0) {
      codes = ptx::load_shared_16(from);
    } else {
      codes.word[0] = codes.word[2], codes.word[1] = codes.word[3];
    }
  }

  // Moved into the fields of a bfloat16 a code is its value times 2^-126.
  DSV4_DEVICE void pairs(int unit, uint32_t factor, uint32_t (&pair)[4]) const {
    const uint32_t word = codes.word[unit];
    const uint32_t signs[4] = {word << 12, word << 8, word << 4, word};
    const uint32_t magnitudes[4] = {word << 6, word << 2, word >> 2, word >> 6};
    DSV4_UNROLL
    for (int i = 0; i < 4; ++i) {
      pair[i] = ptx::multiply_bf16_pairs((signs[i] & 0x80008000u) | (magnitudes[i] & 0x01C001C0u), factor);
    }
  }
};

template <>
struct WeightUnit<WeightForm::kFp4> : Fp4Unit {
  static constexpr int kParts = 1;
  DSV4_DEVICE void pairs(int unit, int, uint32_t factor, uint32_t (&pair)[4]) const {
    Fp4Unit::pairs(unit, factor, pair);
  }
};

// A code has 2 significant bits: times 6 bits of the scale it is a bfloat16. factor: the scale's bits.
template <>
struct WeightUnit<WeightForm::kFp4Wide> : Fp4Unit {
  static constexpr int kParts = 4;
  DSV4_DEVICE void pairs(int unit, int part, uint32_t factor, uint32_t (&pair)[4]) const {
    uint32_t bits = factor;
    if ((bits & 0x7F800000u) == 0x7F800000u) {
      bits = part > 0 ? 0 : (bits & 0x7FFFFFu) != 0 ? 0x7FC00000u : bits;
    } else {
      for (int i = 0; i < part; ++i) {
        bits = bits_from_float(ptx::add(float_from_bits(bits), -float_from_bits(bits & 0xFFFC0000u)));
      }
      bits &= 0xFFFC0000u;
    }
    Fp4Unit::pairs(unit, 0x7E807E80u, pair);  // 2^126
    DSV4_UNROLL
    for (int i = 0; i < 4; ++i) pair[i] = ptx::multiply_bf16_pairs(pair[i], bits | bits >> 16);
  }
};

template <>
struct WeightUnit<WeightForm::kBFloat16> {
  static constexpr int kRowBytes = kBlockInputs * 2, kParts = 1;
  Words4 values;

  static DSV4_DEVICE int place(int row, int piece) { return piece ^ (row & 1) * 4; }

  DSV4_DEVICE void load(uint32_t rows, int row, int quarter, int half, int unit, bool) {
    const int piece = 8 * half + 4 * unit + quarter;
    values = ptx::load_shared_16(rows + static_cast<uint32_t>(row * kRowBytes + place(row, piece) * 16));
  }

  DSV4_DEVICE void pairs(int, int, uint32_t, uint32_t (&pair)[4]) const {
    DSV4_UNROLL
    for (int i = 0; i < 4; ++i) pair[i] = values.word[i];
  }
};

template <>
struct WeightUnit<WeightForm::kFloat32> {
  static constexpr int kRowBytes = kBlockInputs * 4, kParts = 3;
  Words4 values[2];

  static DSV4_DEVICE int place(int row, int piece) { return piece ^ (row & 1); }

  DSV4_DEVICE void load(uint32_t rows, int row, int quarter, int half, int unit, bool) {
    DSV4_UNROLL
    for (int i = 0; i < 2; ++i) {
      const int piece = 16 * half + 8 * unit + 2 * quarter + i;
      values[i] = ptx::load_shared_16(rows + static_cast<uint32_t>(row * kRowBytes + place(row, piece) * 16));
    }
  }

  DSV4_DEVICE void pairs(int, int part, uint32_t, uint32_t (&pair)[4]) const {
    DSV4_UNROLL
    for (int i = 0; i < 4; ++i) {
      const uint32_t* from = values[i / 2].word + i % 2 * 2;
      pair[i] = float_part(float_from_bits(from[0]), part) | float_part(float_from_bits(from[1]), part) << 16;
    }
  }
};

}  // namespace dsv4::sm80
