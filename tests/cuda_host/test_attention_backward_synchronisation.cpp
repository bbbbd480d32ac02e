// The synchronisation of the kernels of sparse_attention_backward, on the host model: no alarm and the same bits in any
// order of threads; and every synchronisation is needed: a run that leaves one line's out fails.
#include "attention_backward_cases.h"
#include "synchronisation.h"

namespace {

using namespace dsv4;
using namespace dsv4::testing;

// Rows that share keys, of several groups of heads, with keys that they list twice.
AttentionCase mixed(bool f32, int64_t heads, int64_t k) {
  AttentionCase c;
  c.runs = {{70, 3}, {3, 1}};
  c.heads = heads;
  c.head_dim = 72;
  c.rope_dim = 8;
  c.window = 40;
  c.k = k;
  c.f32_query = f32;
  c.window_rows = c.entry_rows = f32 ? RowForm::kF32 : RowForm::kBf16;
  return c;
}

template <class X>
void prepare(AttentionBackwardProblem<X>& p) {
  for (int64_t row = 0; row < p.forward.rows; ++row) {
    for (int64_t i = 0; i < p.forward.c.k; ++i) p.forward.indices.at(row, i) = static_cast<int32_t>(i * i % 37);
  }
  p.update();
}

template <class X>
void check_seeds(const AttentionCase& c, int seeds, int heads_per_block = 16) {
  check_orders(seeds, [&](int, auto& bits) {
    AttentionBackwardProblem<X> p(c);
    prepare(p);
    const std::string fault = run_attention_backward(p, heads_per_block);
    bits = gradient_bits(p);
    return fault;
  });
}

TEST(no_alarm_and_the_same_bits_over_seeds) {
  check_seeds<bf16>(mixed(false, 20, 50), 24);
  check_seeds<bf16>(mixed(false, 20, 50), 12, 32);
  check_seeds<bf16>(mixed(false, 70, 20), 6, 32);
  check_seeds<float>(mixed(true, 20, 50), 24);
  AttentionCase converted = mixed(false, 20, 50);  // FP8 rows
  converted.window_rows = RowForm::kFp8;
  check_seeds<bf16>(converted, 6);
  AttentionCase long_rows = mixed(false, 2, 50);
  long_rows.entries = Entries::kLengths;
  long_rows.runs = {{2000, 1}};
  check_seeds<bf16>(long_rows, 3);
}

template <class X>
Kinds needed_lines(const AttentionCase& c, int heads_per_block = 16) {
  NeededLines lines;
  lines.check(6, [&] {
    AttentionBackwardProblem<X> p(c);
    prepare(p);
    const std::string fault = run_attention_backward(p, heads_per_block);
    return fault.empty() ? compare_attention_backward(p) : fault;
  });
  return lines.kinds;
}

TEST(every_synchronisation_is_needed) {
  // An odd number of tiles: the second walk begins where the first has ended.
  const Kinds tensor_cores = {{"cp_async_commit", 4}, {"cp_async_wait", 2}, {"sync_threads", 9}, {"sync_warp", 2}};
  for (const int heads : {16, 32}) CHECK(needed_lines<bf16>(mixed(false, heads, 50), heads) == tensor_cores);
  Kinds lanes = tensor_cores;
  lanes["sync_threads"] = 6;
  CHECK(needed_lines<float>(mixed(true, 20, 40)) == lanes);
}

}  // namespace
