// The index_topk kernels' synchronisation, on the host model: no alarm and the same bits in any order of threads; and
// every synchronisation is needed: a run that leaves one line's out fails.
#include "index_cases.h"
#include "synchronisation.h"

namespace {

using namespace dsv4;
using namespace dsv4::testing;

constexpr int kSeeds = 24;
// Blocks of rows of two sequences and two chunks of heads; ranges.
constexpr IndexCutCase kCut = {0, 5, 64};

IndexCase small(IndexKeyFormat format, bool exact) { return {5, 34, 64, 9, format, 8, 20, 2, exact}; }

TEST(no_alarm_and_the_same_bits_over_seeds) {
  for (const IndexKeyFormat format : {IndexKeyFormat::kFp4, IndexKeyFormat::kFp8, IndexKeyFormat::kBFloat16}) {
    check_orders(kSeeds, [&](int, auto& bits) {
      IndexProblem p(small(format, false));
      const std::string fault = p.run(kCut);
      for (int64_t t = 0; t < p.c.tokens; ++t) {
        bits.push_back(p.score_bits(t));
        for (const int32_t entry : p.chosen(t)) bits.back().push_back(static_cast<uint32_t>(entry));
      }
      return fault;
    });
  }
}

TEST(ldmatrix_meets_no_bank_conflict) {
  simt::counters() = {};
  for (const int64_t dim : {32, 64, 96, 128}) CHECK(try_index({3, 40, dim, 9}).empty());
  CHECK(simt::counters().blocks > 0);
  CHECK(simt::counters().bank_conflicts == 0);
}

TEST(every_synchronisation_is_needed) {
  NeededLines lines;
  for (const IndexKeyFormat format : {IndexKeyFormat::kFp4, IndexKeyFormat::kFp8, IndexKeyFormat::kBFloat16}) {
    lines.check(6, [&] { return try_index(small(format, true), kCut); });
  }
  CHECK((lines.kinds == Kinds{{"cp_async_commit", 1}, {"cp_async_wait", 1}, {"sync_threads", 3}}));
}

}  // namespace
