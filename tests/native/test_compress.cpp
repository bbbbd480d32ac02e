// compress without torch: the vector kernel against the scalar one bit for bit, pages and state, on several numbers of
// threads, between guard bands; a call in two pieces; compress_entries and its gradients; the validation messages.
#include <cmath>
#include <cstring>
#include <string>

#include "common/hardware.h"
#include "common/pages.h"
#include "common/thread_pool.h"
#include "native/check.h"
#include "native/kernels.h"
#include "ops/compress.h"

namespace {

using namespace dsv4;
using testing::Guarded;
using testing::Random;

struct Shape {
  int64_t ratio, dim, rope_dim, sets;
  bool rotate;
};

// Two sequences, of 21 rows from position 0 and of 9 from position 13; every third page is missing.
struct Problem {
  static constexpr int64_t kRows = 30, kBlocks = 12, kPageSize = 3;

  Shape shape;
  Guarded<float> kv, gate, ape, rope;
  Guarded<bf16> weight;
  Guarded<int32_t> table, sequence, position;
  int64_t ring;

  explicit Problem(const Shape& s)
      : shape(s),
        kv({kRows, s.sets * s.dim}),
        gate({kRows, s.sets * s.dim}),
        ape({s.ratio, s.sets * s.dim}),
        rope({kRows, s.rope_dim / 2, 2}),
        weight({s.dim}),
        table({2, kBlocks}),
        sequence({kRows}),
        position({kRows}),
        ring(s.sets * s.ratio + 2) {
    Random random(static_cast<uint64_t>(s.ratio * 100 + s.dim));
    kv.fill(random, -2, 2), gate.fill(random, -6, 6), ape.fill(random, -1, 1), rope.fill(random, -1, 1);
    weight.fill(random, 0.5f, 1.5f);
    for (int64_t i = 0; i < 2 * kBlocks; ++i) table[i] = i % 3 == 2 ? -1 : static_cast<int32_t>(2 * kBlocks - 1 - i);
    for (int64_t t = 0; t < kRows; ++t) {
      sequence[t] = t < 21 ? 0 : 1;
      position[t] = static_cast<int32_t>(t < 21 ? t : t - 21 + 13);
    }
  }

  int64_t page_bytes() const {
    return shape.rotate ? kPageSize * (shape.dim / 2 + shape.dim / 32)
                        : fp8_page_bytes(kPageSize, shape.dim, shape.rope_dim);
  }

  struct Result {
    Guarded<uint8_t> pages;
    Guarded<float> state;
  };
  Result empty() {
    Result result{Guarded<uint8_t>({2 * kBlocks, page_bytes()}), Guarded<float>({2, ring, 2, shape.sets * shape.dim})};
    std::memset(result.pages.data(), 0x5A, static_cast<size_t>(result.pages.size()));
    Random random(7);
    result.state.fill(random, -3, 3);
    return result;
  }

  CompressParams params(Result& result, int64_t first, int64_t count) {
    CompressParams p{kv.const_view<2>(),
                     gate.const_view<2>(),
                     ape.const_view<2>(),
                     weight.any<1>(),
                     rope.any<3>(),
                     result.state.view<4>(),
                     {{}, result.pages.any<2>(), table.any<2>(), kPageSize},
                     sequence.any<1>(),
                     position.any<1>(),
                     shape.ratio,
                     1e-6,
                     shape.rotate,
                     {}};
    const auto cut = [&](auto& view) {
      view.data = decltype(view.data)(static_cast<char*>(const_cast<void*>(static_cast<const void*>(view.data))) +
                                      first * view.stride[0] * 4);
      view.shape[0] = count;
    };
    cut(p.kv), cut(p.gate), cut(p.rope), cut(p.sequence), cut(p.position);
    return p;
  }

