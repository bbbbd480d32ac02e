// The synchronisation of the experts' gradient, on the host model: no alarm and the same bits in any order of threads;
// and every synchronisation is needed: a run that leaves one line's out fails. (Those of the map and of weight_tile.h:
// the tests of the forward pass and of the linear layers.)
#include "moe_backward_cases.h"
#include "synchronisation.h"

namespace {

using namespace dsv4;
using namespace dsv4::testing;

constexpr int kSeeds = 21;
constexpr sm80::GradientCut kCuts[] = {{false, false, true, 128}, {true, true, false, 384}};

// Enough of K that every stage is filled again; rows in two warps.
GradientCase case_of(int64_t tokens) { return {tokens, 328, 72, 1, 1, 0}; }

template <class X>
void check_seeds() {
  check_orders(kSeeds, [&](int seed, auto& bits) {
    GradientProblem<X> p({70, 264, 136, 2, 2, 24});
    const std::string fault = p.run(&kCuts[seed % 2]);
    bits.push_back(p.bits());
    return fault;
  });
}

TEST(no_alarm_and_the_same_bits_over_seeds) {
  check_seeds<bf16>();
  check_seeds<float>();
}

TEST(every_synchronisation_is_needed) {
  NeededLines lines;
  for (const sm80::GradientCut& cut : kCuts) {
    const GradientCase c = case_of(cut.many ? 70 : 20);
    lines.check(3, [&] { return try_gradient<bf16>(c, &cut); }, "bfloat16: ", "weight_tile.h");
    lines.check(3, [&] { return try_gradient<float>(c, &cut); }, "float32: ", "weight_tile.h");
  }
  CHECK((lines.kinds == Kinds{{"cp_async_commit", 2}, {"cp_async_wait", 1}, {"sync_threads", 4}}));
}

}  // namespace
