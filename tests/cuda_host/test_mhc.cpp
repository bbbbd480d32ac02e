// The sm80 mHC kernels against float64, and each row against itself in other company. Runs on the host model, and on a
// GPU where it is built for one.
#include "cuda/common/launch.h"
#include "cuda/sm80/mhc_mix_few.h"
#include "mhc_cases.h"

namespace dsv4::sm80 {
void sm80_bf16_mhc_pre_mix(MixArguments);
void sm80_bf16_mhc_pre_mix_few(MixArguments);
void sm80_f32_mhc_pre_mix(MixArguments);
}  // namespace dsv4::sm80

namespace {

using namespace dsv4;
using namespace dsv4::testing;

constexpr MhcOp kOps[] = {MhcOp::kPost, MhcOp::kPre, MhcOp::kPostPre, MhcOp::kHead};
constexpr const char* kNames[] = {"mhc_post", "mhc_pre", "mhc_post_pre", "mhc_head"};

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
  check_case({65, 72, true});
  check_case({130, 16});
}

TEST(hidden_sizes) {
  if (no_device()) return;
  for (const int64_t hidden : {8, 16, 32, 64, 136, 256, 264, 520}) check_case({3, hidden, hidden % 3 != 0});
}

// Rows whose length or start is no multiple of 16 bytes go element by element.
TEST(released_widths) {
  if (no_device()) return;
  check_case({2, 4096, true});
  check_case({1, 7168});
  check_case({1, 7168, true, 0, true});
}

// More than a block's shared memory holds of a token.
TEST(wide_rows) {
  if (no_device()) return;
  check_case({1, 12288, true});
  check_case({2, 12289, true});
}

TEST(norm_weight_in_the_type_of_the_streams) {
  if (no_device()) return;
  check_case({3, 48, true, 0, true});
  check_case({3, 50, true, 0, true});
}

// Rows that start at no multiple of 16 bytes: the same sums by single elements, so the same bits.
template <class X>
void check_slices(MhcOp op) {
  const MhcCase c = {5, 328, true}, wide = {5, 336, true};
  const bool head = op == MhcOp::kHead;
  MhcProblem<X> whole(c, head), around(wide, head), sliced(c, head);
  CHECK(run_mhc(whole, op).empty());
  const auto slice = [&](auto view, DeviceTensor<X>& storage, DeviceTensor<X>* from) {
    const int64_t rows = storage.inner() / wide.hidden;
    for (int64_t t = 0; from != nullptr && t < c.tokens; ++t) {
      for (int64_t i = 0; i < rows * c.hidden; ++i) {
        storage.at(t, i / c.hidden * wide.hidden + 1 + i % c.hidden) = from->at(t, i);
      }
    }
    storage.upload();
    view.data = storage.device() + 1;
    view.stride[0] = rows * wide.hidden;
    if (rows > 1) view.stride[1] = wide.hidden;
    return view;
  };
  MhcPostPreParams p = sliced.post_pre_params();
  p.post.streams = slice(p.post.streams, around.streams, &sliced.streams);
  p.post.sublayer = slice(p.post.sublayer, around.sublayer, &sliced.sublayer);
  p.post.result = slice(p.post.result, around.result, nullptr);
  p.pre.input = slice(p.pre.input, around.input, nullptr);
  p.pre.streams = op == MhcOp::kPre ? p.post.streams : p.post.result;
  const MhcHeadParams for_head = {p.post.streams, p.pre.mixing, p.pre.input, p.pre.workspace};
  const Context context = cuda_context();
  const Status status = op == MhcOp::kPost      ? sm80::mhc_post(p.post, context)
                        : op == MhcOp::kPre     ? sm80::mhc_pre(p.pre, context)
                        : op == MhcOp::kPostPre ? sm80::mhc_post_pre(p, context)
                                                : sm80::mhc_head(for_head, context);
  CHECK_MESSAGE(status.is_ok(), status.message());
  CHECK(finish_device());
  around.download();
  sliced.download();
  const auto gather = [&](DeviceTensor<X>& storage, DeviceTensor<X>& to) {
    for (int64_t t = 0; t < c.tokens; ++t) {
      for (int64_t i = 0; i < to.inner(); ++i)
        to.at(t, i) = storage.at(t, i / c.hidden * wide.hidden + 1 + i % c.hidden);
    }
  };
  gather(around.result, sliced.result);
  gather(around.input, sliced.input);
  for (int64_t t = 0; t < c.tokens; ++t) CHECK(bits_of(sliced, op, t) == bits_of(whole, op, t));
  CHECK(around.intact());
}

TEST(rows_may_start_anywhere) {
  if (no_device()) return;
  for (const MhcOp op : kOps) {
    check_slices<bf16>(op);
    check_slices<float>(op);
  }
}

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
  // 64: the most that mhc_mix_few.h takes.
  for (const int64_t tokens : {1, 3, 16, 18, 64, 65}) {
    MhcProblem<X> few({tokens, 320, true}, op == MhcOp::kHead);
    CHECK(run_mhc(few, op).empty());
    for (int64_t t = 0; t < tokens && t < whole.tokens; ++t) CHECK(bits_of(few, op, t) == bits_of(all, op, t));
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
  for (int64_t t = 0; t < c.tokens; ++t)
    CHECK(bits_of(fused, MhcOp::kPostPre, t) == bits_of(apart, MhcOp::kPostPre, t));
}

