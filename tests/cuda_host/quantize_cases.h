// Problems for the CUDA kernels of quantize, and the scalar kernels' answers.
#pragma once

#include "cpu/quantize_rows.h"
#include "cpu/scalar/rows.h"
#include "cuda/sm80/quantize.h"
#include "row_cases.h"

namespace dsv4::testing {

struct HadamardCase {
  int64_t rows, dim;
  float size = 3;
  int64_t shift = 0;    // elements by which rows begin off 16 bytes
  bool spread = false;  // magnitudes from 2^-12 to 1 of the largest
  uint64_t seed = 1;
};

template <class X>
struct HadamardProblem {
  HadamardCase c;
  DeviceTensor<X> x, result;

  explicit HadamardProblem(const HadamardCase& the_case)
      : c(the_case), x({c.rows, c.dim}, c.shift), result({c.rows, c.dim}, c.shift) {
    for (int64_t row = 0; row < c.rows; ++row) {
      Random random(c.seed * 1000003 + static_cast<uint64_t>(row));
      for (int64_t d = 0; d < c.dim; ++d) {
        const float size = c.spread ? c.size * std::exp2(random.uniform(-12, 0)) : c.size;
        x.at(row, d) = from_float<X>(random.uniform(-size, size));
      }
    }
    x.upload();
  }

  std::string run() {
    const Status status = sm80::hadamard({view_of<2>(x, false), view_of<2>(result, false), {}}, cuda_context());
    if (!status.is_ok()) return status.message();
    if (!finish_device()) return "the kernel failed";
    result.download();
    return x.intact() && result.intact() ? "" : "wrote outside of the result";
  }

  // The bits of the scalar kernel, where sums are exact; else, beyond some widths, its float or a neighbour.
  std::string wrong(bool exact = true) {
    std::vector<double> work(static_cast<size_t>(c.dim));
    std::vector<X> expected(static_cast<size_t>(c.dim));
    for (int64_t row = 0; row < c.rows; ++row) {
      scalar::Lanes().hadamard<X>(&x.at(row), c.dim, std::pow(static_cast<double>(c.dim), -0.5), work.data(),
                                  expected.data());
      for (int64_t d = 0; d < c.dim; ++d) {
        const X got = result.at(row, d), wanted = expected[static_cast<size_t>(d)];
        const float a = to_float(got), b = to_float(wanted);
        const float close = sizeof(X) == 2 ? std::fabs(b) * 0x1p-7f + 0x1p-133f : std::fabs(b) * 0x1p-21f + 0x1p-149f;
        if (std::isnan(a) && std::isnan(b)) continue;
        if (memcmp(&got, &wanted, sizeof(X)) == 0 || (!exact && std::fabs(a - b) <= close)) continue;
        return "row " + std::to_string(row) + " dim " + std::to_string(d) + ": got " + std::to_string(a) +
               ", expected " + std::to_string(b);
      }
    }
    return "";
  }
};

template <class X>
std::string try_hadamard(const HadamardCase& c, bool exact = true) {
  HadamardProblem<X> p(c);
  const std::string fault = p.run();
  return fault.empty() ? p.wrong(exact) : fault;
}

struct QuantizeCase {
  int64_t rows, n, block;
  bool fp4 = false;
  float size = 3;
  int64_t shift = 0;
  uint64_t seed = 1;
};

template <class X>
struct QuantizeProblem {
  QuantizeCase c;
  DeviceTensor<X> x;
  DeviceTensor<uint8_t> codes, scale;

  explicit QuantizeProblem(const QuantizeCase& the_case)
      : c(the_case),
        x({c.rows, c.n}, c.shift),
        codes({c.rows, c.fp4 ? c.n / 2 : c.n}, c.shift),
        scale({c.rows, (c.n + c.block - 1) / c.block}, c.shift) {
    for (int64_t row = 0; row < c.rows; ++row) {
      Random random(c.seed * 1000003 + static_cast<uint64_t>(row));
      for (int64_t i = 0; i < c.n; ++i) {
        x.at(row, i) =
            from_float<X>(c.size * std::exp2(random.uniform(-9, 0)) * (random.bits() >> 20 & 1 ? 1.f : -1.f));
      }
    }
    x.upload();
  }

