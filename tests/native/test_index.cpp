// index_topk without torch: every implementation against sums in double precision, NaN in all memory that is no visible
// key, guard bands, one result for any number of threads and any company, streams of scores in every order, the
// validation messages. The AMX kernel runs through a C++ model of the tiles as well.
#include <algorithm>
#include <cmath>

#include "common/hardware.h"
#include "common/pages.h"
#include "common/thread_pool.h"
#include "cpu/index.h"
#include "native/check.h"
#include "ops/index_keys.h"

namespace dsv4::amx_model {
int64_t index_topk_workspace_bytes(const IndexTopkParams&, const Context&);
Status index_topk(const IndexTopkParams&, const Context&);
}  // namespace dsv4::amx_model

namespace {

using namespace dsv4;
using testing::Guarded;
using testing::Random;

struct Implementation {
  const char* name;
  Isa needs;
  bool bf16_only;
  int64_t (*workspace)(const IndexTopkParams&, const Context&);
  Status (*run)(const IndexTopkParams&, const Context&);
};

const Implementation kImplementations[] = {
    {"scalar", Isa::kScalar, false, scalar::index_topk_workspace_bytes, scalar::index_topk},
#if defined(DSV4_WITH_AVX2)
    {"avx2", Isa::kAvx2, false, avx2::index_topk_workspace_bytes, avx2::index_topk},
#endif
#if defined(DSV4_WITH_AVX512)
    {"avx512", Isa::kAvx512, false, avx512::index_topk_workspace_bytes, avx512::index_topk},
    {"amx_model", Isa::kAvx512, true, amx_model::index_topk_workspace_bytes, amx_model::index_topk},
#endif
#if defined(DSV4_WITH_AMX)
    {"amx", Isa::kAmx, true, amx::index_topk_workspace_bytes, amx::index_topk},
#endif
};

struct Shape {
  int64_t heads, dim, page_size, k;
  IndexKeyFormat format;
  std::vector<std::vector<int64_t>> lengths;  // of each sequence's rows
};

const std::vector<int64_t> kPrefill = {90, 91, 92, 93, 94, 95, 96, 97, 98, 99, 100, 101, 102, 103, 104, 105, 106, 107};

const Shape kShapes[] = {
    {1, 32, 4, 3, IndexKeyFormat::kBFloat16, {{1, 0, 7}, {5}}},
    {3, 64, 5, 8, IndexKeyFormat::kFp4, {{33, 3}, {}, {17, 47, 48}}},
    {17, 96, 16, 20, IndexKeyFormat::kFp8, {{100}, {49, 50}}},
    {16, 128, 64, 32, IndexKeyFormat::kFp4, {kPrefill, {130}}},
    {33, 160, 7, 40, IndexKeyFormat::kFp4, {{65, 64}, kPrefill}},
    {64, 128, 64, 300, IndexKeyFormat::kFp4, {{1000, 1001}}},
    {31, 32, 1, 5, IndexKeyFormat::kFp8, {{16, 15, 17, 31, 33}}},
    {48, 256, 3, 11, IndexKeyFormat::kBFloat16, {{40, 29}}},
    {9, 64, 53, 17, IndexKeyFormat::kFloat32, {{390, 383}, {385}}},
    {4, 64, 64, 512, IndexKeyFormat::kFp4, {{6000, 5000}, {2600}}},
    {64, 128, 64, 70, IndexKeyFormat::kFp8, {{900}, {450, 449}}},
    {60, 128, 8, 33, IndexKeyFormat::kFp4, {{500}, {401, 17}}},
    {150, 128, 32, 50, IndexKeyFormat::kFp4, {{500}, {390, 100}}},
    {8, 64, 16, 30, IndexKeyFormat::kFp8, {{700, 699, 64}}},
    {7, 128, 64, 30, IndexKeyFormat::kBFloat16, {{470, 469, 468}}},
    {4, 128, 64, 512, IndexKeyFormat::kFp4, {{6000, 5000}, {2600}, {5, 64}}},
    {3, 128, 16, 40, IndexKeyFormat::kFp8, {{700, 699, 64}, {385}}},
    {1, 128, 5, 20, IndexKeyFormat::kBFloat16, {{500}, {130, 129}}},
    {2, 128, 3, 20, IndexKeyFormat::kFp4, {{450, 383}, {17}}},
};

constexpr float kFp8Scales[] = {0.5f, 1, 2, -1, 3, 0};
constexpr uint8_t kFp8Codes[] = {0x38, 0x40, 0x3C, 0xB8, 0xBC, 0x00, 0x44, 0xC4};  // 1, 2, 1.5, -1, ...

// One call; X is the type of the query. Numbers whose sums float32 holds exactly, or any (`round` false).
template <class X>
struct Case {
  Shape s;
  bool round;
  int64_t rows = 0, blocks = 1;
  std::vector<int64_t> lengths_of_rows, sequence_of_rows;
  int64_t pages;
  Random random;
  std::vector<double> keys;  // [pages * page_size, dim], NaN where nothing was written
  Guarded<X> query;
  Guarded<float> weights;
  Guarded<uint8_t> bytes;
  Guarded<int32_t> table, sequence, lengths, result;
  IndexTopkParams p{};

