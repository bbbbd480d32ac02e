// The sm80 kernels of compress_entries_backward against float64, and against themselves in other company and elsewhere
// in memory. Runs on the host model, and on a GPU where it is built for one.
#include "compress_backward_cases.h"

namespace {

using namespace dsv4;
using namespace dsv4::testing;

std::string text(int64_t value) { return std::to_string(value) + " "; }

template <class N>
void check_case(const EntriesGradientCase& c) {
  const std::string wrong = try_entries_gradient<N>(c);
  CHECK_MESSAGE(wrong.empty(), "tokens " + text(c.tokens) + "ratio " + text(c.ratio) + "dim " + text(c.dim) + "rope " +
                                   text(c.rope_dim) + "sets " + text(c.sets) + "rotate " + text(c.rotate) + "shift " +
                                   text(c.shift) + "gates " + std::to_string(c.gates) +
                                   (sizeof(N) == 2 ? " bfloat16: " : " float32: ") + wrong);
}
void check_both(const EntriesGradientCase& c) {
  check_case<bf16>(c);
  check_case<float>(c);
}

// No entries, remainders, one entry, several.
TEST(token_counts) {
  if (no_device()) return;
  for (const int64_t sets : {1, 2}) {
    for (const int64_t tokens : {0, 1, 3, 4, 5, 8, 23, 70}) check_both({tokens, 4, 64, 32, sets});
    check_both({0, 128, 64, 32, sets});
    check_both({127, 128, 64, 32, sets});
    check_both({260, 128, 64, 32, sets});
  }
}

TEST(ratios) {
  if (no_device()) return;
  for (const int64_t ratio : {1, 2, 3, 5, 7, 8, 9, 16, 33}) {
    for (const int64_t sets : {1, 2}) check_both({3 * ratio + 2, ratio, 96, 32, sets});
  }
}

TEST(dims) {
  if (no_device()) return;
  for (const int64_t dim : {2, 3, 4, 5, 8, 33, 40, 63, 100, 257, 512, 520, 1000}) {
    for (const int64_t rope_dim : {int64_t{0}, int64_t{2}, dim / 4 * 2}) {
      check_both({21, 4, dim, rope_dim, 2});
      check_both({13, 3, dim, rope_dim, 1});
    }
  }
  check_both({9, 4, 8192, 64, 1});
}

TEST(keys) {
  if (no_device()) return;
  for (const int64_t dim : {2, 4, 8, 32, 128, 256, 512, 1024}) {
    for (const int64_t sets : {1, 2}) check_both({23, 4, dim, dim / 2, sets, true});
  }
}

// The workspace begins with the pooled rows. As rows of one position an entry, whose mean is that position's value,
// they become what the forward pass makes of the whole sequence.
template <class N>
std::string try_pooled_rows(const EntriesGradientCase& c) {
  EntriesGradientProblem<N> p(c);
  CompressEntriesBackwardParams params = p.params(false);
  CompressEntriesParams& forward = params.forward;
  forward.workspace = p.memory.of(compress_entries_backward_workspace_bytes(params, cuda_context()));
  if (!compress_entries_backward(params, cuda_context()).is_ok() || !finish_device()) return "the kernel failed";
  DeviceTensor<float> none({p.entries, c.dim});
  DeviceTensor<N> entries({p.entries, c.dim}), again({p.entries, c.dim});
  for (int64_t j = 0; j < p.entries; ++j) {
    for (int64_t d = 0; d < c.dim; ++d) none.at(j, d) = 0;
  }
  none.upload();
  const auto run = [&](DeviceTensor<N>& result) {
    forward.result = view_of<2>(result, false);
    const bool done = compress_entries(forward, cuda_context()).is_ok() && finish_device();
    result.download();
    return done;
  };
  if (!run(entries)) return "the kernel failed";
  forward.kv = {static_cast<const float*>(forward.workspace.data), {p.entries, c.dim}, {c.dim, 1}};
  forward.gate = p.read(none, false);
  forward.ape = {none.device(), {1, c.dim}, {c.dim, 1}};
  forward.ratio = 1;
  if (!run(again)) return "the kernel failed";
  for (int64_t j = 0; j < p.entries; ++j) {
    if (memcmp(&entries.at(j), &again.at(j), static_cast<size_t>(c.dim) * sizeof(N)) != 0) {
      return "entry " + std::to_string(j);
    }
  }
  return "";
}

TEST(pooled_rows_have_the_bits_of_the_forward_pass) {
  if (no_device()) return;
  for (const bool rotate : {false, true}) {
    for (const int64_t dim : {256, 512, 1024}) {
      for (const EntriesGradientCase& c :
           {EntriesGradientCase{12, 4, dim, 64, 2, rotate}, {256, 128, dim, 64, 1, rotate}}) {
        const std::string wrong = try_pooled_rows<bf16>(c) + try_pooled_rows<float>(c);
        CHECK_MESSAGE(wrong.empty(), "ratio " + text(c.ratio) + "dim " + text(dim) + "rotate " + text(rotate) + wrong);
      }
    }
  }
}

// Many pieces of few entries each.
TEST(many_entries) {
  if (no_device()) return;
  check_case<float>({2003, 1, 8, 2, 1});
  check_case<bf16>({4001, 2, 16, 8, 2});
}

TEST(gates_of_any_size_anywhere_in_memory) {
  if (no_device()) return;
  for (const float gates : {0.0f, 1e-3f, 60.0f, 1000.0f}) check_both({23, 4, 64, 32, 2, false, gates});
  for (const int64_t shift : {1, 3}) {
    check_both({23, 4, 64, 32, 2, false, 4, shift});
    check_both({23, 4, 64, 32, 1, true, 4, shift});
  }
}

// Each operand and result alone: what is believed of one must not be concluded from another.
TEST(any_operand_anywhere_in_memory) {
  if (no_device()) return;
  each_odd_tensor([] { check_both({15, 4, 64, 32, 2}); });
}

#if !defined(DSV4_ON_GPU)

TEST(offsets_beyond_32_bits) {
  const RowsApart apart;
  check_both({15, 4, 64, 32, 2});
  check_both({15, 4, 64, 32, 1, true});
}

#endif

// A gate of -inf takes part with weight 0; a channel with no other has no weights.
TEST(gates_that_are_not_finite) {
  if (no_device()) return;
  EntriesGradientProblem<float> p({16, 4, 64, 32, 1});
  for (int64_t d = 0; d < 64; ++d) {
    p.gate.at(5, d) = -INFINITY;
    for (int64_t row = 8; d == 7 && row < 12; ++row) p.gate.at(row, d) = -INFINITY;
  }
  p.upload();
  CHECK(p.run().empty());
  for (int64_t d = 0; d < 64; ++d) {
    CHECK(p.grad_kv.at(5, d) == 0 && p.grad_gate.at(5, d) == 0 && std::isfinite(p.grad_kv.at(4, d)));
    for (int64_t row = 8; row < 12; ++row) CHECK(std::isnan(p.grad_kv.at(row, d)));
  }
}

template <class N>
bool same(DeviceTensor<N>& a, DeviceTensor<N>& b, int64_t first, int64_t end, int64_t from, int64_t to) {
  for (int64_t row = first; row < end; ++row) {
    if (memcmp(&a.at(row, from), &b.at(row, from), static_cast<size_t>(to - from) * sizeof(N)) != 0) return false;
  }
  return true;
}

// More rows behind change nothing before; a remainder is not read; elsewhere in memory the bits are the same.
TEST(rows_depend_on_their_entries_alone) {
  if (no_device()) return;
  for (const bool rotate : {false, true}) {
    const EntriesGradientCase all = {44, 4, 64, 32, 2, rotate};
    EntriesGradientProblem<float> whole(all);
    CHECK(whole.run().empty());
    for (const int64_t tokens : {24, 27}) {
      EntriesGradientCase some = all;
      some.tokens = tokens;
      EntriesGradientProblem<float> p(some);
      for (int64_t row = 24; row < tokens; ++row) {
        for (int64_t d = 0; d < 128; ++d) p.kv.at(row, d) = p.gate.at(row, d) = NAN;
      }
      p.upload();
      CHECK(p.run().empty());
      CHECK(same(p.grad_kv, whole.grad_kv, 0, 20, 0, 128) && same(p.grad_gate, whole.grad_gate, 0, 20, 0, 128));
      CHECK(same(p.grad_kv, whole.grad_kv, 20, 24, 64, 128) && same(p.grad_gate, whole.grad_gate, 20, 24, 64, 128));
      for (int64_t row = 20; row < tokens; ++row) {
        for (int64_t d = 0; d < (row < 24 ? 64 : 128); ++d) {
          CHECK(p.grad_kv.at(row, d) == 0 && p.grad_gate.at(row, d) == 0);
        }
      }
      for (int64_t d = 0; d < 64; ++d) CHECK(std::isfinite(p.grad_weight.at(d)) && std::isfinite(p.grad_ape.at(3, d)));
    }
    EntriesGradientCase elsewhere = all;
    elsewhere.shift = 1;
    EntriesGradientProblem<float> p(elsewhere);
    CHECK(p.run().empty());
    CHECK(same(p.grad_kv, whole.grad_kv, 0, 44, 0, 128) && same(p.grad_gate, whole.grad_gate, 0, 44, 0, 128));
    CHECK(same(p.grad_ape, whole.grad_ape, 0, 4, 0, 128) && same(p.grad_weight, whole.grad_weight, 0, 64, 0, 1));
  }
}

TEST(nan_reaches_its_own_entries) {
  if (no_device()) return;
  EntriesGradientProblem<float> clean({24, 4, 64, 32, 2}), p({24, 4, 64, 32, 2});
  p.grad.at(2, 5) = NAN;
  p.upload();
  CHECK(clean.run().empty());
  CHECK(p.run().empty());
  for (int64_t row = 0; row < 24; ++row) {
    for (int64_t at = 0; at < 128; ++at) {
      const bool spoilt = row / 4 + (at < 64 ? 1 : 0) == 2;
      CHECK(std::isnan(p.grad_kv.at(row, at)) == spoilt);
      if (!spoilt) CHECK(p.grad_kv.at(row, at) == clean.grad_kv.at(row, at));
    }
  }
}

TEST(what_shared_memory_does_not_hold_is_refused) {
  if (no_device()) return;
  EntriesGradientProblem<float> p({4, 4, 2048, 0, 1, true});
  CHECK(p.run() == "compress_entries_backward: no implementation for this device in this build");
}

}  // namespace
