// The Hopper kernels with one synchronisation left out at a time: each must be noticed, by a fault or by the results.
#include "control.h"
#include "linear_cases.h"

namespace {

using namespace dsv4;
using namespace dsv4::testing;

TEST(every_synchronisation_is_needed) {
  const LinearTile group = LinearTile::kGroup;
  const struct {
    const char* kernel;
    LinearCase of;
  } kKernels[] = {{"sm90_fp8_linear_many", {LinearOp::kFp8, 5, 1026, 18}},
                  {"sm90_fp4_linear_many", {LinearOp::kFp4, 5, 1026, 18}}};
  for (const auto& [kernel, of] : kKernels) {
    const std::vector<std::string> texts = machine::synchronisations_of(kernel);
    CHECK(texts.size() > 10);
    for (size_t n = 0; n < texts.size(); ++n) {
      machine::leave_out(kernel, static_cast<int>(n));
      const std::string wrong = try_linear(of, &group);
      machine::leave_out(kernel, -1);
      machine::take_fault();
      CHECK_MESSAGE(!wrong.empty(),
                    std::string(kernel) + ": not noticed without " + std::to_string(n) + ", " + texts[n]);
    }
    CHECK(try_linear(of, &group).empty());
  }
}

}  // namespace
