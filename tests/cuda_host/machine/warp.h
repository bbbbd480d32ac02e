// The state of 32 threads, and of the block around them as far as instructions see it.
#pragma once

#include <array>
#include <cstring>
#include <deque>
#include <memory>

#include "global_memory.h"
#include "program.h"

namespace dsv4::machine {

// 16 bytes on their way to shared memory.
struct Copy {
  uint32_t destination;
  const uint8_t* source;  // null: zeros
};

struct SharedMemory {
  // kFenced: written, and for what reads shared memory by itself (the asynchronous proxy) too.
  enum State : uint8_t { kUnwritten, kWritten, kFenced, kInFlight };
  std::vector<uint8_t> bytes;
  std::vector<uint8_t> state;
  std::vector<uint8_t> readers;  // products on their way that read the byte

  void start(size_t size, int warps);
  // The place of an access, which must be aligned, inside, not in flight and in no race with another warp; for reads,
  // written.
  uint8_t* at(uint32_t address, int size, bool write, const Toucher& who);
  // What `at` looks for of races, and notes, in the words from byte `first` on.
  void touch(uint32_t first, uint32_t count, bool write, const Toucher& who);

 private:
  static constexpr uint32_t kWord = 4;  // bytes, of which every access is a multiple
  int warps_ = 0;
  std::vector<uint16_t> read_;  // [words, warps]: the step (see Toucher) of a warp's last read, 0: none
  std::vector<uint16_t> written_;
  std::vector<uint8_t> writer_;
};

// A warp's part of a warpgroup's product that nobody has waited for.
struct Product {
  const Instruction* instruction;
  uint64_t descriptor;
  bool adds;  // to what is in the registers
};

struct Bytes {
  uint32_t first, count;  // of shared memory
};

struct Warp {
  const Program* program = nullptr;
  SharedMemory* shared = nullptr;
  GlobalMemory* global = nullptr;
  const uint8_t* parameters = nullptr;
  std::unique_ptr<uint8_t[]> registers;
  std::array<int, kLanes> pc = {};
  uint32_t alive = kAllLanes;
  uint32_t waiting = 0;                   // lanes at a collective, for the others
  int barrier = -1, barrier_threads = 0;  // that the warp has come to
  Toucher self;                           // as global memory knows it
  std::array<std::vector<Copy>, kLanes> open;
  std::array<std::deque<std::vector<Copy>>, kLanes> groups;
  std::vector<Bytes> written;  // since the last fence of the asynchronous proxy
  bool registers_fenced = false;
  std::vector<Product> products;
  std::deque<std::vector<Product>> product_groups;

  template <class T>
  T* lanes(Slot slot) {
    return reinterpret_cast<T*>(registers.get() + slot);
  }
  void wrote(uint32_t first, uint32_t count) {
    if (program->async_proxy) written.push_back({first, count});
  }
  uint32_t& bits(Slot slot) { return *lanes<uint32_t>(slot); }
};

template <class F>
inline void each(uint32_t lanes, const F& f) {
  if (lanes == kAllLanes) {
#pragma GCC ivdep
    for (int lane = 0; lane < kLanes; ++lane) f(lane);
  } else {
    for (; lanes != 0; lanes &= lanes - 1) f(__builtin_ctz(lanes));
  }
}

}  // namespace dsv4::machine
