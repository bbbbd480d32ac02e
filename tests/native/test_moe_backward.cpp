// The experts' gradient without torch: the scalar kernel against the formula in double precision, the others against
// the scalar one, guard bands, one result for any number of threads and any company, results that are none, the
// validation messages.
#include <algorithm>
#include <cmath>
#include <string>
#include <vector>

#include "common/hardware.h"
#include "common/thread_pool.h"
#include "cpu/moe.h"
#include "native/check.h"

#if defined(DSV4_WITH_AVX512)
namespace dsv4::amx_model {
int64_t moe_experts_backward_workspace_bytes(const MoeExpertsBackwardParams&, const Context&);
Status moe_experts_backward(const MoeExpertsBackwardParams&, const Context&);
}  // namespace dsv4::amx_model
#endif

namespace {

using namespace dsv4;
using testing::Guarded;
using testing::Random;
using testing::Scratch;

struct Kernel {
  const char* name;
  Isa isa;
  bool narrow;  // bfloat16 alone
  int64_t (*bytes)(const MoeExpertsBackwardParams&, const Context&);
  Status (*op)(const MoeExpertsBackwardParams&, const Context&);
};
constexpr Kernel kKernels[] = {
    {"scalar", Isa::kScalar, false, scalar::moe_experts_backward_workspace_bytes, scalar::moe_experts_backward},
#if defined(DSV4_WITH_AVX2)
    {"avx2", Isa::kAvx2, false, avx2::moe_experts_backward_workspace_bytes, avx2::moe_experts_backward},
#endif
#if defined(DSV4_WITH_AVX512)
    {"avx512", Isa::kAvx512, false, avx512::moe_experts_backward_workspace_bytes, avx512::moe_experts_backward},
    {"amx_model", Isa::kAvx512, true, amx_model::moe_experts_backward_workspace_bytes, amx_model::moe_experts_backward},
#endif
#if defined(DSV4_WITH_AMX)
    {"amx", Isa::kAmx, true, amx::moe_experts_backward_workspace_bytes, amx::moe_experts_backward},
#endif
};

// Calls body with each kernel that takes elements of this size here.
template <class Body>
void for_each_kernel(size_t element, const Body& body) {
  for (const Kernel& kernel : kKernels) {
    if (kernel.narrow && element != sizeof(bf16)) continue;
    if (kernel.isa > cpu_isa()) {
      testing::not_run(kernel.name);
      continue;
    }
    body(kernel);
  }
}

using Values = std::vector<double>;

// Of x, the routing weights, w1, w3, w2 and the shared matrices.
struct Gradients {
  std::vector<Values> values;
  bool operator==(const Gradients& other) const { return values == other.values; }
};

template <class X>
struct Problem {
  int64_t tokens, hidden, inter, experts, top_k;
  Guarded<X> x, grad;
  Guarded<float> weights;
  std::vector<int32_t> indices;
  std::vector<Guarded<X>> matrices;  // w1, w3, w2, then the shared expert's
  float limit = 0.8f;

  Problem(int64_t t, int64_t d, int64_t i, int64_t e, int64_t k, bool shared, uint64_t seed)
      : tokens(t), hidden(d), inter(i), experts(e), top_k(k), x({t, d}), grad({t, d}), weights({t, k}) {
    Random random(seed);
    x.fill(random, -2, 2), grad.fill(random, -1, 1), weights.fill(random, 0.1f, 1);
    for (int64_t n = 0; n < t * k; ++n) {
      indices.push_back(static_cast<int32_t>(random.bits() >> 20) % static_cast<int32_t>(e + 1));
    }
    for (int n = 0; n < (shared ? 6 : 3); ++n) {
      const int64_t own = n < 3 ? i : i + 24;
      matrices.emplace_back(n % 3 == 2 ? std::vector<int64_t>{n < 3 ? e : 1, d, own}
                                       : std::vector<int64_t>{n < 3 ? e : 1, own, d});
      const float width = 1.7f / std::sqrt(static_cast<float>(n % 3 == 2 ? own : d));
      matrices.back().fill(random, -width, width);
    }
  }

