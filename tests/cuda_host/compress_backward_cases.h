// compress_entries_backward problems for the CUDA kernels, and their answers in float64.
#pragma once

#include "compress_cases.h"
#include "cpu/compressor_backward.h"
#include "norm_rope_backward_cases.h"

namespace dsv4::testing {

struct EntriesGradientCase {
  int64_t tokens, ratio, dim, rope_dim, sets;
  bool rotate = false;
  float gates = 4;
  int64_t shift = 0;
  uint64_t seed = 1;
};

template <class N>
struct EntriesGradientProblem {
  EntriesGradientCase c;
  int64_t entries, channels;
  DeviceTensor<float> kv, gate, ape, rope, grad_kv, grad_gate, grad_ape;
  DeviceTensor<N> grad, weight, grad_weight;
  ScratchMemory memory;

  explicit EntriesGradientProblem(const EntriesGradientCase& the_case)
      : c(the_case),
        entries(c.tokens / c.ratio),
        channels(c.sets * c.dim),
        kv({c.tokens, channels}, c.shift),
        gate({c.tokens, channels}, c.shift),
        ape({c.ratio, channels}, c.shift),
        rope({entries, c.rope_dim / 2, 2}, c.shift),
        grad_kv({c.tokens, channels}, c.shift),
        grad_gate({c.tokens, channels}, c.shift),
        grad_ape({c.ratio, channels}, c.shift),
        grad({entries, c.dim}, c.shift),
        weight({c.dim}),
        grad_weight({c.dim}) {
    for (int64_t row = 0; row < c.tokens; ++row) {
      Random random(c.seed * 1000003 + static_cast<uint64_t>(row));
      for (int64_t d = 0; d < channels; ++d) {
        kv.at(row, d) = random.uniform(-3, 3);
        gate.at(row, d) = random.uniform(-c.gates, c.gates);
      }
    }
    for (int64_t j = 0; j < entries; ++j) {
      Random random(c.seed * 7000003 + static_cast<uint64_t>(j));
      for (int64_t d = 0; d < c.dim; ++d) grad.at(j, d) = from_float<N>(random.uniform(-2, 2));
    }
    Random random(c.seed);
    ape.fill(random, -1, 1);
    weight.fill(random, -1.5f, 1.5f);
    fill_turns(rope, c.seed);
    upload();
  }

  void upload() {
    kv.upload();
    gate.upload();
    grad.upload();
  }

  template <class T>
  static View<const T, 2> read(DeviceTensor<T>& tensor, bool on_host) {
    const AnyView<2> any = view_of<2>(tensor, on_host);
    return any.template as<const T>();
  }
  CompressEntriesBackwardParams params(bool on_host) {
    const CompressEntriesParams forward = {read(kv, on_host),
                                           read(gate, on_host),
                                           read(ape, on_host),
                                           view_of<1>(weight, on_host),
                                           view_of<3>(rope, on_host),
                                           c.ratio,
                                           kRowEps,
                                           c.rotate,
                                           {},
                                           {}};
    const auto written = [&](DeviceTensor<float>& tensor) { return view_of<2>(tensor, on_host).template as<float>(); };
    return {view_of<2>(grad, on_host), forward,           written(grad_kv),
            written(grad_gate),        written(grad_ape), view_of<1>(grad_weight, on_host)};
  }

  // Through the list of candidates.
  std::string run() {
    CompressEntriesBackwardParams p = params(false);
    p.forward.workspace = memory.of(compress_entries_backward_workspace_bytes(p, cuda_context()));
    const Status status = compress_entries_backward(p, cuda_context());
    if (!status.is_ok()) return status.message();
    if (!finish_device()) return "the kernel failed";
    bool intact = memory.intact() && grad.intact() && weight.intact();
    grad_weight.download();
    for (DeviceTensor<float>* tensor : {&grad_kv, &grad_gate, &grad_ape}) tensor->download();
    for (DeviceTensor<float>* tensor : {&kv, &gate, &ape, &rope, &grad_kv, &grad_gate, &grad_ape}) {
      intact = intact && tensor->intact();
    }
    return intact && grad_weight.intact() ? "" : "wrote outside of the results";
  }

  struct Pooled {
    std::vector<double> mean, most, weights, gradient, terms;
  };

