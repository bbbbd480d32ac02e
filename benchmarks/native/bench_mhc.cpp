// The mHC kernels without torch: bfloat16 streams, one token (decoding) and 4,096, at the widths of the nano model,
// V4-Flash and V4-Pro. Every vector implementation that this machine has is timed, for one token against the scalar
// one. The check compares the last tokens with the scalar kernels, which take them alone.
#include <algorithm>
#include <cmath>
#include <string>

#include "common/hardware.h"
#include "native/bench.h"
#include "ops/mhc.h"

namespace {

using namespace dsv4;

constexpr int64_t kChecked = 4;  // tokens compared

// 64-byte aligned memory.
template <class T>
class Array {
 public:
  explicit Array(int64_t size) : memory_(static_cast<size_t>(size) * sizeof(T) + 64), size_(size) {
    data_ = reinterpret_cast<T*>((reinterpret_cast<uintptr_t>(memory_.data()) + 63) / 64 * 64);
  }
  T* data() { return data_; }
  int64_t size() const { return size_; }
  void fill(Random& random, float low, float high) {
    for (int64_t i = 0; i < size_; ++i) data_[i] = from_float<T>(random.uniform(low, high));
  }

 private:
  std::vector<char> memory_;
  int64_t size_;
  T* data_;
};

// Inputs and outputs of every mHC op at one size. A second one holds what the scalar kernels make of the last tokens.
struct Problem {
  int64_t tokens, hidden;
  Array<bf16> sublayer, streams, grad, result, input, grad_streams, grad_sublayer;
  Array<float> fn, scale, base, post, comb, post_out, comb_out, grad_fn, grad_small;
  Array<char> workspace;

  Problem(int64_t t, int64_t d, int64_t workspace_bytes)
      : tokens(t),
        hidden(d),
        sublayer(t * d),
        streams(4 * t * d),
        grad(4 * t * d),
        result(4 * t * d),
        input(t * d),
        grad_streams(4 * t * d),
        grad_sublayer(t * d),
        fn(96 * d),
        scale(3),
        base(24),
        post(4 * t),
        comb(16 * t),
        post_out(4 * t),
        comb_out(16 * t),
        grad_fn(96 * d),
        grad_small(27),
        workspace(workspace_bytes) {}

  void fill() {
    Random random;
    const float width = 1.7f / std::sqrt(static_cast<float>(4 * hidden));
    for (Array<bf16>* x : {&sublayer, &streams, &grad}) x->fill(random, -1, 1);
    fn.fill(random, -width, width), scale.fill(random, 0.5f, 1.5f), base.fill(random, -1, 1);
    post.fill(random, 0, 2), comb.fill(random, 0, 1);
  }

  void take_last(Problem& from) {
    const auto copy = [&](auto& to, auto& x) {
      const int64_t row = to.size() / tokens;
      std::copy_n(x.data() + (from.tokens - tokens) * row, to.size(), to.data());
    };
    copy(sublayer, from.sublayer), copy(streams, from.streams), copy(grad, from.grad);
    copy(post, from.post), copy(comb, from.comb);
    std::copy_n(from.fn.data(), fn.size(), fn.data());
    std::copy_n(from.scale.data(), 3, scale.data());
    std::copy_n(from.base.data(), 24, base.data());
  }

  AnyView<3> streams_of(Array<bf16>& x) { return dense<AnyView<3>>(x.data(), {tokens, 4, hidden}); }
  AnyView<2> rows_of(Array<bf16>& x) { return dense<AnyView<2>>(x.data(), {tokens, hidden}); }
  View<float, 2> post_of(Array<float>& x) { return dense<View<float, 2>>(x.data(), {tokens, 4}); }
  View<float, 3> comb_of(Array<float>& x) { return dense<View<float, 3>>(x.data(), {tokens, 4, 4}); }
  View<const float, 2> const_post() { return dense<View<const float, 2>>(post.data(), {tokens, 4}); }
  View<const float, 3> const_comb() { return dense<View<const float, 3>>(comb.data(), {tokens, 4, 4}); }
  Workspace scratch() { return {workspace.data(), workspace.size()}; }
  MhcMixing mixing(int mixes) {
    return {dense<View<const float, 2>>(fn.data(), {mixes, 4 * hidden}),
            dense<View<const float, 1>>(scale.data(), {mixes == 4 ? 1 : 3}),
            dense<View<const float, 1>>(base.data(), {mixes}),
            1e-6f,
            1e-6f,
            20};
  }

