// The linear layers without torch: every implementation against sums in double precision, guard bands, poison between
// the rows of the operands, one result for any number of threads and any company, the validation messages.
#include <cmath>

#include "common/hardware.h"
#include "common/pages.h"
#include "common/thread_pool.h"
#include "cpu/linear.h"
#include "native/check.h"

#if defined(DSV4_WITH_AVX512)
namespace dsv4::amx_model {
int64_t fp8_linear_workspace_bytes(const LinearParams&, const Context&);
int64_t fp4_linear_workspace_bytes(const LinearParams&, const Context&);
int64_t grouped_linear_workspace_bytes(const LinearParams&, const Context&);
Status fp8_linear(const LinearParams&, const Context&);
Status fp4_linear(const LinearParams&, const Context&);
Status grouped_linear(const LinearParams&, const Context&);
}  // namespace dsv4::amx_model
#endif

namespace {

using namespace dsv4;
using testing::Guarded;
using testing::Random;
using testing::same_bits;
using testing::Scratch;

enum class Form { kFp8, kFp4, kGrouped };

struct Functions {
  int64_t (*workspace)(const LinearParams&, const Context&);
  Status (*run)(const LinearParams&, const Context&);
};

struct Implementation {
  const char* name;
  Isa needs;
  Functions functions[3];
  bool tiles = false;  // takes e8m0 scales alone, and bfloat16 where nothing is quantised
};

const Implementation kImplementations[] = {
    {"scalar",
     Isa::kScalar,
     {{scalar::fp8_linear_workspace_bytes, scalar::fp8_linear},
      {scalar::fp4_linear_workspace_bytes, scalar::fp4_linear},
      {scalar::grouped_linear_workspace_bytes, scalar::grouped_linear}}},
#if defined(DSV4_WITH_AVX2)
    {"avx2",
     Isa::kAvx2,
     {{avx2::fp8_linear_workspace_bytes, avx2::fp8_linear},
      {avx2::fp4_linear_workspace_bytes, avx2::fp4_linear},
      {avx2::grouped_linear_workspace_bytes, avx2::grouped_linear}}},
#endif
#if defined(DSV4_WITH_AVX512)
    {"avx512",
     Isa::kAvx512,
     {{avx512::fp8_linear_workspace_bytes, avx512::fp8_linear},
      {avx512::fp4_linear_workspace_bytes, avx512::fp4_linear},
      {avx512::grouped_linear_workspace_bytes, avx512::grouped_linear}}},
    {"amx_model",
     Isa::kAvx512,
     {{amx_model::fp8_linear_workspace_bytes, amx_model::fp8_linear},
      {amx_model::fp4_linear_workspace_bytes, amx_model::fp4_linear},
      {amx_model::grouped_linear_workspace_bytes, amx_model::grouped_linear}},
     true},
#endif
#if defined(DSV4_WITH_AMX)
    {"amx",
     Isa::kAmx,
     {{amx::fp8_linear_workspace_bytes, amx::fp8_linear},
      {amx::fp4_linear_workspace_bytes, amx::fp4_linear},
      {amx::grouped_linear_workspace_bytes, amx::grouped_linear}},
     true},
#endif
};

struct Shape {
  Form form;
  int64_t tokens, groups, inputs, outputs;
};

const Shape kShapes[] = {
    {Form::kFp8, 1, 1, 128, 1},      {Form::kFp8, 3, 1, 2, 5},        {Form::kFp8, 8, 1, 257, 130},
    {Form::kFp8, 9, 1, 200, 67},     {Form::kFp8, 21, 1, 640, 35},    {Form::kFp8, 0, 1, 128, 4},
    {Form::kFp8, 2, 1, 0, 4},        {Form::kFp8, 2, 1, 128, 0},      {Form::kFp4, 1, 1, 32, 1},
    {Form::kFp4, 3, 1, 2, 5},        {Form::kFp4, 8, 1, 258, 130},    {Form::kFp4, 9, 1, 200, 67},
    {Form::kFp4, 21, 1, 640, 35},    {Form::kGrouped, 1, 2, 128, 65}, {Form::kGrouped, 3, 3, 70, 50},
    {Form::kGrouped, 13, 4, 96, 33}, {Form::kGrouped, 40, 1, 256, 7},
};

constexpr int64_t kPad = 3;  // elements between rows, which nobody may read or write

int64_t ceil_div(int64_t value, int64_t divisor) { return (value + divisor - 1) / divisor; }

// Operands with known values; X is the element type of the activations, S that of the scales.
template <class X, class S>
class Problem {
 public:
  Problem(const Shape& s, uint64_t seed)
      : s_(s),
        fp4_(s.form == Form::kFp4),
        rows_(s.groups * s.outputs),
        columns_(fp4_ ? s.inputs / 2 : s.inputs),
        scale_rows_(fp4_ ? rows_ : ceil_div(rows_, 128)),
        scale_columns_(ceil_div(s.inputs, fp4_ ? 32 : 128)),
        x_({s.tokens, s.groups, s.inputs + kPad}),
        weight_({rows_, columns_ + kPad}),
        scale_({scale_rows_, scale_columns_ + kPad}) {
    Random random(seed);
    for (int64_t row = 0; row < s.tokens * s.groups; ++row) {
      // Eighths up to 1, with a 1 in each block: exact in e4m3 whatever the implementation.
      for (int64_t k = 0; k < s.inputs; ++k) {
        x_[row * (s.inputs + kPad) + k] = from_float<X>(k % 128 == 0 ? 1.0f : std::round(random.uniform(-8, 8)) / 8);
      }
    }
    for (int64_t row = 0; row < rows_; ++row) {
      for (int64_t i = 0; i < columns_; ++i) {
        const uint8_t code = static_cast<uint8_t>(random.bits() >> 20);
        weight_[row * (columns_ + kPad) + i] = !fp4_ && (code & 0x7F) == 0x7F ? uint8_t{0} : code;
      }
    }
    for (int64_t row = 0; row < scale_rows_; ++row) {
      for (int64_t i = 0; i < scale_columns_; ++i) {
        S& scale = scale_[row * (scale_columns_ + kPad) + i];
        if constexpr (sizeof(S) == 1) {
          scale = static_cast<uint8_t>(115 + (random.bits() >> 20) % 8);
        } else {
          scale = random.uniform(0.01f, 0.1f);
        }
      }
    }
  }

