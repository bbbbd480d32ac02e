// Every kernel that this machine has, on several numbers of threads, against the scalar one on a single thread.
#pragma once

#include <string>

#include "common/hardware.h"
#include "common/thread_pool.h"
#include "native/check.h"

namespace dsv4::testing {

inline Context context_of(ThreadPool& pool, Isa best) {
  Context context = pool.context();
  context.best = best;
  return context;
}

// Every result but the first equals the first.
template <class Result, class Run>
void check_all_equal(const Run& run, const char* what) {
  ThreadPool one(1);
  const Result expected = run(context_of(one, Isa::kScalar));
  for (const int threads : {1, 2, 3}) {
    ThreadPool pool(threads);
    for (const Isa isa : {Isa::kScalar, Isa::kAvx512}) {
      if (isa > cpu_isa()) {
        not_run("this machine has no AVX-512");
        continue;
      }
      const Result result = run(context_of(pool, isa));
      CHECK(result.intact());
      CHECK_MESSAGE(result.same_bits(expected),
                    std::string(what) + ", " + isa_name(isa) + ", threads " + std::to_string(threads));
    }
  }
}

}  // namespace dsv4::testing