  QuantizeParams params(bool on_host) {
    return {view_of<2>(x, on_host), c.block, view_of<2>(codes, on_host), view_of<2>(scale, on_host)};
  }
  std::string run() {
    const QuantizeParams p = params(false);
    const Status status = c.fp4 ? sm80::quantize_fp4(p, cuda_context()) : sm80::quantize_fp8(p, cuda_context());
    if (!status.is_ok()) return status.message();
    if (!finish_device()) return "the kernel failed";
    codes.download();
    scale.download();
    return x.intact() && codes.intact() && scale.intact() ? "" : "wrote outside of the result";
  }
  std::string wrong() {
    std::vector<uint8_t> own_codes(static_cast<size_t>(c.rows * (codes.inner() + c.shift)) + 1, 0xFF);
    std::vector<uint8_t> own_scale(static_cast<size_t>(c.rows * (scale.inner() + c.shift)) + 1, 0xFF);
    QuantizeParams p = params(true);
    p.codes.data = own_codes.data(), p.codes.stride[0] = codes.inner() + c.shift;
    p.scale.data = own_scale.data(), p.scale.stride[0] = scale.inner() + c.shift;
    const Status status = c.fp4 ? quantize_fp4_rows(scalar::Lanes(), p, scalar_context())
                                : quantize_fp8_rows(scalar::Lanes(), p, scalar_context());
    if (!status.is_ok()) return status.message();
    for (int64_t row = 0; row < c.rows; ++row) {
      const size_t at = static_cast<size_t>(row);
      if (memcmp(&scale.at(row), &own_scale[at * static_cast<size_t>(scale.inner() + c.shift)],
                 static_cast<size_t>(scale.inner())) != 0) {
        return "scales of row " + std::to_string(row);
      }
      if (memcmp(&codes.at(row), &own_codes[at * static_cast<size_t>(codes.inner() + c.shift)],
                 static_cast<size_t>(codes.inner())) != 0) {
        return "codes of row " + std::to_string(row);
      }
    }
    return "";
  }
};

template <class X>
std::string try_quantize(const QuantizeCase& c) {
  QuantizeProblem<X> p(c);
  const std::string fault = p.run();
  return fault.empty() ? p.wrong() : fault;
}

struct DequantizeCase {
  int64_t batch, rows, n, block, group = 1;
  bool fp4 = false, wide_scale = false;
  int64_t shift = 0;
  uint64_t seed = 1;
};

template <class X>
struct DequantizeProblem {
  DequantizeCase c;
  DeviceTensor<uint8_t> codes, scale;
  DeviceTensor<float> wide_scale;
  DeviceTensor<X> result;

  explicit DequantizeProblem(const DequantizeCase& the_case)
      : c(the_case),
        codes({c.batch, c.rows, c.fp4 ? c.n / 2 : c.n}, c.shift),
        scale({c.batch, scale_rows(c), scale_columns(c)}, c.shift),
        wide_scale({c.batch, scale_rows(c), scale_columns(c)}, c.shift),
        result({c.batch, c.rows, c.n}, c.shift) {
    Random random(c.seed);
    for (int64_t b = 0; b < c.batch; ++b) {
      for (int64_t i = 0; i < codes.inner(); ++i) codes.at(b, i) = static_cast<uint8_t>(random.bits() >> 20);
      for (int64_t i = 0; i < scale.inner(); ++i) {
        scale.at(b, i) = static_cast<uint8_t>(random.bits() >> 20);  // 0 and 255 among them
        wide_scale.at(b, i) = random.uniform(-2, 2);
      }
    }
    codes.upload();
    scale.upload();
    wide_scale.upload();
  }
  static int64_t scale_rows(const DequantizeCase& c) { return (c.rows + c.group - 1) / c.group; }
  static int64_t scale_columns(const DequantizeCase& c) { return (c.n + c.block - 1) / c.block; }

  DequantizeParams params(bool on_host) {
    const AnyView<3> by = c.wide_scale ? view_of<3>(wide_scale, on_host) : view_of<3>(scale, on_host);
    return {c.fp4, view_of<3>(codes, on_host), by, c.group, c.block, view_of<3>(result, on_host)};
  }
  std::string run() {
    const Status status = sm80::dequantize(params(false), cuda_context());
    if (!status.is_ok()) return status.message();
    if (!finish_device()) return "the kernel failed";
    result.download();
    return codes.intact() && scale.intact() && result.intact() ? "" : "wrote outside of the result";
  }
  std::string wrong() {
    std::vector<X> expected(static_cast<size_t>(c.batch * (result.inner() + c.shift)) + 1);
    DequantizeParams p = params(true);
    p.result.data = expected.data(), p.result.stride[0] = result.inner() + c.shift;
    const Status status = dequantize_rows<X>(scalar::Lanes(), p, scalar_context());
    if (!status.is_ok()) return status.message();
    for (int64_t b = 0; b < c.batch; ++b) {
      for (int64_t i = 0; i < result.inner(); ++i) {
        const X got = result.at(b, i), wanted = expected[static_cast<size_t>(b * (result.inner() + c.shift) + i)];
        if (std::isnan(to_float(got)) && std::isnan(to_float(wanted))) continue;
        if (memcmp(&got, &wanted, sizeof(X)) == 0) continue;
        return "batch " + std::to_string(b) + " element " + std::to_string(i) + ": got " +
               std::to_string(to_float(got)) + ", expected " + std::to_string(to_float(wanted));
      }
    }
    return "";
  }
};

template <class X>
std::string try_dequantize(const DequantizeCase& c) {
  DequantizeProblem<X> p(c);
  const std::string fault = p.run();
  return fault.empty() ? p.wrong() : fault;
}

}  // namespace dsv4::testing
