// The sm80 kernels of norms and rotations against the scalar ones, bit for bit, and rows against themselves in other
// company. Runs on the host model, and on a GPU where it is built for one.
#include "norm_rope_cases.h"
#if !defined(DSV4_ON_GPU)
#include "simt/control.h"
#endif

namespace {

using namespace dsv4;
using namespace dsv4::testing;

std::string text(int64_t value) { return std::to_string(value) + " "; }

template <class X>
void check_queries(const QueryCase& c) {
  const std::string wrong = try_queries<X>(c);
  CHECK_MESSAGE(wrong.empty(), "op " + text(static_cast<int>(c.op)) + "tokens " + text(c.tokens) + "heads " +
                                   text(c.heads) + "dim " + text(c.dim) + "rope " + text(c.rope_dim) + "shift " +
                                   text(c.shift) + "size " + std::to_string(c.size) + ": " + wrong);
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
void check_norm(const NormCase& c) {
  const std::string wrong = try_norm<X>(c);
  CHECK_MESSAGE(wrong.empty(), "rows " + text(c.rows) + "dim " + text(c.dim) + "rope " + text(c.rope_dim) + "weight " +
                                   text(c.weight) + "size " + std::to_string(c.size) + ": " + wrong);
}

TEST(rotations_there_and_back) {
  if (no_device()) return;
  for (const HeadOp op : {HeadOp::kApplyRope, HeadOp::kApplyRopeBack}) {
    for (const int64_t dim : {1, 2, 7, 33, 40, 64, 96, 128, 257, 512}) {
      for (const int64_t rope_dim : {int64_t{0}, int64_t{2}, dim / 4 * 2, dim / 2 * 2}) {
        if (rope_dim > dim) continue;
        check_queries<bf16>({3, 3, dim, rope_dim, 3, 0, op});
        check_queries<float>({3, 1, dim, rope_dim, 3, 0, op});
      }
    }
    check_queries<bf16>({0, 3, 128, 64, 3, 0, op});
    check_queries<bf16>({3, 3, 128, 64, 3, 3, op});
    check_queries<float>({3, 3, 128, 64, 3, 1, op});
  }
}

// Dims that pass keep their bits, NaNs among them.
TEST(rotations_pass_the_other_dims) {
  if (no_device()) return;
  for (const int64_t rope_dim : {32, 30, 6}) {
    QueryProblem<bf16> p({2, 2, 96, rope_dim, 3, 0, HeadOp::kApplyRope});
    for (int64_t d = 0; d < 96 - rope_dim; ++d) p.query.at(1, d) = bf16{static_cast<uint16_t>(0xFF81 + d)};
    p.query.upload();
    CHECK(p.run().empty());
    CHECK(memcmp(&p.result.at(1), &p.query.at(1), static_cast<size_t>(96 - rope_dim) * 2) == 0);
    CHECK(p.wrong().empty());
  }
}

// Positions of either type; angles of few and of many turns.
TEST(rotation_tables) {
  if (no_device()) return;
  for (const bool wide : {false, true}) {
    const std::vector<int64_t> positions = {0, 1, 2, 17, 4095, 65537, 1 << 20, (1 << 30) + 12345, INT32_MAX, -3};
    const int64_t tokens = static_cast<int64_t>(positions.size());
    DeviceTensor<int32_t> narrow({tokens}), words({2 * tokens});
    DeviceTensor<float> frequency({33}), result({tokens, 33, 2});
    for (int64_t t = 0; t < tokens; ++t) {
      narrow.at(t) = static_cast<int32_t>(positions[static_cast<size_t>(t)]);
      memcpy(&words.at(2 * t), &positions[static_cast<size_t>(t)], 8);
    }
    for (int64_t i = 0; i < 33; ++i) frequency.at(i) = std::pow(10000.0f, -static_cast<float>(i) / 32);
    narrow.upload();
    words.upload();
    frequency.upload();
    std::vector<float> expected(static_cast<size_t>(tokens) * 66);
    for (const bool on_host : {true, false}) {
      AnyView<1> position = wide ? view_of<1>(words, on_host) : view_of<1>(narrow, on_host);
      if (wide) position.dtype = DType::kInt64, position.shape[0] = tokens;
      RopeRowsParams p = {position, view_of<1>(frequency, on_host), view_of<3>(result, on_host)};
      if (on_host) p.result.data = expected.data();
      const Status status =
          on_host ? rope_table_rows(scalar::Lanes(), p, scalar_context()) : rope_rows(p, cuda_context());
      CHECK_MESSAGE(status.is_ok(), status.message());
    }
    CHECK(finish_device());
    result.download();
    CHECK(result.intact());
    for (int64_t t = 0; t < tokens; ++t) {
      for (int64_t i = 0; i < 66; ++i) {
        CHECK_MESSAGE(result.at(t, i) == expected[static_cast<size_t>(t * 66 + i)],
                      "position " + text(positions[static_cast<size_t>(t)]) + "element " + text(i));
      }
    }
  }
}

TEST(index_queries) {
  if (no_device()) return;
  for (int64_t dim = 2; dim <= 1024; dim *= 2) {
    for (const int64_t rope_dim : {int64_t{0}, int64_t{2}, dim / 2, dim}) {
      if (rope_dim % 2 != 0) continue;
      check_queries<bf16>({3, 5, dim, rope_dim, 3, 0, HeadOp::kIndexQuery});
      check_queries<float>({2, 3, dim, rope_dim, 3, 0, HeadOp::kIndexQuery});
    }
  }
  check_queries<bf16>({0, 5, 128, 64, 3, 0, HeadOp::kIndexQuery});
  check_queries<bf16>({7, 64, 128, 64, 3, 0, HeadOp::kIndexQuery});
  check_queries<bf16>({3, 5, 128, 64, 3, 1, HeadOp::kIndexQuery});
  for (const float size : {0.0f, 1e-20f, 1e-4f, 1e5f, 1e30f}) {
    check_queries<bf16>({3, 5, 128, 64, size, 0, HeadOp::kIndexQuery});
    check_queries<float>({3, 5, 128, 64, size, 0, HeadOp::kIndexQuery});
  }
}

TEST(norms_of_every_dim) {
  if (no_device()) return;
  for (const int64_t dim : {1, 7, 8, 9, 33, 64, 257, 512, 1000, 1024, 1025, 1536, 2047, 2049, 4096, 7168}) {
    for (const int weight : {0, 1, 2}) {
      check_norm<bf16>({3, dim, -1, weight});
      check_norm<float>({2, dim, -1, weight});
    }
    check_norm<bf16>({5, dim, dim / 4 * 2, 1});
    check_norm<float>({5, dim, dim > 1 ? 2 : 0, 2});
  }
  for (const int64_t rows : {0, 1, 9, 70}) {
    check_norm<bf16>({rows, 128});
    check_norm<bf16>({rows, 1032});
    check_norm<bf16>({rows, 128, 64});
  }
}

TEST(norms_of_any_size_anywhere_in_memory) {
  if (no_device()) return;
  for (const int64_t dim : {96, 1536}) {
    for (const float size : {0.0f, 1e-20f, 1e-3f, 1e9f, 1e19f, 1e30f, 3e38f}) {
      check_norm<bf16>({3, dim, -1, 1, size});
      check_norm<float>({3, dim, -1, 2, size});
      check_norm<bf16>({3, dim, 32, 2, size});
    }
    check_norm<bf16>({3, dim, -1, 1, 3, 1});
    check_norm<float>({3, dim, 32, 2, 3, 3});
  }
}

TEST(norms_that_are_not_finite) {
  if (no_device()) return;
  for (const float value : {NAN, INFINITY, -INFINITY}) {
    for (const int64_t dim : {96, 1536}) {
      NormProblem<float> p({4, dim});
      p.x.at(1, dim - 1) = value;
      p.x.at(2, 3) = value;
      p.x.upload();
      CHECK(p.run().empty());
      const std::string wrong = p.wrong();
      CHECK_MESSAGE(wrong.empty(), wrong);
    }
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

template <class X>
void check_any_operand(int weight) {
  for (const HeadOp op : {HeadOp::kQueryNormRope, HeadOp::kApplyRope, HeadOp::kIndexQuery}) {
    check_queries<X>({3, 2, 64, 16, 3, 0, op});
  }
  for (const int64_t dim : {64, 1032}) {
    for (const int64_t rope_dim : {-1, 16}) {
      const std::string wrong = try_norm<X>({3, dim, rope_dim, weight});
      CHECK_MESSAGE(wrong.empty(), wrong);
    }
  }
  for (const PageFormat format : {PageFormat::kFp8Rows, PageFormat::kFloat32, PageFormat::kBFloat16}) {
    check_window<X>({9, 64, 16, format, 4, weight == 2});
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
  for (const int64_t dim : {40, 512}) {
    for (const HeadOp op : {HeadOp::kQueryNormRope, HeadOp::kApplyRope}) check_queries<X>({3, 2, dim, 8, 3, 0, op});
    for (const int64_t rope_dim : {-1, 8}) {
      const std::string wrong = try_norm<X>({3, dim, rope_dim});
      CHECK_MESSAGE(wrong.empty(), wrong);
    }
    for (const PageFormat format : {PageFormat::kFp8Rows, PageFormat::kFloat32, PageFormat::kBFloat16}) {
      check_window<X>({9, dim, 8, format});
    }
  }
  check_queries<X>({3, 2, 128, 64, 3, 0, HeadOp::kIndexQuery});
  const std::string wrong = try_norm<X>({3, 1032});
  CHECK_MESSAGE(wrong.empty(), wrong);
}

TEST(offsets_beyond_32_bits) {
  const RowsApart apart;
  check_far_rows<bf16>();
  check_far_rows<float>();
}

#endif

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
  QueryProblem<bf16> turned({3, 4, 128, 64, 3, 0, HeadOp::kApplyRopeBack}),
      index({3, 4, 128, 64, 3, 0, HeadOp::kIndexQuery});
  status = apply_rope(
      {view_of<3>(turned.query, false), view_of<3>(turned.rope, false), true, view_of<3>(turned.result, false)},
      cuda_context());
  CHECK_MESSAGE(status.is_ok() && finish_device(), status.message());
  turned.result.download();
  CHECK(turned.wrong().empty());
  status = index_query({view_of<3>(index.query, false), view_of<3>(index.rope, false), view_of<3>(index.result, false)},
                       cuda_context());
  CHECK_MESSAGE(status.is_ok() && finish_device(), status.message());
  index.result.download();
  CHECK(index.wrong().empty());
  NormProblem<bf16> norm({3, 1536}), kv({3, 128, 64});
  status = rms_norm({view_of<2>(norm.x, false), norm.weight(false), kRowEps, view_of<2>(norm.result, false)},
                    cuda_context());
  CHECK_MESSAGE(status.is_ok() && finish_device(), status.message());
  norm.result.download();
  CHECK(norm.wrong().empty());
  status = kv_norm_rope(
      {view_of<2>(kv.x, false), kv.weight(false), view_of<3>(kv.rope, false), kRowEps, view_of<2>(kv.result, false)},
      cuda_context());
  CHECK_MESSAGE(status.is_ok() && finish_device(), status.message());
  kv.result.download();
  CHECK(kv.wrong().empty());
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
    check_queries<bf16>({3, 2, 128, 64, 3, 0, HeadOp::kIndexQuery});
    check_queries<bf16>({3, 2, 40, 8, 3, 0, HeadOp::kApplyRope});
    check_norm<bf16>({3, 520});
    check_norm<float>({3, 96, 32});
    check_window<bf16>({7, 192, 64});
    check_window<float>({7, 40, 8});
  }
  simt::configure({});
  CHECK(simt::sites_met().empty());
}

#endif

}  // namespace
