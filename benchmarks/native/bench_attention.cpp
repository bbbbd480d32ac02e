// sparse_attention on FP8 pages at the V4-Flash shape: decode of one row with a window and 512 selected entries (64K
// tokens of context) and with a window and all 8,192 entries of a million tokens, and prefill. Checked against sums in
// double precision on some rows and heads.
#include <algorithm>
#include <cmath>
#include <numeric>

#include "common/hardware.h"
#include "common/pages.h"
#include "native/bench.h"
#include "ops/attention.h"

namespace {

using namespace dsv4;

constexpr int64_t kHeads = 64, kDim = 512, kRope = 64, kWindow = 128, kBlock = 256;
constexpr int64_t kCodes = kDim - kRope;

struct Shape {
  const char* name;
  int64_t rows, context, ratio, selected;  // selected 0: all entries
};

constexpr Shape kShapes[] = {
    {"decode rows=1 keys=128+512 context=64K", 1, 65536, 4, 512},
    {"decode rows=8 keys=128+512 context=64K", 8, 65536, 4, 512},
    {"decode rows=1 keys=128+8192 context=1M", 1, 1 << 20, 128, 0},
    {"prefill rows=256 keys=128+512 context=64K", 256, 65536, 4, 512},
    {"prefill rows=2048 keys=128+512 context=64K", 2048, 65536, 4, 512},
    {"prefill rows=2048 keys=128+512 context=64K ratio=128", 2048, 65536, 128, 0},
};

// A pool that holds entries [first, end) of one sequence in shuffled pages.
struct Pool {
  int64_t page_size, page_bytes, first_block;
  std::vector<uint8_t> bytes;
  std::vector<int32_t> table;

  Pool(int64_t page_size_, int64_t first, int64_t end, Random& random)
      : page_size(page_size_), page_bytes(fp8_page_bytes(page_size_, kDim, kRope)), first_block(first / page_size_) {
    const int64_t blocks = (end + page_size - 1) / page_size, count = blocks - first_block;
    table.assign(static_cast<size_t>(blocks), -1);
    std::iota(table.begin() + first_block, table.end(), 0);
    for (int64_t i = count - 1; i > 0; --i) {
      std::swap(table[static_cast<size_t>(first_block + i)],
                table[static_cast<size_t>(first_block + random.below(i + 1))]);
    }
    bytes.resize(static_cast<size_t>(count * page_bytes));
    for (int64_t page = 0; page < count; ++page) {
      for (int64_t offset = 0; offset < page_size; ++offset) fill(page, offset, random);
    }
  }

  void fill(int64_t page, int64_t offset, Random& random) {
    uint8_t* row = bytes.data() + page * page_bytes + fp8_row_at(offset, kDim, kRope);
    for (int64_t d = 0; d < kCodes; ++d) {
      const uint64_t bits = random.bits() >> 20;
      row[d] = static_cast<uint8_t>((bits & 0x80u) | (0x30u + (bits & 0xFu)));
    }
    for (int64_t d = 0; d < kRope; ++d) {
      const bf16 value = bf16_from_float(random.uniform());
      std::memcpy(row + kCodes + 2 * d, &value, 2);
    }
    std::fill_n(bytes.data() + page * page_bytes + fp8_scales_at(offset, page_size, kDim, kRope), 8, uint8_t{126});
  }

  double value(int64_t entry, int64_t d) const {
    const uint8_t* page = bytes.data() + table[static_cast<size_t>(entry / page_size)] * page_bytes;
    const uint8_t* row = page + fp8_row_at(entry % page_size, kDim, kRope);
    if (d < kCodes) {
      const uint8_t* scales = page + fp8_scales_at(entry % page_size, page_size, kDim, kRope);
      return static_cast<double>(e4m3_value(row[d])) * e8m0_value(scales[d / kRowBlock]);
    }
    bf16 bits;
    std::memcpy(&bits, row + kCodes + 2 * (d - kCodes), 2);
    return to_float(bits);
  }

  RowPool pool() {
    RowPool result{};
    result.bytes = dense<AnyView<2>>(bytes.data(), {static_cast<int64_t>(bytes.size()) / page_bytes, page_bytes});
    result.table = dense<AnyView<2>>(table.data(), {1, static_cast<int64_t>(table.size())});
    result.page_size = page_size;
    return result;
  }
};

class Case {
 public:
  Case(const Shape& shape, bench::Bench& bench)
      : shape_(shape),
        first_(shape.context - shape.rows),
        window_(kBlock, std::max<int64_t>(0, first_ - kWindow), shape.context, random_),
        entries_(kBlock / shape.ratio, 0, shape.context / shape.ratio, random_),
        query_(static_cast<size_t>(shape.rows * kHeads * kDim)),
        out_(query_.size()),
        sequence_(static_cast<size_t>(shape.rows), 0),
        indices_(static_cast<size_t>(shape.rows * shape.selected)),
        sink_(kHeads, 0.5f),
        rope_(static_cast<size_t>(shape.rows * kRope)),
        lse_(static_cast<size_t>(shape.rows * kHeads)),
        context_(bench.pool().context()) {
    for (bf16& q : query_) q = bf16_from_float(random_.uniform());
    for (float& x : rope_) x = random_.uniform();
    for (int64_t row = 0; row < shape.rows; ++row) {
      position_.push_back(static_cast<int32_t>(first_ + row));
      lengths_.push_back(static_cast<int32_t>((first_ + row + 1) / shape.ratio));
      // Ascending, as a selection comes: one of each of equal stretches.
      for (int64_t i = 0; i < shape.selected; ++i) {
        const int64_t stretch = lengths_.back() / shape.selected;
        indices_[static_cast<size_t>(row * shape.selected + i)] =
            static_cast<int32_t>(i * stretch + random_.below(stretch));
      }
    }
    fill_parameters();
  }

