// The mixture of experts for the CUDA kernels: random operands as a checkpoint stores them, the answer in float64 (with
// the roundings that the definition has), and the comparison.
#pragma once

#include <algorithm>
#include <cmath>
#include <memory>
#include <string>
#include <vector>

#include "buffer.h"
#include "common/pages.h"
#include "cuda/sm80/moe.h"

namespace dsv4::testing {

// One matrix of every expert; X: the type of the activations.
template <class X>
struct ExpertTensor {
  WeightFormat format;
  int64_t experts, out, in;
  DeviceTensor<X> plain;
  DeviceTensor<uint8_t> codes, scale;
  DeviceTensor<float> wide_scale;
  bool wide;

  ExpertTensor(WeightFormat f, bool wide_scales, int64_t e, int64_t o, int64_t i, uint64_t seed)
      : format(f),
        experts(e),
        out(o),
        in(i),
        plain({f == WeightFormat::kPlain ? e : 0, o, i}),
        codes({f == WeightFormat::kPlain ? 0 : e, o, fp4() ? i / 2 : i}),
        scale({f == WeightFormat::kPlain || wide_scales ? 0 : e, scale_rows(), scale_columns()}),
        wide_scale({f == WeightFormat::kPlain || !wide_scales ? 0 : e, scale_rows(), scale_columns()}),
        wide(wide_scales) {
    Random random(seed);
    const float width = 1.7f / std::sqrt(static_cast<float>(in));
    for (int64_t expert = 0; expert < e; ++expert) {
      for (int64_t at = 0; at < out * in && format == WeightFormat::kPlain; ++at) {
        plain.at(expert, at) = from_float<X>(random.uniform(-width, width));
      }
      for (int64_t at = 0; at < codes.inner() && format != WeightFormat::kPlain; ++at) {
        const uint8_t code = static_cast<uint8_t>(random.bits() >> 20);
        codes.at(expert, at) = !fp4() && (code & 0x7F) > 0x70 ? static_cast<uint8_t>(code ^ 0x40) : code;
      }
      for (int64_t at = 0; at < scale_rows() * scale_columns() && format != WeightFormat::kPlain; ++at) {
        if (wide) {
          wide_scale.at(expert, at) = random.uniform(0.01f, 0.03f);
        } else {
          scale.at(expert, at) = static_cast<uint8_t>((fp4() ? 121 : 118) + (random.bits() >> 20) % 3);
        }
      }
    }
    plain.upload();
    codes.upload();
    scale.upload();
    wide_scale.upload();
  }

  bool fp4() const { return format == WeightFormat::kFp4; }
  int64_t scale_rows() const { return fp4() ? out : (out + 127) / 128; }
  int64_t scale_columns() const { return (in + (fp4() ? 31 : 127)) / (fp4() ? 32 : 128); }

  double at(int64_t expert, int64_t row, int64_t k) {
    if (format == WeightFormat::kPlain) return to_float(plain.at(expert, row * in + k));
    const uint8_t code = codes.at(expert, fp4() ? row * (in / 2) + k / 2 : row * in + k);
    const double value = fp4() ? e2m1_value(static_cast<uint8_t>(code >> (k % 2 * 4))) : e4m3_value(code);
    const int64_t s = (fp4() ? row : row / 128) * scale_columns() + k / (fp4() ? 32 : 128);
    return value * (wide ? wide_scale.at(expert, s) : e8m0_value(scale.at(expert, s)));
  }

  ExpertMatrix matrix() {
    ExpertMatrix m;
    m.format = format;
    if (format == WeightFormat::kPlain) {
      m.data = plain.template any<3>();
      return m;
    }
    m.data = codes.any<3>();
    m.data.dtype = DType::kUInt8;
    m.scale = wide ? wide_scale.any<3>() : scale.any<3>();
    if (!wide) m.scale.dtype = DType::kUInt8;
    return m;
  }
  bool intact() { return plain.intact() && codes.intact() && scale.intact() && wide_scale.intact(); }
};

struct MoeCase {
  int64_t tokens = 5, hidden = 96, inter = 72, experts = 6, top_k = 3;
  WeightFormat up = WeightFormat::kFp4, down = WeightFormat::kFp4;
  WeightFormat shared = WeightFormat::kFp8;  // kNone: no shared expert
  int64_t shared_inter = 40;
  bool wide_scales = false;
  float limit = 1.0f;
  int64_t pad = 0;  // elements between one token's row and the next
  uint64_t seed = 1;
};

template <class X>
struct MoeProblem {
  MoeCase c;
  DeviceTensor<X> x, result;
  DeviceTensor<float> weights;
  DeviceTensor<int32_t> indices;
  ExpertTensor<X> w1, w3, w2, s1, s3, s2;

