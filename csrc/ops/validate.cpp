#include "ops/validate.h"

#include <cmath>
#include <cstdarg>
#include <cstdio>

namespace dsv4 {
namespace {

const char* dtype_name(DType dtype) {
  switch (dtype) {
    case DType::kNone:
      return "nothing";
    case DType::kFloat32:
      return "float32";
    case DType::kBFloat16:
      return "bfloat16";
    case DType::kUInt8:
      return "uint8";
    case DType::kInt32:
      return "int32";
    case DType::kInt64:
      return "int64";
  }
  return "unknown";
}

// "[2, 3]", with * for a size that may be anything.
void shape_text(const int64_t* shape, int axes, char* text, size_t size) {
  size_t used = static_cast<size_t>(std::snprintf(text, size, "["));
  for (int axis = 0; axis < axes && used < size; ++axis) {
    const char* comma = axis == 0 ? "" : ", ";
    const int written = shape[axis] == Validator::kAny ? std::snprintf(text + used, size - used, "%s*", comma)
                                                       : std::snprintf(text + used, size - used, "%s%lld", comma,
                                                                       static_cast<long long>(shape[axis]));
    used += static_cast<size_t>(written);
  }
  if (used < size) std::snprintf(text + used, size - used, "]");
}

// Whether the bytes from the first to the last element can be addressed with int64_t.
bool addressable(const int64_t* shape, const int64_t* stride, int axes, int64_t element_bytes) {
  __int128 extent = 1;
  for (int axis = 0; axis < axes; ++axis) {
    if (stride[axis] < 0) return false;
    extent += static_cast<__int128>(shape[axis] - 1) * stride[axis];
  }
  return extent * element_bytes <= INT64_MAX;
}

}  // namespace

void Validator::require(bool condition, const char* format, ...) {
  if (condition || !status_.is_ok()) return;
  char text[256];
  va_list arguments;
  va_start(arguments, format);
  std::vsnprintf(text, sizeof(text), format, arguments);
  va_end(arguments);
  status_ = Status::error("%s: %s", op_, text);
}

void Validator::floating(const char* name, DType dtype) {
  require(dtype == DType::kBFloat16 || dtype == DType::kFloat32, "%s must be bfloat16 or float32, got %s", name,
          dtype_name(dtype));
}

void Validator::rope(const AnyView<3>& rope, int64_t tokens, int64_t head_dim) {
  view("rope", rope, DType::kFloat32, {tokens, kAny, 2}, 2);
  require(2 * rope.size(1) <= head_dim, "rope must have at most %lld pairs, got %lld",
          static_cast<long long>(head_dim / 2), static_cast<long long>(rope.size(1)));
}

void Validator::not_negative(const char* name, float value) {
  require(std::isfinite(value) && value >= 0, "%s must be finite and not negative, got %g", name,
          static_cast<double>(value));
}

void Validator::at_least(const char* name, int64_t value, int64_t least) {
  require(value >= least, "%s must be at least %lld, got %lld", name, static_cast<long long>(least),
          static_cast<long long>(value));
}

void Validator::workspace(const void* data, int64_t bytes, int64_t needed) {
  if (needed == 0) return;
  require(bytes >= needed, "workspace must have %lld bytes, got %lld", static_cast<long long>(needed),
          static_cast<long long>(bytes));
  require(data != nullptr && reinterpret_cast<uintptr_t>(data) % 64 == 0,
          "workspace must be 64-byte aligned, not null");
}

void Validator::tensor(const char* name, const void* data, DType dtype, DType wanted, const int64_t* shape,
                       const int64_t* stride, std::initializer_list<int64_t> sizes, int dense) {
  if (!status_.is_ok()) return;
  const int axes = static_cast<int>(sizes.size());
  const int64_t* expected = sizes.begin();
  bool fits = dtype == wanted, empty = false;
  for (int axis = 0; axis < axes; ++axis) {
    fits = fits && shape[axis] >= 0 && (expected[axis] == kAny || expected[axis] == shape[axis]);
    empty = empty || shape[axis] == 0;
  }
  if (!fits) {
    char want[96], have[96];
    shape_text(expected, axes, want, sizeof(want));
    shape_text(shape, axes, have, sizeof(have));
    require(false, "%s must be %s %s, got %s %s", name, dtype_name(wanted), want, dtype_name(dtype), have);
    return;
  }
  if (empty) return;
  require(data != nullptr, "%s must not be null", name);
  require(reinterpret_cast<uintptr_t>(data) % static_cast<uintptr_t>(size_of(dtype)) == 0,
          "%s must be aligned to its elements", name);
  require(addressable(shape, stride, axes, size_of(dtype)), "%s has strides that are negative or too large", name);
  int64_t contiguous = 1;
  for (int axis = axes - 1; axis >= axes - dense; --axis) {
    require(shape[axis] == 1 || stride[axis] == contiguous, "%s must be contiguous in its last %d axes", name, dense);
    contiguous *= shape[axis];
  }
}

}  // namespace dsv4
