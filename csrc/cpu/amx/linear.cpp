// The linear layers in AMX tiles, for any number of rows: a tile unit's order of summation is its own, so rows that
// stand alone cannot go another way and keep their bits. That costs few rows nothing, because weights are the left
// operand here: 16 of their rows and 32 inputs make a tile as they expand, in registers, and only the activations,
// which are prepared once, have to be transposed into pairs. Up to 16 rows of those are the columns of a tile, which is
// as wide as there are rows. 512 weights take some 55 cycles to expand from e4m3, 28 from e2m1 (plain ones are copied:
// 16), and 16 for their products with 16 rows.
//
// A piece of work expands 512 inputs of 32 outputs at a time, 32 KiB in the first-level cache, and multiplies them with
// up to 512 rows, 32 at a time: 2 x 2 tiles of sums, which wait in memory for the next 512 inputs without losing their
// place in the order (sum = sum + 32 products, over all inputs). Of many rows a piece has 128 outputs, so that the
// activations of 512 inputs come into the second-level cache once for all four.
// Expected: the bandwidth of memory at few rows (a core takes 7 bytes of e4m3 codes a cycle, 5.8 of e2m1, 32 of plain
// weights), half of the tile peak at 64 rows, 80 % at 512: the other cycles expand weights and carry sums.
//
// Scales are e8m0 and go into the weights, exactly: 2^-60 to 1 with e4m3, 2^-63 to 2^63 with e2m1. 32 outputs with a
// scale beyond are multiplied row by row as the experts' are (avx512/weight_rows.h), slowly; quantisers do not produce
// them.
#include "cpu/linear.h"

#include "cpu/amx/tile_product.h"
#include "cpu/avx512/weight_rows.h"
#include "cpu/linear_driver.h"

namespace dsv4::DSV4_AMX_NAMESPACE {
namespace {

using avx512::Block, avx512::blocks_of, avx512::kBlock, avx512::kBlockSteps, avx512::kStep, avx512::StoredScales;

constexpr int64_t kInputs = 256;  // of a job
constexpr int64_t kInputBlocks = kInputs / kBlock, kInputSteps = kInputs / kStep;
constexpr int64_t kMostRows = 512;          // whose sums wait in memory
constexpr int64_t kFewRows = 64;            // up to which pieces are small, for the threads' sake
constexpr int64_t kWide = 256;              // outputs of a piece of more
constexpr int64_t kPieceWeights = 1 << 17;  // of a piece of few rows, about
constexpr int64_t kGapBytes = 16 << 10;

// Weights of a format: how 128 inputs of a row expand. kLeast to kMost are the scales that go into them.
template <class Rows>
struct Quantised : Rows {
  using Element = uint8_t;
  static constexpr int kLeast = avx512::kLeastScale, kMost = Rows::kMostScale;
};
using Fp8Weights = Quantised<avx512::Fp8Rows>;
using Fp4Weights = Quantised<avx512::Fp4Rows>;

struct PlainWeights {
  using Element = bf16;
  static constexpr int64_t kBlockBytes = kBlock * static_cast<int64_t>(sizeof(bf16)), kScales = 0;
  static constexpr int kLeast = 0;
  static constexpr int64_t bytes(int64_t inputs) { return inputs * static_cast<int64_t>(sizeof(bf16)); }

  DSV4_MEMBER Block expand(const uint8_t* words, StoredScales) const {
    Block block;
    for (int64_t j = 0; j < kBlockSteps; ++j) block.w[j] = _mm512_loadu_si512(words + j * kTileBytes);
    return block;
  }
  DSV4_MEMBER Block expand(const uint8_t* words, StoredScales, int64_t count) const {
    Block block;
    for (int64_t j = 0; j < kBlockSteps; ++j) {
      block.w[j] = _mm512_maskz_loadu_epi8(avx512::mask64(count - j * kTileBytes), words + j * kTileBytes);
    }
    return block;
  }
  static void arrange(const bf16* x, bf16* to) { __builtin_memcpy(to, x, kBlock * sizeof(bf16)); }
};

template <class Weights, bool kQuantise>
class Kernel {
 public:
  static constexpr int64_t kUnit = kTileRows;
  // An odd number of 16 KiB, so that the same inputs of many units spread over the sets of the second-level cache.
  static int64_t unit_bytes(const LinearParams& p) {
    const int64_t bytes = columns(p) * row_bytes(p);
    return p.x.size(0) <= kUnit ? bytes : (round_up(bytes, kGapBytes) / kGapBytes | 1) * kGapBytes;
  }
  static int64_t panel(const LinearParams& p) {
    if (p.x.size(0) > kFewRows) return kWide;
    int64_t outputs = kSide;
    while (outputs < kWide && 2 * outputs * p.x.size(2) <= kPieceWeights) outputs *= 2;
    return outputs;
  }
  static int64_t memory(const LinearParams& p) {
    return 2 * kWeightsBytes + panel(p) / kSide * pairs(p) * kSumsBytes +
           (Weights::kScales == 0 ? 0 : row_bytes(p) + scales_bytes(p));
  }

