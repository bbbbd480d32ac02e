// sparse_attention_backward without torch: the scalar kernel against sums in double precision, the others against it,
// NaN in all memory that is no key, guard bands, one result for any number of threads, the validation messages.
#include <algorithm>
#include <cmath>
#include <utility>

#include "common/hardware.h"
#include "common/thread_pool.h"
#include "cpu/attention.h"
#include "native/check.h"

#if defined(DSV4_WITH_AVX512)
namespace dsv4::amx_model {
int64_t sparse_attention_backward_workspace_bytes(const SparseAttentionBackwardParams&, const Context&);
Status sparse_attention_backward(const SparseAttentionBackwardParams&, const Context&);
}  // namespace dsv4::amx_model
#endif

namespace {

using namespace dsv4;
using testing::Guarded;
using testing::Random;

struct Implementation {
  const char* name;
  Isa needs;
  bool narrow;  // bfloat16 alone
  int64_t (*workspace)(const SparseAttentionBackwardParams&, const Context&);
  Status (*run)(const SparseAttentionBackwardParams&, const Context&);
};

const Implementation kScalar = {"scalar", Isa::kScalar, false, scalar::sparse_attention_backward_workspace_bytes,
                                scalar::sparse_attention_backward};
const Implementation kAll[] = {
#if defined(DSV4_WITH_AVX2)
    {"avx2", Isa::kAvx2, false, avx2::sparse_attention_backward_workspace_bytes, avx2::sparse_attention_backward},
#endif
#if defined(DSV4_WITH_AVX512)
    {"avx512", Isa::kAvx512, false, avx512::sparse_attention_backward_workspace_bytes,
     avx512::sparse_attention_backward},
    {"amx_model", Isa::kAvx512, true, amx_model::sparse_attention_backward_workspace_bytes,
     amx_model::sparse_attention_backward},
#endif
#if defined(DSV4_WITH_AMX)
    {"amx", Isa::kAmx, true, amx::sparse_attention_backward_workspace_bytes, amx::sparse_attention_backward},
#endif
    kScalar};

struct Shape {
  int64_t rows, heads, dim, rope;
  int64_t window, entries, selected;  // selected 0: all entries
  int64_t page;
};

// Rows, heads, dims and keys beside the multiples of blocks, groups and tiles.
const Shape kShapes[] = {
    {3, 3, 32, 0, 5, 0, 0, 4},        {40, 2, 64, 16, 9, 20, 6, 3},   {35, 9, 96, 32, 40, 33, 0, 7},
    {5, 17, 128, 64, 100, 61, 0, 9},  {3, 4, 160, 160, 129, 0, 0, 8}, {2, 64, 512, 64, 128, 600, 250, 64},
    {2, 33, 32, 16, 70, 1100, 0, 16}, {3, 2, 544, 32, 6, 9, 0, 4},
};

struct Target {
  bool entry;  // of the compressed pool
  int64_t at;
};

// One call; X is the type of query, pools and their gradients. Row r stands at the first position plus r.
template <class X>
struct Case {
  Shape s;
  int64_t first, window_pages, entry_pages;
  Random random;
  Guarded<X> query, out, raw, compressed;
  Guarded<int32_t> raw_table, table, sequence, position, indices, lengths;
  Guarded<float> sink, rope, lse, grad_lse, grad_sink;
  Guarded<X> grad_out, grad_query, grad_raw, grad_compressed;
  SparseAttentionBackwardParams p{};

  Case(const Shape& shape, uint64_t seed)
      : s(shape),
        first(shape.window - 2),  // the first row sees less than its window
        window_pages((first + shape.rows) / shape.page + 2),
        entry_pages(shape.entries / shape.page + 2),
        random(seed),
        query({shape.rows, shape.heads, shape.dim}),
        out({shape.rows, shape.heads, shape.dim}),
        raw({window_pages, shape.page, shape.dim}),
        compressed({entry_pages, shape.page, shape.dim}),
        raw_table({1, window_pages - 1}),
        table({1, entry_pages - 1}),
        sequence({shape.rows}),
        position({shape.rows}),
        indices({shape.rows, shape.selected}),
        lengths({shape.rows}),
        sink({shape.heads}),
        rope({shape.rows, shape.rope / 2, 2}),
        lse({shape.rows, shape.heads}),
        grad_lse({shape.rows, shape.heads}),
        grad_sink({shape.heads}),
        grad_out({shape.rows, shape.heads, shape.dim}),
        grad_query({shape.rows, shape.heads, shape.dim}),
        grad_raw({window_pages, shape.page, shape.dim}),
        grad_compressed({entry_pages, shape.page, shape.dim}) {
    query.fill(random, -2, 2);
    grad_out.fill(random, -1, 1);
    sink.fill(random, -1, 1);
    rope.fill(random, -1, 1);
    grad_lse.fill(random, -1, 1);
    for (int64_t i = 0; i < raw_table.size(); ++i) raw_table[i] = static_cast<int32_t>(raw_table.size() - i);
    for (int64_t i = 0; i < table.size(); ++i) table[i] = static_cast<int32_t>(table.size() - i);
    for (int64_t row = 0; row < s.rows; ++row) choose_keys(row);
    fill_parameters();
  }

