// sparse_attention_backward problems for the CUDA kernels: a problem of attention_cases.h with gradients of its
// results, the answer in float64, the comparison.
#pragma once

#include "attention_cases.h"

namespace dsv4::testing {

// The gradient of a pool's rows, dense; of a pool of bytes there is none.
class PoolGradient {
 public:
  explicit PoolGradient(const TestPool& pool)
      : form_(pool.form()), narrow_(of(pool, RowForm::kBf16)), wide_(of(pool, RowForm::kF32)) {}

  AnyView<3> view() {
    if (form_ == RowForm::kFp8) return {};
    return form_ == RowForm::kF32 ? wide_.any<3>() : narrow_.any<3>();
  }
  bool given() const { return form_ != RowForm::kFp8; }
  bool narrow() const { return form_ == RowForm::kBf16; }
  int64_t elements() const { return narrow() ? narrow_.rows() * narrow_.inner() : wide_.rows() * wide_.inner(); }
  double at(int64_t element) {
    if (form_ == RowForm::kF32) return wide_.at(element / wide_.inner(), element % wide_.inner());
    return to_float(narrow_.at(element / narrow_.inner(), element % narrow_.inner()));
  }
  void download() {
    narrow_.download();
    wide_.download();
  }
  bool intact() { return narrow_.intact() && wide_.intact(); }

 private:
  static std::vector<int64_t> of(const TestPool& pool, RowForm form) {
    return pool.form() == form ? pool.shape() : std::vector<int64_t>{1, 1, 1};
  }

  RowForm form_;
  DeviceTensor<bf16> narrow_;
  DeviceTensor<float> wide_;
};

template <class X = bf16>
struct AttentionBackwardProblem {
  AttentionProblem<X> forward;
  DeviceTensor<X> grad_out, grad_query;
  DeviceTensor<float> grad_lse, grad_sink;
  PoolGradient grad_window, grad_compressed;
  std::unique_ptr<DeviceBytes> workspace;
  int64_t workspace_bytes = 0;

  explicit AttentionBackwardProblem(const AttentionCase& c)
      : forward(c),
        grad_out({forward.rows, c.heads, c.head_dim}, c.pad),
        grad_query({forward.rows, c.heads, c.head_dim}, c.pad),
        grad_lse({forward.rows, c.heads}),
        grad_sink({c.heads}),
        grad_window(forward.raw),
        grad_compressed(forward.compressed) {
    for (int64_t row = 0; row < forward.rows; ++row) {
      Random random(c.seed * 104729 +
                    static_cast<uint64_t>(forward.sequence.at(row) * 1000003 + forward.position.at(row)));
      for (int64_t i = 0; i < grad_out.inner(); ++i) grad_out.at(row, i) = from_float<X>(random.uniform(-1, 1));
      for (int64_t h = 0; h < c.heads; ++h) grad_lse.at(row, h) = random.uniform(-1, 1);
    }
    update();
  }

  // After a change of the inputs: lse, in float64, and what lies on the device.
  void update() {
    for (int64_t row = 0; row < forward.rows; ++row) {
      const auto keys = forward.keys(row);
      for (int64_t h = 0; h < forward.c.heads; ++h) {
        double most = -INFINITY, total = 0;
        std::vector<double> scores;
        for (const auto* key : keys) most = std::max(most, scores.emplace_back(score(row, h, *key)));
        for (const double s : scores) total += std::exp(s - most);
        forward.lse.at(row, h) = static_cast<float>(keys.empty() ? INFINITY : most + std::log(total));
      }
    }
    forward.upload();
    forward.lse.upload();
    grad_out.upload();
    grad_lse.upload();
  }

  double score(int64_t row, int64_t head, const std::vector<double>& key) {
    double sum = 0;
    for (int64_t d = 0; d < forward.c.head_dim; ++d) {
      sum += static_cast<double>(to_float(forward.query.at(row, head * forward.c.head_dim + d))) *
             key[static_cast<size_t>(d)];
    }
    return sum * static_cast<double>(forward.scale);
  }

  // grad_out of a row and head, turned and rounded.
  std::vector<double> turned(int64_t row, int64_t head) {
    const AttentionCase& c = forward.c;
    const int64_t pairs = c.rotated ? c.rope_dim / 2 : 0;
    std::vector<double> grad;
    for (int64_t d = 0; d < c.head_dim; ++d) grad.push_back(to_float(grad_out.at(row, head * c.head_dim + d)));
    for (int64_t i = 0; i < pairs; ++i) {
      double* pair = grad.data() + c.head_dim - 2 * pairs + 2 * i;
      const float even = static_cast<float>(pair[0]), odd = static_cast<float>(pair[1]);
      const float cos = forward.rope.at(row, 2 * i), sin = forward.rope.at(row, 2 * i + 1);
      pair[0] = to_float(from_float<X>(even * cos - odd * sin));
      pair[1] = to_float(from_float<X>(odd * cos + even * sin));
    }
    return grad;
  }