  MhcPostParams post_params() {
    return {rows_of(sublayer), streams_of(streams), const_post(), const_comb(), streams_of(result)};
  }
  MhcPreParams pre_params(Array<bf16>& read) {
    return {streams_of(read), mixing(24), {}, 1e-6f, rows_of(input), post_of(post_out), comb_of(comb_out), scratch()};
  }
  Status run(const std::string& op, const Context& context) {
    if (op == "mhc_post") return mhc_post(post_params(), context);
    if (op == "mhc_pre") return mhc_pre(pre_params(streams), context);
    if (op == "mhc_post_pre") return mhc_post_pre({post_params(), pre_params(result)}, context);
    if (op == "mhc_head") return mhc_head({streams_of(streams), mixing(4), rows_of(input), scratch()}, context);
    if (op == "mhc_post_backward") {
      return mhc_post_backward({streams_of(grad), rows_of(sublayer), streams_of(streams), const_post(), const_comb(),
                                rows_of(grad_sublayer), streams_of(grad_streams), post_of(post_out), comb_of(comb_out)},
                               context);
    }
    const View<float, 1> grad_scale = dense<View<float, 1>>(grad_small.data(), {3}),
                         grad_base = dense<View<float, 1>>(grad_small.data() + 3, {24});
    return mhc_pre_backward({rows_of(sublayer),
                             const_post(),
                             const_comb(),
                             {},
                             streams_of(streams),
                             mixing(24),
                             {},
                             1e-6f,
                             streams_of(grad_streams),
                             dense<View<float, 2>>(grad_fn.data(), {24, 4 * hidden}),
                             grad_scale,
                             grad_base,
                             {},
                             scratch()},
                            context);
  }

  // What `op` left for the last `count` tokens.
  std::vector<float> output(const std::string& op, int64_t count) {
    std::vector<float> values;
    const auto append = [&](auto& x) {
      const int64_t row = x.size() / tokens;
      for (int64_t i = (tokens - count) * row; i < x.size(); ++i) values.push_back(to_float(x.data()[i]));
    };
    if (op == "mhc_post" || op == "mhc_post_pre") append(result);
    if (op == "mhc_pre" || op == "mhc_post_pre" || op == "mhc_head") append(input);
    if (op == "mhc_pre" || op == "mhc_post_pre" || op == "mhc_post_backward") append(post_out), append(comb_out);
    if (op == "mhc_post_backward") append(grad_sublayer);
    if (op == "mhc_post_backward" || op == "mhc_pre_backward") append(grad_streams);
    return values;
  }
};

// Operations and fewest bytes of a token, as multiples of the hidden width plus a constant.
struct Cost {
  const char* op;
  double flops, bytes, bytes_more;
  bool tiles;  // has an AMX implementation
};
constexpr Cost kOps[] = {{"mhc_pre", 208, 10, 80, true},           {"mhc_post", 40, 18, 80, false},
                         {"mhc_post_pre", 248, 20, 160, true},     {"mhc_head", 48, 10, 0, true},
                         {"mhc_pre_backward", 608, 18, 160, true}, {"mhc_post_backward", 80, 28, 160, false}};

void measure(bench::Bench& bench, const Cost& cost, const char* shape, int64_t tokens, int64_t hidden, Isa isa) {
  Context context = bench.pool().context();
  context.best = isa;
  Context scalar = context;
  scalar.best = Isa::kScalar;
  const int64_t scratch = std::max(mhc_pre_workspace_bytes(tokens, hidden, DType::kBFloat16, context),
                                   mhc_pre_backward_workspace_bytes(tokens, hidden, DType::kBFloat16, context));
  Problem problem(tokens, hidden, scratch), last(std::min(tokens, kChecked), hidden, scratch);
  problem.fill();
  last.take_last(problem);
  bench::Measurement m;
  m.op = cost.op;
  m.impl = isa_name(isa);
  m.shape = std::string(shape) + " " + std::to_string(tokens) + "x4x" + std::to_string(hidden);
  m.flops = cost.flops * static_cast<double>(tokens * hidden);
  m.bytes = static_cast<double>(tokens) * (cost.bytes * static_cast<double>(hidden) + cost.bytes_more);
  m.unit = isa == Isa::kAmx ? bench::Unit::kBFloat16 : bench::Unit::kFloat32;
  Status status = Status::ok();
  m.run = [&] { status = problem.run(cost.op, context); };
  m.error = [&] {
    if (!status.is_ok() || !last.run(cost.op, scalar).is_ok()) return static_cast<double>(INFINITY);
    return bench::relative_error(problem.output(cost.op, last.tokens), last.output(cost.op, last.tokens));
  };
  m.error_limit = 1.0 / 128;                 // of the largest value; the results are bfloat16
  if (isa != Isa::kScalar && tokens == 1) {  // of many tokens it would take minutes
    m.baseline = "scalar";
    m.run_baseline = [&] { status = problem.run(cost.op, scalar); };
  }
  bench.measure(m);
}

}  // namespace

int main(int argc, char** argv) {
  bench::Bench bench(argc, argv);
  if (!bench.usable()) return bench.exit_code();
  struct Shape {
    const char* name;
    int64_t hidden;
  };
  for (const Shape shape : {Shape{"nano", 256}, Shape{"v4-flash", 4096}, Shape{"v4-pro", 7168}}) {
    if (bench.quick() && shape.hidden > 4096) continue;
    for (const int64_t tokens : {int64_t{1}, bench.quick() ? int64_t{256} : int64_t{4096}}) {
      for (const Cost& cost : kOps) {
        for (const Isa isa : {Isa::kAmx, Isa::kAvx512, Isa::kAvx2}) {
          if (isa > bench.pool().context().best) continue;
          if (isa == Isa::kAmx && !cost.tiles) continue;
          measure(bench, cost, shape.name, tokens, shape.hidden, isa);
        }
        if (bench.pool().context().best == Isa::kScalar) {
          measure(bench, cost, shape.name, tokens, shape.hidden, Isa::kScalar);
        }
      }
    }
  }
  return bench.exit_code();
}
