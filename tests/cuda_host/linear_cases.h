// Linear layers for the CUDA kernels: random operands as a checkpoint stores them, the answer in float64, and the
// comparison.
#pragma once

#include <algorithm>
#include <cmath>
#include <string>
#include <vector>

#include "buffer.h"
#include "common/pages.h"
#include "cuda/sm80/linear.h"
#include "cuda/sm90/linear.h"

namespace dsv4::testing {

enum class LinearOp { kFp8, kFp4, kGrouped, kDense };

struct LinearCase {
  LinearOp op;
  int64_t tokens, inputs, outputs;
  int64_t groups = 1;
  bool wide_x = false;       // float32
  bool wide_scales = false;  // float32; of dense weights: the weights
  bool wide_out = true;
  int64_t pad = 0;  // elements between one row and the next, of every operand
  uint64_t seed = 1;
};

// The tiles of the sm80 kernels, and that of Hopper's warpgroups.
enum class LinearTile { kFew, kSome, kMany, kGroup };
inline constexpr LinearTile kEveryTile[] = {LinearTile::kFew, LinearTile::kSome, LinearTile::kMany, LinearTile::kGroup};

// Those that the device has for a case.
inline std::vector<LinearTile> tiles_of(const LinearCase& c) {
  const bool narrow =
      c.op == LinearOp::kFp8 || (c.op == LinearOp::kFp4 && !c.wide_scales) || (c.op == LinearOp::kGrouped && !c.wide_x);
  return {kEveryTile, kEveryTile + (narrow && has_warpgroups() ? 4 : 3)};
}

// x after the quantiser of activations.
inline void quantise_row(std::vector<float>& x) {
  for (size_t first = 0; first < x.size(); first += 128) {
    const size_t end = std::min(x.size(), first + 128);
    uint32_t most = 0;
    for (size_t i = first; i < end; ++i) most = std::max(most, bits_from_float(x[i]) & 0x7FFFFFFFu);
    const uint8_t scale = fp8_scale(most);
    for (size_t i = first; i < end; ++i) {
      x[i] = scale == 255 ? NAN : e4m3_value(e4m3_code(x[i] * inverse_scale(scale))) * e8m0_value(scale);
    }
  }
}

struct LinearProblem {
  LinearCase c;
  int64_t rows, columns, scale_rows, scale_columns;
  DeviceTensor<bf16> narrow_x, narrow_weight, narrow_out;
  DeviceTensor<float> wide_x, wide_weight, wide_out, wide_scale;
  DeviceTensor<uint8_t> codes, scale;

  explicit LinearProblem(const LinearCase& the_case)
      : c(the_case),
        rows(c.groups * c.outputs),
        columns(fp4() ? c.inputs / 2 : c.inputs),
        scale_rows(dense() ? 0
                   : fp4() ? rows
                           : (rows + 127) / 128),
        scale_columns((c.inputs + (fp4() ? 31 : 127)) / (fp4() ? 32 : 128)),
        narrow_x({c.wide_x ? 0 : c.tokens, c.groups, c.inputs}, c.pad),
        narrow_weight({dense() && !c.wide_scales ? rows : 0, c.inputs}, c.pad),
        narrow_out({c.wide_out ? 0 : c.tokens, c.groups, c.outputs}, c.pad),
        wide_x({c.wide_x ? c.tokens : 0, c.groups, c.inputs}, c.pad),
        wide_weight({dense() && c.wide_scales ? rows : 0, c.inputs}, c.pad),
        wide_out({c.wide_out ? c.tokens : 0, c.groups, c.outputs}, c.pad),
        wide_scale({c.wide_scales ? scale_rows : 0, scale_columns}, c.pad),
        codes({dense() ? 0 : rows, columns}, c.pad),
        scale({c.wide_scales ? 0 : scale_rows, scale_columns}, c.pad) {
    // A token's data depends on its number alone, not on how many there are.
    for (int64_t t = 0; t < c.tokens; ++t) {
      Random random(c.seed * 1000003 + static_cast<uint64_t>(t));
      for (int64_t i = 0; i < c.groups * c.inputs; ++i) set_x(t, i, random.uniform(-3, 3));
    }
    Random random(c.seed);
    for (int64_t row = 0; row < rows; ++row) {
      for (int64_t i = 0; i < columns; ++i) {
        if (dense()) {
          set_weight(row, i, random.uniform(-1, 1));
        } else {
          const uint8_t code = static_cast<uint8_t>(random.bits() >> 20);
          codes.at(row, i) = !fp4() && (code & 0x7F) == 0x7F ? uint8_t{0x80} : code;
        }
      }
    }
    for (int64_t row = 0; row < scale_rows; ++row) {
      for (int64_t i = 0; i < scale_columns; ++i) {
        if (c.wide_scales) {
          wide_scale.at(row, i) = random.uniform(0.01f, 0.1f);
        } else {
          scale.at(row, i) = static_cast<uint8_t>(116 + (random.bits() >> 20) % 9);
        }
      }
    }
    upload();
  }

