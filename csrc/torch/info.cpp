// What Python asks of a library: its ops, their implementations, and which one ran. Not tensor operations, so one JSON
// string: {"isa": str, "limit": str, "devices": int, "ops": {op: {"built": [...], "usable": [...], "calls": {name:
// int}, "last": str|null}}}.
#include "common/hardware.h"
#include "ops/candidates.h"
#include "torch/glue.h"

namespace dsv4::binding {
namespace {

std::string quoted(const char* text) { return text == nullptr ? "null" : '"' + std::string(text) + '"'; }

void append(std::string& list, const char* name) { list += (list.empty() ? "" : ", ") + quoted(name); }

std::string library_info() {
#if defined(DSV4_HOST_MODEL)
  const int devices = 1;
  const Isa isa = Isa::kSm90;
#elif defined(DSV4_TORCH_CUDA)
  const int devices = cuda_device_count();
  Isa isa = Isa::kScalar;
  if (devices > 0) (void)cuda_isa(0, &isa);  // every op says what keeps the device from answering
#else
  const int devices = 1;
  const Isa isa = cpu_isa();
#endif
  std::string ops;
  for (const OpInfo* op = OpInfo::first(); op != nullptr; op = op->next()) {
    std::string built, usable, calls;
    for (int index = 0; index < op->size(); ++index) {
      const char* name = nullptr;
      Isa needs = Isa::kScalar;
      if (!op->candidate(index, &name, &needs)) continue;
      append(built, name);
      calls += (calls.empty() ? "" : ", ") + quoted(name) + ": " + std::to_string(op->calls(index));
      if (needs <= limited(isa)) append(usable, name);
    }
    ops += (ops.empty() ? "" : ", ") + quoted(op->name()) + ": {\"built\": [" + built + "], \"usable\": [" + usable +
           "], \"calls\": {" + calls + "}, \"last\": " + quoted(op->last()) + "}";
  }
  return "{\"isa\": " + quoted(isa_name(isa)) + ", \"limit\": " + quoted(isa_name(limited(isa))) +
         ", \"devices\": " + std::to_string(devices) + ", \"compiler\": " + quoted(DSV4_COMPILER) +
         ", \"architectures\": " + quoted(DSV4_ARCHITECTURES) + ", \"ops\": {" + ops + "}}";
}

}  // namespace
}  // namespace dsv4::binding

STABLE_TORCH_LIBRARY_FRAGMENT(dsv4, library) { library.def(DSV4_LIBRARY_OP("library") "() -> str"); }
STABLE_TORCH_LIBRARY_IMPL(dsv4, CompositeExplicitAutograd, library) {
  library.impl(DSV4_LIBRARY_OP("library"), TORCH_BOX(&dsv4::binding::library_info));
}
