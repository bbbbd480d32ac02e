// The gradient of plain experts, stage by stage, each from the stage before it as the kernels left it. The gradients of
// gate and up and the rows that w2 multiplied, from the operands: float64 sums, give or take what float32 sums may
// lose, through the roundings of the definition; what lies between the two ends passes. Gradients of the matrices and
// of x, from the kernels' own rows: a float32 sum and one rounding.
#pragma once

#include "cpu/moe.h"
#include "moe_stages.h"

namespace dsv4::testing {

struct GradientCase {
  int64_t tokens = 5, hidden = 96, inter = 72, experts = 6, top_k = 3;
  int64_t shared_inter = 40;  // 0: no shared expert
  float limit = 0.8f;
  int64_t pad = 0;  // elements between one row and the next, of tokens, matrices and results
  uint64_t seed = 1;

  bool has_shared() const { return shared_inter > 0; }
};

// A matrix of every expert, in rows that lie apart.
template <class X>
struct PaddedMatrix {
  int64_t experts, out, in, pad;
  DeviceTensor<X> memory;

  PaddedMatrix(int64_t e, int64_t o, int64_t i, int64_t p) : experts(e), out(o), in(i), pad(p), memory({e, o, i + p}) {}
  X& at(int64_t expert, int64_t row, int64_t k) { return memory.at(expert, row * (in + pad) + k); }
  void fill(uint64_t seed) {
    Random random(seed);
    const float width = 1.7f / std::sqrt(static_cast<float>(in));
    for (int64_t i = 0; i < experts * out * in; ++i) {
      at(i / (out * in), i / in % out, i % in) = from_float<X>(random.uniform(-width, width));
    }
    memory.upload();
  }
  AnyView<3> view() {
    AnyView<3> v = memory.template any<3>();
    v.shape[2] = in;
    return v;
  }
  // Memory starts as a pattern, NaN, which its padding keeps.
  bool intact() {
    bool kept = memory.intact();
    for (int64_t i = 0; i < experts * out * pad; ++i) {
      const float value = to_float(memory.at(i / (out * pad), i / pad % out * (in + pad) + in + i % pad));
      kept = kept && value != value;
    }
    return kept;
  }
};

template <class X>
struct GradientProblem {
  GradientCase c;
  DeviceTensor<X> x, grad, grad_x;
  DeviceTensor<float> weights, grad_weights;
  DeviceTensor<int32_t> indices;
  std::vector<PaddedMatrix<X>> matrices, results;  // w1, w3, w2, then the shared expert's
  sm80::GradientCut cut = {};                      // of the last run
  std::unique_ptr<DeviceBytes> workspace;          // what the last run left

  explicit GradientProblem(const GradientCase& the_case)
      : c(the_case),
        x({c.tokens, c.hidden}, c.pad),
        grad({c.tokens, c.hidden}, c.pad),
        grad_x({c.tokens, c.hidden}, c.pad),
        weights({c.tokens, c.top_k}),
        grad_weights({c.tokens, c.top_k}),
        indices({c.tokens, c.top_k}) {
    for (int64_t n = 0; n < (c.has_shared() ? 6 : 3); ++n) {
      const int64_t inter = n < 3 ? c.inter : c.shared_inter, experts = n < 3 ? c.experts : 1;
      for (auto* list : {&matrices, &results}) {
        list->emplace_back(experts, n % 3 == 2 ? c.hidden : inter, n % 3 == 2 ? inter : c.hidden, c.pad);
      }
      matrices.back().fill(c.seed * 7 + static_cast<uint64_t>(n));
    }
    // A token's data depends on its number alone, not on how many there are.
    for (int64_t t = 0; t < c.tokens; ++t) {
      Random random(c.seed * 1000003 + static_cast<uint64_t>(t));
      for (int64_t i = 0; i < c.hidden; ++i) {
        x.at(t, i) = from_float<X>(random.uniform(-2, 2));
        grad.at(t, i) = from_float<X>(random.uniform(-1, 1));
      }
      for (int64_t k = 0; k < c.top_k; ++k) {
        weights.at(t, k) = random.uniform(0.1f, 1);
        // Some experts get nothing, some pairs have none, some tokens the same expert twice.
        const int64_t e = static_cast<int64_t>((random.bits() >> 20) % static_cast<uint64_t>(c.experts + 2)) - 1;
        indices.at(t, k) = static_cast<int32_t>(e == 2 && c.experts > 3 ? 3 : e);
      }
    }
    upload();
  }

  void upload() {
    x.upload();
    grad.upload();
    weights.upload();
    indices.upload();
  }

