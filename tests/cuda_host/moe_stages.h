// The experts' results, stage by stage, each from the stage before it as the kernel left it: rounding that one stage
// does another way than float64 is then not an error of the next. Inner activations from x: float64 sums, give or take
// what float32 sums may lose, through the roundings of the definition; what lies between the two ends passes, and
// almost everywhere both ends are one value. Outputs of w2 from the kernel's inner activations: one rounding. Their
// sum: to the bit.
#pragma once

#include "moe_cases.h"

namespace dsv4::testing {

struct Ends {
  double low, high;
  bool is_nan() const { return std::isnan(low) || std::isnan(high); }
  bool holds(double value) const { return is_nan() ? std::isnan(value) : value >= low && value <= high; }
};

// One rounding to the type of the activations.
template <class X>
double rounded_to(double value) {
  return to_float(from_float<X>(static_cast<float>(value)));
}

inline double fp8_round_trip(double value, uint8_t scale) {
  if (scale == 255) return NAN;
  return static_cast<double>(e4m3_value(e4m3_code(static_cast<float>(value) * inverse_scale(scale)))) *
         e8m0_value(scale);
}

// The scale of values of this size at most; NaN and infinity have none.
inline uint8_t fp8_scale_of(double most) { return fp8_scale(bits_from_float(static_cast<float>(std::fabs(most)))); }

template <class X>
class MoeStages {
 public:
  explicit MoeStages(MoeProblem<X>& p) : p_(p), at_(sm80::expert_results(p.params(), p.cut)) {
    const int64_t tokens = p.c.tokens;
    first_ = tokens == 0 ? 0 : (tokens - 1) / p.cut.tokens * p.cut.tokens;
    for (int64_t pair = first_ * p.c.top_k; pair < tokens * p.c.top_k; ++pair) {
      const int64_t e = expert(pair);
      if (e >= 0 && e < p.c.experts) rows_.push_back(pair);
    }
    std::stable_sort(rows_.begin(), rows_.end(), [&](int64_t a, int64_t b) { return expert(a) < expert(b); });
  }

  // Of the tokens taken last: what is wrong, or nothing.
  std::string wrong() {
    std::string found;
    for (size_t row = 0; row < rows_.size() && found.empty(); ++row) {
      const int64_t t = rows_[row] / p_.c.top_k, k = rows_[row] % p_.c.top_k;
      found = wrong_row(static_cast<int64_t>(row), t, expert(rows_[row]), p_.weights.at(t, k), false);
    }
    for (int64_t t = first_; t < p_.c.tokens && p_.has_shared() && found.empty(); ++t) {
      found = wrong_row(t - first_, t, 0, 1.0f, true);
    }
    for (int64_t t = first_; t < p_.c.tokens && found.empty(); ++t) found = wrong_sum(t);
    // Two ends that differ are rare, or the check of the inner activations would say little: of a hundred one, or four
    // where sums may be four times as far off.
    const double share = kSumError / 0x1p-22 / 100;
    if (found.empty() && static_cast<double>(unsure_) > 2 + share * static_cast<double>(inner_)) {
      found = std::to_string(unsure_) + " of " + std::to_string(inner_) + " inner activations may be two values";
    }
    return found;
  }

 private:
  int64_t expert(int64_t pair) { return p_.indices.at(pair / p_.c.top_k, pair % p_.c.top_k); }

  // What a matrix of this format multiplies.
  std::vector<double> input(int64_t t, WeightFormat format) {
    std::vector<double> x;
    for (int64_t i = 0; i < p_.c.hidden; ++i) x.push_back(to_float(p_.x.at(t, i)));
    for (size_t first = 0; first < x.size() && format != WeightFormat::kPlain; first += 128) {
      const size_t end = std::min(x.size(), first + 128);
      double most = 0;
      for (size_t i = first; i < end; ++i) most = std::isnan(x[i]) ? x[i] : std::max(most, std::fabs(x[i]));
      for (size_t i = first; i < end; ++i) x[i] = fp8_round_trip(x[i], fp8_scale_of(most));
    }
    return x;
  }

