// What this machine can run, and the limit that DSV4_MAX_ISA puts on it.
#pragma once

#include "common/context.h"
#include "common/status.h"

namespace dsv4 {

const char* isa_name(Isa isa);

// The best instruction set of this processor. kAvx2 stands for AVX2 and FMA; kAvx512 for F, BW, DQ, VL, VBMI, VNNI and
// BF16 together; kAmx for those, AMX tiles with BF16 and INT8, and the kernel's permission to use them, which the first
// call asks for.
Isa cpu_isa();

// The best instruction set of a CUDA device, kScalar where it has no kernels here; an error, with what CUDA says and
// the driver it needs, where the device does not answer. Only in builds with CUDA.
Status cuda_isa(int device_index, Isa* isa);
int cuda_device_count();

// `best`, lowered to the limit in the environment variable DSV4_MAX_ISA, read at each call. scalar, avx2, avx512
// and amx limit the CPU, sm80 and sm90 the GPU; any other value limits nothing. sm90 is also what asks for the kernels
// of Hopper, which are otherwise left out: no GPU has run them yet.
Isa limited(Isa best);

}  // namespace dsv4