  // What an entry gives its rows. Its row is rounded from where the kernel has it, a float32 away from the exact one.
  Pooled pooled(int64_t j, std::vector<double>& sums, std::vector<double>& sum_terms) {
    const size_t dim = static_cast<size_t>(c.dim);
    Pooled of = {std::vector<double>(dim), std::vector<double>(dim), std::vector<double>(dim), std::vector<double>(dim),
                 std::vector<double>(dim)};
    const CompressEntriesParams f = params(true).forward;
    std::vector<double> turned(dim), row(dim), size(dim);  // size: of the values, which float32 rounds
    for (size_t d = 0; d < dim; ++d) {
      double most = -INFINITY, values = 0;
      const auto each = [&](const auto& body) {
        each_pooled_row(f, j, [&](int64_t r, int64_t channel) {
          const int64_t at = channel + static_cast<int64_t>(d);
          body(static_cast<double>(gate.at(r, at) + ape.at(r % c.ratio, at)), static_cast<double>(kv.at(r, at)));
        });
      };
      each([&](double g, double) { most = std::fmax(most, g); });
      each([&](double g, double v) {
        of.weights[d] += std::exp(g - most), values += std::exp(g - most) * v;
        size[d] += std::exp(g - most) * std::fabs(v);
      });
      size[d] /= of.weights[d];
      of.most[d] = most;
      of.mean[d] = values / of.weights[d];
      row[d] = scalar::Lanes::rounded<N>(of.mean[d]);
      turned[d] = to_float(grad.at(j, static_cast<int64_t>(d)));
    }
    if (c.rotate) {
      std::vector<double> work(dim);
      std::vector<float> given(dim), result(dim);
      for (size_t d = 0; d < dim; ++d) given[d] = static_cast<float>(turned[d]);
      scalar::Lanes().hadamard<float>(given.data(), c.dim, hadamard_factor(c.dim), work.data(), result.data());
      for (size_t d = 0; d < dim; ++d) turned[d] = result[d];
    }
    const int64_t still = c.dim - c.rope_dim;
    for (int64_t i = 0; i < c.rope_dim / 2; ++i) {
      double &even = turned[static_cast<size_t>(still + 2 * i)], &odd = turned[static_cast<size_t>(still + 2 * i + 1)];
      const double cos = rope.at(j, 2 * i), sin = rope.at(j, 2 * i + 1), e = even, o = odd;
      even = e * cos + o * sin, odd = o * cos - e * sin;
    }
    double square = kRowEps, along = 0, most_along = 0, most_root = 1;
    for (size_t d = 0; d < dim; ++d) square += row[d] * row[d] / static_cast<double>(c.dim);
    const double root = 1 / std::sqrt(square);
    for (size_t d = 0; d < dim; ++d) {
      const double product = turned[d] * to_float(weight.at(static_cast<int64_t>(d))) / static_cast<double>(c.dim);
      along += product * row[d], most_along += std::fabs(product) * size[d];
      most_root += std::fabs(row[d]) * size[d] * root * root / static_cast<double>(c.dim);
    }
    for (size_t d = 0; d < dim; ++d) {
      const double first = turned[d] * to_float(weight.at(static_cast<int64_t>(d))) * root;
      of.gradient[d] = first - row[d] * root * root * root * along;
      of.terms[d] = most_root * (std::fabs(first) + 3 * size[d] * root * root * root * most_along);
      sums[d] += turned[d] * row[d] * root;
      sum_terms[d] += std::fabs(turned[d]) * size[d] * root * most_root;
    }
    return of;
  }

  // Of the rows' elements in float32; an entry whose row is rounded to bfloat16 the other way has its gradient moved by
  // `moved` of its size.
  std::string wrong(double moved) {
    std::vector<double> sums(static_cast<size_t>(c.dim)), sum_terms = sums;
    std::vector<double> of_ape(static_cast<size_t>(c.ratio * channels)), ape_terms = of_ape;
    std::vector<Pooled> pool;
    for (int64_t j = 0; j < entries; ++j) pool.push_back(pooled(j, sums, sum_terms));
    double relative = 0;
    for (int64_t row = 0; row < c.tokens; ++row) {
      for (int64_t at = 0; at < channels; ++at) {
        const int64_t j = row / c.ratio + (c.sets == 2 && at < c.dim ? 1 : 0);
        double value = 0, slope = 0, close = 0, slope_close = 0;
        if (j < entries) {
          const Pooled& of = pool[static_cast<size_t>(j)];
          const size_t d = static_cast<size_t>(at % c.dim), i = static_cast<size_t>(row % c.ratio * channels + at);
          const double below = of.most[d] - static_cast<double>(gate.at(row, at) + ape.at(row % c.ratio, at));
          const double weight_of = std::exp(-below) / of.weights[d];
          // float32 has the difference to half a unit, and no weight below its least.
          relative = (16 + below) * 0x1p-24 + moved;
          value = weight_of * of.gradient[d], close = relative * (weight_of + 1e-35) * of.terms[d];
          slope = value * (kv.at(row, at) - of.mean[d]);
          slope_close = close * (std::fabs(kv.at(row, at)) + 3);
          of_ape[i] += slope, ape_terms[i] += slope_close;
        }
        if (!(std::fabs(grad_kv.at(row, at) - value) <= close)) {
          return differs("kv", row, at, grad_kv.at(row, at), value);
        }
        if (!(std::fabs(grad_gate.at(row, at) - slope) <= slope_close)) {
          return differs("gate", row, at, grad_gate.at(row, at), slope);
        }
      }
    }
    for (int64_t row = 0; row < c.ratio; ++row) {
      for (int64_t at = 0; at < channels; ++at) {
        const size_t i = static_cast<size_t>(row * channels + at);
        if (!(std::fabs(grad_ape.at(row, at) - of_ape[i]) <= ape_terms[i])) {
          return differs("ape", row, at, grad_ape.at(row, at), of_ape[i]);
        }
      }
    }
    for (size_t d = 0; d < sums.size(); ++d) {
      const double got = to_float(grad_weight.at(static_cast<int64_t>(d)));
      if (!(std::fabs(got - sums[d]) <= allowed<N>(sums[d], sum_terms[d], 16) + moved * sum_terms[d])) {
        return differs("norm_weight", 0, static_cast<int64_t>(d), got, sums[d]);
      }
    }
    return "";
  }
};

template <class N>
std::string try_entries_gradient(const EntriesGradientCase& c) {
  EntriesGradientProblem<N> p(c);
  const std::string fault = p.run();
  return fault.empty() ? p.wrong(sizeof(N) == 2 ? 0x1p-8 : 0) : fault;
}

}  // namespace dsv4::testing
