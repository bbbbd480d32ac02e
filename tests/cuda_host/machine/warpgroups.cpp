// Hopper's asynchronous products of four warps: each warp has sixteen of the 64 rows, so that the machine takes them
// warp by warp. A product reads its registers and the shared memory as late as it may, when it is waited for; until
// then nobody may write that memory. It sees what was written there before a fence of the asynchronous proxy by the
// thread that wrote it.
#include <algorithm>

#include "common/dtype.h"
#include "instructions.h"
#include "tensor_core.h"
#include "warp.h"

namespace dsv4::machine {

namespace {

constexpr int kDepth = 16;

// A matrix [columns, 16] of bfloat16 in shared memory, K along rows of 128 bytes that are permuted in eights (the
// 128-byte swizzle); eight rows lie `group` bytes after the eight before.
class SwizzledMatrix {
 public:
  explicit SwizzledMatrix(uint64_t descriptor)
      : start_(static_cast<uint32_t>(descriptor & 0x3FFFu) << 4),
        group_(static_cast<uint32_t>(descriptor >> 32 & 0x3FFFu) << 4) {
    if (descriptor >> 62 != 1 || (descriptor >> 49 & 7u) != 0)
      throw Fault("a matrix that is not swizzled by 128 bytes");
    if (start_ % 128 + 2 * kDepth > 128) throw Fault("a matrix that leaves its rows of 128 bytes");
  }

  // Of the 16 bytes from element 8 `half` of a column on.
  uint32_t place(int column, int half) const {
    const uint32_t address =
        start_ + static_cast<uint32_t>(column / 8) * group_ + static_cast<uint32_t>(column % 8 * 128 + half * 16);
    return (address ^ (address >> 7 & 7u) << 4) - kSharedBase;
  }

 private:
  uint32_t start_, group_;
};

int columns_of(const Instruction& i) { return static_cast<int>(i.out.size()) * 2; }

void fence_registers(Warp& w, const Instruction&, uint32_t) { w.registers_fenced = true; }

void fence_proxy(Warp& w, const Instruction&, uint32_t lanes) {
  if (lanes != kAllLanes) throw Fault("a fence of part of a warp");
  for (const Bytes& bytes : w.written) {
    for (uint32_t i = bytes.first; i < bytes.first + bytes.count; ++i) {
      if (w.shared->state[i] == SharedMemory::kWritten) w.shared->state[i] = SharedMemory::kFenced;
    }
  }
  w.written.clear();
}

// Operands: a (four registers, as of mma.sync), b's descriptor, whether d is added to, the signs of a and b, 0: K along
// rows.
void start(Warp& w, const Instruction& i, uint32_t) {
  if (!w.registers_fenced) throw Fault("a product without a fence of its registers");
  for (const int operand : {6, 7}) {
    if (w.lanes<uint32_t>(i.in[static_cast<size_t>(operand)])[0] != 1) throw Fault("an operand with its sign turned");
  }
  if (w.lanes<uint32_t>(i.in[8])[0] != 0) throw Fault("a transposed operand");
  const uint32_t adds = w.bits(i.in[5]);
  if (adds != 0 && adds != kAllLanes) throw Fault("lanes that do not agree");
  const uint64_t descriptor = w.lanes<uint64_t>(i.in[4])[0];
  const SwizzledMatrix b(descriptor);
  for (int column = 0; column < columns_of(i); ++column) {
    for (int half = 0; half < 2; ++half) {
      const uint32_t place = b.place(column, half);
      if (place + 16 > w.shared->bytes.size()) throw Fault("a matrix outside of the shared memory");
      for (uint32_t at = place; at < place + 16; ++at) {
        if (w.shared->state[at] != SharedMemory::kFenced) throw Fault("a product of shared memory that is not fenced");
        ++w.shared->readers[at];
      }
      w.shared->touch(place, 16, false, w.self);
    }
  }
  w.products.push_back({&i, descriptor, adds != 0});
}

void finish(Warp& w, const Product& product) {
  const Instruction& i = *product.instruction;
  const SwizzledMatrix matrix(product.descriptor);
  float a[16][kDepth];
  for (int l = 0; l < kLanes; ++l) {
    for (int r = 0; r < 4; ++r) {
      const uint32_t word = w.lanes<uint32_t>(i.in[static_cast<size_t>(r)])[l];
      float* row = a[l / 4 + r % 2 * 8] + l % 4 * 2 + r / 2 * 8;
      row[0] = float_from_bits(word << 16);
      row[1] = float_from_bits(word & 0xFFFF0000u);
    }
  }
  for (int group = 0; group < columns_of(i) / 8; ++group) {
    float b[8][kDepth];
    for (int column = 0; column < 8; ++column) {
      for (int half = 0; half < 2; ++half) {
        const uint32_t place = matrix.place(8 * group + column, half);
        uint16_t bits[8];
        memcpy(bits, w.shared->bytes.data() + place, sizeof(bits));
        for (int k = 0; k < 8; ++k) b[column][8 * half + k] = float_from_bits(static_cast<uint32_t>(bits[k]) << 16);
        for (uint32_t at = place; at < place + 16; ++at) --w.shared->readers[at];
        w.shared->touch(place, 16, false, w.self);
      }
    }
    for (int r = 0; r < 4; ++r) {
      float* d = w.lanes<float>(i.out[static_cast<size_t>(4 * group + r)]);
      for (int l = 0; l < kLanes; ++l) {
        d[l] = sum_of_sixteen(a[l / 4 + r / 2 * 8], b[l % 4 * 2 + r % 2], product.adds ? d[l] : 0.0f);
      }
    }
  }
}

void commit(Warp& w, const Instruction&, uint32_t) {
  w.product_groups.push_back(std::move(w.products));
  w.products.clear();
}

void wait(Warp& w, const Instruction& i, uint32_t) {
  while (w.product_groups.size() > w.lanes<uint32_t>(i.in[0])[0]) {
    for (const Product& product : w.product_groups.front()) finish(w, product);
    w.product_groups.pop_front();
  }
}

}  // namespace

void add_warpgroups(Operations& all) {
  all["fence.proxy.async.shared::cta"] = {fence_proxy};
  all["wgmma.fence.sync.aligned"] = {fence_registers, Kind::kCollective};
  all["wgmma.commit_group.sync.aligned"] = {commit, Kind::kCollective};
  all["wgmma.wait_group.sync.aligned"] = {wait, Kind::kCollective};
  for (const int columns : {8, 16, 32, 64, 128, 256}) {
    all["wgmma.mma_async.sync.aligned.m64n" + std::to_string(columns) + "k16.f32.bf16.bf16"] = {start,
                                                                                                Kind::kCollective};
  }
}

}  // namespace dsv4::machine
