// The experts' synchronisation, on the host model: no alarm and the same bits in any order of threads; and every
// synchronisation is needed: a run that leaves one line's out fails. (That of weight_tile.h: the linear layers' test.)
#include "moe_stages.h"
#include "synchronisation.h"

namespace {

using namespace dsv4;
using namespace dsv4::testing;

constexpr int kSeeds = 21;
constexpr WeightFormat kFormats[] = {WeightFormat::kPlain, WeightFormat::kFp8, WeightFormat::kFp4};
constexpr sm80::ExpertCut kCuts[] = {{4096, false, sm80::SharedTile::kFew, true},
                                     {4096, true, sm80::SharedTile::kMany, false},
                                     {4096, false, sm80::SharedTile::kSome, false}};

// One block of K: the stage that what follows a product overwrites is the last one read.
MoeCase case_of(WeightFormat format, int64_t hidden = 96) { return {5, hidden, 136, 3, 2, format, format, format, 72}; }

TEST(no_alarm_and_the_same_bits_over_seeds) {
  for (int kind = 0; kind < 6; ++kind) {
    const WeightFormat format = kFormats[kind % 3];
    MoeCase c = case_of(format, 160);
    // w1 of another form than w3.
    if (kind >= 3) c.gate = format == WeightFormat::kPlain ? WeightFormat::kFp4 : WeightFormat::kPlain;
    check_orders(kSeeds, [&](int seed, auto& bits) {
      MoeProblem<bf16> p(c);
      const std::string fault = p.run(&kCuts[seed / 3 % 3]);
      for (int64_t t = 0; t < p.c.tokens; ++t) bits.push_back(p.bits_of(t));
      return fault;
    });
  }
}

TEST(every_synchronisation_is_needed) {
  NeededLines lines;
  for (const WeightFormat format : {WeightFormat::kPlain, WeightFormat::kFp4}) {
    lines.check(3, [&] { return try_moe<bf16>(case_of(format), &kCuts[1]); }, "", "weight_tile.h");
  }
  CHECK((lines.kinds == Kinds{{"sync_threads", 3}}));
}

}  // namespace