  // A float32 sum of products, rounded. Products that are all multiples of a number large enough add up without error,
  // in any order: a sum in the middle of two roundings then has one.
  static Ends product(ExpertTensor<X>& w, int64_t expert, int64_t row, const std::vector<double>& x) {
    double sum = 0, size = 0;
    for (int64_t k = 0; k < w.in; ++k) {
      const double one = w.at(expert, row, k) * x[static_cast<size_t>(k)];
      sum += one;
      size += std::fabs(one);
    }
    const double off = size * kSumError;
    const Ends ends = {rounded_to<X>(sum - off), rounded_to<X>(sum + off)};
    if (ends.low == ends.high || ends.is_nan()) return ends;
    const double unit = std::ldexp(1.0, std::ilogb(size) - 23);
    for (int64_t k = 0; k < w.in; ++k) {
      if (std::fmod(w.at(expert, row, k) * x[static_cast<size_t>(k)], unit) != 0) return ends;
    }
    return {rounded_to<X>(sum), rounded_to<X>(sum)};
  }

  double swiglu(double gate, double up, double weight) const {
    const double limit = p_.c.limit;
    if (limit > 0) {
      gate = gate > limit ? limit : gate;
      up = up > limit ? limit : up < -limit ? -limit : up;
    }
    return gate / (1 + std::exp(-gate)) * up * weight;
  }

  // Five float32 operations, the exponential's up to two units off; one rounding.
  Ends activation(const Ends& gate, const Ends& up, double weight) const {
    if (gate.is_nan() || up.is_nan()) return {NAN, NAN};
    Ends of = {INFINITY, -INFINITY};
    for (const double g : {gate.low, gate.high}) {
      for (const double u : {up.low, up.high}) {
        const double value = swiglu(g, u, weight), off = std::fabs(value) * 0x1p-21 + 1e-40;
        of = {std::min(of.low, value - off), std::max(of.high, value + off)};
      }
    }
    return sizeof(X) == 2 ? Ends{rounded_to<X>(of.low), rounded_to<X>(of.high)} : of;
  }

  // A block of inner activations after the quantiser. Its scale too may be one of two.
  void quantise(Ends* block, size_t count) const {
    Ends most = {0, 0};
    for (size_t i = 0; i < count; ++i) {
      if (block[i].is_nan()) most = {NAN, NAN};
      if (most.is_nan()) continue;
      const bool crosses = block[i].low < 0 && block[i].high > 0;
      const double low = std::fabs(block[i].low), high = std::fabs(block[i].high);
      most = {std::max(most.low, crosses ? 0.0 : std::min(low, high)), std::max(most.high, std::max(low, high))};
    }
    const uint8_t scales[2] = {fp8_scale_of(most.low), fp8_scale_of(most.high)};
    for (size_t i = 0; i < count; ++i) {
      const double low = fp8_round_trip(block[i].low, scales[0]), high = fp8_round_trip(block[i].high, scales[0]);
      const double low2 = fp8_round_trip(block[i].low, scales[1]), high2 = fp8_round_trip(block[i].high, scales[1]);
      block[i] = {std::min(low, low2), std::max(high, high2)};
    }
  }

  std::vector<Ends> expected_inner(int64_t t, int64_t e, double weight, bool is_shared) {
    ExpertTensor<X>&w1 = is_shared ? p_.s1 : p_.w1, &w3 = is_shared ? p_.s3 : p_.w3, &w2 = is_shared ? p_.s2 : p_.w2;
    const std::vector<double> x1 = input(t, w1.format), x3 = input(t, w3.format);
    std::vector<Ends> inner;
    for (int64_t row = 0; row < w1.out; ++row) {
      inner.push_back(activation(product(w1, e, row, x1), product(w3, e, row, x3), weight));
    }
    for (size_t first = 0; first < inner.size() && w2.format != WeightFormat::kPlain; first += 128) {
      quantise(&inner[first], std::min<size_t>(128, inner.size() - first));
    }
    return inner;
  }

  const uint8_t* memory(int64_t at) const { return static_cast<const uint8_t*>(p_.workspace->host()) + at; }

  // As the kernel wrote it, padding included.
  std::vector<double> actual_inner(int64_t row, ExpertTensor<X>& w2, bool is_shared) const {
    const bool plain = w2.format == WeightFormat::kPlain;
    const int64_t padded = (w2.in + 127) / 128 * 128, planes = plain && sizeof(X) == 4 ? 3 : 1;
    const uint8_t* from = memory(is_shared ? at_.shared_inner : at_.inner) + row * planes * padded * 2;
    std::vector<double> inner;
    for (int64_t k = 0; k < padded; ++k) {
      // Quantised weights meet unit c of a block at 4 (c % 4) + c / 4, its inputs i and i + 4 side by side.
      const int64_t unit = k / 8 % 16, i = k % 8;
      const int64_t at = plain ? k : k / 128 * 128 + (unit % 4 * 4 + unit / 4) * 8 + i % 4 * 2 + i / 4;
      double value = 0;
      for (int64_t plane = 0; plane < planes; ++plane) {
        bf16 part;
        memcpy(&part, from + (plane * padded + at) * 2, 2);
        value += to_float(part);
      }
      inner.push_back(value);
    }
    return inner;
  }

