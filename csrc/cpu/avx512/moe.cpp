// The mixture of experts with vdpbf16ps (see avx512/weight_rows.h for the products of quantised rows and their order,
// avx512/plain_rows.h for plain ones). Up to 4 tokens an expert: weights go from their codes through registers into the
// products, once, so that memory is the limit: 53 % of a byte a weight in FP4, 2 FLOPs a token. More: 32 rows of
// weights are expanded into the second-level cache and serve tiles of 4 x 4 products; the limit is 4/5 of the rate of
// vdpbf16ps, one FMA in five applying the scales.
#include "cpu/moe.h"

#include "cpu/avx512/plain_rows.h"
#include "cpu/avx512/weight_rows.h"
#include "cpu/moe_gate.h"

namespace dsv4::avx512 {
namespace {

constexpr int64_t kPanelRows = 32;
constexpr int64_t kAhead = 4;  // rows of codes to ask for before they are needed
constexpr int kTile = 4;

template <int kValue>
struct Constant {
  static constexpr int value = kValue;
};

// `count` as a constant from 1 to kMost.
template <int kMost, class Body>
DSV4_INLINE void with_constant(int64_t count, const Body& body) {
  if constexpr (kMost > 1) {
    if (count < kMost) return with_constant<kMost - 1>(count, body);
  }
  body(Constant<kMost>{});
}

// Rows [row, row + rows) of one quantised matrix with `count` rows of activations.
template <class Rows>
class Product {
 public:
  static int64_t elements(int64_t in) { return blocks_of(in) * kBlock; }
  static int64_t scale_floats(int64_t in) { return round_up(blocks_of(in) * Rows::kScales, 16); }
  static int64_t memory(int64_t in) {
    return kPanelRows *
           (elements(in) * static_cast<int64_t>(sizeof(bf16)) + scale_floats(in) * static_cast<int64_t>(sizeof(float)));
  }

  Product(const ExpertMatrix& w, int64_t expert, int64_t in, const bf16* x, int64_t stride, int64_t count, float* out,
          uint8_t* memory)
      : w_(w),
        expert_(expert),
        in_(in),
        x_(x),
        stride_(stride),
        count_(count),
        out_(out),
        panel_(reinterpret_cast<bf16*>(memory)),
        scales_(reinterpret_cast<float*>(panel_ + kPanelRows * elements(in))) {}

  void run(int64_t row, int64_t rows) {
    if (count_ <= kFewRows) {
      with_constant<kFewRows>(count_, [&](auto m) { few<decltype(m)::value>(row, rows); });
      return;
    }
    for (int64_t first = 0; first < rows; first += kPanelRows) {
      many(row, first, rows - first < kPanelRows ? rows - first : kPanelRows);
    }
  }

 private:
  const uint8_t* codes(int64_t row) const { return w_.data.as<const uint8_t>().at(expert_, row); }

  void read_scales(int64_t row, float* to) const {
    const int64_t from = Rows::kScales == 1 ? row / 128 : row;
    const int64_t count = w_.scale.size(2), padded = blocks_of(in_) * Rows::kScales;
    if (w_.scale.dtype == DType::kUInt8) {
      widen_scales(w_.scale.as<const uint8_t>().at(expert_, from), count, padded, to);
    } else {
      widen_scales(w_.scale.as<const float>().at(expert_, from), count, padded, to);
    }
  }

  template <int kM>
  void few(int64_t row, int64_t rows) const {
    for (int64_t r = 0; r < rows; ++r) {
      if (Rows::kScales > 1 || r == 0 || (row + r) % 128 == 0) read_scales(row + r, scales_);
      const uint8_t* next = codes(row + r) + kAhead * w_.data.stride[1];  // beyond the end it does nothing
      for (int64_t at = 0; at < Rows::bytes(in_); at += 64) _mm_prefetch(next + at, _MM_HINT_T1);
      float sums[kM];
      dot_row<kM>(expand_, codes(row + r), Rows::bytes(in_), scales_, x_, stride_, sums);
      for (int m = 0; m < kM; ++m) out_[m * kMoeOutputs + r] = sums[m];
    }
  }

