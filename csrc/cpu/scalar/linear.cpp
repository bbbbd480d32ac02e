// The linear layers in plain C++. A row of weights is expanded to float32 once for all rows of activations. Sums: 16
// lanes over a block of 128 inputs (32 with e2m1), added by a tree, times the block's scale; blocks one after another.
#include "cpu/linear.h"

#include "cpu/linear_driver.h"
#include "cpu/scalar/quantised.h"

namespace dsv4::scalar {
namespace {

constexpr int64_t kLanes = 16;

template <bool kQuantise, class X>
void prepare_row(const X* x, int64_t inputs, float* to) {
  if constexpr (kQuantise) {
    quantise(x, inputs, to);
  } else {
    for (int64_t i = 0; i < inputs; ++i) to[i] = to_float(x[i]);
  }
}

template <class X, class W>
float block_sum(const X* x, const W* w, int64_t count) {
  float sums[kLanes] = {};
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) {
    for (int64_t lane = 0; lane < kLanes; ++lane) sums[lane] += to_float(x[i + lane]) * to_float(w[i + lane]);
  }
  for (int64_t lane = 0; i + lane < count; ++lane) sums[lane] += to_float(x[i + lane]) * to_float(w[i + lane]);
  for (int64_t half = kLanes / 2; half > 0; half /= 2) {
    for (int64_t lane = 0; lane < half; ++lane) sums[lane] += sums[lane + half];
  }
  return sums[0];
}

template <bool kFp4, bool kQuantise>
class Kernel {
 public:
  static constexpr int64_t kUnit = 1;
  static int64_t panel(const LinearParams&, int64_t) { return kLinearPanel; }
  static int64_t rows(const LinearParams&) { return kAllRows; }
  static int64_t unit_bytes(const LinearParams& p) { return p.x.size(2) * static_cast<int64_t>(sizeof(float)); }
  static int64_t memory(const LinearParams& p) {
    return (p.x.size(2) + p.scale.size(1)) * static_cast<int64_t>(sizeof(float));
  }

  static void prepare(const LinearParams& p, int64_t token, int64_t group, uint8_t* to) {
    float* row = reinterpret_cast<float*>(to);
    if (p.x.dtype == DType::kBFloat16) {
      prepare_row<kQuantise>(p.x.as<const bf16>().at(token, group), p.x.size(2), row);
    } else {
      prepare_row<kQuantise>(p.x.as<const float>().at(token, group), p.x.size(2), row);
    }
  }

  Kernel(const LinearParams& p, uint8_t* memory)
      : p_(p), inputs_(p.x.size(2)), weight_(reinterpret_cast<float*>(memory)), scales_(weight_ + p.x.size(2)) {
    for (int code = 0; code < 256; ++code) table_[code] = e4m3_value(static_cast<uint8_t>(code));
  }

  void run(const uint8_t* rows, const LinearPiece& piece) const {
    const int64_t tokens = piece.rows, outputs = p_.out.size(2), group = piece.group;
    const int64_t stride = round_up(unit_bytes(p_), 64);
    for (int64_t n = piece.begin; n < piece.end; ++n) {
      expand(group * outputs + n);
      for (int64_t t = 0; t < tokens; ++t) {
        const float sum = dot(reinterpret_cast<const float*>(rows + t * stride));
        if (p_.out.dtype == DType::kBFloat16) {
          *p_.out.as<bf16>().at(t, group, n) = bf16_from_float(sum);
        } else {
          *p_.out.as<float>().at(t, group, n) = sum;
        }
      }
    }
  }

 private:
  static constexpr int64_t kScaled = kFp4 ? 32 : 128;  // inputs that share a scale

  // The values of a row's codes, and its scales.
  void expand(int64_t row) const {
    const uint8_t* codes = p_.weight.as<const uint8_t>().at(row);
    for (int64_t i = 0; i < inputs_; ++i) {
      weight_[i] = kFp4 ? e2m1_value(static_cast<uint8_t>(codes[i / 2] >> (i % 2 * 4))) : table_[codes[i]];
    }
    const int64_t scale_row = kFp4 ? row : row / 128;
    for (int64_t block = 0; block < p_.scale.size(1); ++block) {
      scales_[block] = p_.scale.dtype == DType::kFloat32
                           ? *p_.scale.as<const float>().at(scale_row, block)
                           : e8m0_value(*p_.scale.as<const uint8_t>().at(scale_row, block));
    }
  }

  float dot(const float* x) const {
    float sum = 0;
    for (int64_t first = 0; first < inputs_; first += kScaled) {
      const int64_t count = inputs_ - first < kScaled ? inputs_ - first : kScaled;
      sum += block_sum(x + first, weight_ + first, count) * scales_[first / kScaled];
    }
    return sum;
  }

  const LinearParams& p_;
  int64_t inputs_;
  float* weight_;
  float* scales_;
  float table_[256];
};

// One sum of 16 lanes over all inputs.
class DenseKernel {
 public:
  static int64_t memory(const DenseLinearParams&) { return 0; }
  DenseKernel(const DenseLinearParams& p, uint8_t*) : p_(p) {}

  void run(int64_t row, int64_t rows, int64_t output, int64_t outputs) const {
    const bool narrow = p_.weight.dtype == DType::kBFloat16;
    for (int64_t n = output; n < output + outputs; ++n) {
      if (narrow) {
        products(row, rows, n, p_.weight.as<const bf16>().at(n));
      } else {
        products(row, rows, n, p_.weight.as<const float>().at(n));
      }
    }
  }

 private:
  template <class W>
  void products(int64_t row, int64_t rows, int64_t n, const W* w) const {
    const int64_t inputs = p_.x.size(1);
    for (int64_t t = row; t < row + rows; ++t) {
      const float sum = p_.x.dtype == DType::kBFloat16 ? block_sum(p_.x.as<const bf16>().at(t), w, inputs)
                                                       : block_sum(p_.x.as<const float>().at(t), w, inputs);
      if (p_.out.dtype == DType::kBFloat16) {
        *p_.out.as<bf16>().at(t, n) = bf16_from_float(sum);
      } else {
        *p_.out.as<float>().at(t, n) = sum;
      }
    }
  }

  const DenseLinearParams& p_;
};

using Fp8 = Kernel<false, true>;
using Fp4 = Kernel<true, true>;
using Grouped = Kernel<false, false>;

}  // namespace

int64_t fp8_linear_workspace_bytes(const LinearParams& p, const Context& c) {
  return linear_workspace_bytes<Fp8>(p, c);
}
int64_t fp4_linear_workspace_bytes(const LinearParams& p, const Context& c) {
  return linear_workspace_bytes<Fp4>(p, c);
}
int64_t grouped_linear_workspace_bytes(const LinearParams& p, const Context& c) {
  return linear_workspace_bytes<Grouped>(p, c);
}
Status fp8_linear(const LinearParams& p, const Context& c) { return run_linear<Fp8>(p, c); }
Status fp4_linear(const LinearParams& p, const Context& c) { return run_linear<Fp4>(p, c); }
Status grouped_linear(const LinearParams& p, const Context& c) { return run_linear<Grouped>(p, c); }

int64_t dense_linear_workspace_bytes(const DenseLinearParams& p, const Context& c) {
  return dense_workspace_bytes<DenseKernel>(p, c);
}
Status dense_linear(const DenseLinearParams& p, const Context& c) { return run_dense<DenseKernel>(p, c); }

}  // namespace dsv4::scalar
