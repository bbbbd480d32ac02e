// The mHC kernels' synchronisation, on the host model: no alarm and the same bits in any order of threads; and every
// synchronisation is needed: a run that leaves one line's out fails.
#include <set>

#include "mhc_cases.h"
#include "simt/control.h"

namespace {

using namespace dsv4;
using namespace dsv4::testing;

constexpr MhcOp kOps[] = {MhcOp::kPost, MhcOp::kPre, MhcOp::kPostPre, MhcOp::kHead};
constexpr int kSeeds = 100;

simt::Options order(int seed) {
  simt::Options options;
  options.seed = static_cast<uint64_t>(seed);
  options.schedule = static_cast<simt::Schedule>(seed % 3);
  return options;
}

template <class X>
void check_seeds(MhcOp op, const MhcCase& c, int seeds) {
  std::vector<std::vector<uint32_t>> first;
  for (int seed = 0; seed < seeds; ++seed) {
    simt::configure(order(seed));
    MhcProblem<X> p(c, op == MhcOp::kHead);
    const std::string fault = run_mhc(p, op);
    CHECK_MESSAGE(fault.empty(), "seed " + std::to_string(seed) + ": " + fault);
    std::vector<std::vector<uint32_t>> bits;
    for (int64_t t = 0; t < c.tokens; ++t) bits.push_back(bits_of(p, op, t));
    if (seed == 0) first = bits;
    CHECK(bits == first);
  }
  simt::configure({});
}

TEST(no_alarm_and_the_same_bits_over_seeds) {
  for (const MhcOp op : kOps) {
    check_seeds<bf16>(op, {19, 72, true}, kSeeds);
    check_seeds<float>(op, {35, 72, true}, kSeeds);
    check_seeds<bf16>(op, {3, 41, true}, 6);     // element by element
    check_seeds<bf16>(op, {130, 296, true}, 3);  // two blocks of tokens, two splits
  }
}

TEST(ldmatrix_meets_no_bank_conflict) {
  simt::counters() = {};
  CHECK(try_mhc<bf16>({128, 64}, MhcOp::kPostPre).empty());
  CHECK(try_mhc<bf16>({128, 64}, MhcOp::kHead).empty());
  CHECK(simt::counters().blocks > 0);
  CHECK(simt::counters().bank_conflicts == 0);
}

// Every line that synchronises in this op, left out alone, must fail, in whatever order the threads run.
template <class X>
void check_mutants(MhcOp op, std::set<std::string>& kinds) {
  const MhcCase c = {17, 104, true};
  simt::configure({});
  simt::forget_sites();
  CHECK(try_mhc<X>(c, op).empty());
  for (const simt::SyncSite& site : simt::sites_met()) {
    kinds.insert(site.kind);
    for (int seed = 0; seed < 6; ++seed) {
      simt::Options options = order(seed);
      options.skip_file = site.file.c_str();
      options.skip_line = site.line;
      simt::configure(options);
      const std::string fault = try_mhc<X>(c, op);
      CHECK_MESSAGE(!fault.empty(), "without " + site.kind + " of " + site.file + ":" + std::to_string(site.line) +
                                        " nothing fails, seed " + std::to_string(seed));
    }
  }
  simt::configure({});
}

TEST(every_synchronisation_is_needed) {
  std::set<std::string> kinds;
  for (const MhcOp op : kOps) {
    check_mutants<bf16>(op, kinds);
    check_mutants<float>(op, kinds);
  }
  CHECK(kinds == std::set<std::string>({"sync_threads", "cp_async_commit", "cp_async_wait"}));
}

}  // namespace
