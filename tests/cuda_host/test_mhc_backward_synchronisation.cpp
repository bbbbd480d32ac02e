// The synchronisation of mHC's gradients, on the host model: no alarm and the same bits in any order of threads; and
// every synchronisation is needed: a run that leaves one line's out fails.
#include "mhc_backward_cases.h"
#include "synchronisation.h"

namespace {

using namespace dsv4;
using namespace dsv4::testing;

constexpr int kSeeds = 30;

template <class X>
void check_seeds(MhcBackwardOp op, const MhcBackwardCase& c, int seeds) {
  check_orders(seeds, [&](int, auto& bits) {
    MhcBackwardProblem<X> p(c, op);
    const std::string fault = run_mhc_backward(p);
    for (int64_t t = 0; t < c.tokens; ++t) bits.push_back(bits_of(p, t));
    bits.push_back(bits_of_sums(p));
    return fault;
  });
}

TEST(no_alarm_and_the_same_bits_over_seeds) {
  for (const MhcBackwardOp op : kBackwardOps) {
    check_seeds<bf16>(op, {19, 72, true, true}, kSeeds);
    check_seeds<float>(op, {35, 72, true, true}, kSeeds);
    check_seeds<bf16>(op, {3, 41, true}, 6);     // element by element
    check_seeds<bf16>(op, {130, 296, true}, 3);  // three pieces, two splits
  }
}

TEST(ldmatrix_meets_no_bank_conflict) {
  simt::counters() = {};
  CHECK(try_mhc_backward<bf16>({64, 64, true, true}, MhcBackwardOp::kPre).empty());
  CHECK(try_mhc_backward<bf16>({64, 64}, MhcBackwardOp::kHead).empty());
  CHECK(simt::counters().blocks > 0);
  CHECK(simt::counters().bank_conflicts == 0);
}

TEST(every_synchronisation_is_needed) {
  const MhcBackwardCase c = {33, 104, true, true};
  NeededLines lines;
  for (const MhcBackwardOp op : kBackwardOps) {
    lines.check(3, [&] { return try_mhc_backward<bf16>(c, op); });
    lines.check(3, [&] { return try_mhc_backward<float>(c, op); });
  }
  CHECK((lines.kinds == Kinds{{"cp_async_commit", 4}, {"cp_async_wait", 2}, {"sync_threads", 7}}));
}

}  // namespace
