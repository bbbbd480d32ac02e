#include "common/thread_pool.h"

#include "common/hardware.h"

namespace dsv4 {

// The object is there before the first thread, so that where one cannot be made the destructor ends the others.
ThreadPool::ThreadPool(int threads) : ThreadPool() {
  for (int index = 1; index < threads; ++index) workers_.emplace_back([this, index] { work(index); });
}

ThreadPool::~ThreadPool() {
  {
    const std::lock_guard<std::mutex> lock(mutex_);
    stop_ = true;
  }
  start_.notify_all();
  for (std::thread& worker : workers_) worker.join();
}

Context ThreadPool::context() {
  Context context;
  context.best = limited(cpu_isa());
  context.pool = this;
  context.threads = static_cast<int>(workers_.size()) + 1;
  context.parallel_for = [](void* pool, int64_t count, Body body, void* argument) {
    static_cast<ThreadPool*>(pool)->run(count, body, argument);
  };
  return context;
}

void ThreadPool::piece(int index) const {
  const int64_t threads = static_cast<int64_t>(workers_.size()) + 1;
  const int64_t share = count_ / threads, rest = count_ % threads;
  const int64_t begin = index * share + (index < rest ? index : rest);
  const int64_t end = begin + share + (index < rest ? 1 : 0);
  if (begin < end) body_(argument_, begin, end);
}

void ThreadPool::run(int64_t count, Body body, void* argument) {
  if (count <= 0) return;
  const std::lock_guard<std::mutex> call(one_call_);
  {
    const std::lock_guard<std::mutex> lock(mutex_);
    count_ = count;
    body_ = body;
    argument_ = argument;
    pending_ = static_cast<int>(workers_.size());
    ++round_;
  }
  start_.notify_all();
  piece(0);
  std::unique_lock<std::mutex> lock(mutex_);
  done_.wait(lock, [this] { return pending_ == 0; });
}

void ThreadPool::work(int index) {
  int64_t seen = 0;
  for (;;) {
    {
      std::unique_lock<std::mutex> lock(mutex_);
      start_.wait(lock, [&] { return stop_ || round_ != seen; });
      if (stop_) return;
      seen = round_;
    }
    piece(index);
    const std::lock_guard<std::mutex> lock(mutex_);
    if (--pending_ == 0) done_.notify_one();
  }
}

}  // namespace dsv4