  SparseAttentionBackwardParams params() {
    SparseAttentionBackwardParams p = {};
    p.forward = forward.params();
    p.forward.workspace = {};
    p.grad_out = grad_out.template any<3>();
    p.grad_lse = grad_lse.any<2>();
    p.grad_query = grad_query.template any<3>();
    p.grad_window = grad_window.view();
    if (forward.c.entries != Entries::kNone) p.grad_compressed = grad_compressed.view();
    p.grad_sink = grad_sink.any<1>();
    if (workspace == nullptr) {
      workspace_bytes = sm80::sparse_attention_backward_workspace_bytes(p, cuda_context());
      workspace = std::make_unique<DeviceBytes>(static_cast<size_t>(workspace_bytes));
    }
    p.workspace = {workspace->device(), workspace_bytes};
    return p;
  }

  bool intact() {
    return forward.intact() && grad_out.intact() && grad_query.intact() && grad_lse.intact() && grad_sink.intact() &&
           grad_window.intact() && grad_compressed.intact() && workspace->intact();
  }
};

// heads_per_block: 0, as the op chooses.
template <class X>
std::string run_attention_backward(AttentionBackwardProblem<X>& p, int heads_per_block = 0) {
  const SparseAttentionBackwardParams params = p.params();
  if (!sm80::accepts_sparse_attention_backward(params)) return "not accepted";
  const Status status = heads_per_block == 0 ? sm80::sparse_attention_backward(params, cuda_context())
                                             : sm80::sparse_attention_backward(params, cuda_context(), heads_per_block);
  if (!status.is_ok()) return status.message();
  if (!finish_device()) return "the device reports an error";
  p.grad_query.download();
  p.grad_window.download();
  p.grad_compressed.download();
  p.grad_sink.download();
  return p.intact() ? "" : "something was written where it should not be";
}

// A sum in float64 and what its float32 computation may differ by.
struct BoundedSum {
  double value = 0, squares = 0, size = 0;

  // weight * factor, where the weight is known to `error` but for its rounding.
  void add(double weight, double error, double factor) {
    value += weight * factor;
    squares += weight * factor * weight * factor;
    size += (std::abs(weight) * 2e-6 + error) * std::abs(factor);
  }
  // rounded: weights were, to bfloat16; bits: of the mantissa that the result has.
  double limit(bool rounded, int bits) const {
    const double spacing = value == 0 ? 0 : std::ldexp(1.0, std::ilogb(value) - bits);
    return 1.02 * (0.501 * spacing + size + (rounded ? std::sqrt(squares) * 4 * 0.29 / 128 : 0)) + 1e-30;
  }
};

// What the kernels made of the problem against float64: "" or the first value beyond its limit. Limits: half a unit in
// the last place for each rounding of a result or, where tensor cores multiply, of weights, which average out (4 times
// their standard error); 2e-6 for sums in float32, and for an exponential of a score as many times as the score is
// large.
template <class X>
class BackwardComparison {
 public:
  explicit BackwardComparison(AttentionBackwardProblem<X>& p)
      : p_(p), c_(p.forward.c), dim_(static_cast<size_t>(c_.head_dim)) {
    tensor_cores_ = sizeof(X) == 2 && !(c_.window_rows == RowForm::kF32) &&
                    (c_.entries == Entries::kNone || c_.entry_rows != RowForm::kF32);
  }

  std::string run() {
    const size_t heads = static_cast<size_t>(c_.heads);
    sink_.assign(heads, {});
    window_.assign(p_.grad_window.given() ? static_cast<size_t>(p_.grad_window.elements()) : 0, {});
    compressed_.assign(p_.grad_compressed.given() ? static_cast<size_t>(p_.grad_compressed.elements()) : 0, {});
    std::string fault;
    for (int64_t row = 0; row < p_.forward.rows && fault.empty(); ++row) {
      for (int64_t h = 0; h < c_.heads && fault.empty(); ++h) fault = differentiate(row, h);
    }
    if (fault.empty()) fault = compare_pool("grad_window", p_.grad_window, window_);
    if (fault.empty() && c_.entries != Entries::kNone)
      fault = compare_pool("grad_compressed", p_.grad_compressed, compressed_);
    for (size_t h = 0; h < heads && fault.empty(); ++h) {
      fault =
          compare("grad_sink", static_cast<int64_t>(h), p_.grad_sink.at(static_cast<int64_t>(h)), sink_[h], false, 23);
    }
    return fault;
  }

 private:
  static std::string compare(const char* name, int64_t at, double got, const BoundedSum& sum, bool rounded, int bits) {
    const double limit = sum.limit(rounded, bits);
    if (std::abs(got - sum.value) <= limit) return "";
    return std::string(name) + "[" + std::to_string(at) + "]: got " + std::to_string(got) + ", expected " +
           std::to_string(sum.value) + ", limit " + std::to_string(limit);
  }

  std::string compare_pool(const char* name, PoolGradient& grad, const std::vector<BoundedSum>& sums) {
    std::string fault;
    for (size_t i = 0; i < sums.size() && fault.empty(); ++i) {
      const int64_t at = static_cast<int64_t>(i);
      fault = compare(name, at, grad.at(at), sums[i], tensor_cores_, grad.narrow() ? 7 : 23);
    }
    return fault;
  }