  // Of tokens [first, first + count).
  MoeExpertsBackwardParams params(int64_t first, int64_t count) {
    MoeExpertsBackwardParams p{};
    p.x = x.template any<2>(), p.grad = grad.template any<2>();
    p.x.data = x.data() + first * hidden, p.grad.data = grad.data() + first * hidden;
    p.weights = weights.const_view<2>();
    p.weights.data += first * top_k;
    p.indices = dense<AnyView<2>>(indices.data() + first * top_k, {count, top_k});
    p.x.shape[0] = p.grad.shape[0] = p.weights.shape[0] = count;
    for (size_t n = 0; n < matrices.size(); ++n) {
      (n < 3 ? p.matrices[n] : p.shared[n - 3]) = matrices[n].template any<3>();
    }
    p.swiglu_limit = limit;
    return p;
  }

  // Results that are not in the set, bit by bit, are none.
  Gradients run(const Kernel& kernel, int threads, int64_t first = 0, int64_t count = -1, unsigned set = 255) {
    const auto needed = [set](size_t i) { return (set >> i & 1) != 0; };
    ThreadPool pool(threads);
    const Context context = pool.context();
    count = count < 0 ? tokens : count;
    MoeExpertsBackwardParams p = params(first, count);
    Guarded<X> grad_x({count, hidden});
    Guarded<float> grad_weights({count, top_k});
    std::vector<Guarded<X>> found;
    if (needed(0)) p.grad_x = grad_x.template any<2>();
    if (needed(1)) p.grad_weights = grad_weights.view<2>();
    found.reserve(matrices.size());
    for (size_t n = 0; n < matrices.size(); ++n) {
      const AnyView<3>& like = n < 3 ? p.matrices[n] : p.shared[n - 3];
      found.emplace_back(std::vector<int64_t>{like.shape[0], like.shape[1], like.shape[2]});
      if (needed(2 + n)) (n < 3 ? p.grad_matrices[n] : p.grad_shared[n - 3]) = found.back().template any<3>();
    }
    Scratch scratch(kernel.bytes(p, context));
    p.workspace = scratch.workspace();
    const Status status = kernel.op(p, context);
    CHECK_MESSAGE(status.is_ok(), status.message());
    CHECK(grad_x.intact() && grad_weights.intact() && scratch.intact() && x.intact() && grad.intact());
    Gradients all;
    const auto add = [&](auto& tensor) {
      CHECK(tensor.intact());
      Values values;
      for (int64_t i = 0; needed(all.values.size()) && i < tensor.size(); ++i) values.push_back(to_float(tensor[i]));
      all.values.push_back(values);
    };
    add(grad_x), add(grad_weights);
    for (Guarded<X>& one : found) add(one);
    return all;
  }

  // The formula, pair by pair; in double precision but for gate and up, which have the type X.
  Gradients formula() {
    Gradients all;
    all.values = {Values(static_cast<size_t>(tokens * hidden)), Values(static_cast<size_t>(tokens * top_k))};
    for (Guarded<X>& matrix : matrices) all.values.emplace_back(static_cast<size_t>(matrix.size()), 0.0);
    for (int64_t t = 0; t < tokens; ++t) {
      for (int64_t k = 0; k < top_k; ++k) {
        const int64_t expert = indices[static_cast<size_t>(t * top_k + k)];
        if (expert < 0 || expert >= experts) continue;
        all.values[1][static_cast<size_t>(t * top_k + k)] = pair(all, 0, expert, inter, t, weights[t * top_k + k]);
      }
      if (matrices.size() > 3) pair(all, 3, 0, inter + 24, t, 1);
    }
    return all;
  }

