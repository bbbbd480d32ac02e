// The linear layers with vdpbf16ps, in tiles of avx512/code_tiles.h: weights go from their codes through registers into
// the products with eight rows of activations, again for every eight. Memory is the limit of up to 4 rows, the rate of
// vdpbf16ps of more (docs/investigations/linear_cpu.md). Unquantised float32 activations count as three rows of
// bfloat16, which add up to them exactly.
#include "cpu/linear.h"

#include <type_traits>

#include "cpu/avx512/code_tiles.h"
#include "cpu/avx512/dense_rows.h"
#include "cpu/linear_driver.h"

namespace dsv4::avx512 {
namespace {

constexpr int64_t kRangeBlocks = 64;       // of a tile's activations, which stay in the first-level cache: 16 KiB
constexpr int64_t kSumRows = 64;           // rows of activations whose sums wait in scratch memory
constexpr int64_t kAheadBytes = 16 << 10;  // of codes asked for before their use
constexpr int64_t kMostAhead = 16;         // weight rows, alike

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
  static constexpr int64_t kUnit = 1;
  static int64_t panel(const LinearParams&, int64_t) { return kLinearPanel; }
  static int64_t unit_bytes(const LinearParams& p) {
    return parts(p) * row_stride(p) * static_cast<int64_t>(sizeof(bf16));
  }
  static int64_t memory(const LinearParams& p) {
    return sum_rows(p) * kLinearPanel * static_cast<int64_t>(sizeof(__m512)) +
           (Rows::kScales == 1 ? 1 : kLinearPanel) * scale_bytes(p);
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
        sums_(reinterpret_cast<__m512*>(memory)),
        scales_(memory + sum_rows(p) * kLinearPanel * static_cast<int64_t>(sizeof(__m512))) {}

  void run(const uint8_t* memory, int64_t group, int64_t begin, int64_t end) const {
    const bf16* rows = reinterpret_cast<const bf16*>(memory);
    for (int64_t first = begin, last; first < end; first = last) {
      const int64_t row = group * p_.out.size(2) + first, same = 128 - row % 128;
      last = Rows::kScales == 1 && end - first > same ? first + same : end;  // e4m3: rows of one scale
      const Panel panel = {group, first, last - first, row};
      const int64_t scale_rows = Rows::kScales == 1 ? 1 : panel.outputs;
      typename Rows::Scale* folded = reinterpret_cast<typename Rows::Scale*>(scales_);
      if (read_scales(row, scale_rows, folded)) {
        products(rows, panel, const_cast<const typename Rows::Scale*>(folded));
      } else {
        float* scales = reinterpret_cast<float*>(scales_);
        read_scales(row, scale_rows, scales);
        products(rows, panel, const_cast<const float*>(scales));
      }
    }
  }

 private:
  static int64_t parts(const LinearParams& p) { return !kQuantise && p.x.dtype == DType::kFloat32 ? 3 : 1; }
  static int64_t row_stride(const LinearParams& p) { return blocks_of(p.x.size(2)) * kBlock + kRowGap; }
  static int64_t scale_bytes(const LinearParams& p) {
    return round_up(blocks_of(p.x.size(2)) * Rows::kScales * static_cast<int64_t>(sizeof(float)), 64);
  }
  static int64_t sum_rows(const LinearParams& p) { return p.x.size(0) * parts(p) <= kTileRows ? kTileRows : kSumRows; }

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

  // Rows of weights of a panel: outputs [begin, begin + outputs) of a group, from `row` of the weight on.
  struct Panel {
    int64_t group, begin, outputs, row;
  };

  template <class Scale>
  void products(const bf16* rows, const Panel& panel, const Scale* scales) const {
    const int64_t all = p_.x.size(0) * parts_, most = kTileRows / parts_ * parts_, chunk = kSumRows / kTileRows * most;
    for (int64_t row = 0; row < all; row += chunk) {
      const int64_t count = all - row < chunk ? all - row : chunk;
      const int64_t range = kRangeBlocks / (count < kTileRows ? count : kTileRows);
      for (int64_t block = 0; block == 0 || block < blocks_; block += range) {
        for (int64_t m = 0, height; m < count; m += height) {
          height = round_up(tile_height(count - m, most), parts_);
          const Range part = {block, block + range < blocks_ ? range : blocks_ - block, row + m == 0};
          with_constant<kTileRows>(height, [&](auto tall) __attribute__((always_inline)) {
            multiply<decltype(tall)::value>(rows + (row + m) * row_stride_, part, panel, scales,
                                            sums_ + m * kLinearPanel);
          });
        }
      }
      for (int64_t m = 0, height; m < count; m += height) {
        height = round_up(tile_height(count - m, most), parts_);
        with_constant<kTileRows>(height, [&](auto tall) __attribute__((always_inline)) {
          finish<decltype(tall)::value>(sums_ + m * kLinearPanel, (row + m) / parts_, panel);
        });
      }
    }
  }

  // Blocks of inputs; whether their codes come from memory, for the first rows of activations.
  struct Range {
    int64_t block, blocks;
    bool fresh;
  };

  // A range of inputs of kM rows x with the whole panel.
  template <int kM, class Scale>
  void multiply(const bf16* x, const Range& range, const Panel& panel, const Scale* scales, __m512* sums) const {
    const int64_t at = range.block * Rows::kBlockBytes, left = Rows::bytes(p_.x.size(2)) - at,
                  most = range.blocks * Rows::kBlockBytes, stride = p_.weight.stride[0];
    const int64_t ahead = kAheadBytes / (most + 1) / 4 * 4 + 4;
    CodeRows<Scale> w;
    w.stride = stride;
    w.bytes = left < most ? left : most;
    w.scale_stride = Rows::kScales == 1 ? 0 : blocks_ * Rows::kScales;
    const auto point = [&](int64_t n) __attribute__((always_inline)) {
      w.codes = codes(panel.row + n) + at;
      w.next = range.fresh ? later(panel, range, n + (ahead < kMostAhead ? ahead : kMostAhead)) : w.codes;
      w.scales = scales + n * w.scale_stride + range.block * Rows::kScales;
    };
    if constexpr (kM == 1 && std::is_same_v<Scale, typename Rows::Scale>) {
      if (range.block == 0 && range.blocks == blocks_ && are_short<Rows>(w.bytes)) {
        point(0);
        return short_rows(expand_, w, panel.outputs, x, sums);
      }
    }
    const auto tile = [&](int64_t n, auto columns) __attribute__((always_inline)) {
      point(n);
      code_tile<kM, decltype(columns)::value>(expand_, w, x + range.block * kBlock, row_stride_, range.block == 0,
                                              sums + n * kM);
    };
    int64_t n = 0;
    for (; n + kTileColumns<kM> <= panel.outputs; n += kTileColumns<kM>) tile(n, Constant<kTileColumns<kM>>{});
    for (; n < panel.outputs; ++n) tile(n, Constant<1>{});
  }

  // Codes of weight row n in this range; beyond the panel, in its next range or of the next panel.
  const uint8_t* later(const Panel& panel, const Range& range, int64_t n) const {
    int64_t block = range.block;
    if (n >= panel.outputs) {
      block = block + range.blocks < blocks_ ? block + range.blocks : 0;
      n -= block > 0 ? panel.outputs : 0;
    }
    return codes(panel.row + n) + block * Rows::kBlockBytes;  // asking for what is past the end does nothing
  }

  // Adds the lanes of kM rows' sums and writes them as rows from `token` on.
  template <int kM>
  void finish(const __m512* sums, int64_t token, const Panel& panel) const {
    alignas(64) float results[kTileRows][kLinearPanel];
    const auto add = [&](int64_t n, auto columns) __attribute__((always_inline)) {
      constexpr int kN = decltype(columns)::value;
      alignas(64) float tile[16];
      _mm512_store_ps(tile, totals<kM * kN>(sums + n * kM));
      for (int m = 0; m < kM; ++m) __builtin_memcpy(results[m] + n, tile + m * kN, kN * sizeof(float));
    };
    int64_t n = 0;
    if constexpr (kM == 1) {  // the sums of outputs follow one another
      for (; n + 16 <= panel.outputs; n += 16) add(n, Constant<16>{});
    }
    for (; n + kTileColumns<kM> <= panel.outputs; n += kTileColumns<kM>) add(n, Constant<kTileColumns<kM>>{});
    for (; n < panel.outputs; ++n) add(n, Constant<1>{});
    put_rows(token, kM / parts_, panel.group, panel.begin, panel.outputs, results[0]);
  }

  const LinearParams& p_;
  const Rows expand_{};
  int64_t parts_, row_stride_, blocks_;
  __m512* sums_;
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