  explicit MoeProblem(const MoeCase& the_case)
      : c(the_case),
        x({c.tokens, c.hidden}, c.pad),
        result({c.tokens, c.hidden}, c.pad),
        weights({c.tokens, c.top_k}),
        indices({c.tokens, c.top_k}),
        w1(c.up, c.wide_scales, c.experts, c.inter, c.hidden, c.seed * 7 + 1),
        w3(c.up, c.wide_scales, c.experts, c.inter, c.hidden, c.seed * 7 + 2),
        w2(c.down, c.wide_scales, c.experts, c.hidden, c.inter, c.seed * 7 + 3),
        s1(shared_format(), c.wide_scales, shared_count(), c.shared_inter, c.hidden, c.seed * 7 + 4),
        s3(shared_format(), c.wide_scales, shared_count(), c.shared_inter, c.hidden, c.seed * 7 + 5),
        s2(shared_format(), c.wide_scales, shared_count(), c.hidden, c.shared_inter, c.seed * 7 + 6) {
    // A token's data depends on its number alone, not on how many there are.
    for (int64_t t = 0; t < c.tokens; ++t) {
      Random random(c.seed * 1000003 + static_cast<uint64_t>(t));
      for (int64_t i = 0; i < c.hidden; ++i) x.at(t, i) = from_float<X>(random.uniform(-2, 2));
      for (int64_t k = 0; k < c.top_k; ++k) {
        weights.at(t, k) = random.uniform(0.1f, 1);
        // Some experts get nothing, some pairs have none, some tokens the same expert twice.
        const int64_t e = static_cast<int64_t>((random.bits() >> 20) % static_cast<uint64_t>(c.experts + 2)) - 1;
        indices.at(t, k) = static_cast<int32_t>(e == 2 && c.experts > 3 ? 3 : e);
      }
    }
    upload();
  }

  bool has_shared() const { return c.shared != WeightFormat::kNone; }
  WeightFormat shared_format() const { return has_shared() ? c.shared : WeightFormat::kPlain; }
  int64_t shared_count() const { return has_shared() ? 1 : 0; }

  MoeExpertsParams params() {
    MoeExpertsParams p = {};
    p.x = x.template any<2>();
    p.weights = weights.const_view<2>();
    p.indices = indices.any<2>();
    p.indices.dtype = DType::kInt32;
    p.w1 = w1.matrix();
    p.w3 = w3.matrix();
    p.w2 = w2.matrix();
    if (has_shared()) {
      p.shared[0] = s1.matrix();
      p.shared[1] = s3.matrix();
      p.shared[2] = s2.matrix();
    }
    p.swiglu_limit = c.limit;
    p.result = result.template any<2>();
    return p;
  }

  void upload() {
    x.upload();
    weights.upload();
    indices.upload();
  }

  // The message of what went wrong, or nothing. No cut: the one that the op takes.
  std::string run(const sm80::ExpertCut* wanted = nullptr) { return run(params(), wanted); }
  std::string run(MoeExpertsParams p, const sm80::ExpertCut* wanted) {
    const sm80::ExpertCut cut = wanted != nullptr ? *wanted : sm80::expert_cut(p);
    const int64_t bytes = sm80::moe_experts_workspace_bytes(p, cut);
    DeviceBytes workspace(static_cast<size_t>(bytes));
    p.workspace = {workspace.device(), bytes};
    const Status status = sm80::moe_experts(p, cut, cuda_context());
    if (!status.is_ok()) return status.message();
    if (!finish_device()) return "the kernel failed";
    result.download();
    const bool intact = x.intact() && result.intact() && weights.intact() && indices.intact() && w1.intact() &&
                        w3.intact() && w2.intact() && s1.intact() && s3.intact() && s2.intact() && workspace.intact();
    return intact ? "" : "wrote outside its outputs";
  }

  std::vector<uint32_t> bits_of(int64_t t) {
    std::vector<uint32_t> bits;
    for (int64_t i = 0; i < c.hidden; ++i) bits.push_back(bits_from_float(to_float(result.at(t, i))));
    return bits;
  }

