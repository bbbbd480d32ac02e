// Runs every case of a test program, or those whose name contains the argument. Exit code 0 only if some ran and none
// failed.
#include <cstdio>
#include <vector>

#include "native/check.h"

namespace dsv4::testing {
namespace {

struct Entry {
  const char* name;
  Case run;
};

std::vector<Entry>& entries() {
  static std::vector<Entry> all;
  return all;
}

int64_t checks = 0, failures = 0;
int reported = 0, parts_not_run = 0;
constexpr int kReportLimit = 10;  // a case

}  // namespace

Registered::Registered(const char* name, Case run) { entries().push_back({name, run}); }

bool check(bool passed, const char* file, int line, const std::string& message) {
  ++checks;
  if (!passed) {
    ++failures;
    if (reported++ < kReportLimit) std::printf("  %s:%d: %s\n", file, line, message.c_str());
  }
  return passed;
}

void not_run(const char* reason) {
  ++parts_not_run;
  std::printf("  not run: %s\n", reason);
}

}  // namespace dsv4::testing

int main(int argc, char** argv) {
  using namespace dsv4::testing;
  int passed_cases = 0, failed = 0, cases_not_run = 0;
  for (const Entry& entry : entries()) {
    if (argc > 1 && std::strstr(entry.name, argv[1]) == nullptr) continue;
    const int64_t checks_before = checks, failures_before = failures;
    const int parts_before = parts_not_run;
    reported = 0;
    entry.run();
    const int64_t done = checks - checks_before;
    const bool left_out = parts_not_run > parts_before;
    if (done == 0 && !left_out) std::printf("  %s checked nothing\n", entry.name);
    const char* result = "passed";
    if (failures > failures_before || (done == 0 && !left_out)) {
      result = "FAILED";
      ++failed;
    } else if (done == 0) {
      result = "not run";
      ++cases_not_run;
    } else {
      ++passed_cases;
    }
    std::printf("%s %s (%lld checks)\n", result, entry.name, static_cast<long long>(done));
  }
  std::printf("%d cases passed, %d failed, %d not run, %lld checks, %d parts not run\n", passed_cases, failed,
              cases_not_run, static_cast<long long>(checks), parts_not_run);
  if (failed == 0 && passed_cases == 0 && cases_not_run > 0) return 77;
  return failed == 0 && passed_cases > 0 ? 0 : 1;
}