  LinearParams params() {
    LinearParams p{};
    p.x = x_.template any<3>();
    p.x.shape[2] = s_.inputs;
    p.weight = first_columns(weight_, columns_);
    p.scale = first_columns(scale_, scale_columns_);
    return p;
  }

  double weight(int64_t row, int64_t k) const {
    const int64_t at = row * (columns_ + kPad);
    const float value =
        fp4_ ? e2m1_value(static_cast<uint8_t>(weight_[at + k / 2] >> (k % 2 * 4))) : e4m3_value(weight_[at + k]);
    const S& scale = scale_[(fp4_ ? row : row / 128) * (scale_columns_ + kPad) + k / (fp4_ ? 32 : 128)];
    if constexpr (sizeof(S) == 1) {
      return static_cast<double>(value) * e8m0_value(scale);
    } else {
      return static_cast<double>(value) * scale;
    }
  }

  void put_scale(int64_t row, int64_t column, S scale) { scale_[row * (scale_columns_ + kPad) + column] = scale; }

  // The largest error, in units of 2^-24 times the sum of the magnitudes of the products.
  double error(const std::vector<float>& out) const {
    double worst = 0;
    for (int64_t t = 0; t < s_.tokens; ++t) {
      for (int64_t row = 0; row < rows_; ++row) {
        double sum = 0, size = 1e-30;
        for (int64_t k = 0; k < s_.inputs; ++k) {
          const double product =
              to_float(x_[(t * s_.groups + row / s_.outputs) * (s_.inputs + kPad) + k]) * weight(row, k);
          sum += product;
          size += std::fabs(product);
        }
        const double error = std::fabs(out[static_cast<size_t>(t * rows_ + row)] - sum) / size * 16777216.0;
        worst = error > worst || std::isnan(error) ? error : worst;
      }
    }
    return worst;
  }

  // Y is the element type of the results.
  template <class Y = float>
  std::vector<float> run(const Implementation& implementation, int threads, int64_t first = 0, int64_t count = -1) {
    count = count < 0 ? s_.tokens : count;
    LinearParams p = params();
    p.x.data = static_cast<X*>(p.x.data) + first * p.x.stride[0];
    p.x.shape[0] = count;
    Guarded<Y> out({count, s_.groups, s_.outputs});
    p.out = out.template any<3>();
    ThreadPool pool(threads);
    const Context context = pool.context();
    const Functions& functions = implementation.functions[static_cast<int>(s_.form)];
    Scratch scratch(functions.workspace(p, context));
    p.workspace = scratch.workspace();
    CHECK(functions.run(p, context).is_ok());
    CHECK(out.intact() && scratch.intact());
    std::vector<float> values;
    for (int64_t i = 0; i < out.size(); ++i) values.push_back(to_float(out[i]));
    return values;
  }

