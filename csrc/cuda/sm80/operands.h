// What launches follow from: numbers of blocks, and what operands' memory allows.
#pragma once

#include "common/pages.h"
#include "common/view.h"

namespace dsv4::sm80 {

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

inline bool aligned(const void* data, uintptr_t bytes = 16) { return reinterpret_cast<uintptr_t>(data) % bytes == 0; }

template <int N>
bool in_pieces(const void* data, int64_t element, const int64_t (&shape)[N], const int64_t (&stride)[N]) {
  bool whole = aligned(data) && shape[N - 1] * element % 16 == 0;
  for (int axis = 0; axis + 1 < N; ++axis) whole = whole && (stride[axis] * element % 16 == 0 || shape[axis] <= 1);
  return whole;
}

// Whether every row is made of whole, aligned 16-byte pieces. The last axis is dense; there may be no view.
template <int N>
bool in_pieces(const AnyView<N>& view) {
  return in_pieces(view.data, size_of(view.dtype), view.shape, view.stride);
}
template <class T, int N>
bool in_pieces(const View<T, N>& view) {
  return in_pieces(view.data, sizeof(T), view.shape, view.stride);
}

// The same, and of whole eights.
template <int N>
bool in_eights(const AnyView<N>& view) {
  return view.shape[N - 1] % 8 == 0 && in_pieces(view);
}

}  // namespace dsv4::sm80
