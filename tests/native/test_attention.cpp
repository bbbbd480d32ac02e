// sparse_attention without torch: every implementation against the scalar one and that against sums in double
// precision, NaN in all memory that is no key, guard bands, one result for any number of threads and any company, the
// validation messages. The AMX kernel runs through a C++ model of the tiles as well.
#include <algorithm>
#include <cmath>
#include <memory>

#include "common/hardware.h"
#include "common/pages.h"
#include "common/thread_pool.h"
#include "cpu/attention.h"
#include "native/check.h"

namespace dsv4::amx_model {
int64_t sparse_attention_workspace_bytes(const SparseAttentionParams&, const Context&);
Status sparse_attention(const SparseAttentionParams&, const Context&);
}  // namespace dsv4::amx_model

namespace {

using namespace dsv4;
using testing::Guarded;
using testing::Random;

struct Implementation {
  const char* name;
  Isa needs;
  bool bf16_only;
  int64_t (*workspace)(const SparseAttentionParams&, const Context&);
  Status (*run)(const SparseAttentionParams&, const Context&);
};

const Implementation kScalar = {"scalar", Isa::kScalar, false, scalar::sparse_attention_workspace_bytes,
                                scalar::sparse_attention};
const Implementation kOthers[] = {
#if defined(DSV4_WITH_AVX2)
    {"avx2", Isa::kAvx2, false, avx2::sparse_attention_workspace_bytes, avx2::sparse_attention},
#endif
#if defined(DSV4_WITH_AVX512)
    {"avx512", Isa::kAvx512, false, avx512::sparse_attention_workspace_bytes, avx512::sparse_attention},
    {"amx_model", Isa::kAvx512, true, amx_model::sparse_attention_workspace_bytes, amx_model::sparse_attention},
#endif
#if defined(DSV4_WITH_AMX)
    {"amx", Isa::kAmx, true, amx::sparse_attention_workspace_bytes, amx::sparse_attention},
#endif
    kScalar};

struct Shape {
  int64_t rows, heads, dim, rope;
  int64_t window, entries, selected;  // selected 0: all entries
  int64_t window_page, page;
  DType pool;  // kUInt8: FP8 rows
};

// A pool of pages in shuffled order whose unwritten rows are NaN; X is bf16 or float.
class Pool {
 public:
  Pool(const Shape& s, int64_t page_size, int64_t entries, Random& random)
      : s_(s),
        page_size_(page_size),
        blocks_(entries / page_size + 1),
        bytes_({blocks_ + 1, s.pool == DType::kUInt8 ? fp8_page_bytes(page_size, s.dim, s.rope)
                                                     : page_size * s.dim * (s.pool == DType::kFloat32 ? 4 : 2)}),
        table_({1, blocks_}) {
    for (int64_t block = 0; block < blocks_; ++block) table_[block] = static_cast<int32_t>(blocks_ - block);
    for (int64_t entry = 0; entry < entries; ++entry) written_.push_back(false);
    (void)random;
  }

  void write(int64_t entry, Random& random) {
    if (written_[static_cast<size_t>(entry)]) return;
    written_[static_cast<size_t>(entry)] = true;
    uint8_t* page = bytes_.data() + table_[entry / page_size_] * bytes_.size() / (blocks_ + 1);
    const int64_t offset = entry % page_size_, codes = s_.dim - s_.rope;
    if (s_.pool == DType::kUInt8) {
      uint8_t* row = page + fp8_row_at(offset, s_.dim, s_.rope);
      for (int64_t d = 0; d < codes; ++d)
        row[d] = static_cast<uint8_t>((random.bits() & 0x80) | (random.bits() % 0x40));
      for (int64_t d = 0; d < s_.rope; ++d) {
        const bf16 value = bf16_from_float(random.uniform(-1, 1));
        std::memcpy(row + codes + 2 * d, &value, 2);
      }
      uint8_t* scales = page + fp8_scales_at(offset, page_size_, s_.dim, s_.rope);
      for (int64_t block = 0; block * kRowBlock < codes; ++block)
        // 128 is one that AVX-512 does not look up.
        scales[block] = static_cast<uint8_t>(random.bits() % 8 == 0 ? 128 : 124 + random.bits() % 4);
      return;
    }
    for (int64_t d = 0; d < s_.dim; ++d) {
      const float value = random.uniform(-1, 1);
      if (s_.pool == DType::kFloat32) {
        std::memcpy(page + 4 * (offset * s_.dim + d), &value, 4);
      } else {
        const bf16 rounded = bf16_from_float(value);
        std::memcpy(page + 2 * (offset * s_.dim + d), &rounded, 2);
      }
    }
  }

