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
};

struct SyncSite {
  std::string kind;  // "sync_threads", "cp_async_wait", ...
  std::string file;
  int line;
};

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
