// The mixture of experts for the CUDA kernels: random operands as a checkpoint stores them, in guarded memory.
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
      // Every second 64 rows are smaller, so that no half of a quantiser's block tells the scale of the whole.
      for (int64_t at = 0; at < out * in && format == WeightFormat::kPlain; ++at) {
        const float row_width = at / in / 64 % 2 == 0 ? width : width / 16;
        plain.at(expert, at) = from_float<X>(random.uniform(-row_width, row_width));
      }
      for (int64_t at = 0; at < codes.inner() && format != WeightFormat::kPlain; ++at) {
        const uint8_t code = static_cast<uint8_t>(random.bits() >> 20);
        const uint8_t kept = at / (codes.inner() / out) / 64 % 2 == 0 ? 0xFF : fp4() ? 0x99 : 0xDF;
        codes.at(expert, at) = (!fp4() && (code & 0x7F) > 0x70 ? static_cast<uint8_t>(code ^ 0x40) : code) & kept;
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
  WeightFormat gate = WeightFormat::kNone;  // of w1, routed and shared; kNone: as w3
  bool wide_gate = false;                   // its scales: float32 where those of w3 are e8m0, or the reverse

  bool wide_w1() const { return wide_scales != wide_gate; }
  WeightFormat gate_or(WeightFormat other) const { return gate == WeightFormat::kNone ? other : gate; }
};

template <class X>
struct MoeProblem {
  MoeCase c;
  DeviceTensor<X> x, result;
  DeviceTensor<float> weights;
  DeviceTensor<int32_t> indices;
  ExpertTensor<X> w1, w3, w2, s1, s3, s2;
  sm80::ExpertCut cut = {};                // of the last run
  std::unique_ptr<DeviceBytes> workspace;  // what the last run left

  explicit MoeProblem(const MoeCase& the_case)
      : c(the_case),
        x({c.tokens, c.hidden}, c.pad),
        result({c.tokens, c.hidden}, c.pad),
        weights({c.tokens, c.top_k}),
        indices({c.tokens, c.top_k}),
        w1(c.gate_or(c.up), c.wide_w1(), c.experts, c.inter, c.hidden, c.seed * 7 + 1),
        w3(c.up, c.wide_scales, c.experts, c.inter, c.hidden, c.seed * 7 + 2),
        w2(c.down, c.wide_scales, c.experts, c.hidden, c.inter, c.seed * 7 + 3),
        s1(c.gate_or(shared_format()), c.wide_w1(), shared_count(), c.shared_inter, c.hidden, c.seed * 7 + 4),
        s3(shared_format(), c.wide_scales, shared_count(), c.shared_inter, c.hidden, c.seed * 7 + 5),
        s2(shared_format(), c.wide_scales, shared_count(), c.hidden, c.shared_inter, c.seed * 7 + 6) {
    // A token's data depends on its number alone, not on how many there are.
    for (int64_t t = 0; t < c.tokens; ++t) {
      Random random(c.seed * 1000003 + static_cast<uint64_t>(t));
      for (int64_t i = 0; i < c.hidden; ++i) {
        const float width = i / 64 % 2 == 0 ? 2 : 0.1f;
        x.at(t, i) = from_float<X>(random.uniform(-width, width));
      }
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
    cut = wanted != nullptr ? *wanted : sm80::expert_cut(p);
    const int64_t bytes = sm80::moe_experts_workspace_bytes(p, cut);
    workspace = std::make_unique<DeviceBytes>(static_cast<size_t>(bytes));
    p.workspace = {workspace->device(), bytes};
    const Status status = sm80::moe_experts(p, cut, cuda_context());
    if (!status.is_ok()) return status.message();
    if (!finish_device()) return "the kernel failed";
    result.download();
    const bool intact = x.intact() && result.intact() && weights.intact() && indices.intact() && w1.intact() &&
                        w3.intact() && w2.intact() && s1.intact() && s3.intact() && s2.intact() && workspace->intact();
    return intact ? "" : "wrote outside its outputs";
  }

  std::vector<uint32_t> bits_of(int64_t t) {
    std::vector<uint32_t> bits;
    for (int64_t i = 0; i < c.hidden; ++i) bits.push_back(bits_from_float(to_float(result.at(t, i))));
    return bits;
  }
};

}  // namespace dsv4::testing
