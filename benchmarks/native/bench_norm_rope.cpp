// Norms, rotations, quantisers, store_window and compress without torch: one row (decoding) and many, at the shapes of
// V4-Flash. Bound by memory, or by the fixed cost of a call. The check compares every byte written with the scalar
// kernel's, which a single row is timed against as well.
#include <cmath>
#include <cstring>
#include <string>
#include <vector>

#include "common/hardware.h"
#include "common/pages.h"
#include "native/bench.h"
#include "ops/compress.h"
#include "ops/index.h"
#include "ops/norm_rope.h"
#include "ops/quantize.h"

namespace {

using namespace dsv4;

constexpr int64_t kHidden = 4096, kDim = 512, kRope = 64, kHeads = 64, kBlock = 256;

// Zeroed memory with a view of its own, filled with numbers or not.
template <class T, int N>
struct Array {
  std::vector<T> memory;
  AnyView<N> view;

  Array(std::initializer_list<int64_t> shape, float range = 0) {
    int64_t size = 1;
    for (const int64_t extent : shape) size *= extent;
    memory.resize(static_cast<size_t>(size));
    view = dense<AnyView<N>>(memory.data(), shape);
    if constexpr (std::is_same_v<T, float> || std::is_same_v<T, bf16>) {
      Random random(static_cast<uint64_t>(size));
      for (T& x : memory) {
        if (range == 0) break;
        x = from_float<T>(random.uniform(-range, range));
      }
    }
  }

  template <class V>
  View<V, N> as() const {
    return view.template as<V>();
  }
};

// Rows of one sequence from position 0, and what the ops make of them, in memory of its own.
class Problem {
 public:
  Problem(const std::string& op, int64_t rows)
      : op_(op),
        rows_(rows),
        keys_(op == "compress keys"),
        ratio_(op == "compress hca" ? 128 : 4),
        dim_(op == "hadamard" || op == "index_query" || keys_ ? 128
             : op == "rms_norm" || quantizes()                ? kHidden
                                                              : kDim),
        channels_(op == "compress hca" ? dim_ : 2 * dim_),
        blocks_((rows + kBlock - 1) / kBlock),
        x_({rows, op == "query_norm_rope" || op == "hadamard" || op == "index_query" ? kHeads : 1, dim_}, 2),
        result_({rows, x_.view.shape[1], dim_}),
        kv_({rows, channels_}, 2),
        gate_({rows, channels_}, 4),
        ape_({ratio_, channels_}, 1),
        rope_({rows, kRope / 2, 2}, 1),
        weight_({dim_}, 1),
        codes_({rows, quantizes() ? dim_ : 0}),
        scale_({rows, quantizes() ? dim_ / (op == "quantize_fp4" ? 32 : 128) : 0}),
        state_({1, 2 * ratio_ + 8, 2, channels_}),
        table_({1, blocks_}),
        sequence_({rows}),
        position_({rows}),
        page_size_(op == "store_window" ? kBlock : kBlock / ratio_),
        pages_({blocks_, keys_ ? page_size_ * 68 : fp8_page_bytes(page_size_, dim_, kRope)}) {
    for (int64_t i = 0; i < blocks_; ++i) table_.memory[static_cast<size_t>(i)] = static_cast<int32_t>(i);
    for (int64_t i = 0; i < rows; ++i) position_.memory[static_cast<size_t>(i)] = static_cast<int32_t>(i);
    if (rows == 1) position_.memory[0] = static_cast<int32_t>(ratio_ - 1);  // the row that completes an entry
  }

  Status run(const Context& context) {
    RowPool pool{{}, pages_.view, table_.view, page_size_};
    if (op_ == "query_norm_rope") return query_norm_rope({x_.view, rope_.view, 1e-6, result_.view}, context);
    if (op_ == "index_query") return index_query({x_.view, rope_.view, result_.view}, context);
    const AnyView<2> row{x_.memory.data(), DType::kBFloat16, {rows_, dim_}, {dim_, 1}};
    if (op_ == "rms_norm") {
      AnyView<2> out = row;
      out.data = result_.memory.data();
      return rms_norm({row, weight_.view, 1e-6, out}, context);
    }
    if (op_ == "quantize_fp8") return quantize_fp8({row, 128, codes_.view, scale_.view}, context);
    if (op_ == "quantize_fp4") {
      const AnyView<2> packed{codes_.memory.data(), DType::kUInt8, {rows_, dim_ / 2}, {dim_ / 2, 1}};
      return quantize_fp4({row, 32, packed, scale_.view}, context);
    }
    if (op_ == "hadamard") {
      AnyView<2> flat{x_.memory.data(), DType::kBFloat16, {rows_ * kHeads, dim_}, {dim_, 1}}, out = flat;
      out.data = result_.memory.data();
      HadamardParams p{flat, out, {}};
      p.workspace = scratch_.of(hadamard_workspace_bytes(p, context));
      return hadamard(p, context);
    }
    if (op_ == "store_window") {
      AnyView<2> kv{x_.memory.data(), DType::kBFloat16, {rows_, dim_}, {dim_, 1}};
      StoreWindowParams p{kv, weight_.view, rope_.view, pool, sequence_.view, position_.view, 1e-6, {}};
      p.workspace = scratch_.of(store_window_workspace_bytes(p, context));
      return store_window(p, context);
    }
    CompressParams p{kv_.as<const float>(),
                     gate_.as<const float>(),
                     ape_.as<const float>(),
                     weight_.view,
                     rope_.view,
                     state_.as<float>(),
                     pool,
                     sequence_.view,
                     position_.view,
                     ratio_,
                     1e-6,
                     keys_,
                     {}};
    p.workspace = scratch_.of(compress_workspace_bytes(p, context));
    return compress(p, context);
  }