TEST(the_fused_op_equals_the_two) {
  if (no_device()) return;
  for (const int64_t hidden : {40, 100, 288}) {
    check_fusion<bf16>({19, hidden, true});
    check_fusion<float>({19, hidden, true});
  }
}

// Each operand and result alone: what is believed of one must not be concluded from another.
TEST(any_operand_anywhere_in_memory) {
  if (no_device()) return;
  each_odd_tensor([] { check_case({3, 64, true}); });
}

#if !defined(DSV4_ON_GPU)  // a kernel is launched by name where nvcc compiles the test, which it does not

// How many splits a block takes one after another is a matter of speed alone, as is the kernel of few tokens.
template <class X>
void check_runs_of_splits(void (*kernel)(sm80::MixArguments), void (*few)(sm80::MixArguments)) {
  using Stage = sm80::MixStage<X, false>;
  constexpr int64_t kTokens = 21, kHidden = 1096, kSplits = 5;
  MhcProblem<X> p({kTokens, kHidden}, false);
  std::vector<std::vector<float>> results;
  for (const int run : {1, 2, 3, 5, 0}) {  // 0: few
    if (run == 0 && few == nullptr) continue;
    DeviceTensor<float> partial({kSplits, kTokens, sm80::kPartialRow});
    sm80::MixArguments arguments = {};
    arguments.streams = p.streams.template any<3>();
    arguments.fn = p.fn.template const_view<2>();
    arguments.partial = partial.device();
    arguments.end_token = kTokens;
    arguments.hidden = kHidden;
    arguments.splits_per_block = run;
    arguments.vector = true;
    cuda::LaunchShape shape;
    shape.blocks_x = run == 0 ? kSplits * sm80::kFewTiles<kMixes> : (kTokens + Stage::kTokens - 1) / Stage::kTokens;
    shape.blocks_y = run == 0 ? 2 : (kSplits + run - 1) / run;
    shape.threads = sm80::kMixThreads;
    shape.shared_bytes = run == 0 ? sm80::kMixFewSharedBytes<false> : sm80::kMixSharedBytes<X, kMixes, false>;
    const Status status = cuda::launch("mix", run == 0 ? few : kernel, shape, cuda_context(), arguments);
    CHECK_MESSAGE(status.is_ok(), status.message());
    CHECK(partial.intact());
    results.emplace_back();
    for (int64_t split = 0; split < kSplits; ++split) {
      for (int64_t i = 0; i < partial.inner(); ++i) {
        if (i % sm80::kPartialRow <= sm80::kSquares) results.back().push_back(partial.at(split, i));
      }
    }
    CHECK(results.back() == results.front());
    for (const float value : results.back()) CHECK(std::isfinite(value));
  }
}

TEST(runs_of_splits_change_nothing) {
  check_runs_of_splits<bf16>(sm80::sm80_bf16_mhc_pre_mix, sm80::sm80_bf16_mhc_pre_mix_few);
  check_runs_of_splits<float>(sm80::sm80_f32_mhc_pre_mix, nullptr);
}

template <class X>
void check_far_rows() {
  const MhcCase c = {3, 40, true};
  for (const MhcOp op : kOps) {
    MhcProblem<X> near(c, op == MhcOp::kHead);
    const RowsApart apart;
    MhcProblem<X> far(c, op == MhcOp::kHead);
    CHECK(run_mhc(near, op).empty());
    const std::string fault = run_mhc(far, op);
    CHECK_MESSAGE(fault.empty(), fault);
    for (int64_t t = 0; t < c.tokens; ++t) CHECK(bits_of(far, op, t) == bits_of(near, op, t));
  }
}

TEST(offsets_beyond_32_bits) {
  check_far_rows<bf16>();
  check_far_rows<float>();
}

#endif

// The list of candidates leads here.
TEST(the_op_runs_the_kernel) {
  if (no_device()) return;
  const MhcCase c = {4, 48};
  MhcProblem<bf16> direct(c, false), dispatched(c, false);
  CHECK(run_mhc(direct, MhcOp::kPostPre).empty());
  const Context context = cuda_context();
  CHECK(mhc_pre_workspace_bytes(c.tokens, c.hidden, DType::kBFloat16, context) ==
        sm80::mhc_workspace_bytes(c.tokens, c.hidden));
  const Status status = mhc_post_pre(dispatched.post_pre_params(), context);
  CHECK_MESSAGE(status.is_ok(), status.message());
  CHECK(finish_device());
  dispatched.download();
  for (int64_t t = 0; t < c.tokens; ++t) {
    CHECK(bits_of(dispatched, MhcOp::kPostPre, t) == bits_of(direct, MhcOp::kPostPre, t));
  }
}

TEST(a_small_workspace_is_refused) {
  if (no_device()) return;
  MhcProblem<bf16> p({3, 64}, false);
  MhcPreParams params = p.pre_params(p.streams);
  params.workspace.bytes -= 1;
  CHECK(std::string(sm80::mhc_pre(params, cuda_context()).message()) == "mhc_pre: workspace has 383 bytes, needs 384");
}

}  // namespace
