#include "native/bench.h"

#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <system_error>

#include "common/hardware.h"
#include "common/peaks.h"

namespace dsv4::bench {
namespace {

using Clock = std::chrono::steady_clock;

double seconds_since(Clock::time_point start) { return std::chrono::duration<double>(Clock::now() - start).count(); }

constexpr size_t kFlushBytes = size_t{256} << 20;  // beyond the last-level cache of the machines this is meant for

double copy_bandwidth(ThreadPool& pool) {
  constexpr int64_t kBytes = int64_t{256} << 20;
  std::vector<char> from(kBytes, 1), to(kBytes, 2);
  double best = 0;
  for (int repeat = 0; repeat < 10; ++repeat) {
    // memcpy may store past the caches from some size on; the faster of both ways is what the machine can do.
    const int64_t piece = repeat % 2 == 0 ? int64_t{1} << 18 : int64_t{64} << 20;
    const auto start = Clock::now();
    parallel(pool.context(), kBytes / piece, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        std::memcpy(to.data() + i * piece, from.data() + i * piece, static_cast<size_t>(piece));
      }
    });
    best = std::max(best, 2.0 * kBytes / seconds_since(start));
  }
  return best;
}

Timing summary(std::vector<double> seconds) {
  std::sort(seconds.begin(), seconds.end());
  const size_t count = seconds.size();
  Timing timing;
  timing.microseconds = 1e6 * seconds[count / 2];
  timing.spread = 0.5e6 * (seconds[(3 * count) / 4] - seconds[count / 4]);
  return timing;
}

}  // namespace

Peaks measure_peaks(ThreadPool& pool) {
  Peaks peaks;
  peaks.copy_bytes_per_second = copy_bandwidth(pool);
  const UnitPeaks units = measure_units(pool);
  peaks.float32_flops = units.float32, peaks.bfloat16_flops = units.bfloat16;
  return peaks;
}

Bench::Bench(int argc, char** argv) {
  int threads = std::max(1, static_cast<int>(std::thread::hardware_concurrency()));
  for (int i = 1; i < argc && usable_; ++i) {
    const std::string argument = argv[i];
    const char* value = i + 1 < argc ? argv[i + 1] : nullptr;
    if (argument == "--quick") {
      quick_ = true;
      continue;
    }
    if (value != nullptr && argument == "--threads") {
      threads = std::atoi(value);
    } else if (value != nullptr && argument == "--json") {
      json_ = value;
    } else if (value != nullptr && argument == "--op") {
      ops_.push_back(value);
    } else {
      usable_ = false;
    }
    ++i;
  }
  if (threads < 1) usable_ = false;
  if (!usable_) std::fprintf(stderr, "usage: %s [--quick] [--threads N] [--json FILE] [--op NAME]...\n", argv[0]);
  try {
    pool_ = std::make_unique<ThreadPool>(std::max(threads, 1));
  } catch (const std::system_error& error) {
    std::fprintf(stderr, "cannot start %d threads (%s): ask for fewer, or allow more processes (ulimit -u)\n", threads,
                 error.what());
    usable_ = false;
  }
  if (usable_ && !json_.empty()) {
    if (FILE* file = std::fopen(json_.c_str(), "w")) {
      std::fclose(file);
    } else {
      std::fprintf(stderr, "cannot write %s\n", json_.c_str());
      usable_ = false;
    }
  }
}

const Peaks& Bench::peaks() {
  if (peaks_.copy_bytes_per_second == 0) {
    peaks_ = measure_peaks(*pool_);
    std::fprintf(stderr, "this machine, %d threads: copy %.1f GB/s, float32 %.1f GFLOP/s, bfloat16 %.1f GFLOP/s\n",
                 pool_->context().threads, peaks_.copy_bytes_per_second * 1e-9, peaks_.float32_flops * 1e-9,
                 peaks_.bfloat16_flops * 1e-9);
  }
  return peaks_;
}

void Bench::flush_caches() {
  if (flush_.empty()) flush_.resize(kFlushBytes);
  for (size_t i = 0; i < flush_.size(); i += 64) ++flush_[i];
}

Timing Bench::time(const std::function<void()>& run) {
  run();  // page faults and lazily built tables are not what is measured
  const double budget = quick_ ? 0.3 : 2.0;
  const size_t least = quick_ ? 3 : 9, most = 200;
  std::vector<double> seconds;
  double spent = 0;
  while (seconds.size() < least || (spent < budget && seconds.size() < most)) {
    flush_caches();
    const auto start = Clock::now();
    run();
    seconds.push_back(seconds_since(start));
    spent += seconds.back();
  }
  return summary(seconds);
}

void Bench::measure(const Measurement& m) {
  if (!ops_.empty() && std::find(ops_.begin(), ops_.end(), m.op) == ops_.end()) return;
  ++measured_;
  const Peaks& peak = peaks();
  m.run();
  const double error = m.error();
  const bool correct = error <= m.error_limit;
  failed_ += correct ? 0 : 1;

  const double flops = m.unit == Unit::kFloat32 ? peak.float32_flops : peak.bfloat16_flops;
  const double roof = 1e6 * std::max(m.flops / flops, m.bytes / peak.copy_bytes_per_second);
  char text[512];
  std::snprintf(
      text, sizeof(text),
      "{\"op\": \"%s\", \"impl\": \"%s\", \"device\": \"cpu\", \"shape\": \"%s\", \"gflop\": %.6g, \"mbyte\": "
      "%.6g, \"roof_us\": %.6g, \"error\": %.3g, \"error_limit\": %.3g",
      m.op.c_str(), m.impl.c_str(), m.shape.c_str(), m.flops * 1e-9, m.bytes * 1e-6, roof, error, m.error_limit);
  std::string line = text;
  if (correct) {
    const Timing own = time(m.run);
    std::snprintf(text, sizeof(text), ", \"us\": %.6g, \"spread\": %.3g, \"roof_fraction\": %.4g", own.microseconds,
                  own.spread, roof / own.microseconds);
    line += text;
    if (m.run_baseline) {
      const Timing other = time(m.run_baseline);
      std::snprintf(text, sizeof(text), ", \"baseline\": \"%s\", \"baseline_us\": %.6g, \"ratio\": %.4g",
                    m.baseline.c_str(), other.microseconds, other.microseconds / own.microseconds);
      line += text;
    }
  }
  line += "}";
  std::printf("%s\n", line.c_str());
  std::fflush(stdout);
  if (json_.empty()) return;
  if (FILE* file = std::fopen(json_.c_str(), "a")) {
    std::fprintf(file, "%s\n", line.c_str());
    std::fclose(file);
  }
}

int Bench::exit_code() const {
  if (!usable_) return 2;
  return failed_ == 0 && measured_ > 0 ? 0 : 1;
}

double relative_error(const std::vector<float>& actual, const std::vector<float>& expected) {
  double largest = 0, difference = 0;
  for (size_t i = 0; i < expected.size(); ++i) {
    if (!std::isfinite(expected[i]) || !std::isfinite(actual[i])) {
      if (std::memcmp(&expected[i], &actual[i], sizeof(float)) != 0) return std::numeric_limits<double>::infinity();
      continue;
    }
    largest = std::max(largest, std::fabs(static_cast<double>(expected[i])));
    difference = std::max(difference, std::fabs(static_cast<double>(actual[i]) - expected[i]));
  }
  return largest > 0 ? difference / largest : difference;
}

}  // namespace dsv4::bench
