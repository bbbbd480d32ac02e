// csrc/common: the exact conversions, the thread pool, the instruction set limit.
#include <pthread.h>
#include <sys/resource.h>
#include <sys/wait.h>
#include <unistd.h>

#include <atomic>
#include <csignal>
#include <cstdio>
#include <system_error>
#include <thread>

#include "common/hardware.h"
#include "common/status.h"
#include "common/thread_pool.h"
#include "native/check.h"
#include "ops/candidates.h"

namespace {

using namespace dsv4;

TEST(bf16_rounds_to_nearest_even) {
  for (uint32_t high = 0; high < 0x10000; ++high) {
    const float exact = to_float(bf16{static_cast<uint16_t>(high)});
    const bool is_nan = (high & 0x7FFF) > 0x7F80;
    const uint16_t back = bf16_from_float(exact).bits;
    CHECK(is_nan ? back == 0x7FFF : back == high);
    if ((high & 0x7F80) == 0x7F80) continue;
    // Half a unit above goes to the even neighbour; just below stays, just above moves on.
    const uint32_t bits = high << 16;
    CHECK(bf16_from_float(float_from_bits(bits | 0x7FFF)).bits == high);
    CHECK(bf16_from_float(float_from_bits(bits | 0x8000)).bits == high + (high & 1));
    CHECK(bf16_from_float(float_from_bits(bits | 0x8001)).bits == high + 1);
  }
}

TEST(views_address_by_strides) {
  float memory[24] = {};
  View<float, 2> view;
  view.data = memory;
  view.shape[0] = 3;
  view.shape[1] = 2;
  view.stride[0] = 8;
  view.stride[1] = 3;
  CHECK(view.at(2, 1) == memory + 19);
  CHECK(view.at(1) == memory + 8);

  AnyView<2> any{memory, DType::kFloat32, {3, 4}, {8, 2}};
  const AnyView<2> part = any.part(1, 1, 2);
  CHECK((part.as<float>().at(2, 1) == memory + 20) && part.size(0) == 3 && part.size(1) == 2);
  any.dtype = DType::kBFloat16;
  CHECK(any.part(0, 2, 1).data == reinterpret_cast<uint16_t*>(memory) + 16);
}

TEST(parallel_covers_every_index_once) {
  for (const int threads : {1, 2, 3, 7}) {
    ThreadPool pool(threads);
    const Context context = pool.context();
    CHECK(context.threads == threads);
    for (const int64_t count : {0, 1, 2, 6, 7, 8, 1000}) {
      std::vector<std::atomic<int>> seen(static_cast<size_t>(count));
      parallel(context, count, [&](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; ++i) ++seen[static_cast<size_t>(i)];
      });
      for (const auto& times : seen) CHECK(times == 1);
      CHECK(true);
    }
  }
}

TEST(pool_serves_two_callers) {
  ThreadPool pool(3);
  const Context context = pool.context();
  std::atomic<int64_t> sum{0};
  const auto caller = [&] {
    for (int round = 0; round < 200; ++round) {
      parallel(context, 11, [&](int64_t begin, int64_t end) { sum += end - begin; });
    }
  };
  std::thread other(caller);
  caller();
  other.join();
  CHECK(sum == 2 * 200 * 11);
}

// Room in the address space for the stack of one more thread, not of two.
TEST(pool_ends_its_threads_where_it_cannot_start_all) {
  constexpr rlim_t kStack = rlim_t{1} << 30;
  long pages = 0;
  FILE* statm = std::fopen("/proc/self/statm", "r");
  CHECK(std::fscanf(statm, "%ld", &pages) == 1);
  std::fclose(statm);
  pthread_attr_t large, usual;
  pthread_attr_init(&large);
  pthread_attr_setstacksize(&large, kStack);
  pthread_getattr_default_np(&usual);
  rlimit before{};
  getrlimit(RLIMIT_AS, &before);
  const rlimit tight{static_cast<rlim_t>(pages) * static_cast<rlim_t>(sysconf(_SC_PAGESIZE)) + kStack * 3 / 2,
                     before.rlim_max};
  pthread_setattr_default_np(&large);
  setrlimit(RLIMIT_AS, &tight);
  std::error_code reason;
  try {
    ThreadPool pool(3);
  } catch (const std::system_error& error) {
    reason = error.code();
  }
  setrlimit(RLIMIT_AS, &before);
  pthread_setattr_default_np(&usual);
  pthread_attr_destroy(&large);
  pthread_attr_destroy(&usual);
  CHECK(reason == std::errc::resource_unavailable_try_again);
}

