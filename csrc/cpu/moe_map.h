// Pairs (token, slot) sorted by expert, stably: what the experts' driver works from, and the moe_map op.
#pragma once

#include "cpu/moe.h"

namespace dsv4 {
namespace {

template <int N>
DSV4_HOST_DEVICE int64_t moe_integer(const AnyView<N>& view, int64_t row, int64_t column) {
  const int64_t offset = row * view.stride[0] + column * view.stride[N - 1];
  return view.dtype == DType::kInt64 ? static_cast<const int64_t*>(view.data)[offset]
                                     : static_cast<const int32_t*>(view.data)[offset];
}

// Of `tokens` rows of indices from row `first` on: start[e] ... start[e + 1] are the places of expert e in `order`,
// which holds pairs (token - first) * K + slot; place[pair] is where a pair went, -1 for an index outside
// 0 ... experts - 1. `start` has experts + 1 elements; `place` may be null. No other memory is needed: `start` counts,
// then moves along as places are given out, and is put back in the end.
template <class T>
void moe_sort(const AnyView<2>& indices, int64_t first, int64_t tokens, int64_t experts, T* start, T* order, T* place) {
  const int64_t top_k = indices.shape[1];
  const auto chosen = [&](int64_t token, int64_t slot) {
    const int64_t e = moe_integer(indices, first + token, slot);
    return e < 0 || e >= experts ? -1 : e;
  };
  for (int64_t e = 0; e <= experts; ++e) start[e] = 0;
  for (int64_t t = 0; t < tokens; ++t) {
    for (int64_t k = 0; k < top_k; ++k) {
      const int64_t e = chosen(t, k);
      if (e >= 0) ++start[e + 1];
    }
  }
  for (int64_t e = 1; e <= experts; ++e) start[e] = static_cast<T>(start[e] + start[e - 1]);
  for (int64_t t = 0; t < tokens; ++t) {
    for (int64_t k = 0; k < top_k; ++k) {
      const int64_t e = chosen(t, k), pair = t * top_k + k;
      const T at = e < 0 ? T{-1} : start[e]++;
      if (e >= 0) order[at] = static_cast<T>(pair);
      if (place != nullptr) place[pair] = at;
    }
  }
  for (int64_t e = experts; e > 0; --e) start[e] = start[e - 1];
  start[0] = 0;
}

}  // namespace
}  // namespace dsv4
