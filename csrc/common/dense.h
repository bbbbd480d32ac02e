// What native tests and benchmarks share: views of dense memory, and seeded numbers to fill it with.
#pragma once

#include <initializer_list>
#include <iterator>
#include <type_traits>

#include "common/view.h"

namespace dsv4 {

template <class T>
constexpr DType dtype_of() {
  using Element = std::remove_const_t<T>;
  if (std::is_same_v<Element, float>) return DType::kFloat32;
  if (std::is_same_v<Element, bf16>) return DType::kBFloat16;
  if (std::is_same_v<Element, uint8_t>) return DType::kUInt8;
  if (std::is_same_v<Element, int32_t>) return DType::kInt32;
  if (std::is_same_v<Element, int64_t>) return DType::kInt64;
  return DType::kNone;
}

// V is a View, or an AnyView, which gets the dtype of T; `sizes` has one for each of its axes.
template <class V, class T>
V dense(T* data, const int64_t* sizes) {
  V view;
  if constexpr (std::is_same_v<decltype(view.data), void*>) {
    view.data = const_cast<std::remove_const_t<T>*>(data);
    view.dtype = dtype_of<T>();
  } else {
    view.data = data;
  }
  int64_t stride = 1;
  for (int axis = static_cast<int>(std::size(view.shape)) - 1; axis >= 0; --axis) {
    view.shape[axis] = sizes[axis];
    view.stride[axis] = stride;
    stride *= sizes[axis];
  }
  return view;
}
template <class V, class T>
V dense(T* data, std::initializer_list<int64_t> sizes) {
  return dense<V>(data, sizes.begin());
}

// Uniform numbers, the same on every machine.
class Random {
 public:
  explicit Random(uint64_t seed = 1) : state_(seed * 0x9E3779B97F4A7C15ull + 1) {}

  uint64_t bits() {
    state_ ^= state_ << 13;
    state_ ^= state_ >> 7;
    state_ ^= state_ << 17;
    return state_;
  }
  // In [low, high).
  float uniform(float low = -1, float high = 1) {
    return low + (high - low) * static_cast<float>(bits() >> 40) * (1.0f / 16777216.0f);
  }

  // In [0, count).
  int64_t below(int64_t count) { return static_cast<int64_t>(bits() % static_cast<uint64_t>(count)); }

 private:
  uint64_t state_;
};

}  // namespace dsv4
