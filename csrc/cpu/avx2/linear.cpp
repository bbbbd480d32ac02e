// The linear layers with AVX2 and FMA: weights and activations as float32, multiplied by cpu/avx2/product.h. A scale is
// multiplied into its codes: exact where it is a power of two.
#include "cpu/linear.h"

#include "cpu/avx2/product.h"
#include "cpu/linear_driver.h"
#include "cpu/scalar/quantised.h"

namespace dsv4::avx2 {
namespace {

constexpr int64_t kRows = 128;  // of activations that share an expansion of weights

template <bool kFp4, bool kQuantise>
class Kernel {
 public:
  static constexpr int64_t kUnit = 1;
  static int64_t panel(const LinearParams&, int64_t) { return kLinearPanel; }
  static int64_t rows(const LinearParams&) { return kRows; }
  static int64_t unit_bytes(const LinearParams& p) {
    return round_up(p.x.size(2), kLanes) * static_cast<int64_t>(sizeof(float));
  }
  static int64_t memory(const LinearParams&) {
    return kPanelBytes + kRows * kLinearPanel * static_cast<int64_t>(sizeof(float));
  }

  static void prepare(const LinearParams& p, int64_t token, int64_t group, uint8_t* to) {
    float* row = reinterpret_cast<float*>(to);
    if (p.x.dtype == DType::kBFloat16) {
      prepare_row(p.x.as<const bf16>().at(token, group), p.x.size(2), row);
    } else {
      prepare_row(p.x.as<const float>().at(token, group), p.x.size(2), row);
    }
  }

  Kernel(const LinearParams& p, uint8_t* memory)
      : p_(p), panel_(reinterpret_cast<float*>(memory)), sums_(reinterpret_cast<float*>(memory + kPanelBytes)) {}

  void run(const uint8_t* units, const LinearPiece& piece) const {
    const int64_t first_row = piece.group * p_.out.size(2) + piece.begin, outputs = piece.end - piece.begin;
    const int64_t stride = round_up(unit_bytes(p_), 64);
    product([&](int64_t row, int64_t first, int64_t count, float* to) { expand(first_row + row, first, count, to); },
            outputs, p_.x.size(2), panel_,
            [&](int64_t t) { return reinterpret_cast<const float*>(units + t * stride); }, piece.rows,
            [&](int64_t t) { return sums_ + t * kLinearPanel; });
    for (int64_t t = 0; t < piece.rows; ++t) {
      if (p_.out.dtype == DType::kBFloat16) {
        narrow(sums_ + t * kLinearPanel, outputs, p_.out.as<bf16>().at(piece.row + t, piece.group, piece.begin));
      } else {
        narrow(sums_ + t * kLinearPanel, outputs, p_.out.as<float>().at(piece.row + t, piece.group, piece.begin));
      }
    }
  }

 private:
  template <class X>
  static void prepare_row(const X* x, int64_t inputs, float* to) {
    if constexpr (kQuantise) {
      scalar::quantise(x, inputs, to);
      for (int64_t i = inputs; i % kLanes != 0; ++i) to[i] = 0;
    } else {
      widen(x, inputs, to);
    }
  }

  void expand(int64_t row, int64_t first, int64_t count, float* to) const {
    const int64_t scale_row = kFp4 ? row : row / 128;
    const auto scale = [&](int64_t block) {
      return p_.scale.dtype == DType::kFloat32 ? *p_.scale.as<const float>().at(scale_row, block)
                                               : e8m0_value(*p_.scale.as<const uint8_t>().at(scale_row, block));
    };
    expand_codes<kFp4>(p_.weight.as<const uint8_t>().at(row), p_.weight.stride[0], first, count, scale, to);
  }

  const LinearParams& p_;
  float *panel_, *sums_;
};

class DenseKernel {
 public:
  static int64_t memory(const DenseLinearParams& p) {
    const int64_t rows = p.x.size(0) < kDenseRows ? p.x.size(0) : kDenseRows;
    return kPanelBytes + rows * (kDenseOutputs + round_up(p.x.size(1), kLanes)) * static_cast<int64_t>(sizeof(float));
  }

  DenseKernel(const DenseLinearParams& p, uint8_t* memory)
      : p_(p),
        stride_(round_up(p.x.size(1), kLanes)),
        panel_(reinterpret_cast<float*>(memory)),
        sums_(reinterpret_cast<float*>(memory + kPanelBytes)),
        x_(sums_ + (p.x.size(0) < kDenseRows ? p.x.size(0) : kDenseRows) * kDenseOutputs) {}

  void run(int64_t row, int64_t rows, int64_t output, int64_t outputs) {
    if (row != held_) {
      for (int64_t t = 0; t < rows; ++t) widen_row(p_.x, row + t, 0, p_.x.size(1), x_ + t * stride_);
      held_ = row;
    }
    product(
        [&](int64_t r, int64_t first, int64_t count, float* to) { widen_row(p_.weight, output + r, first, count, to); },
        outputs, p_.x.size(1), panel_, [&](int64_t t) { return x_ + t * stride_; }, rows,
        [&](int64_t t) { return sums_ + t * kDenseOutputs; });
    for (int64_t t = 0; t < rows; ++t) {
      if (p_.out.dtype == DType::kBFloat16) {
        narrow(sums_ + t * kDenseOutputs, outputs, p_.out.as<bf16>().at(row + t, output));
      } else {
        narrow(sums_ + t * kDenseOutputs, outputs, p_.out.as<float>().at(row + t, output));
      }
    }
  }

 private:
  const DenseLinearParams& p_;
  int64_t stride_;
  float *panel_, *sums_, *x_;
  int64_t held_ = -1;  // the first of the rows in x_
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

}  // namespace dsv4::avx2
