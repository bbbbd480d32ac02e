// index_topk at the V4-Flash shape, 64 heads of 128 dims and the best 512: decode at 64K and at a million tokens of
// context (a quarter as many entries) and prefill, on FP4 and FP8 keys; and few short heads, as a small model has. Some
// rows are checked against sums in double precision: no entry that was left out may score above one that was taken.
#include <algorithm>
#include <cmath>
#include <numeric>

#include "common/hardware.h"
#include "common/pages.h"
#include "native/bench.h"
#include "ops/index.h"

namespace {

using namespace dsv4;

constexpr int64_t kPage = 64, kBest = 512, kScaleDims = 32;

struct Shape {
  const char* name;
  int64_t rows, entries, heads, dim;
  bool fp4;
};

constexpr Shape kShapes[] = {
    {"decode rows=1 entries=16384 heads=64 dim=128 fp4", 1, 16384, 64, 128, true},
    {"decode rows=1 entries=262144 heads=64 dim=128 fp4", 1, 262144, 64, 128, true},
    {"decode rows=1 entries=262144 heads=64 dim=128 fp8", 1, 262144, 64, 128, false},
    {"decode rows=8 entries=16384 heads=64 dim=128 fp4", 8, 16384, 64, 128, true},
    {"prefill rows=256 entries=16384 heads=64 dim=128 fp4", 256, 16384, 64, 128, true},
    {"prefill rows=256 entries=4096 heads=4 dim=64 fp4", 256, 4096, 4, 64, true},
};

// One sequence in shuffled pages; row r of a prefill sees `rows - 1 - r` quarters fewer entries than the last, decoding
// rows see them all.
struct Problem {
  Shape s;
  int64_t value_bytes, scale_bytes;
  std::vector<bf16> query;
  std::vector<float> weights;
  std::vector<uint8_t> pages;
  std::vector<int32_t> table, sequence, lengths, result;
  bench::Scratch scratch;
  IndexTopkParams params{};

  explicit Problem(const Shape& shape) : s(shape) {
    Random random;
    value_bytes = s.fp4 ? s.dim / 2 : s.dim;
    scale_bytes = s.fp4 ? s.dim / kScaleDims : 4;
    const int64_t blocks = s.entries / kPage;
    query.resize(static_cast<size_t>(s.rows * s.heads * s.dim));
    for (bf16& q : query) q = bf16_from_float(random.uniform());
    weights.resize(static_cast<size_t>(s.rows * s.heads));
    for (float& w : weights) w = random.uniform();
    pages.resize(static_cast<size_t>(s.entries * (value_bytes + scale_bytes)));
    for (uint8_t& byte : pages) byte = static_cast<uint8_t>(random.bits() >> 30 & (s.fp4 ? 0xFF : 0xBF));
    table.resize(static_cast<size_t>(blocks));
    std::iota(table.begin(), table.end(), 0);
    for (int64_t i = blocks - 1; i > 0; --i) {
      std::swap(table[static_cast<size_t>(i)], table[static_cast<size_t>(random.below(i + 1))]);
    }
    for (int64_t page = 0; page < blocks; ++page) fill_scales(page, random);
    for (int64_t row = 0; row < s.rows; ++row) {
      sequence.push_back(0);
      lengths.push_back(static_cast<int32_t>(s.rows > 8 ? s.entries - (s.rows - 1 - row) / 4 : s.entries));
    }
    result.assign(static_cast<size_t>(s.rows * kBest), -2);
    params.query = dense<AnyView<3>>(query.data(), {s.rows, s.heads, s.dim});
    params.weights.data = weights.data();
    params.weights.shape[0] = s.rows, params.weights.shape[1] = s.heads;
    params.weights.stride[0] = s.heads, params.weights.stride[1] = 1;
    params.bytes = dense<AnyView<2>>(pages.data(), {blocks, kPage * (value_bytes + scale_bytes)});
    params.table = dense<AnyView<2>>(table.data(), {1, blocks});
    params.sequence = dense<AnyView<1>>(sequence.data(), {s.rows});
    params.lengths = dense<AnyView<1>>(lengths.data(), {s.rows});
    params.k = kBest;
    params.page_size = kPage;
    params.result = dense<AnyView<2>>(result.data(), {s.rows, kBest});
  }

