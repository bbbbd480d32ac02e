// The sm80 kernels of quantize against the scalar ones, bit for bit. Runs on the host model, and on a GPU where it is
// built for one.
#include "cuda/sm80/divisor.h"
#include "quantize_cases.h"

namespace {

using namespace dsv4;
using namespace dsv4::testing;

template <class X>
void check_hadamard(const HadamardCase& c, bool exact = true) {
  const std::string wrong = try_hadamard<X>(c, exact);
  CHECK_MESSAGE(wrong.empty(), "rows " + std::to_string(c.rows) + " dim " + std::to_string(c.dim) + " size " +
                                   std::to_string(c.size) + ": " + wrong);
}

template <class X>
void check_quantize(const QuantizeCase& c) {
  const std::string wrong = try_quantize<X>(c);
  CHECK_MESSAGE(wrong.empty(), "rows " + std::to_string(c.rows) + " n " + std::to_string(c.n) + " block " +
                                   std::to_string(c.block) + " size " + std::to_string(c.size) + ": " + wrong);
}

TEST(codes_of_every_block) {
  if (no_device()) return;
  for (const int64_t block : {1, 2, 3, 7, 8, 16, 32, 64, 100, 128, 256, 264, 1000}) {
    for (const int64_t n : {1, 2, 8, 31, 64, 128, 200, 384, 777, 1024}) {
      check_quantize<bf16>({3, n, block});
      check_quantize<float>({2, n, block});
      if (n % 2 != 0 || block % 2 != 0) continue;
      check_quantize<bf16>({3, n, block, true});
      check_quantize<float>({2, n, block, true});
    }
  }
  for (const int64_t rows : {0, 1, 40}) {
    check_quantize<bf16>({rows, 4096, 128});
    check_quantize<bf16>({rows, 1024, 32, true});
  }
}

TEST(codes_of_any_size_anywhere_in_memory) {
  if (no_device()) return;
  for (const bool fp4 : {false, true}) {
    for (const float size : {0.0f, 1e-38f, 1e-20f, 1e-4f, 448.0f, 6.0f, 1e30f, 3e38f, INFINITY}) {
      check_quantize<bf16>({5, 256, 64, fp4, size});
      check_quantize<float>({5, 256, 64, fp4, size});
    }
    check_quantize<bf16>({5, 256, 128, fp4, 3, 1});
    check_quantize<float>({5, 256, 32, fp4, 3, 2});
  }
}

TEST(codes_of_what_is_not_finite) {
  if (no_device()) return;
  for (const bool fp4 : {false, true}) {
    for (const float value : {NAN, INFINITY, -INFINITY}) {
      QuantizeProblem<bf16> p({3, 192, 64, fp4});
      p.x.at(1, 70) = from_float<bf16>(value);
      p.x.at(2, 191) = from_float<bf16>(value);
      p.x.upload();
      CHECK(p.run().empty());
      const std::string wrong = p.wrong();
      CHECK_MESSAGE(wrong.empty(), wrong);
    }
  }
}

void check_divisor(uint32_t value) {
  constexpr uint32_t kMost = (uint32_t{1} << 31) - 1;
  const sm80::Divisor divisor(value);
  const auto right = [&](uint32_t number) {
    const auto [quotient, rest] = divisor.divide(number);
    return quotient == number / value && rest == number % value;
  };
  bool all = right(0) && right(1) && right(kMost);
  Random random(value);
  for (int i = 0; i < 1000; ++i) {
    const uint32_t number = static_cast<uint32_t>(random.bits() >> 8) & kMost, multiple = number / value * value;
    all = all && right(number) && right(multiple) && (multiple == 0 || right(multiple - 1));
  }
  CHECK_MESSAGE(all, std::to_string(value));
}

TEST(divisors_divide) {
  for (uint32_t value = 1; value < 1000; ++value) check_divisor(value);
  for (int bits = 10; bits < 31; ++bits) {
    for (const uint32_t off : {0u, 1u, ~0u}) check_divisor((uint32_t{1} << bits) + off);
  }
}

template <class X>
void check_dequantize(const DequantizeCase& c) {
  const std::string wrong = try_dequantize<X>(c);
  CHECK_MESSAGE(wrong.empty(), "rows " + std::to_string(c.rows) + " n " + std::to_string(c.n) + " block " +
                                   std::to_string(c.block) + " group " + std::to_string(c.group) + " fp4 " +
                                   std::to_string(c.fp4) + ": " + wrong);
}

TEST(values_of_codes) {
  if (no_device()) return;
  for (const bool fp4 : {false, true}) {
    for (const bool wide : {false, true}) {
      for (const int64_t n : {2, 8, 30, 64, 200, 384}) {
        for (const int64_t block : {2, 8, 32, 100, 128, 512}) {
          check_dequantize<bf16>({1, 5, n, block, 1, fp4, wide});
          check_dequantize<float>({2, 3, n, block, 1, fp4, wide});
        }
      }
      check_dequantize<bf16>({2, 130, 136, 128, 128, fp4, wide});
      check_dequantize<float>({3, 9, 64, 32, 4, fp4, wide});
      check_dequantize<bf16>({2, 5, 64, 32, 1, fp4, wide, 1});
      check_dequantize<bf16>({0, 5, 64, 32, 1, fp4, wide});
    }
  }
  check_dequantize<bf16>({1, 3, 33, 7});
}

template <class X>
void check_any_operand() {
  for (const bool fp4 : {false, true}) {
    check_quantize<X>({3, 192, 64, fp4});
    check_dequantize<X>({3, 2, 64, 32, 1, fp4});
    check_dequantize<X>({3, 2, 64, 32, 1, fp4, true});
  }
  check_hadamard<X>({3, 64});
}

// Each operand and result alone: what is believed of one must not be concluded from another.
TEST(any_operand_anywhere_in_memory) {
  if (no_device()) return;
  each_odd_tensor([] { check_any_operand<bf16>(); });
  each_odd_tensor([] { check_any_operand<float>(); });
}

#if !defined(DSV4_ON_GPU)

template <class X>
void check_far_rows() {
  for (const bool fp4 : {false, true}) {
    check_quantize<X>({3, 192, 64, fp4});
    check_dequantize<X>({3, 2, 64, 32, 1, fp4});
    check_dequantize<X>({3, 2, 64, 32, 1, fp4, true});
  }
  for (const int64_t dim : {64, 2048}) check_hadamard<X>({3, dim});
}

TEST(offsets_beyond_32_bits) {
  const RowsApart apart;
  check_far_rows<bf16>();
  check_far_rows<float>();
}

#endif

TEST(hadamard_of_every_width) {
  if (no_device()) return;
  for (int64_t dim = 1; dim <= 1024; dim *= 2) {
    for (const int64_t rows : {0, 1, 7, 33}) {
      check_hadamard<bf16>({rows, dim});
      check_hadamard<float>({rows, dim});
      check_hadamard<bf16>({rows, dim, 3, 0, true});
    }
  }
}

TEST(hadamard_of_long_rows) {
  if (no_device()) return;
  for (int64_t dim = 2048; dim <= 8192; dim *= 2) {
    check_hadamard<bf16>({2, dim}, false);
    check_hadamard<float>({2, dim}, false);
  }
}

// The cut of a long row is that of its largest element, whichever warp has it.
TEST(hadamard_of_long_rows_with_one_large_element) {
  if (no_device()) return;
  HadamardProblem<float> p({1, 2048});
  p.x.at(0, 5) = 1e30f;
  p.x.upload();
  CHECK(p.run().empty());
  const std::string wrong = p.wrong(false);
  CHECK_MESSAGE(wrong.empty(), wrong);
}

TEST(hadamard_of_any_size) {
  if (no_device()) return;
  for (const float size : {0.0f, 1e-38f, 1e-20f, 1e-6f, 1e6f, 1e22f, 1e24f, 1e37f, 3.3e38f}) {
    for (const int64_t dim : {1, 2, 16, 128, 512}) {
      check_hadamard<bf16>({5, dim, size}, size > 1e-30f);
      check_hadamard<float>({5, dim, size}, size > 1e-30f);
    }
  }
}

template <class X>
void check_values() {
  for (const float value : {NAN, INFINITY, -INFINITY, -0.0f}) {
    for (const int64_t dim : {1, 4, 128, 1024, 2048}) {
      HadamardProblem<X> p({4, dim});
      for (int64_t d = 0; d < dim; ++d) p.x.at(0, d) = from_float<X>(value);
      p.x.at(2, dim - 1) = from_float<X>(value);
      p.x.at(3, dim / 2) = from_float<X>(value);
      p.x.upload();
      CHECK(p.run().empty());
      const std::string wrong = p.wrong(dim <= 1024);
      CHECK_MESSAGE(wrong.empty(), std::to_string(value) + " dim " + std::to_string(dim) + ": " + wrong);
    }
  }
}

TEST(hadamard_of_what_is_not_finite_and_of_zeros) {
  if (no_device()) return;
  check_values<bf16>();
  check_values<float>();
}

TEST(hadamard_anywhere_in_memory) {
  if (no_device()) return;
  for (const int64_t dim : {128, 1024, 2048}) {
    check_hadamard<bf16>({5, dim, 3, 1}, dim <= 1024);
    check_hadamard<float>({5, dim, 3, 3}, dim <= 1024);
  }
}

TEST(hadamard_is_its_own_inverse) {
  if (no_device()) return;
  HadamardProblem<float> there({3, 256}), back({3, 256});
  CHECK(there.run().empty());
  for (int64_t row = 0; row < 3; ++row) {
    for (int64_t d = 0; d < 256; ++d) back.x.at(row, d) = there.result.at(row, d);
  }
  back.x.upload();
  CHECK(back.run().empty());
  for (int64_t row = 0; row < 3; ++row) {
    for (int64_t d = 0; d < 256; ++d) CHECK(std::fabs(back.result.at(row, d) - there.x.at(row, d)) < 1e-6f);
  }
}

// The list of candidates leads here, but for rows that shared memory does not hold.
TEST(the_op_runs_the_kernel) {
  if (no_device()) return;
  HadamardProblem<bf16> p({3, 128}), wide({1, 16384});
  CHECK(hadamard_workspace_bytes({view_of<2>(p.x, false), view_of<2>(p.result, false), {}}, cuda_context()) == 0);
  Status status = hadamard({view_of<2>(p.x, false), view_of<2>(p.result, false), {}}, cuda_context());
  CHECK_MESSAGE(status.is_ok() && finish_device(), status.message());
  p.result.download();
  CHECK(p.wrong().empty());
  QuantizeProblem<bf16> fp8({3, 256, 128}), fp4({3, 256, 32, true});
  CHECK(quantize_fp8(fp8.params(false), cuda_context()).is_ok() && finish_device());
  fp8.codes.download();
  fp8.scale.download();
  CHECK(fp8.wrong().empty());
  CHECK(quantize_fp4(fp4.params(false), cuda_context()).is_ok() && finish_device());
  fp4.codes.download();
  fp4.scale.download();
  CHECK(fp4.wrong().empty());
  DequantizeProblem<bf16> values({1, 256, 256, 128, 128});
  CHECK(dequantize_weight(values.params(false), cuda_context()).is_ok() && finish_device());
  values.result.download();
  CHECK(values.wrong().empty());
  status = hadamard({view_of<2>(wide.x, false), view_of<2>(wide.result, false), {}}, cuda_context());
  CHECK(std::string(status.message()) == "hadamard: no implementation for this device in this build");
}

}  // namespace
