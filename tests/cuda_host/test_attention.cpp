// The sm80 attention kernels against float64, and each row against itself in other company. Runs on the host model, and
// on a GPU where it is built for one.
#include "attention_cases.h"

namespace {

using namespace dsv4;
using namespace dsv4::testing;

void check_case(const AttentionCase& c, const std::string& what) {
  for (const int heads_per_block : {16, 32}) {
    if (heads_per_block == 32 && c.f32_query) continue;  // 16, whatever is asked for
    const std::string fault = try_attention(c, heads_per_block);
    CHECK_MESSAGE(fault.empty(), what + ", " + std::to_string(heads_per_block) + " heads a block: " + fault);
  }
}

// The tensor cores' operands, float32, and both in one problem; every way to say which entries count.
struct Form {
  bool f32_query;
  RowForm window, entry;
  Entries entries;
};
constexpr Form kForms[] = {{false, RowForm::kBf16, RowForm::kBf16, Entries::kNone},
                           {false, RowForm::kFp8, RowForm::kBf16, Entries::kLengths},
                           {false, RowForm::kBf16, RowForm::kFp8, Entries::kIndices},
                           {false, RowForm::kFp8, RowForm::kFp8, Entries::kIndices},
                           {true, RowForm::kF32, RowForm::kF32, Entries::kNone},
                           {true, RowForm::kF32, RowForm::kF32, Entries::kLengths},
                           {true, RowForm::kF32, RowForm::kF32, Entries::kIndices},
                           {true, RowForm::kBf16, RowForm::kFp8, Entries::kIndices},
                           {true, RowForm::kFp8, RowForm::kBf16, Entries::kLengths},
                           {false, RowForm::kF32, RowForm::kBf16, Entries::kIndices},
                           {false, RowForm::kFp8, RowForm::kF32, Entries::kLengths}};

template <class Change>
void check_forms(const char* what, const Change& change) {
  int number = 0;
  for (const Form& form : kForms) {
    AttentionCase c;
    c.f32_query = form.f32_query;
    c.window_rows = form.window;
    c.entry_rows = form.entry;
    c.entries = form.entries;
    change(c);
    check_case(c, std::string(what) + ", form " + std::to_string(number++));
  }
}

// What tensor cores multiply, and float32: `check` takes a case and a value of the queries' type.
template <class Check>
void check_both(const Check& check) {
  check(AttentionCase(), bf16());
  check(f32_case(), float());
}

TEST(no_rows) {
  if (no_device()) return;
  AttentionCase c;
  c.runs = {{40, 0}};
  check_case(c, "no rows");
}

TEST(head_counts) {
  if (no_device()) return;
  for (const int64_t heads : {1, 8, 16, 17, 64}) {
    check_forms("heads", [&](AttentionCase& c) { c.heads = heads; });
  }
}

TEST(many_heads) {
  if (no_device()) return;
  check_both([](AttentionCase c, auto) {
    c.runs = {{40, 1}};
    c.heads = 128;
    check_case(c, "128 heads");
  });
}

TEST(head_dims) {
  if (no_device()) return;
  for (const int64_t head_dim : {32, 96, 128, 160, 256, 512}) {
    check_forms("head_dim", [&](AttentionCase& c) {
      c.head_dim = head_dim;
      c.heads = 3;
      c.runs = {{40, 2}};
    });
  }
}

// Widths that are no whole pieces, or no whole steps of the tensor cores.
TEST(odd_head_dims) {
  if (no_device()) return;
  for (const int64_t head_dim : {2, 8, 10, 24, 40, 72, 100}) {
    check_forms("head_dim", [&](AttentionCase& c) {
      c.head_dim = head_dim;
      c.rope_dim = head_dim > 8 ? 8 : 0;
      c.runs = {{40, 1}};
    });
  }
}

TEST(released_shape) {
  if (no_device()) return;
  AttentionCase c;
  c.runs = {{150, 1}, {3, 1}};
  c.heads = 64;
  c.head_dim = 512;
  c.rope_dim = 64;
  c.window_rows = RowForm::kFp8;
  c.window = 128;
  c.window_page_size = 256;
  c.page_size = 64;
  c.ratio = 4;
  check_case(c, "released shape");
  c.f32_query = true;
  check_case(c, "released shape, float32 queries");
  c.window_rows = c.entry_rows = RowForm::kF32;
  check_case(c, "released shape in float32");
}

// Widths of the bfloat16 part of an FP8 row: none; more than a thread reads ahead; rows of unaligned parts.
TEST(rope_widths) {
  if (no_device()) return;
  for (const auto& [head_dim, rope_dim] : {std::pair(64, 0), {512, 256}, {64, 62}, {64, 12}, {64, 8}, {80, 40}}) {
    for (const bool rotated : {true, false}) {
      AttentionCase c;
      c.head_dim = head_dim;
      c.rope_dim = rope_dim;
      c.rotated = rotated;
      c.window_rows = RowForm::kFp8;
      c.heads = 2;
      c.runs = {{37, 1}};
      for (const bool f32_query : {false, true}) {
        c.f32_query = f32_query;
        check_case(c, "rope of " + std::to_string(rope_dim) + " in " + std::to_string(head_dim));
      }
    }
  }
}

// Lengths around the ends of tiles and splits, and so many slots that several splits are combined.
TEST(key_counts) {
  if (no_device()) return;
  check_both([](const AttentionCase& base, auto) {
    for (const int position : {0, 1, 14, 15, 16, 30, 31, 32, 47, 48, 63, 64, 159, 160, 319}) {
      AttentionCase c = base;
      c.runs = {{position, 2}};
      c.entries = position % 2 == 0 ? Entries::kLengths : Entries::kNone;
      c.window = position % 2 == 0 ? 40 : 1000;
      c.heads = 2;
      check_case(c, "position " + std::to_string(position));
    }
    for (const int64_t k : {1, 15, 17, 31, 33, 287, 288, 289, 640}) {
      AttentionCase c = base;
      c.runs = {{700, 1}};
      c.k = k;
      c.heads = 17;
      check_case(c, "k " + std::to_string(k));
    }
  });
}

// More splits than are read at once, among them empty ones, the first too; widths of which a warp or a block of the
// second kernel has but a part.
TEST(split_counts) {
  if (no_device()) return;
  check_both([](AttentionCase c, auto) {
    for (const auto& [splits, head_dim] : {std::pair(2, 512), {4, 24}, {5, 168}, {9, 40}}) {
      c.runs = {{320 * splits - 8, 1}, {320 * splits - 1, 1}};
      c.heads = 2;
      c.head_dim = head_dim;
      c.entries = Entries::kNone;
      c.window = 4000;
      c.window_page_size = 320;
      c.gaps = true;
      check_case(c, std::to_string(splits) + " splits");
    }
  });
}

// A table for so many entries that the partial results of one row fill what the workspace may have: a launch a row.
TEST(more_rows_than_one_launch_takes) {
  if (no_device()) return;
  AttentionCase c;
  c.runs = {{650, 2}};
  c.entries = Entries::kLengths;
  c.heads = 2;
  c.head_dim = 512;
  AttentionCase large = c;
  large.page_size = 1024;
  large.blocks = 1400;
  AttentionProblem<> one(c), many(large);
  CHECK(many.params().workspace.bytes > (int64_t{128} << 20));
  CHECK(run_attention(one).empty());
  CHECK(run_attention(many).empty());
  const std::string fault = compare_attention(many);
  CHECK_MESSAGE(fault.empty(), fault);
  for (int64_t row = 0; row < 2; ++row) CHECK(bits_of(many, row) == bits_of(one, row));
}

TEST(windows_and_pages) {
  if (no_device()) return;
  for (const int64_t window : {1, 2, 16, 17, 128}) {
    for (const int64_t page_size : {1, 2, 53, 64}) {
      check_forms("window", [&](AttentionCase& c) {
        c.window = window;
        c.window_page_size = page_size;
        c.page_size = page_size;
        c.heads = 1;
        c.runs = {{53, 2}, {63, 1}};
      });
    }
  }
}

TEST(pages_that_are_not_stored) {
  if (no_device()) return;
  check_forms("gaps", [](AttentionCase& c) {
    c.gaps = true;
    c.runs = {{50, 2}, {90, 2}, {0, 1}};
  });
}

TEST(more_indices_than_entries) {
  if (no_device()) return;
  check_forms("k", [](AttentionCase& c) {
    c.k = 64;
    c.ratio = 4;
    c.runs = {{0, 3}, {30, 2}};
  });
}

TEST(strided_rows) {
  if (no_device()) return;
  for (const int64_t pad : {8, 2, 3}) {
    check_forms("pad", [&](AttentionCase& c) { c.pad = pad; });
  }
}

// Each operand and result alone: what is believed of one must not be concluded from another.
TEST(any_operand_anywhere_in_memory) {
  if (no_device()) return;
  each_odd_tensor([] {
    check_both([](AttentionCase c, auto) {
      c.runs = {{12, 2}};
      c.heads = c.window = c.k = 4;
      check_case(c, "any operand");
    });
  });
}

#if !defined(DSV4_ON_GPU)

TEST(offsets_beyond_32_bits) {
  const RowsApart apart;
  check_forms("rows far apart", [](AttentionCase& c) {
    c.runs = {{40, 1}, {20, 1}, {44, 1}};
    c.heads = 2;
  });
}

#endif

// No stored page, no visible entry, a sequence that no table has.
TEST(rows_without_keys) {
  if (no_device()) return;
  check_both([](AttentionCase c, auto x) {
    for (const Entries entries : {Entries::kNone, Entries::kIndices, Entries::kLengths}) {
      c.runs = {{40, 4}};
      c.entries = entries;
      c.k = 400;  // several splits, all empty
      AttentionProblem<decltype(x)> p(c);
      p.sequence.at(1) = -1;
      p.sequence.at(2) = 1;
      for (const int64_t row : {0, 3}) {
        p.position.at(row) = row == 0 ? -1 : 100000;
        p.lengths.at(row) = row == 0 ? INT_MIN : 41;
        for (int64_t i = 0; i < c.k; ++i) p.indices.at(row, i) = i % 2 == 0 ? -1 : 41;
      }
      if (entries == Entries::kLengths) p.lengths.at(3) = 0;
      p.upload();
      CHECK(run_attention(p).empty());
      for (int64_t row = 0; row < 4; ++row) {
        for (int64_t i = 0; i < p.out.inner(); ++i) CHECK(to_float(p.out.at(row, i)) == 0.0f);
        for (int64_t h = 0; h < c.heads; ++h) CHECK(p.lse.at(row, h) == INFINITY);
      }
    }
  });
}

TEST(infinite_sinks) {
  if (no_device()) return;
  check_both([](AttentionCase c, auto x) {
    for (const int64_t k : {24, 400}) {
      c.runs = {{450, 2}};
      c.k = k;
      AttentionProblem<decltype(x)> p(c);
      for (int64_t h = 0; h < c.heads; ++h) p.sink.at(h) = h % 2 == 0 ? INFINITY : -INFINITY;
      p.upload();
      CHECK(run_attention(p).empty());
      const std::string fault = compare_attention(p);
      CHECK_MESSAGE(fault.empty(), fault);
      for (int64_t i = 0; i < c.head_dim; ++i) CHECK(to_float(p.out.at(0, i)) == 0.0f);
    }
  });
}

// A code under a scale as the kernels' bfloat16 has it: what that holds only as a denormal number is cut off.
float decoded(uint8_t code, uint8_t scale) {
  return float_from_bits(bits_from_float(e4m3_value(code) * e8m0_value(scale)) & 0xFFFF0000u);
}

// One key under a sink of -inf comes out as it is: every finite code under every scale that leaves it finite, from rows
// that are read 16 bytes at a time and from rows that cannot be. spoilt: a dim whose code is NaN, if any: all are then.
template <class X>
void check_decoding(int first_scale, int step, int64_t spoilt) {
  constexpr int64_t kDim = 256, kPageSize = 2;
  AttentionCase c;
  c.runs = {{1, 1}};
  c.head_dim = kDim;
  c.rope_dim = 0;
  c.heads = 1;
  c.window = 1;
  c.entries = Entries::kNone;
  c.f32_query = sizeof(X) == 4;
  for (const int64_t shift : {0, 1}) {
    for (int scale = first_scale; scale <= 254; scale += step) {
      AttentionProblem<X> p(c);
      p.sink.at(0) = -INFINITY;
      for (int64_t d = 0; d < kDim; ++d) p.query.at(0, d) = from_float<X>(0);
      p.upload();
      DeviceTensor<uint8_t> page({1, shift + fp8_page_bytes(kPageSize, kDim, 0)});
      DeviceTensor<int32_t> table({1, 1});
      table.at(0) = 0;
      table.upload();
      const auto scale_of = [&](int64_t d) {
        return static_cast<uint8_t>(std::min<int64_t>(scale + d / kRowBlock, 254));
      };
      const auto code_of = [&](int64_t d) {
        const auto code = static_cast<uint8_t>(d);
        return d == spoilt ? uint8_t{0x7F} : std::isfinite(decoded(code, scale_of(d))) ? code : uint8_t{0};
      };
      for (int64_t d = 0; d < kDim; ++d) {
        page.at(0, shift + fp8_row_at(1, kDim, 0) + d) = code_of(d);
        page.at(0, shift + fp8_scales_at(1, kPageSize, kDim, 0) + d / kRowBlock) = scale_of(d);
      }
      page.upload();
      SparseAttentionParams params = p.params();
      params.window_pool = {};
      params.window_pool.page_size = kPageSize;
      params.window_pool.bytes = page.any<2>();
      params.window_pool.bytes.dtype = DType::kUInt8;
      params.window_pool.bytes.data = page.device() + shift;
      params.window_pool.table = table.any<2>();
      const Status status = sm80::sparse_attention(params, cuda_context());
      CHECK_MESSAGE(status.is_ok(), status.message());
      CHECK(finish_device());
      p.out.download();
      for (int64_t d = 0; d < kDim; ++d) {
        const float out = to_float(p.out.at(0, d));
        CHECK(spoilt < 0 ? out == decoded(code_of(d), scale_of(d)) : std::isnan(out));
      }
    }
  }
}

TEST(fp8_rows_are_decoded_exactly) {
  if (no_device()) return;
  check_decoding<bf16>(0, 4, -1);
  check_decoding<float>(0, 4, -1);
  for (int64_t spoilt = 0; spoilt < 256; spoilt += 17) {  // each place in a piece
    check_decoding<bf16>(127, 128, spoilt);
    check_decoding<float>(127, 128, spoilt);
  }
}

// A code or a scale that is NaN makes its row's results NaN, as in the other implementations.
TEST(nan_in_a_key_shows) {
  if (no_device()) return;
  check_both([](AttentionCase c, auto x) {
    for (const RowForm form : {RowForm::kBf16, RowForm::kFp8, RowForm::kF32}) {
      c.runs = {{40, 2}};
      c.window_rows = form;
      c.entries = Entries::kNone;
      c.window = 2;
      AttentionProblem<decltype(x)> p(c);
      p.raw.spoil(0, 41);
      CHECK(run_attention(p).empty());
      for (int64_t h = 0; h < c.heads; ++h) {
        CHECK(!std::isnan(p.lse.at(0, h)) && std::isnan(p.lse.at(1, h)));
        for (int64_t d = 0; d < c.head_dim; ++d) {
          CHECK(!std::isnan(to_float(p.out.at(0, h * c.head_dim + d))));
          CHECK(std::isnan(to_float(p.out.at(1, h * c.head_dim + d))));
        }
      }
    }
  });
}

// Alone, among others, with 16 or 32 heads a block, wherever the pages lie.
TEST(a_row_does_not_depend_on_its_company) {
  if (no_device()) return;
  check_both([](AttentionCase all, auto x) {
    using Problem = AttentionProblem<decltype(x)>;
    for (const Entries entries : {Entries::kIndices, Entries::kLengths}) {
      all.runs = {{33, 3}, {360, 2}, {5, 1}};
      all.heads = 40;
      all.head_dim = 32;
      all.entries = entries;
      all.k = 330;
      Problem whole(all);
      CHECK(run_attention(whole, 16).empty());
      for (const int heads_per_block : {16, 32}) {
        AttentionCase few = all;
        few.runs = {{34, 1}, {361, 1}};
        few.placement = 9;
        AttentionCase longer = all;  // more stored behind what the rows see
        longer.runs = {{33, 9}, {360, 4}, {5, 3}};
        Problem some(few), more(longer);
        CHECK(run_attention(some, heads_per_block).empty());
        CHECK(run_attention(more, heads_per_block).empty());
        CHECK(bits_of(some, 0) == bits_of(whole, 1));
        CHECK(bits_of(some, 1) == bits_of(whole, 4));
        CHECK(bits_of(more, 0) == bits_of(whole, 0) && bits_of(more, 1) == bits_of(whole, 1));
        CHECK(bits_of(more, 9) == bits_of(whole, 3) && bits_of(more, 13) == bits_of(whole, 5));
      }
    }
  });
}

// The list of a row's indices, filled up with -1 to a length that takes several splits: the same bits as in one.
TEST(padding_of_the_indices_changes_nothing) {
  if (no_device()) return;
  check_both([](AttentionCase c, auto x) {
    c.runs = {{90, 3}};
    c.heads = 20;
    c.k = 40;
    AttentionCase padded = c;
    padded.k = 700;
    AttentionProblem<decltype(x)> few(c), many(padded);
    for (int64_t row = 0; row < few.rows; ++row) {
      for (int64_t i = 0; i < padded.k; ++i) many.indices.at(row, i) = i < c.k ? few.indices.at(row, i) : -1;
    }
    many.upload();
    CHECK(run_attention(few).empty());
    CHECK(run_attention(many).empty());
    for (int64_t row = 0; row < few.rows; ++row) CHECK(bits_of(few, row) == bits_of(many, row));
  });
}

// The list of candidates leads here, and takes what the kernel takes.
TEST(the_op_runs_the_kernel) {
  if (no_device()) return;
  check_both([](AttentionCase c, auto x) {
    c.runs = {{400, 2}};
    c.k = 330;
    AttentionProblem<decltype(x)> direct(c), dispatched(c);
    CHECK(run_attention(direct).empty());
    const SparseAttentionParams params = dispatched.params();
    CHECK(params.workspace.bytes > 0);
    CHECK(sparse_attention_workspace_bytes(params, cuda_context()) == params.workspace.bytes);
    const Status status = sparse_attention(params, cuda_context());
    CHECK_MESSAGE(status.is_ok(), status.message());
    CHECK(finish_device());
    dispatched.out.download();
    dispatched.lse.download();
    for (int64_t row = 0; row < direct.rows; ++row) CHECK(bits_of(dispatched, row) == bits_of(direct, row));
    SparseAttentionParams small = params;
    small.workspace.bytes -= 1;
    CHECK(std::string(sparse_attention(small, cuda_context()).message()).find("workspace must have") !=
          std::string::npos);
  });
}

TEST(what_is_left_to_the_reference) {
  if (no_device()) return;
  const AttentionCase c;
  AttentionProblem<> p(c);
  const auto accepts = [&](auto change) {
    SparseAttentionParams params = p.params();
    change(params);
    return sm80::accepts_sparse_attention(params);
  };
  CHECK(accepts([](SparseAttentionParams&) {}));
  CHECK(!accepts([](SparseAttentionParams& q) { q.query.shape[2] = 514; }));
  CHECK(!accepts([](SparseAttentionParams& q) { q.query.shape[2] = 63; }));
}

}  // namespace
