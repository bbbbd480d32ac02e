// The index_topk kernels' synchronisation, on the host model: no alarm and the same bits in any order of threads; and
// every synchronisation is needed: a run that leaves one line's out fails.
#include <set>

#include "index_cases.h"
#include "simt/control.h"

namespace {

using namespace dsv4;
using namespace dsv4::testing;

constexpr int kSeeds = 24;
// Blocks of rows of two sequences and two chunks of heads; ranges.
constexpr IndexCutCase kCut = {0, 5, 64};

simt::Options order(int seed) {
  simt::Options options;
  options.seed = static_cast<uint64_t>(seed);
  options.schedule = static_cast<simt::Schedule>(seed % 3);
  return options;
}

IndexCase small(IndexKeyFormat format, bool exact) { return {5, 34, 64, 9, format, 8, 20, 2, exact}; }

TEST(no_alarm_and_the_same_bits_over_seeds) {
  for (const IndexKeyFormat format : {IndexKeyFormat::kFp4, IndexKeyFormat::kFp8, IndexKeyFormat::kBFloat16}) {
    std::vector<std::vector<uint32_t>> first;
    for (int seed = 0; seed < kSeeds; ++seed) {
      simt::configure(order(seed));
      IndexProblem p(small(format, false));
      const std::string fault = p.run(kCut);
      CHECK_MESSAGE(fault.empty(), "seed " + std::to_string(seed) + ": " + fault);
      std::vector<std::vector<uint32_t>> bits;
      for (int64_t t = 0; t < p.c.tokens; ++t) {
        bits.push_back(p.score_bits(t));
        for (const int32_t entry : p.chosen(t)) bits.back().push_back(static_cast<uint32_t>(entry));
      }
      if (seed == 0) first = bits;
      CHECK(bits == first);
    }
  }
  simt::configure({});
}

TEST(ldmatrix_meets_no_bank_conflict) {
  simt::counters() = {};
  for (const int64_t dim : {32, 64, 96, 128}) CHECK(try_index({3, 40, dim, 9}).empty());
  CHECK(simt::counters().blocks > 0);
  CHECK(simt::counters().bank_conflicts == 0);
}

TEST(every_synchronisation_is_needed) {
  std::set<std::string> kinds, places;
  for (const IndexKeyFormat format : {IndexKeyFormat::kFp4, IndexKeyFormat::kFp8, IndexKeyFormat::kBFloat16}) {
    simt::configure({});
    simt::forget_sites();
    CHECK(try_index(small(format, true), kCut).empty());
    for (const simt::SyncSite& site : simt::sites_met()) {
      kinds.insert(site.kind);
      places.insert(site.file + std::to_string(site.line));
      for (int seed = 0; seed < 6; ++seed) {
        simt::Options options = order(seed);
        options.skip_file = site.file.c_str();
        options.skip_line = site.line;
        simt::configure(options);
        const std::string fault = try_index(small(format, true), kCut);
        CHECK_MESSAGE(!fault.empty(), "without " + site.kind + " of " + site.file + ":" + std::to_string(site.line) +
                                          " nothing fails, seed " + std::to_string(seed));
      }
    }
  }
  simt::configure({});
  CHECK(places.size() == 5);
  CHECK(kinds == std::set<std::string>({"sync_threads", "cp_async_commit", "cp_async_wait"}));
}

}  // namespace
