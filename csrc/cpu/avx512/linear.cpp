// The linear layers with vdpbf16ps (see avx512/weight_rows.h for the products and their order). Up to 4 rows of
// activations: weights go from their codes through registers into the products, once, so that memory is the limit.
// More: a panel of weight rows is expanded into the second-level cache and serves tiles of 4 x 4 products; the limit is
// 4/5 of the rate of vdpbf16ps, one FMA in five applying the scales. Unquantised float32 activations count as three
// rows of bfloat16, which add up to them exactly.
#include "cpu/linear.h"

#include "cpu/avx512/dense_rows.h"
#include "cpu/avx512/weight_rows.h"
#include "cpu/linear_driver.h"

namespace dsv4::avx512 {
namespace {

constexpr int64_t kPanelBytes = 320 << 10;  // of expanded weights
constexpr int kTile = 4;
constexpr int64_t kAhead = 4;  // weight rows asked for before their use

template <int kParts, class X>
void split_row(const X* x, int64_t inputs, int64_t stride, bf16* to) {
  for (int64_t at = 0; at < inputs; at += kBlock) {
    const int64_t count = inputs - at < kBlock ? inputs - at : kBlock;
    alignas(64) bf16 parts[kParts][kBlock] = {};
    for (int64_t i = 0; i < count; ++i) {
      if constexpr (kParts == 1) {
        parts[0][i] = x[at + i];
      } else {
        float rest = x[at + i];
        const bool finite = (bits_from_float(rest) & 0x7FFFFFFFu) < 0x7F800000u;
        if (!finite) parts[0][i] = bf16_from_float(rest);
        for (int part = 0; finite && part < kParts; ++part) {
          parts[part][i] = bf16{static_cast<uint16_t>(bits_from_float(rest) >> 16)};
          rest -= to_float(parts[part][i]);
        }
      }
    }
    for (int part = 0; part < kParts; ++part) Fp8Rows::arrange(parts[part], to + part * stride + at);
  }
}

template <class Rows, bool kQuantise>
class Kernel {
 public:
  static int64_t row_bytes(const LinearParams& p) {
    return parts(p) * row_elements(p) * static_cast<int64_t>(sizeof(bf16));
  }
  static int64_t memory(const LinearParams& p) {
    return panel_rows(p) * (row_elements(p) * static_cast<int64_t>(sizeof(bf16)) + scale_bytes(p));
  }

  static void prepare(const LinearParams& p, int64_t token, int64_t group, uint8_t* to) {
    const int64_t inputs = p.x.size(2);
    bf16* row = reinterpret_cast<bf16*>(to);
    const bool narrow = p.x.dtype == DType::kBFloat16;
    if constexpr (kQuantise) {
      if (narrow) {
        quantise_row<Rows>(p.x.as<const bf16>().at(token, group), inputs, row);
      } else {
        quantise_row<Rows>(p.x.as<const float>().at(token, group), inputs, row);
      }
    } else if (narrow) {
      split_row<1>(p.x.as<const bf16>().at(token, group), inputs, row_elements(p), row);
    } else {
      split_row<3>(p.x.as<const float>().at(token, group), inputs, row_elements(p), row);
    }
  }

  Kernel(const LinearParams& p, uint8_t* memory)
      : p_(p),
        parts_(parts(p)),
        row_elements_(row_elements(p)),
        scale_floats_(scale_bytes(p) / static_cast<int64_t>(sizeof(float))),
        panel_(reinterpret_cast<bf16*>(memory)),
        scales_(reinterpret_cast<float*>(panel_ + panel_rows(p) * row_elements_)) {}

  void run(const uint8_t* memory, int64_t group, int64_t begin, int64_t end) const {
    const bf16* rows = reinterpret_cast<const bf16*>(memory);
    const int64_t count = p_.x.size(0) * parts_, step = panel_rows(p_);
    for (int64_t first = begin; first < end; first += step) {
      const int64_t last = first + step < end ? first + step : end;
      if (count <= kFewRows) {
        few(rows, count, group, first, last);
      } else {
        many(rows, group, first, last);
      }
    }
  }

 private:
  static int64_t parts(const LinearParams& p) { return !kQuantise && p.x.dtype == DType::kFloat32 ? 3 : 1; }
  static int64_t row_elements(const LinearParams& p) { return blocks_of(p.x.size(2)) * kBlock; }
  static int64_t scale_bytes(const LinearParams& p) {
    return round_up(blocks_of(p.x.size(2)) * Rows::kScales * static_cast<int64_t>(sizeof(float)), 64);
  }
  static int64_t panel_rows(const LinearParams& p) {
    const int64_t fits = kPanelBytes / (row_elements(p) * static_cast<int64_t>(sizeof(bf16)) + 1) / kTile * kTile;
    return fits < kTile ? kTile : fits < kLinearPanel ? fits : kLinearPanel;
  }

  const uint8_t* codes(int64_t row) const { return p_.weight.as<const uint8_t>().at(row); }

  void read_scales(int64_t row, float* to) const {
    const int64_t from = Rows::kScales == 1 ? row / 128 : row;
    const int64_t count = p_.scale.size(1), padded = blocks_of(p_.x.size(2)) * Rows::kScales;
    if (p_.scale.dtype == DType::kUInt8) {
      widen_scales(p_.scale.as<const uint8_t>().at(from), count, padded, to);
    } else {
      widen_scales(p_.scale.as<const float>().at(from), count, padded, to);
    }
  }

