// What a test asks of the machine beyond what a GPU does.
#pragma once

#include <string>
#include <vector>

namespace dsv4::machine {

// The texts of a kernel's barriers, fences, commits and waits, in their order; `kernel`: a part of its name.
std::vector<std::string> synchronisations_of(const std::string& kernel);

// From now on the kernel runs without one of them; -1: with all.
void leave_out(const std::string& kernel, int number);

// The fault of the last kernel that had one, which is forgotten.
std::string take_fault();

// Kernels may use any memory of the process from now on, as of tensors that somebody else allocated.
void trust_the_host();

}  // namespace dsv4::machine
