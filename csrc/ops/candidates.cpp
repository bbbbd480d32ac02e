#include "ops/candidates.h"

namespace dsv4 {
namespace {

// A function's static: ops in other files register themselves while this file may not be initialised yet.
const OpInfo*& head() {
  static const OpInfo* first = nullptr;
  return first;
}

}  // namespace

OpInfo::OpInfo(const char* name) : name_(name), next_(head()) { head() = this; }

const OpInfo* OpInfo::first() { return head(); }

}  // namespace dsv4
