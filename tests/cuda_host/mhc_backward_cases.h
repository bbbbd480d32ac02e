// Gradients of mHC for the CUDA kernels: random inputs, the answer in float64 with what each value may be off, and the
// comparison.
#pragma once

#include "mhc_cases.h"

namespace dsv4::testing {

struct MhcBackwardCase {
  int64_t tokens, hidden;
  bool norm = false, residual = false;
  int64_t pad = 0;           // elements between one token's rows and the next's
  bool narrow_norm = false;  // the norm's weight in the streams' type, not float32
  int iterations = 20;
  float hc_eps = 1e-6f;
  uint64_t seed = 1;
  bool frozen_fn = false;  // whose gradient is then none
};

enum class MhcBackwardOp { kPost, kPre, kHead };
inline constexpr MhcBackwardOp kBackwardOps[] = {MhcBackwardOp::kPost, MhcBackwardOp::kPre, MhcBackwardOp::kHead};

// X: bf16 or float. The tensors of an op; `grad` is that of mhc_post's result, of mhc_pre's input or of mhc_head's
// output.
template <class X>
struct MhcBackwardProblem {
  MhcBackwardCase c;
  MhcBackwardOp op;
  DeviceTensor<X> grad, residual, streams, sublayer, grad_streams, grad_sublayer, narrow_norm_weight;
  DeviceTensor<float> post, comb, fn, scale, base, norm_weight;  // post, comb: mhc_pre: their gradients
  DeviceTensor<float> grad_post, grad_comb, grad_fn, grad_scale, grad_base, grad_norm_weight;
  DeviceBytes workspace;

  int64_t mixes() const { return op == MhcBackwardOp::kHead ? kStreams : kMixes; }
  int64_t groups() const { return op == MhcBackwardOp::kHead ? 1 : 3; }
  int64_t workspace_bytes() const {
    return op == MhcBackwardOp::kPost
               ? 0
               : sm80::mhc_backward_workspace_bytes(c.tokens, c.hidden, dtype_of<X>(), op == MhcBackwardOp::kHead);
  }

  MhcBackwardProblem(const MhcBackwardCase& the_case, MhcBackwardOp the_op)
      : c(the_case),
        op(the_op),
        grad({c.tokens, op == MhcBackwardOp::kPost ? kStreams : 1, c.hidden}, c.pad),
        residual({c.tokens, kStreams, c.hidden}, c.pad),
        streams({c.tokens, kStreams, c.hidden}, c.pad),
        sublayer({c.tokens, c.hidden}, c.pad),
        grad_streams({c.tokens, kStreams, c.hidden}, c.pad),
        grad_sublayer({c.tokens, c.hidden}, c.pad),
        narrow_norm_weight({c.hidden}),
        post({c.tokens, kStreams}),
        comb({c.tokens, kStreams, kStreams}),
        fn({mixes(), kStreams * c.hidden}),
        scale({groups()}),
        base({mixes()}),
        norm_weight({c.hidden}),
        grad_post({c.tokens, kStreams}),
        grad_comb({c.tokens, kStreams, kStreams}),
        grad_fn({mixes(), kStreams * c.hidden}),
        grad_scale({groups()}),
        grad_base({mixes()}),
        grad_norm_weight({c.hidden}),
        workspace(static_cast<size_t>(workspace_bytes())) {
    // A token's data depends on its number alone, not on how many there are.
    for (int64_t t = 0; t < c.tokens; ++t) {
      Random random(c.seed * 1000003 + static_cast<uint64_t>(t));
      const auto fill = [&](auto& tensor, float low, float high) {
        for (int64_t i = 0; i < tensor.inner(); ++i) {
          tensor.at(t, i) = from_float<std::decay_t<decltype(tensor.at(0))>>(random.uniform(low, high));
        }
      };
      fill(streams, -2, 2);
      fill(grad, -1, 1);
      fill(residual, -1, 1);
      fill(sublayer, -2, 2);
      fill(post, -1, 1);
      fill(comb, -1, 1);
    }
    for (DeviceTensor<X>* t : {&streams, &grad, &residual, &sublayer}) t->upload();
    for (DeviceTensor<float>* t : {&post, &comb}) t->upload();
    Random random(c.seed);
    const float spread = 2.0f / std::sqrt(static_cast<float>(kStreams * c.hidden));
    fn.fill(random, -spread, spread);
    scale.fill(random, 0.5f, 1.5f);
    base.fill(random, -1, 1);
    narrow_norm_weight.fill(random, 0.5f, 1.5f);
    for (int64_t i = 0; i < c.hidden; ++i) norm_weight.at(i) = to_float(narrow_norm_weight.at(i));
    norm_weight.upload();
  }