  // Up to 16 rows: [step][pair of inputs][row][2], in the order of the weights' inputs, zero beyond the last.
  static void prepare(const LinearParams& p, int64_t token, int64_t group, uint8_t* to) {
    const int64_t inputs = p.x.size(2), left = p.x.size(0) - token, rows = left < kUnit ? left : kUnit;
    const int64_t width = columns(p);
    uint32_t* pairs = reinterpret_cast<uint32_t*>(to);
    for (int64_t at = 0; at < inputs; at += kBlock) {
      const int64_t count = inputs - at < kBlock ? inputs - at : kBlock;
      alignas(64) bf16 blocks[kUnit][kBlock];
      for (int64_t i = 0; i < rows; ++i) {
        if (p.x.dtype == DType::kBFloat16) {
          arranged(p.x.as<const bf16>().at(token + i, group, at), count, blocks[i]);
        } else if constexpr (kQuantise) {
          arranged(p.x.as<const float>().at(token + i, group, at), count, blocks[i]);
        }
      }
      for (int64_t j = 0; j < kBlockSteps; ++j, pairs += kTileRows * width) {
        __m512i words[kTileRows];
        for (int64_t i = 0; i < kTileRows; ++i) {
          words[i] = i < rows ? _mm512_load_si512(blocks[i] + j * kStep) : _mm512_setzero_si512();
        }
        if (width == 1) {
          _mm512_storeu_si512(pairs, words[0]);
          continue;
        }
        avx512::transpose(words);
        for (int64_t k = 0; k < kTileRows; ++k) {
          _mm512_mask_storeu_epi32(pairs + k * width, avx512::low16(width), words[k]);
        }
      }
    }
  }

  Kernel(const LinearParams& p, uint8_t* memory)
      : p_(p),
        inputs_(p.x.size(2)),
        rows_(p.x.size(0)),
        columns_(columns(p)),
        whole_(inputs_ / kBlock),
        ranges_(inputs_ <= kInputs ? 1 : (inputs_ + kInputs - 1) / kInputs),
        weights_(reinterpret_cast<bf16*>(memory)),
        sums_(reinterpret_cast<Sums*>(memory + 2 * kWeightsBytes)),
        row_(reinterpret_cast<bf16*>(sums_ + panel(p) / kSide * pairs(p))),
        scales_(reinterpret_cast<float*>(reinterpret_cast<uint8_t*>(row_) + row_bytes(p))) {}

  void run(const uint8_t* units, int64_t group, int64_t begin, int64_t end) {
    const int64_t row = group * p_.weight.size(0) / p_.x.size(1) + begin;
    sides_ = 0;
    for (int64_t side = 0; side * kSide < end - begin; ++side) {
      const Outputs out = outputs(group, begin, end, row, side);
      if (folds(out)) {
        side_[sides_++] = out;
      } else if constexpr (Weights::kScales > 0) {
        multiply_and_scale(units, out);
      }
    }
    if (sides_ == 0) return;
    configure();
    for (int64_t first = 0; first < rows_; first += kMostRows) {
      const int64_t last = rows_ - first < kMostRows ? rows_ : first + kMostRows;
      last - first <= kSide ? few(units, first) : many(units, first, last);
    }
    tile_release();
  }

 private:
  using Sums = float[kSide][kSide];  // [output][row of activations]
  static constexpr int64_t kSumsBytes = sizeof(Sums);
  static constexpr int64_t kWeightsBytes = kSide * kInputs * static_cast<int64_t>(sizeof(bf16));

  // Outputs [first, first + count) of a group, whose weights begin at `row`; at most kSide.
  struct Outputs {
    int64_t group, first, count, row;
  };
  static Outputs outputs(int64_t group, int64_t begin, int64_t end, int64_t row, int64_t side) {
    const int64_t first = begin + side * kSide;
    return {group, first, end - first < kSide ? end - first : kSide, row + side * kSide};
  }

