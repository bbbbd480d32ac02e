// Memory that kernels read and write, in two bodies like the kernels: on the host model a range that ends where the
// process may not read, on a GPU device memory with a copy on the host. Both have guard bands and start as NaN
// patterns.
#pragma once

#include <cstdint>
#include <cstring>
#include <memory>
#include <new>
#include <utility>
#include <vector>

#include "common/context.h"
#include "common/dense.h"
#include "native/check.h"

#if defined(DSV4_ON_GPU)
#include <cuda_runtime_api.h>
#else
#include <sys/mman.h>
#endif

namespace dsv4::testing {

inline Context cuda_context() {
  Context context;
  context.device = Device::kCuda;
  context.best = Isa::kSm80;
  return context;
}

#if defined(DSV4_ON_GPU)
// Of the absolute products of a block of 128, that a sum may be off: tensor cores cut off what the host model rounds
// (docs/numerics.md).
inline constexpr double kSumError = 0x1p-20;
inline bool has_device() {
  int count = 0;
  return cudaGetDeviceCount(&count) == cudaSuccess && count > 0;
}
// Hopper's, and kernels for them in this program.
inline bool has_warpgroups() {
#if defined(DSV4_WITH_SM90)
  int major = 0;
  return cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, 0) == cudaSuccess && major == 9;
#else
  return false;
#endif
}
// Waits for the kernels; false and a failed check if one of them went wrong.
inline bool finish_device() {
  const cudaError_t error = cudaDeviceSynchronize();
  return CHECK_MESSAGE(error == cudaSuccess, cudaGetErrorString(error));
}
#else
inline constexpr double kSumError = 0x1p-22;
inline bool has_device() { return true; }
inline bool has_warpgroups() { return false; }
inline bool finish_device() { return true; }
#endif

// Says so where there is none.
inline bool no_device() {
  if (has_device()) return false;
  not_run("no CUDA device");
  return true;
}

// While one lives, the rows of new tensors lie so far apart that offsets are no 32-bit numbers, on the host model.
struct RowsApart {
  static inline int64_t elements = 0;
#if !defined(DSV4_ON_GPU)
  RowsApart() { elements = int64_t{1} << 31; }
  ~RowsApart() { elements = 0; }
  RowsApart(const RowsApart&) = delete;
  RowsApart& operator=(const RowsApart&) = delete;
#endif
};

// While one lives, one of the new tensors, by their number from 1 on, starts or has its rows an element off where they
// would be.
struct OddTensor {
  enum Part { kStart, kRows };
  static inline int chosen = 0, made = 0;
  static inline Part part = kStart;
  OddTensor(int number, Part of) {
    chosen = number, made = 0;
    part = of;
  }
  ~OddTensor() { chosen = 0; }
  OddTensor(const OddTensor&) = delete;
  OddTensor& operator=(const OddTensor&) = delete;

  // Of the tensor that is made now.
  static bool is(Part of) { return chosen > 0 && made == chosen && part == of; }
};

// Calls check() for each tensor that it makes, as that one.
template <class Check>
void each_odd_tensor(OddTensor::Part part, const Check& check) {
  for (int number = 1; number == 1 || number <= OddTensor::made; ++number) {
    const OddTensor odd(number, part);
    check();
  }
}
template <class Check>
void each_odd_tensor(const Check& check) {
  each_odd_tensor(OddTensor::kStart, check);
  each_odd_tensor(OddTensor::kRows, check);
}

