// The synchronisation of the kernels of norms, quantize and compress, on the host model: no alarm and the same bits in
// any order of threads; and every synchronisation is needed: a run that leaves one line's out fails.
#include <functional>

#include "compress_cases.h"
#include "norm_rope_cases.h"
#include "quantize_cases.h"
#include "synchronisation.h"

namespace {

using namespace dsv4;
using namespace dsv4::testing;

// `attempt` says what is wrong, or nothing: never in any order of threads, always without one of its `count` lines that
// synchronise.
void check_synchronisation(const std::function<std::string()>& attempt, size_t count) {
  check_orders(24, [&](int, auto&) { return attempt(); });
  NeededLines lines;
  lines.check(6, attempt);
  CHECK_MESSAGE(lines.places.size() == count, std::to_string(lines.places.size()) + " lines synchronise");
}

TEST(hadamard_in_registers) {
  check_synchronisation([] { return try_hadamard<bf16>({9, 128}); }, 0);
  check_synchronisation([] { return try_hadamard<float>({3, 1024}); }, 0);
}

TEST(hadamard_of_long_rows) {
  check_synchronisation([] { return try_hadamard<bf16>({1, 2048}, false); }, 2);
}

// Rows whose sum is lost are read again.
TEST(rms_norm_of_long_rows) {
  check_synchronisation([] { return try_norm<bf16>({2, 1536}); }, 1);
  check_synchronisation([] { return try_norm<bf16>({2, 1536, -1, 2, 1e30f}); }, 2);
}

// Blocks that make several entries, of several groups of positions.
TEST(compress_of_rows_and_keys) {
  const std::vector<CompressRun> runs = {{1, 0, 13}, {0, 5, 9}};
  check_synchronisation(
      [&] { return try_compress({4, 40, 8, 2, PageFormat::kFp8Rows, false, true, 3, 1, 0, runs}, 12); }, 3);
  check_synchronisation(
      [&] { return try_compress({4, 128, 64, 2, PageFormat::kFp4Keys, false, true, 3, 1, 0, runs}, 12); }, 3);
}

}  // namespace