  float output(int64_t row, int64_t i, bool is_shared) const {
    X value;
    memcpy(&value, memory(is_shared ? at_.shared_outputs : at_.outputs) + (row * p_.c.hidden + i) * sizeof(X),
           sizeof(X));
    return to_float(value);
  }

  // One row of one expert.
  std::string wrong_row(int64_t row, int64_t t, int64_t e, float weight, bool is_shared) {
    const std::string where = "token " + std::to_string(t) + (is_shared ? ", shared" : ", expert " + std::to_string(e));
    const auto differs = [&](const char* what, int64_t i, double got, const Ends& expected) {
      char text[160];
      snprintf(text, sizeof(text), "%s, %s %d: got %.9g, expected %.9g to %.9g", where.c_str(), what,
               static_cast<int>(i), got, expected.low, expected.high);
      return std::string(text);
    };
    ExpertTensor<X>& w2 = is_shared ? p_.s2 : p_.w2;
    const std::vector<Ends> expected = expected_inner(t, e, weight, is_shared);
    std::vector<double> inner = actual_inner(row, w2, is_shared);
    for (size_t k = 0; k < inner.size(); ++k) {
      const Ends ends = k < expected.size() ? expected[k] : Ends{0, 0};
      if (!ends.holds(inner[k])) return differs("inner", static_cast<int64_t>(k), inner[k], ends);
      const bool wide = sizeof(X) == 4 && w2.format == WeightFormat::kPlain;  // not rounded: always a range
      unsure_ += !wide && !ends.is_nan() && ends.low != ends.high;
      ++inner_;
    }
    for (int64_t i = 0; i < p_.c.hidden; ++i) {
      const Ends ends = product(w2, e, i, inner);
      const double got = output(row, i, is_shared);
      if (!ends.holds(got)) return differs("output", i, got, ends);
    }
    return "";
  }

  // By ascending expert, the shared one last, in float32.
  std::string wrong_sum(int64_t t) {
    for (int64_t i = 0; i < p_.c.hidden; ++i) {
      float sum = 0;
      for (size_t row = 0; row < rows_.size(); ++row) {
        if (rows_[row] / p_.c.top_k == t) sum += output(static_cast<int64_t>(row), i, false);
      }
      if (p_.has_shared()) sum += output(t - first_, i, true);
      const float got = to_float(p_.result.at(t, i)), expected = to_float(from_float<X>(sum));
      if (std::isnan(expected) ? !std::isnan(got) : got != expected) {
        return "token " + std::to_string(t) + ", result " + std::to_string(i) + ": got " + std::to_string(got) +
               ", expected " + std::to_string(expected);
      }
    }
    return "";
  }

  MoeProblem<X>& p_;
  sm80::ExpertResults at_;
  int64_t first_;              // of the tokens taken last
  std::vector<int64_t> rows_;  // the pair of each
  int64_t unsure_ = 0, inner_ = 0;
};

// What is wrong, or nothing.
template <class X>
std::string try_moe(const MoeCase& c, const sm80::ExpertCut* cut = nullptr) {
  MoeProblem<X> p(c);
  const std::string fault = p.run(cut);
  if (!fault.empty()) return fault;
  const std::string wrong = MoeStages<X>(p).wrong();
  if (!wrong.empty() || p.cut.tokens >= c.tokens) return wrong;
  // The workspace holds the tokens taken last alone; the results of the others, where it holds all.
  sm80::ExpertCut whole = p.cut;
  whole.tokens = c.tokens;
  MoeProblem<X> all(c);
  const std::string other_fault = all.run(&whole),
                    other = other_fault.empty() ? MoeStages<X>(all).wrong() : other_fault;
  for (int64_t t = 0; t < c.tokens && other.empty(); ++t) {
    if (p.bits_of(t) != all.bits_of(t))
      return "token " + std::to_string(t) + " depends on how many are taken at a time";
  }
  return other;
}

}  // namespace dsv4::testing
