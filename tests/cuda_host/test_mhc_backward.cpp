// The sm80 gradients of mHC against float64, and each row against itself in other company. Runs on the host model, and
// on a GPU where it is built for one.
#include "mhc_backward_cases.h"
#if !defined(DSV4_ON_GPU)
#include "cuda/sm80/mhc_launch.h"
#endif

namespace {

using namespace dsv4;
using namespace dsv4::testing;

constexpr const char* kNames[] = {"mhc_post_backward", "mhc_pre_backward", "mhc_head_backward"};

void check_case(const MhcBackwardCase& c, MhcBackwardOp op) {
  const std::string name = std::string(kNames[static_cast<int>(op)]) + " " + std::to_string(c.tokens) + " x " +
                           std::to_string(c.hidden) + (c.norm ? " norm" : "") + (c.residual ? " residual" : "") +
                           (c.pad ? " strided" : "") + ": ";
  const std::string narrow = try_mhc_backward<bf16>(c, op);
  CHECK_MESSAGE(narrow.empty(), name + "bfloat16: " + narrow);
  const std::string wide = try_mhc_backward<float>(c, op);
  CHECK_MESSAGE(wide.empty(), name + "float32: " + wide);
}

void check_case(const MhcBackwardCase& c) {
  for (const MhcBackwardOp op : kBackwardOps) check_case(c, op);
}

TEST(no_tokens) {
  if (no_device()) return;
  check_case({0, 64});
  check_case({0, 33, true});
}

TEST(token_counts) {
  if (no_device()) return;
  for (const int64_t tokens : {1, 2, 7, 8, 9, 15, 16, 17, 33}) {
    check_case({tokens, 72, tokens % 2 == 0, tokens % 3 == 0});
  }
}

// The sums are cut into pieces of 64 tokens here; the mixing product into blocks of 128.
TEST(several_pieces) {
  if (no_device()) return;
  for (const int64_t tokens : {63, 64, 65, 129, 200}) check_case({tokens, 24, tokens % 2 == 0, tokens % 2 != 0});
}

TEST(hidden_sizes) {
  if (no_device()) return;
  for (const int64_t hidden : {8, 16, 32, 56, 64, 136, 256, 264, 520}) {
    check_case({3, hidden, hidden % 3 != 0, hidden % 16 == 0});
  }
}

// Rows whose length or start is no multiple of 16 bytes go element by element.
TEST(odd_hidden_sizes) {
  if (no_device()) return;
  for (const int64_t hidden : {1, 2, 3, 7, 12, 33, 63, 65, 100, 259}) {
    check_case({2, hidden, hidden % 2 != 0, hidden % 3 == 0});
  }
}

TEST(released_widths) {
  if (no_device()) return;
  check_case({2, 4096, true, true});
  check_case({1, 7168, true});
}

TEST(norm_weight_in_the_type_of_the_streams) {
  if (no_device()) return;
  check_case({3, 48, true, false, 0, true}, MhcBackwardOp::kPre);
  check_case({3, 50, true, true, 0, true}, MhcBackwardOp::kPre);
}

TEST(strided_tokens) {
  if (no_device()) return;
  check_case({5, 64, true, true, 8});
  check_case({5, 64, true, true, 3});
  check_case({18, 41, true, true, 5});
}

// More steps than are kept at a time, and fewer.
TEST(few_and_many_iterations) {
  if (no_device()) return;
  for (const int iterations : {1, 2, 20, 21, 45}) {
    check_case({9, 40, false, false, 0, false, iterations, 1e-3f}, MhcBackwardOp::kPre);
  }
}

TEST(more_tokens_than_one_launch_takes) {
  if (no_device()) return;
  check_case({8193, 8}, MhcBackwardOp::kHead);
}

// Rows that start at no multiple of 16 bytes: the same sums by single elements, so the same bits.
template <class X>
void check_slices(MhcBackwardOp op) {
  const MhcBackwardCase c = {70, 72, true, true};
  MhcBackwardCase apart = c;
  apart.pad = 3;
  MhcBackwardProblem<X> whole(c, op), sliced(apart, op);
  const std::string one = run_mhc_backward(whole), other = run_mhc_backward(sliced);
  CHECK_MESSAGE(one.empty(), one);
  CHECK_MESSAGE(other.empty(), other);
  for (int64_t t = 0; t < c.tokens; ++t) CHECK(bits_of(sliced, t) == bits_of(whole, t));
  CHECK(bits_of_sums(sliced) == bits_of_sums(whole));
}

TEST(rows_may_start_anywhere) {
  if (no_device()) return;
  for (const MhcBackwardOp op : kBackwardOps) {
    check_slices<bf16>(op);
    check_slices<float>(op);
  }
}

// Without the gradient of fn the others keep their bits, and nothing is written in its place.
template <class X>
void check_frozen_fn(MhcBackwardOp op) {
  const MhcBackwardCase c = {130, 72, true, true};
  MhcBackwardCase frozen = c;
  frozen.frozen_fn = true;
  MhcBackwardProblem<X> whole(c, op), others(frozen, op), fresh(c, op);
  CHECK(run_mhc_backward(whole).empty());
  CHECK(run_mhc_backward(others).empty());
  for (int64_t t = 0; t < c.tokens; ++t) CHECK(bits_of(others, t) == bits_of(whole, t));
  for (int64_t j = 0; j < whole.mixes(); ++j) {
    for (int64_t i = 0; i < kStreams * c.hidden; ++i) {
      float& value = others.grad_fn.at(j, i);
      CHECK(bits_from_float(value) == bits_from_float(fresh.grad_fn.at(j, i)));
      value = whole.grad_fn.at(j, i);
    }
  }
  CHECK(bits_of_sums(others) == bits_of_sums(whole));
}

TEST(the_gradient_of_fn_may_be_none) {
  if (no_device()) return;
  for (const MhcBackwardOp op : {MhcBackwardOp::kPre, MhcBackwardOp::kHead}) {
    check_frozen_fn<bf16>(op);
    check_frozen_fn<float>(op);
  }
}

template <class X>
void check_company(MhcBackwardOp op) {
  const MhcBackwardCase whole = {70, 136, true, true};
  MhcBackwardProblem<X> all(whole, op);
  CHECK(run_mhc_backward(all).empty());
  for (const int64_t tokens : {1, 3, 16, 18, 65}) {
    MhcBackwardCase fewer = whole;
    fewer.tokens = tokens;
    MhcBackwardProblem<X> few(fewer, op);
    CHECK(run_mhc_backward(few).empty());
    for (int64_t t = 0; t < tokens; ++t) CHECK(bits_of(few, t) == bits_of(all, t));
  }
  // The same token elsewhere in a block, 34 is told the data of 0, and a neighbour that holds nothing but NaN.
  MhcBackwardProblem<X> moved(whole, op);
  const auto move = [&](auto& tensor) {
    for (int64_t i = 0; i < tensor.inner(); ++i) tensor.at(34, i) = tensor.at(0, i);
    tensor.upload();
  };
  for (int64_t i = 0; i < moved.streams.inner(); ++i) moved.streams.at(1, i) = from_float<X>(NAN);
  for (DeviceTensor<X>* tensor : {&moved.streams, &moved.grad, &moved.residual, &moved.sublayer}) move(*tensor);
  for (DeviceTensor<float>* tensor : {&moved.post, &moved.comb}) move(*tensor);
  CHECK(run_mhc_backward(moved).empty());
  CHECK(bits_of(moved, 34) == bits_of(all, 0));
  for (const int64_t t : {0, 2, 15, 69}) CHECK(bits_of(moved, t) == bits_of(all, t));
}

// Each operand and result alone: what is believed of one must not be concluded from another.
TEST(any_operand_anywhere_in_memory) {
  if (no_device()) return;
  each_odd_tensor([] { check_case({3, 64, true, true}); });
}

TEST(a_row_does_not_depend_on_its_company) {
  if (no_device()) return;
  for (const MhcBackwardOp op : kBackwardOps) {
    check_company<bf16>(op);
    check_company<float>(op);
  }
}

#if !defined(DSV4_ON_GPU)

// The products that gradients start from round as sums in float32 do; from two bfloat16 parts of fn they would be some
// 20 times as far off.
template <class X>
void check_product() {
  constexpr int64_t kTokens = 20, kHidden = 264;
  MhcBackwardProblem<X> p({kTokens, kHidden}, MhcBackwardOp::kPre);
  DeviceTensor<float> partial({2, kTokens, sm80::kPartialRow});
  sm80::MixArguments mix = {};
  mix.streams = p.streams.template any<3>();
  mix.fn = p.fn.template const_view<2>();
  mix.partial = partial.device();
  mix.end_token = kTokens;
  mix.hidden = kHidden;
  mix.vector = true;
  const Status status = sm80::launch_exact_mix("mix", false, sizeof(X) == 4, mix, cuda_context());
  CHECK_MESSAGE(status.is_ok(), status.message());
  double errors = 0, terms = 0, square_error = 0;
  for (int64_t t = 0; t < kTokens; ++t) {
    const auto got = [&](int64_t j) {
      return static_cast<double>(partial.at(0, t * sm80::kPartialRow + j)) +
             static_cast<double>(partial.at(1, t * sm80::kPartialRow + j));
    };
    double squares = 0;
    for (int64_t j = 0; j < kMixes; ++j) {
      double sum = 0;
      for (int64_t i = 0; i < kStreams * kHidden; ++i) {
        const double r = to_float(p.streams.at(t, i)), term = r * static_cast<double>(p.fn.at(j, i));
        sum += term;
        terms += term * term;
        squares += j == 0 ? r * r : 0;
      }
      errors += std::pow(got(j) - sum, 2);
    }
    square_error = std::max(square_error, std::abs(got(sm80::kSquares) / squares - 1));
  }
  CHECK_MESSAGE(std::sqrt(errors / terms) < 4e-7, std::to_string(std::sqrt(errors / terms) * 1e7) + "e-7");
  CHECK_MESSAGE(square_error < 2e-7, std::to_string(square_error * 1e7) + "e-7");
}

TEST(products_are_as_exact_as_float32) {
  check_product<bf16>();
  check_product<float>();
}

template <class X>
void check_far_rows() {
  const MhcBackwardCase c = {3, 40, true, true};
  for (const MhcBackwardOp op : kBackwardOps) {
    MhcBackwardProblem<X> near(c, op);
    const RowsApart apart;
    MhcBackwardProblem<X> far(c, op);
    CHECK(run_mhc_backward(near).empty());
    const std::string fault = run_mhc_backward(far);
    CHECK_MESSAGE(fault.empty(), fault);
    for (int64_t t = 0; t < c.tokens; ++t) CHECK(bits_of(far, t) == bits_of(near, t));
    CHECK(bits_of_sums(far) == bits_of_sums(near));
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
  const MhcBackwardCase c = {4, 48, true};
  const Context context = cuda_context();
  for (const MhcBackwardOp op : kBackwardOps) {
    MhcBackwardProblem<bf16> direct(c, op), dispatched(c, op);
    CHECK(run_mhc_backward(direct).empty());
    CHECK(mhc_pre_backward_workspace_bytes(c.tokens, c.hidden, DType::kBFloat16, context) ==
          sm80::mhc_backward_workspace_bytes(c.tokens, c.hidden, DType::kBFloat16, false));
    CHECK(mhc_head_backward_workspace_bytes(c.tokens, c.hidden, DType::kFloat32, context) ==
          sm80::mhc_backward_workspace_bytes(c.tokens, c.hidden, DType::kFloat32, true));
    const Status status = op == MhcBackwardOp::kPost  ? mhc_post_backward(dispatched.post_params(), context)
                          : op == MhcBackwardOp::kPre ? mhc_pre_backward(dispatched.pre_params(), context)
                                                      : mhc_head_backward(dispatched.head_params(), context);
    CHECK_MESSAGE(status.is_ok(), status.message());
    CHECK(finish_device());
    dispatched.download();
    for (int64_t t = 0; t < c.tokens; ++t) CHECK(bits_of(dispatched, t) == bits_of(direct, t));
    CHECK(bits_of_sums(dispatched) == bits_of_sums(direct));
  }
}

TEST(a_small_workspace_is_refused) {
  if (no_device()) return;
  MhcBackwardProblem<bf16> p({3, 64}, MhcBackwardOp::kPre);
  MhcPreBackwardParams params = p.pre_params();
  params.workspace.bytes -= 1;
  const std::string message = sm80::mhc_pre_backward(params, cuda_context()).message();
  CHECK_MESSAGE(message.find("mhc_pre_backward: workspace has ") == 0, message);
}

}  // namespace
