// Gradients of the experts without torch, bfloat16 and float32: of nano's experts and of some of V4-Flash's, few rows
// an expert and many. The check compares the gradients of the last token's x and routing weights, which do not depend
// on its company, with the scalar kernel's, which takes that token alone; those of the matrices are checked where the
// scalar kernel is quick enough for all tokens.
#include <cmath>
#include <string>
#include <vector>

#include "common/hardware.h"
#include "native/bench.h"
#include "ops/moe.h"

namespace {

using namespace dsv4;

struct Shape {
  const char* name;
  int64_t tokens, hidden, inter, experts, top_k;
};

template <class X>
struct Problem {
  Shape s;
  std::vector<X> x, grad, grad_x;
  std::vector<float> weights, grad_weights;
  std::vector<int32_t> indices;
  std::vector<X> matrices[3], grads[3];
  bench::Scratch scratch;

  explicit Problem(const Shape& shape)
      : s(shape),
        x(static_cast<size_t>(s.tokens * s.hidden)),
        grad(x.size()),
        grad_x(x.size()),
        weights(static_cast<size_t>(s.tokens * s.top_k)),
        grad_weights(weights.size()),
        indices(weights.size()) {
    Random random;
    const auto fill = [&](auto& values, float width) {
      for (auto& value : values) value = from_float<std::decay_t<decltype(value)>>(random.uniform(-width, width));
    };
    fill(x, 1.7f), fill(grad, 1), fill(weights, 1);
    for (int64_t i = 0; i < s.tokens; ++i) {  // distinct experts of a token
      const int64_t first = random.below(s.experts);
      for (int64_t k = 0; k < s.top_k; ++k) indices[i * s.top_k + k] = static_cast<int32_t>((first + k) % s.experts);
    }
    for (int i = 0; i < 3; ++i) {
      matrices[i].resize(static_cast<size_t>(s.experts * s.hidden * s.inter));
      grads[i].resize(matrices[i].size());
      fill(matrices[i], 1.7f / std::sqrt(static_cast<float>(i == 2 ? s.inter : s.hidden)));
    }
  }

  // Of tokens [first, s.tokens).
  MoeExpertsBackwardParams params(const Context& context, int64_t first) {
    const int64_t n = s.tokens - first;
    MoeExpertsBackwardParams p{};
    p.x = dense<AnyView<2>>(x.data() + first * s.hidden, {n, s.hidden});
    p.grad = dense<AnyView<2>>(grad.data() + first * s.hidden, {n, s.hidden});
    p.grad_x = dense<AnyView<2>>(grad_x.data() + first * s.hidden, {n, s.hidden});
    p.weights = dense<View<const float, 2>>(weights.data() + first * s.top_k, {n, s.top_k});
    p.grad_weights = dense<View<float, 2>>(grad_weights.data() + first * s.top_k, {n, s.top_k});
    p.indices = dense<AnyView<2>>(indices.data() + first * s.top_k, {n, s.top_k});
    for (int i = 0; i < 3; ++i) {
      const int64_t out = i == 2 ? s.hidden : s.inter, in = i == 2 ? s.inter : s.hidden;
      p.matrices[i] = dense<AnyView<3>>(matrices[i].data(), {s.experts, out, in});
      p.grad_matrices[i] = dense<AnyView<3>>(grads[i].data(), {s.experts, out, in});
    }
    p.swiglu_limit = 10;
    p.workspace = scratch.of(moe_experts_backward_workspace_bytes(p, context));
    return p;
  }

  // What there is from token `first` on, and of the matrices if it is the first of all.
  std::vector<float> output(int64_t first) const {
    std::vector<float> values;
    const auto add = [&](const auto& from, int64_t begin) {
      for (size_t i = static_cast<size_t>(begin); i < from.size(); ++i) values.push_back(to_float(from[i]));
    };
    add(grad_x, first * s.hidden), add(grad_weights, first * s.top_k);
    for (const std::vector<X>& matrix : grads) add(matrix, first == 0 ? 0 : static_cast<int64_t>(matrix.size()));
    return values;
  }
};

template <class X>
void measure(bench::Bench& bench, const Shape& s, const char* impl) {
  const Context context = bench.pool().context();
  Context scalar = context;
  scalar.best = Isa::kScalar;
  Problem<X> problem(s), checked(s);
  const double pairs = static_cast<double>(s.tokens * s.top_k), weights = 3.0 * static_cast<double>(s.hidden * s.inter);
  const int64_t first = pairs * weights < 1e8 ? 0 : s.tokens - 1;
  bench::Measurement m;
  m.op = "moe_experts_backward";
  m.impl = impl;
  m.shape = std::string(s.name) + " " + std::to_string(s.tokens) + " tokens, top " + std::to_string(s.top_k) + " of " +
            std::to_string(s.experts) + " experts " + (sizeof(X) == 2 ? "bf16 " : "f32 ") + std::to_string(s.hidden) +
            "x" + std::to_string(s.inter);
  m.flops = 16.0 / 3 * pairs * weights;
  m.bytes = sizeof(X) * (2 * weights * static_cast<double>(s.experts) + 3.0 * static_cast<double>(s.tokens * s.hidden));
  m.unit = sizeof(X) == 2 ? bench::Unit::kBFloat16 : bench::Unit::kFloat32;
  Status status = Status::ok();
  m.run = [&] { status = moe_experts_backward(problem.params(context, 0), context); };
  m.error = [&] {
    if (!status.is_ok() || !moe_experts_backward(checked.params(scalar, first), scalar).is_ok()) {
      return static_cast<double>(INFINITY);
    }
    return bench::relative_error(problem.output(first), checked.output(first));
  };
  m.error_limit = sizeof(X) == 2 ? 1.0 / 64 : 1e-5;  // of the largest value
  bench.measure(m);
}

}  // namespace

int main(int argc, char** argv) {
  bench::Bench bench(argc, argv);
  if (!bench.usable()) return bench.exit_code();
  const char* impl = bench.pool().context().best >= Isa::kAvx512 ? "avx512" : isa_name(bench.pool().context().best);
  for (const Shape& shape : {Shape{"nano", 64, 256, 128, 16, 2}, Shape{"nano", 512, 256, 128, 16, 2},
                             Shape{"v4-flash", 16, 4096, 2048, 4, 2}, Shape{"v4-flash", 512, 4096, 2048, 4, 2}}) {
    if (bench.quick() && shape.tokens * shape.hidden > 512 * 256) continue;
    measure<bf16>(bench, shape, impl);
    measure<float>(bench, shape, impl);
  }
  return bench.exit_code();
}
