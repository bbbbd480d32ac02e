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
    p.weight = bytes(weight_, columns_, DType::kUInt8);
    p.scale = bytes(scale_, scale_columns_, sizeof(S) == 1 ? DType::kUInt8 : DType::kFloat32);
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

  std::vector<float> run(const Implementation& implementation, int threads, int64_t first = 0, int64_t count = -1) {
    count = count < 0 ? s_.tokens : count;
    LinearParams p = params();
    p.x.data = static_cast<X*>(p.x.data) + first * p.x.stride[0];
    p.x.shape[0] = count;
    Guarded<float> out({count, s_.groups, s_.outputs});
    p.out = out.template any<3>();
    ThreadPool pool(threads);
    const Context context = pool.context();
    const Functions& functions = implementation.functions[static_cast<int>(s_.form)];
    const int64_t bytes = functions.workspace(p, context);
    Guarded<uint8_t> memory({bytes + 64});
    const uintptr_t start = (reinterpret_cast<uintptr_t>(memory.data()) + 63) / 64 * 64;
    p.workspace = {reinterpret_cast<void*>(start), bytes};
    CHECK(functions.run(p, context).is_ok());
    CHECK(out.intact() && memory.intact());
    for (uint8_t* end = reinterpret_cast<uint8_t*>(start) + bytes; end < memory.data() + memory.size(); ++end) {
      CHECK(*end == 0xFF);
    }
    return std::vector<float>(out.data(), out.data() + out.size());
  }

 private:
  template <class T>
  AnyView<2> bytes(Guarded<T>& array, int64_t columns, DType dtype) {
    AnyView<2> view = array.template any<2>();
    view.dtype = dtype;
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

bool same_bits(const std::vector<float>& a, const std::vector<float>& b) {
  return a.size() == b.size() && (a.empty() || std::memcmp(a.data(), b.data(), a.size() * sizeof(float)) == 0);
}

bool usable(const Implementation& implementation) {
  if (cpu_isa() >= implementation.needs) return true;
  testing::not_run(implementation.name);
  return false;
}

template <class X, class S>
void against_double() {
  for (const Implementation& implementation : kImplementations) {
    if (!usable(implementation)) continue;
    for (const Shape& shape : kShapes) {
      Problem<X, S> problem(shape, 7);
      const double error = problem.error(problem.run(implementation, 1));
      CHECK_MESSAGE(error <= 4, std::string(implementation.name) + ": error " + std::to_string(error) + " with in=" +
                                    std::to_string(shape.inputs) + " out=" + std::to_string(shape.outputs));
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
  const int64_t bytes = fp8_linear_workspace_bytes(good, pool.context());
  CHECK(bytes > 0);
  std::vector<uint8_t> memory(static_cast<size_t>(bytes + 64));
  const uintptr_t start = (reinterpret_cast<uintptr_t>(memory.data()) + 63) / 64 * 64;
  good.workspace = {reinterpret_cast<void*>(start), bytes};
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
  p.scale.dtype = DType::kInt32;
  expect(p, fp8_linear, "fp8_linear: scale must be uint8 or float32");
  p = good;
  p.scale.shape[0] = 1;
  expect(p, fp8_linear, "fp8_linear: scale must be uint8 [2, 2], got uint8 [1, 2]");
  p = good;
  p.out.shape[2] = 199;
  expect(p, grouped_linear, "grouped_linear: out must be float32 [2, 1, 200], got float32 [2, 1, 199]");
  p = good;
  p.weight.data = nullptr;
  expect(p, fp8_linear, "fp8_linear: weight must not be null");
  p = good;
  p.workspace.data = nullptr;
  expect(p, fp8_linear, "fp8_linear: workspace must be 64-byte aligned, not null");
}

}  // namespace