  void run(Result& result, int64_t first, int64_t count, const Context& context) {
    CompressParams p = params(result, first, count);
    testing::Scratch scratch(compress_workspace_bytes(p, context));
    p.workspace = scratch.workspace();
    const Status status = compress(p, context);
    CHECK_MESSAGE(status.is_ok(), status.message());
    CHECK(scratch.intact());
  }
};

TEST(every_implementation_cut_and_thread_count) {
  for (const Shape& shape : {Shape{4, 512, 64, 2, false}, Shape{4, 128, 64, 2, true}, Shape{8, 64, 32, 1, false},
                             Shape{1, 32, 0, 2, true}, Shape{5, 96, 32, 1, false}}) {
    Problem problem(shape);
    ThreadPool one(1);
    Context scalar = one.context();
    scalar.best = Isa::kScalar;
    Problem::Result expected = problem.empty();
    problem.run(expected, 0, Problem::kRows, scalar);
    CHECK(!expected.pages.same_bits(problem.empty().pages));
    for (const int threads : {1, 2, 3}) {
      ThreadPool pool(threads);
      for (const Isa isa : {Isa::kScalar, Isa::kAvx512}) {
        if (isa > cpu_isa()) {
          testing::not_run("this machine has no AVX-512");
          continue;
        }
        Context context = pool.context();
        context.best = isa;
        for (const int64_t cut : {0, 1, 10, 21, 24, 29}) {
          Problem::Result result = problem.empty();
          problem.run(result, 0, cut, context);
          problem.run(result, cut, Problem::kRows - cut, context);
          CHECK(result.pages.intact() && result.state.intact());
          const std::string what = std::string(isa_name(isa)) + ", cut " + std::to_string(cut);
          CHECK_MESSAGE(result.pages.same_bits(expected.pages), "pages, " + what);
          CHECK_MESSAGE(result.state.same_bits(expected.state), "state, " + what);
        }
      }
    }
    CHECK(problem.kv.intact() && problem.gate.intact() && problem.table.intact());
  }
}

// One whole sequence of 26 rows: entries, and their gradients behind them. N is float32 or bfloat16.
template <class N>
struct Sequence {
  static constexpr int64_t kRows = 26;

  Shape shape;
  int64_t entries, channels;
  Guarded<float> kv, gate, ape, rope;
  Guarded<N> weight, grad;

  explicit Sequence(const Shape& s)
      : shape(s),
        entries(kRows / s.ratio),
        channels(s.sets * s.dim),
        kv({kRows, channels}),
        gate({kRows, channels}),
        ape({s.ratio, channels}),
        rope({entries, s.rope_dim / 2, 2}),
        weight({s.dim}),
        grad({entries, s.dim}) {
    Random random(static_cast<uint64_t>(s.ratio * 100 + s.dim));
    kv.fill(random, -2, 2), gate.fill(random, -6, 6), ape.fill(random, -1, 1), rope.fill(random, -1, 1);
    weight.fill(random, 0.5f, 1.5f), grad.fill(random, -1, 1);
  }

  CompressEntriesParams params() {
    return {kv.const_view<2>(),
            gate.const_view<2>(),
            ape.const_view<2>(),
            weight.template any<1>(),
            rope.any<3>(),
            shape.ratio,
            1e-6,
            shape.rotate,
            {},
            {}};
  }

  Guarded<N> forward(const Context& context) {
    Guarded<N> result({entries, shape.dim});
    CompressEntriesParams p = params();
    p.result = result.template any<2>();
    testing::Scratch scratch(compress_entries_workspace_bytes(p, context));
    p.workspace = scratch.workspace();
    const Status status = compress_entries(p, context);
    CHECK_MESSAGE(status.is_ok(), status.message());
    CHECK(scratch.intact() && result.intact());
    return result;
  }

