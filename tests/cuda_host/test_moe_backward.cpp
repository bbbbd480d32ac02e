// The sm80 gradient of plain experts against float64, tokens against themselves in other company and otherwise cut.
// Runs on the host model, and on a GPU where it is built for one.
#include "moe_backward_cases.h"

namespace {

using namespace dsv4;
using namespace dsv4::testing;

constexpr sm80::GradientCut kCuts[] = {
    {false, false, true, 128}, {true, true, true, 384}, {false, true, false, 128}, {true, false, false, 256}};

std::string text(const GradientCase& c) {
  std::string words;
  for (const int64_t value : {c.tokens, c.hidden, c.inter, c.experts, c.top_k, c.shared_inter, c.pad}) {
    words += std::to_string(value) + " ";
  }
  return words;
}

template <class X>
void check_case(const GradientCase& c, const sm80::GradientCut* cut = nullptr) {
  const std::string wrong = try_gradient<X>(c, cut);
  CHECK_MESSAGE(wrong.empty(), std::string(sizeof(X) == 2 ? "bfloat16 " : "float32 ") + text(c) + ": " + wrong);
}

void check_both(const GradientCase& c, const sm80::GradientCut* cut = nullptr) {
  check_case<bf16>(c, cut);
  check_case<float>(c, cut);
}

// The same bits however the call is cut.
template <class X>
void check_cuts(const GradientCase& c) {
  check_case<X>(c);
  GradientProblem<X> own(c);
  CHECK(own.run().empty());
  for (const sm80::GradientCut& cut : kCuts) {
    GradientProblem<X> p(c);
    const std::string fault = p.run(&cut);
    CHECK_MESSAGE(fault.empty(), text(c) + ": " + fault);
    CHECK_MESSAGE(p.bits() == own.bits(), text(c) + " depends on its cut");
  }
}

TEST(nothing_to_do) {
  if (no_device()) return;
  check_both({0, 40, 24, 3, 2});
  check_both({3, 40, 24, 4, 0});
  check_both({3, 40, 24, 4, 0, 0});
  check_both({3, 40, 0, 4, 2});
  check_both({3, 0, 24, 4, 2});
  check_both({3, 40, 24, 0, 2});
  check_both({3, 40, 24, 4, 2, 0});
}

TEST(sizes) {
  if (no_device()) return;
  for (const int64_t hidden : {1, 7, 8, 33, 64, 127, 129, 264}) check_both({4, hidden, 40, 3, 2, 24});
  for (const int64_t inter : {1, 7, 8, 31, 63, 128, 129, 264}) check_both({4, 48, inter, 3, 2, 136 - inter / 2});
}

// Rows of an expert: one off a fragment, a warp, a tile, a stage and a block of K.
TEST(rows_of_an_expert) {
  if (no_device()) return;
  for (const int64_t tokens : {1, 2, 15, 17, 31, 33, 63, 65, 127, 129, 257}) {
    const GradientCase c = {tokens, 24, 16, 1, 1, 8};
    check_both(c, &kCuts[tokens % 4]);
    check_both(c, &kCuts[(tokens + 1) % 4]);
  }
  check_both({150, 16, 24, 3, 2, 16});
  check_both({40, 16, 24, 9, 7, 0});
}

TEST(cuts_do_not_show) {
  if (no_device()) return;
  check_cuts<bf16>({70, 136, 144, 3, 2, 56});
  check_cuts<float>({70, 136, 144, 3, 2, 56});
  check_cuts<bf16>({5, 300, 72, 40, 3, 40});
  check_cuts<bf16>({3, 40, 24, 4, 0});
}

TEST(rows_that_do_not_lie_densely) {
  if (no_device()) return;
  for (const int64_t pad : {1, 8}) {
    GradientCase c = {9, 96, 72, 4, 2};
    c.pad = pad;
    check_both(c);
    c.hidden = 61, c.inter = 67;
    check_both(c);
  }
}

// Whatever is left out is not written, and the others keep their bits: each alone, all but each, a group's together.
template <class X>
void check_results_that_are_none() {
  const GradientCase c = {5, 40, 24, 3, 2};
  GradientProblem<X> all(c);
  CHECK(all.run().empty());
  const unsigned kAll = 255, kRouted = 0x1c, kShared = 0xe0;
  std::vector<unsigned> sets = {0, kAll & ~kRouted, kAll & ~kShared, kAll & ~kRouted & ~kShared};
  for (int i = 0; i < 8; ++i) sets.push_back(1u << i), sets.push_back(kAll & ~(1u << i));
  for (const unsigned set : sets) {
    GradientProblem<X> p(c), fresh(c);
    MoeExpertsBackwardParams params = p.params();
    const auto needed = [set](size_t i) { return (set >> i & 1) != 0; };
    if (!needed(0)) params.grad_x = {};
    if (!needed(1)) params.grad_weights = {};
    for (size_t n = 0; n < 6; ++n) {
      if (!needed(2 + n)) (n < 3 ? params.grad_matrices[n] : params.grad_shared[n - 3]) = {};
    }
    const std::string fault = p.run(params, nullptr);
    CHECK_MESSAGE(fault.empty(), fault);
    for (size_t i = 0; i < 8; ++i) {
      CHECK_MESSAGE(p.bits_of_result(i) == (needed(i) ? all : fresh).bits_of_result(i),
                    "gradient " + std::to_string(i) + " of " + std::to_string(set));
    }
  }
}

TEST(results_may_be_none) {
  if (no_device()) return;
  check_results_that_are_none<bf16>();
  check_results_that_are_none<float>();
}

// Each operand and result alone: what is believed of one must not be concluded from another.
TEST(any_operand_anywhere_in_memory) {
  if (no_device()) return;
  each_odd_tensor([] { check_both({4, 64, 64, 2, 2}); });
}

#if !defined(DSV4_ON_GPU)

TEST(offsets_beyond_32_bits) {
  const RowsApart apart;
  const GradientCase c = {9, 96, 72, 4, 2};
  check_both(c);
  for (const sm80::GradientCut& cut : kCuts) check_both(c, &cut);
}

#endif

TEST(limits) {
  if (no_device()) return;
  for (const float limit : {0.0f, 0.05f, 10.0f}) {
    GradientCase c = {6, 128, 64, 4, 2};
    c.limit = limit;
    check_both(c);
  }
}

#if !defined(DSV4_ON_GPU)  // whose tests have no kernels for the CPU
// A float32 gradient is its sum's and little more; the error of a bfloat16 one is that of its operands' roundings.
template <class X>
void check_scalar(const GradientCase& c, double most) {
  GradientProblem<X> p(c), portable(c);
  CHECK(p.run().empty());
  MoeExpertsBackwardParams params = portable.params();
  Context context;
  const int64_t bytes = scalar::moe_experts_backward_workspace_bytes(params, context);
  std::vector<uint64_t> memory(static_cast<size_t>(bytes) / 8 + 16);
  params.workspace = {reinterpret_cast<void*>((reinterpret_cast<uintptr_t>(memory.data()) + 63) / 64 * 64), bytes};
  CHECK(scalar::moe_experts_backward(params, context).is_ok());
  double error = 0, size = 0;
  const std::vector<uint32_t> got = p.bits(), expected = portable.bits();
  for (size_t i = 0; i < got.size(); ++i) {
    const double value = float_from_bits(expected[i]), off = float_from_bits(got[i]) - value;
    error += off * off, size += value * value;
  }
  CHECK_MESSAGE(error <= most * most * size, text(c) + ": " + std::to_string(std::sqrt(error / size)));
}

TEST(the_scalar_kernel_agrees) {
  for (const GradientCase& c : {GradientCase{20, 72, 56, 4, 3}, GradientCase{33, 64, 130, 2, 1, 0}}) {
    check_scalar<float>(c, 1e-6);
    check_scalar<bf16>(c, 2e-3);
  }
}
#endif

TEST(a_token_does_not_depend_on_cut_or_company) {
  if (no_device()) return;
  const GradientCase whole = {40, 136, 144, 4, 3, 72};
  GradientProblem<bf16> all(whole);
  CHECK(all.run().empty());
  for (const sm80::GradientCut& cut : kCuts) {
    for (const int64_t tokens : {1, 7}) {
      GradientCase few = whole;
      few.tokens = tokens;
      GradientProblem<bf16> p(few);
      const std::string fault = p.run(&cut);
      CHECK_MESSAGE(fault.empty(), fault);
      for (int64_t t = 0; t < tokens; ++t) CHECK(p.bits_of(t) == all.bits_of(t));
    }
  }
  // Beside tokens of NaN for the same experts.
  GradientProblem<bf16> spoilt(whole);
  for (int64_t t = 0; t < 40; t += 2) {
    for (int64_t i = 0; i < whole.hidden; ++i) spoilt.x.at(t, i) = spoilt.grad.at(t, i) = from_float<bf16>(NAN);
  }
  spoilt.upload();
  CHECK(spoilt.run(&kCuts[1]).empty());
  for (int64_t t = 1; t < 40; t += 2) CHECK(spoilt.bits_of(t) == all.bits_of(t));
  CHECK(std::isnan(to_float(spoilt.grad_x.at(0, 3))));
}

// Tokens that nobody takes, experts that take nobody.
TEST(nan_where_nobody_reads) {
  if (no_device()) return;
  const GradientCase c = {9, 40, 24, 5, 2, 0};
  GradientProblem<float> clean(c), spoilt(c);
  for (GradientProblem<float>* p : {&clean, &spoilt}) {
    for (int64_t t = 0; t < 9; ++t) {
      for (int64_t k = 0; k < 2; ++k) p->indices.at(t, k) = t == 4 ? -1 : static_cast<int32_t>(t % 3 + k);
    }
  }
  for (int64_t i = 0; i < c.hidden; ++i) spoilt.x.at(4, i) = spoilt.grad.at(4, i) = NAN;
  spoilt.weights.at(4, 0) = spoilt.weights.at(4, 1) = NAN;
  for (PaddedMatrix<float>& w : spoilt.matrices) {
    for (int64_t i = 0; i < w.out * w.in; ++i) w.at(4, i / w.in, i % w.in) = NAN;
    w.memory.upload();
  }
  clean.upload();
  spoilt.upload();
  CHECK(clean.run().empty());
  CHECK(spoilt.run().empty());
  CHECK(clean.bits() == spoilt.bits());
  for (PaddedMatrix<float>& r : spoilt.results) {
    for (int64_t i = 0; i < r.out * r.in; ++i) CHECK(bits_from_float(r.at(4, i / r.in, i % r.in)) == 0);
  }
}

// The order of a token's slots does not show, that of the experts does not change.
template <class X>
void check_slots() {
  const GradientCase c = {6, 96, 72, 6, 4};
  GradientProblem<X> p(c), turned(c);
  for (int64_t t = 0; t < c.tokens; ++t) {
    for (int64_t k = 0; k < 4; ++k) p.indices.at(t, k) = static_cast<int32_t>((t + k * 5) % 6);
    for (int64_t k = 0; k < 4; ++k) {
      turned.indices.at(t, k) = p.indices.at(t, 3 - k);
      turned.weights.at(t, k) = p.weights.at(t, 3 - k);
    }
  }
  p.upload();
  turned.upload();
  CHECK(p.run().empty());
  CHECK(turned.run().empty());
  for (int64_t t = 0; t < c.tokens; ++t) {
    for (int64_t i = 0; i < c.hidden; ++i) CHECK(to_float(p.grad_x.at(t, i)) == to_float(turned.grad_x.at(t, i)));
    for (int64_t k = 0; k < 4; ++k) CHECK(p.grad_weights.at(t, k) == turned.grad_weights.at(t, 3 - k));
  }
}

TEST(slots_in_any_order) {
  if (no_device()) return;
  check_slots<bf16>();
  check_slots<float>();
}

TEST(wide_indices) {
  if (no_device()) return;
  const GradientCase c = {6, 40, 24, 6, 3};
  GradientProblem<bf16> narrow(c), wide(c);
  CHECK(narrow.run().empty());
  DeviceBytes memory(6 * 3 * 8);
  for (int64_t i = 0; i < 6 * 3; ++i) {
    const int64_t e = wide.indices.at(i / 3, i % 3);
    static_cast<int64_t*>(memory.host())[i] = e < 0 ? (int64_t{1} << 32) : e;
  }
  memory.upload();
  MoeExpertsBackwardParams p = wide.params();
  p.indices.data = memory.device();
  p.indices.dtype = DType::kInt64;
  CHECK(wide.run(p, nullptr).empty());
  CHECK(wide.bits() == narrow.bits());
}

TEST(the_op_runs_the_kernel) {
  if (no_device()) return;
  const GradientCase c = {4, 96, 72, 5, 2};
  GradientProblem<bf16> direct(c), dispatched(c);
  CHECK(direct.run().empty());
  MoeExpertsBackwardParams p = dispatched.params();
  const int64_t bytes = moe_experts_backward_workspace_bytes(p, cuda_context());
  CHECK(bytes > 0);
  DeviceBytes memory(static_cast<size_t>(bytes) + 64);
  p.workspace = {reinterpret_cast<void*>((reinterpret_cast<uintptr_t>(memory.device()) + 63) / 64 * 64), bytes};
  const Status status = moe_experts_backward(p, cuda_context());
  CHECK_MESSAGE(status.is_ok(), status.message());
  CHECK(finish_device());
  dispatched.grad_x.download();
  dispatched.grad_weights.download();
  for (PaddedMatrix<bf16>& result : dispatched.results) result.memory.download();
  CHECK(dispatched.bits() == direct.bits());
}

TEST(cuts) {
  if (no_device()) return;
  GradientProblem<bf16> p({1, 32, 16, 4, 2});
  MoeExpertsBackwardParams params = p.params();
  params.matrices[0].shape[0] = 256;
  params.weights.shape[1] = 6;
  sm80::GradientCut cut = sm80::gradient_cut(params);
  CHECK(!cut.many && !cut.many_shared && cut.tile_at_row && cut.columns == 128);
  params.x.shape[0] = 4097;
  cut = sm80::gradient_cut(params);
  CHECK(cut.many && cut.many_shared && !cut.tile_at_row && cut.columns == 128);
  params.x.shape[1] = 4096;
  CHECK(sm80::gradient_cut(params).columns == 2304);
  params.x.shape[0] = 1 << 20;
  CHECK(sm80::gradient_cut(params).columns == 128);
  CHECK(sm80::accepts_moe_experts_backward(params));
  params.x.shape[0] = int64_t{1} << 29;
  CHECK(!sm80::accepts_moe_experts_backward(params));
}

}  // namespace
