// The linear layers' synchronisation, on the host model: no alarm and the same bits in any order of threads; and every
// synchronisation is needed: a run that leaves one line's out fails.
#include "linear_cases.h"
#include "synchronisation.h"

namespace {

using namespace dsv4;
using namespace dsv4::testing;

constexpr int kSeeds = 24;

// Enough blocks of K that every stage is filled again, and the last stage holds blocks of several warps.
LinearCase case_of(LinearOp op, bool wide) { return {op, 3, 2208, 18, 1, wide, wide, true}; }

TEST(no_alarm_and_the_same_bits_over_seeds) {
  for (const LinearOp op : {LinearOp::kFp8, LinearOp::kFp4, LinearOp::kGrouped, LinearOp::kDense}) {
    for (const bool wide : {false, true}) {
      check_orders(kSeeds, [&](int seed, auto& bits) {
        LinearProblem p(case_of(op, wide));
        const std::string fault = p.run(&kEveryTile[seed % 3]);
        for (int64_t t = 0; t < p.c.tokens; ++t) bits.push_back(p.bits_of(t));
        return fault;
      });
    }
  }
}

TEST(every_synchronisation_is_needed) {
  NeededLines lines;
  for (const LinearOp op : {LinearOp::kFp8, LinearOp::kDense}) {
    for (const LinearTile& tile : tiles_of(case_of(op, false))) {
      const std::string what = "tile " + std::to_string(static_cast<int>(tile)) + ": ";
      lines.check(3, [&] { return try_linear(case_of(op, false), &tile); }, what);
    }
  }
  CHECK((lines.kinds == Kinds{{"cp_async_commit", 2}, {"cp_async_wait", 1}, {"sync_threads", 2}}));
}

}  // namespace
