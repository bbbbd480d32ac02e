// Memory that the host has allocated for kernels, with who touched each byte last: an access outside of an allocation,
// not aligned, or in a race with another block or warp is a fault.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <map>
#include <memory>

namespace dsv4::machine {

inline constexpr int kMaxWarps = 32;

// A warp of a launch. clock[w]: up to which of its own steps (from barrier to barrier) warp w is known to be done.
struct Toucher {
  uint32_t block = 0;  // unique over launches
  uint16_t warp = 0;
  uint16_t clock[kMaxWarps] = {};
};

class GlobalMemory {
 public:
  void* allocate(size_t bytes);
  bool release(void* pointer);

  // Blocks of the launch are numbered from the returned number on.
  uint32_t start_launch(uint32_t blocks);

  // From now on what is in no allocation may be memory of the host, in which alignment alone is checked.
  void trust_the_host() { trusts_host_ = true; }

  // The checked place; throws Fault.
  uint8_t* at(uint64_t address, int size, bool write, const Toucher& who);

 private:
  struct Touch {
    uint32_t block = 0;
    uint16_t warp = 0, step = 0;
  };
  struct Free {
    void operator()(void* memory) const { std::free(memory); }
  };
  struct Allocation {
    std::unique_ptr<uint8_t[]> memory;
    uint64_t start = 0;
    size_t bytes = 0;
    std::unique_ptr<Touch[], Free> writer, reader;  // of each byte; zeros, which take no memory until they are touched
  };

  bool unordered(const Touch& earlier, const Toucher& who) const {
    if (earlier.block < launch_) return false;  // of an earlier launch
    return earlier.block != who.block || (earlier.warp != who.warp && earlier.step > who.clock[earlier.warp]);
  }

  std::map<uint64_t, Allocation> allocations_;  // by start
  Allocation* last_ = nullptr;
  uint32_t launch_ = 1, next_ = 1;
  bool trusts_host_ = false;
};

}  // namespace dsv4::machine