  void many(int64_t row, int64_t first, int64_t rows) const {
    const int64_t width = elements(in_), scale_stride = scale_floats(in_);
    for (int64_t r = 0; r < rows; ++r) {
      expand_row(expand_, codes(row + first + r), Rows::bytes(in_), panel_ + r * width);
      read_scales(row + first + r, scales_ + r * scale_stride);
    }
    for (int64_t m = 0; m < count_; m += kTile) {
      with_constant<kTile>(count_ - m < kTile ? count_ - m : kTile, [&](auto height) {
        int64_t r = 0;
        for (; r + kTile <= rows; r += kTile) tile<decltype(height)::value, kTile>(m, first, r);
        for (; r < rows; ++r) tile<decltype(height)::value, 1>(m, first, r);
      });
    }
  }

  template <int kM, int kN>
  __attribute__((noinline)) void tile(int64_t m, int64_t first, int64_t r) const {
    float sums[kM * kN];
    dot_tile<kM, kN, Rows>(x_ + m * stride_, stride_, panel_ + r * elements(in_), elements(in_),
                           scales_ + r * scale_floats(in_), scale_floats(in_), blocks_of(in_), sums);
    for (int i = 0; i < kM * kN; ++i) out_[(m + i / kN) * kMoeOutputs + first + r + i % kN] = sums[i];
  }

  const Rows expand_;
  const ExpertMatrix& w_;
  int64_t expert_, in_;
  const bf16* x_;
  int64_t stride_, count_;
  float* out_;
  bf16* panel_;
  float* scales_;
};

struct Kernel {
  template <class X>
  static int64_t row_bytes(WeightFormat format, int64_t n) {
    if (format == WeightFormat::kPlain) return n * static_cast<int64_t>(sizeof(X));
    return blocks_of(n) * kBlock * static_cast<int64_t>(sizeof(bf16));
  }

  template <class X>
  static void prepare(WeightFormat format, const X* x, int64_t n, uint8_t* to) {
    switch (format) {
      case WeightFormat::kFp8:
        quantise_row<Fp8Rows>(x, n, reinterpret_cast<bf16*>(to));
        break;
      case WeightFormat::kFp4:
        quantise_row<Fp4Rows>(x, n, reinterpret_cast<bf16*>(to));
        break;
      default:
        __builtin_memcpy(to, x, static_cast<size_t>(n) * sizeof(X));
    }
  }

  static int64_t memory(int64_t in) {
    const int64_t fp8 = Product<Fp8Rows>::memory(in), fp4 = Product<Fp4Rows>::memory(in);
    return fp8 > fp4 ? fp8 : fp4;
  }

  template <class X>
  static void project(const ExpertMatrix& w, int64_t expert, int64_t row, int64_t rows, int64_t in, const uint8_t* x,
                      int64_t stride, int64_t count, float* out, uint8_t* memory) {
    const bf16* narrow = reinterpret_cast<const bf16*>(x);
    switch (w.format) {
      case WeightFormat::kFp8:
        Product<Fp8Rows>(w, expert, in, narrow, stride / 2, count, out, memory).run(row, rows);
        break;
      case WeightFormat::kFp4:
        Product<Fp4Rows>(w, expert, in, narrow, stride / 2, count, out, memory).run(row, rows);
        break;
      default:
        plain_product(reinterpret_cast<const X*>(x), stride / static_cast<int64_t>(sizeof(X)), count,
                      w.data.as<const X>().at(expert, row), w.data.stride[1], rows, in, out, kMoeOutputs);
    }
  }

