// The instructions that ptx.h wraps.
#include <cmath>
#include <cstring>

#include "common/dtype.h"
#include "simt/block.h"

namespace dsv4::simt {
namespace {

void check(Block& b, Site site, const std::string& wrong) {
  if (!wrong.empty()) b.fail(site, wrong);
}

float bf16_half(uint32_t word, int half) { return float_from_bits(half == 0 ? word << 16 : word & 0xFFFF0000u); }

// Lane l, register j, element e of each operand, as the PTX manual has it.
void multiply(Warp& warp) {
  float a[16][16], b[16][8];
  for (int l = 0; l < 32; ++l) {
    for (int e = 0; e < 2; ++e) {
      for (int j = 0; j < 4; ++j)
        a[l / 4 + 8 * (j % 2)][2 * (l % 4) + 8 * (j / 2) + e] = bf16_half(warp.lane[l].a[j], e);
      for (int j = 0; j < 2; ++j) b[2 * (l % 4) + 8 * j + e][l / 4] = bf16_half(warp.lane[l].b[j], e);
    }
  }
  for (int l = 0; l < 32; ++l) {
    for (int i = 0; i < 4; ++i) {
      float sum = warp.lane[l].d[i];
      for (int k = 0; k < 16; ++k) sum += a[l / 4 + 8 * (i / 2)][k] * b[k][2 * (l % 4) + i % 2];
      warp.lane[l].d[i] = sum;
    }
  }
}

}  // namespace

void Block::perform(Warp& warp, int first, int lanes) {
  if (warp.kind == Collective::kSyncWarp) {
    std::vector<int> members;
    for (int l = 0; l < lanes; ++l) members.push_back(first + l);
    join_clocks(members);
  } else if (warp.kind == Collective::kShuffle) {
    for (int l = 0; l < lanes; ++l) *warp.lane[l].result = warp.lane[warp.lane[l].operand & 31].value;
  } else if (warp.kind == Collective::kMma) {
    multiply(warp);
  } else if (warp.kind == Collective::kLdmatrix || warp.kind == Collective::kLdmatrixTransposed) {
    for (int matrix = 0; matrix < 4; ++matrix) load_matrix(warp, first, matrix);
  }
}

void Block::load_matrix(Warp& warp, int first, int matrix) {
  const bool transposed = warp.kind == Collective::kLdmatrixTransposed;
  int rows_in_bank[8] = {};
  uint32_t words[8][4];  // word w of a row: its columns 2 w and 2 w + 1
  for (int row = 0; row < 8; ++row) {
    const int owner = 8 * matrix + row;
    const uint32_t address = warp.lane[owner].value;
    check(*this, warp.site, shared_.load(first + owner, clock(first + owner), address, words[row], 16));
    for (int l = 0; l < 32; ++l) {
      if ((transposed ? l % 4 : l / 4) != (transposed ? row / 2 : row)) continue;  // gets none of this row
      check(*this, warp.site, shared_.check_load(first + l, clock(first + l), address, 16));
    }
    counters().bank_conflicts += rows_in_bank[address / 16 % 8]++ > 0;
  }
  const auto element = [&](int row, int column) { return words[row][column / 2] >> (column % 2 * 16) & 0xFFFFu; };
  for (int l = 0; l < 32; ++l) {
    const int row = l / 4, pair = l % 4 * 2;
    warp.lane[l].result[matrix] = transposed ? element(pair, row) | element(pair + 1, row) << 16 : words[row][pair / 2];
  }
}

int thread_index() { return block().current().index; }
int64_t block_index(int axis) { return block().index(axis); }
uint32_t shared_base() { return block().shared().base(); }

void load_shared(uint32_t address, void* value, int bytes, Site site) {
  Block& b = block();
  b.maybe_yield();
  const int t = b.current().index;
  b.count_banks(site, address, bytes);
  check(b, site, b.shared().load(t, b.clock(t), address, value, bytes));
}

void store_shared(uint32_t address, const void* value, int bytes, Site site) {
  Block& b = block();
  b.maybe_yield();
  const int t = b.current().index;
  b.count_banks(site, address, bytes);
  check(b, site, b.shared().store(t, b.clock(t), address, value, bytes));
}

void sync_threads(Site site) {
  if (skipped("sync_threads", site)) return;
  block().barrier("sync_threads", 0, block().threads(), site);
}

void sync_named(int barrier, int threads, Site site) {
  if (skipped("sync_named", site)) return;
  block().barrier("sync_named", barrier, threads, site);
}

void sync_warp(Site site) {
  if (skipped("sync_warp", site)) return;
  block().collective(Collective::kSyncWarp, "sync_warp", site, Lane());
}

uint32_t shuffle(uint32_t value, int source_lane, Site site) {
  uint32_t result = 0;
  Lane lane;
  lane.value = value;
  lane.operand = source_lane;
  lane.result = &result;
  block().collective(Collective::kShuffle, "shuffle", site, lane);
  return result;
}

uint32_t shuffle_xor(uint32_t value, int mask, Site site) {
  return shuffle(value, (block().current().index % 32) ^ mask, site);
}

void ldmatrix_x4(uint32_t address, uint32_t matrices[4], Site site) {
  Lane lane;
  lane.value = address;
  lane.result = matrices;
  block().collective(Collective::kLdmatrix, "ldmatrix", site, lane);
}

void ldmatrix_x4_transposed(uint32_t address, uint32_t matrices[4], Site site) {
  Lane lane;
  lane.value = address;
  lane.result = matrices;
  block().collective(Collective::kLdmatrixTransposed, "ldmatrix.trans", site, lane);
}

void mma_m16n8k16_bf16(float d[4], const uint32_t a[4], const uint32_t b[2], Site site) {
  Lane lane;
  lane.d = d;
  lane.a = a;
  lane.b = b;
  block().collective(Collective::kMma, "mma", site, lane);
}

void cp_async_16(uint32_t destination, const void* source, int source_bytes, Site site) {
  Block& b = block();
  b.maybe_yield();
  if (source_bytes != 0 && source_bytes != 16) b.fail(site, "cp_async_16 copies 16 bytes or none");
  check_aligned(source, 16, site);
  const int t = b.current().index;
  check(b, site, b.shared().begin_copy(t, b.clock(t), destination));
  b.current().where = site;
  b.current().uncommitted.push_back({destination, source, source_bytes});
}

void cp_async_commit(Site site) {
  if (skipped("cp_async_commit", site)) return;
  Thread& t = block().current();
  t.groups.push_back(std::move(t.uncommitted));
  t.uncommitted.clear();
}

// Copies land here, as late as they may: never on their own, however long the thread takes.
void cp_async_wait(int pending_groups, Site site) {
  if (skipped("cp_async_wait", site)) return;
  Block& b = block();
  Thread& t = b.current();
  while (static_cast<int>(t.groups.size()) > pending_groups) {
    for (const AsyncCopy& copy : t.groups.front()) b.shared().end_copy(t.index, b.clock(t.index), copy);
    t.groups.erase(t.groups.begin());
  }
}

void check_aligned(const void* pointer, int bytes, Site site) {
  if (reinterpret_cast<uintptr_t>(pointer) % static_cast<uintptr_t>(bytes) != 0) {
    block().fail(site, "misaligned global access of " + std::to_string(bytes) + " bytes");
  }
}

}  // namespace dsv4::simt
