// mHC problems for the CUDA kernels: random inputs, the answer in float64, and the comparison.
#pragma once

#include <algorithm>
#include <cmath>
#include <string>
#include <vector>

#include "buffer.h"
#include "cuda/sm80/mhc.h"

namespace dsv4::testing {

struct MhcCase {
  int64_t tokens, hidden;
  bool norm = false;
  int64_t pad = 0;           // elements between one token's rows and the next's
  bool narrow_norm = false;  // the norm's weight in the streams' type, not float32
  uint64_t seed = 1;
};

// X: bf16 or float. All tensors of the four ops; each op reads what it needs.
template <class X>
struct MhcProblem {
  MhcCase c;
  DeviceTensor<X> streams, sublayer, result, input, narrow_norm_weight;
  DeviceTensor<float> fn, scale, base, norm_weight, post_in, comb_in, post, comb;
  DeviceBytes workspace;

  // kHead: fn [4, 4 D] and one scale.
  MhcProblem(const MhcCase& the_case, bool head)
      : c(the_case),
        streams({c.tokens, kStreams, c.hidden}, c.pad),
        sublayer({c.tokens, c.hidden}, c.pad),
        result({c.tokens, kStreams, c.hidden}, c.pad),
        input({c.tokens, c.hidden}, c.pad),
        narrow_norm_weight({c.hidden}),
        fn({head ? kStreams : kMixes, kStreams * c.hidden}),
        scale({head ? 1 : 3}),
        base({head ? kStreams : kMixes}),
        norm_weight({c.hidden}),
        post_in({c.tokens, kStreams}),
        comb_in({c.tokens, kStreams, kStreams}),
        post({c.tokens, kStreams}),
        comb({c.tokens, kStreams, kStreams}),
        workspace(static_cast<size_t>(sm80::mhc_workspace_bytes(c.tokens, c.hidden))) {
    // A token's data depends on its number alone, not on how many there are.
    for (int64_t t = 0; t < c.tokens; ++t) {
      Random random(c.seed * 1000003 + static_cast<uint64_t>(t));
      for (int64_t i = 0; i < streams.inner(); ++i) streams.at(t, i) = from_float<X>(random.uniform(-2, 2));
      for (int64_t i = 0; i < c.hidden; ++i) sublayer.at(t, i) = from_float<X>(random.uniform(-2, 2));
      for (int64_t i = 0; i < post_in.inner(); ++i) post_in.at(t, i) = random.uniform(0, 2);
      for (int64_t i = 0; i < comb_in.inner(); ++i) comb_in.at(t, i) = random.uniform(0, 0.5f);
    }
    streams.upload();
    sublayer.upload();
    post_in.upload();
    comb_in.upload();
    Random random(c.seed);
    const float spread = 2.0f / std::sqrt(static_cast<float>(kStreams * c.hidden));
    fn.fill(random, -spread, spread);
    scale.fill(random, 0.5f, 1.5f);
    base.fill(random, -1, 1);
    narrow_norm_weight.fill(random, 0.5f, 1.5f);
    for (int64_t i = 0; i < c.hidden; ++i) norm_weight.at(i) = to_float(narrow_norm_weight.at(i));
    norm_weight.upload();
  }

  MhcMixing mixing() {
    return {fn.template const_view<2>(),
            scale.template const_view<1>(),
            base.template const_view<1>(),
            kNormEps,
            kHcEps,
            kIterations};
  }
  Workspace scratch() { return {workspace.device(), sm80::mhc_workspace_bytes(c.tokens, c.hidden)}; }
  MhcPostParams post_params() {
    return {sublayer.template any<2>(), streams.template any<3>(), post_in.template const_view<2>(),
            comb_in.template const_view<3>(), result.template any<3>()};
  }
  MhcPreParams pre_params(DeviceTensor<X>& of) {
    MhcPreParams p = {of.template any<3>(),    mixing(), {}, kRmsEps, input.template any<2>(), post.template view<2>(),
                      comb.template view<3>(), scratch()};
    if (c.norm) p.norm_weight = c.narrow_norm ? narrow_norm_weight.template any<1>() : norm_weight.template any<1>();
    return p;
  }
  MhcPostPreParams post_pre_params() { return {post_params(), pre_params(result)}; }
  MhcHeadParams head_params() { return {streams.template any<3>(), mixing(), input.template any<2>(), scratch()}; }

