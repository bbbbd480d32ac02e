// The checks of native callers' parameters: sizes, null pointers, strides, alignment, overflow. Keeps the first
// failure.
#pragma once

#include <cstddef>
#include <cstdint>
#include <initializer_list>

#include "common/status.h"
#include "common/view.h"

namespace dsv4 {

class Validator {
 public:
  static constexpr int64_t kAny = -1;  // a size that may be anything

  explicit Validator(const char* op) : op_(op) {}

  // A view of the given element type and sizes whose last `dense` axes lie densely in memory.
  template <int N>
  void view(const char* name, const AnyView<N>& view, DType dtype, std::initializer_list<int64_t> sizes,
            int dense = 1) {
    tensor(name, view.data, view.dtype, dtype, view.shape, view.stride, sizes, dense);
  }
  template <class T, int N>
  void view(const char* name, const View<T, N>& view, std::initializer_list<int64_t> sizes, int dense = 1) {
    tensor(name, view.data, DType::kFloat32, DType::kFloat32, view.shape, view.stride, sizes, dense);
    static_assert(sizeof(T) == sizeof(float), "float32 views only");
  }

  // The same for elements of bfloat16 or float32, whichever they are.
  template <int N>
  void floats(const char* name, const AnyView<N>& view, std::initializer_list<int64_t> sizes) {
    floating(name, view.dtype);
    this->view(name, view, view.dtype, sizes);
  }

  // An element type that must be bfloat16 or float32.
  void floating(const char* name, DType dtype);
  // float32 [tokens, pairs, 2] for the last dims of heads of head_dim.
  void rope(const AnyView<3>& rope, int64_t tokens, int64_t head_dim);
  void workspace(const void* data, int64_t bytes, int64_t needed);
  void not_negative(const char* name, float value);
  void at_least(const char* name, int64_t value, int64_t least);
  __attribute__((format(printf, 3, 4))) void require(bool condition, const char* format, ...);

  const Status& status() const { return status_; }

 private:
  void tensor(const char* name, const void* data, DType dtype, DType wanted, const int64_t* shape,
              const int64_t* stride, std::initializer_list<int64_t> sizes, int dense);

  const char* op_;
  Status status_ = Status::ok();
};

}  // namespace dsv4