  MoeExpertsBackwardParams params() {
    MoeExpertsBackwardParams p = {};
    p.grad = grad.template any<2>();
    p.x = x.template any<2>();
    p.weights = weights.const_view<2>();
    p.indices = indices.any<2>();
    p.indices.dtype = DType::kInt32;
    for (size_t n = 0; n < matrices.size(); ++n) {
      (n < 3 ? p.matrices[n] : p.shared[n - 3]) = matrices[n].view();
      (n < 3 ? p.grad_matrices[n] : p.grad_shared[n - 3]) = results[n].view();
    }
    p.swiglu_limit = c.limit;
    p.grad_x = grad_x.template any<2>();
    p.grad_weights = grad_weights.view<2>();
    return p;
  }

  // The message of what went wrong, or nothing. No cut: the one that the op takes.
  std::string run(const sm80::GradientCut* wanted = nullptr) { return run(params(), wanted); }
  std::string run(MoeExpertsBackwardParams p, const sm80::GradientCut* wanted) {
    cut = wanted != nullptr ? *wanted : sm80::gradient_cut(p);
    const int64_t bytes = sm80::moe_experts_backward_workspace_bytes(p, cut);
    workspace = std::make_unique<DeviceBytes>(static_cast<size_t>(bytes));
    p.workspace = {workspace->device(), bytes};
    const Status status = sm80::moe_experts_backward(p, cut, cuda_context());
    if (!status.is_ok()) return status.message();
    if (!finish_device()) return "the kernel failed";
    grad_x.download();
    grad_weights.download();
    workspace->download();
    bool intact = x.intact() && grad.intact() && grad_x.intact() && weights.intact() && grad_weights.intact() &&
                  indices.intact() && workspace->intact();
    for (auto* list : {&matrices, &results}) {
      for (PaddedMatrix<X>& matrix : *list) intact = matrix.intact() && intact;
    }
    return intact ? "" : "wrote outside its outputs";
  }

  // Of token t: the gradients of its row and of its weights.
  std::vector<uint32_t> bits_of(int64_t t) {
    std::vector<uint32_t> bits;
    for (int64_t i = 0; i < c.hidden; ++i) bits.push_back(bits_from_float(to_float(grad_x.at(t, i))));
    for (int64_t k = 0; k < c.top_k; ++k) bits.push_back(bits_from_float(grad_weights.at(t, k)));
    return bits;
  }
  // Of one result: the gradient of x, of the routing weights, of a matrix.
  std::vector<uint32_t> bits_of_result(size_t n) {
    std::vector<uint32_t> bits;
    const auto add = [&](float value) { bits.push_back(bits_from_float(value)); };
    if (n == 0) {
      for (int64_t i = 0; i < c.tokens * c.hidden; ++i) add(to_float(grad_x.at(i / c.hidden, i % c.hidden)));
    } else if (n == 1) {
      for (int64_t i = 0; i < c.tokens * c.top_k; ++i) add(grad_weights.at(i / c.top_k, i % c.top_k));
    } else {
      PaddedMatrix<X>& r = results[n - 2];
      for (int64_t i = 0; i < r.experts * r.out * r.in; ++i) {
        add(to_float(r.at(i / (r.out * r.in), i / r.in % r.out, i % r.in)));
      }
    }
    return bits;
  }
  // Of all results.
  std::vector<uint32_t> bits() {
    std::vector<uint32_t> all;
    for (size_t n = 0; n < 2 + results.size(); ++n) {
      const std::vector<uint32_t> own = bits_of_result(n);
      all.insert(all.end(), own.begin(), own.end());
    }
    return all;
  }
};

template <class X>
class GradientStages {
 public:
  explicit GradientStages(GradientProblem<X>& p) : p_(p) {
    const int64_t pairs = p.c.tokens * p.c.top_k;
    for (int64_t e = 0; e < p.c.experts; ++e) {
      for (int64_t pair = 0; pair < pairs; ++pair) {
        if (p.indices.at(pair / p.c.top_k, pair % p.c.top_k) == e) rows_.push_back({e, pair / p.c.top_k, pair});
      }
    }
    if (p.c.has_shared()) {
      for (int64_t t = 0; t < p.c.tokens; ++t) shared_rows_.push_back({0, t, -1});
    }
  }

  // What is wrong, or nothing.
  std::string wrong() {
    std::string found = wrong_group(false);
    if (found.empty() && p_.c.has_shared()) found = wrong_group(true);
    if (found.empty()) found = wrong_inputs();
    for (int64_t t = 0; t < p_.c.tokens && found.empty(); ++t) {
      for (int64_t k = 0; k < p_.c.top_k && found.empty(); ++k) {
        const int32_t e = p_.indices.at(t, k);
        if ((e < 0 || e >= p_.c.experts) && bits_from_float(p_.grad_weights.at(t, k)) != 0) found = "weight of nobody";
      }
    }
    // Two ends that differ are rare in bfloat16, or the checks would say little.
    if (found.empty() && sizeof(X) == 2 && unsure_ > 4 + checked_ / 25) {
      found = std::to_string(unsure_) + " of " + std::to_string(checked_) + " numbers may be two values";
    }
    return found;
  }

