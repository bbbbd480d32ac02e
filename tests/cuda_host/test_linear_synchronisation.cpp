// The linear layers' synchronisation, on the host model: no alarm and the same bits in any order of threads; and every
// synchronisation is needed: a run that leaves one line's out fails.
#include <set>

#include "linear_cases.h"
#include "simt/control.h"

namespace {

using namespace dsv4;
using namespace dsv4::testing;

constexpr int kSeeds = 24;

simt::Options order(int seed) {
  simt::Options options;
  options.seed = static_cast<uint64_t>(seed);
  options.schedule = static_cast<simt::Schedule>(seed % 3);
  return options;
}

// Enough blocks of K that every stage is filled again, and the last stage holds blocks of several warps.
LinearCase case_of(LinearOp op, bool wide) { return {op, 3, 2208, 18, 1, wide, wide, true}; }

TEST(no_alarm_and_the_same_bits_over_seeds) {
  for (const LinearOp op : {LinearOp::kFp8, LinearOp::kFp4, LinearOp::kGrouped, LinearOp::kDense}) {
    for (const bool wide : {false, true}) {
      std::vector<std::vector<uint32_t>> first;
      for (int seed = 0; seed < kSeeds; ++seed) {
        simt::configure(order(seed));
        LinearProblem p(case_of(op, wide));
        const std::string fault = p.run(&kLinearTiles[seed % 3]);
        CHECK_MESSAGE(fault.empty(), "seed " + std::to_string(seed) + ": " + fault);
        std::vector<std::vector<uint32_t>> bits;
        for (int64_t t = 0; t < p.c.tokens; ++t) bits.push_back(p.bits_of(t));
        if (seed == 0) first = bits;
        CHECK(bits == first);
      }
    }
  }
  simt::configure({});
}

TEST(every_synchronisation_is_needed) {
  std::set<std::string> kinds, places;
  for (const LinearOp op : {LinearOp::kFp8, LinearOp::kDense}) {
    for (const sm80::LinearTile& tile : kLinearTiles) {
      simt::configure({});
      simt::forget_sites();
      CHECK(try_linear(case_of(op, false), &tile).empty());
      for (const simt::SyncSite& site : simt::sites_met()) {
        kinds.insert(site.kind);
        places.insert(site.file + std::to_string(site.line));
        for (int seed = 0; seed < 3; ++seed) {
          simt::Options options = order(seed);
          options.skip_file = site.file.c_str();
          options.skip_line = site.line;
          simt::configure(options);
          const std::string fault = try_linear(case_of(op, false), &tile);
          CHECK_MESSAGE(!fault.empty(), "without " + site.kind + " of " + site.file + ":" + std::to_string(site.line) +
                                            " nothing fails, seed " + std::to_string(seed) + ", tile " +
                                            std::to_string(static_cast<int>(tile)));
        }
      }
    }
  }
  simt::configure({});
  CHECK(places.size() == 5);
  CHECK(kinds == std::set<std::string>({"sync_threads", "cp_async_commit", "cp_async_wait"}));
}

}  // namespace