  bool fp4() const { return c.op == LinearOp::kFp4; }
  bool dense() const { return c.op == LinearOp::kDense; }
  void set_x(int64_t t, int64_t i, float value) {
    if (c.wide_x) {
      wide_x.at(t, i) = value;
    } else {
      narrow_x.at(t, i) = from_float<bf16>(value);
    }
  }
  void set_weight(int64_t row, int64_t i, float value) {
    if (c.wide_scales) {
      wide_weight.at(row, i) = value;
    } else {
      narrow_weight.at(row, i) = from_float<bf16>(value);
    }
  }
  double weight_at(int64_t row, int64_t k) {
    if (dense()) return c.wide_scales ? wide_weight.at(row, k) : to_float(narrow_weight.at(row, k));
    const uint8_t code = codes.at(row, fp4() ? k / 2 : k);
    const double value = fp4() ? e2m1_value(static_cast<uint8_t>(code >> (k % 2 * 4))) : e4m3_value(code);
    const int64_t r = fp4() ? row : row / 128, column = k / (fp4() ? 32 : 128);
    return value * (c.wide_scales ? wide_scale.at(r, column) : e8m0_value(scale.at(r, column)));
  }
  float out_at(int64_t t, int64_t i) { return c.wide_out ? wide_out.at(t, i) : to_float(narrow_out.at(t, i)); }

  void upload() {
    for (auto* tensor : {&narrow_x, &narrow_weight}) tensor->upload();
    for (auto* tensor : {&wide_x, &wide_weight, &wide_scale}) tensor->upload();
    codes.upload();
    scale.upload();
  }
  bool intact() {
    return narrow_x.intact() && narrow_weight.intact() && narrow_out.intact() && wide_x.intact() &&
           wide_weight.intact() && wide_out.intact() && wide_scale.intact() && codes.intact() && scale.intact();
  }

  LinearParams params() {
    LinearParams p = {};
    p.x = c.wide_x ? wide_x.any<3>() : narrow_x.any<3>();
    p.out = c.wide_out ? wide_out.any<3>() : narrow_out.any<3>();
    p.weight = codes.any<2>();
    p.scale = c.wide_scales ? wide_scale.any<2>() : scale.any<2>();
    return p;
  }
  DenseLinearParams dense_params() {
    DenseLinearParams p = {};
    p.x = c.wide_x ? wide_x.any<2>() : narrow_x.any<2>();
    p.x.shape[1] = c.inputs;
    p.weight = c.wide_scales ? wide_weight.any<2>() : narrow_weight.any<2>();
    p.out = c.wide_out ? wide_out.any<2>() : narrow_out.any<2>();
    p.out.shape[1] = c.outputs;
    return p;
  }

