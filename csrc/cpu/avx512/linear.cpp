// The linear layers with vdpbf16ps, in tiles of avx512/code_tiles.h. Up to 8 rows of activations: weights go from their
// codes through registers into the products, once; memory is the limit of few rows, vdpbf16ps of 8. More: a panel of
// weight rows is expanded into the second-level cache and serves tiles of 4 x 4 products, 4 KiB of a row at a time; the
// limit is the rate of vdpbf16ps with e4m3 weights, 4/5 of it with e2m1 weights and with scales that are not powers of
// two from 2^-60 to 1. Unquantised float32 activations count as three rows of bfloat16, which add up to them exactly.
#include "cpu/linear.h"

#include "cpu/avx512/code_tiles.h"
#include "cpu/avx512/dense_rows.h"
#include "cpu/linear_driver.h"

namespace dsv4::avx512 {
namespace {

constexpr int64_t kPanelBytes = 320 << 10;  // of expanded weights
constexpr int kTile = 4;
constexpr int64_t kRangeBlocks = 16;     // of a tile's activations, which stay in the first-level cache
constexpr int64_t kSumRows = 64;         // rows of activations whose sums wait in scratch memory
constexpr int64_t kMostInRegisters = 8;  // rows of activations up to which weights are expanded in registers alone
constexpr int64_t kShortRow = 512;       // bytes of codes
constexpr int64_t kAhead = 8;            // weight rows asked for before their use

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
  static int64_t panel(const LinearParams&) { return kLinearPanel; }
  static int64_t unit_bytes(const LinearParams& p) {
    return parts(p) * row_elements(p) * static_cast<int64_t>(sizeof(bf16));
  }
  static int64_t memory(const LinearParams& p) {
    return sum_registers(p) * static_cast<int64_t>(sizeof(__m512)) + panel_rows(p) * scale_bytes(p) +
           (few(p) ? 0 : panel_rows(p) * row_elements(p) * static_cast<int64_t>(sizeof(bf16)));
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
        bytes_(Rows::bytes(p.x.size(2))),
        scale_stride_(Rows::kScales == 1 ? 0 : scale_bytes(p) / static_cast<int64_t>(sizeof(float))),
        sums_(reinterpret_cast<__m512*>(memory)),
        scales_(memory + sum_registers(p) * static_cast<int64_t>(sizeof(__m512))),
        panel_(reinterpret_cast<bf16*>(scales_ + panel_rows(p) * scale_bytes(p))) {}

  void run(const uint8_t* memory, int64_t group, int64_t begin, int64_t end) const {
    const bf16* rows = reinterpret_cast<const bf16*>(memory);
    const int64_t step = panel_rows(p_);
    for (int64_t first = begin, last; first < end; first = last) {
      const int64_t row = group * p_.out.size(2) + first;
      last = first + step < end ? first + step : end;
      if constexpr (Rows::kScales == 1) {  // rows of one scale
        const int64_t left = 128 - row % 128;
        last = last - first < left ? last : first + left;
        if (fold(row, scales_)) {
          products(rows, {group, first, last - first, row}, static_cast<const uint8_t*>(scales_));
          continue;
        }
      }
      if (p_.x.size(0) * parts_ == 1 && bytes_ > kShortRow) {
        one_row(rows, {group, first, last - first, row});
        continue;
      }
      float* scales = reinterpret_cast<float*>(scales_);
      for (int64_t n = 0; n < (Rows::kScales == 1 ? 1 : last - first); ++n) {
        read_scales(row + n, scales + n * scale_stride_);
      }
      products(rows, {group, first, last - first, row}, static_cast<const float*>(scales));
    }
  }

 private:
  static int64_t parts(const LinearParams& p) { return !kQuantise && p.x.dtype == DType::kFloat32 ? 3 : 1; }
  static int64_t row_elements(const LinearParams& p) { return blocks_of(p.x.size(2)) * kBlock; }
  static int64_t scale_bytes(const LinearParams& p) {
    return round_up(blocks_of(p.x.size(2)) * Rows::kScales * static_cast<int64_t>(sizeof(float)), 64);
  }
  static bool few(const LinearParams& p) { return p.x.size(0) * parts(p) <= kMostInRegisters; }
  static int64_t sum_registers(const LinearParams& p) { return (few(p) ? kMostInRegisters : kSumRows) * kLinearPanel; }
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

  // The shifts of a row's scales; false if one does not fold.
  bool fold(int64_t row, uint8_t* to) const {
    const int64_t count = p_.scale.size(1), padded = blocks_of(p_.x.size(2));
    if (p_.scale.dtype == DType::kUInt8) {
      return fold_scales(p_.scale.as<const uint8_t>().at(row / 128), count, padded, to);
    }
    return fold_scales(p_.scale.as<const float>().at(row / 128), count, padded, to);
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
    const int64_t count = p_.x.size(0) * parts_;
    if (count > kMostInRegisters) return from_panel(rows, count, panel, scales);
    switch (count) {
      case 1:  // long rows one after another as memory likes it, short ones side by side to hide the latency of sums
        if (sizeof(Scale) == 1 && bytes_ > kShortRow) return from_codes<1, 1>(rows, panel, scales);
        return from_codes<1, 4>(rows, panel, scales);
      case 2:
        return from_codes<2, 2>(rows, panel, scales);
      case 3:
        return from_codes<3, 2>(rows, panel, scales);
      case 4:
        return from_codes<4, 2>(rows, panel, scales);
      case 5:
        return from_codes<5, 2>(rows, panel, scales);
      case 6:
        return from_codes<6, 2>(rows, panel, scales);
      case 7:
        return from_codes<7, 2>(rows, panel, scales);
      default:
        return from_codes<8, 2>(rows, panel, scales);
    }
  }

  // One row of activations with long rows whose scales do not fold: those are widened a row at a time, so that they
  // stay in the first-level cache.
  void one_row(const bf16* x, const Panel& panel) const {
    float* scales = reinterpret_cast<float*>(scales_);
    alignas(64) float results[kMostInRegisters][kLinearPanel];
    for (int64_t n = 0; n < panel.outputs; ++n) {
      if (n == 0 || Rows::kScales > 1) read_scales(panel.row + n, scales);
      ask_for(panel, n + kAhead, 1, 0, bytes_);
      dot_row<1>(expand_, codes(panel.row + n), bytes_, scales, x, 0, results[0] + n);
    }
    put_rows(0, 1, panel.group, panel.begin, panel.outputs, results[0]);
  }

  // As many inputs at a time as the first-level cache holds of kM rows.
  template <int kM, int kN, class Scale>
  void from_codes(const bf16* rows, const Panel& panel, const Scale* scales) const {
    const int64_t range = kRangeBlocks * kTile / kM * Rows::kBlockBytes, stride = p_.weight.stride[0];
    for (int64_t at = 0; at == 0 || at < bytes_; at += range) {
      const int64_t here = bytes_ - at < range ? bytes_ - at : range, block = at / Rows::kBlockBytes;
      const uint8_t* from = codes(panel.row) + at;
      const auto tile = [&](int64_t n, auto width) {
        constexpr int kWidth = decltype(width)::value;
        ask_for(panel, n + kAhead, kWidth, at, range);
        code_tile<kM, kWidth>(expand_, from + n * stride, stride, here,
                              scales + n * scale_stride_ + block * Rows::kScales, scale_stride_, rows + block * kBlock,
                              row_elements_, at == 0, sums_ + n * kM);
      };
      int64_t n = 0;
      for (; n + kN <= panel.outputs; n += kN) tile(n, Constant<kN>{});
      for (; n < panel.outputs; ++n) tile(n, Constant<1>{});
    }
    alignas(64) float results[kMostInRegisters][kLinearPanel];
    int64_t n = 0;
    if constexpr (kM == 1) {  // whatever kN, the sums of outputs follow one another
      for (; n + 16 <= panel.outputs; n += 16) add_lanes<1, 16>(sums_ + n, n, results);
    }
    for (; n + kN <= panel.outputs; n += kN) add_lanes<kM, kN>(sums_ + n * kM, n, results);
    for (; n < panel.outputs; ++n) add_lanes<kM, 1>(sums_ + n * kM, n, results);
    put_rows(0, kM / parts_, panel.group, panel.begin, panel.outputs, results[0]);
  }

  // Asks for the codes of weight rows n to n + count, beyond the panel those of its next range or of the next panel.
  void ask_for(const Panel& panel, int64_t n, int64_t count, int64_t at, int64_t range) const {
    if (n >= panel.outputs) {
      at = at + range < bytes_ ? at + range : 0;
      n -= at > 0 ? panel.outputs : 0;
    }
    const int64_t end = at + range < bytes_ ? at + range : bytes_;
    for (int64_t i = 0; i < count; ++i) {
      const uint8_t* row = codes(panel.row) + (n + i) * p_.weight.stride[0];  // past the end it does nothing
      for (int64_t b = at; b < end; b += 64) _mm_prefetch(row + b, _MM_HINT_T1);
    }
  }

  template <int kM, int kN>
  static void add_lanes(const __m512* from, int64_t n, float (*sums)[kLinearPanel]) {
    if constexpr (kM * kN >= 8) {
      __m512 all[16];
      for (int i = 0; i < 16; ++i) all[i] = i < kM * kN ? from[i] : _mm512_setzero_ps();
      alignas(64) float results[16];
      _mm512_store_ps(results, sums16(all));
      for (int m = 0; m < kM; ++m) __builtin_memcpy(sums[m] + n, results + m * kN, kN * sizeof(float));
    } else {
      for (int i = 0; i < kM * kN; ++i) sums[i / kN][n + i % kN] = total(from[i]);
    }
  }

  template <class Scale>
  void from_panel(const bf16* rows, int64_t count, const Panel& panel, const Scale* scales) const {
    for (int64_t n = 0; n < panel.outputs; ++n) {
      expand_codes(expand_, codes(panel.row + n), bytes_, scales + n * scale_stride_, panel_ + n * row_elements_);
    }
    const int64_t tile = parts_ == 1 ? kTile : parts_, chunk = kSumRows / kTile * tile;  // whole tokens
    for (int64_t row = 0; row < count; row += chunk) {
      const int64_t here = count - row < chunk ? count - row : chunk;
      for (int64_t at = 0; at == 0 || at < row_elements_; at += kRangeBlocks * kBlock) {
        for (int64_t m = 0; m < here; m += tile) {
          const auto tiles = [&](auto height) {
            panel_tiles<decltype(height)::value>(rows, row, m, at, panel, scales);
          };
          pick(here - m < tile ? here - m : tile, tiles);
        }
      }
    }
  }
  // A range of inputs of rows row + m to row + m + kM with the whole panel.
  template <int kM, class Scale>
  void panel_tiles(const bf16* rows, int64_t row, int64_t m, int64_t at, const Panel& panel,
                   const Scale* scales) const {
    const int64_t left = row_elements_ - at, range = kRangeBlocks * kBlock, inputs = left < range ? left : range;
    const bool last = left <= range;
    const bf16* x = rows + (row + m) * row_elements_ + at;
    __m512* sums = sums_ + m * kLinearPanel;
    alignas(64) float results[kTile][kLinearPanel];
    const auto tile = [&](int64_t n, auto width) {
      constexpr int kN = decltype(width)::value;
      const bf16* w = panel_ + n * row_elements_ + at;
      if constexpr (sizeof(Scale) == 1) {
        dense_tile<kM, kN>(x, row_elements_, w, row_elements_, inputs, at == 0, sums + n * kM);
      } else {
        scaled_tile<kM, kN, Rows>(x, row_elements_, w, row_elements_,
                                  scales + n * scale_stride_ + at / kBlock * Rows::kScales, scale_stride_, inputs,
                                  at == 0, sums + n * kM);
      }
      if (last) add_lanes<kM, kN>(sums + n * kM, n, results);
    };
    int64_t n = 0;
    for (; n + kTile <= panel.outputs; n += kTile) tile(n, Constant<kTile>{});
    for (; n < panel.outputs; ++n) tile(n, Constant<1>{});
    if (last) put_rows((row + m) / parts_, kM / parts_, panel.group, panel.begin, panel.outputs, results[0]);
  }

  template <int kValue>
  struct Constant {
    static constexpr int value = kValue;
  };

  // body of a count from 1 to 4, as a constant.
  template <class Body>
  static void pick(int64_t count, const Body& body) {
    static_assert(kTile == 4);
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
  int64_t parts_, row_elements_, bytes_, scale_stride_;
  __m512* sums_;
  uint8_t* scales_;  // of the panel: shifts of one row, or float32
  bf16* panel_;
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
