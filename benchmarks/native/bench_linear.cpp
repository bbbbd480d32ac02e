// The linear layers on quantised weights at V4-Flash shapes, for decoding (1 and 8 rows, where the stored bytes of the
// weight are the limit), 64 and 1,024 rows. Checked against sums in double precision on some rows and outputs.
#include <algorithm>
#include <cmath>
#include <string>

#include "common/pages.h"
#include "native/bench.h"
#include "native/implementation.h"
#include "ops/linear.h"

namespace {

using namespace dsv4;

struct Shape {
  const char* op;
  int64_t groups, inputs, outputs;
};

constexpr Shape kShapes[] = {
    {"fp8_linear", 1, 4096, 1024},      // wq_a
    {"fp8_linear", 1, 1024, 32768},     // wq_b
    {"fp8_linear", 1, 8192, 4096},      // wo_b
    {"grouped_linear", 8, 4096, 1024},  // wo_a
    {"fp4_linear", 1, 4096, 4096},      // w1 and w3 of an expert
    {"fp4_linear", 1, 2048, 4096},      // w2
};
constexpr int64_t kRows[] = {1, 8, 64, 1024};

int64_t ceil_div(int64_t value, int64_t divisor) { return (value + divisor - 1) / divisor; }

class Case {
 public:
  Case(const Shape& shape, int64_t rows, bench::Bench& bench)
      : s_(shape),
        rows_(rows),
        fp4_(std::string(shape.op) == "fp4_linear"),
        quantised_(std::string(shape.op) != "grouped_linear"),
        row_bytes_(fp4_ ? s_.inputs / 2 : s_.inputs),
        scale_columns_(ceil_div(s_.inputs, fp4_ ? 32 : 128)),
        x_(static_cast<size_t>(rows * s_.groups * s_.inputs)),
        out_(static_cast<size_t>(rows * s_.groups * s_.outputs)),
        weight_(static_cast<size_t>(s_.groups * s_.outputs * row_bytes_)),
        scale_(static_cast<size_t>((fp4_ ? weight_rows() : ceil_div(weight_rows(), 128)) * scale_columns_)),
        context_(bench.pool().context()) {
    // Multiples of 1/8 up to 1, with a 1 in each block of 128: exact in e4m3, so that the check needs no quantiser.
    for (size_t i = 0; i < x_.size(); ++i) {
      x_[i] = bf16_from_float(i % 128 == 0 ? 1.0f : std::round(random_.uniform() * 8) / 8);
    }
    for (uint8_t& code : weight_) {
      const uint64_t bits = random_.bits() >> 20;
      code = static_cast<uint8_t>(fp4_ ? bits : (bits & 0x80u) | (0x30u + (bits & 0xFu)));
    }
    for (uint8_t& scale : scale_) scale = static_cast<uint8_t>(118 + (random_.bits() >> 20) % 4);
    params_.x = dense<AnyView<3>>(x_.data(), {rows, s_.groups, s_.inputs});
    params_.weight = dense<AnyView<2>>(weight_.data(), {weight_rows(), row_bytes_});
    params_.scale =
        dense<AnyView<2>>(scale_.data(), {static_cast<int64_t>(scale_.size()) / scale_columns_, scale_columns_});
    params_.out = dense<AnyView<3>>(out_.data(), {rows, s_.groups, s_.outputs});
    const auto bytes_of = fp4_         ? fp4_linear_workspace_bytes
                          : quantised_ ? fp8_linear_workspace_bytes
                                       : grouped_linear_workspace_bytes;
    params_.workspace = scratch_.of(bytes_of(params_, context_));
  }

  bench::Measurement measurement() {
    bench::Measurement m;
    m.op = s_.op;
    m.shape = "rows=" + std::to_string(rows_) + " groups=" + std::to_string(s_.groups) +
              " in=" + std::to_string(s_.inputs) + " out=" + std::to_string(s_.outputs);
    m.flops = 2.0 * static_cast<double>(rows_ * weight_rows() * s_.inputs);
    m.bytes = static_cast<double>(weight_.size() + scale_.size()) + 2.0 * static_cast<double>(x_.size() + out_.size());
    m.unit = bench::Unit::kBFloat16;
    const auto run = fp4_ ? fp4_linear : quantised_ ? fp8_linear : grouped_linear;
    m.run = [this, run] {
      if (!run(params_, context_).is_ok()) out_.assign(out_.size(), bf16{0x7FFF});
    };
    m.run();
    m.impl = bench::last_implementation(m.op);
    m.error = [this] { return error(); };
    m.error_limit = 0.005;  // one rounding to bfloat16
    return m;
  }

 private:
  int64_t weight_rows() const { return s_.groups * s_.outputs; }

  float weight(int64_t row, int64_t k) const {
    const uint8_t* codes = weight_.data() + row * row_bytes_;
    const uint8_t scale =
        scale_[static_cast<size_t>(fp4_ ? row * scale_columns_ + k / 32 : row / 128 * scale_columns_ + k / 128)];
    const float value = fp4_ ? e2m1_value(static_cast<uint8_t>(codes[k / 2] >> (k % 2 * 4))) : e4m3_value(codes[k]);
    return value * e8m0_value(scale);
  }

  double error() const {
    std::vector<float> actual, expected;
    for (const int64_t row : {int64_t{0}, rows_ / 2, rows_ - 1}) {
      for (int64_t n = 0; n < weight_rows(); n += weight_rows() / 61) {
        const bf16* x = x_.data() + (row * s_.groups + n / s_.outputs) * s_.inputs;
        double sum = 0;
        for (int64_t k = 0; k < s_.inputs; ++k) sum += static_cast<double>(to_float(x[k])) * weight(n, k);
        expected.push_back(static_cast<float>(sum));
        actual.push_back(to_float(out_[static_cast<size_t>(row * weight_rows() + n)]));
      }
    }
    return bench::relative_error(actual, expected);
  }

  Shape s_;
  int64_t rows_;
  bool fp4_, quantised_;
  int64_t row_bytes_, scale_columns_;
  Random random_;
  std::vector<bf16> x_, out_;
  std::vector<uint8_t> weight_, scale_;
  bench::Scratch scratch_;
  Context context_;
  LinearParams params_{};
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
