// sparse_attention_backward on plain rows at the V4-Flash shape, as in training: the last rows of a sequence of 4K
// tokens with a window and 512 selected entries, or with a window and all entries of ratio 128. Checked against sums in
// double precision, from the forward kernel's out and lse: d query of some rows and heads, the gradients of some keys.
#include <algorithm>
#include <cmath>

#include "common/hardware.h"
#include "native/bench.h"
#include "ops/attention.h"

namespace {

using namespace dsv4;

constexpr int64_t kHeads = 64, kDim = 512, kRope = 64, kWindow = 128, kContext = 4096, kPage = 64;
constexpr int64_t kStill = kDim - kRope;

struct Shape {
  const char* name;
  int64_t rows, ratio, selected;  // selected 0: all entries
  bool wide;                      // float32
};

constexpr Shape kShapes[] = {
    {"rows=64 keys=128+512 bf16", 64, 4, 512, false},
    {"rows=64 keys=128+32 bf16", 64, 128, 0, false},
    {"rows=64 keys=128+512 fp32", 64, 4, 512, true},
    {"rows=512 keys=128+512 bf16", 512, 4, 512, false},
};

// A dense tensor of bfloat16, float32 or int32.
template <int N>
struct Array {
  AnyView<N> view;
  std::vector<uint8_t> memory;

  Array(DType dtype, std::initializer_list<int64_t> shape) {
    view.dtype = dtype;
    int64_t stride = 1;
    for (int axis = N - 1; axis >= 0; --axis) {
      view.shape[axis] = shape.begin()[axis];
      view.stride[axis] = stride;
      stride *= view.shape[axis];
    }
    memory.resize(static_cast<size_t>(stride * (dtype == DType::kBFloat16 ? 2 : 4)));
    view.data = memory.data();
  }

  int64_t size() const { return static_cast<int64_t>(memory.size()) / (view.dtype == DType::kBFloat16 ? 2 : 4); }
  double get(int64_t i) const {
    if (view.dtype == DType::kFloat32) return static_cast<const float*>(view.data)[i];
    return to_float(static_cast<const bf16*>(view.data)[i]);
  }
  void set(int64_t i, float x) {
    if (view.dtype == DType::kFloat32) {
      static_cast<float*>(view.data)[i] = x;
    } else {
      static_cast<bf16*>(view.data)[i] = bf16_from_float(x);
    }
  }
  int32_t& integer(int64_t i) { return static_cast<int32_t*>(view.data)[i]; }
  int32_t integer(int64_t i) const { return static_cast<const int32_t*>(view.data)[i]; }
  void fill(Random& random) {
    for (int64_t i = 0; i < size(); ++i) set(i, random.uniform());
  }
};

class Case {
 public:
  Case(const Shape& shape, bench::Bench& bench)
      : s_(shape),
        x_(shape.wide ? DType::kFloat32 : DType::kBFloat16),
        entries_(kContext / shape.ratio),
        query_(x_, {s_.rows, kHeads, kDim}),
        out_(x_, {s_.rows, kHeads, kDim}),
        grad_out_(x_, {s_.rows, kHeads, kDim}),
        grad_query_(x_, {s_.rows, kHeads, kDim}),
        raw_(x_, {kContext / kPage, kPage, kDim}),
        grad_raw_(x_, {kContext / kPage, kPage, kDim}),
        compressed_(x_, {(entries_ + kPage - 1) / kPage, kPage, kDim}),
        grad_compressed_(x_, {(entries_ + kPage - 1) / kPage, kPage, kDim}),
        table_(DType::kInt32, {1, kContext / kPage}),
        sequence_(DType::kInt32, {s_.rows}),
        position_(DType::kInt32, {s_.rows}),
        lengths_(DType::kInt32, {s_.rows}),
        indices_(DType::kInt32, {s_.rows, s_.selected}),
        sink_(DType::kFloat32, {kHeads}),
        grad_sink_(DType::kFloat32, {kHeads}),
        rope_(DType::kFloat32, {s_.rows, kRope / 2, 2}),
        lse_(DType::kFloat32, {s_.rows, kHeads}),
        grad_lse_(DType::kFloat32, {s_.rows, kHeads}),
        context_(bench.pool().context()) {
    Random random;
    for (auto* x : {&query_, &grad_out_, &raw_, &compressed_, &rope_}) x->fill(random);
    sink_.fill(random);
    grad_lse_.fill(random);
    for (int64_t page = 0; page < kContext / kPage; ++page) table_.integer(page) = static_cast<int32_t>(page);
    for (int64_t row = 0; row < s_.rows; ++row) {
      position_.integer(row) = static_cast<int32_t>(kContext - s_.rows + row);
      lengths_.integer(row) = (position_.integer(row) + 1) / static_cast<int32_t>(s_.ratio);
      for (int64_t i = 0; i < s_.selected; ++i) {
        const int64_t stretch = lengths_.integer(row) / s_.selected;
        const int64_t within = random.below(stretch);
        indices_.integer(row * s_.selected + i) = static_cast<int32_t>(i * stretch + within);
      }
    }
    fill_parameters();
  }

