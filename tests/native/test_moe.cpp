// The mixture of experts without torch: every implementation against the scalar one, guard bands, one result for any
// number of threads and any company, the validation messages.
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
int64_t moe_experts_workspace_bytes(const MoeExpertsParams&, const Context&);
Status moe_experts(const MoeExpertsParams&, const Context&);
int64_t moe_gate_workspace_bytes(const MoeGateParams&, const Context&);
Status moe_gate(const MoeGateParams&, const Context&);
}  // namespace dsv4::amx_model
#endif

namespace {

using namespace dsv4;
using testing::Guarded;
using testing::Random;
using testing::Scratch;

int64_t blocks(int64_t size, int64_t block) { return (size + block - 1) / block; }

// A matrix of every expert, in any of its forms, behind and before memory that shows what is read.
template <class X>
struct Matrix {
  ExpertMatrix view;
  Guarded<X> plain;
  Guarded<uint8_t> codes, scale;

  Matrix(WeightFormat format, int64_t experts, int64_t out, int64_t in, Random& random)
      : plain({format == WeightFormat::kPlain ? experts : 0, out, in}),
        codes({format == WeightFormat::kPlain ? 0 : experts, out, format == WeightFormat::kFp4 ? in / 2 : in}),
        scale({format == WeightFormat::kPlain ? 0 : experts, format == WeightFormat::kFp4 ? out : blocks(out, 128),
               blocks(in, format == WeightFormat::kFp4 ? 32 : 128)}) {
    view.format = format;
    if (format == WeightFormat::kPlain) {
      const float width = 1.0f / std::sqrt(static_cast<float>(in));
      plain.fill(random, -width, width);
      view.data = plain.template any<3>();
      return;
    }
    for (int64_t i = 0; i < codes.size(); ++i) {
      codes[i] = static_cast<uint8_t>(random.bits() >> 20);
      if (format == WeightFormat::kFp8 && (codes[i] & 0x7F) > 0x70) codes[i] = static_cast<uint8_t>(codes[i] ^ 0x40);
    }
    const int base = format == WeightFormat::kFp4 ? 122 : 118;
    for (int64_t i = 0; i < scale.size(); ++i) scale[i] = static_cast<uint8_t>(base + (random.bits() >> 20) % 3);
    view.data = codes.template any<3>();
    view.scale = scale.template any<3>();
  }
  bool intact() const { return plain.intact() && codes.intact() && scale.intact(); }
};

template <class X>
struct Problem {
  int64_t tokens, hidden, top_k;
  Guarded<X> x;
  Guarded<float> weights;
  std::vector<int32_t> indices;
  std::vector<Matrix<X>> matrices;  // w1, w3, w2, then the shared expert's
  float limit = 1.5f;

  Problem(int64_t t, int64_t d, int64_t inter, int64_t experts, int64_t k, WeightFormat format, WeightFormat shared,
          uint64_t seed)
      : tokens(t), hidden(d), top_k(k), x({t, d}), weights({t, k}) {
    Random random(seed);
    x.fill(random, -2, 2), weights.fill(random, 0.1f, 1);
    for (int64_t i = 0; i < t * k; ++i) {
      indices.push_back(static_cast<int32_t>(random.bits() >> 20) % static_cast<int32_t>(experts + 1));
    }
    for (int i = 0; i < 2; ++i) matrices.emplace_back(format, experts, inter, d, random);
    matrices.emplace_back(format, experts, d, inter, random);
    if (shared == WeightFormat::kNone) return;
    for (int i = 0; i < 2; ++i) matrices.emplace_back(shared, 1, inter + 24, d, random);
    matrices.emplace_back(shared, 1, d, inter + 24, random);
  }