 private:
  struct Row {
    int64_t expert, token, pair;
  };

  // A float32 sum of products whose magnitudes add up to `size`.
  static Ends sum_of(double sum, double size) { return {sum - size * 0x1p-21, sum + size * 0x1p-21}; }
  static Ends rounded(const Ends& ends) {
    return sizeof(X) == 2 ? Ends{rounded_to<X>(ends.low), rounded_to<X>(ends.high)} : ends;
  }

  PaddedMatrix<X>& matrix(int n, bool shared) { return p_.matrices[static_cast<size_t>(n + (shared ? 3 : 0))]; }
  PaddedMatrix<X>& result(int n, bool shared) { return p_.results[static_cast<size_t>(n + (shared ? 3 : 0))]; }
  const std::vector<Row>& rows(bool shared) const { return shared ? shared_rows_ : rows_; }

  // As the kernels left it. kind: the gradients of gate and up, what w2 multiplied.
  double inner(bool shared, int kind, int64_t row, int64_t i) {
    const sm80::GradientRows at = sm80::gradient_rows(p_.params(), p_.cut, shared);
    const int64_t from[] = {at.gate, at.up, at.inner}, width = matrix(0, shared).out;
    X value;
    memcpy(&value, static_cast<const uint8_t*>(p_.workspace->host()) + from[kind] + (row * width + i) * sizeof(X),
           sizeof(X));
    return to_float(value);
  }

  std::string check(const char* what, int64_t row, int64_t i, double got, Ends ends, bool narrow) {
    ++checked_;
    unsure_ += narrow && ends.low != ends.high && !ends.is_nan();
    if (ends.holds(got)) return "";
    char text[160];
    snprintf(text, sizeof(text), "%s [%d, %d]: got %.9g, expected %.9g to %.9g", what, static_cast<int>(row),
             static_cast<int>(i), got, ends.low, ends.high);
    return text;
  }

  struct InnerEnds {
    Ends of[3], part;  // by kind; grad times what it is the gradient of
  };

  // From gate, up and the gradient of the inner value, each one of two; a few float32 operations, the exponential's up
  // to two units off.
  InnerEnds inner_ends(const Ends& gate, const Ends& up, const Ends& grad, double weight) const {
    InnerEnds e;
    for (Ends* ends : {&e.of[0], &e.of[1], &e.of[2], &e.part}) *ends = {INFINITY, -INFINITY};
    const double limit = p_.c.limit > 0 ? p_.c.limit : INFINITY;
    for (int corner = 0; corner < 8; ++corner) {
      const double raw_gate = corner % 2 == 0 ? gate.low : gate.high, raw_up = corner / 2 % 2 == 0 ? up.low : up.high;
      const double d = corner / 4 == 0 ? grad.low : grad.high;
      const double g = raw_gate > limit ? limit : raw_gate, u = raw_up > limit    ? limit
                                                                : raw_up < -limit ? -limit
                                                                                  : raw_up;
      const double s = 1 / (1 + std::exp(-g)), silu = g * s;
      const double values[] = {raw_gate > limit ? 0 : d * weight * u * s * (1 + g * (1 - s)),
                               std::fabs(raw_up) > limit ? 0 : d * weight * silu, silu * u * weight, d * silu * u};
      for (int kind = 0; kind < 4; ++kind) {
        Ends& to = kind < 3 ? e.of[kind] : e.part;
        // 1 + g (1 - s) is near 0 where its terms are not.
        const double off = std::fabs(kind == 0 ? d * weight * u * s * (1 + std::fabs(g) * (1 - s)) : values[kind]);
        const double width = values[kind] == 0 ? 0 : off * 0x1p-20 + 1e-37;
        to = {std::min(to.low, values[kind] - width), std::max(to.high, values[kind] + width)};
      }
    }
    for (Ends& ends : e.of) ends = rounded(ends);
    return e;
  }

  std::string wrong_group(bool shared) {
    std::string found;
    const std::vector<Row>& all = rows(shared);
    for (size_t row = 0; row < all.size() && found.empty(); ++row) found = wrong_row(shared, row);
    for (int n = 0; n < 3 && found.empty(); ++n) found = wrong_matrix(shared, n);
    return found;
  }