  AnyView<2> rows(DeviceTensor<X>& of) {
    const AnyView<3> all = of.template any<3>();
    return {all.data, all.dtype, {c.tokens, c.hidden}, {all.stride[0], 1}};
  }
  MhcMixing mixing() {
    return {fn.const_view<2>(), scale.const_view<1>(), base.const_view<1>(), kEps, c.hc_eps, c.iterations};
  }
  Workspace scratch() { return {workspace.device(), workspace_bytes()}; }
  MhcPostBackwardParams post_params() {
    return {grad.template any<3>(),         sublayer.template any<2>(),   streams.template any<3>(),
            post.const_view<2>(),           comb.const_view<3>(),         grad_sublayer.template any<2>(),
            grad_streams.template any<3>(), grad_post.template view<2>(), grad_comb.template view<3>()};
  }
  MhcPreBackwardParams pre_params() {
    MhcPreBackwardParams p = {};
    p.grad_input = rows(grad);
    p.grad_post = post.const_view<2>();
    p.grad_comb = comb.const_view<3>();
    if (c.residual) p.grad_residual = residual.template any<3>();
    p.streams = streams.template any<3>();
    p.mixing = mixing();
    if (c.norm) p.norm_weight = c.narrow_norm ? narrow_norm_weight.template any<1>() : norm_weight.template any<1>();
    p.rms_eps = kEps;
    p.grad_streams = grad_streams.template any<3>();
    if (!c.frozen_fn) p.grad_fn = grad_fn.view<2>();
    p.grad_scale = grad_scale.view<1>();
    p.grad_base = grad_base.view<1>();
    if (c.norm) p.grad_norm_weight = grad_norm_weight.view<1>();
    p.workspace = scratch();
    return p;
  }
  MhcHeadBackwardParams head_params() {
    return {rows(grad),
            streams.template any<3>(),
            mixing(),
            grad_streams.template any<3>(),
            c.frozen_fn ? View<float, 2>{} : grad_fn.view<2>(),
            grad_scale.view<1>(),
            grad_base.view<1>(),
            scratch()};
  }

  void download() {
    for (DeviceTensor<X>* t : {&grad_streams, &grad_sublayer}) t->download();
    for (DeviceTensor<float>* t : {&grad_post, &grad_comb, &grad_fn, &grad_scale, &grad_base, &grad_norm_weight}) {
      t->download();
    }
  }
  bool intact() {
    bool all = workspace.intact();
    for (DeviceTensor<X>* t :
         {&grad, &residual, &streams, &sublayer, &grad_streams, &grad_sublayer, &narrow_norm_weight}) {
      all = all && t->intact();
    }
    for (DeviceTensor<float>* t : {&post, &comb, &fn, &scale, &base, &norm_weight, &grad_post, &grad_comb, &grad_fn,
                                   &grad_scale, &grad_base, &grad_norm_weight}) {
      all = all && t->intact();
    }
    return all;
  }