  bench::Measurement measurement() {
    bench::Measurement m;
    m.op = "sparse_attention";
    m.impl = isa_name(context_.best);
    m.shape = shape_.name;
    int64_t keys = 0;
    for (int64_t row = 0; row < shape_.rows; ++row) keys += count(row);
    m.flops = 4.0 * kHeads * kDim * static_cast<double>(keys);
    // Every key at least once; queries and results.
    const double held = static_cast<double>(window_.bytes.size() + entries_.bytes.size());
    m.bytes =
        std::min(584.0 * static_cast<double>(keys), held) + 4.0 * static_cast<double>(query_.size() + indices_.size());
    m.unit = bench::Unit::kBFloat16;
    m.run = [this] {
      const Status status = sparse_attention(params_, context_);
      if (!status.is_ok()) out_.assign(out_.size(), bf16{0x7FFF});
    };
    m.error = [this] { return error(); };
    m.error_limit = 0.01;
    return m;
  }

 private:
  int64_t count(int64_t row) const {
    const int64_t window = std::min<int64_t>(kWindow, position_[static_cast<size_t>(row)] + 1);
    return window + (shape_.selected > 0 ? shape_.selected : lengths_[static_cast<size_t>(row)]);
  }

  void fill_parameters() {
    const int64_t rows = shape_.rows;
    params_.query = dense<AnyView<3>>(query_.data(), {rows, kHeads, kDim});
    params_.window_pool = window_.pool();
    params_.compressed = entries_.pool();
    params_.sequence = dense<AnyView<1>>(sequence_.data(), {rows});
    params_.position = dense<AnyView<1>>(position_.data(), {rows});
    if (shape_.selected > 0) {
      params_.indices = dense<AnyView<2>>(indices_.data(), {rows, shape_.selected});
    }
    params_.lengths = dense<AnyView<1>>(lengths_.data(), {rows});
    params_.sink = dense<AnyView<1>>(sink_.data(), {kHeads});
    params_.rope = dense<AnyView<3>>(rope_.data(), {rows, kRope / 2, 2});
    params_.rope_dim = kRope;
    params_.window = kWindow;
    params_.scale = 1.0f / std::sqrt(static_cast<float>(kDim));
    params_.out = dense<AnyView<3>>(out_.data(), {rows, kHeads, kDim});
    params_.lse = dense<AnyView<2>>(lse_.data(), {rows, kHeads});
    params_.workspace = scratch_.of(sparse_attention_workspace_bytes(params_, context_));
  }

  std::vector<float> expected(int64_t row, int64_t head) const {
    const int64_t end = position_[static_cast<size_t>(row)] + 1, window = std::min(kWindow, end), keys = count(row);
    const bf16* q = query_.data() + (row * kHeads + head) * kDim;
    const auto value = [&](int64_t key, int64_t d) {
      if (key < window) return window_.value(end - window + key, d);
      const int64_t entry = key - window;
      return entries_.value(shape_.selected > 0 ? indices_[static_cast<size_t>(row * shape_.selected + entry)] : entry,
                            d);
    };
    std::vector<double> scores(static_cast<size_t>(keys)), sums(kDim, 0.0);
    double most = -1e300, total = 0;
    for (int64_t key = 0; key < keys; ++key) {
      double& score = scores[static_cast<size_t>(key)];
      for (int64_t d = 0; d < kDim; ++d) score += to_float(q[d]) * value(key, d);
      score *= params_.scale;
      most = std::max(most, score);
    }
    for (int64_t key = 0; key < keys; ++key) {
      const double numerator = std::exp(scores[static_cast<size_t>(key)] - most);
      total += numerator;
      for (int64_t d = 0; d < kDim; ++d) sums[static_cast<size_t>(d)] += numerator * value(key, d);
    }
    const double divisor = total + std::exp(sink_[static_cast<size_t>(head)] - most);
    for (double& sum : sums) sum /= divisor;
    for (int64_t d = kCodes; d < kDim; d += 2) {
      const float* turn = rope_.data() + row * kRope + (d - kCodes);
      const double even = sums[static_cast<size_t>(d)], odd = sums[static_cast<size_t>(d + 1)];
      sums[static_cast<size_t>(d)] = even * turn[0] + odd * turn[1];
      sums[static_cast<size_t>(d + 1)] = odd * turn[0] - even * turn[1];
    }
    return std::vector<float>(sums.begin(), sums.end());
  }

  double error() const {
    double worst = 0;
    for (const int64_t row : {int64_t{0}, shape_.rows - 1}) {
      for (const int64_t head : {int64_t{0}, kHeads - 1}) {
        std::vector<float> actual(kDim);
        const bf16* out = out_.data() + (row * kHeads + head) * kDim;
        std::transform(out, out + kDim, actual.begin(), [](bf16 x) { return to_float(x); });
        worst = std::max(worst, bench::relative_error(actual, expected(row, head)));
      }
    }
    return worst;
  }

  Shape shape_;
  int64_t first_;
  Random random_;
  Pool window_, entries_;
  std::vector<bf16> query_, out_;
  std::vector<int32_t> sequence_, position_, lengths_, indices_;
  std::vector<float> sink_, rope_, lse_;
  bench::Scratch scratch_;
  Context context_;
  SparseAttentionParams params_{};
};

}  // namespace

int main(int argc, char** argv) {
  bench::Bench bench(argc, argv);
  if (!bench.usable()) return bench.exit_code();
  for (const Shape& shape : kShapes) {
    if (bench.quick() && shape.rows > 256) continue;
    Case one(shape, bench);
    bench.measure(one.measurement());
  }
  return bench.exit_code();
}
