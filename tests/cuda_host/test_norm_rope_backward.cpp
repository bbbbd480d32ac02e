// The sm80 kernels of the gradients of norms against float64, rows against themselves in other company and elsewhere in
// memory. Runs on the host model, and on a GPU where it is built for one.
#include "norm_rope_backward_cases.h"
#if !defined(DSV4_ON_GPU)
#include "simt/control.h"
#endif

namespace {

using namespace dsv4;
using namespace dsv4::testing;

std::string text(int64_t value) { return std::to_string(value) + " "; }

template <class X>
void check_norm(const NormCase& c) {
  const std::string wrong = try_norm_gradient<X>(c);
  CHECK_MESSAGE(wrong.empty(), "rows " + text(c.rows) + "dim " + text(c.dim) + "rope " + text(c.rope_dim) + "weight " +
                                   text(c.weight) + "shift " + text(c.shift) + "size " + std::to_string(c.size) +
                                   (sizeof(X) == 2 ? " bfloat16: " : " float32: ") + wrong);
}

template <class X>
void check_queries(const QueryCase& c) {
  const std::string wrong = try_query_gradient<X>(c);
  CHECK_MESSAGE(wrong.empty(), "tokens " + text(c.tokens) + "heads " + text(c.heads) + "dim " + text(c.dim) + "rope " +
                                   text(c.rope_dim) + "shift " + text(c.shift) + "size " + std::to_string(c.size) +
                                   (sizeof(X) == 2 ? " bfloat16: " : " float32: ") + wrong);
}

// Of lanes, of warps, of two eights a thread, and longer ones.
TEST(rows_of_every_dim) {
  if (no_device()) return;
  for (const int64_t dim : {2, 7, 8, 9, 33, 64, 72, 255, 256, 257, 264, 512, 520, 1000, 1536, 2049}) {
    for (const int weight : {0, 1, 2}) {
      check_norm<bf16>({5, dim, -1, weight});
      check_norm<float>({6, dim, -1, weight});
    }
    for (const int64_t rope_dim : {int64_t{0}, int64_t{2}, dim / 4 * 2, dim / 16 * 8}) {
      check_norm<bf16>({5, dim, rope_dim, 1});
      check_norm<float>({5, dim, rope_dim, 2});
    }
  }
  for (const int64_t dim : {4096, 4104, 7168, 8192, 8200, 9001}) {
    check_norm<bf16>({5, dim, -1, 2});
    check_norm<float>({5, dim, dim % 8 == 0 ? 64 : -1, 1});
  }
}

TEST(rows_of_one_dim) {
  if (no_device()) return;
  check_norm<float>({5, 1, -1, 1});
  check_norm<bf16>({5, 1, 0, 2});
}

// Pieces that are whole, short or missing at the end of a block; more than eight pieces for each of their groups.
TEST(rows_of_every_count) {
  if (no_device()) return;
  for (const int64_t rows : {0, 1, 3, 4, 5, 8, 9, 31, 70, 130}) {
    for (const int64_t dim : {24, 64, 136, 512}) {
      check_norm<bf16>({rows, dim, -1, 1});
      check_norm<float>({rows, dim, 8, 2});
    }
  }
  check_norm<bf16>({0, 64, -1, 0});
  check_norm<bf16>({1100, 8, -1, 2});
  check_norm<float>({2100, 264, -1, 2});
  check_norm<float>({9000, 5, -1, 1});
}

TEST(rows_of_any_size_anywhere_in_memory) {
  if (no_device()) return;
  for (const int64_t dim : {96, 512, 1536}) {
    for (const float size : {1e-20f, 1e-3f, 1e9f, 1e13f, 1e19f, 1e30f, 1e36f}) {
      check_norm<bf16>({3, dim, -1, 1, size});
      check_norm<float>({3, dim, -1, 2, size});
      check_norm<bf16>({3, dim, 32, 2, size});
    }
    check_norm<bf16>({5, dim, -1, 1, 3, 1});
    check_norm<float>({5, dim, 32, 2, 3, 3});
  }
}

template <class X>
bool same(DeviceTensor<X>& a, DeviceTensor<X>& b, int64_t rows) {
  for (int64_t row = 0; row < rows; ++row) {
    if (memcmp(&a.at(row), &b.at(row), static_cast<size_t>(a.inner()) * sizeof(X)) != 0) return false;
  }
  return true;
}

// Neither other rows nor where rows lie changes a bit of x's gradient; the latter none of the weight's.
template <class X>
void check_company(int64_t dim, int64_t rope_dim) {
  const NormCase all = {19, dim, rope_dim, 2};
  NormGradientProblem<X> whole(all);
  CHECK(whole.run().empty());
  for (const int64_t rows : {1, 4, 7}) {
    NormCase few = all;
    few.rows = rows;
    NormGradientProblem<X> p(few);
    CHECK(p.run().empty());
    CHECK(same(p.grad_x, whole.grad_x, rows));
  }
  NormCase elsewhere = all;
  elsewhere.shift = 1;
  NormGradientProblem<X> p(elsewhere);
  CHECK(p.run().empty());
  CHECK(same(p.grad_x, whole.grad_x, all.rows));
  CHECK(memcmp(&p.wide_grad.at(0), &whole.wide_grad.at(0), static_cast<size_t>(dim) * 4) == 0);
}

TEST(rows_do_not_depend_on_company_or_place) {
  if (no_device()) return;
  for (const int64_t dim : {40, 128, 512, 1032, 4104}) {
    check_company<bf16>(dim, 8);
    check_company<float>(dim, 8);
  }
}

template <class X>
void check_not_finite(float value, int64_t dim) {
  NormGradientProblem<X> clean({9, dim}), p({9, dim});
  p.grad.at(1, 5) = from_float<X>(value);
  p.x.at(4, 7) = from_float<X>(value);
  p.upload();
  CHECK(clean.run().empty());
  CHECK(p.run().empty());
  for (int64_t row = 0; row < 9; ++row) {
    bool spoilt = false;
    for (int64_t d = 0; d < dim; ++d) spoilt = spoilt || std::isnan(to_float(p.grad_x.at(row, d)));
    CHECK(spoilt == (row == 1 || row == 4));
    if (!spoilt) CHECK(memcmp(&p.grad_x.at(row), &clean.grad_x.at(row), static_cast<size_t>(dim) * sizeof(X)) == 0);
  }
  CHECK(!std::isfinite(p.wide_grad.at(5)) && !std::isfinite(p.wide_grad.at(7)));
}

TEST(what_is_not_finite_stays_in_its_row) {
  if (no_device()) return;
  for (const float value : {NAN, INFINITY, -INFINITY}) {
    for (const int64_t dim : {96, 512}) {
      check_not_finite<bf16>(value, dim);
      check_not_finite<float>(value, dim);
    }
  }
}

TEST(queries_of_every_count) {
  if (no_device()) return;
  for (const int64_t tokens : {0, 1, 5}) {
    for (const int64_t heads : {1, 3, 16}) {
      check_queries<bf16>({tokens, heads, 128, 64});
      check_queries<float>({tokens, heads, 128, 64});
    }
  }
  check_queries<bf16>({2, 64, 512, 64});
  check_queries<float>({2, 5, 512, 64});
}

TEST(queries_of_every_dim) {
  if (no_device()) return;
  for (const int64_t dim : {1, 2, 7, 8, 9, 33, 40, 64, 65, 96, 100, 255, 256, 257, 264, 512, 520, 777, 1032}) {
    for (const int64_t rope_dim : {int64_t{0}, int64_t{2}, dim / 4 * 2, dim / 16 * 8, dim / 2 * 2}) {
      if (rope_dim > dim) continue;
      check_queries<bf16>({3, 3, dim, rope_dim});
      check_queries<float>({3, 3, dim, rope_dim});
    }
  }
}

template <class X>
void check_any_operand(int weight) {
  for (const int64_t dim : {64, 512}) {
    check_norm<X>({5, dim, 16, weight});
    check_queries<X>({3, 2, dim, 16});
  }
}

// Each operand and result alone: what is believed of one must not be concluded from another.
TEST(any_operand_anywhere_in_memory) {
  if (no_device()) return;
  for (const int weight : {1, 2}) {
    each_odd_tensor([weight] { check_any_operand<bf16>(weight); });
    each_odd_tensor([weight] { check_any_operand<float>(weight); });
  }
}

#if !defined(DSV4_ON_GPU)

template <class X>
void check_far_rows() {
  for (const int64_t shift : {0, 1}) {
    for (const int64_t dim : {40, 512, 8200}) check_norm<X>({5, dim, 8, 2, 3, shift});
    for (const int64_t dim : {40, 512}) check_queries<X>({3, 2, dim, 8, 3, shift});
  }
}

TEST(offsets_beyond_32_bits) {
  const RowsApart apart;
  check_far_rows<bf16>();
  check_far_rows<float>();
}

#endif

TEST(queries_of_any_size_anywhere_in_memory) {
  if (no_device()) return;
  for (const float size : {1e-12f, 1e-3f, 1e4f, 1e13f, 1e16f, 1e19f}) {
    check_queries<bf16>({9, 2, 512, 64, size});
    check_queries<float>({9, 2, 512, 64, size});
    check_queries<float>({9, 2, 40, 8, size});
  }
  for (const int64_t shift : {1, 3}) {
    check_queries<bf16>({3, 3, 128, 64, 3, shift});
    check_queries<float>({3, 3, 512, 64, 3, shift});
  }
}

// In float32 the sum of squares is 514, whose mean lies in the middle of two bfloat16 numbers: each lane's last six
// squares, 2^-22, are lost. The exact mean is nearer to the upper one.
TEST(means_that_are_nearly_ties) {
  if (no_device()) return;
  QueryGradientProblem<bf16> p({3, 2, 512, 64});
  for (int64_t d = 0, large = 0; d < 512; ++d) {
    const bool small = d >= 256 && d % 8 >= 2;
    const float value = small ? 0x1p-11f : large < 253 ? 1.0f : large < 316 ? 2.0f : 1.5f;
    if (!small) ++large;
    p.query.at(1, d) = from_float<bf16>(value);
  }
  p.upload();
  CHECK(p.run().empty());
  const std::string wrong = p.wrong();
  CHECK_MESSAGE(wrong.empty(), wrong);
}

template <class X>
void check_heads(int64_t dim) {
  const QueryCase all = {11, 3, dim, 32};
  QueryGradientProblem<X> whole(all);
  CHECK(whole.run().empty());
  for (const int64_t tokens : {1, 4, 7}) {
    QueryCase few = all;
    few.tokens = tokens;
    QueryGradientProblem<X> p(few);
    CHECK(p.run().empty());
    CHECK(same(p.result, whole.result, tokens));
  }
  QueryCase elsewhere = all;
  elsewhere.shift = 1;
  QueryGradientProblem<X> p(elsewhere);
  CHECK(p.run().empty());
  CHECK(same(p.result, whole.result, all.tokens));
  p.grad.at(2, dim + 5) = from_float<X>(NAN);
  p.query.at(4, 2 * dim + 9) = from_float<X>(INFINITY);
  p.upload();
  CHECK(p.run().empty());
  for (int64_t t = 0; t < all.tokens; ++t) {
    for (int64_t h = 0; h < 3; ++h) {
      bool spoilt = false;
      for (int64_t d = 0; d < dim; ++d) spoilt = spoilt || std::isnan(to_float(p.result.at(t, h * dim + d)));
      CHECK(spoilt == ((t == 2 && h == 1) || (t == 4 && h == 2)));
      const size_t bytes = static_cast<size_t>(dim) * sizeof(X);
      if (!spoilt) CHECK(memcmp(&p.result.at(t, h * dim), &whole.result.at(t, h * dim), bytes) == 0);
    }
  }
}

TEST(heads_do_not_depend_on_company_or_place) {
  if (no_device()) return;
  for (const int64_t dim : {40, 128, 512, 520}) {
    check_heads<bf16>(dim);
    check_heads<float>(dim);
  }
}

}  // namespace
