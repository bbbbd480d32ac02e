// How a test steers the host model and reads what it saw. The model runs on one thread and holds one state a process.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "cuda/common/host_model.h"

namespace dsv4::simt {

enum class Schedule {
  kRandom,      // any thread that can go on, and now and then another at an access to shared memory
  kPriority,    // warps run in a random order that changes at random points: some far ahead of others
  kRoundRobin,  // in turn
};

struct Options {
  Schedule schedule = Schedule::kRandom;
  uint64_t seed = 0;
  const char* skip_file = nullptr;  // leave out every synchronisation of this line
  int skip_line = 0;
  bool count_banks = false;  // see bank_sites
  bool launch_only = false;  // whether a GPU takes the launch; nothing runs
};

struct SyncSite {
  std::string kind;  // "sync_threads", "cp_async_wait", ...
  std::string file;
  int line;
};

// A line that reads or writes shared memory, over all warps and passes while Options::count_banks was set. A GPU serves
// a warp's access of 4, 8 or 16 bytes a lane in phases of 32, 16 or 8 lanes, each in as many cycles as one of the 32
// banks has different words to give. Lanes' accesses of a line between two collectives or barriers are taken together
// in their order, as a warp that runs in step makes them.
struct BankSite {
  std::string file;
  int line;
  int bytes;       // of a lane
  int64_t phases;  // cycles without any conflict
  int64_t cycles;
};

std::vector<BankSite> bank_sites();
void forget_bank_sites();

struct Counters {
  int64_t blocks = 0;
  int64_t bank_conflicts = 0;  // cycles that ldmatrix took beyond one for each eight rows
};

void configure(const Options& options);
Counters& counters();

// Every line that synchronised since the last call of forget_sites.
std::vector<SyncSite> sites_met();
void forget_sites();

}  // namespace dsv4::simt
