// hadamard, for the arithmetic `L` of an instruction set (see page_writer.h).
#pragma once

#include <math.h>

#include "cpu/page_writer.h"
#include "ops/quantize.h"

namespace dsv4 {

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
