// The synchronisation of the kernels of norms, quantize and compress, and of their gradients, on the host model: no
// alarm and the same bits in any order of threads; and every synchronisation is needed: a run that leaves one line's
// out fails.
#include <functional>

#include "compress_backward_cases.h"
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

// Teams of lanes have nothing to synchronise; of warps, their sums of a row. Then the pieces' sums.
TEST(gradients_of_norms) {
  check_synchronisation([] { return try_query_gradient<bf16>({3, 5, 96, 32}); }, 0);
  check_synchronisation([] { return try_query_gradient<float>({3, 2, 520, 64, 1e18f}); }, 0);
  check_synchronisation([] { return try_norm_gradient<bf16>({9, 96, 32}); }, 1);
  check_synchronisation([] { return try_norm_gradient<bf16>({9, 520}); }, 2);
  check_synchronisation([] { return try_norm_gradient<float>({6, 520, 64, 1, 1e30f}); }, 2);
  check_synchronisation([] { return try_norm_gradient<float>({5, 8200, -1, 0}); }, 1);
}

// The pool's, those of the norm's gradient, those of pieces.
TEST(gradients_of_entries) {
  check_synchronisation([] { return try_entries_gradient<bf16>({23, 4, 40, 8, 2}); }, 2);
  check_synchronisation([] { return try_entries_gradient<float>({70, 33, 520, 64, 1}); }, 3);
  check_synchronisation([] { return try_entries_gradient<bf16>({13, 4, 128, 64, 2, true}); }, 2);
}

// In any order of threads the same bits.
TEST(gradients_have_one_order_of_sums) {
  check_orders(24, [](int, std::vector<std::vector<uint32_t>>& bits) {
    NormGradientProblem<float> norm({70, 520, 64});
    EntriesGradientProblem<float> entries({70, 4, 40, 8, 2});
    const std::string fault = norm.run(), other = entries.run();
    for (DeviceTensor<float>* tensor : {&norm.grad_x, &norm.wide_grad, &entries.grad_kv, &entries.grad_gate,
                                        &entries.grad_ape, &entries.grad_weight}) {
      std::vector<uint32_t>& own = bits.emplace_back();
      for (int64_t row = 0; row < tensor->rows(); ++row) {
        for (int64_t i = 0; i < tensor->inner(); ++i) own.push_back(bits_from_float(tensor->at(row, i)));
      }
    }
    return fault + other;
  });
}

}  // namespace