  // Makes the first dim of an entry NaN.
  void spoil(int64_t entry) {
    uint8_t* page = bytes_.data() + table_[entry / page_size_] * bytes_.size() / (blocks_ + 1);
    const int64_t offset = entry % page_size_;
    if (s_.pool == DType::kUInt8) {
      page[fp8_row_at(offset, s_.dim, s_.rope)] = 0x7F;
    } else {
      std::memset(page + offset * s_.dim * (s_.pool == DType::kFloat32 ? 4 : 2), 0xFF, 4);
    }
  }
  // Takes an entry's page away.
  void remove(int64_t entry) { table_[entry / page_size_] = -1; }

  double value(int64_t entry, int64_t d) const {
    const uint8_t* page = bytes_.data() + table_[entry / page_size_] * bytes_.size() / (blocks_ + 1);
    const int64_t offset = entry % page_size_, codes = s_.dim - s_.rope;
    float wide;
    bf16 narrow;
    if (s_.pool == DType::kUInt8 && d < codes) {
      const uint8_t* scales = page + fp8_scales_at(offset, page_size_, s_.dim, s_.rope);
      return static_cast<double>(e4m3_value(page[fp8_row_at(offset, s_.dim, s_.rope) + d])) *
             e8m0_value(scales[d / kRowBlock]);
    }
    if (s_.pool == DType::kFloat32) {
      std::memcpy(&wide, page + 4 * (offset * s_.dim + d), 4);
      return wide;
    }
    const int64_t at = s_.pool == DType::kUInt8 ? fp8_row_at(offset, s_.dim, s_.rope) + codes + 2 * (d - codes)
                                                : 2 * (offset * s_.dim + d);
    std::memcpy(&narrow, page + at, 2);
    return to_float(narrow);
  }

  RowPool pool() {
    RowPool result{};
    result.page_size = page_size_;
    result.table = table_.any<2>();
    if (s_.pool == DType::kUInt8) {
      result.bytes = bytes_.any<2>();
      return result;
    }
    result.plain = dense<AnyView<3>>(bytes_.data(), {blocks_ + 1, page_size_, s_.dim});
    result.plain.dtype = s_.pool;
    return result;
  }

  bool intact() const { return bytes_.intact() && table_.intact(); }

 private:
  Shape s_;
  int64_t page_size_, blocks_;
  Guarded<uint8_t> bytes_;
  Guarded<int32_t> table_;
  std::vector<bool> written_;
};

// One call; X is the type of query and out. Row r stands at the first position plus r.
template <class X>
struct Case {
  static constexpr DType kType = sizeof(X) == 2 ? DType::kBFloat16 : DType::kFloat32;

  Shape s;
  int64_t first;
  Random random;
  Pool window, entries;
  Guarded<X> query, out;
  Guarded<int32_t> sequence, position, indices, lengths;
  Guarded<float> sink, rope, lse;
  SparseAttentionParams p{};

