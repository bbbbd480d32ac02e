#include "common/hardware.h"

#include <cuda_runtime_api.h>

namespace dsv4 {

int cuda_device_count() {
  int count = 0;
  if (cudaGetDeviceCount(&count) != cudaSuccess) {
    cudaGetLastError();
    return 0;
  }
  return count;
}

Status cuda_isa(int device_index, Isa* isa) {
  int major = 0;
  const cudaError_t error = cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device_index);
  if (error != cudaSuccess) {
    cudaGetLastError();
    int driver = 0;
    cudaDriverGetVersion(&driver);
    return Status::error("CUDA device %d: %s (dsv4 was built with CUDA %d.%d, the driver is for %d.%d)", device_index,
                         cudaGetErrorString(error), CUDART_VERSION / 1000, CUDART_VERSION % 1000 / 10, driver / 1000,
                         driver % 1000 / 10);
  }
  // sm_90a code runs on compute capability 9 alone; newer GPUs run the sm80 kernels.
  *isa = major == 9 ? Isa::kSm90 : major >= 8 ? Isa::kSm80 : Isa::kScalar;
  return Status::ok();
}

}  // namespace dsv4