  static constexpr float kEps = 1e-6f;
};

// The message of what went wrong, or nothing.
template <class X>
std::string run_mhc_backward(MhcBackwardProblem<X>& p) {
  const Context context = cuda_context();
  const Status status = p.op == MhcBackwardOp::kPost  ? sm80::mhc_post_backward(p.post_params(), context)
                        : p.op == MhcBackwardOp::kPre ? sm80::mhc_pre_backward(p.pre_params(), context)
                                                      : sm80::mhc_head_backward(p.head_params(), context);
  if (!status.is_ok()) return status.message();
  if (!finish_device()) return "the kernel failed";
  p.download();
  return p.intact() ? "" : "wrote outside its outputs";
}

// A sum in float64 and what a float32 computation of it may be off.
struct Estimate {
  double value = 0, off = 0;
};

// Of the absolute terms of a sum in float32.
inline constexpr double kClose = 5e-7;

inline double spacing_of_bf16(double value) { return value == 0 ? 0 : std::ldexp(1.0 / 128, std::ilogb(value)); }
template <class X>
double spacing(double value) {
  return spacing_of_bf16(value) * (sizeof(X) == 2 ? 1 : 1.0 / 65536);
}

// The gradient of the logits of comb, in float64.
inline void sinkhorn_backward64(const double* logits, double eps, int iterations, double* grad) {
  double softmax[16], x[16];
  for (int i = 0; i < 4; ++i) {
    double sum = 0;
    for (int o = 0; o < 4; ++o) sum += softmax[4 * i + o] = std::exp(logits[4 * i + o]);
    for (int o = 0; o < 4; ++o) x[4 * i + o] = (softmax[4 * i + o] /= sum) + eps;
  }
  std::vector<double> kept, divisors;
  const auto at = [](int step, int line, int k) { return step % 2 == 0 ? 4 * k + line : 4 * line + k; };
  const int steps = 2 * iterations - 1;
  for (int step = 0; step < steps; ++step) {
    for (int line = 0; line < 4; ++line) {
      double sum = eps;
      for (int k = 0; k < 4; ++k) sum += x[at(step, line, k)];
      for (int k = 0; k < 4; ++k) x[at(step, line, k)] /= sum;
      divisors.push_back(sum);
    }
    kept.insert(kept.end(), x, x + 16);
  }
  const auto back = [&](const double* y, int step, const double* divisor) {
    for (int line = 0; line < 4; ++line) {
      double dot = 0;
      for (int k = 0; k < 4; ++k) dot += grad[at(step, line, k)] * y[at(step, line, k)];
      for (int k = 0; k < 4; ++k) {
        double& g = grad[at(step, line, k)];
        g = (g - dot) / (divisor == nullptr ? 1 : divisor[line]);
      }
    }
  };
  for (int step = steps - 1; step >= 0; --step) back(&kept[16 * step], step, &divisors[4 * step]);
  back(softmax, 1, nullptr);
  for (int k = 0; k < 16; ++k) grad[k] *= softmax[k];
}

// One token in float64.
struct TokenGradient64 {
  double pre[4], pre_off[4], m[kMixes], inverse, along;
  Estimate logit[kMixes], dz[kMixes];
  double norm_inverse = 1, norm_along = 0, norm_loose = 0, norm_along_off = 0;  // loose: relative
  std::vector<double> mixed, mixed_off;  // the input before its norm, and what its rounding may be off
};

template <class X>
void norm64(MhcBackwardProblem<X>& p, int64_t t, TokenGradient64& g, Estimate (&grad_pre)[4]) {
  const int64_t d = p.c.hidden;
  double squares = 0, squares_off = 0, dot = 0, dot_off = 0;
  g.mixed.assign(static_cast<size_t>(d), 0);
  g.mixed_off.assign(static_cast<size_t>(d), 0);
  for (int64_t i = 0; i < d; ++i) {
    double sum = 0, off = 0;
    for (int s = 0; s < 4; ++s) {
      const double r = to_float(p.streams.at(t, s * d + i));
      sum += g.pre[s] * r;
      off += g.pre_off[s] * std::abs(r);
    }
    double& u = g.mixed[i];
    u = to_float(from_float<X>(static_cast<float>(sum)));
    // Near a tie the kernel may round to the other side.
    const double low = to_float(from_float<X>(static_cast<float>(sum - off)));
    const double high = to_float(from_float<X>(static_cast<float>(sum + off)));
    g.mixed_off[i] = sizeof(X) == 2 ? high - low : off;
    const double weighted = static_cast<double>(to_float(p.grad.at(t, i))) * static_cast<double>(p.norm_weight.at(i));
    squares += u * u;
    squares_off += 2 * std::abs(u) * g.mixed_off[i];
    dot += weighted * u;
    dot_off += kClose * std::abs(weighted * u) + g.mixed_off[i] * std::abs(weighted);
  }
  const double eps = MhcBackwardProblem<X>::kEps, divisor = squares + static_cast<double>(d) * eps;
  g.norm_inverse = 1 / std::sqrt(divisor / static_cast<double>(d));
  const double quotient = dot / divisor;
  g.norm_along = quotient * g.norm_inverse;
  g.norm_loose = squares_off / divisor;
  g.norm_along_off = g.norm_inverse * dot_off / divisor + std::abs(g.norm_along) * g.norm_loose;
  for (int s = 0; s < 4; ++s) {
    double value = 0, off = 0, with_mixed = 0;
    for (int64_t i = 0; i < d; ++i) {
      const double r = to_float(p.streams.at(t, s * d + i));
      const double weighted = static_cast<double>(to_float(p.grad.at(t, i))) * static_cast<double>(p.norm_weight.at(i));
      value += r * (weighted - quotient * g.mixed[i]);
      off += kClose * (std::abs(r * weighted) + std::abs(quotient * r * g.mixed[i])) +
             std::abs(quotient * r) * g.mixed_off[i];
      with_mixed += r * g.mixed[i];
    }
    off += std::abs(with_mixed) / divisor * (dot_off + std::abs(quotient) * squares_off);
    off += std::abs(value) * g.norm_loose;
    grad_pre[s] = {value * g.norm_inverse, off * g.norm_inverse};
  }
}

template <class X>
TokenGradient64 token64(MhcBackwardProblem<X>& p, int64_t t) {
  const int64_t k = kStreams * p.c.hidden;
  const int mixes = static_cast<int>(p.mixes());
  TokenGradient64 g;
  double squares = 0, logits[kMixes], m_off[kMixes];
  for (int64_t i = 0; i < k; ++i) squares += std::pow(static_cast<double>(to_float(p.streams.at(t, i))), 2);
  g.inverse = 1 / std::sqrt(squares / static_cast<double>(k) + static_cast<double>(MhcBackwardProblem<X>::kEps));
  const auto group = [](int j) { return j < 4 ? 0 : j < 8 ? 1 : 2; };
  for (int j = 0; j < mixes; ++j) {
    double sum = 0, terms = 0;
    for (int64_t i = 0; i < k; ++i) {
      const double term = static_cast<double>(to_float(p.streams.at(t, i))) * static_cast<double>(p.fn.at(j, i));
      sum += term;
      terms += std::abs(term);
    }
    g.m[j] = sum * g.inverse;
    m_off[j] = kClose * terms * g.inverse / 4;  // the signs are random: rounding errors cancel
    logits[j] = g.m[j] * static_cast<double>(p.scale.at(group(j))) + static_cast<double>(p.base.at(j));
  }
  Estimate grad_pre[4];
  for (int j = 0; j < 4; ++j) {
    const double s = sigmoid64(logits[j]);
    g.pre[j] = s + static_cast<double>(p.c.hc_eps);
    g.pre_off[j] = kClose * g.pre[j] + s * (1 - s) * static_cast<double>(p.scale.at(0)) * m_off[j];
  }
  if (p.c.norm && mixes == kMixes) {
    norm64(p, t, g, grad_pre);
  } else {
    for (int s = 0; s < 4; ++s) {
      for (int64_t i = 0; i < p.c.hidden; ++i) {
        const double term = static_cast<double>(to_float(p.grad.at(t, i))) *
                            static_cast<double>(to_float(p.streams.at(t, s * p.c.hidden + i)));
        grad_pre[s].value += term;
        grad_pre[s].off += kClose * std::abs(term);
      }
    }
  }
  double comb[16] = {}, largest = 0;
  for (int i = 0; mixes == kMixes && i < 16; ++i) {
    comb[i] = p.comb.at(t, i);
    largest = std::max(largest, std::abs(comb[i]));
  }
  if (mixes == kMixes) sinkhorn_backward64(logits + 8, p.c.hc_eps, p.c.iterations, comb);
  double along = 0;
  for (int j = 0; j < mixes; ++j) {
    const double s = sigmoid64(logits[j]), slope = s * (1 - s), scale = p.scale.at(group(j));
    Estimate in = j < 4 ? grad_pre[j] : Estimate{j < 8 ? 2 * static_cast<double>(p.post.at(t, j - 4)) : 0, 0};
    g.logit[j] = {in.value * slope, in.off * slope + (kClose + m_off[j] * scale) * std::abs(in.value)};
    if (j >= 8) g.logit[j] = {comb[j - 8], (2 * kClose + 2 * m_off[j] * scale) * largest};
    g.dz[j] = {g.logit[j].value * scale * g.inverse,
               (g.logit[j].off + kClose * std::abs(g.logit[j].value)) * scale * g.inverse};
    along += g.dz[j].value * g.m[j] * g.inverse / static_cast<double>(k);
  }
  g.along = along;
  return g;
}

template <class X>
Worst compare_post_backward(MhcBackwardProblem<X>& p) {
  Worst worst;
  const int64_t d = p.c.hidden;
  for (int64_t t = 0; t < p.c.tokens; ++t) {
    double post[4] = {}, post_terms[4] = {}, comb[16] = {}, comb_terms[16] = {};
    for (int64_t i = 0; i < d; ++i) {
      double sum[5] = {}, terms[5] = {};  // of the four streams and the sublayer
      for (int o = 0; o < 4; ++o) {
        const double g = to_float(p.grad.at(t, o * d + i));
        const auto add = [&](double term, double& to, double& absolute) {
          to += term;
          absolute += std::abs(term);
        };
        add(g * static_cast<double>(p.post.at(t, o)), sum[4], terms[4]);
        add(g * static_cast<double>(to_float(p.sublayer.at(t, i))), post[o], post_terms[o]);
        for (int s = 0; s < 4; ++s) {
          add(g * static_cast<double>(p.comb.at(t, 4 * s + o)), sum[s], terms[s]);
          add(g * static_cast<double>(to_float(p.streams.at(t, s * d + i))), comb[4 * s + o], comb_terms[4 * s + o]);
        }
      }
      for (int s = 0; s < 5; ++s) {
        const double got = to_float(s == 4 ? p.grad_sublayer.at(t, i) : p.grad_streams.at(t, s * d + i));
        const double limit = 0.501 * spacing<X>(sum[s]) + 3e-7 * terms[s];
        worst.see(s == 4 ? "sublayer" : "streams", t, s % 4 * d + i, got, sum[s], limit);
      }
    }
    for (int o = 0; o < 4; ++o) worst.see("post", t, o, p.grad_post.at(t, o), post[o], kClose * post_terms[o]);
    for (int k = 0; k < 16; ++k) worst.see("comb", t, k, p.grad_comb.at(t, k), comb[k], kClose * comb_terms[k]);
  }
  return worst;
}

// The streams' gradient of one token.
template <class X>
void see_streams(MhcBackwardProblem<X>& p, int64_t t, const TokenGradient64& g, Worst& worst) {
  const int64_t d = p.c.hidden;
  const double parts = sizeof(X) == 2 ? 2.0 / 65536 : kClose;  // of the products fn^T dz
  for (int64_t i = 0; i < kStreams * d; ++i) {
    const int64_t column = i % d;
    double dx = to_float(p.grad.at(t, column)), dx_off = 0;
    if (!g.mixed.empty()) {
      const double weighted = dx * g.norm_inverse * static_cast<double>(p.norm_weight.at(column));
      dx = weighted - g.norm_along * g.mixed[column];
      dx_off = (kClose + g.norm_loose) * (std::abs(weighted) + std::abs(g.norm_along * g.mixed[column])) +
               g.norm_along_off * std::abs(g.mixed[column]) + std::abs(g.norm_along) * g.mixed_off[column];
    }
    const double r = to_float(p.streams.at(t, i)), pre = g.pre[i / d];
    double value = pre * dx - g.along * r;
    double off = pre * dx_off + g.pre_off[i / d] * std::abs(dx) + kClose * std::abs(g.along * r);
    if (p.c.residual && p.op == MhcBackwardOp::kPre) value += static_cast<double>(to_float(p.residual.at(t, i)));
    for (int j = 0; j < p.mixes(); ++j) {
      const double f = p.fn.at(j, i);
      value += f * g.dz[j].value;
      off += std::abs(f) * g.dz[j].off + parts * std::abs(f * g.dz[j].value);
      off += g.dz[j].off * std::abs(g.m[j] * g.inverse * r) / static_cast<double>(kStreams * d);
    }
    off += 3e-7 * std::abs(value);
    worst.see("streams", t, i, to_float(p.grad_streams.at(t, i)), value, 0.501 * spacing<X>(value) + off);
  }
}

// What the op made of the problem against float64; a ratio of at most 1 passes.
template <class X>
Worst compare_mhc_backward(MhcBackwardProblem<X>& p) {
  if (p.op == MhcBackwardOp::kPost) return compare_post_backward(p);
  const int64_t d = p.c.hidden, width = kStreams * d;
  std::vector<Estimate> fn(static_cast<size_t>(p.mixes() * width)), norm(static_cast<size_t>(d));
  Estimate base[kMixes], scale[3];
  Worst worst;
  for (int64_t t = 0; t < p.c.tokens; ++t) {
    const TokenGradient64 g = token64(p, t);
    see_streams(p, t, g, worst);
    for (int j = 0; j < p.mixes(); ++j) {
      for (int64_t i = 0; i < width; ++i) {
        const double r = to_float(p.streams.at(t, i));
        Estimate& sum = fn[static_cast<size_t>(j * width + i)];
        sum.value += r * g.dz[j].value;
        sum.off += std::abs(r) * (g.dz[j].off + kClose * std::abs(g.dz[j].value));
      }
      base[j].value += g.logit[j].value;
      base[j].off += g.logit[j].off;
      Estimate& of_group = scale[j < 4 ? 0 : j < 8 ? 1 : 2];
      of_group.value += g.logit[j].value * g.m[j];
      of_group.off += g.logit[j].off * (1 + std::abs(g.m[j])) + kClose * std::abs(g.logit[j].value) * 4;
    }
    for (int64_t i = 0; !g.mixed.empty() && i < d; ++i) {
      const double grad = to_float(p.grad.at(t, i));
      norm[i].value += grad * g.mixed[i] * g.norm_inverse;
      norm[i].off +=
          std::abs(grad) * g.norm_inverse * ((kClose + g.norm_loose) * std::abs(g.mixed[i]) + g.mixed_off[i]);
    }
  }
  const double least = 1e-30;  // of no token
  for (int64_t j = 0; j < p.mixes(); ++j) {
    for (int64_t i = 0; i < width; ++i) {
      const Estimate& sum = fn[static_cast<size_t>(j * width + i)];
      worst.see("fn", j, i, p.grad_fn.at(j, i), sum.value, sum.off + least);
    }
    worst.see("base", 0, j, p.grad_base.at(j), base[j].value, base[j].off + least);
  }
  for (int64_t i = 0; i < p.groups(); ++i) {
    worst.see("scale", 0, i, p.grad_scale.at(i), scale[i].value, scale[i].off + least);
  }
  for (int64_t i = 0; p.c.norm && p.op == MhcBackwardOp::kPre && i < d; ++i) {
    worst.see("norm_weight", 0, i, p.grad_norm_weight.at(i), norm[i].value, norm[i].off + least);
  }
  return worst;
}

// Runs and compares; the message of what went wrong, or nothing.
template <class X>
std::string try_mhc_backward(const MhcBackwardCase& c, MhcBackwardOp op) {
  MhcBackwardProblem<X> p(c, op);
  const std::string fault = run_mhc_backward(p);
  if (!fault.empty()) return fault;
  const Worst worst = compare_mhc_backward(p);
  return worst.ratio <= 1 ? "" : "error " + std::to_string(worst.ratio) + " times the limit: " + worst.where;
}

template <class Tensor>
void take_bits(Tensor& tensor, int64_t row, std::vector<uint32_t>& bits) {
  for (int64_t i = 0; i < tensor.inner(); ++i) bits.push_back(bits_from_float(to_float(tensor.at(row, i))));
}

// Bits of a token's own results.
template <class X>
std::vector<uint32_t> bits_of(MhcBackwardProblem<X>& p, int64_t token) {
  std::vector<uint32_t> bits;
  take_bits(p.grad_streams, token, bits);
  if (p.op != MhcBackwardOp::kPost) return bits;
  take_bits(p.grad_sublayer, token, bits);
  take_bits(p.grad_post, token, bits);
  take_bits(p.grad_comb, token, bits);
  return bits;
}

// And of the sums over tokens.
template <class X>
std::vector<uint32_t> bits_of_sums(MhcBackwardProblem<X>& p) {
  std::vector<uint32_t> bits;
  if (p.op == MhcBackwardOp::kPost) return bits;
  for (int64_t j = 0; j < p.mixes(); ++j) {
    take_bits(p.grad_fn, j, bits);
    take_bits(p.grad_base, j, bits);
  }
  for (int64_t i = 0; i < p.groups(); ++i) take_bits(p.grad_scale, i, bits);
  for (int64_t i = 0; p.c.norm && p.op == MhcBackwardOp::kPre && i < p.c.hidden; ++i) {
    take_bits(p.grad_norm_weight, i, bits);
  }
  return bits;
}

}  // namespace dsv4::testing
