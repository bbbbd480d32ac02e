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
  int ran = 0, failed = 0;
  for (const Entry& entry : entries()) {
    if (argc > 1 && std::strstr(entry.name, argv[1]) == nullptr) continue;
    const int64_t checks_before = checks, failures_before = failures;
    const int parts_before = parts_not_run;
    reported = 0;
    entry.run();
    const bool empty = checks == checks_before && parts_not_run == parts_before;
    if (empty) std::printf("  %s checked nothing\n", entry.name);
    const bool passed = failures == failures_before && !empty;
    std::printf("%s %s (%lld checks)\n", passed ? "passed" : "FAILED", entry.name,
                static_cast<long long>(checks - checks_before));
    ++ran;
    failed += passed ? 0 : 1;
  }
  std::printf("%d cases passed, %d failed, %lld checks, %d parts not run\n", ran - failed, failed,
              static_cast<long long>(checks), parts_not_run);
  return ran > 0 && failed == 0 ? 0 : 1;
}