  // The message of what went wrong, or nothing. No tile: the one that the op takes.
  std::string run(const LinearTile* tile = nullptr) {
    return dense() ? run(dense_params(), tile) : run(params(), tile);
  }
  std::string run(LinearParams p, const LinearTile* tile) {
    const Context context = cuda_context();
    const int64_t bytes = c.op == LinearOp::kGrouped ? sm80::grouped_linear_workspace_bytes(p, context)
                                                     : sm80::quantised_linear_workspace_bytes(p, context);
    DeviceBytes workspace(static_cast<size_t>(bytes));
    p.workspace = {workspace.device(), bytes};
    using Run = Status (*)(const LinearParams&, const Context&);
    using RunTile = Status (*)(const LinearParams&, const Context&, sm80::LinearTile);
    constexpr Run kRun[] = {sm80::fp8_linear, sm80::fp4_linear, sm80::grouped_linear};
    constexpr RunTile kRunTile[] = {sm80::fp8_linear, sm80::fp4_linear, sm80::grouped_linear};
    const int op = static_cast<int>(c.op);
    if (tile == nullptr) return finish(kRun[op](p, context), workspace);
#if defined(DSV4_WITH_SM90)
    constexpr Run kRunGroup[] = {sm90::fp8_linear_many, sm90::fp4_linear_many, sm90::grouped_linear_many};
    if (*tile == LinearTile::kGroup) return finish(kRunGroup[op](p, context), workspace);
#endif
    return finish(kRunTile[op](p, context, static_cast<sm80::LinearTile>(*tile)), workspace);
  }
  std::string run(DenseLinearParams p, const LinearTile* tile) {
    const Context context = cuda_context();
    const int64_t bytes = sm80::dense_linear_workspace_bytes(p, context);
    DeviceBytes workspace(static_cast<size_t>(bytes));
    p.workspace = {workspace.device(), bytes};
    return finish(tile == nullptr ? sm80::dense_linear(p, context)
                                  : sm80::dense_linear(p, context, static_cast<sm80::LinearTile>(*tile)),
                  workspace);
  }

  std::vector<uint32_t> bits_of(int64_t t) {
    std::vector<uint32_t> bits;
    for (int64_t i = 0; i < rows; ++i) bits.push_back(bits_from_float(out_at(t, i)));
    return bits;
  }

  // What is wrong with the results, or nothing: one rounding, and kSumError of the sum of the absolute products.
  std::string wrong() {
    for (int64_t t = 0; t < c.tokens; ++t) {
      std::vector<std::vector<float>> x;
      for (int64_t g = 0; g < c.groups; ++g) {
        x.emplace_back();
        for (int64_t k = 0; k < c.inputs; ++k) {
          const int64_t at = g * c.inputs + k;
          x.back().push_back(c.wide_x ? wide_x.at(t, at) : to_float(narrow_x.at(t, at)));
        }
        if (c.op == LinearOp::kFp8 || c.op == LinearOp::kFp4) quantise_row(x.back());
      }
      for (int64_t i = 0; i < rows; ++i) {
        double sum = 0, size = 0;
        for (int64_t k = 0; k < c.inputs; ++k) {
          const double product = x[static_cast<size_t>(i / c.outputs)][static_cast<size_t>(k)] * weight_at(i, k);
          sum += product;
          size += std::fabs(product);
        }
        const double got = out_at(t, i);
        const double bound = std::fabs(sum) * (c.wide_out ? 0x1p-24 : 0x1p-8) * 1.001 + size * kSumError + 1e-40;
        if (std::isnan(sum) ? std::isnan(got) : std::fabs(got - sum) <= bound) continue;
        return "[" + std::to_string(t) + ", " + std::to_string(i) + "]: got " + std::to_string(got) + ", expected " +
               std::to_string(sum);
      }
    }
    return "";
  }

 private:
  std::string finish(const Status& status, DeviceBytes& workspace) {
    if (!status.is_ok()) return status.message();
    if (!finish_device()) return "the kernel failed";
    narrow_out.download();
    wide_out.download();
    return intact() && workspace.intact() ? "" : "wrote outside its outputs";
  }
};

inline std::string try_linear(const LinearCase& c, const LinearTile* tile = nullptr) {
  LinearProblem p(c);
  const std::string fault = p.run(tile);
  return fault.empty() ? p.wrong() : fault;
}

}  // namespace dsv4::testing
