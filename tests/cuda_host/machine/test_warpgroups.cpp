// The Hopper kernels with one synchronisation left out at a time: each must be noticed, by a fault or by the results.
#include "control.h"
#include "index_cases.h"
#include "linear_cases.h"

namespace {

using namespace dsv4;
using namespace dsv4::testing;

// `wrong`: what is wrong with a problem of the kernel, or nothing.
void check_synchronisations(const char* kernel, size_t at_least, const std::function<std::string()>& wrong) {
  const std::vector<std::string> texts = machine::synchronisations_of(kernel);
  CHECK(texts.size() >= at_least);
  for (size_t n = 0; n < texts.size(); ++n) {
    machine::leave_out(kernel, static_cast<int>(n));
    const bool noticed = !wrong().empty();
    machine::leave_out(kernel, -1);
    machine::take_fault();
    CHECK_MESSAGE(noticed, std::string(kernel) + ": not noticed without " + std::to_string(n) + ", " + texts[n]);
  }
  const std::string fault = wrong();
  CHECK_MESSAGE(fault.empty(), fault);
}

TEST(linears_need_every_synchronisation) {
  static const LinearTile group = LinearTile::kGroup;
  check_synchronisations("sm90_fp8_linear_many", 10, [] { return try_linear({LinearOp::kFp8, 5, 1026, 18}, &group); });
  check_synchronisations("sm90_fp4_linear_many", 10, [] { return try_linear({LinearOp::kFp4, 5, 1026, 18}, &group); });
}

// Of two sequences, so that a block takes keys anew, with scales of their own.
TEST(the_index_needs_every_synchronisation) {
  check_synchronisations("sm90_bf16_index_scores", 6, [] {
    return try_index({24, 70, 128, 20, IndexKeyFormat::kFp8, 8, 20, 2, false}, {24, 24, 0, true});
  });
}

}  // namespace
