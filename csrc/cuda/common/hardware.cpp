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

Isa cuda_isa(int device_index) {
  int major = 0;
  if (cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device_index) != cudaSuccess) {
    cudaGetLastError();
    return Isa::kScalar;
  }
  // sm_90a code runs on compute capability 9 alone; newer GPUs run the sm80 kernels.
  if (major == 9) return Isa::kSm90;
  return major >= 8 ? Isa::kSm80 : Isa::kScalar;
}

}  // namespace dsv4
