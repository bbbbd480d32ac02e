// The block that runs: its threads, their clocks, its shared memory. Internal to the model.
//
// Races are found by vector clocks. A thread's clock holds, for every thread of the block, up to where it knows that
// thread's doings to be over. Barriers and sync_warp join the clocks of those who meet; shuffles, ldmatrix and mma,
// which order no memory, do not. An access is compared with the last write of each byte and the last read of each 16
// bytes.
#pragma once

#include <functional>
#include <memory>
#include <random>
#include <string>
#include <vector>

#include "cuda/common/launch.h"
#include "simt/banks.h"
#include "simt/control.h"
#include "simt/fiber.h"

namespace dsv4::simt {

struct AsyncCopy {
  uint32_t destination;
  const void* source;
  int source_bytes;
};

struct Thread {
  int index = 0;
  Fiber* fiber = nullptr;
  bool done = false;
  const char* waits_for = nullptr;  // null: can go on
  Site where = {};
  std::vector<AsyncCopy> uncommitted;
  std::vector<std::vector<AsyncCopy>> groups;  // oldest first
};

// What the lanes of a warp bring to an operation that they do together.
struct Lane {
  uint32_t value = 0;          // shuffles; ldmatrix: the address
  int operand = 0;             // shuffles: the source lane
  uint32_t* result = nullptr;  // shuffles: 1 word; ldmatrix: 4
  float* d = nullptr;          // mma
  const uint32_t* a = nullptr;
  const uint32_t* b = nullptr;
};

enum class Collective { kNone, kSyncWarp, kShuffle, kLdmatrix, kLdmatrixTransposed, kMma };

struct Warp {
  Collective kind = Collective::kNone;
  Site site = {};
  int arrived = 0;
  Lane lane[32];
  WarpAccesses accesses;
};

struct Barrier {
  int expected = 0;
  std::vector<int> arrived;
};

class SharedMemory {
 public:
  void reset(int bytes, std::mt19937_64& random);
  uint32_t base() const { return base_; }

  // Each returns an empty string or what is wrong. clock: of the thread that accesses.
  std::string load(int thread, const uint32_t* clock, uint32_t address, void* value, int bytes);
  std::string store(int thread, const uint32_t* clock, uint32_t address, const void* value, int bytes);
  std::string begin_copy(int thread, const uint32_t* clock, uint32_t address);
  void end_copy(int thread, const uint32_t* clock, const AsyncCopy& copy);
  // As load, without leaving a trace: for the lanes that receive what another lane addressed.
  std::string check_load(int thread, const uint32_t* clock, uint32_t address, int bytes) const;

 private:
  enum class State : uint8_t { kNeverWritten, kWritten, kInFlight };
  struct Write {
    uint32_t time = 0;
    uint16_t thread = 0;
    State state = State::kNeverWritten;
  };
  struct Read {
    uint32_t time = 0;
    uint16_t thread = 0;
    uint16_t bytes = 0;  // mask of the 16
  };
  void forget_reads(uint32_t address, int bytes);
  std::string check_bounds(uint32_t address, int bytes) const;
  std::string check_store(int thread, const uint32_t* clock, uint32_t address, int bytes) const;

  uint32_t base_ = 0;
  int bytes_ = 0;
  std::vector<uint8_t> data_;
  std::vector<Write> writes_;             // of each byte
  std::vector<std::vector<Read>> reads_;  // of each 16 bytes, since they were written
};

// One block from start to end. A fault ends it: the first message stands, and the fibers are left where they are.
class Block {
 public:
  Block(const cuda::LaunchShape& shape, const Options& options, std::mt19937_64& random);

  // The message of the first fault, or nothing.
  std::string run(const std::function<void()>& body, int64_t x, int64_t y);

  Thread& current() { return *current_; }
  int threads() const { return static_cast<int>(threads_.size()); }
  int64_t index(int axis) const { return index_[axis]; }
  SharedMemory& shared() { return shared_; }
  uint32_t* clock(int thread) { return &clocks_[static_cast<size_t>(thread) * threads_.size()]; }
  void advance(int thread) { ++clock(thread)[thread]; }

  void maybe_yield();
  void count_banks(Site site, uint32_t address, int bytes);
  void barrier(const char* kind, int id, int threads, Site site);
  // Returns when all lanes have come and the last of them has done the work for all.
  void collective(Collective kind, const char* name, Site site, const Lane& lane);
  [[noreturn]] void fail(Site site, const std::string& message);

 private:
  static void fiber_entry(void* block);
  void wait(const char* what, Site site);
  void wake(int thread);
  int pick();
  void join_clocks(const std::vector<int>& threads);
  void perform(Warp& warp, int first_thread, int lanes);
  void load_matrix(Warp& warp, int first_thread, int matrix);
  std::string deadlock() const;

  const Options& options_;
  std::mt19937_64& random_;
  std::vector<Thread> threads_;
  std::vector<std::unique_ptr<Fiber>>& fibers_;
  std::vector<uint32_t> clocks_;  // [threads, threads]
  std::vector<Warp> warps_;
  std::vector<Barrier> barriers_;
  std::vector<int> ready_;
  std::vector<int> warp_order_;
  SharedMemory shared_;
  int shared_bytes_;
  int64_t index_[2] = {};
  Thread* current_ = nullptr;
  const std::function<void()>* body_ = nullptr;
  std::string fault_;
};

Block& block();

// Notes a synchronisation; true if this run leaves it out.
bool skipped(const char* kind, Site site);

std::string describe(Site site);

}  // namespace dsv4::simt
