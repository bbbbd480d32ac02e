// The mHC kernels' synchronisation, on the host model: no alarm and the same bits in any order of threads; and every
// synchronisation is needed: a run that leaves one line's out fails.
#include "mhc_cases.h"
#include "synchronisation.h"

namespace {

using namespace dsv4;
using namespace dsv4::testing;

constexpr MhcOp kOps[] = {MhcOp::kPost, MhcOp::kPre, MhcOp::kPostPre, MhcOp::kHead};
constexpr int kSeeds = 100;

template <class X>
void check_seeds(MhcOp op, const MhcCase& c, int seeds) {
  check_orders(seeds, [&](int, auto& bits) {
    MhcProblem<X> p(c, op == MhcOp::kHead);
    const std::string fault = run_mhc(p, op);
    for (int64_t t = 0; t < c.tokens; ++t) bits.push_back(bits_of(p, op, t));
    return fault;
  });
}

TEST(no_alarm_and_the_same_bits_over_seeds) {
  for (const MhcOp op : kOps) {
    check_seeds<bf16>(op, {19, 72, true}, kSeeds);
    check_seeds<float>(op, {35, 72, true}, kSeeds);
    check_seeds<bf16>(op, {3, 41, true}, 6);  // element by element
    check_seeds<bf16>(op, {5, 296, true}, 10);
    check_seeds<bf16>(op, {65, 104, true}, 10);  // more than mhc_mix_few.h takes
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

TEST(every_synchronisation_is_needed) {
  const MhcCase c = {17, 168, true};
  NeededLines lines;
  for (const MhcOp op : kOps) {
    lines.check(6, [&] { return try_mhc<bf16>(c, op); });
    lines.check(6, [&] { return try_mhc<bf16>({65, 168, true}, op); });  // more than mhc_mix_few.h takes
    lines.check(6, [&] { return try_mhc<float>(c, op); });
  }
  CHECK((lines.kinds == Kinds{{"cp_async_commit", 5}, {"cp_async_wait", 4}, {"sync_threads", 4}}));
}

}  // namespace