  Case(const Shape& shape, uint64_t seed, bool round_ = true)
      : s(shape),
        round(round_),
        pages(measure()),
        random(seed),
        keys(static_cast<size_t>(pages * s.page_size * s.dim), NAN),
        query({rows, s.heads, s.dim}),
        weights({rows, s.heads}),
        bytes({pages, page_bytes()}),
        table({sequences(), blocks}),
        sequence({rows}),
        lengths({rows}),
        result({rows, s.k}) {
    for (int64_t i = 0; i < query.size(); ++i) query[i] = from_float<X>(number(2));
    for (int64_t i = 0; i < weights.size(); ++i) weights[i] = number(3);
    for (int64_t i = 0; i < table.size(); ++i) table[i] = static_cast<int32_t>(pages - 1 - i);
    table[table.size() - 1] = -1;
    for (int64_t i = 0; i < sequences(); ++i) {
      int64_t longest = 0;
      for (const int64_t length : s.lengths[static_cast<size_t>(i)]) longest = std::max(longest, length);
      for (int64_t entry = 0; entry < longest; ++entry) write(i, entry);
    }
    for (int64_t row = 0; row < rows; ++row) {
      sequence[row] = static_cast<int32_t>(sequence_of_rows[static_cast<size_t>(row)]);
      lengths[row] = static_cast<int32_t>(lengths_of_rows[static_cast<size_t>(row)]);
    }
    fill_parameters();
  }

  int64_t sequences() const { return static_cast<int64_t>(s.lengths.size()); }

  int64_t measure() {
    for (size_t i = 0; i < s.lengths.size(); ++i) {
      for (const int64_t length : s.lengths[i]) {
        ++rows;
        blocks = std::max(blocks, length / s.page_size + 1);
        lengths_of_rows.push_back(length);
        sequence_of_rows.push_back(static_cast<int64_t>(i));
      }
    }
    return sequences() * blocks + 1;
  }

  int64_t value_bytes() const {
    switch (s.format) {
      case IndexKeyFormat::kFp4:
        return s.dim / 2;
      case IndexKeyFormat::kFp8:
        return s.dim;
      case IndexKeyFormat::kBFloat16:
        return 2 * s.dim;
      default:
        return 4 * s.dim;
    }
  }
  int64_t scale_bytes() const {
    return s.format == IndexKeyFormat::kFp4 ? s.dim / 32 : s.format == IndexKeyFormat::kFp8 ? 4 : 0;
  }
  int64_t page_bytes() const { return s.page_size * (value_bytes() + scale_bytes()); }

  float number(int range) {
    if (!round) return random.uniform(-1, 1);
    return static_cast<float>(static_cast<int>(random.bits() >> 20 & 0xFFFF) % (2 * range + 1) - range);
  }

