// The experts and the gate without torch: FP4 experts and an FP8 shared expert, six experts a token, at the widths of
// V4-Flash and V4-Pro with as many experts as a small machine holds; one and eight tokens (decoding) and prompts. The
// check compares the last token with the scalar kernel, which takes it alone. The map is of all the model's experts,
// and checked whole.
#include <algorithm>
#include <cmath>
#include <numeric>
#include <string>
#include <vector>

#include "common/hardware.h"
#include "native/bench.h"
#include "ops/candidates.h"
#include "ops/moe.h"

namespace {

using namespace dsv4;

constexpr int64_t kTopK = 6;

// Random codes, scales that bring outputs near one.
struct Matrix {
  std::vector<uint8_t> codes, scale;
  ExpertMatrix view;

  Matrix(Random& random, WeightFormat format, int64_t experts, int64_t out, int64_t in) {
    const bool fp4 = format == WeightFormat::kFp4;
    const int64_t columns = fp4 ? in / 2 : in, rows = fp4 ? out : out / 128, groups = in / (fp4 ? 32 : 128);
    codes.resize(static_cast<size_t>(experts * out * columns));
    for (uint8_t& code : codes) {
      code = static_cast<uint8_t>(random.below(256));
      if (!fp4) code = static_cast<uint8_t>(code & 0xBF);  // below 2: no NaN
    }
    scale.assign(static_cast<size_t>(experts * rows * groups), static_cast<uint8_t>(fp4 ? 119 : 121));
    view.format = format;
    view.data = dense<AnyView<3>>(codes.data(), {experts, out, columns});
    view.scale = dense<AnyView<3>>(scale.data(), {experts, rows, groups});
  }
  double bytes() const { return static_cast<double>(codes.size() + scale.size()); }
};

struct Shape {
  const char* name;
  int64_t hidden, inter, experts, routed;  // experts stored here; experts of the gate
};

struct Layer {
  Shape shape;
  std::vector<Matrix> routed, shared;
  std::vector<bf16> gate;
  std::vector<float> bias;

  explicit Layer(const Shape& s) : shape(s), gate(static_cast<size_t>(s.routed * s.hidden)), bias(s.routed) {
    Random random;
    for (int i = 0; i < 3; ++i) {
      const int64_t out = i == 2 ? s.hidden : s.inter, in = i == 2 ? s.inter : s.hidden;
      routed.emplace_back(random, WeightFormat::kFp4, s.experts, out, in);
      shared.emplace_back(random, WeightFormat::kFp8, 1, out, in);
    }
    const float width = 1.7f / std::sqrt(static_cast<float>(s.hidden));
    for (bf16& value : gate) value = from_float<bf16>(random.uniform(-width, width));
    for (float& value : bias) value = random.uniform(0, 1);
  }
};

// The tokens and what both ops write, with scratch memory for either.
struct Tokens {
  int64_t count;
  std::vector<bf16> x, result;
  std::vector<float> weights;
  std::vector<int32_t> indices;
  bench::Scratch scratch;

  Tokens(const Layer& layer, int64_t n)
      : count(n),
        x(static_cast<size_t>(n * layer.shape.hidden)),
        result(x.size()),
        weights(static_cast<size_t>(n * kTopK)),
        indices(weights.size()) {
    Random random;
    for (bf16& value : x) value = from_float<bf16>(random.uniform(-1, 1));
    for (float& value : weights) value = random.uniform(0.1f, 0.4f);
    for (int64_t i = 0; i < n; ++i) {  // distinct experts of a token
      const int64_t first = random.below(layer.shape.experts), step = 1 + 2 * random.below(3);
      for (int64_t k = 0; k < kTopK; ++k) {
        indices[i * kTopK + k] = static_cast<int32_t>((first + k * step) % layer.shape.experts);
      }
    }
  }

