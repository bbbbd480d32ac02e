// The sm80 kernels of sparse_attention_backward against float64, and against themselves in other company. Runs on the
// host model, and on a GPU where it is built for one.
#include "attention_backward_cases.h"

namespace {

using namespace dsv4;
using namespace dsv4::testing;

void check_case(const AttentionCase& c, const std::string& what) {
  for (const int heads_per_block : {16, 32}) {
    if (heads_per_block == 32 && (c.f32_query || c.heads <= 16)) continue;
    const std::string fault = try_attention_backward(c, heads_per_block);
    CHECK_MESSAGE(fault.empty(), what + ", " + std::to_string(heads_per_block) + " heads a block: " + fault);
  }
}

// Tensor cores, float32, and what is converted to it; with gradients of both pools, of one, of none.
struct Form {
  bool f32_query;
  RowForm window, entry;
  Entries entries;
};
constexpr Form kForms[] = {{false, RowForm::kBf16, RowForm::kBf16, Entries::kNone},
                           {false, RowForm::kBf16, RowForm::kBf16, Entries::kIndices},
                           {false, RowForm::kBf16, RowForm::kBf16, Entries::kLengths},
                           {false, RowForm::kFp8, RowForm::kBf16, Entries::kIndices},
                           {false, RowForm::kBf16, RowForm::kFp8, Entries::kLengths},
                           {false, RowForm::kFp8, RowForm::kFp8, Entries::kIndices},
                           {true, RowForm::kF32, RowForm::kF32, Entries::kNone},
                           {true, RowForm::kF32, RowForm::kF32, Entries::kIndices},
                           {true, RowForm::kF32, RowForm::kF32, Entries::kLengths},
                           {true, RowForm::kBf16, RowForm::kFp8, Entries::kIndices},
                           {false, RowForm::kF32, RowForm::kBf16, Entries::kIndices}};

AttentionCase formed(const Form& form) {
  AttentionCase c;
  c.f32_query = form.f32_query;
  c.window_rows = form.window;
  c.entry_rows = form.entry;
  c.entries = form.entries;
  return c;
}

template <class Change>
void check_forms(const char* what, const Change& change) {
  int number = 0;
  for (const Form& form : kForms) {
    AttentionCase c = formed(form);
    change(c);
    check_case(c, std::string(what) + ", form " + std::to_string(number++));
  }
}

// On tensor cores, and in float32: `check` takes a case and a value of the queries' type.
template <class Check>
void check_both(const Check& check) {
  check(formed(kForms[1]), bf16());
  check(formed(kForms[7]), float());
}

TEST(no_rows) {
  if (no_device()) return;
  check_both([](AttentionCase c, auto) {
    c.runs = {{40, 0}};
    check_case(c, "no rows");
  });
}

TEST(head_counts) {
  if (no_device()) return;
  for (const int64_t heads : {1, 15, 16, 17, 33, 65}) {
    check_forms("heads", [&](AttentionCase& c) {
      c.heads = heads;
      c.head_dim = 32;
    });
  }
}

TEST(many_heads) {
  if (no_device()) return;
  check_both([](AttentionCase c, auto) {
    c.runs = {{40, 1}};
    c.heads = 130;
    c.head_dim = 64;
    check_case(c, "130 heads");
  });
}

TEST(head_dims) {
  if (no_device()) return;
  for (const int64_t head_dim : {2, 10, 24, 32, 72, 96, 100, 128, 160, 256, 512}) {
    check_forms("head_dim", [&](AttentionCase& c) {
      c.head_dim = head_dim;
      c.rope_dim = head_dim > 8 ? 8 : 0;
      c.heads = 3;
      c.runs = {{40, 2}};
    });
  }
}

TEST(released_shape) {
  if (no_device()) return;
  check_both([](AttentionCase c, auto) {
    c.runs = {{150, 2}, {3, 1}};
    c.heads = 64;
    c.head_dim = 512;
    c.rope_dim = 64;
    c.window = 128;
    c.window_page_size = 256;
    c.page_size = 64;
    c.ratio = 4;
    check_case(c, "released shape");
  });
}

// Lengths around the ends of tiles and of what a stage takes.
TEST(key_counts) {
  if (no_device()) return;
  check_both([](const AttentionCase& base, auto) {
    for (const int position : {0, 1, 14, 15, 16, 30, 31, 32, 63, 64, 159}) {
      AttentionCase c = base;
      c.runs = {{position, 2}};
      c.entries = position % 2 == 0 ? Entries::kLengths : Entries::kNone;
      c.window = position % 2 == 0 ? 40 : 1000;
      c.heads = 2;
      check_case(c, "position " + std::to_string(position));
    }
    for (const int64_t k : {1, 15, 17, 31, 33, 640}) {
      AttentionCase c = base;
      c.runs = {{700, 2}};
      c.k = k;
      c.heads = 3;
      check_case(c, "k " + std::to_string(k));
    }
  });
}

// More keys of a class than a stage takes: as many classes as 512 dims have, and rows that read thousands of entries.
TEST(long_rows) {
  if (no_device()) return;
  check_both([](AttentionCase c, auto) {
    c.runs = {{4300, 2}};
    c.entries = Entries::kLengths;
    c.heads = 1;
    c.head_dim = 512;
    c.rope_dim = 0;
    c.window = 3;
    c.page_size = 64;
    check_case(c, "4,300 entries");
  });
}

TEST(windows_and_pages) {
  if (no_device()) return;
  for (const int64_t window : {1, 2, 17, 128}) {
    for (const int64_t page_size : {1, 2, 53}) {
      check_forms("window", [&](AttentionCase& c) {
        c.window = window;
        c.window_page_size = page_size;
        c.page_size = page_size;
        c.heads = 1;
        c.head_dim = 32;
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

TEST(strided_rows) {
  if (no_device()) return;
  for (const int64_t pad : {8, 2, 3}) {
    check_forms("pad", [&](AttentionCase& c) { c.pad = pad; });
  }
}

// Each operand and result alone: what is believed of one must not be concluded from another.
// Pools with gradients lie densely.
TEST(any_operand_anywhere_in_memory) {
  if (no_device()) return;
  const auto check_small = [](AttentionCase c, auto) {
    c.runs = {{12, 2}};
    c.heads = c.window = c.k = 4;
    check_case(c, "any operand");
  };
  each_odd_tensor(OddTensor::kStart, [&] { check_both(check_small); });
  each_odd_tensor(OddTensor::kRows, [&] {
    for (const bool f32_query : {false, true}) {
      check_small(formed({f32_query, RowForm::kFp8, RowForm::kFp8, Entries::kIndices}), bf16());
    }
  });
}

#if !defined(DSV4_ON_GPU)

// Pools with gradients lie densely: of FP8 rows alone.
TEST(offsets_beyond_32_bits) {
  const RowsApart apart;
  for (const bool f32_query : {false, true}) {
    AttentionCase c = formed({f32_query, RowForm::kFp8, RowForm::kFp8, Entries::kIndices});
    c.runs = {{40, 1}, {20, 1}, {44, 1}};
    c.heads = 2;
    check_case(c, "rows far apart");
  }
}

#endif

TEST(without_rotation) {
  if (no_device()) return;
  check_forms("not rotated", [](AttentionCase& c) { c.rotated = false; });
}

// Rows that share keys: their parts are added in order, to the same bits in a batch as alone.
TEST(a_sequence_does_not_depend_on_its_company) {
  if (no_device()) return;
  check_both([](AttentionCase all, auto x) {
    using Problem = AttentionBackwardProblem<decltype(x)>;
    all.runs = {{33, 5}, {60, 3}, {5, 2}};
    all.heads = 20;
    all.head_dim = 72;
    Problem whole(all);
    CHECK(run_attention_backward(whole).empty());
    AttentionCase longer = all;  // other rows of sequence 0, which have no part in the keys of sequence 1
    longer.runs[0] = {33, 9};
    Problem more(longer);
    CHECK(run_attention_backward(more, 32).empty());
    const auto one = gradient_bits(whole), other = gradient_bits(more);
    for (size_t row = 0; row < 5; ++row) CHECK(one[row] == other[row]);
    for (size_t row = 5; row < 10; ++row) CHECK(one[row] == other[row + 4]);
    int compared = 0;
    for (int64_t e = 0; e < 63; ++e) {
      for (int64_t d = 0; d < all.head_dim; ++d) {
        const auto at = [&](Problem& p) { return p.forward.raw.row_of(1, e) * all.head_dim + d; };
        CHECK(whole.grad_window.at(at(whole)) == more.grad_window.at(at(more)));
        compared += whole.grad_window.at(at(whole)) != 0 ? 1 : 0;
      }
    }
    CHECK(compared > 30 * all.head_dim);
  });
}

TEST(padding_of_the_indices_changes_nothing) {
  if (no_device()) return;
  check_both([](AttentionCase c, auto x) {
    using Problem = AttentionBackwardProblem<decltype(x)>;
    c.runs = {{90, 3}};
    c.heads = 20;
    c.k = 40;
    AttentionCase padded = c;
    padded.k = 700;
    Problem few(c), many(padded);
    for (int64_t row = 0; row < few.forward.rows; ++row) {
      for (int64_t i = 0; i < padded.k; ++i) {
        many.forward.indices.at(row, i) = i < c.k ? few.forward.indices.at(row, i) : -1;
      }
    }
    many.update();
    CHECK(run_attention_backward(few).empty());
    CHECK(run_attention_backward(many).empty());
    CHECK(gradient_bits(few) == gradient_bits(many));
  });
}

// A key listed several times counts as often.
TEST(repeated_indices) {
  if (no_device()) return;
  check_both([](AttentionCase c, auto x) {
    c.runs = {{60, 3}};
    c.k = 80;
    AttentionBackwardProblem<decltype(x)> p(c);
    for (int64_t row = 0; row < p.forward.rows; ++row) {
      for (int64_t i = 0; i < c.k; ++i) p.forward.indices.at(row, i) = static_cast<int32_t>(i * i % 37);
    }
    p.update();
    CHECK(run_attention_backward(p).empty());
    const std::string fault = compare_attention_backward(p);
    CHECK_MESSAGE(fault.empty(), fault);
  });
}

// No stored page, no visible entry, a sequence that no table has: nothing goes back, whatever the gradients are.
TEST(rows_without_keys) {
  if (no_device()) return;
  check_both([](AttentionCase c, auto x) {
    c.runs = {{40, 4}};
    c.k = 40;
    AttentionBackwardProblem<decltype(x)> p(c);
    p.forward.sequence.at(1) = -1;
    p.forward.sequence.at(2) = 1;
    for (const int64_t row : {0, 3}) {
      p.forward.position.at(row) = row == 0 ? -1 : 100000;
      p.forward.lengths.at(row) = row == 0 ? INT_MIN : 41;
      for (int64_t i = 0; i < c.k; ++i) p.forward.indices.at(row, i) = i % 2 == 0 ? -1 : 41;
    }
    for (int64_t row = 0; row < 4; ++row) {
      for (int64_t h = 0; h < c.heads; ++h) p.forward.lse.at(row, h) = INFINITY, p.grad_lse.at(row, h) = NAN;
      for (int64_t i = 0; i < p.grad_out.inner(); ++i) p.grad_out.at(row, i) = from_float<decltype(x)>(NAN);
    }
    p.forward.upload();
    p.forward.lse.upload();
    p.grad_out.upload();
    p.grad_lse.upload();
    CHECK(run_attention_backward(p).empty());
    for (const std::vector<uint32_t>& part : gradient_bits(p)) {
      for (const uint32_t bits : part) CHECK((bits & 0x7FFFFFFFu) == 0);
    }
  });
}

TEST(infinite_sinks) {
  if (no_device()) return;
  check_both([](AttentionCase c, auto x) {
    AttentionBackwardProblem<decltype(x)> p(c);
    for (int64_t h = 0; h < c.heads; ++h) p.forward.sink.at(h) = h % 2 == 0 ? INFINITY : -INFINITY;
    p.update();
    CHECK(run_attention_backward(p).empty());
    const std::string fault = compare_attention_backward(p);
    CHECK_MESSAGE(fault.empty(), fault);
  });
}

// More rows than the workspace holds at once: the sums go on where they were.
TEST(more_rows_than_one_launch_takes) {
  if (no_device()) return;
  AttentionCase c = formed(kForms[2]);
  c.runs = {{300, 3}};
  c.heads = 2;
  AttentionCase large = c;
  large.page_size = 4096;
  large.blocks = 1500;
  AttentionBackwardProblem<> one(c), many(large);
  CHECK(many.params().workspace.bytes > (int64_t{128} << 20));
  CHECK(run_attention_backward(one).empty());
  CHECK(run_attention_backward(many).empty());
  const std::string fault = compare_attention_backward(many);
  CHECK_MESSAGE(fault.empty(), fault);
  const auto few = gradient_bits(one), all = gradient_bits(many);
  CHECK(few[0] == all[0] && few[1] == all[1] && few[2] == all[2] && few[3] == all[3]);
}

// The list of candidates leads here, and asks for the workspace that the kernels take.
TEST(the_op_runs_the_kernel) {
  if (no_device()) return;
  check_both([](AttentionCase c, auto x) {
    AttentionBackwardProblem<decltype(x)> direct(c), dispatched(c);
    CHECK(run_attention_backward(direct).empty());
    const SparseAttentionBackwardParams params = dispatched.params();
    CHECK(params.workspace.bytes > 0);
    CHECK(sparse_attention_backward_workspace_bytes(params, cuda_context()) == params.workspace.bytes);
    const Status status = sparse_attention_backward(params, cuda_context());
    CHECK_MESSAGE(status.is_ok(), status.message());
    CHECK(finish_device());
    dispatched.grad_query.download();
    dispatched.grad_window.download();
    dispatched.grad_compressed.download();
    dispatched.grad_sink.download();
    CHECK(gradient_bits(dispatched) == gradient_bits(direct));
    SparseAttentionBackwardParams small = params;
    small.workspace.bytes -= 1;
    CHECK(std::string(sparse_attention_backward(small, cuda_context()).message()).find("workspace must have") !=
          std::string::npos);
  });
}

TEST(what_is_left_to_the_reference) {
  if (no_device()) return;
  AttentionBackwardProblem<> p(formed(kForms[1]));
  const auto accepts = [&](auto change) {
    SparseAttentionBackwardParams params = p.params();
    change(params.forward);
    return sm80::accepts_sparse_attention_backward(params);
  };
  CHECK(accepts([](SparseAttentionParams&) {}));
  CHECK(!accepts([](SparseAttentionParams& q) { q.query.shape[2] = 514; }));
  CHECK(!accepts([](SparseAttentionParams& q) { q.query.shape[2] = 63; }));
  CHECK(!accepts([](SparseAttentionParams& q) { q.window_pool.plain.shape[0] = int64_t{1} << 32; }));
}

}  // namespace