  void write(int64_t of, int64_t entry) {
    const int64_t page = table[of * blocks + entry / s.page_size], offset = entry % s.page_size;
    if (page < 0) return;
    uint8_t* values = bytes.data() + page * page_bytes() + offset * value_bytes();
    uint8_t* scales = bytes.data() + page * page_bytes() + s.page_size * value_bytes() + offset * scale_bytes();
    double* key = keys.data() + (page * s.page_size + offset) * s.dim;
    const float fp8_scale = round ? kFp8Scales[(random.bits() >> 9) % 6] : random.uniform(-2, 2);
    if (s.format == IndexKeyFormat::kFp8) std::memcpy(scales, &fp8_scale, 4);
    for (int64_t d = 0; d < s.dim; ++d) {
      if (s.format == IndexKeyFormat::kFp4) {
        if (d % 32 == 0) scales[d / 32] = static_cast<uint8_t>(126 + (random.bits() >> 9) % 4);
        if (d % 2 == 0) values[d / 2] = static_cast<uint8_t>(random.bits() >> 24);
        const int code = d % 2 == 0 ? values[d / 2] & 15 : values[d / 2] >> 4;
        key[d] = static_cast<double>(e2m1_value(static_cast<uint8_t>(code))) * e8m0_value(scales[d / 32]);
      } else if (s.format == IndexKeyFormat::kFp8) {
        const auto any = static_cast<uint8_t>(random.bits() >> 24);
        values[d] = round ? kFp8Codes[any % 8] : any % 128 == 127 ? 0 : any;
        key[d] = static_cast<double>(e4m3_value(values[d])) * fp8_scale;
      } else if (s.format == IndexKeyFormat::kBFloat16) {
        const bf16 value = bf16_from_float(number(3));
        std::memcpy(values + 2 * d, &value, 2);
        key[d] = to_float(value);
      } else {
        const float value = number(3);
        std::memcpy(values + 4 * d, &value, 4);
        key[d] = value;
      }
    }
  }

  void fill_parameters() {
    p.query = query.template any<3>();
    p.weights = weights.template const_view<2>();
    if (scale_bytes() > 0) {
      p.bytes = bytes.any<2>();
    } else {
      p.plain = dense<AnyView<3>>(bytes.data(), {pages, s.page_size, s.dim});
      p.plain.dtype = s.format == IndexKeyFormat::kFloat32 ? DType::kFloat32 : DType::kBFloat16;
    }
    p.table = table.any<2>();
    p.sequence = sequence.any<1>();
    p.lengths = lengths.any<1>();
    p.k = s.k;
    p.page_size = s.page_size;
    p.result = result.any<2>();
  }

  static bool run(const Implementation& by, const Context& context, IndexTopkParams params) {
    testing::Scratch scratch(by.workspace(params, context));
    params.workspace = scratch.workspace();
    const bool done = CHECK(by.run(params, context).is_ok());
    return CHECK(scratch.intact()) && done;
  }
  bool run(const Implementation& by, const Context& context) { return run(by, context, p); }

  bool intact() const {
    return query.intact() && weights.intact() && bytes.intact() && table.intact() && sequence.intact() &&
           lengths.intact() && result.intact();
  }

  // (-score, entry) of what the row may take.
  std::vector<std::pair<double, int32_t>> scored(int64_t row) const {
    std::vector<std::pair<double, int32_t>> all;
    for (int64_t entry = 0; entry < lengths[row]; ++entry) {
      const int64_t page = table[sequence[row] * blocks + entry / s.page_size];
      if (page < 0) continue;
      const double* key = keys.data() + (page * s.page_size + entry % s.page_size) * s.dim;
      double score = 0;
      for (int64_t h = 0; h < s.heads; ++h) {
        double product = 0;
        for (int64_t d = 0; d < s.dim; ++d) product += to_float(query[(row * s.heads + h) * s.dim + d]) * key[d];
        score += weights[row * s.heads + h] * std::max(product, 0.0);
      }
      all.push_back({-score, static_cast<int32_t>(entry)});
    }
    return all;
  }

  std::vector<int32_t> best(int64_t row) const {
    auto all = scored(row);
    std::sort(all.begin(), all.end());
    std::vector<int32_t> entries;
    for (size_t i = 0; i < std::min(all.size(), static_cast<size_t>(s.k)); ++i) entries.push_back(all[i].second);
    std::sort(entries.begin(), entries.end());
    entries.resize(static_cast<size_t>(s.k), -1);
    return entries;
  }