  // Of the tokens [first, first + count).
  MoeExpertsParams params(Guarded<X>& result, int64_t first, int64_t count) {
    MoeExpertsParams p{};
    p.x = x.template any<2>();
    p.x.data = x.data() + first * hidden;
    p.weights = weights.const_view<2>();
    p.weights.data += first * top_k;
    p.indices = dense<AnyView<2>>(indices.data() + first * top_k, {count, top_k});
    p.x.shape[0] = p.weights.shape[0] = count;
    p.w1 = matrices[0].view, p.w3 = matrices[1].view, p.w2 = matrices[2].view;
    for (size_t i = 3; i < matrices.size(); ++i) p.shared[i - 3] = matrices[i].view;
    p.swiglu_limit = limit;
    p.result = result.template any<2>();
    return p;
  }

  using Op = Status (*)(const MoeExpertsParams&, const Context&);
  using Bytes = int64_t (*)(const MoeExpertsParams&, const Context&);
  std::vector<float> run(Op op, Bytes bytes, int threads, int64_t first = 0, int64_t count = -1) {
    ThreadPool pool(threads);
    const Context context = pool.context();
    count = count < 0 ? tokens : count;
    Guarded<X> result({count, hidden});
    MoeExpertsParams p = params(result, first, count);
    Scratch scratch(bytes(p, context));
    p.workspace = scratch.workspace();
    CHECK(op(p, context).is_ok());
    CHECK(result.intact() && scratch.intact() && x.intact() && weights.intact());
    for (const Matrix<X>& m : matrices) CHECK(m.intact());
    std::vector<float> values;
    for (int64_t i = 0; i < count * hidden; ++i) values.push_back(to_float(result[i]));
    return values;
  }
};

double relative_rms(const std::vector<float>& a, const std::vector<float>& b) {
  double error = 0, size = 0;
  for (size_t i = 0; i < a.size(); ++i) {
    if (!std::isfinite(a[i]) || !std::isfinite(b[i])) return INFINITY;
    error += (static_cast<double>(a[i]) - b[i]) * (static_cast<double>(a[i]) - b[i]);
    size += static_cast<double>(b[i]) * b[i];
  }
  return size == 0 ? error : std::sqrt(error / size);
}

// Whether there is anything to compare with the scalar kernels; says what of it does not run.
bool has_vectors() {
#if defined(DSV4_WITH_AVX2)
  if (cpu_isa() < Isa::kAvx512) testing::not_run("this machine has no avx512");
  if (cpu_isa() < Isa::kAvx2) testing::not_run("this machine has no avx2");
  return cpu_isa() >= Isa::kAvx2;
#else
  testing::not_run("built without avx2");
  return false;
#endif
}

constexpr WeightFormat kFormats[] = {WeightFormat::kPlain, WeightFormat::kFp8, WeightFormat::kFp4};

#if defined(DSV4_WITH_AVX2)
struct Implementation {
  Isa isa;
  bool tiles;  // which take no plain matrices of float32 (csrc/ops/moe.cpp)
  Status (*run)(const MoeExpertsParams&, const Context&);
  int64_t (*bytes)(const MoeExpertsParams&, const Context&);
};
const Implementation kImplementations[] = {
    {Isa::kAvx2, false, avx2::moe_experts, avx2::moe_experts_workspace_bytes},
#if defined(DSV4_WITH_AVX512)
    {Isa::kAvx512, false, avx512::moe_experts, avx512::moe_experts_workspace_bytes},
    {Isa::kAvx512, true, amx_model::moe_experts, amx_model::moe_experts_workspace_bytes},
#endif
#if defined(DSV4_WITH_AMX)
    {Isa::kAmx, true, amx::moe_experts, amx::moe_experts_workspace_bytes},
#endif
};

// Whole, on several threads, and every `step`-th token alone, where weights are read for one token.
template <class X>
void compare(Problem<X>& problem, int64_t step, double limit) {
  const int64_t tokens = problem.tokens, hidden = problem.hidden;
  const auto expected = problem.run(scalar::moe_experts, scalar::moe_experts_workspace_bytes, 1);
  for (const Implementation& one : kImplementations) {
    if (cpu_isa() < one.isa) continue;
    if (one.tiles && sizeof(X) == sizeof(float) && problem.matrices[0].view.format == WeightFormat::kPlain) continue;
    const auto found = problem.run(one.run, one.bytes, 1);
    const double error = relative_rms(found, expected);
    CHECK_MESSAGE(error <= limit, "error " + std::to_string(error) + " of " + std::to_string(tokens) +
                                      " tokens, width " + std::to_string(hidden) + ", " +
                                      std::to_string(problem.matrices[0].view.data.size(1)));
    for (const int threads : {2, 3}) CHECK(problem.run(one.run, one.bytes, threads) == found);
    for (int64_t first = 0; first < tokens; first += step) {
      const auto alone = problem.run(one.run, one.bytes, 1, first, 1);
      CHECK(std::equal(alone.begin(), alone.end(), found.begin() + first * hidden));
    }
  }
}

template <class X>
void compare(int64_t tokens, int64_t hidden, int64_t inter, WeightFormat format, double limit) {
  const WeightFormat shared = tokens % 2 == 0                  ? WeightFormat::kNone
                              : format == WeightFormat::kPlain ? format
                                                               : WeightFormat::kFp8;
  Problem<X> problem(tokens, hidden, inter, 3, 2, format, shared, 7 + static_cast<uint64_t>(tokens));
  compare(problem, 5, limit);
}
#endif

TEST(experts_equal_the_scalar_ones) {
  if (!has_vectors()) return;
#if defined(DSV4_WITH_AVX2)
  for (const WeightFormat format : kFormats) {
    for (const int64_t tokens : {1, 2, 9, 40}) {
      for (const auto& [hidden, inter] : {std::pair<int64_t, int64_t>{32, 32}, {160, 200}, {258, 130}}) {
        compare<bf16>(tokens, hidden, inter, format, 4e-3);
        compare<float>(tokens, hidden, inter, format, 4e-6);
      }
    }
  }
#endif
}

// Sums start anew every 1,024 inputs; one whole chunk, one and a bit, two and a bit; 1 to 7 rows an expert and more.
TEST(experts_of_many_inputs) {
  if (!has_vectors()) return;
#if defined(DSV4_WITH_AVX2)
  for (const WeightFormat format : kFormats) {
    for (const int64_t tokens : {1, 3, 5, 8, 23}) {
      compare<bf16>(tokens, 1024, 64, format, 4e-3);
      compare<bf16>(tokens, 1180, 66, format, 4e-3);
      compare<bf16>(tokens, 34, 2200, format, 4e-3);  // plain rows of more than a page
      compare<float>(tokens, 34, 2200, format, 4e-6);
    }
    // More rows of one expert than are taken at a time, which is 256, and more inputs than a chunk has.
    Problem<bf16> problem(259, 1056, 32, 1, 1, format, format, 7);
    problem.indices.assign(problem.indices.size(), 0);
    compare(problem, 86, 4e-3);
  }
#endif
}

TEST(scalar_experts_do_not_depend_on_threads_or_company) {
  for (const WeightFormat format : kFormats) {
    Problem<bf16> problem(11, 96, 72, 3, 2, format, WeightFormat::kFp8, 3);
    const auto expected = problem.run(scalar::moe_experts, scalar::moe_experts_workspace_bytes, 1);
    CHECK(problem.run(scalar::moe_experts, scalar::moe_experts_workspace_bytes, 3) == expected);
    const auto alone = problem.run(scalar::moe_experts, scalar::moe_experts_workspace_bytes, 1, 4, 1);
    CHECK(std::equal(alone.begin(), alone.end(), expected.begin() + 4 * 96));
  }
}

// One expert of one input and output by hand: silu(min(gate, limit)) * clamp(up) * weight * w2.
TEST(formula) {
  for (const auto op : {scalar::moe_experts,
#if defined(DSV4_WITH_AVX2)
                        cpu_isa() >= Isa::kAvx2 ? avx2::moe_experts : scalar::moe_experts,
#endif
#if defined(DSV4_WITH_AVX512)
                        cpu_isa() >= Isa::kAvx512 ? avx512::moe_experts : scalar::moe_experts
#endif
       }) {
    Problem<float> problem(1, 1, 1, 1, 1, WeightFormat::kPlain, WeightFormat::kNone, 1);
    problem.indices = {0};
    problem.limit = 2;
    for (const auto& [gate, up] : {std::pair<float, float>{5, 1}, {-5, 1}, {1, 5}, {1, -5}}) {
      problem.x[0] = 1, problem.weights[0] = 0.5f;
      problem.matrices[0].plain[0] = gate, problem.matrices[1].plain[0] = up, problem.matrices[2].plain[0] = 3;
      const double g = std::min(gate, 2.0f), u = std::max(-2.0f, std::min(up, 2.0f));
      const double expected = g / (1 + std::exp(-g)) * u * 0.5 * 3;
      const double found = problem.run(op, moe_experts_workspace_bytes, 1)[0];
      CHECK(std::abs(found - expected) <= 1e-6 * std::abs(expected));
    }
  }
}

#if defined(DSV4_WITH_AVX2)
struct Gate {
  Isa isa;
  bool tiles;  // of bfloat16 alone
  Status (*run)(const MoeGateParams&, const Context&);
  int64_t (*bytes)(const MoeGateParams&, const Context&);
};
const Gate kGates[] = {
    {Isa::kAvx2, false, avx2::moe_gate, avx2::moe_gate_workspace_bytes},
#if defined(DSV4_WITH_AVX512)
    {Isa::kAvx512, false, avx512::moe_gate, avx512::moe_gate_workspace_bytes},
    {Isa::kAvx512, true, amx_model::moe_gate, amx_model::moe_gate_workspace_bytes},
#endif
#if defined(DSV4_WITH_AMX)
    {Isa::kAmx, true, amx::moe_gate, amx::moe_gate_workspace_bytes},
#endif
};
#endif

TEST(gate_equals_the_scalar_one) {
  if (!has_vectors()) return;
#if defined(DSV4_WITH_AVX2)
  Random random(5);
  for (const int64_t hidden : {1, 31, 200}) {
    const int64_t tokens = 19, experts = 37, k = 4;
    Guarded<bf16> x({tokens, hidden});
    Guarded<float> weight({experts, hidden}), bias({experts});
    x.fill(random, -1, 1), weight.fill(random, -1, 1), bias.fill(random, 0, 1);
    const auto run = [&](auto op, auto bytes, int threads, Guarded<float>& weights, std::vector<int32_t>& indices) {
      ThreadPool pool(threads);
      const Context context = pool.context();
      indices.assign(static_cast<size_t>(tokens * k), -1);
      MoeGateParams p{};
      p.x = x.any<2>(), p.weight = weight.any<2>(), p.bias = bias.const_view<1>();
      p.top_k = k, p.route_scale = 1.5, p.weights = weights.view<2>();
      p.indices = dense<AnyView<2>>(indices.data(), {tokens, k});
      Scratch scratch(bytes(p, context));
      p.workspace = scratch.workspace();
      CHECK(op(p, context).is_ok());
      CHECK(weights.intact() && scratch.intact());
    };
    Guarded<float> expected({tokens, k}), found({tokens, k}), threaded({tokens, k});
    std::vector<int32_t> expected_indices, indices, threaded_indices;
    run(scalar::moe_gate, scalar::moe_gate_workspace_bytes, 1, expected, expected_indices);
    for (const Gate& gate : kGates) {
      if (cpu_isa() < gate.isa || gate.tiles) continue;
      run(gate.run, gate.bytes, 1, found, indices);
      run(gate.run, gate.bytes, 3, threaded, threaded_indices);
      CHECK(indices == expected_indices && threaded_indices == indices && threaded.same_bits(found));
      for (int64_t i = 0; i < tokens * k; ++i) CHECK(std::abs(found[i] - expected[i]) <= 2e-6f * expected[i]);
    }
  }
#endif
}

// Of bfloat16, in tiles too; blocks of tokens, of experts and of inputs with a rest, whole and a token alone.
TEST(gate_of_bfloat16_equals_the_scalar_one) {
  if (!has_vectors()) return;
#if defined(DSV4_WITH_AVX2)
  Random random(6);
  for (const auto& [tokens, hidden] : {std::pair<int64_t, int64_t>{1, 1}, {7, 130}, {83, 600}}) {
    const int64_t experts = 300, k = 5;
    Guarded<bf16> x({tokens, hidden}), weight({experts, hidden});
    Guarded<float> bias({experts});
    x.fill(random, -1, 1), weight.fill(random, -0.2f, 0.2f), bias.fill(random, 0, 1);
    const auto run = [&](const Gate& gate, int threads, int64_t first, int64_t count, std::vector<int32_t>& indices) {
      ThreadPool pool(threads);
      const Context context = pool.context();
      indices.assign(static_cast<size_t>(count * k), -1);
      Guarded<float> weights({count, k});
      MoeGateParams p{};
      p.x = x.any<2>(), p.weight = weight.any<2>(), p.bias = bias.const_view<1>();
      p.x.data = x.data() + first * hidden, p.x.shape[0] = count;
      p.top_k = k, p.route_scale = 1.5, p.weights = weights.view<2>();
      p.indices = dense<AnyView<2>>(indices.data(), {count, k});
      Scratch scratch(gate.bytes(p, context));
      p.workspace = scratch.workspace();
      CHECK(gate.run(p, context).is_ok());
      CHECK(weights.intact() && scratch.intact() && x.intact() && weight.intact());
      return std::vector<float>(weights.data(), weights.data() + count * k);
    };
    std::vector<int32_t> expected_indices, indices, others;
    const auto expected =
        run({Isa::kScalar, false, scalar::moe_gate, scalar::moe_gate_workspace_bytes}, 1, 0, tokens, expected_indices);
    for (const Gate& gate : kGates) {
      if (cpu_isa() < gate.isa) continue;
      const auto found = run(gate, 1, 0, tokens, indices);
      CHECK(indices == expected_indices);
      for (size_t i = 0; i < found.size(); ++i) CHECK(std::abs(found[i] - expected[i]) <= 2e-6f * expected[i]);
      CHECK(run(gate, 3, 0, tokens, others) == found && others == indices);
      for (int64_t token = 0; token < tokens; token += 9) {
        const auto alone = run(gate, 1, token, 1, others);
        CHECK(std::equal(alone.begin(), alone.end(), found.begin() + token * k));
        CHECK(std::equal(others.begin(), others.end(), indices.begin() + token * k));
      }
    }
  }
#endif
}

// Scores of every size, as the scalar kernel has them: x is 1, so that a weight of the gate is a logit. What is seen is
// the score beside that of logit 0, of their sum.
TEST(gate_scores) {
  if (!has_vectors()) return;
#if defined(DSV4_WITH_AVX2)
  std::vector<float> logits = {0, -0.0f, 1e-30f, -1e-30f, 19.99f, 20, 20.01f, -39.99f, -40, -40.01f, -170, -210, 1e30f};
  for (int i = -1000; i < 1000; ++i) logits.push_back(0.11f * static_cast<float>(i));
  for (const float logit : logits) {
    Guarded<float> x({1, 1}), weight({2, 1});
    x[0] = 1, weight[0] = logit, weight[1] = 0;
    const auto value = [&](Status (*op)(const MoeGateParams&, const Context&)) {
      ThreadPool pool(1);
      std::vector<int32_t> indices(2);
      Guarded<float> weights({1, 2});
      MoeGateParams p{};
      p.x = x.any<2>(), p.weight = weight.any<2>(), p.top_k = 2, p.route_scale = 1, p.weights = weights.view<2>();
      p.indices = dense<AnyView<2>>(indices.data(), {1, 2});
      Scratch scratch(1 << 16);
      p.workspace = scratch.workspace();
      CHECK(op(p, pool.context()).is_ok());
      return weights[indices[0] == 0 ? 0 : 1];
    };
    const float expected = value(scalar::moe_gate);
    for (const Gate& gate : kGates) {
      if (cpu_isa() < gate.isa || gate.tiles) continue;
      CHECK_MESSAGE(std::abs(value(gate.run) - expected) <= 1.2e-7f * expected, "logit " + std::to_string(logit));
    }
  }
#endif
}

TEST(map) {
  const std::vector<int32_t> indices = {2, 0, -1, 2, 3, 0, 0, 1 << 30};
  std::vector<int32_t> offsets(6, 77), rows(10, 77);
  MoeMapParams p{};
  p.indices = dense<AnyView<2>>(indices.data(), {4, 2});
  p.experts = 3;
  p.offsets = dense<AnyView<1>>(offsets.data(), {4}), p.rows = dense<AnyView<1>>(rows.data(), {8});
  ThreadPool pool(1);
  CHECK(moe_map(p, pool.context()).is_ok());
  CHECK((offsets == std::vector<int32_t>{0, 3, 3, 5, 77, 77}));
  CHECK((rows == std::vector<int32_t>{1, 5, 6, 0, 3, -1, -1, -1, 77, 77}));
  p.rows.shape[0] = 7;
  CHECK(std::string(moe_map(p, pool.context()).message()) == "moe_map: rows must be int32 [8], got int32 [7]");
  p.rows.shape[0] = 8, p.experts = 0;
  CHECK(std::string(moe_map(p, pool.context()).message()) == "moe_map: experts must be at least 1, got 0");
  const std::string too_many = "moe_map: indices and experts must be fewer than 2^31";
  p.experts = INT32_MAX;
  CHECK(moe_map(p, pool.context()).message() == too_many);
  p.experts = 3, p.indices.shape[0] = int64_t{1} << 30;
  CHECK(moe_map(p, pool.context()).message() == too_many);
}

TEST(invalid_arguments) {
  Problem<bf16> problem(3, 64, 32, 2, 2, WeightFormat::kFp4, WeightFormat::kFp8, 1);
  Guarded<bf16> result({3, 64});
  ThreadPool pool(1);
  const MoeExpertsParams good = problem.params(result, 0, 3);
  const auto refused = [&](MoeExpertsParams p, const char* message) {
    const Status status = moe_experts(p, pool.context());
    CHECK_MESSAGE(!status.is_ok() && std::string(status.message()) == message, status.message());
  };
  refused(good, ("moe_experts: workspace must have " +
                 std::to_string(moe_experts_workspace_bytes(good, pool.context())) + " bytes, got 0")
                    .c_str());
  MoeExpertsParams p = good;
  p.x.dtype = DType::kInt32;
  refused(p, "moe_experts: x must be bfloat16 or float32, got int32");
  p = good, p.w3.data.shape[1] = 31;
  refused(p, "moe_experts: w3 must be uint8 [2, 32, 32], got uint8 [2, 31, 32]");
  p = good, p.w2.scale.shape[2] = 2;
  refused(p, "moe_experts: w2_scale must be uint8 [2, 64, 1], got uint8 [2, 64, 2]");
  p = good, p.x.shape[1] = 63;
  refused(p, "moe_experts: w1 in e2m1 needs an even number of inputs, got 63");
  p = good, p.w1.format = WeightFormat::kNone;
  refused(p, "moe_experts: w1 must not be missing");
  p = good, p.shared[2].data.data = nullptr;
  refused(p, "moe_experts: shared w2 must not be null");
  p = good, p.swiglu_limit = -1;
  refused(p, "moe_experts: swiglu_limit must be finite and not negative, got -1");
}

}  // namespace
