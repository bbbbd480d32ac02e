// The sm80 compressor against the scalar one: bit for bit where pooling is exact, closely elsewhere; and against itself
// in other chunks and company. Runs on the host model, and on a GPU where it is built for one.
#include "compress_cases.h"

namespace {

using namespace dsv4;
using namespace dsv4::testing;

constexpr PageFormat kRows[] = {PageFormat::kFp8Rows, PageFormat::kFloat32, PageFormat::kBFloat16};
constexpr PageFormat kKeys[] = {PageFormat::kFp4Keys, PageFormat::kFp8Keys};

std::string text(int64_t value) { return std::to_string(value) + " "; }

void check_case(const CompressCase& c, int rows_per_block = 0, bool rotated = false) {
  const std::string wrong = try_compress(c, rows_per_block, rotated);
  CHECK_MESSAGE(wrong.empty(), "format " + text(static_cast<int>(c.format)) + "ratio " + text(c.ratio) + "dim " +
                                   text(c.dim) + "rope " + text(c.rope_dim) + "sets " + text(c.sets) + "wide " +
                                   text(c.wide_weight) + "exact " + text(c.exact) + ": " + wrong);
}

CompressCase with_runs(CompressCase c, std::vector<CompressRun> runs) {
  c.runs = std::move(runs);
  return c;
}

TEST(no_tokens) {
  if (no_device()) return;
  check_case(with_runs({4, 64, 32, 2}, {}));
}

TEST(rows_of_every_format) {
  if (no_device()) return;
  for (const PageFormat format : kRows) {
    for (const int64_t sets : {1, 2}) {
      for (const bool wide : {false, true}) {
        for (const bool exact : {false, true}) {
          check_case({4, 512, 64, sets, format, wide, exact});
          check_case({4, 64, 32, sets, format, wide, exact});
        }
      }
    }
  }
}

TEST(ratios) {
  if (no_device()) return;
  for (const int64_t ratio : {1, 2, 3, 5, 7, 8, 9, 16, 33}) {
    for (const int64_t sets : {1, 2}) {
      for (const bool exact : {false, true}) check_case({ratio, 96, 32, sets, PageFormat::kFp8Rows, false, exact});
    }
  }
  for (const bool exact : {false, true}) {
    check_case(with_runs({128, 512, 64, 1, PageFormat::kFp8Rows, false, exact}, {{0, 0, 260}, {2, 300, 90}}));
    check_case(with_runs({128, 128, 64, 2, PageFormat::kFloat32, true, exact}, {{0, 120, 10}, {2, 300, 90}}));
  }
}

TEST(dims) {
  if (no_device()) return;
  for (const PageFormat format : kRows) {
    for (const int64_t dim : {1, 3, 4, 5, 8, 33, 40, 63, 100, 160, 257, 520, 1000}) {
      for (const int64_t rope_dim : {int64_t{0}, int64_t{2}, dim / 4 * 2}) {
        if (rope_dim < dim) check_case({4, dim, rope_dim, 2, format, true});
      }
    }
  }
  check_case({2, 2056, 64, 2, PageFormat::kFp8Rows, true});
  check_case({4, 8192, 64, 1, PageFormat::kFp8Rows});
}

TEST(keys_of_every_format) {
  if (no_device()) return;
  for (const PageFormat format : kKeys) {
    for (const int64_t dim : {32, 64, 128, 256, 512, 1024}) {
      for (const bool exact : {false, true}) {
        check_case({4, dim, 32, 2, format, false, exact});
        check_case({4, dim, 0, 1, format, true, exact});
      }
    }
  }
  for (const int64_t dim : {1, 2, 4, 8, 16}) {
    check_case({4, dim, 0, 2, PageFormat::kFp8Keys});
    check_case({4, dim, dim / 2 * 2, 2, PageFormat::kBFloat16}, 0, true);
  }
  check_case({4, 128, 64, 2, PageFormat::kFloat32, true}, 0, true);
  check_case({4, 128, 64, 2, PageFormat::kBFloat16}, 0, true);
}

TEST(anywhere_in_memory) {
  if (no_device()) return;
  for (const PageFormat format : {PageFormat::kFp8Rows, PageFormat::kFloat32, PageFormat::kBFloat16}) {
    check_case({4, 512, 64, 2, format, false, true, 3, 1, 1});
  }
  for (const PageFormat format : kKeys) check_case({4, 128, 64, 2, format, false, true, 3, 1, 3});
}

// Each operand and result alone: what is believed of one must not be concluded from another.
TEST(any_operand_anywhere_in_memory) {
  if (no_device()) return;
  for (const bool wide : {false, true}) {
    for (const PageFormat format : kRows) {
      each_odd_tensor([&] { check_case({4, 64, 32, 2, format, wide}); });
    }
    for (const PageFormat format : kKeys) {
      each_odd_tensor([&] { check_case({4, 128, 64, 2, format, wide}); });
    }
  }
}

#if !defined(DSV4_ON_GPU)

TEST(offsets_beyond_32_bits) {
  const RowsApart apart;
  const std::vector<CompressRun> runs = {{1, 0, 23}, {3, 6, 9}};  // the second reads what `state` holds
  for (const bool wide : {false, true}) {
    for (const PageFormat format : kRows) check_case(with_runs({4, 64, 32, 2, format, wide}, runs));
    for (const PageFormat format : kKeys) check_case(with_runs({4, 128, 64, 2, format, wide}, runs));
  }
  const std::string narrow = try_entries<bf16>({4, 64, 32, 2}, 23), wide = try_entries<float>({4, 64, 32, 2}, 23);
  CHECK_MESSAGE(narrow.empty() && wide.empty(), narrow + wide);
}

#endif

TEST(page_sizes_and_rings) {
  if (no_device()) return;
  for (const int64_t page_size : {1, 2, 64}) {
    for (const int64_t spare : {0, 3, 40})
      check_case({4, 96, 32, 2, PageFormat::kFp8Rows, false, true, page_size, spare});
  }
}

TEST(rows_that_a_block_looks_through) {
  if (no_device()) return;
  for (const int rows : {1, 2, 5, 16, 31, 32, 33, 100}) {
    check_case({4, 96, 32, 2}, rows);
    check_case({1, 96, 32, 2}, rows);
    check_case({4, 128, 64, 2, PageFormat::kFp4Keys}, rows);
  }
  CompressProblem p({128, 64, 32, 1});
  CompressParams params = p.params(false, 0, p.tokens);
  const auto looks_through = [&](int64_t tokens, int64_t ratio, int entries, int state) {
    params.kv.shape[0] = tokens;
    params.ratio = ratio;
    const sm80::CompressRows rows = sm80::compress_rows_per_block(params);
    CHECK(rows.entries == entries && rows.state == state);
  };
  looks_through(100, 128, 1, 1);
  looks_through(4096, 128, 16, 16);
  looks_through(1 << 20, 128, 128, 32);
  looks_through(1 << 20, 4, 4, 32);
}

// A call in two pieces, wherever it is cut, leaves the same bits: the second finds in `state` what the first left
// there.
TEST(chunks_change_nothing) {
  if (no_device()) return;
  for (const CompressCase& one : {CompressCase{4, 96, 32, 2, PageFormat::kFp8Rows, false, false},
                                  {8, 64, 32, 1, PageFormat::kFloat32, true, false},
                                  {4, 128, 64, 2, PageFormat::kFp4Keys, false, false},
                                  {3, 40, 8, 2, PageFormat::kFp8Rows, false, false, 3, 0}}) {
    const CompressCase c = with_runs(one, {{0, 0, 21}, {1, 13, 9}});
    CompressProblem whole(c);
    CHECK(whole.run().empty());
    for (const int64_t cut : {1, 4, 10, 19, 21, 24, 29}) {
      CompressProblem p(c);
      CHECK(p.run(0, cut).empty());
      CHECK(p.run(cut, p.tokens - cut).empty());
      p.expected_state.assign(&whole.state.at(0), &whole.state.at(0) + whole.expected_state.size());
      p.pool.expected.assign(&whole.pool.pages.at(0), &whole.pool.pages.at(0) + whole.pool.expected.size());
      const std::string wrong = p.wrong();
      CHECK_MESSAGE(wrong.empty(), "cut " + std::to_string(cut) + ": " + wrong);
    }
  }
}

// Gates of one entry that leave nothing to choose, or everything.
TEST(gates_that_are_not_finite) {
  if (no_device()) return;
  for (const float gate : {-INFINITY, INFINITY, NAN}) {
    for (const PageFormat format : {PageFormat::kFloat32, PageFormat::kBFloat16, PageFormat::kFp8Rows}) {
      CompressProblem p(with_runs({8, 64, 32, 1, format, true}, {{0, 0, 24}}));
      for (int64_t d = 0; d < 64; ++d) {
        for (int64_t i = 0; i < (d % 3 == 0 ? 8 : d % 3 == 1 ? 4 : 1); ++i) p.gate.at(8 + i, d) = gate;
      }
      p.gate.upload();
      CHECK(p.run().empty());
      p.expect();
      if (format == PageFormat::kFp8Rows) {  // NaN has one code
        const std::string wrong = p.wrong();
        CHECK_MESSAGE(wrong.empty(), wrong);
      }
      for (int64_t i = 0; format == PageFormat::kFloat32 && i < p.pool.pages.rows() * p.pool.pages.inner(); i += 4) {
        float got, wanted;
        memcpy(&got, &p.pool.pages.at(0, i), 4);
        memcpy(&wanted, &p.pool.expected[static_cast<size_t>(i)], 4);
        CHECK(std::isnan(got) == std::isnan(wanted));
      }
    }
  }
}

TEST(rows_without_a_place_are_dropped) {
  if (no_device()) return;
  CompressProblem p(with_runs({2, 64, 32, 1}, {{0, 0, 8}}));
  const int32_t sequences[] = {-1, -1, 4, INT32_MAX, INT32_MIN, 0, 0, 0},
                positions[] = {0, 1, 1, 3, 3, -1, INT32_MIN, -3};
  for (int64_t t = 0; t < 8; ++t) p.sequence.at(t) = sequences[t], p.position.at(t) = positions[t];
  p.sequence.upload();
  p.position.upload();
  CHECK(p.run().empty());
  CHECK(p.wrong().empty());  // nothing is expected
}

// The list of candidates leads here, but for entries that shared memory does not hold.
TEST(the_op_runs_the_kernel) {
  if (no_device()) return;
  CompressProblem p({4, 96, 32, 2});
  CompressParams params = p.params(false, 0, p.tokens);
  CHECK(compress_workspace_bytes(params, cuda_context()) == 0);
  const Status status = compress(params, cuda_context());
  CHECK_MESSAGE(status.is_ok() && finish_device(), status.message());
  p.state.download();
  p.expect();
  CHECK(p.wrong().empty());
  CompressProblem wide({4, 2048, 32, 1, PageFormat::kFp8Keys});
  const Status refused = compress(wide.params(false, 0, wide.tokens), cuda_context());
  CHECK(std::string(refused.message()) == "compress: no implementation for this device in this build");
}

template <class N>
void check_entries(const CompressCase& c, int64_t tokens, bool rotated = false, int rows_per_block = 0) {
  const std::string wrong = try_entries<N>(c, tokens, rotated, rows_per_block);
  CHECK_MESSAGE(wrong.empty(), text(tokens) + "rows, ratio " + text(c.ratio) + "dim " + text(c.dim) + "rope " +
                                   text(c.rope_dim) + "sets " + text(c.sets) + ": " + wrong);
}

TEST(entries_of_a_whole_sequence) {
  if (no_device()) return;
  for (const int64_t sets : {1, 2}) {
    for (const bool exact : {false, true}) {
      for (const int64_t tokens : {1, 3, 4, 5, 8, 23}) {
        check_entries<bf16>({4, 64, 32, sets, {}, {}, exact}, tokens);
        check_entries<float>({4, 96, 32, sets, {}, {}, exact}, tokens);
      }
      check_entries<bf16>({4, 512, 64, sets, {}, {}, exact}, 21);
      check_entries<float>({1, 40, 8, sets, {}, {}, exact}, 5);
      check_entries<bf16>({7, 33, 2, sets, {}, {}, exact}, 20);
      check_entries<float>({4, 64, 32, sets, {}, {}, exact, 3, 1, 1}, 20);
      check_entries<bf16>({4, 128, 64, sets, {}, {}, exact}, 23, true);
      check_entries<bf16>({4, 1024, 0, sets, {}, {}, exact}, 9, true);
    }
    check_entries<bf16>({128, 512, 64, sets}, 260);
    for (const int rows : {1, 2, 5, 16}) check_entries<float>({4, 96, 32, sets}, 23, false, rows);
  }
}

}  // namespace