  struct Gradients {
    Guarded<float> kv, gate, ape;
    Guarded<N> weight;
  };
  Gradients backward(const Context& context) {
    Gradients to{Guarded<float>({kRows, channels}), Guarded<float>({kRows, channels}),
                 Guarded<float>({shape.ratio, channels}), Guarded<N>({shape.dim})};
    CompressEntriesBackwardParams p{grad.template any<2>(),    params(),
                                    to.kv.template view<2>(),  to.gate.template view<2>(),
                                    to.ape.template view<2>(), to.weight.template any<1>()};
    testing::Scratch scratch(compress_entries_backward_workspace_bytes(p, context));
    p.forward.workspace = scratch.workspace();
    const Status status = compress_entries_backward(p, context);
    CHECK_MESSAGE(status.is_ok(), status.message());
    CHECK(scratch.intact() && to.kv.intact() && to.gate.intact() && to.ape.intact() && to.weight.intact());
    return to;
  }
};

template <class T>
void check_close(const Guarded<T>& found, const Guarded<T>& expected, float close, const char* what) {
  for (int64_t i = 0; i < found.size(); ++i) {
    const float a = to_float(found[i]), e = to_float(expected[i]);
    if (!(std::fabs(a - e) <= close * std::fabs(e) + 1e-6f)) {
      CHECK_MESSAGE(false, std::string(what) + ": " + std::to_string(a) + ", expected " + std::to_string(e));
    }
  }
}

// Entries bit for bit; the sums of a gradient go in another order in vectors, so that one may differ by a rounding.
template <class N>
void whole_sequence(const Shape& shape) {
  Sequence<N> sequence(shape);
  ThreadPool one(1);
  const Context scalar = testing::context_of(one, Isa::kScalar);
  const Guarded<N> entries = sequence.forward(scalar);
  const auto expected = sequence.backward(scalar);
  const float close = sizeof(N) == 2 ? 1.0f / 128 : 4e-6f;
  for (const Isa isa : {Isa::kScalar, Isa::kAvx512}) {
    if (isa > cpu_isa()) {
      testing::not_run("this machine has no AVX-512");
      continue;
    }
    const auto found = sequence.backward(testing::context_of(one, isa));
    check_close(found.kv, expected.kv, 4e-6f, "kv");
    check_close(found.gate, expected.gate, 4e-6f, "gate");
    check_close(found.ape, expected.ape, 4e-6f, "ape");
    check_close(found.weight, expected.weight, close, "norm_weight");
    for (const int threads : {1, 2, 3}) {
      ThreadPool pool(threads);
      const Context context = testing::context_of(pool, isa);
      CHECK(sequence.forward(context).same_bits(entries));
      const auto again = sequence.backward(context);
      CHECK(again.kv.same_bits(found.kv) && again.gate.same_bits(found.gate));
      CHECK(again.ape.same_bits(found.ape) && again.weight.same_bits(found.weight));
    }
  }
  CHECK(sequence.kv.intact() && sequence.gate.intact() && sequence.ape.intact() && sequence.grad.intact());
}

TEST(entries_of_a_whole_sequence_and_their_gradients) {
  for (const Shape& shape :
       {Shape{4, 512, 64, 2, false}, Shape{4, 128, 64, 2, true}, Shape{8, 64, 32, 1, false}, Shape{1, 32, 0, 2, true},
        Shape{5, 96, 32, 1, false}, Shape{30, 64, 32, 2, false}, Shape{3, 33, 2, 2, false}, Shape{4, 16, 4, 1, true}}) {
    whole_sequence<float>(shape);
    whole_sequence<bf16>(shape);
  }
}

TEST(messages) {
  ThreadPool pool(1);
  Problem problem({4, 64, 32, 2, false});
  Problem::Result result = problem.empty();
  const auto message = [&](const CompressParams& p) { return std::string(compress(p, pool.context()).message()); };
  CompressParams p = problem.params(result, 0, Problem::kRows);
  p.ratio = 0;
  CHECK(message(p) == "compress: ratio must be at least 1, got 0");
  p.ratio = int64_t{1} << 31;
  CHECK(message(p) == "compress: ratio is too large");
  p = problem.params(result, 0, Problem::kRows);
  p.state.shape[1] = 7;
  CHECK(message(p) == "compress: state must have a ring of at least 8 positions, got 7");
  p = problem.params(result, 0, Problem::kRows);
  CHECK(message(p).rfind("compress: workspace must have ", 0) == 0);
  problem.position[3] = 9;
  CHECK(message(problem.params(result, 0, Problem::kRows)) ==
        "compress: position must ascend by one within a sequence, from 0 or later");
  problem.sequence[29] = 0;
  CHECK(message(problem.params(result, 0, Problem::kRows)) == "compress: the rows of a sequence must stand together");
  problem.sequence[29] = 2;
  CHECK(message(problem.params(result, 0, Problem::kRows)) ==
        "compress: sequence must lie in [0, 2), the rows of the table, got 2");
  Sequence<float> sequence({4, 64, 32, 2, false});
  CompressEntriesParams entries = sequence.params();
  Guarded<float> short_result({5, 64});
  entries.result = short_result.any<2>();
  CHECK(std::string(compress_entries(entries, pool.context()).message()) ==
        "compress_entries: result must be float32 [6, 64], got float32 [5, 64]");
  CompressEntriesBackwardParams gradients{short_result.any<2>(), sequence.params(), {}, {}, {}, {}};
  CHECK(std::string(compress_entries_backward(gradients, pool.context()).message()) ==
        "compress_entries_backward: grad must be float32 [6, 64], got float32 [5, 64]");
}

}  // namespace