  // Odd rows see all entries but one; of the indices every third is none, and the first two are the same.
  void choose_keys(int64_t row) {
    sequence[row] = 0;
    position[row] = static_cast<int32_t>(first + row);
    lengths[row] = static_cast<int32_t>(s.entries - row % 2);
    for (int64_t i = 0; i < s.selected; ++i) {
      const int64_t entry = i < 2 ? row % (s.entries - 1) : (i * 7 + row) % s.entries;
      indices[row * s.selected + i] = static_cast<int32_t>(i % 3 == 2 ? (i % 2 == 0 ? -1 : s.entries + 5) : entry);
    }
    for (const Target& key : keys(row)) {
      X* values = (key.entry ? compressed : raw).data() + place(key);
      if (to_float(values[0]) == to_float(values[0])) continue;
      for (int64_t d = 0; d < s.dim; ++d) values[d] = from_float<X>(random.uniform(-1, 1));
    }
  }

  std::vector<Target> keys(int64_t row) const {
    std::vector<Target> found;
    const int64_t end = first + row + 1;
    for (int64_t at = std::max<int64_t>(end - s.window, 0); at < end; ++at) found.push_back({false, at});
    for (int64_t i = 0; i < (s.selected > 0 ? s.selected : s.entries); ++i) {
      const int64_t entry = s.selected > 0 ? indices[row * s.selected + i] : i;
      if (entry >= 0 && entry < lengths[row]) found.push_back({true, entry});
    }
    return found;
  }

  int64_t place(const Target& key) const {
    const int64_t page = (key.entry ? table : raw_table)[key.at / s.page];
    return (page * s.page + key.at % s.page) * s.dim;
  }

  void fill_parameters() {
    SparseAttentionParams& f = p.forward;
    f.query = query.template any<3>();
    f.window_pool = {raw.template any<3>(), {}, raw_table.any<2>(), s.page};
    if (s.entries > 0) f.compressed = {compressed.template any<3>(), {}, table.any<2>(), s.page};
    f.sequence = sequence.any<1>();
    f.position = position.any<1>();
    if (s.selected > 0) f.indices = indices.any<2>();
    if (s.entries > 0) f.lengths = lengths.any<1>();
    f.sink = sink.template any<1>();
    if (s.rope > 0) f.rope = rope.template any<3>();
    f.rope_dim = s.rope;
    f.window = s.window;
    f.scale = 1.0f / std::sqrt(static_cast<float>(s.dim));
    f.out = out.template any<3>();
    f.lse = lse.template any<2>();
    p.grad_out = grad_out.template any<3>();
    p.grad_lse = grad_lse.template any<2>();
    p.grad_query = grad_query.template any<3>();
    p.grad_window = grad_raw.template any<3>();
    if (s.entries > 0) p.grad_compressed = grad_compressed.template any<3>();
    p.grad_sink = grad_sink.template any<1>();
  }

  // lse comes from the scalar forward kernel.
  bool run(const Implementation& implementation, const Context& context) {
    SparseAttentionParams f = p.forward;
    testing::Scratch forward(scalar::sparse_attention_workspace_bytes(f, context));
    f.workspace = forward.workspace();
    if (!CHECK(scalar::sparse_attention(f, context).is_ok())) return false;
    testing::Scratch scratch(implementation.workspace(p, context));
    p.workspace = scratch.workspace();
    const bool done = CHECK(implementation.run(p, context).is_ok());
    return CHECK(scratch.intact()) && done;
  }

  bool intact() const {
    return query.intact() && raw.intact() && compressed.intact() && grad_query.intact() && grad_raw.intact() &&
           grad_compressed.intact() && grad_sink.intact() && lse.intact();
  }
  bool same_gradients(const Case& other) const {
    return grad_query.same_bits(other.grad_query) && grad_raw.same_bits(other.grad_raw) &&
           grad_compressed.same_bits(other.grad_compressed) && grad_sink.same_bits(other.grad_sink);
  }
};

// The gradients in double precision, lse included.
struct Exact {
  std::vector<double> query, raw, compressed, sink;