  // Outputs [n, n + count) of a row, from float32.
  template <class Y>
  void put(int64_t token, int64_t group, int64_t n, int64_t count, const float* sums) const {
    Y* to = p_.out.as<Y>().at(token, group, n);
    Pair values = load(sums);
    if (parts_ > 1) {
      const Pair middle = load(sums + kLinearPanel), low = load(sums + 2 * kLinearPanel);
      values.a = _mm512_add_ps(values.a, _mm512_add_ps(middle.a, low.a));
      values.b = _mm512_add_ps(values.b, _mm512_add_ps(middle.b, low.b));
    }
    store(to, arrange(values, to), count);
  }
  // Of `count` rows, from sums[row * parts][kLinearPanel].
  void put_rows(int64_t token, int64_t count, int64_t group, int64_t n, int64_t outputs, const float* sums) const {
    for (int64_t i = 0; i < count; ++i) {
      const float* row = sums + i * parts_ * kLinearPanel;
      if (p_.out.dtype == DType::kBFloat16) {
        put<bf16>(token + i, group, n, outputs, row);
      } else {
        put<float>(token + i, group, n, outputs, row);
      }
    }
  }

  void few(const bf16* rows, int64_t count, int64_t group, int64_t begin, int64_t end) const {
    alignas(64) float sums[kFewRows][kLinearPanel];
    for (int64_t n = begin; n < end; ++n) {
      const int64_t row = group * p_.out.size(2) + n;
      if (Rows::kScales > 1 || n == begin || row % 128 == 0) read_scales(row, scales_);
      float results[kFewRows];
      const uint8_t* ahead = codes(row) + kAhead * p_.weight.stride[0];  // past the end it does nothing
      for (int64_t at = 0; at < Rows::bytes(p_.x.size(2)); at += 64) _mm_prefetch(ahead + at, _MM_HINT_T1);
      const auto dot = [&](auto m) {
        dot_row<decltype(m)::value>(expand_, codes(row), Rows::bytes(p_.x.size(2)), scales_, rows, row_elements_,
                                    results);
      };
      pick(count, dot);
      for (int64_t m = 0; m < count; ++m) sums[m][n - begin] = results[m];
    }
    put_rows(0, count / parts_, group, begin, end - begin, sums[0]);
  }

  void many(const bf16* rows, int64_t group, int64_t begin, int64_t end) const {
    const int64_t base = group * p_.out.size(2);
    for (int64_t n = begin; n < end; ++n) {
      expand_row(expand_, codes(base + n), Rows::bytes(p_.x.size(2)), panel_ + (n - begin) * row_elements_);
      read_scales(base + n, scales_ + (n - begin) * scale_floats_);
    }
    const int64_t tokens = p_.x.size(0);
    const int64_t tile = parts_ == 1 ? kTile : 1;  // tokens: of three parts, one
    for (int64_t token = 0; token < tokens; token += tile) {
      const int64_t count = tokens - token < tile ? tokens - token : tile;
      const bf16* x = rows + token * parts_ * row_elements_;
      alignas(64) float sums[kTile][kLinearPanel];
      int64_t n = 0;
      for (; n + kTile <= end - begin; n += kTile) tiles<kTile>(x, count * parts_, n, sums);
      for (; n < end - begin; ++n) tiles<1>(x, count * parts_, n, sums);
      put_rows(token, count, group, begin, end - begin, sums[0]);
    }
  }

  // Up to kTile rows with weight rows n to n + kN of the panel.
  template <int kN>
  void tiles(const bf16* x, int64_t count, int64_t n, float (*sums)[kLinearPanel]) const {
    float results[kTile * kN];
    const auto dot = [&](auto m) {
      dot_tile<decltype(m)::value, kN, Rows>(x, row_elements_, panel_ + n * row_elements_, row_elements_,
                                             scales_ + n * scale_floats_, scale_floats_, blocks_of(p_.x.size(2)),
                                             results);
    };
    pick(count, dot);
    for (int64_t m = 0; m < count; ++m) {
      for (int i = 0; i < kN; ++i) sums[m][n + i] = results[m * kN + i];
    }
  }

  template <int kValue>
  struct Constant {
    static constexpr int value = kValue;
  };

  // body of a count from 1 to 4, as a constant.
  template <class Body>
  static void pick(int64_t count, const Body& body) {
    static_assert(kTile == 4 && kFewRows == 4);
    switch (count) {
      case 4:
        return body(Constant<4>{});
      case 3:
        return body(Constant<3>{});
      case 2:
        return body(Constant<2>{});
      default:
        return body(Constant<1>{});
    }
  }

  const LinearParams& p_;
  const Rows expand_;
  int64_t parts_, row_elements_, scale_floats_;
  bf16* panel_;
  float* scales_;
};

using Fp8 = Kernel<Fp8Rows, true>;
using Fp4 = Kernel<Fp4Rows, true>;
using Grouped = Kernel<Fp8Rows, false>;

}  // namespace

int64_t fp8_linear_workspace_bytes(const LinearParams& p, const Context& c) {
  return linear_workspace_bytes<Fp8>(p, c);
}
int64_t fp4_linear_workspace_bytes(const LinearParams& p, const Context& c) {
  return linear_workspace_bytes<Fp4>(p, c);
}
int64_t grouped_linear_workspace_bytes(const LinearParams& p, const Context& c) {
  return linear_workspace_bytes<Grouped>(p, c);
}
Status fp8_linear(const LinearParams& p, const Context& c) { return run_linear<Fp8>(p, c); }
Status fp4_linear(const LinearParams& p, const Context& c) { return run_linear<Fp4>(p, c); }
Status grouped_linear(const LinearParams& p, const Context& c) { return run_linear<Grouped>(p, c); }

int64_t dense_linear_workspace_bytes(const DenseLinearParams& p, const Context& c) {
  return dense_workspace_bytes<DenseKernel>(p, c);
}
Status dense_linear(const DenseLinearParams& p, const Context& c) { return run_dense<DenseKernel>(p, c); }

}  // namespace dsv4::avx512
