// dense_linear without torch: every implementation against sums in double precision, guard bands, poison between the
// rows of the operands, one result for any number of threads and any company, the validation messages.
#include <cmath>

#include "common/hardware.h"
#include "common/thread_pool.h"
#include "cpu/linear.h"
#include "native/check.h"

#if defined(DSV4_WITH_AVX512)
namespace dsv4::amx_model {
int64_t dense_linear_workspace_bytes(const DenseLinearParams&, const Context&);
Status dense_linear(const DenseLinearParams&, const Context&);
}  // namespace dsv4::amx_model
#endif

namespace {

using namespace dsv4;
using testing::Guarded;
using testing::Random;
using testing::same_bits;
using testing::Scratch;

struct Implementation {
  const char* name;
  Isa needs;
  int64_t (*workspace)(const DenseLinearParams&, const Context&);
  Status (*run)(const DenseLinearParams&, const Context&);
  bool narrow = false;  // takes bfloat16 alone
};

const Implementation kImplementations[] = {
    {"scalar", Isa::kScalar, scalar::dense_linear_workspace_bytes, scalar::dense_linear},
#if defined(DSV4_WITH_AVX2)
    {"avx2", Isa::kAvx2, avx2::dense_linear_workspace_bytes, avx2::dense_linear},
#endif
#if defined(DSV4_WITH_AVX512)
    {"avx512", Isa::kAvx512, avx512::dense_linear_workspace_bytes, avx512::dense_linear},
    {"amx_model", Isa::kAvx512, amx_model::dense_linear_workspace_bytes, amx_model::dense_linear, true},
#endif
#if defined(DSV4_WITH_AMX)
    {"amx", Isa::kAmx, amx::dense_linear_workspace_bytes, amx::dense_linear, true},
#endif
};

struct Shape {
  int64_t rows, inputs, outputs;
};

// Around a tile, a piece of work and a block of inputs (1,024 in float32, 2,048 in bfloat16).
const Shape kShapes[] = {{1, 1, 1},     {1, 40, 35},   {2, 33, 9},    {3, 2, 6},      {4, 2049, 17}, {5, 1023, 33},
                         {8, 1025, 34}, {66, 70, 37},  {65, 2050, 3}, {130, 256, 65}, {0, 8, 4},     {3, 0, 4},
                         {3, 8, 0},     {7, 3000, 31}, {1, 3000, 70}, {9, 1024, 32}};
constexpr int64_t kPad = 3;  // elements between rows, which nobody may read or write

template <class X, class W>
class Problem {
 public:
  explicit Problem(const Shape& s) : s_(s), x_({s.rows, s.inputs + kPad}), weight_({s.outputs, s.inputs + kPad}) {
    Random random(5);
    fill(x_, s.rows, random);
    fill(weight_, s.outputs, random);
  }

  // The largest error, in units of 2^-24 times the sum of the magnitudes of the products.
  double error(const std::vector<float>& out) const {
    double worst = 0;
    for (int64_t t = 0; t < s_.rows; ++t) {
      for (int64_t n = 0; n < s_.outputs; ++n) {
        double sum = 0, size = 1e-30;
        for (int64_t k = 0; k < s_.inputs; ++k) {
          const double product = static_cast<double>(to_float(x_[t * (s_.inputs + kPad) + k])) *
                                 to_float(weight_[n * (s_.inputs + kPad) + k]);
          sum += product;
          size += std::fabs(product);
        }
        const double error = std::fabs(out[static_cast<size_t>(t * s_.outputs + n)] - sum) / size * 16777216.0;
        worst = error > worst || std::isnan(error) ? error : worst;
      }
    }
    return worst;
  }

  std::vector<float> run(const Implementation& implementation, int threads, int64_t first, int64_t count) {
    DenseLinearParams p{};
    p.x = x_.template any<2>();
    p.x.data = static_cast<X*>(p.x.data) + first * p.x.stride[0];
    p.x.shape[0] = count;
    p.weight = weight_.template any<2>();
    p.x.shape[1] = p.weight.shape[1] = s_.inputs;
    Guarded<float> out({count, s_.outputs});
    p.out = out.template any<2>();
    ThreadPool pool(threads);
    const Context context = pool.context();
    Scratch scratch(implementation.workspace(p, context));
    p.workspace = scratch.workspace();
    CHECK(implementation.run(p, context).is_ok());
    CHECK(out.intact() && scratch.intact());
    return std::vector<float>(out.data(), out.data() + out.size());
  }

  const Shape& shape() const { return s_; }

