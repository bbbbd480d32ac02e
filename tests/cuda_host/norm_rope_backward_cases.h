// Problems for the CUDA kernels of the gradients of norms, and their float64 answers.
#pragma once

#include "norm_rope_cases.h"

namespace dsv4::testing {

// How far a result may be from the exact one: its rounding to R, and some roundings to float32 of the terms that it is
// made of, whose magnitudes add up to `terms`; or half of its least denormal number.
template <class R>
double allowed(double exact, double terms, double roundings = 6) {
  const bool narrow = sizeof(R) == 2;
  return (narrow ? 0x1p-8 : 0x1p-24) * std::fabs(exact) + roundings * 0x1p-24 * terms + (narrow ? 0x1p-134 : 0x1p-147);
}

inline std::string differs(const std::string& what, int64_t row, int64_t column, double got, double exact) {
  return what + " row " + std::to_string(row) + " column " + std::to_string(column) + ": got " + std::to_string(got) +
         ", expected " + std::to_string(exact);
}

// A row's gradient in float64: x's, and grad's part in the weight's. by: the root that grad is multiplied with; square:
// mean square + eps.
template <class X, class R>
std::string wrong_row(const X* x, const X* grad, const double* weight, const float* rope, int64_t dim, int64_t pairs,
                      double square, double by, const R* result, double* weight_sums, double* weight_terms) {
  double along = 0, most = 0;
  std::vector<double> turned;
  for (int64_t d = 0; d < dim; ++d) {
    turned.push_back(scalar::turned_back(grad, d, dim - 2 * pairs, rope));
    const double product = turned.back() * (weight == nullptr ? 1 : weight[d]) * to_float(x[d]);
    along += product;
    most += std::fabs(product);
  }
  const double factor = 1 / (square * std::sqrt(square) * static_cast<double>(dim));
  for (int64_t d = 0; d < dim; ++d) {
    const double g = turned[static_cast<size_t>(d)], of_x = to_float(x[d]) * factor;
    const double first = g * (weight == nullptr ? 1 : weight[d]) * by, exact = first - of_x * along;
    const double got = to_float(result[d]);
    if (!(std::fabs(got - exact) <= allowed<R>(exact, std::fabs(first) + std::fabs(of_x) * most))) {
      return differs("gradient", 0, d, got, exact);
    }
    if (weight_sums == nullptr) continue;
    const double part = g * to_float(x[d]) / std::sqrt(square);
    weight_sums[d] += part;
    weight_terms[d] += std::fabs(part);
  }
  return "";
}

template <class R>
std::string wrong_sums(DeviceTensor<R>& got, const std::vector<double>& exact, const std::vector<double>& terms) {
  for (int64_t d = 0; d < got.rows(); ++d) {
    const size_t at = static_cast<size_t>(d);
    if (!(std::fabs(to_float(got.at(d)) - exact[at]) <= allowed<R>(exact[at], terms[at], 8))) {
      return differs("weight", 0, d, to_float(got.at(d)), exact[at]);
    }
  }
  return "";
}

// Scratch memory as large as asked for, up to what begins at a multiple of 64.
class ScratchMemory {
 public:
  Workspace of(int64_t bytes) {
    memory_ = std::make_unique<DeviceBytes>(static_cast<size_t>((bytes + 63) / 64 * 64));
    return {memory_->device(), bytes};
  }
  bool intact() { return memory_->intact(); }

 private:
  std::unique_ptr<DeviceBytes> memory_;
};

// rms_norm_backward, and kv_norm_rope_backward where there are dims to rotate.
template <class X>
struct NormGradientProblem {
  NormCase c;
  DeviceTensor<X> grad, x, grad_x;
  DeviceTensor<float> rope, wide_weight, wide_grad;
  DeviceTensor<bf16> narrow_weight, narrow_grad;
  ScratchMemory memory;

  explicit NormGradientProblem(const NormCase& the_case)
      : c(the_case),
        grad({c.rows, c.dim}, c.shift),
        x({c.rows, c.dim}, c.shift),
        grad_x({c.rows, c.dim}, c.shift),
        rope({c.rows, c.rope_dim > 0 ? c.rope_dim / 2 : 0, 2}, c.shift),
        wide_weight({c.dim}),
        wide_grad({c.dim}),
        narrow_weight({c.dim}),
        narrow_grad({c.dim}) {
    for (int64_t row = 0; row < c.rows; ++row) {
      Random random(c.seed * 1000003 + static_cast<uint64_t>(row));
      for (int64_t d = 0; d < c.dim; ++d) {
        x.at(row, d) = from_float<X>(c.size * random.uniform(-1, 1));
        grad.at(row, d) = from_float<X>(random.uniform(-2, 2));
      }
    }
    upload();
    Random random(c.seed);
    narrow_weight.fill(random, -1.5f, 1.5f);
    wide_weight.fill(random, -1.5f, 1.5f);
    fill_turns(rope, c.seed);
  }

  void upload() {
    x.upload();
    grad.upload();
  }

