// The experts' synchronisation, on the host model: no alarm and the same bits in any order of threads; and every
// synchronisation is needed: a run that leaves one line's out fails. (That of weight_tile.h: the linear layers' test.)
#include <set>

#include "moe_stages.h"
#include "simt/control.h"

namespace {

using namespace dsv4;
using namespace dsv4::testing;

constexpr int kSeeds = 21;
constexpr WeightFormat kFormats[] = {WeightFormat::kPlain, WeightFormat::kFp8, WeightFormat::kFp4};
constexpr sm80::ExpertCut kCuts[] = {{4096, false, false, true}, {4096, true, true, false}};

simt::Options order(int seed) {
  simt::Options options;
  options.seed = static_cast<uint64_t>(seed);
  options.schedule = static_cast<simt::Schedule>(seed % 3);
  return options;
}

// One block of K: the stage that what follows a product overwrites is the last one read.
MoeCase case_of(WeightFormat format, int64_t hidden = 96) { return {5, hidden, 136, 3, 2, format, format, format, 72}; }

TEST(no_alarm_and_the_same_bits_over_seeds) {
  for (const WeightFormat format : kFormats) {
    std::vector<std::vector<uint32_t>> first;
    for (int seed = 0; seed < kSeeds; ++seed) {
      simt::configure(order(seed));
      MoeProblem<bf16> p(case_of(format, 160));
      const std::string fault = p.run(&kCuts[seed % 2]);
      CHECK_MESSAGE(fault.empty(), "seed " + std::to_string(seed) + ": " + fault);
      std::vector<std::vector<uint32_t>> bits;
      for (int64_t t = 0; t < p.c.tokens; ++t) bits.push_back(p.bits_of(t));
      if (seed == 0) first = bits;
      CHECK(bits == first);
    }
  }
  simt::configure({});
}

TEST(every_synchronisation_is_needed) {
  std::set<std::string> kinds, places;
  for (const WeightFormat format : {WeightFormat::kPlain, WeightFormat::kFp4}) {
    simt::configure({});
    simt::forget_sites();
    CHECK(try_moe<bf16>(case_of(format), &kCuts[0]).empty());
    for (const simt::SyncSite& site : simt::sites_met()) {
      if (site.file.find("weight_tile.h") != std::string::npos) continue;
      kinds.insert(site.kind);
      places.insert(site.file + std::to_string(site.line));
      for (int seed = 0; seed < 3; ++seed) {
        simt::Options options = order(seed);
        options.skip_file = site.file.c_str();
        options.skip_line = site.line;
        simt::configure(options);
        const std::string fault = try_moe<bf16>(case_of(format), &kCuts[0]);
        CHECK_MESSAGE(!fault.empty(), "without " + site.kind + " of " + site.file + ":" + std::to_string(site.line) +
                                          " nothing fails, seed " + std::to_string(seed));
      }
    }
  }
  simt::configure({});
  CHECK(places.size() == 3);
  CHECK(kinds == std::set<std::string>({"sync_threads"}));
}

}  // namespace
