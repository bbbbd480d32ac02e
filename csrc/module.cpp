// dsv4._native: how this package was built, what hardware it sees and what that can do. The op libraries do not depend
// on it.
#include <pybind11/pybind11.h>

#include <algorithm>
#include <thread>

#include "common/hardware.h"
#include "common/peaks.h"

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
  module.def(
      "unit_peaks",
      [](int threads) {
        dsv4::UnitPeaks peaks;
        {
          const pybind11::gil_scoped_release release;
          dsv4::ThreadPool pool(std::max(threads, 1));
          peaks = dsv4::measure_units(pool);
        }
        pybind11::dict flops;
        flops["float32"] = peaks.float32;
        flops["bfloat16"] = peaks.bfloat16;
        return flops;
      },
      pybind11::arg("threads"), "FLOP/s of the arithmetic units on so many threads, measured from registers.");
}
