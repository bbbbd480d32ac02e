// mhc_pre, mhc_post_pre and mhc_head with bfloat16 streams: fn r in AMX tiles. fn is split into bfloat16 high + low,
// which stand side by side as 48 columns (3 tiles of 16; mhc_head: 8 columns in one), so a step is 16 tokens x 32
// elements, loaded from the streams as they lie, times 3 tiles. Relative error of the products against float32 fn:
// 2.5e-6. 3 D / 8 tile cycles a token leave memory as the bound: 10 D + 80 bytes a token; 60 % of the copy bandwidth
// expected. Everything but the product is the AVX-512 kernels'.
#include "cpu/mhc.h"

#include "cpu/amx/tile.h"
#include "cpu/avx512/mhc_forward.h"

namespace dsv4::DSV4_AMX_NAMESPACE {
namespace {

using avx512::kSquares;
using avx512::kStep;
using avx512::kSums;
using avx512::Pair;
using avx512::Rows;

static_assert(avx512::kTile == kTileRows && 2 * kStep == kTileBytes);

constexpr int kA = 3, kB = 4;        // tiles: 0 to 2 results, 3 streams, 4 to 6 fn
constexpr int kChunk = 8;            // steps whose fn is packed on the way
constexpr int kTileWords = 16 * 16;  // 32-bit words of a tile of fn: a pair of elements, a column

struct Product {
  static constexpr int kParts = 4 * kStreams;

  static constexpr int tiles(int outputs) { return (2 * outputs + 15) / 16; }
  static int64_t steps(int64_t hidden) { return (hidden + kStep - 1) / kStep; }
  static int64_t bytes(int64_t hidden, int outputs) {
    return kStreams * steps(hidden) * tiles(outputs) * kTileWords * static_cast<int64_t>(sizeof(uint32_t));
  }

