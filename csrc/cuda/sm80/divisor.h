// Division by what a launch knows, of numbers below 2^31: a product and a shift, where the machine's own is some twenty
// instructions.
#pragma once

#include "common/dtype.h"

namespace dsv4::sm80 {

class Divisor {
 public:
  struct Division {
    uint32_t quotient, rest;
  };

  Divisor() = default;
  // From 1 to 2^31. The factor is less than one above 2^shift / value, which moves no quotient to the next.
  explicit Divisor(uint32_t value) : value_(value) {
    while (uint64_t{1} << (shift_ - 31) < value) ++shift_;
    factor_ = static_cast<uint32_t>(((uint64_t{1} << shift_) + value - 1) / value);
  }

  DSV4_HOST_DEVICE uint32_t value() const { return value_; }
  DSV4_HOST_DEVICE uint32_t quotient(uint32_t number) const {
    return static_cast<uint32_t>(static_cast<uint64_t>(number) * factor_ >> shift_);
  }
  DSV4_HOST_DEVICE Division divide(uint32_t number) const {
    const uint32_t times = quotient(number);
    return {times, number - times * value_};
  }

 private:
  uint32_t value_ = 1, factor_ = 1u << 31;
  int shift_ = 31;
};

}  // namespace dsv4::sm80