  NormRopeBackwardParams params() {
    NormRopeBackwardParams p = {
        view_of<2>(grad, false), view_of<2>(x, false), {}, {}, kRowEps, view_of<2>(grad_x, false), {}, {}};
    if (c.weight > 0) {
      p.weight = c.weight == 1 ? view_of<1>(narrow_weight, false) : view_of<1>(wide_weight, false);
      p.grad_weight = c.weight == 1 ? view_of<1>(narrow_grad, false) : view_of<1>(wide_grad, false);
    }
    if (c.rope_dim >= 0) p.rope = view_of<3>(rope, false);
    p.workspace = memory.of(norm_rope_backward_workspace_bytes(p, cuda_context()));
    return p;
  }

  // Through the list of candidates.
  std::string run() {
    const NormRopeBackwardParams p = params();
    const Status status =
        c.rope_dim < 0 ? rms_norm_backward(p, cuda_context()) : kv_norm_rope_backward(p, cuda_context());
    if (!status.is_ok()) return status.message();
    if (!finish_device()) return "the kernel failed";
    grad_x.download();
    wide_grad.download();
    narrow_grad.download();
    const bool intact = x.intact() && grad.intact() && rope.intact() && wide_weight.intact() && narrow_weight.intact();
    return intact && grad_x.intact() && wide_grad.intact() && narrow_grad.intact() && memory.intact()
               ? ""
               : "wrote outside of the results";
  }

  std::string wrong() {
    std::vector<double> weight, sums(static_cast<size_t>(c.dim)), terms(static_cast<size_t>(c.dim));
    for (int64_t d = 0; d < c.dim; ++d) {
      weight.push_back(c.weight == 0 ? 1 : c.weight == 1 ? to_float(narrow_weight.at(d)) : wide_weight.at(d));
    }
    for (int64_t row = 0; row < c.rows; ++row) {
      double square = 0;
      for (int64_t d = 0; d < c.dim; ++d)
        square += static_cast<double>(to_float(x.at(row, d))) * to_float(x.at(row, d));
      square = square / static_cast<double>(c.dim) + kRowEps;
      const std::string fault =
          wrong_row(&x.at(row), &grad.at(row), weight.data(), &rope.at(row), c.dim, c.rope_dim > 0 ? c.rope_dim / 2 : 0,
                    square, 1 / std::sqrt(square), &grad_x.at(row), sums.data(), terms.data());
      if (!fault.empty()) return "row " + std::to_string(row) + ": " + fault;
    }
    if (c.weight == 0) return "";
    return c.weight == 1 ? wrong_sums(narrow_grad, sums, terms) : wrong_sums(wide_grad, sums, terms);
  }
};

template <class X>
std::string try_norm_gradient(const NormCase& c) {
  NormGradientProblem<X> p(c);
  const std::string fault = p.run();
  return fault.empty() ? p.wrong() : fault;
}

template <class X>
struct QueryGradientProblem {
  QueryCase c;
  DeviceTensor<X> grad, query, result;
  DeviceTensor<float> rope;

  explicit QueryGradientProblem(const QueryCase& the_case)
      : c(the_case),
        grad({c.tokens, c.heads, c.dim}, c.shift),
        query({c.tokens, c.heads, c.dim}, c.shift),
        result({c.tokens, c.heads, c.dim}, c.shift),
        rope({c.tokens, c.rope_dim / 2, 2}, c.shift) {
    for (int64_t t = 0; t < c.tokens; ++t) {
      Random random(c.seed * 1000003 + static_cast<uint64_t>(t));
      for (int64_t i = 0; i < query.inner(); ++i) {
        query.at(t, i) = from_float<X>(c.size * random.uniform(-1, 1));
        grad.at(t, i) = from_float<X>(random.uniform(-2, 2));
      }
    }
    upload();
    fill_turns(rope, c.seed);
  }

  void upload() {
    query.upload();
    grad.upload();
  }

  // Through the list of candidates.
  std::string run() {
    const Status status = query_norm_rope_backward({view_of<3>(grad, false), view_of<3>(query, false),
                                                    view_of<3>(rope, false), kRowEps, view_of<3>(result, false)},
                                                   cuda_context());
    if (!status.is_ok()) return status.message();
    if (!finish_device()) return "the kernel failed";
    result.download();
    return query.intact() && grad.intact() && result.intact() && rope.intact() ? "" : "wrote outside of the result";
  }

  std::string wrong() {
    const auto rounded = [](double value) -> double { return scalar::Lanes::rounded<X>(value); };
    for (int64_t t = 0; t < c.tokens; ++t) {
      for (int64_t h = 0; h < c.heads; ++h) {
        const X* q = &query.at(t, h * c.dim);
        double sum = 0;
        for (int64_t d = 0; d < c.dim; ++d) sum += rounded(to_float(q[d]) * to_float(q[d]));
        const double square = rounded(rounded(sum / static_cast<double>(c.dim)) + kRowEps);
        const std::string fault =
            wrong_row(q, &grad.at(t, h * c.dim), nullptr, &rope.at(t), c.dim, c.rope_dim / 2, square,
                      rounded(1 / std::sqrt(square)), &result.at(t, h * c.dim), nullptr, nullptr);
        if (!fault.empty()) return "token " + std::to_string(t) + " head " + std::to_string(h) + ": " + fault;
      }
    }
    return "";
  }
};

template <class X>
std::string try_query_gradient(const QueryCase& c) {
  QueryGradientProblem<X> p(c);
  const std::string fault = p.run();
  return fault.empty() ? p.wrong() : fault;
}

}  // namespace dsv4::testing