// Bytes with guards on both sides. Sparse ones exist only where they are touched, and start as zeros.
class DeviceBytes {
 public:
  explicit DeviceBytes(size_t bytes, [[maybe_unused]] bool sparse = false) : bytes_(bytes) {
#if defined(DSV4_ON_GPU)
    host_.assign(bytes + 2 * kGuard, kPattern);
    if (cudaMalloc(reinterpret_cast<void**>(&memory_), host_.size()) != cudaSuccess) throw std::bad_alloc();
    upload();
#else
    const size_t body = (bytes + 2 * kGuard + kPage - 1) / kPage * kPage;
    mapped_ = body + kPage;
    const int flags = MAP_PRIVATE | MAP_ANONYMOUS | (sparse ? MAP_NORESERVE : 0);
    void* memory = mmap(nullptr, mapped_, PROT_READ | PROT_WRITE, flags, -1, 0);
    if (memory == MAP_FAILED) throw std::bad_alloc();
    memory_ = static_cast<uint8_t*>(memory);
    mprotect(memory_ + body, kPage, PROT_NONE);
    start_ = memory_ + (body - bytes) / 16 * 16;
    memset(memory_, kPattern, sparse ? static_cast<size_t>(start_ - memory_) : body);
    memset(start_ + bytes, kPattern, static_cast<size_t>(memory_ + body - start_) - bytes);
#endif
  }
  ~DeviceBytes() {
#if defined(DSV4_ON_GPU)
    cudaFree(memory_);
#else
    munmap(memory_, mapped_);
#endif
  }
  DeviceBytes(const DeviceBytes&) = delete;
  DeviceBytes& operator=(const DeviceBytes&) = delete;

#if defined(DSV4_ON_GPU)
  void* device() { return memory_ + kGuard; }
  void* host() { return host_.data() + kGuard; }
  void upload() { cudaMemcpy(memory_, host_.data(), host_.size(), cudaMemcpyHostToDevice); }
  void download() { cudaMemcpy(host_.data(), memory_, host_.size(), cudaMemcpyDeviceToHost); }
  bool intact() {
    download();
    for (size_t i = 0; i < kGuard; ++i) {
      if (host_[i] != kPattern || host_[kGuard + bytes_ + i] != kPattern) return false;
    }
    return true;
  }
#else
  void* device() { return start_; }
  void* host() { return start_; }
  void upload() {}
  void download() {}
  bool intact() {
    for (uint8_t* p = memory_; p < start_; ++p) {
      if (*p != kPattern) return false;
    }
    for (uint8_t* p = start_ + bytes_; p < memory_ + mapped_ - kPage; ++p) {
      if (*p != kPattern) return false;
    }
    return true;
  }
#endif

 private:
  static constexpr size_t kGuard = 256, kPage = 4096;
  static constexpr uint8_t kPattern = 0xFF;
  size_t bytes_;
  uint8_t* memory_ = nullptr;
#if defined(DSV4_ON_GPU)
  std::vector<uint8_t> host_;
#else
  uint8_t* start_ = nullptr;
  size_t mapped_ = 0;
#endif
};

// A tensor; the last axis is contiguous. pad: elements between one row of the first axis and the next, never touched.
// grain: elements that are one of what a kernel reads.
template <class T>
class DeviceTensor {
 public:
  explicit DeviceTensor(std::vector<int64_t> shape, int64_t pad = 0, int64_t grain = 1) : shape_(std::move(shape)) {
    ++OddTensor::made;
    start_ = OddTensor::is(OddTensor::kStart) ? grain : 0;
    if (OddTensor::is(OddTensor::kRows) && shape_.size() > 1) pad += grain;
    inner_ = 1;
    for (size_t axis = 1; axis < shape_.size(); ++axis) inner_ *= shape_[axis];
    const int64_t apart = shape_.size() > 1 ? RowsApart::elements : 0;
    stride_ = (shape_.size() > 1 ? inner_ : 1) + pad + apart;
    count_ = shape_[0] * stride_;
    bytes_ = std::make_unique<DeviceBytes>(static_cast<size_t>(start_ + count_) * sizeof(T), apart > 0);
  }

  int64_t rows() const { return shape_[0]; }
  int64_t inner() const { return inner_; }
  T& at(int64_t row, int64_t column = 0) { return static_cast<T*>(bytes_->host())[start_ + row * stride_ + column]; }
  T* device() { return static_cast<T*>(bytes_->device()) + start_; }
  void upload() { bytes_->upload(); }
  void download() { bytes_->download(); }
  bool intact() { return bytes_->intact(); }

  DeviceTensor& fill(Random& random, float low, float high) {
    for (int64_t row = 0; row < rows(); ++row) {
      for (int64_t i = 0; i < inner_; ++i) at(row, i) = from_float<T>(random.uniform(low, high));
    }
    upload();
    return *this;
  }

  template <int N>
  AnyView<N> any() {
    AnyView<N> view = shaped<AnyView<N>, N>();
    view.dtype = dtype_of<T>();
    return view;
  }
  template <int N>
  View<T, N> view() {
    return shaped<View<T, N>, N>();
  }
  template <int N>
  View<const T, N> const_view() {
    return shaped<View<const T, N>, N>();
  }

 private:
  template <class V, int N>
  V shaped() {
    V view;
    view.data = device();
    int64_t stride = 1;
    for (int axis = N - 1; axis >= 0; --axis) {
      view.shape[axis] = shape_[static_cast<size_t>(axis)];
      view.stride[axis] = axis == 0 && N > 1 ? stride_ : stride;
      stride *= view.shape[axis];
    }
    return view;
  }

  std::vector<int64_t> shape_;
  int64_t inner_, stride_, count_, start_;
  std::unique_ptr<DeviceBytes> bytes_;
};

}  // namespace dsv4::testing
