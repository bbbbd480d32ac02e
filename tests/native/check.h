// The harness of the native tests: cases that register themselves, checks that count, memory that notices stray
// accesses.
#pragma once

#include <sys/mman.h>

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <limits>
#include <new>
#include <numeric>
#include <string>
#include <utility>
#include <vector>

#include "common/context.h"
#include "common/dense.h"

namespace dsv4::testing {

using Case = void (*)();

// A test case; TEST makes one. Cases run in the order in which a file defines them.
struct Registered {
  Registered(const char* name, Case run);
};

// Counts a check and records the first failures of the case with file and line. Returns `passed`.
bool check(bool passed, const char* file, int line, const std::string& message);

// Leaves a named part of a case out and says so; it is counted as not run, never as passed.
void not_run(const char* reason);

#define TEST(name)                                                       \
  static void name();                                                    \
  static const dsv4::testing::Registered name##_registered(#name, name); \
  static void name()

#define CHECK(condition) dsv4::testing::check(static_cast<bool>(condition), __FILE__, __LINE__, #condition)

#define CHECK_MESSAGE(condition, message) \
  dsv4::testing::check(static_cast<bool>(condition), __FILE__, __LINE__, message)

using dsv4::Random;

// Bytes behind a guard band that end, but for less than 4, where the process may not read or write; a signalling NaN
// pattern until somebody writes.
class GuardedBytes {
 public:
  explicit GuardedBytes(size_t size) : size_(size), body_((size + kGuard + kPage - 1) / kPage * kPage) {
    void* memory = mmap(nullptr, body_ + kPage, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (memory == MAP_FAILED) throw std::bad_alloc();
    memory_ = static_cast<uint8_t*>(memory);
    mprotect(memory_ + body_, kPage, PROT_NONE);
    std::memset(memory_, kPattern, body_);
  }
  GuardedBytes(const GuardedBytes& other) : GuardedBytes(other.size_) { std::memcpy(data(), other.data(), size_); }
  GuardedBytes(GuardedBytes&& other) noexcept
      : size_(other.size_), body_(other.body_), memory_(std::exchange(other.memory_, nullptr)) {}
  GuardedBytes& operator=(GuardedBytes other) {
    std::swap(size_, other.size_), std::swap(body_, other.body_), std::swap(memory_, other.memory_);
    return *this;
  }
  ~GuardedBytes() {
    if (memory_ != nullptr) munmap(memory_, body_ + kPage);
  }

  uint8_t* data() const { return memory_ + (body_ - size_) / 4 * 4; }
  bool operator==(const GuardedBytes& other) const {
    return size_ == other.size_ && std::memcmp(data(), other.data(), size_) == 0;
  }
  bool intact() const {
    const auto untouched = [](uint8_t byte) { return byte == kPattern; };
    return std::all_of(data() - kGuard, data(), untouched) && std::all_of(data() + size_, memory_ + body_, untouched);
  }

 private:
  static constexpr size_t kGuard = 256, kPage = 4096;
  static constexpr uint8_t kPattern = 0xFF;  // NaN in bfloat16 and float32

  size_t size_, body_;
  uint8_t* memory_;
};

// A dense array of such bytes. `intact()` is false once anything wrote before it; what reads or writes behind it ends
// the program.
template <class T>
class Guarded {
 public:
  explicit Guarded(std::vector<int64_t> shape)
      : shape_(std::move(shape)),
        size_(std::accumulate(shape_.begin(), shape_.end(), int64_t{1}, std::multiplies<>())),
        bytes_(static_cast<size_t>(size_) * sizeof(T)) {}

  int64_t size() const { return size_; }
  T* data() { return reinterpret_cast<T*>(bytes_.data()); }
  const T* data() const { return reinterpret_cast<const T*>(bytes_.data()); }
  T& operator[](int64_t index) { return data()[index]; }
  const T& operator[](int64_t index) const { return data()[index]; }

  bool intact() const { return bytes_.intact(); }

  Guarded& fill(Random& random, float low, float high) {
    for (int64_t i = 0; i < size_; ++i) data()[i] = from_float<T>(random.uniform(low, high));
    return *this;
  }

  template <int N>
  View<T, N> view() {
    return dense<View<T, N>>(data(), shape_.data());
  }
  template <int N>
  View<const T, N> const_view() {
    return dense<View<const T, N>>(data(), shape_.data());
  }
  template <int N>
  AnyView<N> any() {
    return dense<AnyView<N>>(data(), shape_.data());
  }

  bool same_bits(const Guarded& other) const { return bytes_ == other.bytes_; }

 private:
  std::vector<int64_t> shape_;
  int64_t size_;
  GuardedBytes bytes_;
};

// Scratch memory of exactly the bytes that an op asks for: 64-byte aligned, NaN at first, guarded on both sides.
class Scratch {
 public:
  explicit Scratch(int64_t bytes) : bytes_(bytes), memory_(static_cast<size_t>(bytes) + 192, kPattern) {}

  Workspace workspace() { return {start(), bytes_}; }
  bool intact() {
    const uint8_t *first = memory_.data(), *used = start(), *behind = used + bytes_, *last = first + memory_.size();
    const auto untouched = [](uint8_t byte) { return byte == kPattern; };
    return std::all_of(first, used, untouched) && std::all_of(behind, last, untouched);
  }

 private:
  static constexpr uint8_t kPattern = 0xFF;

  uint8_t* start() { return reinterpret_cast<uint8_t*>((reinterpret_cast<uintptr_t>(memory_.data()) + 127) / 64 * 64); }

  int64_t bytes_;
  std::vector<uint8_t> memory_;
};

inline bool same_bits(const std::vector<float>& a, const std::vector<float>& b) {
  return a.size() == b.size() && (a.empty() || std::memcmp(a.data(), b.data(), a.size() * sizeof(float)) == 0);
}

// Runs `body` with DSV4_MAX_ISA set to `isa`, and puts the old value back.
template <class Body>
void with_max_isa(const char* isa, const Body& body) {
  const char* old = std::getenv("DSV4_MAX_ISA");
  const std::string kept = old == nullptr ? "" : old;
  setenv("DSV4_MAX_ISA", isa, 1);
  body();
  if (old == nullptr) {
    unsetenv("DSV4_MAX_ISA");
  } else {
    setenv("DSV4_MAX_ISA", kept.c_str(), 1);
  }
}

}  // namespace dsv4::testing
