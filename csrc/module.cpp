// dsv4._native: how this package was built and what hardware it sees. The op libraries do not depend on it.
#include <pybind11/pybind11.h>

#include <thread>

#include "common/hardware.h"

PYBIND11_MODULE(_native, module) {
  module.doc() = "Build information and detected hardware.";
  module.def(
      "build_info",
      [] {
        pybind11::dict info;
        info["version"] = DSV4_VERSION;
        info["compiler"] = DSV4_COMPILER;
        info["torch_headers"] = DSV4_TORCH_VERSION;
        info["cuda"] = DSV4_CUDA_VERSION;
        info["cpu_instruction_sets"] = DSV4_CPU_SETS;
        return info;
      },
      "How the package was built: version, compiler, torch whose headers it used, nvcc version ('' if none), sets.");
  module.def(
      "hardware",
      [] {
        pybind11::dict info;
        info["cpu_isa"] = dsv4::isa_name(dsv4::cpu_isa());
        info["threads"] = std::thread::hardware_concurrency();
        return info;
      },
      "The processor: best instruction set with kernels here, and hardware threads.");
}
