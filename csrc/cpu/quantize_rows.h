// Quantisers, their inverses and the Hadamard rotation of rows, for the arithmetic `L` of an instruction set (see
// page_writer.h).
#pragma once

#include <math.h>

#include "common/pages.h"
#include "cpu/page_writer.h"
#include "ops/quantize.h"

namespace dsv4 {

// encode(x, count, codes) quantises a block and returns its scale; a byte holds `packed` codes.
template <class X, class Encode>
Status quantize_rows(const QuantizeParams& p, int64_t packed, const Context& context, const Encode& encode) {
  const int64_t n = p.x.size(1);
  parallel(context, p.x.size(0), rows_a_piece(n), [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      const X* x = p.x.as<const X>().at(row);
      uint8_t *codes = p.codes.as<uint8_t>().at(row), *scale = p.scale.as<uint8_t>().at(row);
      for (int64_t d = 0; d < n; d += p.block) {
        *scale++ = encode(x + d, n - d < p.block ? n - d : p.block, codes + d / packed);
      }
    }
  });
  return Status::ok();
}

template <class L>
Status quantize_fp8_rows(const L& lanes, const QuantizeParams& p, const Context& context) {
  const auto encode = [&](const auto* x, int64_t count, uint8_t* codes) { return lanes.quantize_fp8(x, count, codes); };
  return p.x.dtype == DType::kBFloat16 ? quantize_rows<bf16>(p, 1, context, encode)
                                       : quantize_rows<float>(p, 1, context, encode);
}

template <class L>
Status quantize_fp4_rows(const L& lanes, const QuantizeParams& p, const Context& context) {
  const auto encode = [&](const auto* x, int64_t count, uint8_t* codes) { return lanes.quantize_fp4(x, count, codes); };
  return p.x.dtype == DType::kBFloat16 ? quantize_rows<bf16>(p, 2, context, encode)
                                       : quantize_rows<float>(p, 2, context, encode);
}

template <class X, class L>
Status dequantize_rows(const L& lanes, const DequantizeParams& p, const Context& context) {
  const int64_t rows = p.codes.size(1), n = p.result.size(2);
  parallel(context, p.codes.size(0) * rows, rows_a_piece(n), [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t b = i / rows, row = i % rows;
      const uint8_t* codes = p.codes.as<const uint8_t>().at(b, row);
      X* result = p.result.as<X>().at(b, row);
      for (int64_t d = 0, block = 0; d < n; d += p.block, ++block) {
        const int64_t count = n - d < p.block ? n - d : p.block, group = row / p.group;
        const float scale = p.scale.dtype == DType::kFloat32
                                ? *p.scale.as<const float>().at(b, group, block)
                                : e8m0_value(*p.scale.as<const uint8_t>().at(b, group, block));
        if (p.fp4) {
          lanes.dequantize_fp4(codes + d / 2, count, scale, result + d);
        } else {
          lanes.dequantize_fp8(codes + d, count, scale, result + d);
        }
      }
    }
  });
  return Status::ok();
}

template <class X, class L>
Status hadamard_rows(const L& lanes, const HadamardParams& p, const Context& context) {
  const int64_t dims = p.x.size(1);
  const double factor = ::pow(static_cast<double>(dims), -0.5);
  const int64_t bytes = row_slot_bytes(2 * dims);
  in_slots(context, p.workspace, p.x.size(0), bytes, [&](uint8_t* memory, int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      lanes.template hadamard<X>(p.x.as<const X>().at(row), dims, factor, reinterpret_cast<double*>(memory),
                                 p.result.as<X>().at(row));
    }
  });
  return Status::ok();
}

}  // namespace dsv4
