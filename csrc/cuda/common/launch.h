// Launching a kernel: on a GPU's stream under nvcc, on the host model under any other compiler, from the same shape.
#pragma once

#include <cstdint>

#include "common/context.h"
#include "common/status.h"

#if defined(__CUDACC__)
#include <cuda_runtime.h>
#else
#include <functional>
#endif

namespace dsv4::cuda {

struct LaunchShape {
  int64_t blocks_x = 1;
  int64_t blocks_y = 1;
  int threads = 1;
  int shared_bytes = 0;  // dynamic; at most 99 KB, so that every GPU from Ampere on takes it, or what Hopper has
};

inline constexpr int kMaxSharedBytes = 99 * 1024;
inline constexpr int kMaxSharedBytesOfHopper = 227 * 1024;
inline constexpr int64_t kMaxBlocks = 0x7FFFFFFF;  // blocks_x at most

}  // namespace dsv4::cuda

#if !defined(__CUDACC__)
namespace dsv4::simt {
Status run(const char* kernel, const cuda::LaunchShape& shape, const std::function<void()>& body);
}  // namespace dsv4::simt
#endif

namespace dsv4::cuda {

// A launch is asynchronous: an error of the kernel itself shows in a later call on the stream, as CUDA has it.
template <class Arguments>
Status launch(const char* name, void (*kernel)(Arguments), const LaunchShape& shape, const Context& context,
              const Arguments& arguments) {
#if defined(__CUDACC__)
  cudaError_t error = cudaSetDevice(context.device_index);
  // The limit is the kernel's, for all threads that launch it, so it is the same for every size.
  if (error == cudaSuccess && shape.shared_bytes > 48 * 1024) {
    const int limit = shape.shared_bytes > kMaxSharedBytes ? kMaxSharedBytesOfHopper : kMaxSharedBytes;
    error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, limit);
  }
  if (error == cudaSuccess) {
    cudaLaunchConfig_t config = {};
    config.gridDim = dim3(static_cast<unsigned>(shape.blocks_x), static_cast<unsigned>(shape.blocks_y));
    config.blockDim = dim3(static_cast<unsigned>(shape.threads));
    config.dynamicSmemBytes = static_cast<size_t>(shape.shared_bytes);
    config.stream = static_cast<cudaStream_t>(context.stream);
    error = cudaLaunchKernelEx(&config, kernel, arguments);
  }
  if (error == cudaSuccess) return Status::ok();
  cudaGetLastError();  // a failed launch must not be reported again by the next call
  return Status::error("%s: %s", name, cudaGetErrorString(error));
#else
  (void)context;
  return simt::run(name, shape, [&] { kernel(arguments); });
#endif
}

}  // namespace dsv4::cuda