  // Largest difference of a token's result from float64, in units of its root mean square.
  double error(int64_t t) {
    const std::vector<double> expected = result64(t);
    double worst = 0, square = 1e-60;
    for (const double value : expected) square += value * value / static_cast<double>(c.hidden);
    for (int64_t i = 0; i < c.hidden; ++i) {
      const double off = std::fabs(to_float(result.at(t, i)) - expected[static_cast<size_t>(i)]);
      if (std::isnan(off) != std::isnan(expected[static_cast<size_t>(i)])) return INFINITY;
      worst = std::isnan(off) ? worst : std::max(worst, off);
    }
    return worst / std::sqrt(square);
  }

 private:
  static void quantise(std::vector<double>& x) {
    for (size_t first = 0; first < x.size(); first += 128) {
      const size_t end = std::min(x.size(), first + 128);
      uint32_t most = 0;
      for (size_t i = first; i < end; ++i) {
        most = std::max(most, bits_from_float(static_cast<float>(x[i])) & 0x7FFFFFFFu);
      }
      const uint8_t scale = fp8_scale(most);
      for (size_t i = first; i < end; ++i) {
        const float scaled = static_cast<float>(x[i]) * inverse_scale(scale);
        x[i] = scale == 255 ? NAN : static_cast<double>(e4m3_value(e4m3_code(scaled))) * e8m0_value(scale);
      }
    }
  }

  static std::vector<double> product(ExpertTensor<X>& w, int64_t expert, std::vector<double> x) {
    if (w.format != WeightFormat::kPlain) quantise(x);
    std::vector<double> y;
    for (int64_t row = 0; row < w.out; ++row) {
      double sum = 0;
      for (int64_t k = 0; k < w.in; ++k) sum += w.at(expert, row, k) * x[static_cast<size_t>(k)];
      y.push_back(to_float(from_float<X>(static_cast<float>(sum))));
    }
    return y;
  }

  void add_expert(std::vector<double>& total, int64_t t, int64_t expert, double weight, ExpertTensor<X>& a,
                  ExpertTensor<X>& b, ExpertTensor<X>& d) {
    std::vector<double> in, hidden;
    for (int64_t i = 0; i < c.hidden; ++i) in.push_back(to_float(x.at(t, i)));
    const std::vector<double> gate = product(a, expert, in), up = product(b, expert, in);
    for (size_t i = 0; i < gate.size(); ++i) {
      double g = gate[i], u = up[i];
      if (c.limit > 0) {
        g = g > c.limit ? c.limit : g;
        u = u > c.limit ? c.limit : u < -c.limit ? -c.limit : u;
      }
      hidden.push_back(to_float(from_float<X>(static_cast<float>(g / (1 + std::exp(-g)) * u * weight))));
    }
    const std::vector<double> y = product(d, expert, hidden);
    for (size_t i = 0; i < y.size(); ++i) total[i] += y[i];
  }

  std::vector<double> result64(int64_t t) {
    std::vector<double> total(static_cast<size_t>(c.hidden), 0.0);
    for (int64_t k = 0; k < c.top_k; ++k) {
      const int64_t e = indices.at(t, k);
      if (e >= 0 && e < c.experts) add_expert(total, t, e, weights.at(t, k), w1, w3, w2);
    }
    if (has_shared()) add_expert(total, t, 0, 1, s1, s3, s2);
    return total;
  }
};

// What is wrong, or nothing. bfloat16: two roundings of the result's size, and now and then the other side of a
// quantiser's step; float32 with quantised weights: that alone.
template <class X>
std::string try_moe(const MoeCase& c, const sm80::ExpertCut* cut = nullptr) {
  MoeProblem<X> p(c);
  const std::string fault = p.run(cut);
  if (!fault.empty()) return fault;
  const bool exact = sizeof(X) == 4 && c.up == WeightFormat::kPlain && c.down == WeightFormat::kPlain &&
                     (c.shared == WeightFormat::kPlain || c.shared == WeightFormat::kNone);
  const double bound = exact ? 4e-6 : 0.04;
  for (int64_t t = 0; t < c.tokens; ++t) {
    const double error = p.error(t);
    if (!(error <= bound)) return "token " + std::to_string(t) + ": error " + std::to_string(error);
  }
  return "";
}

}  // namespace dsv4::testing
