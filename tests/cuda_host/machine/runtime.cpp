// The part of the CUDA runtime that programs of this project call, with the machine as its device: it takes the kernels
// as nvcc wrote them into the program (PTX in a fat binary), and runs them.
#include <cuda_runtime_api.h>

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <map>
#include <string>
#include <utility>
#include <vector>

#include "block.h"
#include "control.h"
#include "warp.h"

using namespace dsv4::machine;

namespace {

struct Module {
  int architecture;  // 80: compute capability 8.0
  std::string_view text;
};

struct Function {
  const std::vector<Module>* modules;
  std::string name;
  int shared_limit = 48 * 1024;
  bool parsed = false;
  Program program;
};

struct Device {
  GlobalMemory memory;
  std::vector<std::unique_ptr<std::vector<Module>>> binaries;
  std::map<const void*, Function> functions;  // by the host's stub
  int architecture = 90;
  unsigned apart = 0;               // see Launch
  cudaError_t error = cudaSuccess;  // of a kernel; stays, as on a GPU
  cudaError_t last = cudaSuccess;
  std::string fault;        // the kernel's
  std::string left_out_of;  // a part of a kernel's name
  int left_out = -1;        // of its synchronisations
};

// Lives to the end: fat binaries are registered before main and taken back after it.
Device& device() {
  static Device* one = [] {
    auto* made = new Device;
    if (const char* text = std::getenv("PTX_ARCHITECTURE")) made->architecture = std::atoi(text);
    if (const char* text = std::getenv("PTX_LANES_APART")) made->apart = static_cast<unsigned>(std::atoi(text));
    return made;
  }();
  return *one;
}

cudaError_t result(cudaError_t error) {
  if (error != cudaSuccess) device().last = error;
  return error;
}

// Layout of a fat binary: a wrapper with a pointer to a header, after it entries with headers of their own.
struct Wrapper {
  uint32_t magic, version;
  const uint8_t* data;
  void* unused;
};
struct Header {
  uint32_t magic;
  uint16_t version, header_bytes;
  uint64_t bytes;
};
struct Entry {
  uint16_t kind, version;
  uint32_t header_bytes;
  uint64_t bytes;
  uint32_t compressed_bytes, options;
  uint16_t minor, major;
  uint32_t architecture;
};

template <class T>
T read(const uint8_t* from) {
  T value;
  memcpy(&value, from, sizeof(value));
  return value;
}

[[noreturn]] void die(const char* why) {
  std::fprintf(stderr, "the machine's CUDA runtime: %s\n", why);
  std::abort();
}

std::vector<Module> modules_of(const Wrapper& wrapper) {
  const auto header = read<Header>(wrapper.data);
  if (wrapper.magic != 0x466243b1u || header.magic != 0xba55ed50u) die("not a fat binary");
  std::vector<Module> found;
  const uint8_t* at = wrapper.data + header.header_bytes;
  const uint8_t* const end = at + header.bytes;
  while (at < end) {
    const auto entry = read<Entry>(at);
    if (entry.kind == 1) {  // PTX
      const auto* text = reinterpret_cast<const char*>(at + entry.header_bytes);
      if (std::string_view(text, entry.bytes).find(".version") == std::string_view::npos) die("compressed PTX");
      found.push_back({static_cast<int>(entry.architecture), std::string_view(text, entry.bytes)});
    }
    at += entry.header_bytes + entry.bytes;
  }
  return found;
}

const Program& program_of(Function& function) {
  if (function.parsed) return function.program;
  const Module* best = nullptr;  // the newest that the device can take
  for (const Module& module : *function.modules) {
    if (module.architecture <= device().architecture && (best == nullptr || module.architecture > best->architecture)) {
      best = &module;
    }
  }
  if (best == nullptr) throw Fault("no PTX of " + function.name + " for this device");
  function.program = parse(best->text, function.name);
  function.parsed = true;
  return function.program;
}

// Does nothing.
void idle(Warp&, const Instruction&, uint32_t) {}

// The program with the synchronisation left out that control.h asks for.
Program without(const Program& program) {
  Program rest = program;
  int number = 0;
  for (Instruction& i : rest.code) {
    if (!i.synchronises || number++ != device().left_out) continue;
    if (rest.name.find(device().left_out_of) == std::string::npos) break;
    i.execute = idle;
    i.kind = Kind::kPlain;
  }
  return rest;
}

}  // namespace

namespace dsv4::machine {

std::vector<std::string> synchronisations_of(const std::string& kernel) {
  std::vector<std::string> texts;
  for (auto& [stub, function] : device().functions) {
    if (function.name.find(kernel) == std::string::npos) continue;
    for (const Instruction& i : program_of(function).code) {
      if (i.synchronises) texts.emplace_back(i.text);
    }
    break;
  }
  return texts;
}

void leave_out(const std::string& kernel, int number) {
  device().left_out_of = kernel;
  device().left_out = number;
}

void trust_the_host() { device().memory.trust_the_host(); }

std::string take_fault() { return std::exchange(device().fault, ""); }

}  // namespace dsv4::machine

