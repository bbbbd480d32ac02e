// The linear layers with vdpbf16ps. Few rows: tiles of avx512/code_tiles.h, in which weights go from their codes
// through registers into the products with eight rows of activations, again for every eight. Many: weights are expanded
// once for 256 rows (avx512/weight_panel.h), with the same bits. Memory is the limit of up to 4 rows, the rate of
// vdpbf16ps of more (docs/investigations/linear_cpu.md). Unquantised float32 activations count as three rows of
// bfloat16, which add up to them exactly.
#include "cpu/linear.h"

#include <type_traits>

#include "cpu/avx512/dense_rows.h"
#include "cpu/avx512/weight_panel.h"
#include "cpu/linear_driver.h"

namespace dsv4::avx512 {
namespace {

constexpr int64_t kSumRows = 64;  // rows of activations whose sums wait in scratch memory, where scales do not fold
constexpr int64_t kPanels = 4;    // of weights for each thread, at least
constexpr int64_t kPieceBytes = 256 << 10, kPieces = 8;  // of codes, and pieces for each thread, for few rows

template <int kParts, class X>
void split_row(const X* x, int64_t inputs, int64_t stride, bf16* to) {
  for (int64_t at = 0; at < inputs; at += kBlock) {
    const int64_t count = inputs - at < kBlock ? inputs - at : kBlock;
    alignas(64) bf16 parts[kParts][kBlock] = {};
    if constexpr (kParts == 1) {
      __builtin_memcpy(parts[0], x + at, static_cast<size_t>(count) * sizeof(bf16));
    } else {
      for (int64_t i = 0; i < count; ++i) {
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
  static constexpr int64_t kUnit = 1;
  // Whatever it is, scales are looked at for kLinearPanel rows of weights at a time. Few rows of activations ask for
  // codes of the next rows, which come in vain to a thread that is given others: pieces shall be long in bytes.
  static int64_t panel(const LinearParams& p, int64_t threads) {
    if (!many(p)) {
      const int64_t rows = kPieceBytes / (Rows::bytes(p.x.size(2)) + 1), fair = p.weight.size(0) / (kPieces * threads);
      return round_up((rows < fair ? rows : fair) + 1, kLinearPanel);
    }
    return p.weight.size(0) < kPanels * threads * kPanelOutputs ? kPanelColumns : kPanelOutputs;
  }
  static int64_t rows(const LinearParams& p) { return many(p) ? kPanelRows / parts(p) : kAllRows; }
  static int64_t unit_bytes(const LinearParams& p) {
    return parts(p) * row_stride(p) * static_cast<int64_t>(sizeof(bf16));
  }
  static int64_t memory(const LinearParams& p) {
    const int64_t outputs = many(p) ? kPanelOutputs : kLinearPanel;
    return (many(p) ? kPanelWords * static_cast<int64_t>(sizeof(uint32_t)) : 0) +
           (many(p) ? kPanelRows : kSumRows) * outputs * static_cast<int64_t>(sizeof(float)) +
           (Rows::kScales == 1 ? 1 : outputs) * scale_bytes(p);
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
      split_row<1>(p.x.as<const bf16>().at(token, group), inputs, 0, row);
    } else {
      split_row<3>(p.x.as<const float>().at(token, group), inputs, row_stride(p), row);
    }
  }

  Kernel(const LinearParams& p, uint8_t* memory)
      : p_(p),
        parts_(parts(p)),
        row_stride_(row_stride(p)),
        blocks_(blocks_of(p.x.size(2))),
        panel_(reinterpret_cast<uint32_t*>(memory)),
        sums_(reinterpret_cast<float*>(panel_ + (many(p) ? kPanelWords : 0))),
        scales_(reinterpret_cast<uint8_t*>(sums_ + (many(p) ? kPanelRows * kPanelOutputs : kSumRows * kLinearPanel))) {}

  void run(const uint8_t* memory, const LinearPiece& piece) {
    x_ = reinterpret_cast<const bf16*>(memory), rows_ = piece.rows * parts_, token_ = piece.row;
    typename Rows::Scale* folded = reinterpret_cast<typename Rows::Scale*>(scales_);
    for (int64_t first = piece.begin, last; first < piece.end; first = last) {
      const int64_t row = piece.group * p_.out.size(2) + first, same = 128 - row % 128;
      last = Rows::kScales == 1 && piece.end - first > same ? first + same : piece.end;  // e4m3: rows of one scale
      const Panel panel = {piece.group, first, last - first, row};
      if (many(p_) && read_scales(row, scale_rows(panel), folded)) {
        multiply_panel(panel, folded);
        continue;
      }
      for (int64_t n = 0; n < panel.outputs; n += kLinearPanel) {
        const int64_t left = panel.outputs - n;
        multiply_codes({piece.group, first + n, left < kLinearPanel ? left : kLinearPanel, row + n});
      }
    }
  }

 private:
  static int64_t parts(const LinearParams& p) { return !kQuantise && p.x.dtype == DType::kFloat32 ? 3 : 1; }
  static int64_t row_stride(const LinearParams& p) { return blocks_of(p.x.size(2)) * kBlock + kRowGap; }
  static int64_t scale_bytes(const LinearParams& p) {
    return round_up(blocks_of(p.x.size(2)) * Rows::kScales * static_cast<int64_t>(sizeof(float)), 64);
  }
  static bool many(const LinearParams& p) { return p.x.size(0) * parts(p) > kFewRows; }

  // Rows of weights of a panel: outputs [begin, begin + outputs) of a group, from `row` of the weight on.
  struct Panel {
    int64_t group, begin, outputs, row;
  };
  static int64_t scale_rows(const Panel& panel) { return Rows::kScales == 1 ? 1 : panel.outputs; }

  const uint8_t* codes(int64_t row) const { return p_.weight.as<const uint8_t>().at(row); }

  // Of rows of scales from that of weight row `row` on: as Rows::load takes them, false where one does not fold, or as
  // float32.
  template <class Scale>
  bool read_scales(int64_t row, int64_t rows, Scale* to) const {
    const bool narrow = p_.scale.dtype == DType::kUInt8;
    const int64_t from = Rows::kScales == 1 ? row / 128 : row, count = p_.scale.size(1);
    const auto read = [&](const auto* scales, Scale* place) {
      if constexpr (std::is_same_v<Scale, float>) {
        widen_scales(scales, count, blocks_ * Rows::kScales, place);
        return true;
      } else {
        return fold_scales<Rows>(scales, count, blocks_ * Rows::kScales, place);
      }
    };
    for (int64_t n = 0; n < rows; ++n) {
      Scale* place = to + n * blocks_ * Rows::kScales;
      const bool all = narrow ? read(p_.scale.as<const uint8_t>().at(from + n), place)
                              : read(p_.scale.as<const float>().at(from + n), place);
      if (!all) return false;
    }
    return true;
  }

  // Up to 32 outputs of a row from n on, from the sums of its parts.
  template <class Y>
  void put(int64_t token, int64_t group, int64_t n, int64_t count, const float* sums, int64_t stride) const {
    Y* to = p_.out.as<Y>().at(token, group, n);
    Pair values = load(sums);
    if (parts_ > 1) {
      const Pair middle = load(sums + stride), low = load(sums + 2 * stride);
      values.a = _mm512_add_ps(values.a, _mm512_add_ps(middle.a, low.a));
      values.b = _mm512_add_ps(values.b, _mm512_add_ps(middle.b, low.b));
    }
    store(to, arrange(values, to), count);
  }
  // Of `count` rows of the piece from `row` on, from sums[row][stride].
  void put_rows(int64_t row, int64_t count, const Panel& panel, const float* sums, int64_t stride) const {
    for (int64_t m = 0; m < count; m += parts_) {
      for (int64_t n = 0; n < panel.outputs; n += kStep) {
        const int64_t token = token_ + (row + m) / parts_, some = panel.outputs - n < kStep ? panel.outputs - n : kStep;
        const float* from = sums + m * stride + n;
        if (p_.out.dtype == DType::kBFloat16) {
          put<bf16>(token, panel.group, panel.begin + n, some, from, stride);
        } else {
          put<float>(token, panel.group, panel.begin + n, some, from, stride);
        }
      }
    }
  }

  template <class Scale>
  WeightRows<Scale> weights(const Panel& panel, const Scale* scales) const {
    return {codes(panel.row), p_.weight.stride[0],       scales, Rows::kScales == 1 ? 0 : blocks_ * Rows::kScales,
            panel.outputs,    Rows::bytes(p_.x.size(2)), blocks_};
  }

  // Expanded once for all rows of the piece.
  void multiply_panel(const Panel& panel, const typename Rows::Scale* scales) const {
    multiply_many(expand_, weights(panel, scales), rows_, panel_, sums_,
                  [&](int64_t m) { return x_ + m * row_stride_; });
    put_rows(0, rows_, panel, sums_, kPanelOutputs);
  }

  void multiply_codes(const Panel& panel) const {
    typename Rows::Scale* folded = reinterpret_cast<typename Rows::Scale*>(scales_);
    if (read_scales(panel.row, scale_rows(panel), folded)) {
      return products(panel, const_cast<const typename Rows::Scale*>(folded));
    }
    float* scales = reinterpret_cast<float*>(scales_);
    read_scales(panel.row, scale_rows(panel), scales);
    products(panel, const_cast<const float*>(scales));
  }

  template <class Scale>
  void products(const Panel& panel, const Scale* scales) const {
    const WeightRows<Scale> w = weights(panel, scales);
    const FewRows<Rows, Scale> few(expand_, w, row_stride_, kLinearPanel);
    const int64_t most = kSumRows / parts_ * parts_;
    for (int64_t row = 0; row < rows_; row += most) {
      const int64_t count = rows_ - row < most ? rows_ - row : most;
      few.multiply(x_ + row * row_stride_, count, row == 0, sums_);
      put_rows(row, count, panel, sums_, kLinearPanel);
    }
  }

  const LinearParams& p_;
  const Rows expand_{};
  int64_t parts_, row_stride_, blocks_, rows_ = 0, token_ = 0;
  const bf16* x_ = nullptr;  // of the piece
  uint32_t* panel_;
  float* sums_;
  uint8_t* scales_;  // of the panel, in either form
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
