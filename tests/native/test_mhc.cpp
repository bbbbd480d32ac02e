// mHC kernels without torch: every implementation against the scalar one, guard bands, one result for any number of
// threads and any company, the validation messages. The AMX kernels run through a C++ model of the tiles as well.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <functional>

#include "common/hardware.h"
#include "common/thread_pool.h"
#include "cpu/mhc.h"
#include "native/check.h"

namespace dsv4::amx_model {
int64_t mhc_workspace_bytes(int64_t hidden, int mixes);
Status mhc_pre(const MhcPreParams&, const Context&);
Status mhc_post_pre(const MhcPostPreParams&, const Context&);
Status mhc_head(const MhcHeadParams&, const Context&);
Status mhc_pre_backward(const MhcPreBackwardParams&, const Context&);
Status mhc_head_backward(const MhcHeadBackwardParams&, const Context&);
}  // namespace dsv4::amx_model

namespace {

using namespace dsv4;
using testing::Guarded;
using testing::Random;
using testing::Scratch;

struct Implementation {
  const char* name;
  Isa needs;
  bool bf16_only;
  double products;  // relative error of the products that it may add
  Status (*pre)(const MhcPreParams&, const Context&);
  Status (*post)(const MhcPostParams&, const Context&);
  Status (*post_pre)(const MhcPostPreParams&, const Context&);
  Status (*head)(const MhcHeadParams&, const Context&);
  Status (*pre_backward)(const MhcPreBackwardParams&, const Context&);
  Status (*post_backward)(const MhcPostBackwardParams&, const Context&);
  Status (*head_backward)(const MhcHeadBackwardParams&, const Context&);
};

const Implementation kScalar = {"scalar",
                                Isa::kScalar,
                                false,
                                0,
                                scalar::mhc_pre,
                                scalar::mhc_post,
                                scalar::mhc_post_pre,
                                scalar::mhc_head,
                                scalar::mhc_pre_backward,
                                scalar::mhc_post_backward,
                                scalar::mhc_head_backward};
const Implementation kOthers[] = {
#if defined(DSV4_WITH_AVX2)
    {"avx2", Isa::kAvx2, false, 0, avx2::mhc_pre, avx2::mhc_post, avx2::mhc_post_pre, avx2::mhc_head,
     avx2::mhc_pre_backward, avx2::mhc_post_backward, avx2::mhc_head_backward},
#endif
#if defined(DSV4_WITH_AVX512)
    {"avx512", Isa::kAvx512, false, 0, avx512::mhc_pre, avx512::mhc_post, avx512::mhc_post_pre, avx512::mhc_head,
     avx512::mhc_pre_backward, avx512::mhc_post_backward, avx512::mhc_head_backward},
    {"amx_model", Isa::kAvx512, true, 4e-6, amx_model::mhc_pre, avx512::mhc_post, amx_model::mhc_post_pre,
     amx_model::mhc_head, amx_model::mhc_pre_backward, avx512::mhc_post_backward, amx_model::mhc_head_backward},
#endif
#if defined(DSV4_WITH_AMX)
    {"amx", Isa::kAmx, true, 4e-6, amx::mhc_pre, avx512::mhc_post, amx::mhc_post_pre, amx::mhc_head,
     amx::mhc_pre_backward, avx512::mhc_post_backward, amx::mhc_head_backward},
#endif
};

void for_each_implementation(const std::function<void(const Implementation&)>& body) {
  for (const Implementation& implementation : kOthers) {
    if (cpu_isa() < implementation.needs) {
      testing::not_run((std::string("this machine has no ") + implementation.name).c_str());
      continue;
    }
    body(implementation);
  }
}

struct Result {
  std::vector<double> values;  // all outputs, those of type X first
  size_t rounded = 0;          // how many are of type X
  bool intact = true;
};

// One problem with inputs of type T, and everything each op writes.
template <class T>
struct Problem {
  int64_t tokens, hidden;
  Guarded<T> sublayer, streams, grad, weight;
  Guarded<float> post, comb, fn, scale, base, grad_post, grad_comb;
  bool norm;

