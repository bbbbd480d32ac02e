// Writes a row or an index key to its place in a page, eight dims a lane; see PagePlaces.
#pragma once

#include "cuda/sm80/operands.h"
#include "cuda/sm80/row_lanes.h"
#include "ops/page_places.h"

namespace dsv4::sm80 {

// Whether eights of the pool's rows can be stored whole.
inline bool whole_places(const PagePlaces& places) {
  const bool whole =
      aligned(places.data) && places.page_stride % 16 == 0 && places.row_stride % 16 == 0 && places.dim % 8 == 0;
  const bool rows = places.format == PageFormat::kFp8Rows;
  return whole && (!rows || (places.rope_dim % 8 == 0 && (places.dim - places.rope_dim) % 16 == 0));
}

// The scale of e4m3 codes from the bits of the largest magnitude, and what they are multiplied by; not finite: NaN.
struct CodeScale {
  uint8_t scale;
  float inverse;
};
DSV4_DEVICE CodeScale code_scale(uint8_t scale) { return {scale, scale == 255 ? 0.0f : inverse_scale(scale)}; }

DSV4_DEVICE ptx::Words2 e4m3_eight(const float (&value)[8], const CodeScale& by) {
  if (by.scale == 255) return {{0x7F7F7F7Fu, 0x7F7F7F7Fu}};
  ptx::Words2 codes;
  DSV4_UNROLL
  for (int w = 0; w < 2; ++w) {
    const uint32_t low = ptx::pack_e4m3(ptx::multiply(value[4 * w], by.inverse),  //
                                        ptx::multiply(value[4 * w + 1], by.inverse));
    const uint32_t high =
        ptx::pack_e4m3(ptx::multiply(value[4 * w + 2], by.inverse), ptx::multiply(value[4 * w + 3], by.inverse));
    codes.word[w] = low | high << 16;
  }
  return codes;
}

// Eight e2m1 codes, the first in the low nibble; 0 where the scale is NaN.
DSV4_DEVICE uint32_t e2m1_eight(const float (&value)[8], const CodeScale& by) {
  uint32_t codes = 0;
  DSV4_UNROLL
  for (int e = 0; e < 8; ++e) {
    codes |= static_cast<uint32_t>(e2m1_code(ptx::multiply(value[e], by.inverse))) << (4 * e);
  }
  return by.scale == 255 ? 0 : codes;
}

DSV4_DEVICE void store_bytes(uint8_t* to, int count, const ptx::Words2& bytes) {
  DSV4_UNROLL
  for (int e = 0; e < 8; ++e) {
    if (e < count) to[e] = static_cast<uint8_t>(bytes.word[e / 4] >> (e % 4 * 8));
  }
}

// All lanes of the row call it for each step, those past the end too; what is not stored has no place.
class PageRow {
 public:
  DSV4_DEVICE PageRow(const PagePlaces& places, const PagePlaces::Place& place, const RowLanes& lanes, bool vector)
      : format_(places.format),
        place_(place),
        dim_(static_cast<int>(places.dim)),
        codes_(static_cast<int>(places.dim - places.rope_dim)),
        lanes_(lanes.count),
        vector_(vector) {}

  // Rows of floats or FP8 rows.
  DSV4_DEVICE void write_row(int column, const float (&value)[8]) const {
    if (format_ == PageFormat::kFp8Rows) return write_fp8(column, value);
    if (place_.data == nullptr) return;
    if (format_ == PageFormat::kFloat32) {
      store_eight(reinterpret_cast<float*>(place_.data), column, dim_, vector_, value);
    } else {
      store_eight(reinterpret_cast<bf16*>(place_.data), column, dim_, vector_, value);
    }
  }