  Case(const Shape& shape, uint64_t seed)
      : s(shape),
        first(shape.window + 3),
        random(seed),
        window(shape, shape.window_page, first + shape.rows, random),
        entries(shape, shape.page, shape.entries + 1, random),
        query({shape.rows, shape.heads, shape.dim}),
        out({shape.rows, shape.heads, shape.dim}),
        sequence({shape.rows}),
        position({shape.rows}),
        indices({shape.rows, shape.selected}),
        lengths({shape.rows}),
        sink({shape.heads}),
        rope({shape.rows, shape.rope / 2, 2}),
        lse({shape.rows, shape.heads}) {
    query.fill(random, -2, 2);
    sink.fill(random, -1, 1);
    rope.fill(random, -1, 1);
    for (int64_t row = 0; row < s.rows; ++row) choose_keys(row);
    p.query = query.template any<3>();
    p.window_pool = window.pool();
    if (s.entries > 0) p.compressed = entries.pool();
    p.sequence = sequence.any<1>();
    p.position = position.any<1>();
    if (s.selected > 0) p.indices = indices.any<2>();
    if (s.entries > 0) p.lengths = lengths.any<1>();
    p.sink = sink.template any<1>();
    if (s.rope > 0) p.rope = rope.template any<3>();
    p.rope_dim = s.rope;
    p.window = s.window;
    p.scale = 1.0f / std::sqrt(static_cast<float>(s.dim));
    p.out = out.template any<3>();
    p.lse = lse.template any<2>();
  }

  // Odd rows see all entries but one; of the indices every third is none.
  void choose_keys(int64_t row) {
    sequence[row] = 0;
    position[row] = static_cast<int32_t>(first + row);
    lengths[row] = static_cast<int32_t>(s.entries - row % 2);
    for (int64_t at = first + row - s.window + 1; at <= first + row; ++at) window.write(at, random);
    for (int64_t i = 0; i < s.selected; ++i) {
      const int64_t entry = i * s.entries / s.selected;
      indices[row * s.selected + i] = static_cast<int32_t>(i % 3 == 2 ? (i % 2 == 0 ? -1 : s.entries + 5) : entry);
    }
    for (const int64_t entry : keys(row)) entries.write(entry, random);
  }

  std::vector<int64_t> keys(int64_t row) const {
    std::vector<int64_t> found;
    const int64_t count = s.selected > 0 ? s.selected : s.entries;
    for (int64_t i = 0; i < count; ++i) {
      const int64_t entry = s.selected > 0 ? indices[row * s.selected + i] : i;
      if (entry >= 0 && entry < lengths[row]) found.push_back(entry);
    }
    return found;
  }

  bool run(const Implementation& implementation, const Context& context) { return run(implementation, context, p); }

  static bool run(const Implementation& implementation, const Context& context, SparseAttentionParams params) {
    testing::Scratch scratch(implementation.workspace(params, context));
    params.workspace = scratch.workspace();
    const bool done = CHECK(implementation.run(params, context).is_ok());
    return CHECK(scratch.intact()) && done;
  }