  Problem(int64_t t, int64_t d, uint64_t seed, bool with_norm)
      : tokens(t),
        hidden(d),
        sublayer({t, d}),
        streams({t, 4, d}),
        grad({t, 4, d}),
        weight({d}),
        post({t, 4}),
        comb({t, 4, 4}),
        fn({24, 4 * d}),
        scale({3}),
        base({24}),
        grad_post({t, 4}),
        grad_comb({t, 4, 4}),
        norm(with_norm) {
    Random random(seed);
    const float width = 1.7f / std::sqrt(static_cast<float>(4 * d));
    sublayer.fill(random, -1, 1), streams.fill(random, -1, 1), grad.fill(random, -1, 1),
        weight.fill(random, 0.5f, 1.5f);
    post.fill(random, 0, 2), comb.fill(random, 0, 1), fn.fill(random, -width, width), scale.fill(random, 0.5f, 2);
    base.fill(random, -1, 1), grad_post.fill(random, -1, 1), grad_comb.fill(random, -1, 1);
  }

  MhcMixing mixing(bool head = false) {
    MhcMixing m{
        fn.template const_view<2>(), scale.template const_view<1>(), base.template const_view<1>(), 1e-6f, 1e-6f, 20};
    if (head) m.fn.shape[0] = 4, m.scale.shape[0] = 1, m.base.shape[0] = 4;
    return m;
  }
  AnyView<1> norm_weight() { return norm ? weight.template any<1>() : AnyView<1>{}; }

