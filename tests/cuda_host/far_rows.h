// Rows so far apart that offsets are no 32-bit numbers, for the host model.
#pragma once

#include <sys/mman.h>

#include "buffer.h"

namespace dsv4::testing {

// Three tokens so far apart that the last one's offset is no 32-bit number, in memory that exists only where it is
// touched.
template <class X>
struct FarRows {
  static constexpr int64_t kStride = int64_t{1} << 30;  // elements
  static constexpr size_t kBytes = (2 * kStride + 4096) * sizeof(X);
  X* data;
  FarRows() {
    void* memory = mmap(nullptr, kBytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (memory == MAP_FAILED) throw std::bad_alloc();
    data = static_cast<X*>(memory);
  }
  ~FarRows() { munmap(data, kBytes); }
  template <int N>
  AnyView<N> spread(AnyView<N> view, DeviceTensor<X>* from = nullptr) {
    for (int64_t t = 0; from != nullptr && t < 3; ++t)
      memcpy(data + t * kStride, &from->at(t), from->inner() * sizeof(X));
    view.data = data;
    view.stride[0] = kStride;
    return view;
  }
};

}  // namespace dsv4::testing