  bool intact() const {
    return out.intact() && lse.intact() && query.intact() && indices.intact() && window.intact() && entries.intact();
  }
};

std::vector<double> exact_out(const Case<float>& c, int64_t row, int64_t head, double* lse) {
  std::vector<std::pair<const Pool*, int64_t>> keys;
  for (int64_t at = c.first + row - c.s.window + 1; at <= c.first + row; ++at) keys.push_back({&c.window, at});
  for (const int64_t entry : c.keys(row)) keys.push_back({&c.entries, entry});
  std::vector<double> scores, sums(static_cast<size_t>(c.s.dim), 0.0);
  double most = -1e300, total = 0;
  for (const auto& [pool, entry] : keys) {
    double score = 0;
    for (int64_t d = 0; d < c.s.dim; ++d)
      score += c.query[(row * c.s.heads + head) * c.s.dim + d] * pool->value(entry, d);
    scores.push_back(score * c.p.scale);
    most = std::max(most, scores.back());
  }
  for (size_t j = 0; j < keys.size(); ++j) {
    const double numerator = std::exp(scores[j] - most);
    total += numerator;
    for (int64_t d = 0; d < c.s.dim; ++d)
      sums[static_cast<size_t>(d)] += numerator * keys[j].first->value(keys[j].second, d);
  }
  *lse = most + std::log(total);
  for (double& sum : sums) sum /= total + std::exp(c.sink[head] - most);
  for (int64_t i = 0; i < c.s.rope / 2; ++i) {
    double *pair = sums.data() + c.s.dim - c.s.rope + 2 * i, even = pair[0], odd = pair[1];
    const double cos = c.rope[(row * c.s.rope / 2 + i) * 2], sin = c.rope[(row * c.s.rope / 2 + i) * 2 + 1];
    pair[0] = even * cos + odd * sin;
    pair[1] = odd * cos - even * sin;
  }
  return sums;
}

const Shape kShapes[] = {
    {3, 3, 32, 0, 5, 0, 0, 4, 4, DType::kBFloat16},      {4, 2, 64, 16, 9, 20, 6, 16, 3, DType::kUInt8},
    {2, 17, 96, 32, 40, 33, 0, 7, 5, DType::kUInt8},     {3, 33, 128, 64, 128, 200, 96, 256, 64, DType::kUInt8},
    {2, 5, 160, 32, 12, 700, 0, 8, 2, DType::kBFloat16}, {1, 64, 512, 64, 128, 600, 520, 256, 64, DType::kUInt8},
    {2, 8, 128, 64, 20, 1200, 0, 256, 2, DType::kUInt8}, {3, 16, 64, 64, 10, 40, 0, 16, 16, DType::kBFloat16},
    {2, 48, 32, 8, 513, 0, 0, 100, 4, DType::kBFloat16}, {2, 9, 64, 16, 33, 1025, 900, 16, 7, DType::kFloat32},
    {3, 4, 96, 0, 17, 31, 31, 16, 4, DType::kFloat32},   {2, 3, 512, 64, 24, 1001, 0, 256, 64, DType::kUInt8},
};

bool takes(const Implementation& implementation, const Shape& s, bool bf16_query) {
  return !implementation.bf16_only || (bf16_query && s.pool != DType::kFloat32);
}

bool present(const Implementation& implementation) {
  if (implementation.needs <= cpu_isa()) return true;
  testing::not_run(implementation.name);
  return false;
}

TEST(scalar_equals_double_precision) {
  ThreadPool pool(2);
  for (const Shape& shape : kShapes) {
    if (shape.rope == shape.dim && shape.pool == DType::kUInt8) continue;
    Case<float> c(shape, 1);
    if (!c.run(kScalar, pool.context())) continue;
    for (int64_t row = 0; row < shape.rows; ++row) {
      for (const int64_t head : {int64_t{0}, shape.heads - 1}) {
        double lse = 0;
        const std::vector<double> expected = exact_out(c, row, head, &lse);
        CHECK(std::fabs(c.lse[row * shape.heads + head] - lse) < 2e-6);
        for (int64_t d = 0; d < shape.dim; ++d) {
          CHECK(std::fabs(c.out[(row * shape.heads + head) * shape.dim + d] - expected[static_cast<size_t>(d)]) < 2e-6);
        }
      }
    }
    CHECK(c.intact());
  }
}

template <class X>
void compare_with_scalar(const Implementation& implementation, const Shape& shape, const Context& context) {
  Case<X> expected(shape, 2), actual(shape, 2);
  if (!expected.run(kScalar, context) || !actual.run(implementation, context)) return;
  // In bfloat16 a sum near the middle of two numbers may go to either, and then be rotated; few do.
  const double close = sizeof(X) == 2 ? 1.0 / 128 : 1e-5, least = sizeof(X) == 2 ? 2e-3 : 1e-6;
  int64_t different = 0;
  for (int64_t i = 0; i < actual.out.size(); ++i) {
    const double a = to_float(actual.out[i]), e = to_float(expected.out[i]);
    if (!(std::fabs(a - e) <= close * std::fabs(e) + least)) {
      CHECK_MESSAGE(
          false, std::string(implementation.name) + ": out " + std::to_string(a) + ", expected " + std::to_string(e));
    }
    different += a != e;
  }
  CHECK(sizeof(X) == 4 || different * 100 <= actual.out.size());
  for (int64_t i = 0; i < actual.lse.size(); ++i) CHECK(std::fabs(actual.lse[i] - expected.lse[i]) < 3e-6);
  CHECK(actual.intact());
}

TEST(implementations_agree) {
  ThreadPool pool(2);
  for (const Implementation& implementation : kOthers) {
    if (!present(implementation)) continue;
    for (const Shape& shape : kShapes) {
      if (takes(implementation, shape, true)) compare_with_scalar<bf16>(implementation, shape, pool.context());
      if (takes(implementation, shape, false)) compare_with_scalar<float>(implementation, shape, pool.context());
    }
  }
}

template <class X>
SparseAttentionParams one_row(Case<X>& c, int64_t row) {
  SparseAttentionParams p = c.p;
  const auto cut = [&](auto& view) {
    if (!view.given()) return;
    const int64_t bytes = view.dtype == DType::kBFloat16 ? 2 : 4;
    view.data = static_cast<char*>(view.data) + row * view.stride[0] * bytes;
    view.shape[0] = 1;
  };
  cut(p.query);
  cut(p.sequence);
  cut(p.position);
  cut(p.indices);
  cut(p.lengths);
  cut(p.rope);
  cut(p.out);
  cut(p.lse);
  return p;
}

TEST(threads_and_company_do_not_matter) {
  ThreadPool one(1);
  for (const Implementation& implementation : kOthers) {
    if (!present(implementation)) continue;
    for (const Shape& shape : kShapes) {
      if (!takes(implementation, shape, true)) continue;
      Case<bf16> expected(shape, 3);
      if (!expected.run(implementation, one.context())) continue;
      for (const int threads : {1, 2, 5}) {
        ThreadPool pool(threads);
        Case<bf16> whole(shape, 3), alone(shape, 3);
        whole.run(implementation, pool.context());
        CHECK(whole.out.same_bits(expected.out) && whole.lse.same_bits(expected.lse));
        for (int64_t row = 0; row < shape.rows; ++row) {
          Case<bf16>::run(implementation, pool.context(), one_row(alone, row));
        }
        CHECK(alone.out.same_bits(expected.out) && alone.lse.same_bits(expected.lse));
      }
    }
  }
}

// Neighbouring rows that read the same keys, but for their windows: enough of them to begin and end anywhere among
// those that a kernel takes together. Lists of keys that are kept decoded, and longer ones.
const Shape kNeighbours[] = {
    {75, 3, 32, 0, 5, 0, 0, 4, 4, DType::kBFloat16},
    {70, 17, 64, 16, 33, 70, 0, 7, 5, DType::kUInt8},
    {40, 4, 128, 64, 128, 600, 0, 256, 2, DType::kUInt8},
    {37, 33, 96, 32, 225, 40, 0, 16, 16, DType::kUInt8},
    {37, 2, 96, 32, 226, 40, 0, 16, 16, DType::kUInt8},
    {12, 2, 512, 64, 128, 1101, 0, 256, 64, DType::kUInt8},
    {10, 5, 512, 64, 17, 1600, 0, 16, 32, DType::kFloat32},
    {9, 3, 544, 64, 20, 300, 0, 16, 32, DType::kUInt8},
    {70, 5, 64, 16, 40, 70, 33, 7, 5, DType::kUInt8},
    {40, 18, 128, 64, 128, 600, 400, 256, 2, DType::kUInt8},
    {11, 2, 512, 64, 128, 2000, 1500, 256, 64, DType::kBFloat16},
};

// `change` prepares a case; the rows whose results are then those of one row at a time.
template <class Change>
void compare_company(const Implementation& implementation, const Shape& shape, const Change& change) {
  const auto make = [&] {
    auto c = std::make_unique<Case<bf16>>(shape, 5);
    for (int64_t row = 0; row < shape.rows && shape.entries > 0; ++row) {
      c->lengths[row] = static_cast<int32_t>(shape.entries);
    }
    for (int64_t row = 0; row < shape.rows; ++row) {  // rows with fewer indices
      for (int64_t i = 0; i < row * row % 97 && i < shape.selected; ++i) c->indices[row * shape.selected + i] = -1;
    }
    change(*c);
    return c;
  };
  ThreadPool one(1);
  const auto alone = make();
  for (int64_t row = 0; row < shape.rows; ++row) Case<bf16>::run(implementation, one.context(), one_row(*alone, row));
  for (const int threads : {1, 2}) {
    ThreadPool pool(threads);
    const auto whole = make();
    whole->run(implementation, pool.context());
    CHECK(whole->out.same_bits(alone->out) && whole->lse.same_bits(alone->lse));
  }
}

TEST(neighbours_do_not_matter) {
  for (const Implementation& implementation : kOthers) {
    if (!present(implementation)) continue;
    for (const Shape& shape : kNeighbours) {
      if (!takes(implementation, shape, true)) continue;
      compare_company(implementation, shape, [](Case<bf16>&) {});
      compare_company(implementation, shape, [&](Case<bf16>& c) { c.window.spoil(c.first + shape.rows - 1); });
      compare_company(implementation, shape, [&](Case<bf16>& c) { c.window.spoil(c.first + shape.rows / 2); });
      compare_company(implementation, shape, [&](Case<bf16>& c) { c.window.remove(c.first + shape.rows / 2); });
      compare_company(implementation, shape, [&](Case<bf16>& c) {
        for (int64_t at = 0; at < c.first + shape.rows / 2; ++at) c.window.remove(at);
        if (shape.entries > 0) c.entries.remove(shape.entries / 3);
      });
      compare_company(implementation, shape, [&](Case<bf16>& c) {  // other positions, in another order
        for (int64_t row = 0; row < shape.rows; ++row) c.position[row] -= static_cast<int32_t>(row % 3 * (row / 2));
      });
    }
  }
}

std::string message(const SparseAttentionParams& p) {
  ThreadPool pool(1);
  return sparse_attention(p, pool.context()).message();
}

TEST(refuses_what_is_not_valid) {
  Case<bf16> c(kShapes[1], 4);
  const auto changed = [&](const auto& change) {
    SparseAttentionParams p = c.p;
    change(p);
    return message(p);
  };
  CHECK(message(c.p).find("sparse_attention: workspace must have ") == 0);
  CHECK(changed([](auto& p) { p.query.dtype = DType::kUInt8; }) ==
        "sparse_attention: query must be bfloat16 or float32, got uint8");
  CHECK(changed([](auto& p) { p.window = 0; }) == "sparse_attention: window must be at least 1, got 0");
  CHECK(changed([](auto& p) { p.sink.shape[0] = 5; }) == "sparse_attention: sink must be float32 [2], got float32 [5]");
  CHECK(changed([](auto& p) { p.lengths = {}; }) == "sparse_attention: lengths must be int32 [4], got nothing [0]");
  CHECK(changed([](auto& p) { p.compressed = {}; }) == "sparse_attention: indices and lengths need compressed_pages");
  CHECK(changed([](auto& p) { p.window_pool.page_size = 0; }) ==
        "sparse_attention: the page size of window_pages must be at least 1, got 0");
  CHECK(changed([](auto& p) { p.rope_dim = 64; }) ==
        "sparse_attention: rope_dim must lie in [0, 64) for FP8 rows, got 64");
  CHECK(changed([](auto& p) {
          p.window_pool.bytes.shape[1] -= 1;
        }).find("sparse_attention: window_pages must be uint8 [*, ") == 0);
  CHECK(changed([](auto& p) {
          p.window_pool.table.shape[0] = 0;
        }).find("sparse_attention: compressed_table must be int32 [0, *]") == 0);
  CHECK(changed([](auto& p) { p.out.stride[2] = 2; }).find("sparse_attention: out must be contiguous") == 0);
  CHECK(changed([](auto& p) { p.query.data = nullptr; }) == "sparse_attention: query must not be null");
  c.sequence[1] = 1;
  CHECK(message(c.p) == "sparse_attention: sequence must lie in [0, 1), the rows of the table, got 1");
  SparseAttentionParams broken = c.p;
  broken.query.dtype = DType::kNone;
  ThreadPool pool(1);
  CHECK(sparse_attention_workspace_bytes(broken, pool.context()) == 0);
}

}  // namespace