 private:
  template <class T>
  AnyView<2> first_columns(Guarded<T>& array, int64_t columns) {
    AnyView<2> view = array.template any<2>();
    view.shape[1] = columns;
    return view;
  }

  Shape s_;
  bool fp4_;
  int64_t rows_, columns_, scale_rows_, scale_columns_;
  Guarded<X> x_;
  Guarded<uint8_t> weight_;
  Guarded<S> scale_;
};

bool usable(const Implementation& implementation) {
  if (cpu_isa() >= implementation.needs) return true;
  testing::not_run(implementation.name);
  return false;
}

template <class X, class S>
void check_error(const Implementation& implementation, const Shape& shape, Problem<X, S>& problem) {
  const double error = problem.error(problem.run(implementation, 1));
  CHECK_MESSAGE(error <= 4, std::string(implementation.name) + ": error " + std::to_string(error) +
                                " with rows=" + std::to_string(shape.tokens) + " in=" + std::to_string(shape.inputs) +
                                " out=" + std::to_string(shape.outputs));
}

template <class X, class S>
void against_double() {
  for (const Implementation& implementation : kImplementations) {
    if (!usable(implementation) || (implementation.tiles && sizeof(S) > 1)) continue;
    for (const Shape& shape : kShapes) {
      if (implementation.tiles && shape.form == Form::kGrouped && sizeof(X) > 2) continue;
      Problem<X, S> problem(shape, 7);
      check_error(implementation, shape, problem);
    }
  }
}

TEST(bfloat16_against_double) { against_double<bf16, uint8_t>(); }
TEST(float32_against_double) { against_double<float, uint8_t>(); }
TEST(float32_scales_against_double) { against_double<bf16, float>(); }

TEST(threads_and_company_do_not_show) {
  for (const Implementation& implementation : kImplementations) {
    if (!usable(implementation)) continue;
    for (const Shape& shape : kShapes) {
      Problem<bf16, uint8_t> problem(shape, 11);
      const std::vector<float> whole = problem.run(implementation, 1);
      for (const int threads : {2, 3, 7}) CHECK(same_bits(problem.run(implementation, threads), whole));
      for (int64_t cut = 1; cut < shape.tokens; cut += 5) {
        std::vector<float> parts = problem.run(implementation, 2, 0, cut);
        const std::vector<float> rest = problem.run(implementation, 2, cut, shape.tokens - cut);
        parts.insert(parts.end(), rest.begin(), rest.end());
        CHECK(same_bits(parts, whole));
      }
    }
  }
}

// Whatever rows come along: counts around those from which kernels go another way, and around tiles.
TEST(every_number_of_rows_has_the_same_bits) {
  for (const Implementation& implementation : kImplementations) {
    if (!usable(implementation)) continue;
    for (const Shape& shape :
         {Shape{Form::kFp8, 70, 1, 650, 37}, Shape{Form::kFp4, 70, 1, 650, 37}, Shape{Form::kFp8, 70, 1, 128, 37},
          Shape{Form::kFp8, 70, 1, 256, 161}, Shape{Form::kFp4, 70, 1, 128, 37}, Shape{Form::kFp4, 70, 1, 256, 70},
          Shape{Form::kGrouped, 70, 2, 128, 50}, Shape{Form::kGrouped, 70, 2, 130, 21}}) {
      Problem<bf16, uint8_t> problem(shape, 19);
      const std::vector<float> whole = problem.run(implementation, 1);
      for (int64_t count = 1; count <= shape.tokens; count += count < 34 ? 1 : 15) {
        const std::vector<float> some = problem.run(implementation, 1, 0, count);
        CHECK(some.size() == static_cast<size_t>(count * shape.groups * shape.outputs));
        CHECK(std::memcmp(some.data(), whole.data(), some.size() * sizeof(float)) == 0);
      }
    }
  }
}

TEST(bfloat16_results_are_rounded_once) {
  for (const Implementation& implementation : kImplementations) {
    if (!usable(implementation)) continue;
    for (const Shape& shape : kShapes) {
      Problem<bf16, uint8_t> problem(shape, 23);
      std::vector<float> expected = problem.run(implementation, 1);
      for (float& value : expected) value = to_float(bf16_from_float(value));
      CHECK(same_bits(problem.run<bf16>(implementation, 1), expected));
    }
  }
}

// One off every edge of a tile of 16 rows, 16 outputs and 32 inputs, of two tiles, of the 256, 512 or 1,024 inputs and
// 64 or 128 outputs that are expanded and the 256 or 512 rows that are taken at a time.
TEST(tiles_cut_on_every_side) {
  for (const Implementation& implementation : kImplementations) {
    if (implementation.needs == Isa::kScalar || !usable(implementation)) continue;
    const auto check = [&](int64_t rows, int64_t inputs, int64_t outputs) {
      for (const Form form : {Form::kFp8, Form::kFp4, Form::kGrouped}) {
        const Shape shape{form, rows, form == Form::kGrouped ? 2 : 1, inputs, outputs};
        Problem<bf16, uint8_t> problem(shape, 29);
        check_error(implementation, shape, problem);
      }
    };
    for (int64_t rows = 1; rows <= 33; ++rows) {
      for (const int64_t outputs : {15, 16, 17, 33}) check(rows, 66, outputs);
    }
    for (const int64_t inputs :
         {2, 30, 32, 34, 62, 64, 126, 128, 130, 254, 256, 258, 510, 512, 514, 1022, 1024, 1026}) {
      for (const int64_t outputs : {1, 31, 32, 49, 63, 65}) check(17, inputs, outputs);
    }
    for (const int64_t rows : {63, 64, 65, 255, 257, 511, 513, 545}) {
      for (const int64_t outputs : {32, 127, 129}) check(rows, 34, outputs);
      check(rows, 514, 40);
    }
  }
}

// More rows than a kernel takes at a time, or keeps in a cache, in the company of few.
TEST(rows_among_hundreds_have_the_same_bits) {
  for (const Implementation& implementation : kImplementations) {
    if (implementation.needs == Isa::kScalar || !usable(implementation)) continue;
    for (const Shape& shape : {Shape{Form::kFp8, 547, 1, 650, 70}, Shape{Form::kFp4, 547, 1, 1026, 37},
                               Shape{Form::kGrouped, 547, 2, 514, 33}, Shape{Form::kFp8, 130, 1, 5250, 33},
                               Shape{Form::kFp4, 270, 1, 2080, 1100}, Shape{Form::kFp8, 270, 1, 2050, 1100},
                               Shape{Form::kGrouped, 547, 6, 66, 33}, Shape{Form::kFp8, 4100, 1, 66, 33}}) {
      Problem<bf16, uint8_t> problem(shape, 37);
      const std::vector<float> whole = problem.run(implementation, 2);
      for (const int64_t count : {int64_t{1}, int64_t{16}, int64_t{33}, int64_t{100}}) {
        for (const int64_t first : {int64_t{0}, shape.tokens - count}) {
          const std::vector<float> some = problem.run(implementation, 1, first, count);
          const size_t row = some.size() / static_cast<size_t>(count);
          CHECK(std::memcmp(some.data(), whole.data() + static_cast<size_t>(first) * row,
                            some.size() * sizeof(float)) == 0);
        }
      }
    }
  }
}

// Three rows of bfloat16 each, and scales of which none fold.
TEST(float32_rows_among_hundreds_have_the_same_bits) {
  for (const Implementation& implementation : kImplementations) {
    if (implementation.tiles || !usable(implementation)) continue;
    const Shape shape{Form::kGrouped, 180, 2, 1100, 70};
    Problem<float, uint8_t> problem(shape, 43);
    Problem<float, float> scaled(shape, 43);
    check_error(implementation, shape, problem);
    check_error(implementation, shape, scaled);
    for (const int64_t count : {1, 5, 6, 86}) {
      for (const int64_t first : {int64_t{0}, shape.tokens - count}) {
        const auto same = [&](auto& any) {
          const std::vector<float> some = any.run(implementation, 1, first, count), whole = any.run(implementation, 2);
          const size_t row = some.size() / static_cast<size_t>(count);
          CHECK(std::memcmp(some.data(), whole.data() + static_cast<size_t>(first) * row,
                            some.size() * sizeof(float)) == 0);
        };
        same(problem), same(scaled);
      }
    }
  }
}

// Scales at both ends of those that weights take in, and beyond: then a part of the outputs goes another way.
TEST(scales_that_tiles_cannot_take_in) {
  for (const Implementation& implementation : kImplementations) {
    if (implementation.needs == Isa::kScalar || !usable(implementation)) continue;
    for (const uint8_t scale : {1, 63, 64, 66, 67, 127, 128, 190, 191, 200}) {
      for (const Form form : {Form::kFp8, Form::kFp4, Form::kGrouped}) {
        // Of the two groups, the second one's scales change after 28 outputs.
        const Shape shape = form == Form::kGrouped ? Shape{form, 35, 2, 650, 100}
                            : form == Form::kFp4   ? Shape{form, 35, 1, 650, 70}
                                                   : Shape{form, 35, 1, 650, 300};
        Problem<bf16, uint8_t> problem(shape, 31);
        problem.put_scale(1, 3, scale);
        problem.put_scale(0, 1, 127);
        if (form == Form::kFp4) problem.put_scale(33, 0, scale);
        check_error(implementation, shape, problem);
        const std::vector<float> whole = problem.run(implementation, 3);
        const std::vector<float> first = problem.run(implementation, 1, 0, 1);
        CHECK(std::memcmp(first.data(), whole.data(), first.size() * sizeof(float)) == 0);
      }
    }
  }
}

// Pieces of work of five times 32 outputs, of which some in the middle, at the beginning or at the end go another way.
TEST(pieces_of_many_outputs) {
  for (const Implementation& implementation : kImplementations) {
    if (implementation.needs == Isa::kScalar || !usable(implementation)) continue;
    for (const Form form : {Form::kFp8, Form::kFp4}) {
      for (const int64_t inputs : {34, 258, 768}) {
        for (const int64_t output : {0, 70, 159, 400, 699}) {
          const Shape shape{form, 35, 1, inputs, 700};
          Problem<bf16, uint8_t> problem(shape, 41);
          problem.put_scale(form == Form::kFp4 ? output : output / 128, 0, 1);
          check_error(implementation, shape, problem);
          const std::vector<float> whole = problem.run(implementation, 1);
          for (const int64_t count : {1, 8, 20}) {
            const std::vector<float> some = problem.run(implementation, 1, 0, count);
            CHECK(std::memcmp(some.data(), whole.data(), some.size() * sizeof(float)) == 0);
          }
        }
      }
    }
  }
}

void expect(const LinearParams& p, Status (*run)(const LinearParams&, const Context&), const char* message) {
  ThreadPool pool(1);
  const Status status = run(p, pool.context());
  CHECK_MESSAGE(!status.is_ok() && std::string(status.message()) == message, status.message());
}

TEST(messages) {
  Problem<bf16, uint8_t> problem({Form::kFp8, 2, 1, 256, 200}, 3);
  Guarded<float> out({2, 1, 200});
  ThreadPool pool(1);
  LinearParams good = problem.params();
  good.out = out.any<3>();
  Scratch scratch(fp8_linear_workspace_bytes(good, pool.context()));
  good.workspace = scratch.workspace();
  CHECK(good.workspace.bytes > 0);
  CHECK(fp8_linear(good, pool.context()).is_ok());

  LinearParams p = good;
  p.x.dtype = DType::kInt32;
  expect(p, fp8_linear, "fp8_linear: x must be bfloat16 or float32, got int32");
  p = good;
  p.x.shape[1] = 2;
  expect(p, fp8_linear, "fp8_linear: x must be bfloat16 [*, 1, *], got bfloat16 [2, 2, 256]");
  p = good;
  p.weight.shape[1] = 255;
  expect(p, fp8_linear, "fp8_linear: weight must be uint8 [*, 256], got uint8 [200, 255]");
  expect(good, fp4_linear, "fp4_linear: weight must be uint8 [*, 128], got uint8 [200, 256]");
  p = good;
  p.x.shape[2] = 255;
  expect(p, fp4_linear, "fp4_linear: x must have an even number of inputs");
  p.x.shape[2] = int64_t{1} << 31;
  expect(p, fp8_linear, "fp8_linear: the weight is too large");
  p = good;
  p.weight.shape[0] = int64_t{1} << 31;
  expect(p, fp8_linear, "fp8_linear: the weight is too large");
  p = good;
  p.scale.dtype = DType::kInt32;
  expect(p, fp8_linear, "fp8_linear: scale must be uint8 or float32");
  p = good;
  p.scale.shape[0] = 1;
  expect(p, fp8_linear, "fp8_linear: scale must be uint8 [2, 2], got uint8 [1, 2]");
  p = good;
  p.out.shape[2] = 199;
  expect(p, grouped_linear, "grouped_linear: out must be float32 [2, 1, 200], got float32 [2, 1, 199]");
  p = good;
  p.scale = {};
  expect(p, grouped_linear, "grouped_linear: weight must be bfloat16 [*, 256], got uint8 [200, 256]");
  p = good;
  p.weight.data = nullptr;
  expect(p, fp8_linear, "fp8_linear: weight must not be null");
  p = good;
  p.workspace.data = nullptr;
  expect(p, fp8_linear, "fp8_linear: workspace must be 64-byte aligned, not null");
}

}  // namespace