  MoeExpertsParams experts(const Layer& layer, const Context& context, int64_t first) {
    const int64_t n = count - first, hidden = layer.shape.hidden;
    MoeExpertsParams p{};
    p.x = dense<AnyView<2>>(x.data() + first * hidden, {n, hidden});
    p.weights = dense<View<const float, 2>>(weights.data() + first * kTopK, {n, kTopK});
    p.indices = dense<AnyView<2>>(indices.data() + first * kTopK, {n, kTopK});
    p.w1 = layer.routed[0].view, p.w3 = layer.routed[1].view, p.w2 = layer.routed[2].view;
    for (int i = 0; i < 3; ++i) p.shared[i] = layer.shared[static_cast<size_t>(i)].view;
    p.swiglu_limit = 10;
    p.result = dense<AnyView<2>>(result.data() + first * hidden, {n, hidden});
    p.workspace = scratch.of(moe_experts_workspace_bytes(p, context));
    return p;
  }

  MoeGateParams gate(const Layer& layer, const Context& context, int64_t first) {
    const int64_t n = count - first, hidden = layer.shape.hidden;
    MoeGateParams p{};
    p.x = dense<AnyView<2>>(x.data() + first * hidden, {n, hidden});
    p.weight = dense<AnyView<2>>(layer.gate.data(), {layer.shape.routed, hidden});
    p.top_k = kTopK;
    p.bias.data = layer.bias.data(), p.bias.shape[0] = layer.shape.routed, p.bias.stride[0] = 1;
    p.route_scale = 1.5;
    p.weights = dense<View<float, 2>>(weights.data() + first * kTopK, {n, kTopK});
    p.indices = dense<AnyView<2>>(indices.data() + first * kTopK, {n, kTopK});
    p.workspace = scratch.of(moe_gate_workspace_bytes(p, context));
    return p;
  }

