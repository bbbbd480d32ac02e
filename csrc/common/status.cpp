#include "common/status.h"

#include <cstdarg>
#include <cstdio>

namespace dsv4 {

Status Status::error(const char* format, ...) {
  Status status;
  status.ok_ = false;
  va_list arguments;
  va_start(arguments, format);
  vsnprintf(status.message_, sizeof(status.message_), format, arguments);
  va_end(arguments);
  return status;
}

}  // namespace dsv4
