// Counts the cycles that accesses to shared memory take. Internal to the model.
#pragma once

#include <array>
#include <map>
#include <tuple>
#include <vector>

#include "simt/control.h"

namespace dsv4::simt {

// What the lanes of one warp have accessed since they last met.
class WarpAccesses {
 public:
  void add(int lane, Site site, uint32_t address, int bytes);
  void settle();  // they meet: what each did at a line is taken together

 private:
  struct Access {
    std::array<uint32_t, 32> address;
    uint32_t lanes = 0;  // mask
  };
  using Line = std::tuple<const char*, int, int>;  // file, line, bytes
  std::map<Line, std::array<int, 32>> passes_;     // of each lane
  std::map<Line, std::vector<Access>> accesses_;   // of each pass
};

}  // namespace dsv4::simt
