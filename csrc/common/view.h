// Strided views over memory that somebody else owns. Plain C++ and CUDA; no torch.
#pragma once

#include <cstdint>

#include "common/dtype.h"

namespace dsv4 {

// Element type known at compile time. Sizes and strides count elements.
template <class T, int N>
struct View {
  T* data = nullptr;
  int64_t shape[N] = {};
  int64_t stride[N] = {};

  DSV4_HOST_DEVICE int64_t size(int axis) const { return shape[axis]; }
  // Null alone does not make a view none: a caller may have forgotten its memory.
  DSV4_HOST_DEVICE bool given() const {
    bool any = data != nullptr;
    for (int axis = 0; axis < N; ++axis) any = any || shape[axis] != 0;
    return any;
  }

  template <class... Index>
  DSV4_HOST_DEVICE T* at(Index... index) const {
    static_assert(sizeof...(Index) <= N);
    const int64_t position[] = {static_cast<int64_t>(index)..., 0};
    int64_t offset = 0;
    for (int axis = 0; axis < static_cast<int>(sizeof...(Index)); ++axis) offset += position[axis] * stride[axis];
    return data + offset;
  }
};

// Element type known at run time: what a contract uses where an operand may be bfloat16 or float32.
template <int N>
struct AnyView {
  void* data = nullptr;
  DType dtype = DType::kNone;
  int64_t shape[N] = {};
  int64_t stride[N] = {};

  DSV4_HOST_DEVICE int64_t size(int axis) const { return shape[axis]; }
  DSV4_HOST_DEVICE bool given() const { return dtype != DType::kNone; }

  // Elements [begin, begin + count) of an axis.
  DSV4_HOST_DEVICE AnyView part(int axis, int64_t begin, int64_t count) const {
    AnyView view = *this;
    view.data = static_cast<uint8_t*>(data) + begin * stride[axis] * size_of(dtype);
    view.shape[axis] = count;
    return view;
  }

  template <class T>
  DSV4_HOST_DEVICE View<T, N> as() const {
    View<T, N> view;
    view.data = static_cast<T*>(data);
    for (int axis = 0; axis < N; ++axis) {
      view.shape[axis] = shape[axis];
      view.stride[axis] = stride[axis];
    }
    return view;
  }
};

}  // namespace dsv4
