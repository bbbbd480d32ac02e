// Runs a kernel's blocks, one after another in random order, and in each its warps by turns.
#pragma once

#include "global_memory.h"
#include "program.h"

namespace dsv4::machine {

struct Launch {
  const Program* program;
  const uint8_t* parameters;
  uint32_t blocks_x, blocks_y;
  int threads;
  int shared_bytes;
  unsigned apart;  // one block of so many, by chance, runs its lanes alone to where they meet, not in step; 0: none
};

// Throws Fault, with the block, the thread and the instruction.
void run(const Launch& launch, GlobalMemory& global);

}  // namespace dsv4::machine