  std::string differentiate(int64_t row, int64_t h) {
    const auto keys = p_.forward.placed_keys(row);
    const std::vector<double> grad = p_.turned(row, h);
    const size_t count = keys.size();
    std::vector<double> p(count), reach(count), size(count);
    double most = -INFINITY, total = 0, mean = 0, mean_size = 0, largest = 0;
    for (size_t j = 0; j < count; ++j) {
      for (size_t d = 0; d < dim_; ++d) {
        reach[j] += grad[d] * (*keys[j].values)[d];
        size[j] += std::abs(grad[d] * (*keys[j].values)[d]);
      }
      p[j] = p_.score(row, h, *keys[j].values);
      most = std::max(most, p[j]);
      largest = std::max(largest, std::abs(p[j]));
    }
    for (double& s : p) total += s = std::exp(s - most);
    for (size_t j = 0; j < count; ++j) {
      p[j] /= total;
      mean += p[j] * reach[j];
      mean_size += p[j] * size[j];
    }
    const double sink = p_.forward.sink.at(h), lse = most + std::log(total), scale = p_.forward.scale;
    const double kept = count == 0 ? 0 : 1 / (1 + std::exp(sink - lse)), grad_lse = p_.grad_lse.at(row, h);
    const double relative = 2e-6 * (1 + 2 * largest);
    std::vector<BoundedSum> query(dim_);
    for (size_t j = 0; j < count; ++j) {
      const double of_query = scale * p[j] * (kept * (reach[j] - kept * mean) + grad_lse), of_grad = p[j] * kept;
      const double error = scale * p[j] * relative * (kept * (size[j] + mean_size) + std::abs(grad_lse));
      std::vector<BoundedSum>& pool = keys[j].window ? window_ : compressed_;
      for (size_t d = 0; d < dim_; ++d) {
        query[d].add(of_query, error, (*keys[j].values)[d]);
        if (pool.empty()) continue;
        BoundedSum& sum = pool[static_cast<size_t>(keys[j].pool_row) * dim_ + d];
        sum.add(of_query, error, to_float(p_.forward.query.at(row, h * c_.head_dim + static_cast<int64_t>(d))));
        sum.add(of_grad, of_grad * relative, grad[d]);
      }
    }
    const double gate = count == 0 ? 0 : kept * (1 - kept);
    sink_[static_cast<size_t>(h)].add(-gate * mean, gate * relative * mean_size, 1);
    std::string fault;
    for (size_t d = 0; d < dim_ && fault.empty(); ++d) {
      const int64_t at = h * c_.head_dim + static_cast<int64_t>(d);
      fault = compare("grad_query", row * p_.grad_query.inner() + at, to_float(p_.grad_query.at(row, at)), query[d],
                      tensor_cores_, sizeof(X) == 2 ? 7 : 23);
    }
    return fault;
  }

  AttentionBackwardProblem<X>& p_;
  const AttentionCase& c_;
  size_t dim_;
  bool tensor_cores_;
  std::vector<BoundedSum> window_, compressed_, sink_;
};

template <class X>
std::string compare_attention_backward(AttentionBackwardProblem<X>& p) {
  return BackwardComparison<X>(p).run();
}

template <class X>
std::string try_attention_backward_of(const AttentionCase& c, int heads_per_block) {
  AttentionBackwardProblem<X> p(c);
  const std::string fault = run_attention_backward(p, heads_per_block);
  return fault.empty() ? compare_attention_backward(p) : fault;
}

inline std::string try_attention_backward(const AttentionCase& c, int heads_per_block = 0) {
  return c.f32_query ? try_attention_backward_of<float>(c, heads_per_block)
                     : try_attention_backward_of<bf16>(c, heads_per_block);
}

// Bits of all gradients: each row's query, then pools and sink.
template <class X>
std::vector<std::vector<uint32_t>> gradient_bits(AttentionBackwardProblem<X>& p) {
  std::vector<std::vector<uint32_t>> bits;
  for (int64_t row = 0; row < p.forward.rows; ++row) {
    std::vector<uint32_t>& of_row = bits.emplace_back();
    for (int64_t i = 0; i < p.grad_query.inner(); ++i) {
      of_row.push_back(bits_from_float(to_float(p.grad_query.at(row, i))));
    }
  }
  for (PoolGradient* grad : {&p.grad_window, &p.grad_compressed}) {
    std::vector<uint32_t>& of_pool = bits.emplace_back();
    for (int64_t i = 0; grad->given() && i < grad->elements(); ++i) {
      of_pool.push_back(bits_from_float(static_cast<float>(grad->at(i))));
    }
  }
  std::vector<uint32_t>& of_sink = bits.emplace_back();
  for (int64_t h = 0; h < p.forward.c.heads; ++h) of_sink.push_back(bits_from_float(p.grad_sink.at(h)));
  return bits;
}

}  // namespace dsv4::testing