TEST(limit_lowers_and_never_raises) {
  for (const Isa best : {Isa::kScalar, Isa::kAvx2, Isa::kAvx512, Isa::kAmx}) {
    testing::with_max_isa("scalar", [&] { CHECK(limited(best) == Isa::kScalar); });
    testing::with_max_isa("avx2", [&] { CHECK(limited(best) == (best < Isa::kAvx2 ? best : Isa::kAvx2)); });
    testing::with_max_isa("avx512", [&] { CHECK(limited(best) == (best < Isa::kAvx512 ? best : Isa::kAvx512)); });
    for (const char* other : {"amx", "sm80", "", "nonsense"}) {
      testing::with_max_isa(other, [&] { CHECK(limited(best) == best); });
    }
  }
  for (const char* other : {"sm80", "scalar", "", "nonsense"}) {
    testing::with_max_isa(other, [&] { CHECK(limited(Isa::kSm90) == Isa::kSm80); });
  }
  testing::with_max_isa("sm90", [&] { CHECK(limited(Isa::kSm90) == Isa::kSm90 && limited(Isa::kSm80) == Isa::kSm80); });
}

struct Number {
  int value;
};
Status negative_is_an_error(const Number& number, const Context&) {
  return number.value < 0 ? Status::error("number: must not be negative, got %d", number.value) : Status::ok();
}
bool only_even(const Number& number) { return number.value % 2 == 0; }

constexpr Candidate<Number> kNumber[] = {
    {"sm80", Isa::kSm80, negative_is_an_error},
    {"amx", Isa::kAmx, nullptr},
    {"avx512", Isa::kAvx512, negative_is_an_error, only_even},
    {"scalar", Isa::kScalar, negative_is_an_error},
};
const Op number_op("number", kNumber);

TEST(first_fitting_candidate_runs) {
  const auto ran = [](int value, Isa best, Device device = Device::kCpu) {
    Context context;
    context.device = device;
    context.best = best;
    CHECK(number_op.run(Status::ok(), Number{value}, context).is_ok());
    return std::string(number_op.last());
  };
  CHECK(ran(2, Isa::kScalar) == "scalar");
  CHECK(ran(2, Isa::kAvx512) == "avx512");
  CHECK(ran(3, Isa::kAvx512) == "scalar");  // not accepted: the next one
  CHECK(ran(2, Isa::kAmx) == "avx512");     // not in this library: the next one
  CHECK(ran(3, Isa::kSm90, Device::kCuda) == "sm80");
}

TEST(errors_name_the_op) {
  Context context;
  CHECK(number_op.run(Status::ok(), Number{-1}, context).message() ==
        std::string("number: must not be negative, got -1"));
  CHECK(number_op.run(Status::error("invalid"), Number{1}, context).message() == std::string("invalid"));
  context.device = Device::kCuda;
  context.best = Isa::kScalar;  // a GPU older than every kernel
  const Status status = number_op.run(Status::ok(), Number{1}, context);
  CHECK(!status.is_ok() && std::strstr(status.message(), "number: no implementation") != nullptr);
}

TEST(guard_bands_notice_a_stray_write) {
  testing::Guarded<float> array({3, 5});
  testing::Random random(1);
  array.fill(random, -1, 1);
  CHECK(array.intact());
  array.data()[-1] = 0;
  CHECK(!array.intact());
}

TEST(reading_behind_an_array_ends_the_process) {
  testing::Guarded<float> array({3, 5});
  const volatile float* numbers = array.data();
  for (const int at : {14, 15}) {
    const pid_t child = fork();
    if (child == 0) {
      std::signal(SIGSEGV, SIG_DFL);  // not a sanitizer's
      _exit(numbers[at] == 0 ? 1 : 0);
    }
    int status = 0;
    CHECK(waitpid(child, &status, 0) == child && WIFSIGNALED(status) == (at == 15));
  }
}

TEST(scratch_memory_notices_writes_on_either_side) {
  for (const int64_t bytes : {0, 1, 64, 1000}) {
    testing::Scratch scratch(bytes);
    const Workspace memory = scratch.workspace();
    CHECK(memory.bytes == bytes && reinterpret_cast<uintptr_t>(memory.data) % 64 == 0);
    uint8_t* start = static_cast<uint8_t*>(memory.data);
    std::fill(start, start + bytes, uint8_t{0});
    CHECK(scratch.intact());
    for (const int64_t at : {int64_t{-1}, bytes}) {
      start[at] = 0;
      CHECK(!scratch.intact());
      start[at] = 0xFF;
    }
    CHECK(scratch.intact());
  }
}

}  // namespace