  static int64_t row_bytes(const LinearParams& p) {
    return blocks_of(p.x.size(2)) * kBlock * static_cast<int64_t>(sizeof(bf16));
  }
  static int64_t scales_bytes(const LinearParams& p) {
    return round_up(blocks_of(p.x.size(2)) * Weights::kScales * static_cast<int64_t>(sizeof(float)), 64);
  }
  static int64_t columns(const LinearParams& p) { return p.x.size(0) < kUnit ? p.x.size(0) : kUnit; }  // of a unit
  static int64_t pairs(const LinearParams& p) {                                                        // of units
    const int64_t rows = p.x.size(0) < kMostRows ? p.x.size(0) : kMostRows;
    return (rows + kSide - 1) / kSide;
  }

  // Up to 128 activations in the order of the weights' inputs.
  template <class X>
  static void arranged(const X* x, int64_t count, bf16* to) {
    alignas(64) bf16 block[kBlock];
    if constexpr (kQuantise) {
      avx512::quantise_block(x, count, block);
    } else {
      for (int64_t at = 0; at < kBlock; at += kStep) {
        const int64_t left = count - at < 0 ? 0 : count - at > kStep ? kStep : count - at;
        _mm512_store_si512(block + at, _mm512_maskz_loadu_epi16(avx512::mask32(left), x + at));
      }
    }
    Weights::arrange(block, to);
  }

  const uint8_t* codes(int64_t row) const {
    return reinterpret_cast<const uint8_t*>(p_.weight.as<const typename Weights::Element>().at(row));
  }
  const uint8_t* scale_row(int64_t row) const {
    return p_.scale.as<const uint8_t>().at(Weights::kScales == 1 ? row / 128 : row);
  }

  // Whether the scales of these outputs go into their weights: a matter of the weights alone.
  bool folds(const Outputs& out) const {
    __mmask64 beyond = 0;
    if constexpr (Weights::kScales > 0) {
      const __m512i least = _mm512_set1_epi8(Weights::kLeast),
                    most = _mm512_set1_epi8(static_cast<char>(Weights::kMost));
      for (int64_t r = 0; r < out.count; r += Weights::kScales == 1 ? 128 - (out.row + r) % 128 : 1) {
        const uint8_t* scales = scale_row(out.row + r);
        for (int64_t i = 0; i < p_.scale.size(1); i += 64) {
          const __m512i some = _mm512_mask_loadu_epi8(least, avx512::mask64(p_.scale.size(1) - i), scales + i);
          beyond |= _mm512_cmplt_epu8_mask(some, least) | _mm512_cmpgt_epu8_mask(some, most);
        }
      }
    }
    return beyond == 0;
  }

  // A range of inputs of up to 32 outputs.
  struct Job {
    const Outputs* out;
    int64_t side, range;
    int64_t block() const { return range * kInputBlocks; }
  };
  int64_t steps(const Job& job) const {
    const int64_t left = blocks_of(inputs_) - job.block();
    return (left < kInputBlocks ? left : kInputBlocks) * kBlockSteps;
  }
  const uint8_t* first_codes(const Job& job) const { return codes(job.out->row) + job.block() * Weights::kBlockBytes; }

  // The weights of a job on their way to [output / 16][step][output % 16][32], 128 inputs of a row at a time. Beyond
  // the last output it is there once more: nothing that memory might hold gets into a tile.
  struct Expansion {
    const Outputs* out;
    int64_t block, blocks;  // the job's inputs
    int64_t ahead;          // bytes from its codes to those of the job after it
    int64_t row, rows, at;  // of the rows; blocks of this one
    const uint8_t *from, *scales;
    bf16 *to, *weights;
  };
  void begin(const Job& job, const Job& after, bf16* weights) {
    const int64_t rows = inputs_ == 0 ? 0 : round_up(job.out->count, kTileRows);
    expansion_ = {job.out,
                  job.block(),
                  steps(job) / kBlockSteps,
                  first_codes(after) - first_codes(job),
                  0,
                  rows,
                  0,
                  nullptr,
                  nullptr,
                  nullptr,
                  weights};
  }
  void start_row(Expansion& e) const {
    const int64_t row = e.out->row + (e.row < e.out->count ? e.row : e.out->count - 1);
    e.from = codes(row) + e.block * Weights::kBlockBytes;
    e.to = e.weights + e.row / kTileRows * kTileRows * kInputs + e.row % kTileRows * kStep;
    if constexpr (Weights::kScales > 0) e.scales = scale_row(row) + e.block * Weights::kScales;
  }
  __attribute__((noinline)) void expand(int64_t items) {
    Expansion e = expansion_;
    for (; items > 0 && e.row < e.rows; --items) {
      if (e.at == 0) start_row(e);
      avx512::ask(e.from + e.ahead, Weights::kBlockBytes);
      Block w;
      if (e.block + e.at < whole_) {
        w = expand_.expand(e.from, StoredScales{e.scales});
      } else {
        uint8_t scales[4] = {Weights::kLeast, Weights::kLeast, Weights::kLeast, Weights::kLeast};
        const int64_t at = whole_ * Weights::kScales;
        for (int64_t i = 0; at + i < p_.scale.size(1); ++i) scales[i] = e.scales[i];
        w = expand_.expand(e.from, StoredScales{scales}, Weights::bytes(inputs_) - whole_ * Weights::kBlockBytes);
      }
      for (int64_t j = 0; j < kBlockSteps; ++j, e.to += kTileElements) _mm512_store_si512(e.to, w.w[j]);
      e.from += Weights::kBlockBytes;
      e.scales += Weights::kScales;
      if (++e.at == e.blocks) e.at = 0, ++e.row;
    }
    expansion_ = e;
  }