  // A part of the tokens [first, first + count) as a problem of its own: the same numbers, other company.
  Problem part(int64_t first, int64_t count) {
    Problem p(count, hidden, 1, norm);
    const auto copy = [&](auto& to, auto& from, int64_t row) {
      for (int64_t i = 0; i < count * row; ++i) to[i] = from[first * row + i];
    };
    copy(p.sublayer, sublayer, hidden), copy(p.streams, streams, 4 * hidden), copy(p.grad, grad, 4 * hidden);
    copy(p.post, post, 4), copy(p.comb, comb, 16), copy(p.grad_post, grad_post, 4), copy(p.grad_comb, grad_comb, 16);
    for (int64_t i = 0; i < fn.size(); ++i) p.fn[i] = fn[i];
    for (int64_t i = 0; i < hidden; ++i) p.weight[i] = weight[i];
    for (int i = 0; i < 3; ++i) p.scale[i] = scale[i];
    for (int i = 0; i < 24; ++i) p.base[i] = base[i];
    return p;
  }
};

// The largest that any implementation asks for.
Context widest(const Context& context) {
  Context wide = context;
  wide.best = Isa::kAmx;
  return wide;
}

template <class T>
void append(Result& result, const Guarded<T>& output) {
  for (int64_t i = 0; i < output.size(); ++i) result.values.push_back(static_cast<double>(to_float(output[i])));
  result.rounded = std::is_same_v<T, bf16> ? result.values.size() : result.rounded;
  result.intact = result.intact && output.intact();
}

template <class T>
Result run_post_pre(const Implementation& by, Problem<T>& p, const Context& context) {
  Guarded<T> result({p.tokens, 4, p.hidden}), input({p.tokens, p.hidden});
  Guarded<float> post({p.tokens, 4}), comb({p.tokens, 4, 4});
  Scratch scratch(mhc_pre_workspace_bytes(p.tokens, p.hidden, DType::kBFloat16, widest(context)));
  const MhcPostPreParams params{
      {p.sublayer.template any<2>(), p.streams.template any<3>(), p.post.template const_view<2>(),
       p.comb.template const_view<3>(), result.template any<3>()},
      {result.template any<3>(), p.mixing(), p.norm_weight(), 1e-6f, input.template any<2>(), post.template view<2>(),
       comb.template view<3>(), scratch.workspace()}};
  CHECK(by.post_pre(params, context).is_ok());
  Result all;
  append(all, result), append(all, input), append(all, post), append(all, comb);
  all.intact = all.intact && scratch.intact();

  // The two ops one after another give the same bits.
  Guarded<T> result2({p.tokens, 4, p.hidden}), input2({p.tokens, p.hidden});
  Guarded<float> post2({p.tokens, 4}), comb2({p.tokens, 4, 4});
  MhcPostParams first = params.post;
  first.result = result2.template any<3>();
  CHECK(by.post(first, context).is_ok());
  const MhcPreParams second{result2.template any<3>(), p.mixing(),
                            p.norm_weight(),           1e-6f,
                            input2.template any<2>(),  post2.template view<2>(),
                            comb2.template view<3>(),  scratch.workspace()};
  CHECK(by.pre(second, context).is_ok());
  CHECK(result2.same_bits(result) && input2.same_bits(input) && post2.same_bits(post) && comb2.same_bits(comb));
  return all;
}

// mhc_post and mhc_pre of the same streams.
template <class T>
Result run_post_and_pre(const Implementation& by, Problem<T>& p, const Context& context) {
  Guarded<T> result({p.tokens, 4, p.hidden}), input({p.tokens, p.hidden});
  Guarded<float> post({p.tokens, 4}), comb({p.tokens, 4, 4});
  Scratch scratch(mhc_pre_workspace_bytes(p.tokens, p.hidden, DType::kBFloat16, widest(context)));
  const MhcPostParams first{p.sublayer.template any<2>(), p.streams.template any<3>(), p.post.template const_view<2>(),
                            p.comb.template const_view<3>(), result.template any<3>()};
  CHECK(by.post(first, context).is_ok());
  const MhcPreParams second{p.streams.template any<3>(),
                            p.mixing(),
                            p.norm_weight(),
                            1e-6f,
                            input.template any<2>(),
                            post.template view<2>(),
                            comb.template view<3>(),
                            scratch.workspace()};
  CHECK(by.pre(second, context).is_ok());
  Result all;
  append(all, result), append(all, input), append(all, post), append(all, comb);
  all.intact = all.intact && scratch.intact();
  return all;
}

template <class T>
Result run_head(const Implementation& by, Problem<T>& p, const Context& context) {
  Guarded<T> output({p.tokens, p.hidden});
  Scratch scratch(mhc_head_workspace_bytes(p.tokens, p.hidden, DType::kBFloat16, widest(context)));
  const MhcHeadParams params{p.streams.template any<3>(), p.mixing(true), output.template any<2>(),
                             scratch.workspace()};
  CHECK(by.head(params, context).is_ok());
  Result all;
  append(all, output);
  all.intact = all.intact && scratch.intact();
  return all;
}

template <class T>
Result run_backward(const Implementation& by, Problem<T>& p, const Context& context, bool fn = true) {
  Result all;
  Guarded<T> grad_sublayer({p.tokens, p.hidden}), grad_streams({p.tokens, 4, p.hidden}), post_streams = grad_streams,
                                                                                         head_streams = grad_streams;
  Guarded<float> grad_post({p.tokens, 4}), grad_comb({p.tokens, 4, 4}), grad_fn({24, 4 * p.hidden}), grad_scale({3}),
      grad_base({24}), grad_weight({p.hidden}), head_fn({4, 4 * p.hidden}), head_scale({1}), head_base({4});
  const MhcPostBackwardParams post{
      p.grad.template any<3>(),        p.sublayer.template any<2>(),    p.streams.template any<3>(),
      p.post.template const_view<2>(), p.comb.template const_view<3>(), grad_sublayer.template any<2>(),
      post_streams.template any<3>(),  grad_post.template view<2>(),    grad_comb.template view<3>()};
  CHECK(by.post_backward(post, context).is_ok());
  Scratch scratch(mhc_pre_backward_workspace_bytes(p.tokens, p.hidden, DType::kBFloat16, widest(context)));
  const MhcPreBackwardParams pre{p.sublayer.template any<2>(),
                                 p.grad_post.template const_view<2>(),
                                 p.grad_comb.template const_view<3>(),
                                 p.norm ? p.grad.template any<3>() : AnyView<3>{},
                                 p.streams.template any<3>(),
                                 p.mixing(),
                                 p.norm_weight(),
                                 1e-6f,
                                 grad_streams.template any<3>(),
                                 fn ? grad_fn.template view<2>() : View<float, 2>{},
                                 grad_scale.template view<1>(),
                                 grad_base.template view<1>(),
                                 grad_weight.template view<1>(),
                                 scratch.workspace()};
  CHECK(by.pre_backward(pre, context).is_ok());
  const MhcHeadBackwardParams head{p.sublayer.template any<2>(),
                                   p.streams.template any<3>(),
                                   p.mixing(true),
                                   head_streams.template any<3>(),
                                   fn ? head_fn.template view<2>() : View<float, 2>{},
                                   head_scale.template view<1>(),
                                   head_base.template view<1>(),
                                   scratch.workspace()};
  CHECK(by.head_backward(head, context).is_ok());
  append(all, grad_sublayer), append(all, post_streams), append(all, grad_streams), append(all, head_streams);
  append(all, grad_post), append(all, grad_comb), append(all, grad_scale), append(all, grad_base);
  append(all, head_scale), append(all, head_base);
  if (p.norm) append(all, grad_weight);
  if (fn) append(all, grad_fn), append(all, head_fn);
  all.intact = all.intact && scratch.intact();
  return all;
}

// Within `relative` of the largest value, and where the output was rounded to bfloat16 two units of it: a last bit of
// difference before a rounding can tip it, once in the input and once more in its norm.
void check_close(const Result& actual, const Result& expected, double relative, const std::string& what) {
  if (!CHECK(actual.values.size() == expected.values.size())) return;
  double largest = 0, worst = 0;
  for (const double value : expected.values) largest = std::max(largest, std::fabs(value));
  for (size_t i = 0; i < expected.values.size(); ++i) {
    const double rounding = i < expected.rounded ? std::fabs(expected.values[i]) / 64 : 0;
    const double error = std::fabs(actual.values[i] - expected.values[i]);
    worst = std::isfinite(error) ? std::max(worst, (error - rounding) / std::max(largest, 1e-30)) : INFINITY;
    if (!std::isfinite(error)) break;
  }
  CHECK_MESSAGE(worst <= relative, what + ": error " + std::to_string(worst));
  CHECK_MESSAGE(actual.intact, what + ": wrote outside of its results");
}

// A norm makes much of a last bit: its input is rounded once more.
template <class T>
double gradient_tolerance(bool norm) {
  return norm && std::is_same_v<T, bf16> ? 5e-4 : 4e-6;
}

template <class T>
void compare_with_scalar(const Implementation& by) {
  ThreadPool pool(2);
  const Context context = pool.context();
  const int64_t hiddens[] = {1, 5, 31, 32, 33, 64, 96, 255, 511, 513, 1000, 2048};
  const int64_t tokens[] = {1, 2, 3, 15, 16, 17, 33};
  for (const int64_t d : hiddens) {
    for (const int64_t t : tokens) {
      for (const bool norm : {false, true}) {
        Problem<T> p(t, d, static_cast<uint64_t>(100 * d + t), norm);
        const std::string what = std::string(by.name) + " tokens " + std::to_string(t) + " hidden " + std::to_string(d);
        const double relative = 2e-6 + by.products;
        check_close(run_post_and_pre(by, p, context), run_post_and_pre(kScalar, p, context), relative, "pre " + what);
        check_close(run_head(by, p, context), run_head(kScalar, p, context), relative, "head " + what);
        if (norm && d == 1) continue;  // a norm over one element has no gradient
        check_close(run_backward(by, p, context), run_backward(kScalar, p, context), gradient_tolerance<T>(norm),
                    "backward " + what);
      }
    }
  }
}

TEST(implementations_agree_with_scalar_bfloat16) { for_each_implementation(compare_with_scalar<bf16>); }

TEST(implementations_agree_with_scalar_float32) {
  for_each_implementation([](const Implementation& by) {
    if (!by.bf16_only) compare_with_scalar<float>(by);
  });
}

bool same(const Result& a, const Result& b) { return a.values == b.values; }

// Sums over tokens are formed in groups of 1024.
template <class T>
void check_groups(const Implementation& by) {
  ThreadPool one(1), three(3);
  for (const int64_t tokens : {1024, 1025, 2050}) {
    for (const bool norm : {false, true}) {
      Problem<T> p(tokens, 40, 5, norm);
      const Result result = run_backward(by, p, three.context());
      check_close(result, run_backward(kScalar, p, three.context()), gradient_tolerance<T>(norm),
                  std::string(by.name) + " " + std::to_string(tokens) + " tokens");
      CHECK(same(result, run_backward(by, p, one.context())));
    }
  }
}

TEST(gradients_sum_over_groups_of_tokens) {
  for_each_implementation([](const Implementation& by) {
    check_groups<bf16>(by);
    if (!by.bf16_only) check_groups<float>(by);
  });
}

// Without the gradient of fn the others keep their bits.
template <class T>
void check_frozen_fn(const Implementation& by) {
  ThreadPool pool(2);
  for (const int64_t tokens : {0, 37, 1025}) {
    for (const bool norm : {false, true}) {
      Problem<T> p(tokens, 40, 6, norm);
      const Result whole = run_backward(by, p, pool.context()), others = run_backward(by, p, pool.context(), false);
      CHECK(others.intact && whole.values.size() == others.values.size() + 28 * 4 * 40);
      CHECK(std::equal(others.values.begin(), others.values.end(), whole.values.begin()));
    }
  }
}

TEST(the_gradient_of_fn_may_be_none) {
  for_each_implementation([](const Implementation& by) {
    check_frozen_fn<bf16>(by);
    if (!by.bf16_only) check_frozen_fn<float>(by);
  });
}

template <class T>
void check_invariance(const Implementation& by) {
  for (const int64_t d : {40, 600}) {
    for (const bool norm : {false, true}) {
      Problem<T> p(37, d, 7, norm);
      ThreadPool one(1), two(2), seven(7);
      const Result whole = run_post_pre(by, p, one.context()), head = run_head(by, p, one.context());
      for (ThreadPool* pool : {&two, &seven}) {
        CHECK(same(run_post_pre(by, p, pool->context()), whole));
        CHECK(same(run_head(by, p, pool->context()), head));
        CHECK(same(run_backward(by, p, pool->context()), run_backward(by, p, one.context())));
      }
      int64_t first = 0;
      for (const int64_t count : {1, 2, 16, 17, 1}) {
        Problem<T> piece = p.part(first, count);
        const Result alone = run_head(by, piece, two.context());
        CHECK(std::equal(alone.values.begin(), alone.values.end(), head.values.begin() + first * d));
        const Result mixed = run_post_pre(by, piece, two.context());
        CHECK(std::equal(mixed.values.begin(), mixed.values.begin() + count * 4 * d,
                         whole.values.begin() + first * 4 * d));
        const auto input = mixed.values.begin() + count * 4 * d;
        CHECK(std::equal(input, input + count * d, whole.values.begin() + 37 * 4 * d + first * d));
        const auto post = mixed.values.begin() + count * 5 * d;
        CHECK(std::equal(post, post + count * 4, whole.values.begin() + 37 * 5 * d + first * 4));
        const auto comb = post + count * 4;
        CHECK(std::equal(comb, comb + count * 16, whole.values.begin() + 37 * (5 * d + 4) + first * 16));
        first += count;
      }
    }
  }
}

TEST(results_do_not_depend_on_threads_or_company) {
  check_invariance<bf16>(kScalar);
  for_each_implementation([](const Implementation& by) {
    check_invariance<bf16>(by);
    if (!by.bf16_only) check_invariance<float>(by);
  });
}

TEST(no_tokens_give_zero_sums) {
  ThreadPool pool(1);
  for_each_implementation([&](const Implementation& by) {
    Problem<bf16> p(0, 40, 3, true);
    run_post_pre(by, p, pool.context());
    const Result all = run_backward(by, p, pool.context());
    CHECK(all.intact && std::all_of(all.values.begin(), all.values.end(), [](double value) { return value == 0; }));
  });
}

// 64-byte aligned rows, so that results may be written past the caches, which needs more than 8 MiB of them.
template <class V>
class Aligned {
 public:
  explicit Aligned(std::initializer_list<int64_t> shape) {
    int64_t size = 1, axis = 0;
    for (const int64_t extent : shape) view_.shape[axis++] = extent, size *= extent;
    for (int64_t stride = 1; axis-- > 0; stride *= view_.shape[axis]) view_.stride[axis] = stride;
    memory_.resize(static_cast<size_t>(size) + 64);
    view_.data = reinterpret_cast<bf16*>((reinterpret_cast<uintptr_t>(memory_.data()) + 63) / 64 * 64);
    view_.dtype = DType::kBFloat16;
  }
  const V& view() const { return view_; }
  // Whether the last tokens are those of `other`.
  bool ends_with(const Guarded<bf16>& other) const {
    const bf16* last = static_cast<const bf16*>(view_.data) + view_.shape[0] * view_.stride[0] - other.size();
    for (int64_t i = 0; i < other.size(); ++i) {
      if (to_float(last[i]) != to_float(other[i])) return false;
    }
    return true;
  }