extern "C" {

void** __cudaRegisterFatBinary(void* wrapper) {
  device().binaries.push_back(std::make_unique<std::vector<Module>>(modules_of(*static_cast<Wrapper*>(wrapper))));
  return reinterpret_cast<void**>(device().binaries.back().get());
}
void __cudaRegisterFatBinaryEnd(void**) {}
void __cudaUnregisterFatBinary(void**) {}
void __cudaRegisterFunction(void** binary, const char* stub, char*, const char* name, int, uint3*, uint3*, dim3*, dim3*,
                            int*) {
  Function& function = device().functions[stub];
  function.modules = reinterpret_cast<const std::vector<Module>*>(binary);
  function.name = name;
}
// A stub's own body, for <<<>>>, which this project does not use.
cudaError_t __cudaPopCallConfiguration(dim3*, dim3*, size_t*, void*) { return result(cudaErrorNotSupported); }
cudaError_t __cudaLaunchKernel(cudaKernel_t, dim3, dim3, void**, size_t, cudaStream_t) {
  return result(cudaErrorNotSupported);
}
cudaError_t __cudaGetKernel(cudaKernel_t*, const void*) { return result(cudaErrorNotSupported); }

cudaError_t cudaGetDeviceCount(int* count) {
  *count = 1;
  return cudaSuccess;
}
cudaError_t cudaSetDevice(int number) { return result(number == 0 ? cudaSuccess : cudaErrorInvalidDevice); }
cudaError_t cudaGetLastError() {
  const cudaError_t error = device().last;
  device().last = cudaSuccess;
  return error;
}
const char* cudaGetErrorString(cudaError_t error) {
  return error == cudaErrorLaunchFailure ? "a kernel failed (above)" : "an error of the machine's CUDA runtime";
}
cudaError_t cudaDriverGetVersion(int* version) {
  *version = CUDART_VERSION;
  return cudaSuccess;
}
cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
  if (attribute != cudaDevAttrComputeCapabilityMajor) return result(cudaErrorInvalidValue);
  *value = device().architecture / 10;
  return cudaSuccess;
}
cudaError_t cudaDeviceSynchronize() { return result(device().error); }

cudaError_t cudaMalloc(void** pointer, size_t bytes) {
  *pointer = device().memory.allocate(bytes);
  return cudaSuccess;
}
cudaError_t cudaFree(void* pointer) {
  return result(pointer == nullptr || device().memory.release(pointer) ? cudaSuccess : cudaErrorInvalidValue);
}
cudaError_t cudaMemcpy(void* to, const void* from, size_t bytes, cudaMemcpyKind) {
  memcpy(to, from, bytes);
  return result(device().error);
}

cudaError_t cudaFuncSetAttribute(const void* stub, cudaFuncAttribute attribute, int value) {
  if (attribute != cudaFuncAttributeMaxDynamicSharedMemorySize) return result(cudaErrorInvalidValue);
  device().functions.at(stub).shared_limit = value;
  return cudaSuccess;
}
cudaError_t cudaLaunchKernelExC(const cudaLaunchConfig_t* config, const void* stub, void** arguments) {
  const auto found = device().functions.find(stub);
  if (found == device().functions.end()) return result(cudaErrorInvalidDeviceFunction);
  if (device().error != cudaSuccess) return result(device().error);
  Function& function = found->second;
  const dim3 grid = config->gridDim, block = config->blockDim;
  if (grid.x == 0 || grid.y == 0 || grid.y > 65535 || grid.z != 1 || block.y != 1 || block.z != 1 || block.x > 1024 ||
      config->dynamicSmemBytes > static_cast<size_t>(function.shared_limit)) {
    return result(cudaErrorInvalidConfiguration);
  }
  try {
    Launch launch = {};
    launch.program = &program_of(function);
    launch.parameters = static_cast<const uint8_t*>(arguments[0]);
    launch.blocks_x = grid.x;
    launch.blocks_y = grid.y;
    launch.threads = static_cast<int>(block.x);
    launch.shared_bytes = static_cast<int>(config->dynamicSmemBytes);
    launch.apart = device().apart;
    Program rest;
    if (device().left_out >= 0) {
      rest = without(*launch.program);
      launch.program = &rest;
    }
    run(launch, device().memory);
  } catch (const Fault& fault) {
    device().fault = fault.what();
    if (device().left_out >= 0) return cudaSuccess;  // expected: what it has not written tells
    std::fprintf(stderr, "fault: %s\n", fault.what());
    device().error = cudaErrorLaunchFailure;
  }
  return cudaSuccess;
}

}  // extern "C"
