// What the 32 lanes of a warp do together: all of them are at the instruction.
#include <algorithm>
#include <cmath>

#include "common/dtype.h"
#include "instructions.h"
#include "tensor_core.h"
#include "warp.h"

namespace dsv4::machine {

namespace {

void all_lanes(Warp& w, Slot mask) {
  for (int l = 0; l < kLanes; ++l) {
    if (w.lanes<uint32_t>(mask)[l] != kAllLanes) throw Fault("not all lanes are asked to take part");
  }
}

// Operands: value, lane or mask, clamp (31: the whole warp), members. The second result: whether the lane exists.
template <bool kButterfly>
void shuffle(Warp& w, const Instruction& i, uint32_t) {
  all_lanes(w, i.in[3]);
  uint32_t value[kLanes];
  memcpy(value, w.lanes<uint32_t>(i.in[0]), sizeof(value));
  uint32_t out[kLanes];
  for (int l = 0; l < kLanes; ++l) {
    if (w.lanes<uint32_t>(i.in[2])[l] != 31) throw Fault("a shuffle of part of a warp");
    const uint32_t b = w.lanes<uint32_t>(i.in[1])[l] & 31u;
    out[l] = value[kButterfly ? static_cast<uint32_t>(l) ^ b : b];
  }
  memcpy(w.lanes<uint32_t>(i.out[0]), out, sizeof(out));
  if (i.out.size() > 1) w.bits(i.out[1]) = kAllLanes;
}

void ballot(Warp& w, const Instruction& i, uint32_t) {
  all_lanes(w, i.in[1]);
  const uint32_t bits = w.bits(i.in[0]);
  std::fill_n(w.lanes<uint32_t>(i.out[0]), kLanes, bits);
}

void sum(Warp& w, const Instruction& i, uint32_t) {
  all_lanes(w, i.in[1]);
  uint32_t total = 0;
  for (int l = 0; l < kLanes; ++l) total += w.lanes<uint32_t>(i.in[0])[l];
  std::fill_n(w.lanes<uint32_t>(i.out[0]), kLanes, total);
}

// Lanes run in step here: nothing to wait for.
void sync_warp(Warp& w, const Instruction& i, uint32_t) { all_lanes(w, i.in[0]); }

// Matrix m: rows of 16 bytes at the addresses of lanes 8 m to 8 m + 7.
template <bool kTransposed>
void ldmatrix(Warp& w, const Instruction& i, uint32_t) {
  uint16_t matrix[4][8][8];
  for (int l = 0; l < kLanes; ++l) {
    const uint32_t address = w.lanes<uint32_t>(i.in[0])[l] + static_cast<uint32_t>(i.offset[0]);
    memcpy(matrix[l / 8][l % 8], w.shared->at(address, 16, false, w.self), 16);
  }
  for (int m = 0; m < 4; ++m) {
    uint32_t* out = w.lanes<uint32_t>(i.out[m]);
    for (int l = 0; l < kLanes; ++l) {
      const int major = l / 4, minor = l % 4 * 2;
      const uint16_t low = kTransposed ? matrix[m][minor][major] : matrix[m][major][minor];
      const uint16_t high = kTransposed ? matrix[m][minor + 1][major] : matrix[m][major][minor + 1];
      out[l] = low | static_cast<uint32_t>(high) << 16;
    }
  }
}

// d [16, 8] = a [16, 16] b [16, 8] + c. Lane l has of a the rows l / 4 and 8 more (registers 0, 2 and 1, 3), columns
// 2 (l % 4) and the next (and 8 more in registers 2, 3); of b those rows of column l / 4; of c and d the rows of a, the
// columns 2 (l % 4) and the next.
void mma(Warp& w, const Instruction& i, uint32_t) {
  float a[16][16], b[8][16];
  for (int l = 0; l < kLanes; ++l) {
    const int group = l / 4, pair = l % 4 * 2;
    for (int r = 0; r < 4; ++r) {
      const uint32_t word = w.lanes<uint32_t>(i.in[r])[l];
      float* row = a[group + r % 2 * 8] + pair + r / 2 * 8;
      row[0] = float_from_bits(word << 16);
      row[1] = float_from_bits(word & 0xFFFF0000u);
    }
    for (int r = 0; r < 2; ++r) {
      const uint32_t word = w.lanes<uint32_t>(i.in[4 + r])[l];
      float* column = b[group] + pair + r * 8;
      column[0] = float_from_bits(word << 16);
      column[1] = float_from_bits(word & 0xFFFF0000u);
    }
  }
  float d[4][kLanes];
  for (int l = 0; l < kLanes; ++l) {
    for (int r = 0; r < 4; ++r) {
      const float *row = a[l / 4 + r / 2 * 8], *column = b[l % 4 * 2 + r % 2];
      d[r][l] = sum_of_sixteen(row, column, w.lanes<float>(i.in[6 + r])[l]);
    }
  }
  for (int r = 0; r < 4; ++r) memcpy(w.lanes<float>(i.out[r]), d[r], sizeof(d[r]));
}

// bar.sync NUMBER or NUMBER, THREADS.
void barrier(Warp& w, const Instruction& i, uint32_t) {
  w.barrier = static_cast<int>(w.lanes<uint32_t>(i.in[0])[0]);
  w.barrier_threads = i.in.size() > 1 ? static_cast<int>(w.lanes<uint32_t>(i.in[1])[0]) : 0;
}

}  // namespace

void add_collectives(Operations& all) {
  all["shfl.sync.bfly.b32"] = {shuffle<true>, Kind::kCollective};
  all["shfl.sync.idx.b32"] = {shuffle<false>, Kind::kCollective};
  all["vote.sync.ballot.b32"] = {ballot, Kind::kCollective};
  all["redux.sync.add.u32"] = all["redux.sync.add.s32"] = {sum, Kind::kCollective};
  all["bar.warp.sync"] = {sync_warp, Kind::kCollective};
  all["ldmatrix.sync.aligned.m8n8.x4.shared.b16"] = {ldmatrix<false>, Kind::kCollective};
  all["ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16"] = {ldmatrix<true>, Kind::kCollective};
  all["mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32"] = {mma, Kind::kCollective};
  all["bar.sync"] = {barrier, Kind::kBarrier};
}

}  // namespace dsv4::machine
