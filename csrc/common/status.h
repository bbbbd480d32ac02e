// The result of everything in csrc that can fail. Holds its message in place, so making one allocates nothing.
#pragma once

namespace dsv4 {

class [[nodiscard]] Status {
 public:
  static Status ok() { return Status(); }

  // Out of line: an inline function compiled with one instruction set's flags could be the copy the linker keeps for
  // all.
  __attribute__((format(printf, 1, 2))) static Status error(const char* format, ...);

  bool is_ok() const { return ok_; }
  const char* message() const { return message_; }

 private:
  bool ok_ = true;
  char message_[320] = {};
};

}  // namespace dsv4
