// The AMX tile instructions, each behind a function with two bodies: the instruction, and with DSV4_AMX_MODEL plain C++
// that does the same to tiles in memory. A native test compiles the kernels a second time with the model, so that their
// logic is checked on machines without AMX; the model lives in a namespace of its own, so that both fit one program.
// cpu_isa() (common/hardware.h) has asked the kernel for permission before anything here runs.
#pragma once

#include <cstdint>

#include "cpu/avx512/lanes.h"

#if defined(DSV4_AMX_MODEL)
#define DSV4_AMX_NAMESPACE amx_model
#else
#define DSV4_AMX_NAMESPACE amx
#endif

namespace dsv4::DSV4_AMX_NAMESPACE {
namespace {

inline constexpr int kTiles = 8, kTileRows = 16, kTileBytes = 64;  // bytes of a row

// Rows and bytes a row of every tile; rows 0: not used. The layout that ldtilecfg reads.
struct TileConfig {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t row_bytes[16] = {};
  uint8_t rows[16] = {};

  void set(int tile, int tile_rows, int bytes) {
    rows[tile] = static_cast<uint8_t>(tile_rows);
    row_bytes[tile] = static_cast<uint16_t>(bytes);
  }
};
static_assert(sizeof(TileConfig) == 64);

#if defined(DSV4_AMX_MODEL)

struct TileState {
  TileConfig config;
  bool configured = false;
  alignas(64) uint8_t tiles[kTiles][kTileRows][kTileBytes];
};
thread_local TileState tile_state;

DSV4_INLINE void tile_configure(const TileConfig& config) {
  tile_state.config = config;
  tile_state.configured = true;
  memset(tile_state.tiles, 0, sizeof(tile_state.tiles));
}
DSV4_INLINE void tile_release() {
  tile_state.configured = false;
  memset(tile_state.tiles, 0xFF, sizeof(tile_state.tiles));  // what outlives a release shows as NaN
}
template <int kTile>
DSV4_INLINE void tile_zero() {
  memset(tile_state.tiles[kTile], 0, sizeof(tile_state.tiles[kTile]));
}
template <int kTile>
DSV4_INLINE void tile_load(const void* from, int64_t stride) {
  const TileConfig& c = tile_state.config;
  for (int r = 0; r < c.rows[kTile]; ++r) {
    memcpy(tile_state.tiles[kTile][r], static_cast<const char*>(from) + r * stride, c.row_bytes[kTile]);
  }
}
template <int kTile>
DSV4_INLINE void tile_load_once(const void* from, int64_t stride) {
  tile_load<kTile>(from, stride);
}
template <int kTile>
DSV4_INLINE void tile_store(void* to, int64_t stride) {
  const TileConfig& c = tile_state.config;
  for (int r = 0; r < c.rows[kTile]; ++r) {
    memcpy(static_cast<char*>(to) + r * stride, tile_state.tiles[kTile][r], c.row_bytes[kTile]);
  }
}
// c += a b: a [m][2 k] and b [k][n][2] bfloat16, c [m][n] float32. Even and odd elements are summed apart, then added.
template <int kC, int kA, int kB>
DSV4_INLINE void tile_dot() {
  const TileConfig& config = tile_state.config;
  const int rows = config.rows[kC], columns = config.row_bytes[kC] / 4, pairs = config.row_bytes[kA] / 4;
  const bool fits = tile_state.configured && config.rows[kA] == rows && config.rows[kB] == pairs &&
                    config.row_bytes[kB] == config.row_bytes[kC];
  for (int m = 0; m < rows; ++m) {
    for (int n = 0; n < columns; ++n) {
      bf16 a[2 * kTileRows], b[2];
      float sums[2] = {}, c;
      memcpy(a, tile_state.tiles[kA][m], sizeof(a));
      for (int k = 0; k < pairs; ++k) {
        memcpy(b, tile_state.tiles[kB][k] + 4 * n, sizeof(b));
        for (int half = 0; half < 2; ++half) {
          sums[half] = __builtin_fmaf(to_float(a[2 * k + half]), to_float(b[half]), sums[half]);
        }
      }
      memcpy(&c, tile_state.tiles[kC][m] + 4 * n, 4);
      c = fits ? c + (sums[0] + sums[1]) : __builtin_nanf("");  // a fault on the real unit
      memcpy(tile_state.tiles[kC][m] + 4 * n, &c, 4);
    }
  }
}

#else

// Assembly, since the compiler's intrinsics take literal tile numbers only, and GCC's _tile_loadconfig says that it
// reads 8 bytes: stores to the other 56 may be dropped.
DSV4_INLINE void tile_configure(const TileConfig& config) { __asm__ volatile("ldtilecfg %0" : : "m"(config)); }
DSV4_INLINE void tile_release() { _tile_release(); }
template <int kTile>
DSV4_INLINE void tile_zero() {
  __asm__ volatile("tilezero %%tmm%c0" : : "i"(kTile));
}
template <int kTile>
DSV4_INLINE void tile_load(const void* from, int64_t stride) {
  __asm__ volatile("tileloadd (%1,%2,1), %%tmm%c0" : : "i"(kTile), "r"(from), "r"(stride) : "memory");
}
// What is not wanted again soon: it does not drive other data out of the first-level cache.
template <int kTile>
DSV4_INLINE void tile_load_once(const void* from, int64_t stride) {
  __asm__ volatile("tileloaddt1 (%1,%2,1), %%tmm%c0" : : "i"(kTile), "r"(from), "r"(stride) : "memory");
}
template <int kTile>
DSV4_INLINE void tile_store(void* to, int64_t stride) {
  __asm__ volatile("tilestored %%tmm%c0, (%1,%2,1)" : : "i"(kTile), "r"(to), "r"(stride) : "memory");
}
template <int kC, int kA, int kB>
DSV4_INLINE void tile_dot() {
  __asm__ volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" : : "i"(kC), "i"(kA), "i"(kB));
}

#endif

}  // namespace
}  // namespace dsv4::DSV4_AMX_NAMESPACE