  // A whole index key: element 8 (step * lanes + lane) + e is value[step][e].
  template <int kSteps>
  DSV4_DEVICE void write_key(const RowLanes& lanes, const float (&value)[kSteps][8]) const {
    uint32_t largest[kSteps], most = 0;
    DSV4_UNROLL
    for (int s = 0; s < kSteps; ++s) {
      largest[s] = largest_magnitude(value[s], 8);
      most = most < largest[s] ? largest[s] : most;
    }
    if (format_ == PageFormat::kFp8Keys) most = largest_of_lanes(most, lanes.count);
    DSV4_UNROLL
    for (int s = 0; s < kSteps; ++s) {
      const int column = 8 * (s * lanes.count + lanes.lane);
      if (format_ == PageFormat::kFp8Keys) {
        write_fp8_key(column, value[s], code_scale(fp8_scale(most)));
      } else if (format_ == PageFormat::kFp4Keys) {
        write_fp4_key(column, value[s], code_scale(fp4_scale(largest_of_lanes(largest[s], 4))));
      } else {
        write_row(column, value[s]);
      }
    }
  }

 private:
  DSV4_DEVICE void write_fp8_key(int column, const float (&value)[8], const CodeScale& by) const {
    if (place_.data == nullptr || column >= dim_) return;
    const ptx::Words2 codes = e4m3_eight(value, by);
    if (vector_) {
      ptx::store_global_8(place_.data + column, codes);
    } else {
      store_bytes(place_.data + column, dim_ - column, codes);
    }
    if (column > 0) return;
    const uint32_t scale = bits_from_float(e8m0_value(by.scale));
    DSV4_UNROLL
    for (int i = 0; i < 4; ++i) place_.scales[i] = static_cast<uint8_t>(scale >> (8 * i));
  }

  DSV4_DEVICE void write_fp4_key(int column, const float (&value)[8], const CodeScale& by) const {
    if (place_.data == nullptr || column >= dim_) return;
    const uint32_t codes = e2m1_eight(value, by);
    uint8_t* to = place_.data + column / 2;
    if (vector_) {
      ptx::store_global_4(to, codes);
    } else {
      store_bytes(to, 4, {{codes, 0}});
    }
    if (column % kIndexScaleDims == 0) place_.scales[column / kIndexScaleDims] = by.scale;
  }

  DSV4_DEVICE void write_fp8(int column, const float (&value)[8]) const {
    const int count = column < codes_ ? (codes_ - column < 8 ? codes_ - column : 8) : 0;
    const uint32_t largest = largest_of_lanes(largest_magnitude(value, count), lanes_ < 8 ? lanes_ : 8);
    if (place_.data == nullptr || column >= dim_) return;
    if (count > 0) {
      const CodeScale by = code_scale(fp8_scale(largest));
      const ptx::Words2 codes = e4m3_eight(value, by);
      if (vector_) {
        ptx::store_global_8(place_.data + column, codes);
      } else {
        store_bytes(place_.data + column, count, codes);
      }
      if (column % kRowBlock == 0) place_.scales[column / kRowBlock] = by.scale;
    }
    if (count == 8) return;
    if (vector_) {
      ptx::store_global_16(place_.data + codes_ + 2 * (column - codes_), pack(value));
    } else {
      store_rope(column, pack(value));
    }
  }

  // The rotated dims of an eight as bfloat16, which need not be aligned.
  DSV4_DEVICE void store_rope(int column, const Words4& narrow) const {
    DSV4_UNROLL
    for (int e = 0; e < 8; ++e) {
      const int at = column + e - codes_;
      if (at < 0 || column + e >= dim_) continue;
      const uint32_t bits = narrow.word[e / 2] >> (e % 2 * 16);
      place_.data[codes_ + 2 * at] = static_cast<uint8_t>(bits);
      place_.data[codes_ + 2 * at + 1] = static_cast<uint8_t>(bits >> 8);
    }
  }

  PageFormat format_;
  PagePlaces::Place place_;
  int dim_, codes_, lanes_;
  bool vector_;
};

}  // namespace dsv4::sm80
