// index_query, for the arithmetic `L` of an instruction set (see page_writer.h). A head at a time, which does not leave
// the first-level cache.
#pragma once

#include <math.h>

#include "common/pages.h"
#include "cpu/norm_rope.h"
#include "ops/index.h"

namespace dsv4 {

template <class X, class L>
Status index_query_rows(const L& lanes, const IndexQueryParams& p, const Context& context) {
  const int64_t heads = p.query.size(1), dim = p.query.size(2), pairs = p.rope.size(1);
  const int64_t block = dim < kIndexScaleDims ? dim : kIndexScaleDims;
  const double factor = ::pow(static_cast<double>(dim), -0.5);
  parallel(context, p.query.size(0) * heads, rows_a_piece(dim), [&](int64_t begin, int64_t end) {
    alignas(64) float row[kMostIndexQueryDims];
    alignas(64) double work[kMostIndexQueryDims];
    for (int64_t i = begin; i < end; ++i) {
      const int64_t t = i / heads, h = i % heads;
      X* result = p.result.as<X>().at(t, h);
      lanes.load(p.query.as<const X>().at(t, h), dim, row);
      lanes.template rotate<X>(row + dim - 2 * pairs, p.rope.as<const float>().at(t), pairs);
      lanes.template hadamard<X>(row, dim, factor, work, row);
      for (int64_t d = 0; d < dim; d += block) lanes.fp4_round_trip(row + d, block, result + d);
    }
  });
  return Status::ok();
}

}  // namespace dsv4
