// Norms, rotations, their gradients, store_window and hadamard without torch: the vector kernels against the scalar
// ones bit for bit, on several numbers of threads, between guard bands; the encoders against all codes; the validation
// messages.
#include <cmath>
#include <cstring>
#include <string>

#include "common/hardware.h"
#include "common/pages.h"
#include "common/thread_pool.h"
#include "native/check.h"
#include "native/kernels.h"
#include "ops/norm_rope.h"
#include "ops/quantize.h"

namespace {

using namespace dsv4;
using testing::check_all_equal;
using testing::Guarded;
using testing::Random;

void fill_rope(Guarded<float>& rope, Random& random) {
  for (int64_t i = 0; i < rope.size(); i += 2) {
    const float angle = random.uniform(-50, 50);
    rope[i] = std::cos(angle);
    rope[i + 1] = std::sin(angle);
  }
}

template <class X>
void queries(int64_t tokens, int64_t heads, int64_t dim, int64_t rope_dim) {
  Random random(static_cast<uint64_t>(tokens * 1000 + dim));
  Guarded<X> q({tokens, heads, dim});
  Guarded<float> rope({tokens, rope_dim / 2, 2});
  q.fill(random, -4, 4);
  fill_rope(rope, random);
  check_all_equal<Guarded<X>>(
      [&](const Context& context) {
        Guarded<X> result({tokens, heads, dim});
        CHECK(query_norm_rope({q.template any<3>(), rope.any<3>(), 1e-6, result.template any<3>()}, context).is_ok());
        return result;
      },
      "query_norm_rope");
  CHECK(q.intact() && rope.intact());
}

TEST(query_norm_rope_of_every_shape) {
  for (const int64_t tokens : {0, 1, 7}) {
    for (const int64_t dim : {32, 64, 512}) {
      for (const int64_t rope_dim : {int64_t{0}, int64_t{32}, dim}) {
        queries<bf16>(tokens, 3, dim, rope_dim);
        queries<float>(tokens, 3, dim, rope_dim);
      }
    }
  }
}

// The sums of a head go in another order in vectors, so that a result may differ by a rounding; threads change nothing.
template <class X>
void gradients(int64_t tokens, int64_t heads, int64_t dim, int64_t rope_dim) {
  Random random(static_cast<uint64_t>(tokens * 1000 + dim));
  Guarded<X> grad({tokens, heads, dim}), q({tokens, heads, dim});
  Guarded<float> rope({tokens, rope_dim / 2, 2});
  grad.fill(random, -1, 1);
  q.fill(random, -4, 4);
  fill_rope(rope, random);
  const auto run = [&](Isa isa, int threads) {
    ThreadPool pool(threads);
    Guarded<X> result({tokens, heads, dim});
    const Status status = query_norm_rope_backward(
        {grad.template any<3>(), q.template any<3>(), rope.any<3>(), 1e-6, result.template any<3>()},
        testing::context_of(pool, isa));
    CHECK_MESSAGE(status.is_ok() && result.intact(), status.message());
    return result;
  };
  const Guarded<X> expected = run(Isa::kScalar, 1);
  for (const Isa isa : {Isa::kScalar, Isa::kAvx512}) {
    if (isa > cpu_isa()) {
      testing::not_run("this machine has no AVX-512");
      continue;
    }
    const Guarded<X> found = run(isa, 1);
    for (const int threads : {2, 3}) CHECK(run(isa, threads).same_bits(found));
    for (int64_t i = 0; i < found.size(); ++i) {
      const float a = to_float(found[i]), e = to_float(expected[i]), close = sizeof(X) == 2 ? 1.0f / 128 : 2e-6f;
      if (!(std::fabs(a - e) <= close * std::fabs(e) + 1e-6f)) {
        CHECK_MESSAGE(false, std::to_string(a) + ", expected " + std::to_string(e));
      }
    }
  }
  CHECK(grad.intact() && q.intact() && rope.intact());
}

TEST(query_norm_rope_backward_of_every_shape) {
  for (const int64_t tokens : {0, 1, 7}) {
    for (const int64_t dim : {31, 32, 64, 512}) {
      for (const int64_t rope_dim : {int64_t{0}, dim / 32 * 32, dim / 2 * 2}) {
        gradients<bf16>(tokens, 3, dim, rope_dim);
        gradients<float>(tokens, 3, dim, rope_dim);
      }
    }
  }
}

// rms_norm's with a weight and without, and kv_norm_rope's; W is the type of the weight.
template <class X, class W>
void row_gradients(int64_t rows, int64_t dim, int64_t rope_dim) {
  Random random(static_cast<uint64_t>(rows * 1000 + dim));
  Guarded<X> grad({rows, dim}), x({rows, dim});
  Guarded<W> weight({dim});
  Guarded<float> rope({rows, rope_dim / 2, 2});
  grad.fill(random, -1, 1);
  x.fill(random, -4, 4);
  weight.fill(random, 0.5f, 1.5f);
  fill_rope(rope, random);
  struct Result {
    Guarded<X> x;
    Guarded<W> weight;
  };
  const auto run = [&](Isa isa, int threads, bool weighted, bool rotated) {
    ThreadPool pool(threads);
    const Context context = testing::context_of(pool, isa);
    Result result{Guarded<X>({rows, dim}), Guarded<W>({weighted ? dim : 0})};
    NormRopeBackwardParams p{
        grad.template any<2>(), x.template any<2>(), {}, {}, 1e-6, result.x.template any<2>(), {}, {}};
    if (weighted) p.weight = weight.template any<1>(), p.grad_weight = result.weight.template any<1>();
    if (rotated) p.rope = rope.any<3>();
    testing::Scratch scratch(norm_rope_backward_workspace_bytes(p, context));
    p.workspace = scratch.workspace();
    const Status status = rotated ? kv_norm_rope_backward(p, context) : rms_norm_backward(p, context);
    CHECK_MESSAGE(status.is_ok() && result.x.intact() && result.weight.intact() && scratch.intact(), status.message());
    return result;
  };
  const auto near = [](const auto& found, const auto& expected, float close) {
    for (int64_t i = 0; i < found.size(); ++i) {
      const float a = to_float(found[i]), e = to_float(expected[i]);
      if (!(std::fabs(a - e) <= close * std::fabs(e) + 1e-6f)) {
        CHECK_MESSAGE(false, std::to_string(a) + ", expected " + std::to_string(e));
      }
    }
  };
  for (const bool weighted : {false, true}) {
    for (const bool rotated : {false, true}) {
      if (rotated && !weighted) continue;
      const Result expected = run(Isa::kScalar, 1, weighted, rotated);
      for (const Isa isa : {Isa::kScalar, Isa::kAvx512}) {
        if (isa > cpu_isa()) {
          testing::not_run("this machine has no AVX-512");
          continue;
        }
        const Result found = run(isa, 1, weighted, rotated);
        for (const int threads : {2, 3}) {
          const Result again = run(isa, threads, weighted, rotated);
          CHECK(again.x.same_bits(found.x) && again.weight.same_bits(found.weight));
        }
        near(found.x, expected.x, sizeof(X) == 2 ? 1.0f / 128 : 2e-6f);
        near(found.weight, expected.weight, sizeof(W) == 2 ? 1.0f / 128 : 2e-6f);
      }
    }
  }
  CHECK(grad.intact() && x.intact() && weight.intact() && rope.intact());
}

TEST(row_gradients_of_every_shape) {
  for (const int64_t rows : {0, 1, 5, 300}) {
    for (const int64_t dim : {31, 32, 96, 512}) {
      for (const int64_t rope_dim : {int64_t{0}, dim / 32 * 32, dim / 2 * 2}) {
        row_gradients<bf16, bf16>(rows, dim, rope_dim);
        row_gradients<bf16, float>(rows, dim, rope_dim);
        row_gradients<float, float>(rows, dim, rope_dim);
      }
    }
  }
}

// The other ops of rows, one after the other in one result.
template <class X>
void rows(int64_t tokens, int64_t heads, int64_t dim, int64_t rope_dim) {
  Random random(static_cast<uint64_t>(tokens * 1000 + dim));
  Guarded<X> x({tokens, heads, dim});
  Guarded<float> weight({dim}), rope({tokens, rope_dim / 2, 2});
  x.fill(random, -4, 4);
  weight.fill(random, 0.5f, 1.5f);
  fill_rope(rope, random);
  const AnyView<2> flat{x.data(), x.template any<3>().dtype, {tokens, dim}, {heads * dim, 1}};
  check_all_equal<Guarded<X>>(
      [&](const Context& context) {
        Guarded<X> result({4, tokens, heads, dim});
        AnyView<3> turned = x.template any<3>();
        const int64_t size = tokens * heads * dim;
        const auto place = [&](int64_t index) {
          return AnyView<2>{result.data() + index * size, turned.dtype, {tokens, dim}, {dim, 1}};
        };
        CHECK(rms_norm({flat, weight.any<1>(), 1e-6, place(0)}, context).is_ok());
        CHECK(rms_norm({flat, {}, 1e-6, place(1)}, context).is_ok());
        CHECK(kv_norm_rope({flat, weight.any<1>(), rope.any<3>(), 1e-6, place(2)}, context).is_ok());
        turned.data = result.data() + 3 * size;
        CHECK(apply_rope({x.template any<3>(), rope.any<3>(), true, turned}, context).is_ok());
        return result;
      },
      "rms_norm, kv_norm_rope, apply_rope");
  CHECK(x.intact() && weight.intact() && rope.intact());
}

TEST(rows_of_every_shape) {
  for (const int64_t tokens : {0, 1, 70}) {
    for (const int64_t dim : {32, 33, 96, 512}) {
      for (const int64_t rope_dim : {0, 2, 32}) {
        rows<bf16>(tokens, 3, dim, rope_dim);
        rows<float>(tokens, 1, dim, rope_dim);
      }
    }
  }
}

TEST(rope_tables_of_every_size) {
  for (const int64_t pairs : {0, 1, 16, 17, 32, 64}) {
    Guarded<float> frequency({pairs});
    Guarded<int32_t> position({90});
    for (int64_t i = 0; i < pairs; ++i) frequency[i] = std::pow(1.6e5f, -static_cast<float>(i) / 32);
    for (int64_t t = 0; t < 90; ++t) position[t] = static_cast<int32_t>(t < 60 ? t * t * t : 2147483647 - 7 * t);
    check_all_equal<Guarded<float>>(
        [&](const Context& context) {
          Guarded<float> result({90, pairs, 2});
          CHECK(rope_rows({position.any<1>(), frequency.any<1>(), result.any<3>()}, context).is_ok());
          for (int64_t i = 0; i < 90 * pairs; ++i) {
            const float angle = static_cast<float>(position[i / pairs]) * frequency[i % pairs];
            CHECK(std::fabs(result[2 * i] - std::cos(static_cast<double>(angle))) < 6e-8);
            CHECK(std::fabs(result[2 * i + 1] - std::sin(static_cast<double>(angle))) < 6e-8);
          }
          return result;
        },
        "rope_rows");
  }
}

TEST(query_norm_rope_has_unit_heads) {
  ThreadPool pool(1);
  Random random(1);
  Guarded<float> q({2, 2, 64}), rope({2, 16, 2}), result({2, 2, 64});
  q.fill(random, -4, 4);
  fill_rope(rope, random);
  CHECK(query_norm_rope({q.any<3>(), rope.any<3>(), 0, result.any<3>()}, pool.context()).is_ok());
  for (int64_t head = 0; head < 4; ++head) {
    double sum = 0;
    for (int64_t d = 0; d < 64; ++d) sum += static_cast<double>(result[head * 64 + d]) * result[head * 64 + d];
    CHECK(std::fabs(sum / 64 - 1) < 1e-5);
  }
}

// One call of store_window with rows of two sequences; block 1 of either has no page.
template <class X>
void window(int64_t tokens, int64_t dim, int64_t rope_dim, int64_t page_size, DType plain) {
  Random random(static_cast<uint64_t>(tokens * 100 + dim));
  Guarded<X> kv({tokens, dim});
  Guarded<float> weight({dim}), rope({tokens, rope_dim / 2, 2});
  Guarded<int32_t> table({2, 4}), sequence({tokens}), position({tokens});
  kv.fill(random, -4, 4);
  weight.fill(random, 0.5f, 1.5f);
  fill_rope(rope, random);
  for (int64_t i = 0; i < 8; ++i) table[i] = i % 4 == 1 ? -1 : static_cast<int32_t>((i * 3) % 8);
  for (int64_t t = 0; t < tokens; ++t) {
    sequence[t] = static_cast<int32_t>(t * 2 / tokens);
    position[t] = static_cast<int32_t>(t);
  }
  const int64_t bytes = plain == DType::kNone ? fp8_page_bytes(page_size, dim, rope_dim)
                                              : page_size * dim * (plain == DType::kFloat32 ? 4 : 2);
  check_all_equal<Guarded<uint8_t>>(
      [&](const Context& context) {
        Guarded<uint8_t> pages({8, bytes});
        std::memset(pages.data(), 0x5A, static_cast<size_t>(pages.size()));
        RowPool pool{};
        if (plain == DType::kNone) {
          pool.bytes = pages.any<2>();
        } else {
          pool.plain = {pages.data(), plain, {8, page_size, dim}, {page_size * dim, dim, 1}};
        }
        pool.table = table.any<2>();
        pool.page_size = page_size;
        StoreWindowParams p{kv.template any<2>(), weight.any<1>(),   rope.any<3>(), pool,
                            sequence.any<1>(),    position.any<1>(), 1e-6,          {}};
        testing::Scratch scratch(store_window_workspace_bytes(p, context));
        p.workspace = scratch.workspace();
        const Status status = store_window(p, context);
        CHECK_MESSAGE(status.is_ok(), status.message());
        CHECK(scratch.intact());
        return pages;
      },
      "store_window");
  CHECK(kv.intact() && weight.intact() && rope.intact() && table.intact());
}

TEST(store_window_of_every_format) {
  for (const DType plain : {DType::kNone, DType::kFloat32, DType::kBFloat16}) {
    for (const int64_t tokens : {1, 6, 40}) {
      for (const int64_t page_size : {1, 5, 16}) {
        window<bf16>(tokens, 512, 64, page_size, plain);
        window<float>(tokens, 128, 64, page_size, plain);
        window<bf16>(tokens, 96, 0, page_size, plain);
      }
    }
  }
}

template <class X>
void rotations(int64_t rows, int64_t size) {
  Random random(static_cast<uint64_t>(rows + size));
  Guarded<X> x({rows, size});
  x.fill(random, -4, 4);
  check_all_equal<Guarded<X>>(
      [&](const Context& context) {
        Guarded<X> result({rows, size});
        HadamardParams p{x.template any<2>(), result.template any<2>(), {}};
        testing::Scratch scratch(hadamard_workspace_bytes(p, context));
        p.workspace = scratch.workspace();
        CHECK(hadamard(p, context).is_ok() && scratch.intact());
        return result;
      },
      "hadamard");
}

TEST(hadamard_of_every_size) {
  for (int64_t size = 1; size <= 2048; size *= 2) {
    rotations<bf16>(5, size);
    rotations<float>(5, size);
  }
}

TEST(e4m3_codes_are_the_nearest) {
  for (int code = 0; code < 0x7F; ++code) {
    const float value = e4m3_value(static_cast<uint8_t>(code));
    CHECK(e4m3_code(value) == code);
    CHECK(e4m3_code(-value) == (code | 0x80));
    if (code == 0x7E) continue;
    const float next = e4m3_value(static_cast<uint8_t>(code + 1)), middle = (value + next) / 2;
    CHECK(e4m3_code(middle) == code + code % 2);
    CHECK(e4m3_code(std::nextafter(middle, 0.f)) == code);
    CHECK(e4m3_code(std::nextafter(middle, 1e9f)) == code + 1);
  }
  CHECK(e4m3_code(1e30f) == 0x7E);
}

TEST(e2m1_codes_are_the_nearest) {
  for (int code = 0; code < 8; ++code) {
    const float value = e2m1_value(static_cast<uint8_t>(code));
    CHECK(e2m1_code(value) == code);
    CHECK(e2m1_code(-value) == (code | 8));
    if (code == 7) continue;
    const float middle = (value + e2m1_value(static_cast<uint8_t>(code + 1))) / 2;
    CHECK(e2m1_code(middle) == code + code % 2);
    CHECK(e2m1_code(std::nextafter(middle, 0.f)) == code);
    CHECK(e2m1_code(std::nextafter(middle, 9.f)) == code + 1);
  }
  CHECK(e2m1_code(100.f) == 7);
}

TEST(scales_are_powers_of_two_that_hold_the_block) {
  for (const float amax : {448.f, 449.f, 1.f, 0.875f, 3e38f, 6.f, 6.001f}) {
    const uint8_t fp8 = fp8_scale(bits_from_float(amax)), fp4 = fp4_scale(bits_from_float(amax));
    CHECK(amax * inverse_scale(fp8) <= 448.f && amax * inverse_scale(fp8) > 224.f);
    CHECK(amax * inverse_scale(fp4) <= 6.f && amax * inverse_scale(fp4) > 3.f);
  }
  CHECK(fp8_scale(0) == 127 - 22);
  CHECK(fp4_scale(0) == 1);
  CHECK(fp8_scale(0x7F800000u) == 255 && fp4_scale(0x7FC00000u) == 255);
}

TEST(messages) {
  ThreadPool pool(1);
  Guarded<float> q({2, 2, 32}), rope({2, 17, 2}), short_rope({1, 8, 2}), x({2, 12}), result({2, 2, 32});
  Status status = query_norm_rope({q.any<3>(), rope.any<3>(), 1e-6, result.any<3>()}, pool.context());
  CHECK_MESSAGE(std::string(status.message()) == "query_norm_rope: rope must have at most 16 pairs, got 17",
                status.message());
  status = query_norm_rope({q.any<3>(), short_rope.any<3>(), 1e-6, result.any<3>()}, pool.context());
  CHECK_MESSAGE(
      std::string(status.message()) == "query_norm_rope: rope must be float32 [2, *, 2], got float32 [1, 8, 2]",
      status.message());
  Guarded<float> grad({1, 2, 32});
  status = query_norm_rope_backward({grad.any<3>(), q.any<3>(), rope.any<3>(), 1e-6, result.any<3>()}, pool.context());
  CHECK_MESSAGE(std::string(status.message()) ==
                    "query_norm_rope_backward: grad must be float32 [2, 2, 32], got float32 [1, 2, 32]",
                status.message());
  Guarded<float> row({2, 32}), weight({31}), to({2, 32});
  NormRopeBackwardParams p{row.any<2>(), row.any<2>(), weight.any<1>(), {}, 1e-6, to.any<2>(), weight.any<1>(), {}};
  status = rms_norm_backward(p, pool.context());
  CHECK_MESSAGE(std::string(status.message()) == "rms_norm_backward: weight must be float32 [32], got float32 [31]",
                status.message());
  p.weight = {};
  status = kv_norm_rope_backward(p, pool.context());
  CHECK_MESSAGE(
      std::string(status.message()) == "kv_norm_rope_backward: weight must be bfloat16 or float32, got nothing",
      status.message());
  status = hadamard({x.any<2>(), x.any<2>(), {}}, pool.context());
  CHECK_MESSAGE(std::string(status.message()) == "hadamard: the last dimension of x must be a power of two, got 12",
                status.message());
}

}  // namespace
