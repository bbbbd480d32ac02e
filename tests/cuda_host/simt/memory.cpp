// Shared memory with a shadow: who wrote each byte last and who has read it since, and when.
#include <algorithm>
#include <cstring>

#include "simt/block.h"

namespace dsv4::simt {
namespace {

constexpr int kGranule = 16;
// As float32 and as two bfloat16: signalling NaN. Reading what was never written is a fault in itself; this shows up
// where such bytes leave through a copy that the model does not follow.
constexpr uint32_t kPoison = 0x7FA17FA1u;

std::string hex(uint32_t offset) {
  char text[16];
  snprintf(text, sizeof(text), "smem+0x%x", offset);
  return text;
}

}  // namespace

void SharedMemory::reset(int bytes, std::mt19937_64& random) {
  base_ = 1024 + static_cast<uint32_t>(random() % 64) * 128;  // no kernel may count on where it starts
  bytes_ = bytes;
  data_.resize(static_cast<size_t>(bytes));
  for (int i = 0; i < bytes; ++i) data_[i] = static_cast<uint8_t>(kPoison >> (i % 4 * 8));
  writes_.assign(static_cast<size_t>(bytes), Write());
  reads_.resize(static_cast<size_t>((bytes + kGranule - 1) / kGranule));
  for (std::vector<Read>& reads : reads_) reads.clear();
}

std::string SharedMemory::check_bounds(uint32_t address, int bytes) const {
  if (address < base_ || address - base_ + static_cast<uint32_t>(bytes) > static_cast<uint32_t>(bytes_)) {
    return "outside the " + std::to_string(bytes_) + " bytes of shared memory: " + std::to_string(bytes) + " at " +
           hex(address - base_);
  }
  if (address % static_cast<uint32_t>(bytes) != 0) return "misaligned: " + hex(address - base_);
  return "";
}

std::string SharedMemory::check_load(int thread, const uint32_t* clock, uint32_t address, int bytes) const {
  std::string wrong = check_bounds(address, bytes);
  if (!wrong.empty()) return wrong;
  for (int i = 0; i < bytes; ++i) {
    const Write& w = writes_[address - base_ + i];
    if (w.state == State::kInFlight)
      return "read of " + hex(address - base_ + i) + " while an asynchronous copy is on its way";
    if (w.state == State::kNeverWritten) return "read of " + hex(address - base_ + i) + ", which was never written";
    if (w.thread != thread && clock[w.thread] < w.time) {
      return "RACE: read of " + hex(address - base_ + i) + " without a barrier after thread " +
             std::to_string(w.thread) + " wrote it";
    }
  }
  return "";
}

std::string SharedMemory::load(int thread, const uint32_t* clock, uint32_t address, void* value, int bytes) {
  std::string wrong = check_load(thread, clock, address, bytes);
  if (!wrong.empty()) return wrong;
  const uint32_t offset = address - base_;
  memcpy(value, &data_[offset], static_cast<size_t>(bytes));
  const uint16_t mask = static_cast<uint16_t>(((1u << bytes) - 1u) << (offset % kGranule));
  std::vector<Read>& reads = reads_[offset / kGranule];
  for (Read& r : reads) {
    if (r.thread != thread || r.bytes != mask) continue;
    r.time = clock[thread];  // its earlier read is over when this one is
    return "";
  }
  reads.push_back(Read{clock[thread], static_cast<uint16_t>(thread), mask});
  return "";
}

std::string SharedMemory::check_store(int thread, const uint32_t* clock, uint32_t address, int bytes) const {
  std::string wrong = check_bounds(address, bytes);
  if (!wrong.empty()) return wrong;
  const uint32_t offset = address - base_;
  for (int i = 0; i < bytes; ++i) {
    const Write& w = writes_[offset + i];
    if (w.state == State::kInFlight) return "write to " + hex(offset + i) + " while an asynchronous copy is on its way";
    if (w.state == State::kWritten && w.thread != thread && clock[w.thread] < w.time) {
      return "RACE: write to " + hex(offset + i) + " without a barrier after thread " + std::to_string(w.thread) +
             " wrote it";
    }
  }
  const uint32_t mask = ((1u << bytes) - 1u) << (offset % kGranule);
  for (const Read& r : reads_[offset / kGranule]) {
    if ((r.bytes & mask) != 0 && r.thread != thread && clock[r.thread] < r.time) {
      return "RACE: write to " + hex(offset) + ", which thread " + std::to_string(r.thread) + " may still be reading";
    }
  }
  return "";
}

// Reads of bytes that are now written anew: whoever comes after the write comes after them too.
void SharedMemory::forget_reads(uint32_t address, int bytes) {
  const uint32_t offset = address - base_, mask = ((1u << bytes) - 1u) << (offset % kGranule);
  std::vector<Read>& reads = reads_[offset / kGranule];
  for (Read& r : reads) r.bytes = static_cast<uint16_t>(r.bytes & ~mask);
  reads.erase(std::remove_if(reads.begin(), reads.end(), [](const Read& r) { return r.bytes == 0; }), reads.end());
}

std::string SharedMemory::store(int thread, const uint32_t* clock, uint32_t address, const void* value, int bytes) {
  std::string wrong = check_store(thread, clock, address, bytes);
  if (!wrong.empty()) return wrong;
  memcpy(&data_[address - base_], value, static_cast<size_t>(bytes));
  forget_reads(address, bytes);
  for (int i = 0; i < bytes; ++i) {
    writes_[address - base_ + i] = Write{clock[thread], static_cast<uint16_t>(thread), State::kWritten};
  }
  return "";
}

std::string SharedMemory::begin_copy(int thread, const uint32_t* clock, uint32_t address) {
  std::string wrong = check_store(thread, clock, address, kGranule);
  if (!wrong.empty()) return wrong;
  forget_reads(address, kGranule);
  for (int i = 0; i < kGranule; ++i) {
    data_[address - base_ + i] = static_cast<uint8_t>(kPoison >> (i % 4 * 8));
    writes_[address - base_ + i] = Write{clock[thread], static_cast<uint16_t>(thread), State::kInFlight};
  }
  return "";
}

void SharedMemory::end_copy(int thread, const uint32_t* clock, const AsyncCopy& copy) {
  uint8_t* destination = &data_[copy.destination - base_];
  memset(destination, 0, kGranule);
  if (copy.source_bytes > 0) memcpy(destination, copy.source, static_cast<size_t>(copy.source_bytes));
  for (int i = 0; i < kGranule; ++i) {
    writes_[copy.destination - base_ + i] = Write{clock[thread], static_cast<uint16_t>(thread), State::kWritten};
  }
}

}  // namespace dsv4::simt
