#include "global_memory.h"

#include <cstring>
#include <new>

#include "program.h"

namespace dsv4::machine {

void* GlobalMemory::allocate(size_t bytes) {
  Allocation made;
  made.memory = std::make_unique<uint8_t[]>(bytes + 256);
  memset(made.memory.get(), 0xFF, bytes + 256);
  // cudaMalloc's alignment and no more, so that what needs more shows.
  made.start = (reinterpret_cast<uint64_t>(made.memory.get()) + 255) / 256 * 256;
  made.bytes = bytes;
  made.writer.reset(static_cast<Touch*>(std::calloc(bytes + 1, sizeof(Touch))));
  made.reader.reset(static_cast<Touch*>(std::calloc(bytes + 1, sizeof(Touch))));
  if (made.writer == nullptr || made.reader == nullptr) throw std::bad_alloc();
  const uint64_t start = made.start;
  allocations_[start] = std::move(made);
  return reinterpret_cast<void*>(start);
}

bool GlobalMemory::release(void* pointer) {
  last_ = nullptr;
  return allocations_.erase(reinterpret_cast<uint64_t>(pointer)) == 1;
}

uint32_t GlobalMemory::start_launch(uint32_t blocks) {
  launch_ = next_;
  next_ += blocks + 1;
  return launch_ + 1;  // launch_ itself stands for several readers
}

uint8_t* GlobalMemory::at(uint64_t address, int size, bool write, const Toucher& who) {
  const auto length = static_cast<size_t>(size);
  if (address % length != 0) throw Fault("misaligned access of " + std::to_string(size) + " bytes of global memory");
  if (last_ == nullptr || address < last_->start || address + length > last_->start + last_->bytes) {
    auto next = allocations_.upper_bound(address);
    last_ = next == allocations_.begin() ? nullptr : &std::prev(next)->second;
    if (last_ == nullptr || address + length > last_->start + last_->bytes) {
      last_ = nullptr;
      if (trusts_host_) return reinterpret_cast<uint8_t*>(address);
      throw Fault("access of " + std::to_string(size) + " bytes outside of every allocation of global memory");
    }
  }
  const Touch mine = {who.block, who.warp, who.clock[who.warp]};
  const size_t first = address - last_->start;
  for (size_t i = first; i < first + length; ++i) {
    if (unordered(last_->writer[i], who)) {
      throw Fault(write ? "race: two write the same byte of global memory"
                        : "race: reads a byte of global memory that another writes");
    }
    Touch& reader = last_->reader[i];
    if (write) {
      if (unordered(reader, who)) throw Fault("race: writes a byte of global memory that another reads");
      last_->writer[i] = mine;
    } else if (reader.block >= launch_ && reader.block != who.block) {
      reader = {launch_, 0, 0};
    } else {
      reader = mine;
    }
  }
  return reinterpret_cast<uint8_t*>(address);
}

}  // namespace dsv4::machine