  void fill_scales(int64_t page, Random& random) {
    uint8_t* to = pages.data() + kPage * (page * (value_bytes + scale_bytes) + value_bytes);
    for (int64_t i = 0; i < kPage * scale_bytes; ++i) {
      if (s.fp4) {
        to[i] = static_cast<uint8_t>(125 + random.below(4));
      } else if (i % 4 == 0) {
        const float scale = 0.01f * (1.5f + random.uniform());
        memcpy(to + i, &scale, sizeof(scale));
      }
    }
  }

  void use(const Context& context) { params.workspace = scratch.of(index_topk_workspace_bytes(params, context)); }

  double key(int64_t entry, int64_t d) const {
    const int64_t page = table[static_cast<size_t>(entry / kPage)], offset = entry % kPage;
    const uint8_t* at = pages.data() + page * kPage * (value_bytes + scale_bytes);
    const uint8_t* scales = at + kPage * value_bytes + offset * scale_bytes;
    if (!s.fp4) {
      float scale;
      memcpy(&scale, scales, sizeof(scale));
      return static_cast<double>(e4m3_value(at[offset * value_bytes + d])) * scale;
    }
    const int pair = at[offset * value_bytes + d / 2];
    const auto code = static_cast<uint8_t>(d % 2 == 0 ? pair & 15 : pair >> 4);
    return static_cast<double>(e2m1_value(code)) * e8m0_value(scales[d / kScaleDims]);
  }

  // How far the best entry left out is above the worst one taken, relative to the largest score; infinity where the
  // list is malformed.
  double error(int64_t row) const {
    std::vector<double> scores(static_cast<size_t>(lengths[static_cast<size_t>(row)])),
        key_values(static_cast<size_t>(s.dim));
    double largest = 0;
    for (size_t entry = 0; entry < scores.size(); ++entry) {
      for (int64_t d = 0; d < s.dim; ++d) key_values[static_cast<size_t>(d)] = key(static_cast<int64_t>(entry), d);
      for (int64_t h = 0; h < s.heads; ++h) {
        const bf16* q = query.data() + (row * s.heads + h) * s.dim;
        double product = 0;
        for (int64_t d = 0; d < s.dim; ++d) product += to_float(q[d]) * key_values[static_cast<size_t>(d)];
        scores[entry] += weights[static_cast<size_t>(row * s.heads + h)] * std::max(product, 0.0);
      }
      largest = std::max(largest, std::fabs(scores[entry]));
    }
    std::vector<bool> taken(scores.size());
    double worst = HUGE_VAL, missed = -HUGE_VAL;
    for (int64_t i = 0; i < kBest; ++i) {
      const int32_t entry = result[static_cast<size_t>(row * kBest + i)];
      if (entry < 0 || entry >= static_cast<int64_t>(scores.size()) || taken[static_cast<size_t>(entry)])
        return HUGE_VAL;
      taken[static_cast<size_t>(entry)] = true;
      worst = std::min(worst, scores[static_cast<size_t>(entry)]);
    }
    for (size_t entry = 0; entry < scores.size(); ++entry) {
      if (!taken[entry]) missed = std::max(missed, scores[entry]);
    }
    return std::max(0.0, missed - worst) / largest;
  }
};

const char* implementation(const Context& context) { return isa_name(context.best); }

}  // namespace

int main(int argc, char** argv) {
  bench::Bench bench(argc, argv);
  if (!bench.usable()) return bench.exit_code();
  for (const Shape& shape : kShapes) {
    Problem problem(shape);
    const Context context = bench.pool().context();
    problem.use(context);
    double scored = 0;
    for (const int32_t length : problem.lengths) scored += length;
    bench::Measurement m;
    m.op = "index_topk";
    m.impl = implementation(context);
    m.shape = shape.name;
    m.flops = 2.0 * static_cast<double>(shape.heads * shape.dim) * scored;
    m.bytes = static_cast<double>(problem.pages.size());
    m.unit = bench::Unit::kBFloat16;
    m.run = [&] { (void)index_topk(problem.params, context).is_ok(); };
    m.error = [&] { return std::max(problem.error(0), problem.error(shape.rows - 1)); };
    m.error_limit = 1e-5;
    bench.measure(m);
  }
  return bench.exit_code();
}