  bench::Measurement measurement() {
    int64_t keys = 0;
    for (int64_t row = 0; row < s_.rows; ++row) keys += static_cast<int64_t>(keys_of(row).size());
    bench::Measurement m;
    m.op = "sparse_attention_backward";
    m.impl = context_.best >= Isa::kAvx512 ? "avx512" : isa_name(context_.best);
    m.shape = s_.name;
    m.flops = 10.0 * kHeads * kDim * static_cast<double>(keys);
    // Queries, their gradients, out and its gradient once; keys and their gradients once.
    m.bytes = static_cast<double>(4 * query_.memory.size() + 2 * (raw_.memory.size() + compressed_.memory.size()));
    m.unit = s_.wide ? bench::Unit::kFloat32 : bench::Unit::kBFloat16;
    m.run = [this] { failed_ = !sparse_attention_backward(p_, context_).is_ok(); };
    m.error = [this] { return error(); };
    m.error_limit = s_.wide ? 1e-5 : 0.02;
    return m;
  }

 private:
  struct Place {
    const Array<3>*pool, *grad;
    int64_t entry;
    bool operator==(const Place& other) const { return pool == other.pool && entry == other.entry; }
  };

  void fill_parameters() {
    SparseAttentionParams& f = p_.forward;
    f.query = query_.view;
    f.window_pool = {raw_.view, {}, table_.view, kPage};
    f.compressed = {compressed_.view, {}, table_.view, kPage};
    f.sequence = sequence_.view;
    f.position = position_.view;
    if (s_.selected > 0) f.indices = indices_.view;
    f.lengths = lengths_.view;
    f.sink = sink_.view;
    f.rope = rope_.view;
    f.rope_dim = kRope;
    f.window = kWindow;
    f.scale = 1.0f / std::sqrt(static_cast<float>(kDim));
    f.out = out_.view;
    f.lse = lse_.view;
    f.workspace = scratch_.of(sparse_attention_workspace_bytes(f, context_));
    failed_ = !sparse_attention(f, context_).is_ok();
    p_.grad_out = grad_out_.view;
    p_.grad_lse = grad_lse_.view;
    p_.grad_query = grad_query_.view;
    p_.grad_window = grad_raw_.view;
    p_.grad_compressed = grad_compressed_.view;
    p_.grad_sink = grad_sink_.view;
    p_.workspace = scratch_.of(sparse_attention_backward_workspace_bytes(p_, context_));
  }

  std::vector<Place> keys_of(int64_t row) const {
    std::vector<Place> keys;
    const int64_t end = position_.integer(row) + 1;
    for (int64_t at = end - kWindow; at < end; ++at) keys.push_back({&raw_, &grad_raw_, at});
    const int64_t count = s_.selected > 0 ? s_.selected : lengths_.integer(row);
    for (int64_t i = 0; i < count; ++i) {
      const int64_t entry = s_.selected > 0 ? indices_.integer(row * s_.selected + i) : i;
      keys.push_back({&compressed_, &grad_compressed_, entry});
    }
    return keys;
  }

  // G of one row and head.
  std::vector<double> turned(int64_t at, int64_t row) const {
    std::vector<double> grad(kDim);
    for (int64_t d = 0; d < kDim; ++d) grad[static_cast<size_t>(d)] = grad_out_.get(at * kDim + d);
    for (int64_t i = 0; i < kRope / 2; ++i) {
      double* pair = grad.data() + kStill + 2 * i;
      const double even = pair[0], odd = pair[1], cos = rope_.get((row * kRope / 2 + i) * 2),
                   sin = rope_.get((row * kRope / 2 + i) * 2 + 1);
      pair[0] = even * cos - odd * sin;
      pair[1] = odd * cos + even * sin;
    }
    return grad;
  }