  void configure() const {
    TileConfig config;
    for (int tile = 0; tile < kTiles; ++tile) {
      config.set(tile, kTileRows, tile == 4 || tile == 5 ? kTileBytes : static_cast<int>(columns_) * 4);
    }
    tile_configure(config);
  }

  const bf16* unit(const uint8_t* units, int64_t m) const {
    return reinterpret_cast<const bf16*>(units + m / kUnit * round_up(unit_bytes(p_), 64));
  }

  // multiply(job, steps between which 128 inputs of a row have to be expanded) for every job, in order.
  template <class JobOf, class Multiply>
  void pipeline(const JobOf& job_of, const Multiply& multiply) {
    const int64_t jobs = sides_ * ranges_;
    begin(job_of(0), job_of(jobs > 1 ? 1 : 0), weights_);
    expand(kSide * kInputBlocks);
    for (int64_t j = 0; j < jobs; ++j) {
      if (j + 1 < jobs) begin(job_of(j + 1), job_of(j + 2 < jobs ? j + 2 : j + 1), buffer(j + 1));
      multiply(job_of(j), buffer(j));
      expand(kSide * kInputBlocks);
    }
  }
  bf16* buffer(int64_t job) const { return weights_ + job % 2 * kSide * kInputs; }

  // Up to 32 rows of activations: sums stay in tile registers over all inputs.
  void few(const uint8_t* units, int64_t first) {
    pipeline([&](int64_t j) { return Job{side_ + j / ranges_, j / ranges_, j % ranges_}; },
             [&](const Job& job, const bf16* weights) {
               const bool last = job.range + 1 == ranges_;
               multiply(units, first, job, weights, kSide * kInputBlocks, job.range == 0 ? Start::kZero : Start::kGoOn,
                        last, sums_[0]);
               if (last) write(first, *job.out, sums_[0]);
             });
  }
  // More: sums wait in memory while one range of inputs of all outputs is multiplied.
  void many(const uint8_t* units, int64_t first, int64_t last) {
    const int64_t pairs = (last - first + kSide - 1) / kSide;
    pipeline([&](int64_t j) { return Job{side_ + j % sides_, j % sides_, j / sides_}; },
             [&](const Job& job, const bf16* weights) {
               for (int64_t m = first; m < last; m += kSide) {
                 Sums& sums = sums_[job.side * pairs + (m - first) / kSide];
                 multiply(units, m, job, weights, (kSide * kInputBlocks + pairs - 1) / pairs,
                          job.range == 0 ? Start::kZero : Start::kLoad, true, sums);
                 if (job.range + 1 == ranges_) write(m, *job.out, sums);
               }
             });
  }

  enum class Start { kZero, kGoOn, kLoad };

  // A job with up to 32 rows of activations from m on, while `items` of the next one's are expanded.
  DSV4_MEMBER void multiply(const uint8_t* units, int64_t m, const Job& job, const bf16* weights, int64_t items,
                            Start start, bool store, Sums& sums) {
    const int64_t count = steps(job), some = count == 0 ? 0 : (items + count - 1) / count, tile = columns_ * kStep;
    const TileSteps w[2] = {{weights}, {weights + kTileRows * kInputs}};
    TileSteps x[2] = {};
    const bool two = rows_ - m > kUnit;
    for (int64_t i = 0; i < 1 + two; ++i) {
      x[i] = {unit(units, m + i * kUnit) + job.block() * kBlockSteps * tile, tile, columns_ * 4};
    }
    with_shape(job.out->count > kTileRows, two, [&](auto shape) __attribute__((always_inline)) {
      if (start == Start::kZero) zero_sums<shape.kRows, shape.kColumns>();
      if (start == Start::kLoad) load_sums<shape.kRows, shape.kColumns>(sums);
      const auto between = [&](int64_t s) __attribute__((always_inline)) {
        if (s * some < items) expand(some);
      };
      if (columns_ == kUnit) {
        add_products<shape.kRows, shape.kColumns, true>(w, x, count, between);
      } else {
        add_products<shape.kRows, shape.kColumns>(w, x, count, between);
      }
      if (store) store_sums<shape.kRows, shape.kColumns>(sums);
    });
  }