  // The fewest bytes that must move, and operations.
  double bytes() const {
    const double rows = static_cast<double>(rows_), x = static_cast<double>(x_.memory.size()) * 2;
    if (op_ == "query_norm_rope" || op_ == "hadamard" || op_ == "index_query" || op_ == "rms_norm") return 2 * x;
    if (op_ == "quantize_fp8") return x * (1 + 0.5 * (1 + 1.0 / 128));
    if (op_ == "quantize_fp4") return x * (1 + 0.5 * (0.5 + 1.0 / 32));
    if (op_ == "store_window") return x + rows * 584;
    return rows * static_cast<double>(channels_) * 8 + rows / static_cast<double>(ratio_) * (keys_ ? 68 : 584);
  }
  double flops() const {
    const double x = static_cast<double>(x_.memory.size());
    if (op_ == "rms_norm" || quantizes()) return 4 * x;
    if (op_ == "hadamard" || op_ == "index_query") return x * std::log2(static_cast<double>(dim_));
    return op_ == "query_norm_rope" || op_ == "store_window"
               ? 6 * x
               : 30 * static_cast<double>(rows_) * static_cast<double>(channels_);
  }

  bool same(const Problem& other) const {
    return pages_.memory == other.pages_.memory && state_.memory == other.state_.memory &&
           codes_.memory == other.codes_.memory && scale_.memory == other.scale_.memory &&
           std::memcmp(result_.memory.data(), other.result_.memory.data(), result_.memory.size() * 2) == 0;
  }

 private:
  bool quantizes() const { return op_ == "quantize_fp8" || op_ == "quantize_fp4"; }

  std::string op_;
  int64_t rows_;
  bool keys_;
  int64_t ratio_, dim_, channels_, blocks_;
  Array<bf16, 3> x_, result_;
  Array<float, 2> kv_, gate_, ape_;
  Array<float, 3> rope_;
  Array<float, 1> weight_;
  Array<uint8_t, 2> codes_, scale_;
  Array<float, 4> state_;
  Array<int32_t, 2> table_;
  Array<int32_t, 1> sequence_, position_;
  int64_t page_size_;
  Array<uint8_t, 2> pages_;
  bench::Scratch scratch_;
};

void measure(bench::Bench& bench, const std::string& op, int64_t rows, Isa isa) {
  Context context = bench.pool().context();
  context.best = isa;
  Context scalar = context;
  scalar.best = Isa::kScalar;
  Problem problem(op, rows), checked(op, rows);
  bench::Measurement m;
  const size_t space = op.find(' ');
  m.op = op.substr(0, space);
  m.impl = isa_name(isa);
  m.shape = "v4-flash " + (space == std::string::npos ? "" : op.substr(space + 1) + " ") + std::to_string(rows);
  m.flops = problem.flops();
  m.bytes = problem.bytes();
  Status status = Status::ok();
  m.run = [&] { status = problem.run(context); };
  m.error = [&] {
    const bool ran = status.is_ok() && checked.run(scalar).is_ok();
    return ran && problem.same(checked) ? 0.0 : static_cast<double>(INFINITY);
  };
  if (isa != Isa::kScalar) {
    m.baseline = "scalar";
    m.run_baseline = [&] { status = problem.run(scalar); };
  }
  bench.measure(m);
}

}  // namespace

int main(int argc, char** argv) {
  bench::Bench bench(argc, argv);
  if (!bench.usable()) return bench.exit_code();
  const Isa isa = bench.pool().context().best >= Isa::kAvx512 ? Isa::kAvx512 : Isa::kScalar;
  for (const int64_t rows : {int64_t{1}, bench.quick() ? int64_t{256} : int64_t{2048}}) {
    for (const char* op : {"rms_norm", "query_norm_rope", "store_window", "hadamard", "index_query", "quantize_fp8",
                           "quantize_fp4", "compress csa", "compress hca", "compress keys"}) {
      measure(bench, op, rows, isa);
    }
  }
  return bench.exit_code();
}