  double touched(int64_t experts) const {
    std::vector<char> seen(static_cast<size_t>(experts), 0);
    for (const int32_t index : indices) seen[static_cast<size_t>(index)] = 1;
    double sum = 0;
    for (const char one : seen) sum += one;
    return sum;
  }
};

// Runs a case once, for the name of the implementation that it gets.
void name_implementation(bench::Measurement& m) {
  m.run();
  for (const OpInfo* op = OpInfo::first(); op != nullptr; op = op->next()) {
    if (op->name() == m.op && op->last() != nullptr) m.impl = op->last();
  }
}

void measure_experts(bench::Bench& bench, const Layer& layer, int64_t count) {
  const Shape& s = layer.shape;
  const Context context = bench.pool().context();
  Context scalar = context;
  scalar.best = Isa::kScalar;
  Tokens tokens(layer, count), last(layer, count);
  bench::Measurement m;
  m.op = "moe_experts";
  m.shape = std::string(s.name) + " " + std::to_string(count) + " tokens, " + std::to_string(s.experts) +
            " experts fp4 " + std::to_string(s.hidden) + "x" + std::to_string(s.inter);
  m.flops = 6.0 * static_cast<double>(s.hidden * s.inter * count) * (kTopK + 1);
  m.bytes = 4.0 * static_cast<double>(count * s.hidden);
  for (const Matrix& w : layer.routed)
    m.bytes += w.bytes() / static_cast<double>(s.experts) * tokens.touched(s.experts);
  for (const Matrix& w : layer.shared) m.bytes += w.bytes();
  m.unit = bench::Unit::kBFloat16;
  Status status = Status::ok();
  m.run = [&] { status = moe_experts(tokens.experts(layer, context, 0), context); };
  m.error = [&] {
    const MoeExpertsParams alone = last.experts(layer, scalar, count - 1);
    if (!status.is_ok() || !moe_experts(alone, scalar).is_ok()) return static_cast<double>(INFINITY);
    std::vector<float> actual, expected;
    for (size_t i = tokens.result.size() - static_cast<size_t>(s.hidden); i < tokens.result.size(); ++i) {
      actual.push_back(to_float(tokens.result[i])), expected.push_back(to_float(last.result[i]));
    }
    return bench::relative_error(actual, expected);
  };
  m.error_limit = 1.0 / 128;  // of the largest value; the results are bfloat16
  name_implementation(m);
  bench.measure(m);
}

void measure_gate(bench::Bench& bench, const Layer& layer, int64_t count) {
  const Shape& s = layer.shape;
  const Context context = bench.pool().context();
  Context scalar = context;
  scalar.best = Isa::kScalar;
  Tokens tokens(layer, count), last(layer, count);
  bench::Measurement m;
  m.op = "moe_gate";
  m.shape = std::string(s.name) + " " + std::to_string(count) + " tokens, " + std::to_string(s.routed) + "x" +
            std::to_string(s.hidden);
  m.flops = 2.0 * static_cast<double>(s.hidden * s.routed * count);
  m.bytes = 2.0 * static_cast<double>(s.hidden * (s.routed + count));
  m.unit = bench::Unit::kBFloat16;
  Status status = Status::ok();
  m.run = [&] { status = moe_gate(tokens.gate(layer, context, 0), context); };
  m.error = [&] {
    if (!status.is_ok() || !moe_gate(last.gate(layer, scalar, count - 1), scalar).is_ok()) {
      return static_cast<double>(INFINITY);
    }
    std::vector<float> actual, expected;
    for (size_t i = tokens.weights.size() - kTopK; i < tokens.weights.size(); ++i) {
      if (tokens.indices[i] != last.indices[i]) return static_cast<double>(INFINITY);
      actual.push_back(tokens.weights[i]), expected.push_back(last.weights[i]);
    }
    return bench::relative_error(actual, expected);
  };
  m.error_limit = 1e-5;
  name_implementation(m);
  bench.measure(m);
}

// Sorting pairs by expert: bytes of the indices, the rows and the offsets; there is no arithmetic to speak of.
void measure_map(bench::Bench& bench, const Shape& s, int64_t count) {
  const Context context = bench.pool().context();
  Random random;
  std::vector<int32_t> indices(static_cast<size_t>(count * kTopK)), rows(indices.size());
  std::vector<int32_t> offsets(static_cast<size_t>(s.routed + 1));
  for (int32_t& index : indices) index = static_cast<int32_t>(random.below(s.routed));
  MoeMapParams p{};
  p.indices = dense<AnyView<2>>(indices.data(), {count, kTopK});
  p.experts = s.routed;
  p.offsets = dense<AnyView<1>>(offsets.data(), {s.routed + 1});
  p.rows = dense<AnyView<1>>(rows.data(), {count * kTopK});
  bench::Measurement m;
  m.op = "moe_map";
  m.impl = "scalar";
  m.shape = std::string(s.name) + " " + std::to_string(count) + " tokens, " + std::to_string(s.routed) + " experts";
  m.bytes = 4.0 * static_cast<double>(2 * indices.size() + offsets.size());
  Status status = Status::ok();
  m.run = [&] { status = moe_map(p, context); };
  m.error = [&] {
    if (!status.is_ok()) return static_cast<double>(INFINITY);
    std::vector<int32_t> expected(rows.size()), begins(offsets.size(), 0);
    for (size_t i = 0; i < expected.size(); ++i) expected[i] = static_cast<int32_t>(i);
    std::stable_sort(expected.begin(), expected.end(), [&](int32_t a, int32_t b) { return indices[a] < indices[b]; });
    for (const int32_t index : indices) ++begins[static_cast<size_t>(index) + 1];
    std::partial_sum(begins.begin(), begins.end(), begins.begin());
    return rows == expected && offsets == begins ? 0.0 : static_cast<double>(INFINITY);
  };
  bench.measure(m);
}

}  // namespace

int main(int argc, char** argv) {
  bench::Bench bench(argc, argv);
  if (!bench.usable()) return bench.exit_code();
  for (const Shape& shape : {Shape{"v4-flash", 4096, 2048, 16, 256}, Shape{"v4-pro", 7168, 3072, 12, 384}}) {
    if (bench.quick() && shape.hidden > 4096) continue;
    const Layer layer(shape);
    for (const int64_t tokens : {1, 8, 64, 512, 2048}) {
      if (bench.quick() && tokens > 64) continue;
      measure_gate(bench, layer, tokens);
      measure_map(bench, shape, tokens);
      measure_experts(bench, layer, tokens);
    }
  }
  return bench.exit_code();
}
