// Quantisers, their inverses and index_query without torch: the vector kernels against the scalar ones bit for bit, on
// several numbers of threads, between guard bands; the validation messages.
#include <cmath>
#include <string>

#include "native/check.h"
#include "native/kernels.h"
#include "ops/index.h"
#include "ops/quantize.h"

namespace {

using namespace dsv4;
using testing::check_all_equal;
using testing::Guarded;
using testing::Random;

constexpr int64_t ceil_div(int64_t value, int64_t divisor) { return (value + divisor - 1) / divisor; }

// Codes and, behind them, scales in one buffer, so that one comparison sees both.
template <class X>
void encoders(int64_t rows, int64_t n, int64_t block, bool fp4) {
  Random random(static_cast<uint64_t>(rows * 1000 + n));
  Guarded<X> x({rows, n});
  x.fill(random, -40, 40);
  const int64_t codes = fp4 ? n / 2 : n, blocks = ceil_div(n, block);
  check_all_equal<Guarded<uint8_t>>(
      [&](const Context& context) {
        Guarded<uint8_t> result({rows, codes + blocks});
        const AnyView<2> all = result.any<2>();
        const AnyView<2> first{all.data, DType::kUInt8, {rows, codes}, {codes + blocks, 1}};
        const AnyView<2> second{result.data() + codes, DType::kUInt8, {rows, blocks}, {codes + blocks, 1}};
        const QuantizeParams p{x.template any<2>(), block, first, second};
        const Status status = fp4 ? quantize_fp4(p, context) : quantize_fp8(p, context);
        CHECK_MESSAGE(status.is_ok(), status.message());
        return result;
      },
      fp4 ? "quantize_fp4" : "quantize_fp8");
  CHECK(x.intact());
}

TEST(quantizers_of_every_size) {
  for (const int64_t rows : {1, 5, 70}) {
    for (const int64_t n : {2, 32, 62, 160, 1024}) {
      for (const int64_t block : {32, 48, 64, 128}) {
        for (const bool fp4 : {false, true}) {
          encoders<bf16>(rows, n, block, fp4);
          encoders<float>(rows, n, block, fp4);
        }
      }
    }
  }
}

// Codes of all 256 bytes but NaN, so that equal results have equal bits.
template <class X>
void decoders(int64_t batch, int64_t rows, int64_t n, int64_t group, int64_t block, bool fp4, bool wide) {
  Random random(static_cast<uint64_t>(batch * 1000 + n));
  const int64_t width = fp4 ? n / 2 : n;
  Guarded<uint8_t> codes({batch, rows, width}), narrow({batch, ceil_div(rows, group), ceil_div(n, block)});
  Guarded<float> scale({batch, ceil_div(rows, group), ceil_div(n, block)});
  scale.fill(random, -2, 2);
  for (int64_t i = 0; i < codes.size(); ++i) {
    codes[i] = static_cast<uint8_t>((i * 37) % 256);
    if (!fp4 && (codes[i] & 0x7F) == 0x7F) codes[i] = 0;
  }
  for (int64_t i = 0; i < narrow.size(); ++i) narrow[i] = static_cast<uint8_t>(i * 29 % 200);
  check_all_equal<Guarded<X>>(
      [&](const Context& context) {
        Guarded<X> result({batch, rows, n});
        const DequantizeParams p{fp4,   codes.any<3>(), wide ? scale.any<3>() : narrow.any<3>(),
                                 group, block,          result.template any<3>()};
        const Status status = group > 1 ? dequantize_weight(p, context)
                              : fp4     ? dequantize_fp4(p, context)
                                        : dequantize_fp8(p, context);
        CHECK_MESSAGE(status.is_ok(), status.message());
        return result;
      },
      "dequantize");
  CHECK(codes.intact() && narrow.intact() && scale.intact());
}

TEST(dequantizers_of_every_size) {
  for (const int64_t n : {2, 32, 62, 288, 1024}) {
    for (const bool wide : {false, true}) {
      for (const bool fp4 : {false, true}) {
        decoders<bf16>(1, 40, n, 1, fp4 ? 32 : 128, fp4, wide);
        decoders<float>(3, 5, n, 1, 48, fp4, wide);
      }
      decoders<bf16>(2, 130, n, 128, 128, false, wide);
      decoders<float>(2, 257, n, 128, 128, false, wide);
    }
  }
}

template <class X>
void index_queries(int64_t tokens, int64_t heads, int64_t dim, int64_t rope_dim) {
  Random random(static_cast<uint64_t>(tokens * 1000 + dim));
  Guarded<X> query({tokens, heads, dim});
  Guarded<float> rope({tokens, rope_dim / 2, 2});
  query.fill(random, -4, 4);
  for (int64_t i = 0; i < rope.size(); i += 2) {
    const float angle = random.uniform(-50, 50);
    rope[i] = std::cos(angle);
    rope[i + 1] = std::sin(angle);
  }
  check_all_equal<Guarded<X>>(
      [&](const Context& context) {
        Guarded<X> result({tokens, heads, dim});
        CHECK(index_query({query.template any<3>(), rope.any<3>(), result.template any<3>()}, context).is_ok());
        return result;
      },
      "index_query");
  CHECK(query.intact() && rope.intact());
}

TEST(index_query_of_every_size) {
  for (const int64_t tokens : {0, 1, 40}) {
    for (int64_t dim = 2; dim <= kMostIndexQueryDims; dim *= 2) {
      for (const int64_t rope_dim : {int64_t{0}, dim / 2, dim}) {
        index_queries<bf16>(tokens, 9, dim, rope_dim / 2 * 2);
        index_queries<float>(tokens, 3, dim, rope_dim / 2 * 2);
      }
    }
  }
}

TEST(messages) {
  ThreadPool pool(1);
  Guarded<float> x({2, 30}), query({1, 1, 2048}), rope({1, 8, 2});
  Guarded<uint8_t> codes({2, 30}), scale({2, 1});
  const auto message = [](const Status& status, const char* expected) {
    CHECK_MESSAGE(std::string(status.message()) == expected, status.message());
  };
  message(quantize_fp8({x.any<2>(), 0, codes.any<2>(), scale.any<2>()}, pool.context()),
          "quantize_fp8: block must be at least 1, got 0");
  message(quantize_fp8({x.any<2>(), 16, codes.any<2>(), scale.any<2>()}, pool.context()),
          "quantize_fp8: scale must be uint8 [2, 2], got uint8 [2, 1]");
  message(quantize_fp4({x.any<2>(), 15, codes.any<2>(), scale.any<2>()}, pool.context()),
          "quantize_fp4: the last dimension of x and block must be even");
  message(index_query({query.any<3>(), rope.any<3>(), query.any<3>()}, pool.context()),
          "index_query: dim must be a power of two from 2 to 1024, got 2048");
}

}  // namespace
