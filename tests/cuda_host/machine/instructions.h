// What each PTX instruction does, by its full name, as the PTX ISA describes it.
#pragma once

#include <string>
#include <unordered_map>

#include "program.h"

namespace dsv4::machine {

struct Operation {
  Execute execute = nullptr;
  Kind kind = Kind::kPlain;
};

using Operations = std::unordered_map<std::string, Operation>;

void add_arithmetic(Operations& operations);
void add_conversions(Operations& operations);
void add_memory(Operations& operations);
void add_collectives(Operations& operations);
void add_warpgroups(Operations& operations);

// All of them.
const Operations& operations();

}  // namespace dsv4::machine
