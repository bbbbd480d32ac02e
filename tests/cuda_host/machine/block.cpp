#include "block.h"

#include <cxxabi.h>

#include <algorithm>
#include <climits>
#include <cstdlib>
#include <numeric>
#include <random>

#include "warp.h"

namespace dsv4::machine {

namespace {

using Generator = std::minstd_rand;

std::string readable(const std::string& mangled) {
  char* name = abi::__cxa_demangle(mangled.c_str(), nullptr, nullptr, nullptr);
  const std::string found = name == nullptr ? mangled : name;
  std::free(name);
  return found;
}

class Block {
 public:
  Block(const Launch& launch, GlobalMemory& global, Generator& order)
      : launch_(launch), program_(*launch.program), order_(order) {
    warps_.resize(static_cast<size_t>(launch.threads / kLanes));
    for (size_t w = 0; w < warps_.size(); ++w) {
      Warp& warp = warps_[w];
      warp.program = &program_;
      warp.shared = &shared_;
      warp.global = &global;
      warp.parameters = launch.parameters;
      warp.registers = std::make_unique<uint8_t[]>(program_.register_bytes);
      warp.self.warp = static_cast<uint16_t>(w);
      for (const Constant& constant : program_.constants) {
        for (int l = 0; l < kLanes; ++l) {
          memcpy(warp.registers.get() + constant.slot + l * constant.bytes, &constant.bits,
                 static_cast<size_t>(constant.bytes));
        }
      }
    }
  }

  void run(uint32_t x, uint32_t y, uint32_t number) {
    lanes_apart_ = launch_.apart > 0 && order_() % launch_.apart == 0;
    shared_.start(static_cast<size_t>(launch_.shared_bytes), launch_.threads / kLanes);
    for (size_t w = 0; w < warps_.size(); ++w) {
      Warp& warp = warps_[w];
      warp.pc.fill(0);
      warp.alive = kAllLanes;
      warp.waiting = 0;
      warp.barrier = -1;
      warp.written.clear();
      warp.products.clear();
      warp.product_groups.clear();
      warp.registers_fenced = false;
      warp.self.block = number;
      std::fill(std::begin(warp.self.clock), std::end(warp.self.clock), uint16_t{0});
      warp.self.clock[w] = 1;
      for (int l = 0; l < kLanes; ++l) {
        warp.lanes<uint32_t>(program_.thread)[l] = static_cast<uint32_t>(w) * kLanes + static_cast<uint32_t>(l);
        warp.lanes<uint32_t>(program_.block_x)[l] = x;
        warp.lanes<uint32_t>(program_.block_y)[l] = y;
        warp.open[static_cast<size_t>(l)].clear();
        warp.groups[static_cast<size_t>(l)].clear();
      }
    }
    try {
      for (Warp* warp = next(); warp != nullptr; warp = next()) {
        advance(*warp);
        if (warp->barrier >= 0) release(warp->barrier);
      }
    } catch (const Fault& fault) {
      throw Fault(readable(program_.name) + ", block " + std::to_string(x) + ", " + std::to_string(y) + ": " +
                  fault.what());
    }
  }

 private:
  // A warp that can go on; none when all have ended.
  Warp* next() {
    std::vector<Warp*> able;
    bool ended = true;
    for (Warp& warp : warps_) {
      ended = ended && warp.alive == 0;
      if (warp.alive != 0 && warp.barrier < 0) able.push_back(&warp);
    }
    if (able.empty()) {
      if (!ended) throw Fault("warps wait at a barrier for others that do not come");
      return nullptr;
    }
    return able[order_() % able.size()];
  }

  // Lets the warps at a barrier go on if all of them are there.
  void release(int barrier) {
    std::vector<Warp*> there;
    for (Warp& warp : warps_) {
      if (warp.barrier == barrier) there.push_back(&warp);
    }
    const int expected = there.front()->barrier_threads > 0 ? there.front()->barrier_threads : launch_.threads;
    for (const Warp* warp : there) {
      if (warp->barrier_threads != there.front()->barrier_threads) throw Fault("a barrier of two sizes");
    }
    if (static_cast<int>(there.size()) * kLanes < expected) return;
    uint16_t known[kMaxWarps] = {};
    for (const Warp* warp : there) {
      for (int w = 0; w < kMaxWarps; ++w) known[w] = std::max(known[w], warp->self.clock[w]);
    }
    for (Warp* warp : there) {
      memcpy(warp->self.clock, known, sizeof(known));
      ++warp->self.clock[warp->self.warp];
      warp->barrier = -1;
    }
  }