  // The weights of query and G in the gradient of one key.
  std::pair<double, double> weights(int64_t at, const std::vector<double>& grad, const Place& key) const {
    double score = 0, reach = 0, delta = 0;
    for (int64_t d = 0; d < kDim; ++d) {
      const double value = key.pool->get(key.entry * kDim + d);
      score += query_.get(at * kDim + d) * value;
      reach += grad[static_cast<size_t>(d)] * value;
      delta += grad_out_.get(at * kDim + d) * out_.get(at * kDim + d);
    }
    const double lse = lse_.get(at), scale = p_.forward.scale, p = std::exp(score * scale - lse);
    const double kept = 1 / (1 + std::exp(sink_.get(at % kHeads) - lse));
    return {p * (kept * (reach - delta) + grad_lse_.get(at)) * scale, p * kept};
  }

  double query_error() const {
    double worst = 0;
    for (const int64_t row : {int64_t{0}, s_.rows - 1}) {
      for (const int64_t head : {int64_t{0}, kHeads - 1}) {
        const int64_t at = row * kHeads + head;
        const std::vector<double> grad = turned(at, row);
        std::vector<float> actual(kDim), expected(kDim);
        std::vector<double> sums(kDim, 0.0);
        for (const Place& key : keys_of(row)) {
          const double weight = weights(at, grad, key).first;
          for (int64_t d = 0; d < kDim; ++d) {
            sums[static_cast<size_t>(d)] += weight * key.pool->get(key.entry * kDim + d);
          }
        }
        for (int64_t d = 0; d < kDim; ++d) {
          actual[static_cast<size_t>(d)] = static_cast<float>(grad_query_.get(at * kDim + d));
          expected[static_cast<size_t>(d)] = static_cast<float>(sums[static_cast<size_t>(d)]);
        }
        worst = std::max(worst, bench::relative_error(actual, expected));
      }
    }
    return worst;
  }

  double key_error(const Place& key) const {
    std::vector<double> sums(kDim, 0.0);
    for (int64_t row = 0; row < s_.rows; ++row) {
      const std::vector<Place> keys = keys_of(row);
      if (std::find(keys.begin(), keys.end(), key) == keys.end()) continue;
      for (int64_t at = row * kHeads; at < (row + 1) * kHeads; ++at) {
        const std::vector<double> grad = turned(at, row);
        const auto [of_query, of_grad] = weights(at, grad, key);
        for (int64_t d = 0; d < kDim; ++d) {
          sums[static_cast<size_t>(d)] += of_query * query_.get(at * kDim + d) + of_grad * grad[static_cast<size_t>(d)];
        }
      }
    }
    std::vector<float> actual(kDim), expected(sums.begin(), sums.end());
    for (int64_t d = 0; d < kDim; ++d) {
      actual[static_cast<size_t>(d)] = static_cast<float>(key.grad->get(key.entry * kDim + d));
    }
    return bench::relative_error(actual, expected);
  }

  double error() const {
    if (failed_) return 1;
    const std::vector<Place> keys = keys_of(s_.rows - 1);
    return std::max({query_error(), key_error(keys.front()), key_error(keys[100]), key_error(keys.back())});
  }

  Shape s_;
  DType x_;
  int64_t entries_;
  Array<3> query_, out_, grad_out_, grad_query_, raw_, grad_raw_, compressed_, grad_compressed_;
  Array<2> table_;
  Array<1> sequence_, position_, lengths_;
  Array<2> indices_;
  Array<1> sink_, grad_sink_;
  Array<3> rope_;
  Array<2> lse_, grad_lse_;
  bench::Scratch scratch_;
  Context context_;
  SparseAttentionBackwardParams p_{};
  bool failed_ = false;
};

}  // namespace

int main(int argc, char** argv) {
  bench::Bench bench(argc, argv);
  if (!bench.usable()) return bench.exit_code();
  for (const Shape& shape : kShapes) {
    if (bench.quick() && shape.rows > 64) continue;
    Case one(shape, bench);
    bench.measure(one.measurement());
  }
  return bench.exit_code();
}
