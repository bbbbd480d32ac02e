// What the tests of synchronisation share, on the host model: no alarm and the same bits in any order of threads; and a
// run that leaves one line's synchronisation out fails.
#pragma once

#include <cstdint>
#include <map>
#include <set>
#include <string>
#include <vector>

#include "native/check.h"
#include "simt/control.h"

namespace dsv4::testing {

inline simt::Options order_of_threads(int seed) {
  simt::Options options;
  options.seed = static_cast<uint64_t>(seed);
  options.schedule = static_cast<simt::Schedule>(seed % 3);
  return options;
}

// attempt(seed, bits) says what is wrong, or nothing, and puts its results' bits there.
template <class Attempt>
void check_orders(int seeds, const Attempt& attempt) {
  std::vector<std::vector<uint32_t>> first;
  for (int seed = 0; seed < seeds; ++seed) {
    simt::configure(order_of_threads(seed));
    std::vector<std::vector<uint32_t>> bits;
    const std::string fault = attempt(seed, bits);
    CHECK_MESSAGE(fault.empty(), "seed " + std::to_string(seed) + ": " + fault);
    if (seed == 0) first = bits;
    CHECK(bits == first);
  }
  simt::configure({});
}

using Kinds = std::map<std::string, int>;

// The lines of all attempts that synchronise.
struct NeededLines {
  std::set<std::string> places;
  Kinds kinds;  // what they call: how many of them

  // attempt() says what is wrong: nothing, but without any of its lines, whatever the order of the threads. Lines of
  // the file `elsewhere` are another test's. `what` names the attempt.
  template <class Attempt>
  void check(int seeds, const Attempt& attempt, const std::string& what = "", const char* elsewhere = nullptr) {
    simt::configure({});
    simt::forget_sites();
    const std::string fault = attempt();
    CHECK_MESSAGE(fault.empty(), what + fault);
    for (const simt::SyncSite& site : simt::sites_met()) {
      if (elsewhere != nullptr && site.file.find(elsewhere) != std::string::npos) continue;
      const std::string place = site.file + ":" + std::to_string(site.line);
      if (places.insert(place).second) ++kinds[site.kind];
      for (int seed = 0; seed < seeds; ++seed) {
        simt::Options options = order_of_threads(seed);
        options.skip_file = site.file.c_str();
        options.skip_line = site.line;
        simt::configure(options);
        CHECK_MESSAGE(!attempt().empty(),
                      what + "without " + site.kind + " of " + place + " nothing fails, seed " + std::to_string(seed));
      }
    }
    simt::configure({});
  }
};

}  // namespace dsv4::testing