  template <class X>
  static void activate(const float* gate, const float* up, float weight, float limit, int64_t n, X* out) {
    const X* type = nullptr;
    const __m512 most = _mm512_set1_ps(limit > 0 ? limit : __builtin_inff()), factor = _mm512_set1_ps(weight);
    const auto lanes = [&](__m512 g, __m512 u) __attribute__((always_inline)) {
      // The second operand comes through where one is NaN.
      g = _mm512_min_ps(most, g);
      u = _mm512_max_ps(_mm512_sub_ps(_mm512_setzero_ps(), most), _mm512_min_ps(most, u));
      const __m512 divisor = _mm512_add_ps(_mm512_set1_ps(1.f), exp(_mm512_sub_ps(_mm512_setzero_ps(), g)));
      return _mm512_mul_ps(_mm512_mul_ps(_mm512_div_ps(g, divisor), u), factor);
    };
    for (int64_t i = 0; i < n; i += kStep) {
      const int64_t count = n - i < kStep ? n - i : kStep;
      const Pair g = rounded(load(gate + i, count), type), u = rounded(load(up + i, count), type);
      store(out + i, arrange(Pair{lanes(g.a, u.a), lanes(g.b, u.b)}, type), count);
    }
  }
};

struct Gate {
  static int64_t memory(const MoeGateParams& p) {
    const int64_t row = p.x.size(1) * static_cast<int64_t>(sizeof(float));
    return p.x.dtype == p.weight.dtype ? 0 : (kPanelRows > kGateTokens ? kPanelRows : kGateTokens) * row;
  }

  // Rows of bfloat16 as float32, one after another.
  static void widen(const View<const bf16, 2>& from, int64_t first, int64_t count, float* to) {
    const int64_t width = from.size(1);
    for (int64_t i = 0; i < count; ++i, to += width) {
      for (int64_t d = 0; d < width; d += kStep) {
        const int64_t left = width - d < kStep ? width - d : kStep;
        store(to + d, natural(load(from.at(first + i, d), left), static_cast<const bf16*>(nullptr)), left);
      }
    }
  }

  template <class T>
  static void product(const MoeGateParams& p, int64_t count, float* z, const T* x, int64_t stride, float* memory) {
    const int64_t experts = p.weight.size(0), hidden = p.x.size(1);
    for (int64_t e = 0; e < experts; e += kPanelRows) {
      const int64_t rows = experts - e < kPanelRows ? experts - e : kPanelRows;
      const T* w = static_cast<const T*>(p.weight.data) + e * p.weight.stride[0];
      int64_t w_stride = p.weight.stride[0];
      if constexpr (sizeof(T) == sizeof(float)) {
        if (p.weight.dtype == DType::kBFloat16) {
          widen(p.weight.as<const bf16>(), e, rows, memory);
          w = memory;
          w_stride = hidden;
        }
      }
      plain_product(x, stride, count, w, w_stride, rows, hidden, z + e, experts);
    }
  }

  static void logits(const MoeGateParams& p, int64_t first, int64_t count, float* z, uint8_t* memory_) {
    float* memory = reinterpret_cast<float*>(memory_);
    const bool narrow = p.x.dtype == DType::kBFloat16;
    if (narrow && p.weight.dtype == DType::kBFloat16) {
      product(p, count, z, p.x.as<const bf16>().at(first), p.x.stride[0], memory);
    } else if (narrow) {
      widen(p.x.as<const bf16>(), first, count, memory);
      product(p, count, z, static_cast<const float*>(memory), p.x.size(1), memory);
    } else {
      product(p, count, z, p.x.as<const float>().at(first), p.x.stride[0], memory);
    }
  }
};

}  // namespace

int64_t moe_gate_workspace_bytes(const MoeGateParams& p, const Context& c) { return GateCall<Gate>(p, c).bytes(); }
Status moe_gate(const MoeGateParams& p, const Context& c) { return GateCall<Gate>(p, c).run(); }

int64_t moe_experts_workspace_bytes(const MoeExpertsParams& p, const Context& c) { return moe_bytes<Kernel>(p, c); }
Status moe_experts(const MoeExpertsParams& p, const Context& c) { return moe_run<Kernel>(p, c); }

}  // namespace dsv4::avx512