 private:
  std::vector<bf16> memory_;
  V view_;
};

TEST(results_past_the_caches_are_the_same) {
  for_each_implementation([](const Implementation& by) {
    ThreadPool pool(2);
    constexpr int64_t kTokens = 1045, kHidden = 4096 + 64, kLast = 5;  // a last tile that is not full
    Problem<bf16> p(kTokens, kHidden, 11, false);
    Problem<bf16> last = p.part(kTokens - kLast, kLast);
    Aligned<AnyView<3>> result({kTokens, 4, kHidden}), fused({kTokens, 4, kHidden});
    Aligned<AnyView<2>> input({kTokens, kHidden});
    Guarded<bf16> result2({kLast, 4, kHidden}), input2({kLast, kHidden});
    Guarded<float> post({kTokens, 4}), comb({kTokens, 4, 4}), post2({kLast, 4}), comb2({kLast, 4, 4});
    Scratch scratch(mhc_pre_workspace_bytes(kTokens, kHidden, DType::kBFloat16, widest(pool.context())));
    MhcPostParams whole{p.sublayer.any<2>(), p.streams.any<3>(), p.post.const_view<2>(), p.comb.const_view<3>(),
                        result.view()};
    CHECK(by.post(whole, pool.context()).is_ok());
    const MhcPostPreParams both{{last.sublayer.any<2>(), last.streams.any<3>(), last.post.const_view<2>(),
                                 last.comb.const_view<3>(), result2.any<3>()},
                                {result2.any<3>(),
                                 last.mixing(),
                                 {},
                                 1e-6f,
                                 input2.any<2>(),
                                 post2.view<2>(),
                                 comb2.view<3>(),
                                 scratch.workspace()}};
    CHECK(by.post_pre(both, pool.context()).is_ok());
    CHECK(result.ends_with(result2));
    whole.result = fused.view();
    CHECK(by.post_pre({whole,
                       {fused.view(),
                        p.mixing(),
                        {},
                        1e-6f,
                        input.view(),
                        post.view<2>(),
                        comb.view<3>(),
                        scratch.workspace()}},
                      pool.context())
              .is_ok());
    CHECK(fused.ends_with(result2) && input.ends_with(input2) && scratch.intact());
    CHECK(memcmp(&post[(kTokens - kLast) * 4], post2.data(), kLast * 4 * sizeof(float)) == 0);
    CHECK(memcmp(&comb[(kTokens - kLast) * 16], comb2.data(), kLast * 16 * sizeof(float)) == 0);
  });
}

TEST(gradients_past_the_caches_are_the_same) {
  for_each_implementation([](const Implementation& by) {
    ThreadPool pool(2);
    constexpr int64_t kTokens = 1045, kHidden = 1024 + 64, kLast = 5;
    Problem<bf16> p(kTokens, kHidden, 12, false);
    Problem<bf16> last = p.part(kTokens - kLast, kLast);
    Aligned<AnyView<3>> streams({kTokens, 4, kHidden});
    Aligned<AnyView<2>> sublayer({kTokens, kHidden});
    Guarded<bf16> streams2({kLast, 4, kHidden}), sublayer2({kLast, kHidden});
    Guarded<float> post({kTokens, 4}), comb({kTokens, 4, 4}), fn({24, 4 * kHidden}), scale({3}), base({24});
    const auto run_post = [&](Problem<bf16>& q, const AnyView<2>& to_sublayer, const AnyView<3>& to_streams) {
      View<float, 2> to_post = post.view<2>();
      View<float, 3> to_comb = comb.view<3>();
      to_post.shape[0] = to_comb.shape[0] = q.tokens;
      return by.post_backward({q.grad.any<3>(), q.sublayer.any<2>(), q.streams.any<3>(), q.post.const_view<2>(),
                               q.comb.const_view<3>(), to_sublayer, to_streams, to_post, to_comb},
                              pool.context());
    };
    CHECK(run_post(p, sublayer.view(), streams.view()).is_ok());
    CHECK(run_post(last, sublayer2.any<2>(), streams2.any<3>()).is_ok());
    CHECK(streams.ends_with(streams2) && sublayer.ends_with(sublayer2));
    Scratch scratch(mhc_pre_backward_workspace_bytes(kTokens, kHidden, DType::kBFloat16, widest(pool.context())));
    const auto run_pre = [&](Problem<bf16>& q, const AnyView<3>& to_streams) {
      return by.pre_backward({q.sublayer.any<2>(),
                              q.grad_post.const_view<2>(),
                              q.grad_comb.const_view<3>(),
                              q.grad.any<3>(),
                              q.streams.any<3>(),
                              q.mixing(),
                              {},
                              1e-6f,
                              to_streams,
                              fn.view<2>(),
                              scale.view<1>(),
                              base.view<1>(),
                              {},
                              scratch.workspace()},
                             pool.context());
    };
    CHECK(run_pre(p, streams.view()).is_ok());
    CHECK(run_pre(last, streams2.any<3>()).is_ok());
    CHECK(streams.ends_with(streams2));
  });
}

std::string message(const Status& status) { return status.is_ok() ? "accepted" : status.message(); }

TEST(validation_names_what_is_wrong) {
  ThreadPool pool(1);
  const Context context = pool.context();
  Problem<bf16> p(9, 8, 1, false);
  Guarded<bf16> result({9, 4, 8}), input({9, 8});
  Guarded<float> post({9, 4}), comb({9, 4, 4});
  const MhcPostParams good{p.sublayer.any<2>(), p.streams.any<3>(), p.post.const_view<2>(), p.comb.const_view<3>(),
                           result.any<3>()};
  CHECK(message(mhc_post(good, context)) == "accepted");
  const auto post_message = [&](const std::function<void(MhcPostParams&)>& change) {
    MhcPostParams bad = good;
    change(bad);
    return message(mhc_post(bad, context));
  };
  CHECK(post_message([](auto& q) { q.post.shape[0] = 8; }) ==
        "mhc_post: post must be float32 [9, 4], got float32 [8, 4]");
  CHECK(post_message([](auto& q) { q.sublayer.dtype = DType::kFloat32; }) ==
        "mhc_post: sublayer must be bfloat16 [9, 8], got float32 [9, 8]");
  CHECK(post_message([](auto& q) { q.streams.dtype = DType::kInt32; }) ==
        "mhc_post: streams must be bfloat16 or float32, got int32");
  CHECK(post_message([](auto& q) { q.comb.data = nullptr; }) == "mhc_post: comb must not be null");
  CHECK(post_message([](auto& q) { q.result.stride[2] = 2; }) ==
        "mhc_post: result must be contiguous in its last 1 axes");
  CHECK(post_message([](auto& q) { q.streams.stride[0] = INT64_MAX / 4; }) ==
        "mhc_post: streams has strides that are negative or too large");
  CHECK(post_message([](auto& q) { q.streams.shape[2] = 0; }) == "mhc_post: hidden must be at least 1, got 0");
  CHECK(post_message([](auto& q) { q.result.data = static_cast<char*>(q.result.data) + 1; }) ==
        "mhc_post: result must be aligned to its elements");

  Scratch scratch(mhc_pre_workspace_bytes(9, 8, DType::kBFloat16, context));
  const MhcPreParams pre{p.streams.any<3>(), p.mixing(),         {}, 1e-6f, input.any<2>(), post.view<2>(),
                         comb.view<3>(),     scratch.workspace()};
  CHECK(message(mhc_pre(pre, context)) == "accepted");
  const auto pre_message = [&](const std::function<void(MhcPreParams&)>& change) {
    MhcPreParams bad = pre;
    change(bad);
    return message(mhc_pre(bad, context));
  };
  CHECK(pre_message([](auto& q) { q.mixing.sinkhorn_iterations = 0; }) ==
        "mhc_pre: sinkhorn_iterations must be from 1 to 1048576, got 0");
  CHECK(pre_message([](auto& q) { q.mixing.hc_eps = -1; }) ==
        "mhc_pre: hc_eps must be finite and not negative, got -1");
  CHECK(pre_message([](auto& q) { q.mixing.fn.shape[1] = 31; }) ==
        "mhc_pre: fn must be float32 [24, 32], got float32 [24, 31]");
  if (scratch.workspace().bytes > 0) {
    CHECK(pre_message([](auto& q) { q.workspace.bytes -= 1; }).find("mhc_pre: workspace must have ") == 0);
    CHECK(pre_message([](auto& q) { q.workspace.data = static_cast<char*>(q.workspace.data) + 1; }) ==
          "mhc_pre: workspace must be 64-byte aligned, not null");
  }
  MhcPostPreParams both{good, pre};
  CHECK(message(mhc_post_pre(both, context)) == "mhc_post_pre: the streams of pre must be the result of post");
}

}  // namespace