  bool equals(int64_t row, const std::vector<int32_t>& entries) const {
    return std::equal(entries.begin(), entries.end(), result.data() + row * s.k);
  }
};

bool present(const Implementation& by) {
  if (by.needs <= cpu_isa()) return true;
  testing::not_run((std::string("this machine has no ") + by.name).c_str());
  return false;
}

template <class X>
bool takes(const Implementation& by, const Shape& s) {
  return !by.bf16_only || (sizeof(X) == 2 && s.format != IndexKeyFormat::kFloat32);
}

template <class X>
void equals_double_precision(const Implementation& by, const Context& context) {
  uint64_t seed = 1;
  for (const Shape& shape : kShapes) {
    if (!takes<X>(by, shape)) continue;
    Case<X> c(shape, ++seed);
    if (!c.run(by, context)) continue;
    for (int64_t row = 0; row < c.rows; ++row) {
      CHECK_MESSAGE(c.equals(row, c.best(row)), std::string(by.name) + ": heads " + std::to_string(shape.heads) +
                                                    " dim " + std::to_string(shape.dim) + " row " +
                                                    std::to_string(row));
    }
    CHECK(c.intact());
  }
}

TEST(equals_double_precision_where_sums_are_exact) {
  ThreadPool pool(2);
  for (const Implementation& by : kImplementations) {
    if (!present(by)) continue;
    equals_double_precision<bf16>(by, pool.context());
    equals_double_precision<float>(by, pool.context());
  }
}

// No entry that was left out may score clearly above one that was taken.
template <class X>
void close_to_double_precision(const Implementation& by, const Context& context) {
  uint64_t seed = 50;
  for (const Shape& shape : kShapes) {
    if (!takes<X>(by, shape)) continue;
    Case<X> c(shape, ++seed, false);
    if (!c.run(by, context)) continue;
    for (int64_t row = 0; row < c.rows; ++row) {
      const int32_t* taken = c.result.data() + row * shape.k;
      double worst = HUGE_VAL, missed = -HUGE_VAL, largest = 1;
      int64_t found = 0;
      for (const auto& [score, entry] : c.scored(row)) {
        const bool in = std::find(taken, taken + shape.k, entry) != taken + shape.k;
        found += in ? 1 : 0;
        largest = std::max(largest, std::fabs(score));
        if (in) {
          worst = std::min(worst, -score);
        } else {
          missed = std::max(missed, -score);
        }
      }
      CHECK(found == shape.k - std::count(taken, taken + shape.k, -1));
      CHECK_MESSAGE(missed - worst <= 2e-6 * largest, std::string(by.name) + ": " + std::to_string(missed - worst));
    }
  }
}

TEST(close_to_double_precision_elsewhere) {
  ThreadPool pool(2);
  for (const Implementation& by : kImplementations) {
    if (!present(by)) continue;
    close_to_double_precision<bf16>(by, pool.context());
    close_to_double_precision<float>(by, pool.context());
  }
}

IndexTopkParams one_row(const IndexTopkParams& p, int64_t row, int64_t query_bytes) {
  IndexTopkParams one = p;
  const auto cut = [&](auto& view, int64_t bytes) {
    view.data = static_cast<char*>(view.data) + row * view.stride[0] * bytes;
    view.shape[0] = 1;
  };
  cut(one.query, query_bytes);
  cut(one.sequence, 4);
  cut(one.lengths, 4);
  cut(one.result, 4);
  one.weights.data += row * one.weights.stride[0];
  one.weights.shape[0] = 1;
  return one;
}

TEST(threads_and_company_do_not_matter) {
  ThreadPool one(1);
  for (const Implementation& by : kImplementations) {
    if (!present(by)) continue;
    for (const Shape& shape : kShapes) {
      if (!takes<bf16>(by, shape)) continue;
      Case<bf16> expected(shape, 3, false);
      if (!expected.run(by, one.context())) continue;
      for (const int threads : {1, 2, 5}) {
        ThreadPool pool(threads);
        Case<bf16> whole(shape, 3, false), alone(shape, 3, false);
        whole.run(by, pool.context());
        CHECK(whole.result.same_bits(expected.result));
        for (int64_t row = 0; row < alone.rows; ++row) {
          Case<bf16>::run(by, pool.context(), one_row(alone.p, row, sizeof(bf16)));
        }
        CHECK(alone.result.same_bits(expected.result));
      }
    }
  }
}

// Any stream of scores: a number is the sum of a key's first dims. Positive ones are moved up to where neighbouring
// numbers are neighbouring floats, so that a bound that is off by one step shows.
template <class Value>
void selects_from(const Implementation& by, const Context& context, int64_t k, const Value& value) {
  constexpr int64_t kLength = 9000;
  Case<bf16> c({1, 32, 64, k, IndexKeyFormat::kBFloat16, {{kLength}}}, 1);
  for (int64_t d = 0; d < 32; ++d) c.query[d] = from_float<bf16>(d < 3 ? 1.0f : 0.0f);
  c.weights[0] = 1;
  std::vector<std::pair<double, int32_t>> all;
  for (int64_t entry = 0; entry < kLength; ++entry) {
    const int64_t page = c.table[entry / 64];
    if (page < 0) continue;
    auto* key = reinterpret_cast<bf16*>(c.bytes.data() + page * c.page_bytes()) + entry % 64 * 32;
    const int number = value(entry);  // below 2^16: 8 bits each are exact
    key[0] = from_float<bf16>(static_cast<float>(number / 256 * 256));
    key[1] = from_float<bf16>(static_cast<float>(number % 256));
    key[2] = from_float<bf16>(number > 0 ? 8388608.0f : 0.0f);  // 2^23
    for (int64_t d = 3; d < 32; ++d) key[d] = from_float<bf16>(0);
    if (number >= 0) all.push_back({-number, static_cast<int32_t>(entry)});
    if (number < 0) key[0] = bf16{0x7FC0};  // NaN
  }
  if (!c.run(by, context)) return;
  std::sort(all.begin(), all.end());
  all.resize(std::min(all.size(), static_cast<size_t>(k)));
  std::vector<int32_t> entries;
  for (const auto& [score, entry] : all) entries.push_back(entry);
  std::sort(entries.begin(), entries.end());
  entries.resize(static_cast<size_t>(k), -1);
  CHECK_MESSAGE(c.equals(0, entries), std::string(by.name) + ": k " + std::to_string(k));
}

TEST(streams_in_every_order) {
  Random random(7);
  std::vector<int> noise;
  for (int i = 0; i < 9000; ++i) noise.push_back(static_cast<int>(random.bits() >> 30 & 0xFFFF));
  for (const int threads : {1, 2}) {
    ThreadPool pool(threads);
    for (const Implementation& by : kImplementations) {
      if (!present(by)) continue;
      for (const int64_t k : {1, 300, 512, 2500, 9500}) {
        const auto check = [&](const auto& value) { selects_from(by, pool.context(), k, value); };
        check([](int64_t i) { return static_cast<int>(i); });
        check([](int64_t i) { return static_cast<int>(9000 - i); });
        check([](int64_t) { return 0; });
        check([](int64_t) { return 7; });
        check([](int64_t) { return -1; });
        check([](int64_t i) { return static_cast<int>(i / 500); });
        check([](int64_t i) { return static_cast<int>(i % 3 == 0 ? -1 : 9000 - i); });
        check([](int64_t i) { return static_cast<int>(i % 2 == 0 ? i : 60000 - i); });
        check([&](int64_t i) { return noise[static_cast<size_t>(i)]; });
        check([&](int64_t i) { return noise[static_cast<size_t>(i)] % 3; });
      }
    }
  }
}

// FP4 scales at the ends of their range, where a key's value may be no normal bfloat16: one dim of a key is not zero,
// so that scores are exact. Zero and infinity are equal to others of their kind; 255 is NaN.
void takes_extreme_scales(const Implementation& by, const Context& context, int64_t heads, int64_t dim, int64_t page) {
  constexpr int64_t kLength = 800, kMost = 300;
  constexpr uint8_t kScales[] = {0, 1, 2, 3, 60, 127, 251, 252, 253, 254, 255};
  Case<bf16> c({heads, dim, page, kMost, IndexKeyFormat::kFp4, {{kLength}}}, 9);
  for (int64_t i = 0; i < c.query.size(); ++i) c.query[i] = from_float<bf16>(1);
  for (int64_t h = 0; h < heads; ++h) c.weights[h] = 1;
  std::vector<std::pair<float, int32_t>> all;
  for (int64_t entry = 0; entry < kLength; ++entry) {
    const int64_t at = c.table[entry / page], offset = entry % page;
    if (at < 0) continue;
    uint8_t* values = c.bytes.data() + at * c.page_bytes() + offset * c.value_bytes();
    uint8_t* scales = c.bytes.data() + at * c.page_bytes() + page * c.value_bytes() + offset * c.scale_bytes();
    std::fill(values, values + c.value_bytes(), uint8_t{0});
    std::fill(scales, scales + c.scale_bytes(), uint8_t{127});
    const auto d = static_cast<int64_t>((c.random.bits() >> 9) % static_cast<uint64_t>(dim));
    const auto code = static_cast<uint8_t>(1 + (c.random.bits() >> 9) % 7);
    const uint8_t scale = kScales[(c.random.bits() >> 9) % std::size(kScales)];
    values[d / 2] = static_cast<uint8_t>(code << d % 2 * 4);
    scales[d / 32] = scale;
    const float value = e2m1_value(code) * e8m0_value(scale) * static_cast<float>(heads);
    if (value == value) all.push_back({-value, static_cast<int32_t>(entry)});
  }
  if (!c.run(by, context)) return;
  std::sort(all.begin(), all.end());
  std::vector<int32_t> entries;
  for (int64_t i = 0; i < kMost; ++i) entries.push_back(all[static_cast<size_t>(i)].second);
  std::sort(entries.begin(), entries.end());
  CHECK_MESSAGE(c.equals(0, entries), std::string(by.name) + ": dim " + std::to_string(dim));
}

TEST(extreme_scales) {
  ThreadPool pool(1);
  for (const Implementation& by : kImplementations) {
    if (!present(by)) continue;
    takes_extreme_scales(by, pool.context(), 64, 128, 64);
    takes_extreme_scales(by, pool.context(), 3, 224, 64);
    takes_extreme_scales(by, pool.context(), 20, 96, 5);
  }
}

TEST(refuses_what_is_not_valid) {
  Case<bf16> c(kShapes[1], 4);
  ThreadPool pool(1);
  const auto message = [&](const IndexTopkParams& p) { return std::string(index_topk(p, pool.context()).message()); };
  const auto changed = [&](const auto& change) {
    IndexTopkParams p = c.p;
    change(p);
    return message(p);
  };
  CHECK(message(c.p).find("index_topk: workspace must have ") == 0);
  CHECK(changed([](auto& p) { p.query.dtype = DType::kUInt8; }) ==
        "index_topk: query must be bfloat16 or float32, got uint8");
  CHECK(changed([](auto& p) { p.weights.shape[1] = 2; }) ==
        "index_topk: weights must be float32 [5, 3], got float32 [5, 2]");
  CHECK(changed([](auto& p) { p.bytes.shape[1] -= 1; }).find("index_topk: pages must be uint8 [*, 340], got") == 0);
  CHECK(changed([](auto& p) { p.plain = p.query; }) == "index_topk: pages must be either plain or bytes");
  CHECK(changed([](auto& p) { p.bytes = {}; }) == "index_topk: pages must be bfloat16 or float32, got nothing");
  CHECK(changed([](auto& p) { p.page_size = 0; }) == "index_topk: the page size of pages must be at least 1, got 0");
  CHECK(changed([](auto& p) { p.page_size = int64_t{1} << 40; }) == "index_topk: the page size of pages is too large");
  CHECK(changed([](auto& p) { p.k = 0; }) == "index_topk: k must be at least 1, got 0");
  CHECK(changed([](auto& p) { p.lengths = {}; }) == "index_topk: lengths must be int32 [5], got nothing [0]");
  CHECK(changed([](auto& p) { p.result.shape[1] = 9; }) == "index_topk: result must be int32 [5, 8], got int32 [5, 9]");
  CHECK(changed([](auto& p) { p.query.data = nullptr; }) == "index_topk: query must not be null");
  CHECK(changed([](auto& p) { p.table.stride[1] = 2; }).find("index_topk: table must be contiguous") == 0);
  c.sequence[1] = 3;
  CHECK(message(c.p) == "index_topk: sequence must lie in [0, 3), the rows of the table, got 3");
  c.sequence[0] = -2;
  CHECK(message(c.p) == "index_topk: sequence must lie in [0, 3), the rows of the table, got -2");
  IndexTopkParams broken = c.p;
  broken.query.dtype = DType::kNone;
  CHECK(index_topk_workspace_bytes(broken, pool.context()) == 0);
}

}  // namespace