  // 32 elements of a row of fn as bfloat16: the nearest value, or what that leaves over.
  DSV4_INLINE __m512i split(Pair x, bool low) {
    const __m512i high = reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(x.b, x.a));
    if (!low) return high;
    const __m512i a = _mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm512_castsi512_si256(high)), 16);
    const __m512i b = _mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm512_extracti64x4_epi64(high, 1)), 16);
    return reinterpret_cast<__m512i>(
        _mm512_cvtne2ps_pbh(_mm512_sub_ps(x.b, _mm512_castsi512_ps(b)), _mm512_sub_ps(x.a, _mm512_castsi512_ps(a))));
  }

  template <int kOutputs>
  DSV4_INLINE void pack_steps(const View<const float, 2>& fn, int64_t hidden, int64_t stream, int64_t step,
                              int64_t count, void* to) {
    uint32_t* out = static_cast<uint32_t*>(to);
    for (int64_t s = step; s < step + count; ++s) {
      const int64_t left = hidden - s * kStep;
      for (int tile = 0; tile < tiles(kOutputs); ++tile, out += kTileWords) {
        __m512i words[16];
        for (int n = 0; n < 16; ++n) {
          const int column = 16 * tile + n, j = column % kOutputs;
          if (column >= 2 * kOutputs) {
            words[n] = _mm512_setzero_si512();
            continue;
          }
          const float* row = fn.data + j * fn.stride[0] + stream * hidden + s * kStep;
          words[n] = split(left >= kStep ? avx512::load(row) : avx512::load(row, left), column >= kOutputs);
        }
        avx512::transpose(words);
        for (int k = 0; k < 16; ++k) _mm512_storeu_si512(out + 16 * k, words[k]);
      }
    }
  }

  template <int kOutputs>
  DSV4_INLINE void pack(const View<const float, 2>& fn, int64_t hidden, int64_t part, void* to) {
    const int64_t all = steps(hidden), stream = part / 4, begin = all * (part % 4) / 4, end = all * (part % 4 + 1) / 4;
    pack_steps<kOutputs>(fn, hidden, stream, begin, end - begin,
                         static_cast<uint32_t*>(to) + (stream * all + begin) * tiles(kOutputs) * kTileWords);
  }

  template <int kOutputs>
  DSV4_INLINE void multiply_step(const void* streams, int64_t stride, const uint32_t* fn) {
    tile_load<kA>(streams, stride);
    tile_load<kB>(fn, kTileBytes);
    tile_dot<0, kA, kB>();
    if constexpr (kOutputs == kMixes) {
      tile_load<kB + 1>(fn + kTileWords, kTileBytes);
      tile_dot<1, kA, kB + 1>();
      tile_load<kB + 2>(fn + 2 * kTileWords, kTileBytes);
      tile_dot<2, kA, kB + 2>();
    }
  }

  // A token's sum of squares over one stream.
  DSV4_INLINE float squares(const bf16* r, int64_t hidden) {
    __m512 sums[2] = {_mm512_setzero_ps(), _mm512_setzero_ps()};
    int64_t d = 0;
    for (; d + kStep <= hidden; d += kStep) {
      const Pair x = avx512::load(r + d);
      sums[0] = _mm512_fmadd_ps(x.a, x.a, sums[0]);
      sums[1] = _mm512_fmadd_ps(x.b, x.b, sums[1]);
    }
    if (d < hidden) {
      const Pair x = avx512::load(r + d, hidden - d);
      sums[0] = _mm512_fmadd_ps(x.a, x.a, sums[0]);
      sums[1] = _mm512_fmadd_ps(x.b, x.b, sums[1]);
    }
    return _mm512_reduce_add_ps(_mm512_add_ps(sums[0], sums[1]));
  }

  // The products and squares of one stream. packed null: fn is packed on the way.
  template <class X, int kOutputs>
  DSV4_INLINE void segment(const Rows<X>& rows, int64_t stream, const View<const float, 2>& fn, const void* packed,
                           float (*out)[kSums]) {
    const int64_t tokens = rows.tokens;
    constexpr int kCount = tiles(kOutputs), kStepWords = kCount * kTileWords;
    alignas(64) uint32_t chunk[kChunk * kStepWords];
    alignas(64) float products[kTileRows][kCount * 16];
    alignas(64) bf16 last[kTileRows][kStep];
    TileConfig config;
    for (int tile = 0; tile < kCount; ++tile) {
      config.set(tile, static_cast<int>(tokens), kTileBytes);
      config.set(kB + tile, kTileRows, kTileBytes);
    }
    config.set(kA, static_cast<int>(tokens), kTileBytes);
    tile_configure(config);
    tile_zero<0>();
    if constexpr (kCount == 3) {
      tile_zero<1>();
      tile_zero<2>();
    }

    const int64_t all = steps(rows.hidden), tail = rows.hidden % kStep;
    const X* r = rows.data + stream * rows.stream;
    for (int64_t step = 0; step < all; step += kChunk) {
      const int64_t end = step + kChunk <= all ? step + kChunk : all;
      const uint32_t* block = static_cast<const uint32_t*>(packed) + (stream * all + step) * kStepWords;
      if (packed == nullptr) {
        pack_steps<kOutputs>(fn, rows.hidden, stream, step, end - step, chunk);
        block = chunk;
      }
      for (int64_t s = step; s < end; ++s, block += kStepWords) {
        if (s + 1 < all || tail == 0) {
          multiply_step<kOutputs>(r + s * kStep, rows.token * static_cast<int64_t>(sizeof(X)), block);
          continue;
        }
        for (int64_t t = 0; t < tokens; ++t) {
          const __m512i words = _mm512_maskz_loadu_epi16(avx512::mask32(tail), r + t * rows.token + s * kStep);
          _mm512_store_si512(last[t], words);
        }
        multiply_step<kOutputs>(last, kTileBytes, block);
      }
    }
    constexpr int64_t kStride = kCount * kTileBytes;
    tile_store<0>(products[0], kStride);
    if constexpr (kCount == 3) {
      tile_store<1>(products[0] + 16, kStride);
      tile_store<2>(products[0] + 32, kStride);
    }
    tile_release();
    for (int64_t t = 0; t < tokens; ++t) {
      for (int j = 0; j < kOutputs; ++j) out[t][j] = products[t][j] + products[t][kOutputs + j];
      out[t][kSquares] = squares(r + t * rows.token, rows.hidden);
    }
  }

  // Adds up the streams' sums, first to last.
  DSV4_INLINE void add_segments(const float (*parts)[avx512::kTile][kSums], int64_t tokens, float (*out)[kSums]) {
    for (int64_t t = 0; t < tokens; ++t) {
      for (int j = 0; j < kSums; j += 16) {
        __m512 sum = _mm512_load_ps(parts[0][t] + j);
        for (int s = 1; s < kStreams; ++s) sum = _mm512_add_ps(sum, _mm512_load_ps(parts[s][t] + j));
        _mm512_store_ps(out[t] + j, sum);
      }
    }
  }

  template <class X, int kOutputs>
  DSV4_INLINE void many(const Rows<X>& rows, const void* packed, const avx512::Traffic<X>& traffic,
                        float (*out)[kSums]) {
    alignas(64) float parts[kStreams][avx512::kTile][kSums] = {};
    for (int s = 0; s < kStreams; ++s) {
      segment<X, kOutputs>(rows, s, {}, packed, parts[s]);
      if (traffic.write != nullptr) avx512::write_rows(rows, s, traffic);
    }
    add_segments(parts, rows.tokens, out);
  }

  // The streams are spread over the threads.
  template <class X, int kOutputs>
  DSV4_INLINE void few(const Rows<X>& rows, const View<const float, 2>& fn, const Context& context,
                       float (*out)[kSums]) {
    alignas(64) float parts[kStreams][avx512::kTile][kSums] = {};
    parallel(context, kStreams, [&](int64_t begin, int64_t end) {
      for (int64_t s = begin; s < end; ++s) segment<X, kOutputs>(rows, s, fn, nullptr, parts[s]);
    });
    add_segments(parts, rows.tokens, out);
  }
};

}  // namespace

int64_t mhc_workspace_bytes(int64_t hidden, int mixes) { return Product::bytes(hidden, mixes); }

Status mhc_pre(const MhcPreParams& p, const Context& context) {
  return avx512::run<Product, bf16>(avx512::PreOp{p, nullptr}, context);
}

Status mhc_post_pre(const MhcPostPreParams& p, const Context& context) {
  return avx512::run<Product, bf16>(avx512::PreOp{p.pre, &p.post}, context);
}

Status mhc_head(const MhcHeadParams& p, const Context& context) {
  return avx512::run<Product, bf16>(avx512::HeadOp{p}, context);
}

}  // namespace dsv4::DSV4_AMX_NAMESPACE