  std::string wrong_row(bool shared, size_t place) {
    const Row& row = rows(shared)[place];
    const auto at = static_cast<int64_t>(place);
    const double weight = shared ? 1 : p_.weights.at(row.token, row.pair % p_.c.top_k);
    const char* const names[] = {"gradient of gate", "gradient of up", "inner row"};
    Ends parts = {0, 0};
    double size = 0;
    for (int64_t i = 0; i < matrix(0, shared).out; ++i) {
      double sum[3] = {}, sizes[3] = {};
      for (int64_t d = 0; d < p_.c.hidden; ++d) {
        const double x = to_float(p_.x.at(row.token, d)), grad = to_float(p_.grad.at(row.token, d));
        const double terms[] = {to_float(matrix(0, shared).at(row.expert, i, d)) * x,
                                to_float(matrix(1, shared).at(row.expert, i, d)) * x,
                                to_float(matrix(2, shared).at(row.expert, d, i)) * grad};
        for (int n = 0; n < 3; ++n) sum[n] += terms[n], sizes[n] += std::fabs(terms[n]);
      }
      const InnerEnds ends = inner_ends(rounded(sum_of(sum[0], sizes[0])), rounded(sum_of(sum[1], sizes[1])),
                                        sum_of(sum[2], sizes[2]), weight);
      for (int kind = 0; kind < 3; ++kind) {
        const std::string wrong = check(names[kind], at, i, inner(shared, kind, at, i), ends.of[kind], sizeof(X) == 2);
        if (!wrong.empty()) return wrong;
      }
      parts = {parts.low + ends.part.low, parts.high + ends.part.high};
      size += std::max(std::fabs(ends.part.low), std::fabs(ends.part.high));
    }
    if (shared) return "";
    const Ends total = {parts.low - size * 0x1p-21, parts.high + size * 0x1p-21};
    return check("gradient of a weight", row.token, row.pair % p_.c.top_k,
                 p_.grad_weights.at(row.token, row.pair % p_.c.top_k), total, false);
  }

  std::string wrong_matrix(bool shared, int n) {
    PaddedMatrix<X>& to = result(n, shared);
    const char* const names[] = {"gradient of w1", "gradient of w3", "gradient of w2"};
    for (int64_t e = 0; e < to.experts; ++e) {
      for (int64_t i = 0; i < to.out * to.in; ++i) {
        double sum = 0, size = 0;
        const std::vector<Row>& all = rows(shared);
        for (size_t row = 0; row < all.size(); ++row) {
          if (all[row].expert != e) continue;
          const int64_t out = i / to.in, in = i % to.in;
          const double token =
              n == 2 ? to_float(p_.grad.at(all[row].token, out)) : to_float(p_.x.at(all[row].token, in));
          const double one = token * inner(shared, n, static_cast<int64_t>(row), n == 2 ? in : out);
          sum += one;
          size += std::fabs(one);
        }
        const std::string wrong =
            check(names[n], e, i, to_float(to.at(e, i / to.in, i % to.in)), rounded(sum_of(sum, size)), sizeof(X) == 2);
        if (!wrong.empty()) return wrong;
      }
    }
    return "";
  }

  std::string wrong_inputs() {
    for (int64_t t = 0; t < p_.c.tokens; ++t) {
      for (int64_t d = 0; d < p_.c.hidden; ++d) {
        double sum = 0, size = 0;
        for (const bool shared : {false, true}) {
          const std::vector<Row>& all = rows(shared);
          for (size_t row = 0; row < all.size(); ++row) {
            if (all[row].token != t) continue;
            for (int64_t i = 0; i < 2 * matrix(0, shared).out; ++i) {
              const int n = static_cast<int>(i % 2);
              const double one = inner(shared, n, static_cast<int64_t>(row), i / 2) *
                                 to_float(matrix(n, shared).at(all[row].expert, i / 2, d));
              sum += one;
              size += std::fabs(one);
            }
          }
        }
        const std::string wrong =
            check("gradient of x", t, d, to_float(p_.grad_x.at(t, d)), rounded(sum_of(sum, size)), sizeof(X) == 2);
        if (!wrong.empty()) return wrong;
      }
    }
    return "";
  }

  GradientProblem<X>& p_;
  std::vector<Row> rows_, shared_rows_;
  int64_t unsure_ = 0, checked_ = 0;
};

// What is wrong, or nothing.
template <class X>
std::string try_gradient(const GradientCase& c, const sm80::GradientCut* cut = nullptr) {
  GradientProblem<X> p(c);
  const std::string fault = p.run(cut);
  return fault.empty() ? GradientStages<X>(p).wrong() : fault;
}

}  // namespace dsv4::testing
