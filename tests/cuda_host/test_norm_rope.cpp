// The sm80 kernels of norms and rotations against the scalar ones, bit for bit, and rows against themselves in other
// company. Runs on the host model, and on a GPU where it is built for one.
#include "norm_rope_cases.h"
#if !defined(DSV4_ON_GPU)
#include "simt/control.h"
#endif

namespace {

using namespace dsv4;
using namespace dsv4::testing;

bool no_device() {
  if (has_device()) return false;
  not_run("no CUDA device");
  return true;
}

std::string text(int64_t value) { return std::to_string(value) + " "; }

template <class X>
void check_queries(const QueryCase& c) {
  const std::string wrong = try_queries<X>(c);
  CHECK_MESSAGE(wrong.empty(), "tokens " + text(c.tokens) + "heads " + text(c.heads) + "dim " + text(c.dim) + "rope " +
                                   text(c.rope_dim) + "shift " + text(c.shift) + "size " + std::to_string(c.size) +
                                   ": " + wrong);
}

template <class X>
void check_window(const WindowCase& c) {
  const std::string wrong = try_window<X>(c);
  CHECK_MESSAGE(wrong.empty(), "format " + text(static_cast<int>(c.format)) + "tokens " + text(c.tokens) + "dim " +
                                   text(c.dim) + "rope " + text(c.rope_dim) + "page size " + text(c.page_size) +
                                   "shift " + text(c.shift) + "size " + std::to_string(c.size) + ": " + wrong);
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
  for (const int64_t dim : {1, 2, 7, 8, 9, 33, 40, 63, 64, 65, 96, 100, 255, 256, 257, 512, 520, 777, 1030}) {
    for (const int64_t rope_dim : {int64_t{0}, int64_t{2}, dim / 4 * 2, dim / 2 * 2}) {
      if (rope_dim > dim) continue;
      check_queries<bf16>({3, 3, dim, rope_dim});
      check_queries<float>({3, 3, dim, rope_dim});
    }
  }
}

// Beside eps, and where squares or their sum are more than float32 holds.
TEST(queries_of_any_size) {
  if (no_device()) return;
  for (const float size : {0.0f, 1e-30f, 1e-12f, 1e-3f, 1e4f, 1e16f, 1.7e19f, 1e20f, 3e38f}) {
    check_queries<bf16>({9, 2, 512, 64, size});
    check_queries<float>({9, 2, 512, 64, size});
    check_queries<float>({9, 2, 40, 8, size});
  }
}

TEST(queries_anywhere_in_memory) {
  if (no_device()) return;
  for (const int64_t shift : {1, 3}) {
    check_queries<bf16>({3, 3, 128, 64, 3, shift});
    check_queries<float>({3, 3, 520, 64, 3, shift});
  }
}

template <class X>
void check_not_finite(float value) {
  QueryProblem<X> p({4, 3, 96, 32});
  p.query.at(1, 100) = from_float<X>(value);
  p.query.at(2, 3) = from_float<X>(value);
  p.query.upload();
  CHECK(p.run().empty());
  const std::string wrong = p.wrong();
  CHECK_MESSAGE(wrong.empty(), wrong);
}

TEST(queries_that_are_not_finite) {
  if (no_device()) return;
  for (const float value : {NAN, INFINITY, -INFINITY}) {
    check_not_finite<bf16>(value);
    check_not_finite<float>(value);
  }
}

TEST(windows_of_every_format) {
  if (no_device()) return;
  for (const PageFormat format : {PageFormat::kFp8Rows, PageFormat::kFloat32, PageFormat::kBFloat16}) {
    for (const int64_t page_size : {1, 4, 256}) {
      for (const bool wide_weight : {false, true}) {
        check_window<bf16>({13, 512, 64, format, page_size, wide_weight});
        check_window<float>({13, 128, 64, format, page_size, wide_weight});
      }
    }
  }
}

TEST(windows_of_every_dim) {
  if (no_device()) return;
  for (const PageFormat format : {PageFormat::kFp8Rows, PageFormat::kFloat32, PageFormat::kBFloat16}) {
    for (const int64_t dim : {1, 2, 7, 9, 33, 40, 63, 64, 65, 96, 129, 160, 256, 264, 520, 777}) {
      for (const int64_t rope_dim : {int64_t{0}, int64_t{2}, dim / 4 * 2, int64_t{16}}) {
        if (rope_dim >= dim) continue;
        check_window<bf16>({7, dim, rope_dim, format});
        check_window<float>({7, dim, rope_dim, format});
      }
    }
  }
}

TEST(windows_anywhere_in_memory) {
  if (no_device()) return;
  for (const PageFormat format : {PageFormat::kFp8Rows, PageFormat::kFloat32, PageFormat::kBFloat16}) {
    check_window<bf16>({13, 512, 64, format, 4, true, 3, 1});
    check_window<float>({13, 96, 32, format, 4, false, 3, 3});
  }
}

TEST(windows_of_any_size) {
  if (no_device()) return;
  for (const float size : {0.0f, 1e-20f, 1e-7f, 1e-3f, 448.0f, 1e9f, 1e18f, 1e30f}) {
    for (const PageFormat format : {PageFormat::kFp8Rows, PageFormat::kFloat32}) {
      check_window<bf16>({13, 512, 64, format, 4, true, size});
      check_window<float>({13, 40, 8, format, 4, true, size});
    }
  }
}

// Rows whose norm is 1 keep their values: ties, denormal codes, the largest code, the floor of the scale.
TEST(window_codes_at_the_edges) {
  if (no_device()) return;
  for (const float scale : {1.0f, 1e-4f, 0x1p-20f, 448.0f, 1e30f}) {
    WindowProblem<bf16> p({40, 192, 64});
    for (int64_t t = 0; t < 40; ++t) {
      for (int64_t d = 0; d < 192; ++d)
        p.kv.at(t, d) = from_float<bf16>(static_cast<float>((t * 64 + d) % 1024 - 512) / 64);
    }
    for (int64_t d = 0; d < 192; ++d) p.wide_weight.at(d) = scale;
    p.upload();
    CHECK(p.run().empty());
    const std::string wrong = p.wrong();
    CHECK_MESSAGE(wrong.empty(), wrong);
  }
}

TEST(windows_drop_what_has_no_place) {
  if (no_device()) return;
  WindowProblem<bf16> p({9, 128, 64});
  const int32_t sequences[] = {-1, 3, INT32_MIN, INT32_MAX, 0, 0, 0, 1, 2};
  const int32_t positions[] = {0, 0, 1, 2, -1, INT32_MIN, INT32_MAX, 1 << 30, 20};
  for (int64_t t = 0; t < 9; ++t) p.sequence.at(t) = sequences[t], p.position.at(t) = positions[t];
  p.upload();
  CHECK(p.run().empty());
  CHECK(p.pool.wrong_bytes().empty());  // `expected` is as it was
}

template <class X>
void check_company() {
  const QueryCase all = {11, 3, 520, 64};
  QueryProblem<X> whole(all);
  CHECK(whole.run().empty());
  for (const int64_t tokens : {1, 4, 7}) {
    QueryCase few = all;
    few.tokens = tokens;
    QueryProblem<X> p(few);
    CHECK(p.run().empty());
    CHECK(memcmp(&p.result.at(0), &whole.result.at(0), static_cast<size_t>(tokens * 3 * 520) * sizeof(X)) == 0);
  }
}

TEST(rows_do_not_depend_on_their_company) {
  if (no_device()) return;
  check_company<bf16>();
  check_company<float>();
}

// The list of candidates leads here.
TEST(the_ops_run_the_kernels) {
  if (no_device()) return;
  QueryProblem<bf16> direct({3, 4, 128, 64}), queries({3, 4, 128, 64});
  CHECK(direct.run().empty());
  Status status = query_norm_rope(
      {view_of<3>(queries.query, false), view_of<3>(queries.rope, false), kRowEps, view_of<3>(queries.result, false)},
      cuda_context());
  CHECK_MESSAGE(status.is_ok() && finish_device(), status.message());
  queries.result.download();
  CHECK(memcmp(&queries.result.at(0), &direct.result.at(0), 3 * 4 * 128 * 2) == 0);
  WindowProblem<bf16> window({13, 128, 64});
  const StoreWindowParams p = window.params(false);
  CHECK(store_window_workspace_bytes(p, cuda_context()) == 0);
  status = store_window(p, cuda_context());
  CHECK_MESSAGE(status.is_ok() && finish_device(), status.message());
  CHECK(window.wrong().empty());
}

#if !defined(DSV4_ON_GPU)

// Lanes exchange by shuffles alone: whatever the order of threads, the same bits, and nothing to synchronise.
TEST(any_order_of_threads) {
  simt::forget_sites();
  for (int seed = 0; seed < 24; ++seed) {
    simt::Options options;
    options.seed = static_cast<uint64_t>(seed);
    options.schedule = static_cast<simt::Schedule>(seed % 3);
    simt::configure(options);
    check_queries<bf16>({3, 5, 96, 32});
    check_queries<float>({2, 3, 264, 64});
    check_queries<bf16>({3, 2, 40, 8, 1e20f});
    check_window<bf16>({7, 192, 64});
    check_window<float>({7, 40, 8});
  }
  simt::configure({});
  CHECK(simt::sites_met().empty());
}

#endif

}  // namespace