 private:
  template <class T>
  void fill(Guarded<T>& to, int64_t rows, Random& random) {
    for (int64_t row = 0; row < rows; ++row) {
      for (int64_t k = 0; k < s_.inputs; ++k) to[row * (s_.inputs + kPad) + k] = from_float<T>(random.uniform(-1, 1));
    }
  }

  Shape s_;
  Guarded<X> x_;
  Guarded<W> weight_;
};

template <class X, class W>
void check(const Implementation& implementation, const Shape& shape) {
  Problem<X, W> problem(shape);
  const std::vector<float> whole = problem.run(implementation, 1, 0, shape.rows);
  const double error = problem.error(whole);
  CHECK_MESSAGE(error <= 4, std::string(implementation.name) + ": error " + std::to_string(error) +
                                " with in=" + std::to_string(shape.inputs) + " out=" + std::to_string(shape.outputs));
  for (const int threads : {2, 5}) CHECK(same_bits(problem.run(implementation, threads, 0, shape.rows), whole));
  for (int64_t cut = 1; cut < shape.rows; cut = 2 * cut + 1) {
    std::vector<float> parts = problem.run(implementation, 2, 0, cut);
    const std::vector<float> rest = problem.run(implementation, 1, cut, shape.rows - cut);
    parts.insert(parts.end(), rest.begin(), rest.end());
    CHECK(same_bits(parts, whole));
  }
}

TEST(against_double_in_any_company_on_any_threads) {
  for (const Implementation& implementation : kImplementations) {
    if (cpu_isa() < implementation.needs) {
      testing::not_run(implementation.name);
      continue;
    }
    for (const Shape& shape : kShapes) {
      check<bf16, bf16>(implementation, shape);
      if (implementation.narrow) continue;
      check<bf16, float>(implementation, shape);
      check<float, bf16>(implementation, shape);
      check<float, float>(implementation, shape);
    }
  }
}

// One off every edge of a tile of 16 rows, 16 outputs and 32 inputs, of two tiles, and of the 512 inputs, 64 and 512
// rows that are taken at a time.
TEST(tiles_cut_on_every_side) {
  for (const Implementation& implementation : kImplementations) {
    if (cpu_isa() < implementation.needs) continue;
    for (int64_t rows = 1; rows <= 33; ++rows) {
      for (const int64_t outputs : {15, 17, 32, 33}) check<bf16, bf16>(implementation, {rows, 65, outputs});
    }
    for (const int64_t inputs : {1, 31, 32, 33, 63, 127, 128, 129, 511, 512, 513, 1025}) {
      check<bf16, bf16>(implementation, {17, inputs, 49});
    }
    for (const int64_t rows : {63, 64, 65, 511, 513, 545}) check<bf16, bf16>(implementation, {rows, 33, 129});
  }
}

void expect(const DenseLinearParams& p, const char* message) {
  ThreadPool pool(1);
  const Status status = dense_linear(p, pool.context());
  CHECK_MESSAGE(!status.is_ok() && std::string(status.message()) == message, status.message());
}

TEST(messages) {
  Guarded<float> x({9, 64}), weight({5, 64}), out({9, 5});
  ThreadPool pool(1);
  DenseLinearParams good{};
  good.x = x.any<2>();
  good.weight = weight.any<2>();
  good.out = out.any<2>();
  Scratch scratch(dense_linear_workspace_bytes(good, pool.context()));
  good.workspace = scratch.workspace();
  CHECK(dense_linear(good, pool.context()).is_ok());

  DenseLinearParams p = good;
  p.x.dtype = DType::kInt32;
  expect(p, "dense_linear: x must be bfloat16 or float32, got int32");
  p = good;
  p.weight.dtype = DType::kUInt8;
  expect(p, "dense_linear: weight must be bfloat16 or float32, got uint8");
  p = good;
  p.weight.shape[1] = 63;
  expect(p, "dense_linear: weight must be float32 [*, 64], got float32 [5, 63]");
  p = good;
  p.out.shape[1] = 4;
  expect(p, "dense_linear: out must be float32 [9, 5], got float32 [9, 4]");
  p = good;
  p.weight.data = nullptr;
  expect(p, "dense_linear: weight must not be null");
  p = good;
  p.x.stride[1] = 2;
  expect(p, "dense_linear: x must be contiguous in its last 1 axes");
  if (good.workspace.bytes > 0) {
    p = good;
    p.workspace.data = nullptr;
    expect(p, "dense_linear: workspace must be 64-byte aligned, not null");
  }
}

}  // namespace
