// Which implementation of an op ran last, by the op's own record.
#pragma once

#include <string>

#include "ops/candidates.h"

namespace dsv4::bench {

inline std::string last_implementation(const std::string& op) {
  for (const OpInfo* info = OpInfo::first(); info != nullptr; info = info->next()) {
    if (op == info->name() && info->last() != nullptr) return info->last();
  }
  return "none";
}

}  // namespace dsv4::bench
