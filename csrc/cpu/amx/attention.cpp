// sparse_attention by AMX tiles, bfloat16: 2 tiles of 16 heads (left) x 2 tiles of 16 keys or dims (right) in 4 tiles
// of sums, 32 dims or 32 keys a step. All but the two products is the AVX-512 kernel's, the layout of the right operand
// included: a word is a pair of elements, as the tiles want it. H D / 256 tile cycles a key, 128 at 64 heads of 512
// dims, stand against 150 to 200 for decoding and transposing it by vectors; so 40 % of the tile rate is expected
// there.
#include "cpu/attention.h"

#include "cpu/amx/tile.h"
#include "cpu/avx512/attention_forward.h"

namespace dsv4::DSV4_AMX_NAMESPACE {
namespace {

using avx512::kGroup;
using avx512::kStep;
using avx512::kWordElements;

// Tiles 0 to 3: sums of heads (first, second 16) x columns (first, second 16); 4, 5: left; 6, 7: right.
void configure(int64_t heads) {
  const int first = static_cast<int>(smaller(heads, kTileRows)),
            second = static_cast<int>(smaller(heads - first, kTileRows));
  TileConfig config;
  for (int tile = 0; tile < kTiles; ++tile) {
    const bool right = tile >= 6, of_second = tile == 2 || tile == 3 || tile == 5;
    const int rows = right ? kTileRows : of_second ? second : first;
    if (rows > 0) config.set(tile, rows, kTileBytes);
  }
  tile_configure(config);
}

// Row strides in bytes.
struct Left {
  const bf16* data;
  int64_t stride;
};
struct Sums {
  float* data;
  int64_t stride;
};

// sums[h][0:32] (+)= left[h][0:32 steps] right[0:16 steps][0:32 words], for up to 32 heads.
template <bool kTwo>
DSV4_INLINE void multiply(Left left, const uint32_t* right, int64_t steps, bool fresh, Sums sums) {
  char* out = reinterpret_cast<char*>(sums.data);
  const int64_t second = kTileRows * sums.stride;
  if (fresh) {
    tile_zero<0>();
    tile_zero<1>();
    if (kTwo) tile_zero<2>();
    if (kTwo) tile_zero<3>();
  } else {
    tile_load<0>(out, sums.stride);
    tile_load<1>(out + kTileBytes, sums.stride);
    if (kTwo) tile_load<2>(out + second, sums.stride);
    if (kTwo) tile_load<3>(out + second + kTileBytes, sums.stride);
  }
  const char* from = reinterpret_cast<const char*>(left.data);
  constexpr int64_t kRightStride = kGroup * 4;
  for (int64_t step = 0; step < steps; ++step, from += kTileBytes, right += kTileRows * kGroup) {
    tile_load<4>(from, left.stride);
    tile_load<6>(right, kRightStride);
    tile_dot<0, 4, 6>();
    tile_load<7>(right + 16, kRightStride);
    tile_dot<1, 4, 7>();
    if (kTwo) {
      tile_load<5>(from + kTileRows * left.stride, left.stride);
      tile_dot<2, 5, 6>();
      tile_dot<3, 5, 7>();
    }
  }
  tile_store<0>(out, sums.stride);
  tile_store<1>(out + kTileBytes, sums.stride);
  if (kTwo) tile_store<2>(out + second, sums.stride);
  if (kTwo) tile_store<3>(out + second + kTileBytes, sums.stride);
}

// The same for any number of heads and `count` right operands that lie `right_stride` words apart, their sums 32 apart.
DSV4_INLINE void multiply_all(Left left, int64_t heads, const uint32_t* right, int64_t right_stride, int64_t count,
                              int64_t steps, bool fresh, Sums sums) {
  constexpr int64_t kHeads = 2 * kTileRows;
  for (int64_t h = 0; h < heads; h += kHeads) {
    const int64_t left_heads = heads - h;
    // Two blocks of 32 heads are alike; the last may be smaller.
    if (h == 0 || left_heads < kHeads) configure(smaller(left_heads, kHeads));
    const Left from = {left.data + h * left.stride / 2, left.stride};
    for (int64_t i = 0; i < count; ++i) {
      const Sums to = {sums.data + h * sums.stride / 4 + i * kGroup, sums.stride};
      if (left_heads > kTileRows) {
        multiply<true>(from, right + i * right_stride, steps, fresh, to);
      } else {
        multiply<false>(from, right + i * right_stride, steps, fresh, to);
      }
    }
  }
  tile_release();
}

struct Product {
  static constexpr int64_t kKeptBytes = 1 << 20;  // of 2 MiB of second-level cache

  // scores[h][key] = query[h] . key, for whole groups of keys.
  template <class X>
  DSV4_INLINE void score(const X* query, int64_t query_stride, int64_t heads, const uint32_t* tile, int64_t groups,
                         int64_t head_dim, float* scores, int64_t stride) {
    const int64_t words = head_dim / kWordElements<X>;
    multiply_all({query, 2 * query_stride}, heads, tile, words * kGroup, groups, head_dim / kStep, true,
                 {scores, 4 * stride});
  }

  // sums[h][d] (+)= sum over the steps of a tile of weights[h] * values.
  template <class X>
  DSV4_INLINE void mix(const X* weights, int64_t stride, int64_t heads, const uint32_t* tile, int64_t steps,
                       int64_t head_dim, bool fresh, float* sums) {
    multiply_all({weights, 2 * stride}, heads, tile, avx512::group_stride(steps), head_dim / kGroup, steps / kTileRows,
                 fresh, {sums, 4 * head_dim});
  }
};

}  // namespace

int64_t sparse_attention_workspace_bytes(const SparseAttentionParams& p, const Context& context) {
  return avx512::Call<Product, bf16, bf16>(p, context).bytes();
}

Status sparse_attention(const SparseAttentionParams& p, const Context& context) {
  avx512::Call<Product, bf16, bf16>(p, context).run();
  return Status::ok();
}

}  // namespace dsv4::DSV4_AMX_NAMESPACE
