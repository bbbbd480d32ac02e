#include "common/hardware.h"

#include <cstdlib>
#include <cstring>

#if defined(__x86_64__) && defined(__linux__)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace dsv4 {
namespace {

constexpr Isa kIsas[] = {Isa::kScalar, Isa::kAvx2, Isa::kAvx512, Isa::kAmx, Isa::kSm80, Isa::kSm90};

bool is_cuda(Isa isa) { return isa >= Isa::kSm80; }

#if defined(__x86_64__) && defined(__linux__)

uint64_t enabled_state() {
  uint32_t low = 0, high = 0;
  __asm__("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
  return (static_cast<uint64_t>(high) << 32) | low;
}

// Linux grants the tile registers on request, once for all threads of the process.
bool tiles_permitted() {
  constexpr int kRequestPermission = 0x1023, kTileData = 18;
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
}

Isa detect() {
  uint32_t a = 0, b = 0, c = 0, d = 0;
  if (!__get_cpuid(1, &a, &b, &c, &d)) return Isa::kScalar;
  constexpr uint32_t kFma = 1u << 12, kXsave = 1u << 27;
  if ((c & kFma) == 0 || (c & kXsave) == 0) return Isa::kScalar;
  const uint64_t state = enabled_state();
  constexpr uint64_t kHalfState = 0x6, kWholeState = 0xE6, kTileState = 0x60000;  // xmm, ymm; opmask, zmm; tiles
  constexpr uint32_t kAvx2 = 1u << 5;
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d)) return Isa::kScalar;
  if ((state & kHalfState) != kHalfState || (b & kAvx2) == 0) return Isa::kScalar;
  constexpr uint32_t kAvx512 = (1u << 16) | (1u << 17) | (1u << 30) | (1u << 31);  // F, DQ, BW, VL
  constexpr uint32_t kAvx512Extra = (1u << 1) | (1u << 11);                        // VBMI, VNNI
  if ((state & kWholeState) != kWholeState) return Isa::kAvx2;
  if ((b & kAvx512) != kAvx512 || (c & kAvx512Extra) != kAvx512Extra) return Isa::kAvx2;
  constexpr uint32_t kTiles = (1u << 22) | (1u << 24) | (1u << 25);  // AMX BF16, TILE, INT8
  const bool tiles = (d & kTiles) == kTiles;

  constexpr uint32_t kAvx512Bf16 = 1u << 5;
  if (!__get_cpuid_count(7, 1, &a, &b, &c, &d) || (a & kAvx512Bf16) == 0) return Isa::kAvx2;
  return tiles && (state & kTileState) == kTileState && tiles_permitted() ? Isa::kAmx : Isa::kAvx512;
}

#else

Isa detect() { return Isa::kScalar; }

#endif

}  // namespace

const char* isa_name(Isa isa) {
  switch (isa) {
    case Isa::kScalar:
      return "scalar";
    case Isa::kAvx2:
      return "avx2";
    case Isa::kAvx512:
      return "avx512";
    case Isa::kAmx:
      return "amx";
    case Isa::kSm80:
      return "sm80";
    case Isa::kSm90:
      return "sm90";
  }
  return "unknown";
}

Isa cpu_isa() {
  static const Isa isa = detect();
  return isa;
}

Isa limited(Isa best) {
  const char* limit = std::getenv("DSV4_MAX_ISA");
  if (best == Isa::kSm90 && (limit == nullptr || std::strcmp(limit, isa_name(best)) != 0)) best = Isa::kSm80;
  if (limit == nullptr) return best;
  for (Isa isa : kIsas) {
    if (is_cuda(isa) == is_cuda(best) && isa < best && std::strcmp(limit, isa_name(isa)) == 0) return isa;
  }
  return best;
}

}  // namespace dsv4
