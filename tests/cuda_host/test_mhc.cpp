// The sm80 mHC kernels against float64, and each row against itself in other company. Runs on the host model, and on a
// GPU where it is built for one.
#include "mhc_cases.h"

namespace {

using namespace dsv4;
using namespace dsv4::testing;

constexpr MhcOp kOps[] = {MhcOp::kPost, MhcOp::kPre, MhcOp::kPostPre, MhcOp::kHead};
constexpr const char* kNames[] = {"mhc_post", "mhc_pre", "mhc_post_pre", "mhc_head"};

bool no_device() {
  if (has_device()) return false;
  not_run("no CUDA device");
  return true;
}

void check_case(const MhcCase& c) {
  for (const MhcOp op : kOps) {
    const std::string name = std::string(kNames[static_cast<int>(op)]) + " " + std::to_string(c.tokens) + " x " +
                             std::to_string(c.hidden) + (c.norm ? " norm" : "") + (c.pad ? " strided" : "") + ": ";
    const std::string narrow = try_mhc<bf16>(c, op);
    CHECK_MESSAGE(narrow.empty(), name + "bfloat16: " + narrow);
    const std::string wide = try_mhc<float>(c, op);
    CHECK_MESSAGE(wide.empty(), name + "float32: " + wide);
  }
}

TEST(no_tokens) {
  if (no_device()) return;
  check_case({0, 64});
}

TEST(token_counts) {
  if (no_device()) return;
  for (const int64_t tokens : {1, 2, 7, 8, 9, 17, 33}) check_case({tokens, 72, tokens % 2 == 0});
  check_case({130, 16});
}

TEST(hidden_sizes) {
  if (no_device()) return;
  for (const int64_t hidden : {8, 16, 32, 64, 136, 256, 264, 520}) check_case({3, hidden, hidden % 3 != 0});
}

// Rows whose length or start is no multiple of 16 bytes go element by element.
TEST(odd_hidden_sizes) {
  if (no_device()) return;
  for (const int64_t hidden : {1, 3, 7, 12, 33, 100, 259}) check_case({2, hidden, hidden % 2 != 0});
}

TEST(strided_tokens) {
  if (no_device()) return;
  check_case({5, 64, true, 8});
  check_case({5, 64, true, 3});
}

TEST(more_tokens_than_one_launch_takes) {
  if (no_device()) return;
  MhcProblem<bf16> p({8193, 8}, true);
  const std::string fault = run_mhc(p, MhcOp::kHead);
  CHECK_MESSAGE(fault.empty(), fault);
  const Worst worst = compare_mhc(p, MhcOp::kHead);
  CHECK_MESSAGE(worst.ratio <= 1, worst.where);
}

template <class X>
void check_company(MhcOp op) {
  const MhcCase whole = {35, 320, true};
  MhcProblem<X> all(whole, op == MhcOp::kHead);
  CHECK(run_mhc(all, op).empty());
  for (const int64_t tokens : {1, 3, 16, 18}) {
    MhcProblem<X> few({tokens, 320, true}, op == MhcOp::kHead);
    CHECK(run_mhc(few, op).empty());
    for (int64_t t = 0; t < tokens; ++t) CHECK(bits_of(few, op, t) == bits_of(all, op, t));
  }
  // The same token elsewhere in a block: 34 is told the data of 0.
  MhcProblem<X> moved(whole, op == MhcOp::kHead);
  for (int64_t i = 0; i < moved.streams.inner(); ++i) moved.streams.at(34, i) = moved.streams.at(0, i);
  for (int64_t i = 0; i < moved.sublayer.inner(); ++i) moved.sublayer.at(34, i) = moved.sublayer.at(0, i);
  for (int64_t i = 0; i < moved.post_in.inner(); ++i) moved.post_in.at(34, i) = moved.post_in.at(0, i);
  for (int64_t i = 0; i < moved.comb_in.inner(); ++i) moved.comb_in.at(34, i) = moved.comb_in.at(0, i);
  // And a neighbour that holds nothing but NaN.
  for (int64_t i = 0; i < moved.streams.inner(); ++i) moved.streams.at(1, i) = from_float<X>(NAN);
  moved.streams.upload();
  moved.sublayer.upload();
  moved.post_in.upload();
  moved.comb_in.upload();
  CHECK(run_mhc(moved, op).empty());
  CHECK(bits_of(moved, op, 34) == bits_of(all, op, 0));
  CHECK(bits_of(moved, op, 2) == bits_of(all, op, 2));
}

TEST(a_row_does_not_depend_on_its_company) {
  if (no_device()) return;
  for (const MhcOp op : kOps) {
    check_company<bf16>(op);
    check_company<float>(op);
  }
}

template <class X>
void check_fusion(const MhcCase& c) {
  MhcProblem<X> fused(c, false), apart(c, false);
  CHECK(run_mhc(fused, MhcOp::kPostPre).empty());
  CHECK(run_mhc(apart, MhcOp::kPost).empty());
  const Context context = cuda_context();
  CHECK(sm80::mhc_pre(apart.pre_params(apart.result), context).is_ok());
  CHECK(finish_device());
  apart.download();
  for (int64_t t = 0; t < c.tokens; ++t) CHECK(bits_of(fused, MhcOp::kPostPre, t) == bits_of(apart, MhcOp::kPostPre, t));
}

TEST(the_fused_op_equals_the_two) {
  if (no_device()) return;
  for (const int64_t hidden : {40, 100, 288}) {
    check_fusion<bf16>({19, hidden, true});
    check_fusion<float>({19, hidden, true});
  }
}

TEST(a_small_workspace_is_refused) {
  if (no_device()) return;
  MhcProblem<bf16> p({3, 64}, false);
  MhcPreParams params = p.pre_params(p.streams);
  params.workspace.bytes -= 1;
  CHECK(std::string(sm80::mhc_pre(params, cuda_context()).message()) ==
        "mhc_pre: workspace has 383 bytes, needs 384");
}

}  // namespace
