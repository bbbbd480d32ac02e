// Loads, stores and asynchronous copies.
#include "instructions.h"
#include "warp.h"

namespace dsv4::machine {

void SharedMemory::start(size_t size, int warps) {
  warps_ = warps;
  read_.assign(size / kWord * static_cast<size_t>(warps), 0);
  written_.assign(size / kWord, 0);
  writer_.assign(size / kWord, 0);
  bytes.assign(size, 0xFF);
  state.assign(size, kUnwritten);
  readers.assign(size, 0);
}

void SharedMemory::touch(uint32_t first, uint32_t count, bool write, const Toucher& who) {
  const auto warps = static_cast<uint32_t>(warps_);
  for (uint32_t word = first / kWord; word < (first + count) / kWord; ++word) {
    if (writer_[word] != who.warp && written_[word] > who.clock[writer_[word]]) {
      throw Fault(write ? "race: two warps write the same shared memory"
                        : "race: reads shared memory that another warp writes");
    }
    uint16_t* read = read_.data() + word * warps;
    if (!write) {
      read[who.warp] = who.clock[who.warp];
      continue;
    }
    for (uint32_t warp = 0; warp < warps; ++warp) {
      if (warp != who.warp && read[warp] > who.clock[warp]) {
        throw Fault("race: writes shared memory that another warp reads");
      }
    }
    written_[word] = who.clock[who.warp];
    writer_[word] = static_cast<uint8_t>(who.warp);
  }
}

uint8_t* SharedMemory::at(uint32_t address, int size, bool write, const Toucher& who) {
  const auto length = static_cast<uint32_t>(size);
  if (address % length != 0) throw Fault("misaligned access of " + std::to_string(size) + " bytes of shared memory");
  if (address < kSharedBase || address - kSharedBase + length > bytes.size()) {
    throw Fault("access of " + std::to_string(size) + " bytes outside of the shared memory");
  }
  const uint32_t first = address - kSharedBase;
  for (uint32_t i = first; i < first + length; ++i) {
    if (state[i] == kInFlight) throw Fault("shared memory that an asynchronous copy is still to write");
    if (!write && state[i] == kUnwritten) throw Fault("reads shared memory that nothing has written");
    if (write && readers[i] > 0) throw Fault("writes shared memory that a product on its way still reads");
    if (write) state[i] = kWritten;
  }
  touch(first, length, write, who);
  return bytes.data() + first;
}

namespace {

enum class Space { kGlobal, kShared, kParameter };

template <Space kSpace>
uint64_t address_of(Warp& w, const Instruction& i, int operand, int number, int lane) {
  // Bases of shared memory are words, unless they are constants.
  const uint64_t base =
      kSpace == Space::kShared ? w.lanes<uint32_t>(i.in[operand])[lane] : w.lanes<uint64_t>(i.in[operand])[lane];
  return base + static_cast<uint64_t>(i.offset[number]);
}

template <Space kSpace>
const uint8_t* source(Warp& w, uint64_t address, int bytes) {
  if constexpr (kSpace == Space::kShared) return w.shared->at(static_cast<uint32_t>(address), bytes, false, w.self);
  if constexpr (kSpace == Space::kGlobal) return w.global->at(address, bytes, false, w.self);
  if (address % static_cast<uint64_t>(bytes) != 0 ||
      address + static_cast<uint64_t>(bytes) > static_cast<uint64_t>(w.program->parameter_bytes)) {
    throw Fault("outside of the kernel's parameters");
  }
  return w.parameters + address;
}

// An element into a register that may be wider: by zeros, or by its sign.
template <bool kSigned>
void put(Warp& w, Slot slot, int register_bytes, int lane, const uint8_t* from, int bytes) {
  uint64_t value = 0;
  memcpy(&value, from, static_cast<size_t>(bytes));
  if (kSigned && bytes < 8 && (value >> (8 * bytes - 1) & 1u) != 0) value |= ~uint64_t{0} << (8 * bytes);
  if (register_bytes < bytes) throw Fault("a register narrower than what is put into it");
  memcpy(w.registers.get() + slot + lane * register_bytes, &value, static_cast<size_t>(register_bytes));
}

template <Space kSpace, bool kSigned>
void load(Warp& w, const Instruction& i, uint32_t lanes) {
  uint8_t values[kLanes][16];
  each(lanes, [&](int l) {  // all reads before the first write: the address may be among the results
    const int bytes = i.bytes * static_cast<int>(i.out.size());
    memcpy(values[l], source<kSpace>(w, address_of<kSpace>(w, i, 0, 0, l), bytes), static_cast<size_t>(bytes));
  });
  each(lanes, [&](int l) {
    for (size_t n = 0; n < i.out.size(); ++n) {
      put<kSigned>(w, i.out[n], i.out_bytes, l, values[l] + n * static_cast<size_t>(i.bytes), i.bytes);
    }
  });
}

template <Space kSpace>
void store(Warp& w, const Instruction& i, uint32_t lanes) {
  const int count = static_cast<int>(i.in.size()) - 1, bytes = i.bytes * count;
  each(lanes, [&](int l) {
    const uint64_t address = address_of<kSpace>(w, i, 0, 0, l);
    if (kSpace == Space::kShared) w.wrote(static_cast<uint32_t>(address) - kSharedBase, static_cast<uint32_t>(bytes));
    uint8_t* to = kSpace == Space::kShared ? w.shared->at(static_cast<uint32_t>(address), bytes, true, w.self)
                                           : w.global->at(address, bytes, true, w.self);
    for (int n = 0; n < count; ++n) {
      const uint8_t* value = w.registers.get() + i.in[n + 1] + l * i.in_bytes[n + 1];
      memcpy(to + n * i.bytes, value, static_cast<size_t>(i.bytes));
    }
  });
}

// Sixteen bytes, or zeros. They arrive when the thread waits for them, and until then nobody may touch the place.
void copy(Warp& w, const Instruction& i, uint32_t lanes) {
  each(lanes, [&](int l) {
    const auto destination = static_cast<uint32_t>(address_of<Space::kShared>(w, i, 0, 0, l));
    const uint32_t bytes = w.lanes<uint32_t>(i.in[3])[l];
    if (bytes != 0 && bytes != 16) throw Fault("a copy of part of 16 bytes");
    const uint64_t from = address_of<Space::kGlobal>(w, i, 1, 1, l);
    const uint8_t* source = bytes == 0 ? nullptr : w.global->at(from, 16, false, w.self);
    w.shared->at(destination, 16, true, w.self);
    memset(w.shared->state.data() + destination - kSharedBase, SharedMemory::kInFlight, 16);
    w.open[static_cast<size_t>(l)].push_back({destination, source});
  });
}

void commit(Warp& w, const Instruction&, uint32_t lanes) {
  each(lanes, [&](int l) {
    w.groups[static_cast<size_t>(l)].push_back(std::move(w.open[static_cast<size_t>(l)]));
    w.open[static_cast<size_t>(l)].clear();
  });
}

void wait(Warp& w, const Instruction& i, uint32_t lanes) {
  each(lanes, [&](int l) {
    auto& groups = w.groups[static_cast<size_t>(l)];
    while (groups.size() > w.lanes<uint32_t>(i.in[0])[l]) {
      for (const Copy& copy : groups.front()) {
        const uint32_t place = copy.destination - kSharedBase;
        memset(w.shared->state.data() + place, SharedMemory::kWritten, 16);
        w.wrote(place, 16);
        w.shared->touch(place, 16, true, w.self);
        if (copy.source == nullptr) {
          memset(w.shared->bytes.data() + place, 0, 16);
        } else {
          memcpy(w.shared->bytes.data() + place, copy.source, 16);
        }
      }
      groups.pop_front();
    }
  });
}

template <Space kSpace>
void add_space(Operations& all, const std::string& space) {
  for (const char* vector : {".", ".v2.", ".v4."}) {
    for (const char* type : {"b8", "b16", "b32", "b64", "u8", "u16", "u32", "u64", "f32", "f64"}) {
      all["ld" + space + vector + type] = {load<kSpace, false>};
      if (kSpace != Space::kParameter) all["st" + space + vector + type] = {store<kSpace>};
    }
    for (const char* type : {"s8", "s16", "s32", "s64"}) {
      all["ld" + space + vector + type] = {load<kSpace, true>};
    }
  }
}

}  // namespace

void add_memory(Operations& all) {
  add_space<Space::kGlobal>(all, ".global");
  add_space<Space::kGlobal>(all, ".global.nc");
  add_space<Space::kGlobal>(all, "");  // generic: nothing but global memory has generic addresses here
  add_space<Space::kShared>(all, ".shared");
  add_space<Space::kParameter>(all, ".param");
  all["cp.async.cg.shared.global.L2::128B"] = {copy};
  all["cp.async.commit_group"] = {commit};
  all["cp.async.wait_group"] = {wait};
}

}  // namespace dsv4::machine
