// dense_linear at V4-Flash shapes: a compressor's projection, index weights, a slice of the head; for decoding (1 and 8
// rows, where the bytes of the weight are the limit), 64 and 1,024 rows. Checked against sums in double precision on
// some rows and outputs.
#include <string>

#include "native/bench.h"
#include "native/implementation.h"
#include "ops/linear.h"

namespace {

using namespace dsv4;

struct Shape {
  DType weight;
  int64_t inputs, outputs;
};

constexpr Shape kShapes[] = {
    {DType::kFloat32, 4096, 1024},    // wkv
    {DType::kBFloat16, 4096, 1024},   // the same in releases that store it so
    {DType::kBFloat16, 4096, 64},     // index weights
    {DType::kBFloat16, 4096, 16384},  // an eighth of the head
};
constexpr int64_t kRows[] = {1, 8, 64, 1024};

class Case {
 public:
  Case(const Shape& shape, int64_t rows, bench::Bench& bench)
      : s_(shape),
        rows_(rows),
        x_(static_cast<size_t>(rows * s_.inputs)),
        narrow_(static_cast<size_t>(s_.weight == DType::kBFloat16 ? s_.inputs * s_.outputs : 0)),
        wide_(static_cast<size_t>(s_.weight == DType::kFloat32 ? s_.inputs * s_.outputs : 0)),
        out_(static_cast<size_t>(rows * s_.outputs)),
        context_(bench.pool().context()) {
    for (bf16& value : x_) value = bf16_from_float(random_.uniform());
    for (bf16& value : narrow_) value = bf16_from_float(random_.uniform());
    for (float& value : wide_) value = random_.uniform();
    params_.x = dense<AnyView<2>>(x_.data(), {rows, s_.inputs});
    params_.weight = narrow_.empty() ? dense<AnyView<2>>(wide_.data(), {s_.outputs, s_.inputs})
                                     : dense<AnyView<2>>(narrow_.data(), {s_.outputs, s_.inputs});
    params_.out = dense<AnyView<2>>(out_.data(), {rows, s_.outputs});
    params_.workspace = scratch_.of(dense_linear_workspace_bytes(params_, context_));
  }

  bench::Measurement measurement() {
    const bool narrow = s_.weight == DType::kBFloat16;
    bench::Measurement m;
    m.op = "dense_linear";
    m.shape = "rows=" + std::to_string(rows_) + " in=" + std::to_string(s_.inputs) +
              " out=" + std::to_string(s_.outputs) + (narrow ? " bfloat16" : " float32");
    m.flops = 2.0 * static_cast<double>(rows_ * s_.inputs * s_.outputs);
    m.bytes =
        2.0 * static_cast<double>(x_.size() + narrow_.size()) + 4.0 * static_cast<double>(wide_.size() + out_.size());
    m.unit = narrow ? bench::Unit::kBFloat16 : bench::Unit::kFloat32;
    m.run = [this] {
      if (!dense_linear(params_, context_).is_ok()) out_.assign(out_.size(), __builtin_nanf(""));
    };
    m.run();
    m.impl = bench::last_implementation(m.op);
    m.error = [this] { return error(); };
    m.error_limit = 1e-5;  // float32 sums of thousands of products
    return m;
  }

 private:
  double error() const {
    std::vector<float> actual, expected;
    for (const int64_t row : {int64_t{0}, rows_ / 2, rows_ - 1}) {
      for (int64_t n = 0; n < s_.outputs; n += s_.outputs / 61) {
        double sum = 0;
        for (int64_t k = 0; k < s_.inputs; ++k) {
          const size_t at = static_cast<size_t>(n * s_.inputs + k);
          sum += static_cast<double>(to_float(x_[static_cast<size_t>(row * s_.inputs + k)])) *
                 (narrow_.empty() ? wide_[at] : to_float(narrow_[at]));
        }
        expected.push_back(static_cast<float>(sum));
        actual.push_back(out_[static_cast<size_t>(row * s_.outputs + n)]);
      }
    }
    return bench::relative_error(actual, expected);
  }

  Shape s_;
  int64_t rows_;
  Random random_;
  std::vector<bf16> x_, narrow_;
  std::vector<float> wide_, out_;
  bench::Scratch scratch_;
  Context context_;
  DenseLinearParams params_{};
};

}  // namespace

int main(int argc, char** argv) {
  bench::Bench bench(argc, argv);
  if (!bench.usable()) return bench.exit_code();
  for (const Shape& shape : kShapes) {
    for (const int64_t rows : kRows) {
      if (bench.quick() && rows > 8) continue;
      Case one(shape, rows, bench);
      bench.measure(one.measurement());
    }
  }
  return bench.exit_code();
}
