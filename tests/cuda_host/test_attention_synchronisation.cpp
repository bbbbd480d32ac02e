// The attention kernels' synchronisation, on the host model: no alarm and the same bits in any order of threads; and
// every synchronisation is needed: a run that leaves one line's out fails.
#include "attention_cases.h"
#include "synchronisation.h"

namespace {

using namespace dsv4;
using namespace dsv4::testing;

constexpr int kSeeds = 30;

// bfloat16 and FP8 rows; a row of one split and, with many indices, one of two.
AttentionCase mixed(int64_t heads, int64_t k) {
  AttentionCase c;
  c.runs = {{70, 1}, {3, 1}};
  if (k > 100) c.runs[0].start = 2 * static_cast<int>(k) + 5;
  c.heads = heads;
  c.head_dim = 72;
  c.rope_dim = 8;
  c.window = 40;  // a tile and a part of the next
  c.k = k;
  return c;
}

// The same in float32: a tile is 16 keys.
AttentionCase in_float32(AttentionCase c) {
  c.f32_query = true;
  c.window_rows = c.entry_rows = RowForm::kF32;
  return c;
}

template <class X = bf16>
void check_seeds(const AttentionCase& c, int heads_per_block, int seeds) {
  check_orders(seeds, [&](int, auto& bits) {
    AttentionProblem<X> p(c);
    const std::string fault = run_attention(p, heads_per_block);
    for (int64_t row = 0; row < p.rows; ++row) bits.push_back(bits_of(p, row));
    return fault;
  });
}

TEST(no_alarm_and_the_same_bits_over_seeds) {
  check_seeds(mixed(5, 50), 16, kSeeds);
  check_seeds(mixed(20, 50), 32, kSeeds);
  check_seeds(mixed(20, 310), 32, 3);
  AttentionCase slow = mixed(5, 50);  // element by element
  slow.head_dim = 70;
  check_seeds(slow, 16, 6);
  AttentionCase wide = mixed(5, 20);  // FP8 rows of which a part is read late
  wide.head_dim = 512;
  wide.rope_dim = 256;
  check_seeds(wide, 32, 3);
  check_seeds<float>(in_float32(mixed(20, 50)), 16, kSeeds);
  check_seeds<float>(in_float32(mixed(5, 310)), 16, 3);
  check_seeds<float>(in_float32(slow), 16, 6);
  AttentionCase converted = mixed(20, 50);  // FP8 and bfloat16 rows in tiles of float32
  converted.f32_query = true;
  check_seeds<float>(converted, 16, kSeeds);
  converted.f32_query = false;
  converted.window_rows = RowForm::kF32;
  check_seeds(converted, 16, kSeeds);
}

TEST(ldmatrix_meets_no_bank_conflict) {
  for (const int64_t head_dim : {32, 72, 160, 512}) {
    AttentionCase c = mixed(20, 40);
    c.head_dim = head_dim;
    simt::counters() = {};
    const std::string fault = try_attention(c, 32);
    CHECK_MESSAGE(fault.empty(), fault);
    CHECK(simt::counters().blocks > 0);
    CHECK(simt::counters().bank_conflicts == 0);
  }
}

Kinds needed_lines(const AttentionCase& c, int heads_per_block) {
  NeededLines lines;
  lines.check(6, [&] { return try_attention(c, heads_per_block); });
  return lines.kinds;
}

TEST(every_synchronisation_is_needed) {
  const Kinds tensor_cores = {{"cp_async_commit", 2}, {"cp_async_wait", 1}, {"sync_threads", 4}, {"sync_warp", 1}};
  for (const int heads : {16, 32}) CHECK(needed_lines(mixed(heads, 50), heads) == tensor_cores);
  Kinds tile = tensor_cores;
  tile["sync_threads"] = 1;
  CHECK(needed_lines(in_float32(mixed(16, 50)), 16) == tile);
}

}  // namespace
