// The sm80 index_topk kernels against float64, and rows against themselves in other company and otherwise cut. Runs on
// the host model, and on a GPU where it is built for one.
#include "index_cases.h"

namespace {

using namespace dsv4;
using namespace dsv4::testing;

constexpr IndexKeyFormat kFormats[] = {IndexKeyFormat::kFp4, IndexKeyFormat::kFp8, IndexKeyFormat::kBFloat16,
                                       IndexKeyFormat::kFloat32};
constexpr const char* kFormatNames[] = {"float32", "bfloat16", "FP8", "FP4"};

// A kernel, the keys it takes, and a number of dims.
struct Tested {
  IndexKeyFormat format;
  bool by_warpgroups;
  int64_t dim;
};
std::vector<Tested> kernels_of(int64_t dim) {
  std::vector<Tested> found;
  for (const IndexKeyFormat format : kFormats) found.push_back({format, false, dim});
  for (const IndexKeyFormat format : kFormats) {
    if (has_index_by_warpgroups({1, 1, 128, 1, format})) found.push_back({format, true, 128});
  }
  return found;
}

void check_case(const IndexCase& c, const IndexCutCase& cut = {}) {
  std::string wrong = try_index(c, cut);
  if (wrong.empty() && has_index_by_warpgroups(c)) {
    IndexCutCase group = cut;
    group.by_warpgroups = true;
    wrong = try_index(c, group);
    if (!wrong.empty()) wrong = "by warpgroups: " + wrong;
  }
  const auto text = [](int64_t value) { return std::to_string(value) + " "; };
  CHECK_MESSAGE(wrong.empty(), std::string(kFormatNames[static_cast<int>(c.format)]) + " tokens " + text(c.tokens) +
                                   "heads " + text(c.heads) + "dim " + text(c.dim) + "k " + text(c.k) + "page size " +
                                   text(c.page_size) + "blocks " + text(c.blocks) + ": " + wrong);
}

TEST(no_tokens) {
  if (no_device()) return;
  check_case({0, 4, 32, 3});
}

TEST(heads) {
  if (no_device()) return;
  for (const IndexKeyFormat format : kFormats) {
    for (const int64_t heads : {1, 2, 8, 31, 33, 64}) check_case({3, heads, 64, 20, format});
    for (const int64_t heads : {63, 64, 65, 130}) check_case({3, heads, 128, 20, format});
  }
  check_case({2, 130, 32, 20});
}

TEST(dims) {
  if (no_device()) return;
  for (const IndexKeyFormat format : kFormats) {
    for (const int64_t dim : {32, 96, 128, 160}) check_case({3, 9, dim, 20, format});
    for (const int64_t dim : {1, 5, 40, 100, 127}) {
      if (format != IndexKeyFormat::kFp4) check_case({2, 5, dim, 20, format});
    }
  }
}

TEST(float32_queries) {
  if (no_device()) return;
  for (const IndexKeyFormat format : kFormats) {
    for (const int64_t heads : {1, 5, 8}) check_case({3, heads, 64, 20, format, 8, 20, 2, true, true});
  }
}

TEST(page_sizes) {
  if (no_device()) return;
  for (const IndexKeyFormat format : {IndexKeyFormat::kFp4, IndexKeyFormat::kFp8, IndexKeyFormat::kBFloat16}) {
    for (const int64_t page_size : {1, 2, 7, 64, 130}) {
      check_case({4, 8, 32, 30, format, page_size, 300 / page_size + 1});
    }
  }
}

TEST(values_that_are_not_whole) {
  if (no_device()) return;
  for (const IndexKeyFormat format : kFormats) {
    for (const bool wide : {false, true}) check_case({5, 33, 128, 25, format, 8, 30, 2, false, wide});
  }
}

TEST(any_k) {
  if (no_device()) return;
  for (const int64_t k : {1, 2, 31, 32, 33, 100, 299, 300, 301, 5000}) {
    check_case({3, 4, 32, k, IndexKeyFormat::kFp4, 10, 30});
    check_case({3, 4, 32, k, IndexKeyFormat::kFp4, 10, 30}, {0, 0, 64});
  }
}

// Runs one head of weight 1 on two dims: score of entry j = 64 high(j) + low(j).
void check_scores(const std::function<int(int64_t)>& score, int64_t k) {
  IndexCase c = {2, 1, 32, k, IndexKeyFormat::kBFloat16, 64, 8, 1};
  IndexProblem p(c);
  for (int64_t b = 0; b < c.blocks; ++b) p.table.at(0, b) = static_cast<int32_t>(b);
  for (int64_t j = 0; j < p.entries(); ++j) {
    for (int64_t d = 0; d < 32; ++d) {
      const int value = d == 0 ? score(j) / 64 : d == 1 ? score(j) % 64 : 0;
      p.narrow_pages.at(j / 64, j % 64 * 32 + d) = from_float<bf16>(static_cast<float>(value));
    }
  }
  for (int64_t t = 0; t < c.tokens; ++t) {
    for (int64_t d = 0; d < 32; ++d) p.set_query(t, d, d == 0 ? 64.0f : d == 1 ? 1.0f : 0.0f);
    p.weights.at(t, 0) = 1;
    p.lengths.at(t) = static_cast<int32_t>(p.entries() - t);
  }
  p.upload();
  for (const int64_t range : {0, 100}) {
    const std::string fault = p.run({0, 0, range});
    CHECK_MESSAGE(fault.empty(), fault);
    const std::string wrong = wrong_rows(p);
    CHECK_MESSAGE(wrong.empty(), wrong);
  }
}

TEST(any_distribution) {
  if (no_device()) return;
  for (const int64_t k : {40, 300}) {
    check_scores([](int64_t) { return 7; }, k);
    check_scores([](int64_t) { return 0; }, k);
    check_scores([](int64_t j) { return static_cast<int>(j); }, k);
    check_scores([](int64_t j) { return static_cast<int>(512 - j); }, k);
    check_scores([](int64_t j) { return static_cast<int>(j * 37 % 5); }, k);
    check_scores([](int64_t j) { return j == 411 ? 4000 : 3; }, k);
  }
}

TEST(scores_below_zero_and_both_zeros) {
  if (no_device()) return;
  IndexProblem p({4, 2, 32, 30, IndexKeyFormat::kBFloat16});
  for (int64_t t = 0; t < 4; ++t) {
    p.weights.at(t, 0) = t < 2 ? -1.0f : -0.0f;  // -0 times a product: -0, against the 0 of a product below zero
    p.weights.at(t, 1) = t % 2 == 0 ? -2.0f : -0.0f;
    p.lengths.at(t) = 150;
  }
  p.upload();
  CHECK(p.run().empty());
  const std::string wrong = wrong_rows(p);
  CHECK_MESSAGE(wrong.empty(), wrong);
}

TEST(nan_and_infinity) {
  if (no_device()) return;
  for (const IndexKeyFormat format : kFormats) {
    for (const int64_t heads : {3, 32}) {
      IndexProblem p({4, heads, 64, 40, format});
      for (int64_t b = 0; b < p.c.blocks; ++b) {
        for (int64_t offset = b % 3; offset < p.c.page_size; offset += 3) {
          if (p.stored(0, b)) p.spoil(p.table.at(0, b), offset);
        }
      }
      for (int64_t h = 0; h < heads; ++h) p.weights.at(3, h) = NAN;  // a row that chooses nothing
      for (int64_t t = 0; t < 4; ++t) p.lengths.at(t) = 155, p.sequence.at(t) = static_cast<int32_t>(t / 2);
      p.weights.at(2, 0) = -INFINITY;  // relu's zeros times it: NaN; the rest: -inf, which may be chosen
      p.upload();
      CHECK(p.run().empty());
      const std::string wrong = wrong_rows(p);
      CHECK_MESSAGE(wrong.empty(), wrong);
      CHECK(p.chosen(3)[0] == -1);
      CHECK(p.chosen(2)[0] != -1);
    }
  }
}

// Every e2m1 and e4m3 code, and the scales at the ends of what float32 holds.
TEST(codes_and_scales) {
  if (no_device()) return;
  for (const IndexKeyFormat format : {IndexKeyFormat::kFp4, IndexKeyFormat::kFp8}) {
    for (const int scale : {0, 1, 2, 64, 127, 128, 129, 200, 250}) {
      IndexProblem p({2, 2, 32, 12, format, 8, 32, 1});
      const bool fp4 = format == IndexKeyFormat::kFp4;
      for (int64_t b = 0; b < p.c.blocks; ++b) {
        p.table.at(0, b) = static_cast<int32_t>(b);
        for (int64_t offset = 0; offset < 8; ++offset) {
          const int64_t j = 8 * b + offset;
          // One dim alone is not zero, so sums are exact: each entry has a code of its own there.
          for (int64_t i = 0; i < (fp4 ? 16 : 32); ++i) p.bytes.at(b, offset * (fp4 ? 16 : 32) + i) = 0;
          if (fp4) {
            p.bytes.at(b, offset * 16 + j % 16) = static_cast<uint8_t>(j);
            p.fp4_scale(b, offset, 0) = static_cast<uint8_t>(scale);
          } else {
            p.bytes.at(b, offset * 32 + j % 32) = static_cast<uint8_t>(j);
            const float factor = std::ldexp(1.0f, scale / 2 - 64);
            memcpy(p.fp8_scale(b, offset), &factor, 4);
          }
        }
      }
      for (int64_t t = 0; t < 2; ++t) {
        for (int64_t i = 0; i < 64; ++i) p.set_query(t, i, i < 32 ? 1.0f : -1.0f);
        p.weights.at(t, 0) = 1, p.weights.at(t, 1) = t == 0 ? 1.0f : -1.0f;
        p.lengths.at(t) = 256;
      }
      p.upload();
      CHECK(p.run().empty());
      const std::string wrong = wrong_rows(p);
      CHECK_MESSAGE(wrong.empty(), "scale " + std::to_string(scale) + ": " + wrong);
    }
  }
}

TEST(rows_that_see_nothing) {
  if (no_device()) return;
  IndexProblem p({7, 4, 32, 5});
  const int32_t lengths[] = {0, -1, INT32_MIN, 9, 9, INT32_MAX, 1}, sequences[] = {0, 0, 0, -1, 2, 1, 1};
  for (int64_t t = 0; t < 7; ++t) p.lengths.at(t) = lengths[t], p.sequence.at(t) = sequences[t];
  p.upload();
  CHECK(p.run().empty());
  const std::string wrong = wrong_rows(p);
  CHECK_MESSAGE(wrong.empty(), wrong);
  for (int64_t t = 0; t < 5; ++t) CHECK(p.chosen(t) == std::vector<int32_t>(5, -1));
  CHECK(p.chosen(5)[4] >= 0 && p.chosen(6)[0] == 0 && p.chosen(6)[1] == -1);
}

TEST(no_entries) {
  if (no_device()) return;
  check_case({3, 4, 32, 5, IndexKeyFormat::kFp4, 8, 0, 1});
  check_case({3, 4, 32, 5, IndexKeyFormat::kBFloat16, 8, 0, 1});
}

TEST(the_cut_changes_nothing) {
  if (no_device()) return;
  for (const IndexKeyFormat format : kFormats) {
    const IndexCase c = {13, 9, 96, 30, format, 8, 25, 3, false};
    IndexProblem whole(c), cut(c);
    CHECK(whole.run().empty());
    for (const IndexCutCase& wanted : {IndexCutCase{13, 4, 0}, {13, 16, 64}, {13, 3, 100}, {5, 2, 0}}) {
      CHECK(cut.run(wanted).empty());
      for (int64_t t = 0; t < c.tokens; ++t) {
        CHECK(cut.chosen(t) == whole.chosen(t));
        if (wanted.group_rows == 13) CHECK(cut.score_bits(t) == whole.score_bits(t));
      }
    }
  }
}

TEST(a_row_does_not_depend_on_its_company) {
  if (no_device()) return;
  for (const auto& [format, by_warpgroups, dim] : kernels_of(128)) {
    const IndexCase whole = {11, 20, dim, 30, format, 8, 40, 2, false};
    IndexProblem all(whole);
    CHECK(all.run({11, 4, 0, by_warpgroups}).empty());
    for (const int64_t tokens : {1, 4, 7}) {
      IndexCase few = whole;
      few.tokens = tokens;
      IndexProblem p(few);
      CHECK(p.run({0, 0, 0, by_warpgroups}).empty());
      for (int64_t t = 0; t < tokens; ++t) CHECK(p.chosen(t) == all.chosen(t) && p.score_bits(t) == all.score_bits(t));
    }
    // A row elsewhere, with other neighbours: of NaN, and of another sequence.
    IndexProblem moved(whole);
    for (int64_t i = 0; i < whole.heads * whole.dim; ++i) {
      moved.set_query(9, i, moved.query_at(1, i));
      moved.set_query(8, i, NAN);
    }
    for (int64_t h = 0; h < whole.heads; ++h) moved.weights.at(9, h) = moved.weights.at(1, h);
    moved.sequence.at(9) = moved.sequence.at(1), moved.lengths.at(9) = moved.lengths.at(1);
    moved.sequence.at(10) = 1 - moved.sequence.at(1);
    moved.upload();
    CHECK(moved.run({11, 16, 0, by_warpgroups}).empty());
    CHECK(moved.chosen(9) == all.chosen(1) && moved.score_bits(9) == all.score_bits(1));
    CHECK(moved.chosen(8) == std::vector<int32_t>(30, -1));
  }
}

TEST(memory_that_is_not_visible_has_no_influence) {
  if (no_device()) return;
  for (const auto& [format, by_warpgroups, dim] : kernels_of(64)) {
    const IndexCase c = {4, 9, dim, 30, format, 8, 20, 1, false};
    IndexProblem p(c), spoilt(c);
    for (IndexProblem* one : {&p, &spoilt}) {
      for (int64_t t = 0; t < 4; ++t) one->lengths.at(t) = static_cast<int32_t>(61 + t);
    }
    for (int64_t j = 64; j < p.entries(); ++j) {
      if (spoilt.stored(0, j / 8)) spoilt.spoil(spoilt.table.at(0, j / 8), j % 8);
    }
    p.upload();
    spoilt.upload();
    CHECK(p.run({0, 0, 0, by_warpgroups}).empty());
    CHECK(spoilt.run({0, 0, 0, by_warpgroups}).empty());
    for (int64_t t = 0; t < 4; ++t) CHECK(p.chosen(t) == spoilt.chosen(t) && p.score_bits(t) == spoilt.score_bits(t));
    CHECK(wrong_rows(spoilt).empty());
  }
}

// Queries and pages that start at no multiple of 16 bytes: the same scores element by element.
TEST(memory_may_start_anywhere) {
  if (no_device()) return;
  for (const auto& [format, by_warpgroups, dim] : kernels_of(64)) {
    const IndexCase c = {3, 9, dim, 30, format, 8, 20, 2, false};
    IndexProblem whole(c), moved(c);
    CHECK(whole.run({0, 0, 0, by_warpgroups}).empty());
    const int64_t row = c.heads * c.dim, bytes = whole.page_bytes, keys = c.page_size * c.dim;
    DeviceTensor<bf16> query({c.tokens, row + 3}), plain({whole.pages, keys + 5});
    DeviceTensor<uint8_t> packed({whole.pages, bytes + 7});
    for (int64_t t = 0; t < c.tokens; ++t) {
      for (int64_t i = 0; i < row; ++i) query.at(t, i + 1) = moved.narrow_query.at(t, i);
    }
    IndexTopkParams p = moved.params();
    for (int64_t page = 0; page < whole.pages; ++page) {
      for (int64_t i = 0; moved.quantised() && i < bytes; ++i) packed.at(page, i + 1) = moved.bytes.at(page, i);
      for (int64_t i = 0; format == IndexKeyFormat::kBFloat16 && i < keys; ++i) {
        plain.at(page, i + 1) = moved.narrow_pages.at(page, i);
      }
    }
    query.upload();
    plain.upload();
    packed.upload();
    p.query.data = query.device() + 1;
    p.query.stride[0] = row + 3;
    if (moved.quantised()) p.bytes.data = packed.device() + 1, p.bytes.stride[0] = bytes + 7;
    if (format == IndexKeyFormat::kBFloat16) p.plain.data = plain.device() + 1, p.plain.stride[0] = keys + 5;
    const std::string fault = moved.run(p, {0, 0, 0, by_warpgroups});
    CHECK_MESSAGE(fault.empty(), fault);
    for (int64_t t = 0; t < c.tokens; ++t) {
      CHECK(moved.chosen(t) == whole.chosen(t) && moved.score_bits(t) == whole.score_bits(t));
    }
  }
}

// Each operand and result alone: what is believed of one must not be concluded from another.
TEST(any_operand_anywhere_in_memory) {
  if (no_device()) return;
  for (const IndexKeyFormat format : kFormats) {
    each_odd_tensor([&] { check_case({3, 4, 64, 10, format, 8, 4}); });
  }
}

#if !defined(DSV4_ON_GPU)

TEST(offsets_beyond_32_bits) {
  for (const IndexKeyFormat format : kFormats) {
    for (const bool wide_query : {false, true}) {
      const IndexCase c = {3, 4, 64, 10, format, 8, 2, 3, true, wide_query};
      IndexProblem near(c);
      const RowsApart apart;
      IndexProblem far(c);
      CHECK(near.run().empty());
      const std::string fault = far.run();
      CHECK_MESSAGE(fault.empty(), fault);
      for (int64_t t = 0; t < c.tokens; ++t) CHECK(far.chosen(t) == near.chosen(t));
    }
  }
}

#endif

// Enough entries that the op itself selects in ranges, and blocks take several rows.
TEST(many_entries) {
  if (no_device()) return;
  IndexProblem p({3, 1, 32, 50, IndexKeyFormat::kFp4, 64, 560, 1, true});
  for (int64_t t = 0; t < 3; ++t)
    p.lengths.at(t) = t == 0 ? 100 : static_cast<int32_t>(p.entries()) - 5000 * static_cast<int32_t>(t);
  p.upload();
  CHECK(p.run().empty());
  CHECK(p.cut.range < p.entries());
  const std::string wrong = wrong_rows(p);
  CHECK_MESSAGE(wrong.empty(), wrong);
}

// What the op chooses for shapes that no test runs.
TEST(cuts) {
  if (no_device()) return;
  IndexProblem p({1, 1, 32, 512});
  IndexTopkParams params = p.params();
  params.page_size = 64;
  params.table.shape[1] = 4096;
  params.query.shape[0] = 4096;
  const sm80::IndexCut million = sm80::index_cut(params);
  CHECK(million.entries == 262144 && million.group_rows == 64 && million.rows_per_block == 16 && million.range == 8192);
  CHECK(sm80::index_topk_workspace_bytes(params, million) == (64 << 20) + 2 * 64 * 32 * 512 * 4);
  params.k = 4096;
  CHECK(sm80::index_cut(params).range == 262144);
  params.query.shape[0] = 1;
  CHECK(sm80::index_cut(params).rows_per_block == 2 && sm80::index_cut(params).group_rows == 1);
  params.table.shape[1] = int64_t{1} << 40;
  CHECK(sm80::index_cut(params).entries == INT32_MAX);
}

// The list of candidates leads here.
TEST(the_op_runs_the_kernel) {
  if (no_device()) return;
  const IndexCase c = {4, 6, 64, 20};
  IndexProblem direct(c), dispatched(c);
  CHECK(direct.run().empty());
  IndexTopkParams p = dispatched.params();
  const int64_t needed = index_topk_workspace_bytes(p, cuda_context());
  CHECK(needed == sm80::index_topk_workspace_bytes(p) && needed > 0);
  DeviceBytes workspace(static_cast<size_t>(needed));
  p.workspace = {workspace.device(), needed};
  const Status status = index_topk(p, cuda_context());
  CHECK_MESSAGE(status.is_ok(), status.message());
  CHECK(finish_device());
  dispatched.result.download();
  for (int64_t t = 0; t < c.tokens; ++t) CHECK(dispatched.chosen(t) == direct.chosen(t));
}

TEST(a_small_workspace_is_refused) {
  if (no_device()) return;
  IndexProblem p({3, 4, 32, 5});
  IndexTopkParams params = p.params();
  const int64_t needed = sm80::index_topk_workspace_bytes(params);
  DeviceBytes workspace(static_cast<size_t>(needed));
  params.workspace = {workspace.device(), needed - 1};
  CHECK(std::string(sm80::index_topk(params, cuda_context()).message()) ==
        "index_topk: workspace has 1919 bytes, needs 1920");
}

}  // namespace
