// Writes rows and index keys to pages, and the pipeline that store_window and compress share. `L`, a type of the
// including file's own, does the arithmetic on rows of float32: of the portable kernels or of an instruction set.
//
// Norms, rotations and pooling are float64 inside and rounded where the contract says. The work moves 4 to 16 bytes an
// element and is bound by memory all the same, and its bits are those of the Python definition.
#pragma once

#include "cpu/norm_rope_rows.h"
#include "ops/page_places.h"

namespace dsv4 {

class PageWriter {
 public:
  using Place = PagePlaces::Place;

  DSV4_HOST_DEVICE PageWriter(const RowPool& pool, int64_t dim, int64_t rope_dim, bool keys)
      : places_(pool, dim, rope_dim, keys) {}

  DSV4_HOST_DEVICE Place find(int64_t sequence, int64_t entry) const { return places_.find(sequence, entry); }

  template <class L>
  DSV4_HOST_DEVICE void write(const L& lanes, const float* row, Place place) const {
    switch (places_.format) {
      case PageFormat::kFloat32:
        lanes.store(row, places_.dim, reinterpret_cast<float*>(place.data));
        break;
      case PageFormat::kBFloat16:
        lanes.store(row, places_.dim, reinterpret_cast<bf16*>(place.data));
        break;
      case PageFormat::kFp8Rows: {
        const int64_t codes = places_.dim - places_.rope_dim;
        for (int64_t d = 0, block = 0; d < codes; d += kRowBlock, ++block) {
          place.scales[block] =
              lanes.quantize_fp8(row + d, codes - d < kRowBlock ? codes - d : kRowBlock, place.data + d);
        }
        lanes.store(row + codes, places_.rope_dim, reinterpret_cast<bf16*>(place.data + codes));
        break;
      }
      case PageFormat::kFp8Keys: {
        const float scale = e8m0_value(lanes.quantize_fp8(row, places_.dim, place.data));
        memcpy(place.scales, &scale, sizeof(scale));
        break;
      }
      case PageFormat::kFp4Keys:
        for (int64_t d = 0; d < places_.dim; d += kIndexScaleDims) {
          place.scales[d / kIndexScaleDims] = lanes.quantize_fp4(row + d, kIndexScaleDims, place.data + d / 2);
        }
        break;
    }
  }

 private:
  PagePlaces places_;
};

// row = the RMS norm of row with weight, rounded to N, its last dims rotated and rounded to N.
template <class N, class L>
DSV4_HOST_DEVICE void norm_rope(const L& lanes, float* row, int64_t dim, const AnyView<1>& weight, double eps,
                                const float* rope, int64_t pairs) {
  normalise<N>(lanes, row, dim, weight, eps, row);
  lanes.template rotate<N>(row + dim - 2 * pairs, rope, pairs);
}

// body(slot's memory, begin, end) over all rows, a stretch for each slot of the workspace.
template <class Body>
DSV4_HOST_DEVICE void in_slots(const Context& context, const Workspace& workspace, int64_t rows, int64_t slot_bytes,
                               const Body& body) {
  const int64_t slots = row_slots(rows, context);
  parallel(context, slots, [&](int64_t first, int64_t last) {
    for (int64_t slot = first; slot < last; ++slot) {
      body(static_cast<uint8_t*>(workspace.data) + slot * slot_bytes, rows * slot / slots, rows * (slot + 1) / slots);
    }
  });
}

template <class X, class L>
Status store_window_rows(const L& lanes, const StoreWindowParams& p, const Context& context) {
  const int64_t dim = p.kv.size(1), pairs = p.rope.size(1);
  const PageWriter writer(p.pool, dim, 2 * pairs, false);
  in_slots(context, p.workspace, p.kv.size(0), row_slot_bytes(dim), [&](uint8_t* memory, int64_t begin, int64_t end) {
    float* row = reinterpret_cast<float*>(memory);
    for (int64_t t = begin; t < end; ++t) {
      const auto place = writer.find(*p.sequence.as<const int32_t>().at(t), *p.position.as<const int32_t>().at(t));
      if (place.data == nullptr) continue;
      lanes.load(p.kv.as<const X>().at(t), dim, row);
      norm_rope<X>(lanes, row, dim, p.weight, p.eps, p.rope.as<const float>().at(t), pairs);
      writer.write(lanes, row, place);
    }
  });
  return Status::ok();
}

}  // namespace dsv4