  explicit Exact(const Case<float>& c)
      : query(static_cast<size_t>(c.query.size())),
        raw(static_cast<size_t>(c.raw.size())),
        compressed(static_cast<size_t>(c.compressed.size())),
        sink(static_cast<size_t>(c.s.heads)) {
    for (int64_t row = 0; row < c.s.rows; ++row) {
      for (int64_t head = 0; head < c.s.heads; ++head) add(c, row, head);
    }
  }

  static std::vector<double> turned(const Case<float>& c, int64_t row, int64_t head) {
    const float* from = c.grad_out.data() + (row * c.s.heads + head) * c.s.dim;
    std::vector<double> grad(from, from + c.s.dim);
    for (int64_t i = 0; i < c.s.rope / 2; ++i) {
      double *pair = grad.data() + c.s.dim - c.s.rope + 2 * i, even = pair[0], odd = pair[1];
      const double cos = c.rope[(row * c.s.rope / 2 + i) * 2], sin = c.rope[(row * c.s.rope / 2 + i) * 2 + 1];
      pair[0] = even * cos - odd * sin;
      pair[1] = odd * cos + even * sin;
    }
    return grad;
  }

  void add(const Case<float>& c, int64_t row, int64_t head) {
    const std::vector<Target> keys = c.keys(row);
    const std::vector<double> grad = turned(c, row, head);
    const int64_t at = row * c.s.heads + head;
    const float* q = c.query.data() + at * c.s.dim;
    std::vector<double> p, reach;
    double total = 0, mean = 0;
    for (const Target& key : keys) {
      const float* values = (key.entry ? c.compressed : c.raw).data() + c.place(key);
      double score = 0, product = 0;
      for (int64_t d = 0; d < c.s.dim; ++d) {
        score += static_cast<double>(q[d]) * values[d];
        product += grad[static_cast<size_t>(d)] * values[d];
      }
      p.push_back(std::exp(score * c.p.forward.scale));
      reach.push_back(product);
      total += p.back();
    }
    for (size_t j = 0; j < keys.size(); ++j) mean += p[j] / total * reach[j];
    const double kept = total / (total + std::exp(static_cast<double>(c.sink[head])));
    sink[static_cast<size_t>(head)] -= kept * mean * (1 - kept);
    for (size_t j = 0; j < keys.size(); ++j) {
      const double weight = p[j] / total;
      const double slope = weight * (kept * (reach[j] - kept * mean) + c.grad_lse[at]) * c.p.forward.scale;
      const size_t place = static_cast<size_t>(c.place(keys[j]));
      const float* values = (keys[j].entry ? c.compressed : c.raw).data() + place;
      double* to = (keys[j].entry ? compressed : raw).data() + place;
      for (int64_t d = 0; d < c.s.dim; ++d) {
        query[static_cast<size_t>(at * c.s.dim + d)] += slope * values[d];
        to[d] += slope * q[d] + weight * kept * grad[static_cast<size_t>(d)];
      }
    }
  }
};

double largest(const std::vector<double>& x) {
  double most = 0;
  for (const double value : x) most = std::max(most, std::fabs(value));
  return most;
}

template <class X>
void check_close(const char* what, const Guarded<X>& actual, const std::vector<double>& expected, double close) {
  const double limit = close * std::max(largest(expected), 1e-3);
  for (int64_t i = 0; i < actual.size(); ++i) {
    const double a = to_float(actual[i]), e = expected[static_cast<size_t>(i)];
    if (!(std::fabs(a - e) <= limit)) {
      CHECK_MESSAGE(false, std::string(what) + " " + std::to_string(a) + ", expected " + std::to_string(e));
    }
  }
  CHECK(actual.size() > 0);
}

bool present(const Implementation& implementation) {
  if (implementation.needs <= cpu_isa()) return true;
  testing::not_run(implementation.name);
  return false;
}

TEST(float32_equals_double_precision) {
  ThreadPool pool(2);
  for (const Implementation& implementation : kAll) {
    if (implementation.narrow || !present(implementation)) continue;
    for (const Shape& shape : kShapes) {
      Case<float> c(shape, 1);
      if (!c.run(implementation, pool.context())) continue;
      const Exact exact(c);
      check_close("d query", c.grad_query, exact.query, 4e-6);
      check_close("d window row", c.grad_raw, exact.raw, 4e-6);
      if (shape.entries > 0) check_close("d entry", c.grad_compressed, exact.compressed, 4e-6);
      check_close("d sink", c.grad_sink, exact.sink, 4e-6);
      CHECK(c.intact());
    }
  }
}

template <class X>
std::vector<double> values_of(const Guarded<X>& x) {
  std::vector<double> values;
  for (int64_t i = 0; i < x.size(); ++i) values.push_back(to_float(x[i]));
  return values;
}

TEST(bfloat16_implementations_agree) {
  ThreadPool pool(2);
  for (const Implementation& implementation : kAll) {
    if (!present(implementation)) continue;
    for (const Shape& shape : kShapes) {
      Case<bf16> expected(shape, 2), actual(shape, 2);
      if (!expected.run(kScalar, pool.context()) || !actual.run(implementation, pool.context())) continue;
      check_close("d query", actual.grad_query, values_of(expected.grad_query), 0.01);
      check_close("d window row", actual.grad_raw, values_of(expected.grad_raw), 0.01);
      if (shape.entries > 0) check_close("d entry", actual.grad_compressed, values_of(expected.grad_compressed), 0.01);
      check_close("d sink", actual.grad_sink, values_of(expected.grad_sink), 1e-4);
      CHECK(actual.intact());
    }
  }
}

template <class X>
void compare_threads(const Implementation& implementation, const Shape& shape) {
  ThreadPool one(1);
  Case<X> expected(shape, 3);
  if (!expected.run(implementation, one.context())) return;
  for (const int threads : {2, 3, 5}) {
    ThreadPool pool(threads);
    Case<X> actual(shape, 3);
    actual.run(implementation, pool.context());
    CHECK(actual.same_gradients(expected));
  }
}

TEST(threads_do_not_matter) {
  for (const Implementation& implementation : kAll) {
    if (!present(implementation)) continue;
    for (const Shape& shape : kShapes) {
      compare_threads<bf16>(implementation, shape);
      if (!implementation.narrow) compare_threads<float>(implementation, shape);
    }
  }
}

TEST(refuses_what_is_not_valid) {
  Case<bf16> c(kShapes[1], 4);
  ThreadPool pool(1);
  const auto changed = [&](const auto& change) {
    SparseAttentionBackwardParams p = c.p;
    change(p);
    return std::string(sparse_attention_backward(p, pool.context()).message());
  };
  const std::string op = "sparse_attention_backward: ";
  CHECK(changed([](auto&) {}).find(op + "workspace must have ") == 0);
  CHECK(changed([](auto& p) { p.forward.query.dtype = DType::kUInt8; }) ==
        op + "query must be bfloat16 or float32, got uint8");
  CHECK(changed([](auto& p) { p.forward.window = 0; }) == op + "window must be at least 1, got 0");
  CHECK(changed([](auto& p) { p.forward.lse = {}; }) == op + "lse must be float32 [40, 2], got nothing [0, 0]");
  CHECK(changed([](auto& p) { p.grad_out.shape[2] = 32; }) ==
        op + "grad_out must be bfloat16 [40, 2, 64], got bfloat16 [40, 2, 32]");
  CHECK(changed([](auto& p) { p.grad_lse.data = nullptr; }) == op + "grad_lse must not be null");
  CHECK(changed([](auto& p) { p.grad_query.stride[2] = 2; }) ==
        op + "grad_query must be contiguous in its last 1 axes");
  CHECK(changed([](auto& p) { p.grad_window = {}; }).find(op + "grad_window must be bfloat16 [") == 0);
  CHECK(changed([](auto& p) { p.grad_window.stride[1] += 2; }) ==
        op + "grad_window must be contiguous in its last 3 axes");
  CHECK(changed([](auto& p) { p.forward.window_pool.plain.stride[0] += 2; }) ==
        op + "window_pages must be contiguous in its last 3 axes");
  CHECK(changed([](auto& p) {
          p.forward.compressed = {};
          p.forward.indices = {};
          p.forward.lengths = {};
        }) == op + "grad_compressed must not be given: compressed_pages are not plain rows");
  CHECK(changed([](auto& p) { p.grad_sink.shape[0] = 3; }) == op + "grad_sink must be float32 [2], got float32 [3]");
  SparseAttentionBackwardParams broken = c.p;
  broken.forward.query.dtype = DType::kNone;
  CHECK(sparse_attention_backward_workspace_bytes(broken, pool.context()) == 0);
}

}  // namespace