  // Runs a warp to its next barrier or its end.
  void advance(Warp& w) {
    while (w.alive != 0 && w.barrier < 0) {
      const uint32_t ready = w.alive & ~w.waiting;
      if (ready == 0) throw Fault("lanes of a warp wait for others that are elsewhere or have ended");
      if (lanes_apart_) {
        int lane = static_cast<int>(order_() % kLanes);
        while ((ready >> lane & 1u) == 0) lane = (lane + 1) % kLanes;
        step(w, 1u << lane, w.pc[static_cast<size_t>(lane)], INT_MAX);
        continue;
      }
      int first = INT_MAX, second = INT_MAX;  // the first place where lanes are, and the next
      uint32_t active = 0;
      each(ready, [&](int l) { first = std::min(first, w.pc[static_cast<size_t>(l)]); });
      for (int l = 0; l < kLanes; ++l) {
        if ((ready >> l & 1u) == 0) continue;
        if (w.pc[static_cast<size_t>(l)] == first) {
          active |= 1u << l;
        } else {
          second = std::min(second, w.pc[static_cast<size_t>(l)]);
        }
      }
      step(w, active, first, second);
    }
  }

  static void park(Warp& w, uint32_t lanes, int pc) {
    for (; lanes != 0; lanes &= lanes - 1) w.pc[static_cast<size_t>(__builtin_ctz(lanes))] = pc;
  }

  // Runs lanes that are together until they part, reach others at `limit`, or must wait.
  void step(Warp& w, uint32_t active, int pc, int limit) {
    for (; pc < limit; ++pc) {
      const Instruction& i = program_.code[static_cast<size_t>(pc)];
      uint32_t lanes = active;
      if (i.guarded) lanes &= i.unless ? ~w.bits(i.predicate) : w.bits(i.predicate);
      try {
        switch (i.kind) {
          case Kind::kPlain:
            if (lanes != 0) i.execute(w, i, lanes);
            if (i.writes_operands) w.registers_fenced = false;
            break;
          case Kind::kBranch:
            if (lanes == active) {
              pc = i.target - 1;
            } else if (lanes != 0) {
              park(w, lanes, i.target);
              return park(w, active & ~lanes, pc + 1);
            }
            break;
          case Kind::kExit:
            w.alive &= ~lanes;
            active &= ~lanes;
            if (active == 0) return;
            break;
          case Kind::kCollective:
          case Kind::kBarrier:
            if (lanes != active) throw Fault("a predicate at what all lanes do together");
            if (active != kAllLanes) {
              park(w, active, pc);
              w.waiting |= active;
              for (int l = 0; l < kLanes; ++l) {
                if ((w.waiting >> l & 1u) == 0 || w.pc[static_cast<size_t>(l)] != pc) return;
              }
              w.waiting = 0;
              active = kAllLanes;
              limit = INT_MAX;
            }
            i.execute(w, i, active);
            if (i.kind == Kind::kBarrier) return park(w, active, pc + 1);
            if (lanes_apart_) return park(w, active, pc + 1);
            break;
        }
      } catch (const Fault& fault) {
        throw Fault("warp " + std::to_string(w.self.warp) + ", " + program_.where(i) + ": " + fault.what());
      }
    }
    park(w, active, pc);
  }

  const Launch& launch_;
  const Program& program_;
  Generator& order_;
  SharedMemory shared_;
  std::vector<Warp> warps_;
  bool lanes_apart_ = false;
};

}  // namespace

void run(const Launch& launch, GlobalMemory& global) {
  if (launch.threads % kLanes != 0 || launch.threads > kLanes * kMaxWarps) throw Fault("a part of a warp");
  if (launch.program->max_threads > 0 && launch.threads > launch.program->max_threads) {
    throw Fault(launch.program->name + " is compiled for " + std::to_string(launch.program->max_threads) +
                " threads a block, not for " + std::to_string(launch.threads));
  }
  const uint32_t count = launch.blocks_x * launch.blocks_y;
  const uint32_t first = global.start_launch(count);
  Generator order(first);
  std::vector<uint32_t> blocks(count);
  std::iota(blocks.begin(), blocks.end(), 0u);
  std::shuffle(blocks.begin(), blocks.end(), order);
  Block block(launch, global, order);
  for (const uint32_t number : blocks) {
    block.run(number % launch.blocks_x, number / launch.blocks_x, first + number);
  }
}

}  // namespace dsv4::machine