  void write(int64_t m, const Outputs& out, const Sums& sums) const {
    p_.out.dtype == DType::kBFloat16 ? put<bf16>(m, out, sums) : put<float>(m, out, sums);
  }

  template <class Y>
  void put(int64_t m, const Outputs& out, const Sums& sums) const {
    const View<Y, 3> to = p_.out.as<Y>();
    for (int64_t i = 0; i < 2 && rows_ - m > i * kUnit; ++i) {
      const int64_t rows = rows_ - m - i * kUnit < kUnit ? rows_ - m - i * kUnit : kUnit;
      __m512i halves[2][kTileRows] = {};
      for (int64_t half = 0; half * kTileRows < out.count; ++half) {
        for (int64_t n = 0; n < kTileRows; ++n) {
          halves[half][n] = _mm512_maskz_loadu_epi32(avx512::low16(rows), sums[half * kTileRows + n] + i * kTileRows);
        }
        avx512::transpose(halves[half]);
      }
      for (int64_t row = 0; row < rows; ++row) {
        Y* place = to.at(m + i * kUnit + row, out.group, out.first);
        const avx512::Pair values = {_mm512_castsi512_ps(halves[0][row]), _mm512_castsi512_ps(halves[1][row])};
        avx512::store(place, avx512::arrange(values, place), out.count);
      }
    }
  }

  // Sums of blocks, each multiplied by its scale, one row of activations after another.
  void multiply_and_scale(const uint8_t* units, const Outputs& out) const {
    const int64_t words = blocks_of(inputs_) * kBlock / 2, padded = blocks_of(inputs_) * Weights::kScales;
    for (int64_t m = 0; m < rows_; ++m) {
      const int64_t i = m % kUnit;
      for (int64_t k = 0; k < words; ++k) __builtin_memcpy(row_ + 2 * k, unit(units, m) + 2 * (k * columns_ + i), 4);
      for (int64_t n = 0; n < out.count; ++n) {
        avx512::widen_scales(scale_row(out.row + n), p_.scale.size(1), padded, scales_);
        float sum;
        avx512::dot_row<1>(expand_, codes(out.row + n), Weights::bytes(inputs_), scales_, row_, 0, &sum);
        if (p_.out.dtype == DType::kBFloat16) {
          *p_.out.as<bf16>().at(m, out.group, out.first + n) = bf16_from_float(sum);
        } else {
          *p_.out.as<float>().at(m, out.group, out.first + n) = sum;
        }
      }
    }
  }

  static constexpr int64_t kElementBytes = sizeof(typename Weights::Element);

  const LinearParams& p_;
  const Weights expand_{};
  int64_t inputs_, rows_, columns_, whole_, ranges_;  // whole_: blocks of 128 inputs
  bf16* weights_;                                     // of two jobs
  Sums* sums_;
  bf16* row_;
  float* scales_;
  Outputs side_[kWide / kSide];  // those whose scales fold
  int64_t sides_ = 0;
  Expansion expansion_{};
};

using Fp8 = Kernel<Fp8Weights, true>;
using Fp4 = Kernel<Fp4Weights, true>;
using Grouped = Kernel<Fp8Weights, false>;
using Dense = Kernel<PlainWeights, false>;

AnyView<3> one_group(const AnyView<2>& rows) {
  return {rows.data, rows.dtype, {rows.shape[0], 1, rows.shape[1]}, {rows.stride[0], 0, rows.stride[1]}};
}
LinearParams as_linear(const DenseLinearParams& p) {
  return {one_group(p.x), p.weight, {}, one_group(p.out), p.workspace};
}

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
  return linear_workspace_bytes<Dense>(as_linear(p), c);
}
Status dense_linear(const DenseLinearParams& p, const Context& c) { return run_linear<Dense>(as_linear(p), c); }

}  // namespace dsv4::DSV4_AMX_NAMESPACE