  void download() {
    for (DeviceTensor<X>* t : {&result, &input}) t->download();
    for (DeviceTensor<float>* t : {&post, &comb}) t->download();
  }
  bool intact() {
    return streams.intact() && sublayer.intact() && result.intact() && input.intact() && fn.intact() &&
           scale.intact() && base.intact() && norm_weight.intact() && narrow_norm_weight.intact() && post_in.intact() &&
           comb_in.intact() && post.intact() && comb.intact() && workspace.intact();
  }

  static constexpr float kNormEps = 1e-6f, kHcEps = 1e-6f, kRmsEps = 1e-6f;
  static constexpr int kIterations = 20;
};

// One op on a problem; the message of what went wrong, or nothing.
enum class MhcOp { kPost, kPre, kPostPre, kHead };

template <class X>
std::string run_mhc(MhcProblem<X>& p, MhcOp op) {
  const Context context = cuda_context();
  const Status status = op == MhcOp::kPost      ? sm80::mhc_post(p.post_params(), context)
                        : op == MhcOp::kPre     ? sm80::mhc_pre(p.pre_params(p.streams), context)
                        : op == MhcOp::kPostPre ? sm80::mhc_post_pre(p.post_pre_params(), context)
                                                : sm80::mhc_head(p.head_params(), context);
  if (!status.is_ok()) return status.message();
  if (!finish_device()) return "the kernel failed";
  p.download();
  return p.intact() ? "" : "wrote outside its outputs";
}

// The largest error over its limit, of one value.
struct Worst {
  double ratio = 0;
  std::string where;
  void see(const char* name, int64_t token, int64_t index, double got, double expected, double limit) {
    const double error = std::abs(got - expected);
    if (error <= limit * ratio) return;  // a NaN goes on
    ratio = std::isnan(error) ? 1e30 : error / limit;
    where = std::string(name) + "[" + std::to_string(token) + ", " + std::to_string(index) + "]: got " +
            std::to_string(got) + ", expected " + std::to_string(expected) + ", limit " + std::to_string(limit);
  }
};

// The mixing weights of one token of `r`, in float64.
struct Weights {
  double pre[4], post[4], comb[4][4];
};

inline double sigmoid64(double x) { return 1 / (1 + std::exp(-x)); }

template <class X>
Weights weights64(MhcProblem<X>& p, DeviceTensor<X>& r, int64_t token, bool head) {
  const int64_t k = kStreams * p.c.hidden;
  double squares = 0, m[kMixes] = {};
  for (int64_t i = 0; i < k; ++i) {
    const double value = to_float(r.at(token, i));
    squares += value * value;
    for (int row = 0; row < (head ? kStreams : kMixes); ++row) m[row] += p.fn.at(row, i) * value;
  }
  const double inverse = 1 / std::sqrt(squares / static_cast<double>(k) + static_cast<double>(p.kNormEps));
  const auto logit = [&](int group, int row) {
    return m[row] * inverse * static_cast<double>(p.scale.at(group)) + static_cast<double>(p.base.at(row));
  };
  const double eps = p.kHcEps;
  Weights w = {};
  for (int i = 0; i < 4; ++i) w.pre[i] = sigmoid64(logit(0, i)) + eps;
  if (head) return w;
  for (int i = 0; i < 4; ++i) {
    w.post[i] = 2 * sigmoid64(logit(1, 4 + i));
    double sum = 0;
    for (int o = 0; o < 4; ++o) sum += w.comb[i][o] = std::exp(logit(2, 8 + 4 * i + o));
    for (int o = 0; o < 4; ++o) w.comb[i][o] = w.comb[i][o] / sum + eps;
  }
  for (int round = 0; round < p.kIterations; ++round) {
    for (int i = 0; round > 0 && i < 4; ++i) {
      const double sum = w.comb[i][0] + w.comb[i][1] + w.comb[i][2] + w.comb[i][3] + eps;
      for (int o = 0; o < 4; ++o) w.comb[i][o] /= sum;
    }
    for (int o = 0; o < 4; ++o) {
      const double sum = w.comb[0][o] + w.comb[1][o] + w.comb[2][o] + w.comb[3][o] + eps;
      for (int i = 0; i < 4; ++i) w.comb[i][o] /= sum;
    }
  }
  return w;
}

// What the op made of the problem against float64; a ratio of at most 1 passes. Limits: half a unit in the last place
// of X for each rounding, and 2e-5 (bfloat16: fn in two parts) or 5e-6 (float32) of the absolute terms.
template <class X>
Worst compare_mhc(MhcProblem<X>& p, MhcOp op) {
  const double unit = sizeof(X) == 2 ? 1.0 / 128 : 1.0 / 8388608;  // spacing of X above 1
  const double close = sizeof(X) == 2 ? 2e-5 : 5e-6;
  const auto spacing = [&](double value) { return value == 0 ? 0 : std::ldexp(unit, std::ilogb(value)); };
  const int64_t d = p.c.hidden;
  Worst worst;
  for (int64_t t = 0; t < p.c.tokens; ++t) {
    if (op == MhcOp::kPost || op == MhcOp::kPostPre) {
      for (int64_t i = 0; i < kStreams * d; ++i) {
        const int64_t o = i / d, column = i % d;
        double sum = p.post_in.at(t, o) * static_cast<double>(to_float(p.sublayer.at(t, column))),
               terms = std::abs(sum);
        for (int s = 0; s < kStreams; ++s) {
          const double term =
              p.comb_in.at(t, 4 * s + o) * static_cast<double>(to_float(p.streams.at(t, s * d + column)));
          sum += term;
          terms += std::abs(term);
        }
        worst.see("streams", t, i, to_float(p.result.at(t, i)), sum, 0.501 * spacing(sum) + 3e-7 * terms);
      }
      if (op == MhcOp::kPost) continue;
    }
    DeviceTensor<X>& r = op == MhcOp::kPostPre ? p.result : p.streams;
    const Weights w = weights64(p, r, t, op == MhcOp::kHead);
    std::vector<double> u(static_cast<size_t>(d)), terms(u.size(), 0.0);
    double squares = 0;
    for (int64_t i = 0; i < d; ++i) {
      for (int s = 0; s < kStreams; ++s) {
        const double term = w.pre[s] * static_cast<double>(to_float(r.at(t, s * d + i)));
        u[i] += term;
        terms[i] += std::abs(term);
      }
      squares += u[i] * u[i];
    }
    const bool norm = p.c.norm && op != MhcOp::kHead;
    const double inverse = norm ? 1 / std::sqrt(squares / static_cast<double>(d) + static_cast<double>(p.kRmsEps)) : 1;
    for (int64_t i = 0; i < d; ++i) {
      const double factor = norm ? inverse * static_cast<double>(p.norm_weight.at(i)) : 1, value = u[i] * factor;
      // With the norm: rounded before and after, and the mean square of rounded values.
      const double limit = (norm ? 1.6 : 0.501) * spacing(value) + close * terms[i] * std::abs(factor);
      worst.see("input", t, i, to_float(p.input.at(t, i)), value, limit);
    }
    if (op == MhcOp::kHead) continue;
    for (int i = 0; i < 4; ++i) worst.see("post", t, i, p.post.at(t, i), w.post[i], close);
    for (int i = 0; i < 16; ++i) worst.see("comb", t, i, p.comb.at(t, i), w.comb[i / 4][i % 4], close);
  }
  return worst;
}

// Runs and compares; the message of what went wrong, or nothing.
template <class X>
std::string try_mhc(const MhcCase& c, MhcOp op) {
  MhcProblem<X> p(c, op == MhcOp::kHead);
  const std::string fault = run_mhc(p, op);
  if (!fault.empty()) return fault;
  const Worst worst = compare_mhc(p, op);
  return worst.ratio <= 1 ? "" : "error " + std::to_string(worst.ratio) + " times the limit: " + worst.where;
}

// Bits of a token's outputs, to compare runs exactly.
template <class X>
std::vector<uint32_t> bits_of(MhcProblem<X>& p, MhcOp op, int64_t token) {
  std::vector<uint32_t> bits;
  const auto take = [&](auto& tensor) {
    for (int64_t i = 0; i < tensor.inner(); ++i) bits.push_back(bits_from_float(to_float(tensor.at(token, i))));
  };
  if (op == MhcOp::kPost || op == MhcOp::kPostPre) take(p.result);
  if (op != MhcOp::kPost) take(p.input);
  if (op == MhcOp::kPre || op == MhcOp::kPostPre) {
    take(p.post);
    take(p.comb);
  }
  return bits;
}

}  // namespace dsv4::testing