 private:
  double pair(Gradients& all, size_t first, int64_t expert, int64_t width, int64_t t, double weight) {
    double sum = 0;
    const auto of = [&](size_t n, int64_t i) { return static_cast<double>(to_float(matrices[first + n][i])); };
    for (int64_t i = 0; i < width; ++i) {
      const int64_t up_row = (expert * width + i) * hidden, down = expert * hidden * width + i;
      double raw[2] = {}, back = 0;
      for (int64_t d = 0; d < hidden; ++d) {
        for (size_t n = 0; n < 2; ++n) raw[n] += of(n, up_row + d) * to_float(x[t * hidden + d]);
        back += of(2, down + d * width) * to_float(grad[t * hidden + d]);
      }
      for (double& value : raw) value = to_float(from_float<X>(static_cast<float>(value)));
      const double g = std::min<double>(raw[0], limit), u = std::max<double>(-limit, std::min<double>(raw[1], limit));
      const double s = 1 / (1 + std::exp(-g)), silu = g * s;
      sum += back * silu * u;
      const double d_gate = raw[0] > limit ? 0 : back * weight * u * s * (1 + g * (1 - s));
      const double d_up = std::abs(raw[1]) > limit ? 0 : back * weight * silu;
      for (int64_t d = 0; d < hidden; ++d) {
        const double value = to_float(x[t * hidden + d]);
        all.values[0][static_cast<size_t>(t * hidden + d)] += d_gate * of(0, up_row + d) + d_up * of(1, up_row + d);
        all.values[2 + first][static_cast<size_t>(up_row + d)] += d_gate * value;
        all.values[3 + first][static_cast<size_t>(up_row + d)] += d_up * value;
        all.values[4 + first][static_cast<size_t>(down + d * width)] +=
            silu * u * weight * to_float(grad[t * hidden + d]);
      }
    }
    return sum;
  }
};

double relative_rms(const Values& a, const Values& b) {
  double error = 0, size = 0;
  for (size_t i = 0; i < a.size(); ++i) {
    if (!std::isfinite(a[i]) || !std::isfinite(b[i])) return INFINITY;
    error += (a[i] - b[i]) * (a[i] - b[i]);
    size += b[i] * b[i];
  }
  return size == 0 ? error : std::sqrt(error / size);
}

void check_near(const Gradients& found, const Gradients& expected, double limit, const std::string& what) {
  CHECK(found.values.size() == expected.values.size());
  for (size_t i = 0; i < found.values.size(); ++i) {
    const double error = relative_rms(found.values[i], expected.values[i]);
    CHECK_MESSAGE(error <= limit, "gradient " + std::to_string(i) + " of " + what + ": " + std::to_string(error));
  }
}

struct Sizes {
  int64_t tokens, hidden, inter, experts, top_k;
};

// Each kernel on its own; rows alone have the gradients of x and the routing weights that they have in company.
template <class X>
void compare(const Sizes& s, double limit) {
  Problem<X> problem(s.tokens, s.hidden, s.inter, s.experts, s.top_k, s.tokens % 2 == 1, 3 + s.tokens);
  const std::string what =
      std::to_string(s.tokens) + " tokens, " + std::to_string(s.hidden) + " by " + std::to_string(s.inter);
  const Gradients expected = problem.formula();
  for_each_kernel(sizeof(X), [&](const Kernel& kernel) {
    const Gradients found = problem.run(kernel, 1);
    check_near(found, expected, limit, std::string(kernel.name) + ", " + what);
    for (const int threads : {2, 3}) CHECK(problem.run(kernel, threads) == found);
    for (int64_t first = 0; first < s.tokens; first += s.tokens < 300 ? 7 : 97) {
      const Gradients alone = problem.run(kernel, 1, first, 1);
      for (size_t i = 0; i < 2; ++i) {
        const Values& row = alone.values[i];
        CHECK(std::equal(row.begin(), row.end(), found.values[i].begin() + first * static_cast<int64_t>(row.size())));
      }
    }
  });
}

constexpr Sizes kSizes[] = {{1, 32, 32, 3, 2},    {2, 1, 1, 1, 1},     {5, 33, 65, 3, 2},   {6, 64, 63, 2, 1},
                            {7, 65, 129, 2, 2},   {13, 130, 31, 5, 3}, {64, 40, 72, 1, 1},  {65, 24, 515, 2, 1},
                            {70, 516, 40, 1, 1},  {131, 34, 36, 2, 2}, {260, 16, 20, 1, 2}, {9, 1060, 520, 2, 1},
                            {1100, 17, 33, 1, 1}, {1100, 520, 2, 1, 1}};  // of one expert half name nobody

TEST(kernels_equal_the_formula) {
  for (const Sizes& sizes : kSizes) {
    compare<float>(sizes, 2e-6);
    compare<bf16>(sizes, 8e-3);
  }
}

template <class X>
void check_empty_expert() {
  for_each_kernel(sizeof(X), [](const Kernel& kernel) {
    Problem<X> problem(4, 40, 30, 3, 1, false, 2);
    problem.indices = {0, 2, 3, 0};
    const Gradients found = problem.run(kernel, 2);
    for (size_t n = 2; n < 5; ++n) {
      const size_t size = found.values[n].size() / 3;
      CHECK(std::all_of(found.values[n].begin() + size, found.values[n].begin() + 2 * size,
                        [](double value) { return value == 0; }));
      CHECK(std::any_of(found.values[n].begin(), found.values[n].begin() + size,
                        [](double value) { return value != 0; }));
    }
    CHECK(found.values[1][2] == 0 && found.values[0][2 * 40] == 0);
  });
}

TEST(an_expert_without_rows_has_gradient_zero) {
  check_empty_expert<float>();
  check_empty_expert<bf16>();
}

// Whatever is left out, the others keep their bits: every set of results of few tokens; of more than a batch has, none,
// one, all but one.
template <class X>
void check_results_that_are_none() {
  for (const bool many : {false, true}) {
    Problem<X> problem(many ? 530 : 5, 33, 40, 2, 1, true, 7);
    for_each_kernel(sizeof(X), [&](const Kernel& kernel) {
      const Gradients whole = problem.run(kernel, 1);
      for (unsigned set = 0; set < 256; ++set) {
        const auto one_at_most = [](unsigned bits) { return (bits & (bits - 1)) == 0; };
        if (many && !one_at_most(set) && !one_at_most(255 - set)) continue;
        const Gradients found = problem.run(kernel, 2, 0, -1, set);
        for (size_t i = 0; i < whole.values.size(); ++i) {
          CHECK_MESSAGE(found.values[i] == ((set >> i & 1) != 0 ? whole.values[i] : Values()),
                        std::string(kernel.name) + ", gradient " + std::to_string(i) + " of " + std::to_string(set));
        }
      }
    });
  }
}

TEST(results_may_be_none) {
  check_results_that_are_none<float>();
  check_results_that_are_none<bf16>();
}

TEST(invalid_arguments) {
  Problem<bf16> problem(3, 64, 32, 2, 2, true, 1);
  Guarded<bf16> grad_x({3, 64}), up({2, 32, 64}), down({2, 64, 32}), shared_up({1, 56, 64}), shared_down({1, 64, 56});
  Guarded<float> grad_weights({3, 2});
  ThreadPool pool(1);
  MoeExpertsBackwardParams good = problem.params(0, 3);
  good.grad_x = grad_x.any<2>(), good.grad_weights = grad_weights.view<2>();
  for (int i = 0; i < 3; ++i) {
    good.grad_matrices[i] = i == 2 ? down.any<3>() : up.any<3>();
    good.grad_shared[i] = i == 2 ? shared_down.any<3>() : shared_up.any<3>();
  }
  const auto refused = [&](const MoeExpertsBackwardParams& p, const std::string& message) {
    const Status status = moe_experts_backward(p, pool.context());
    CHECK_MESSAGE(!status.is_ok() && status.message() == "moe_experts_backward: " + message, status.message());
  };
  const int64_t bytes = moe_experts_backward_workspace_bytes(good, pool.context());
  refused(good, "workspace must have " + std::to_string(bytes) + " bytes, got 0");
  MoeExpertsBackwardParams p = good;
  p.grad_x = {}, p.grad_weights = {};  // results may be none
  for (int i = 0; i < 3; ++i) p.grad_matrices[i] = p.grad_shared[i] = {};
  refused(p, "workspace must have " + std::to_string(bytes) + " bytes, got 0");
  p = good;
  p.x.dtype = DType::kInt32;
  refused(p, "x must be bfloat16 or float32, got int32");
  p = good, p.grad.dtype = DType::kFloat32;
  refused(p, "grad must be bfloat16 [3, 64], got float32 [3, 64]");
  p = good, p.indices.shape[1] = 3;
  refused(p, "indices must be int32 [3, 2], got int32 [3, 3]");
  p = good, p.matrices[1].shape[1] = 31;
  refused(p, "w3 must be bfloat16 [2, 32, 64], got bfloat16 [2, 31, 64]");
  p = good, p.shared[2].data = nullptr;
  refused(p, "shared w2 must not be null");
  p = good, p.grad_x.shape[0] = 2;
  refused(p, "grad_x must be bfloat16 [3, 64], got bfloat16 [2, 64]");
  p = good, p.grad_weights.shape[1] = 1;
  refused(p, "grad_weights must be float32 [3, 2], got float32 [3, 1]");
  p = good, p.grad_matrices[2].shape[2] = 31;
  refused(p, "grad_w2 must be bfloat16 [2, 64, 32], got bfloat16 [2, 64, 31]");
  p = good, p.grad_shared[0].dtype = DType::kFloat32;
  refused(p, "grad_shared w1 must be bfloat16 [1, 56, 64], got float32 [1, 56, 64]");
  p = good, p.swiglu_limit = -1;
  refused(p, "swiglu_limit must be finite and not negative, got -1");
}

}  // namespace
