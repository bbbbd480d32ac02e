// A kernel as the machine runs it: the text that nvcc wrote for it (PTX), each instruction with the function that does
// it and its registers as places in a warp's memory.
#pragma once

#include <cstdint>
#include <stdexcept>
#include <string>
#include <string_view>
#include <vector>

namespace dsv4::machine {

struct Warp;
struct Instruction;

// Does the instruction for the given lanes (bits).
using Execute = void (*)(Warp& warp, const Instruction& instruction, uint32_t lanes);

inline constexpr int kLanes = 32;
inline constexpr uint32_t kAllLanes = ~0u;

// What a kernel does that a GPU would not take, or of which nobody could tell the result.
struct Fault : std::runtime_error {
  using std::runtime_error::runtime_error;
};

enum class Kind : uint8_t { kPlain, kBranch, kCollective, kBarrier, kExit };  // a collective: of all 32 lanes

// A register, as its place: the bytes from the start of the warp's registers, lane 0 first.
using Slot = uint32_t;

struct Instruction {
  Kind kind = Kind::kPlain;
  bool unless = false;   // the predicate is negated
  bool guarded = false;  // there is a predicate
  std::vector<Slot> out, in;
  std::vector<uint8_t> in_bytes;  // a lane, of each input
  uint8_t out_bytes = 0;          // of the first output
  bool synchronises = false;      // a barrier, a fence, a wait, or what they count
  bool writes_operands = false;   // of a product of warpgroups
  Execute execute = nullptr;
  Slot predicate = 0;
  int64_t offset[2] = {};  // of the addresses
  int target = -1;         // of a branch
  int bytes = 0;           // of an element in memory
  int source_line = 0;
  int source_file = -1;
  std::string_view text;
};

struct Constant {
  Slot slot;
  int bytes;
  uint64_t bits;
};

struct Program {
  std::string name;
  std::vector<Instruction> code;
  std::vector<Constant> constants;
  size_t register_bytes = 0;
  Slot thread = 0, block_x = 0, block_y = 0;
  bool async_proxy = false;  // some instruction reads shared memory by itself
  int max_threads = 0;
  int parameter_bytes = 0;
  std::vector<std::string> files;  // by number

  std::string where(const Instruction& instruction) const;
};

// The entry of this name in a module's text, which must outlive the program. Throws Fault for what it does not know.
Program parse(std::string_view module, const std::string& entry);

// Address of the dynamic shared memory: not zero, as on newer GPUs.
inline constexpr uint32_t kSharedBase = 1024;

}  // namespace dsv4::machine
