// Threads for native programs; inside torch, its own threads do the work.
#pragma once

#include <condition_variable>
#include <cstdint>
#include <mutex>
#include <thread>
#include <vector>

#include "common/context.h"

namespace dsv4 {

class ThreadPool {
 public:
  // The calling thread is one of them. Throws std::system_error where the system makes no more.
  explicit ThreadPool(int threads);
  ~ThreadPool();
  ThreadPool(const ThreadPool&) = delete;
  ThreadPool& operator=(const ThreadPool&) = delete;

  // A CPU context that runs on these threads, with the best instruction set that hardware and DSV4_MAX_ISA allow.
  Context context();

 private:
  ThreadPool() = default;

  using Body = void (*)(void* argument, int64_t begin, int64_t end);

  void run(int64_t count, Body body, void* argument);
  void work(int index);
  void piece(int index) const;

  std::vector<std::thread> workers_;
  std::mutex one_call_;  // held by run(): calls from several threads follow one another
  std::mutex mutex_;
  std::condition_variable start_, done_;
  int64_t round_ = 0;
  int pending_ = 0;
  bool stop_ = false;
  int64_t count_ = 0;
  Body body_ = nullptr;
  void* argument_ = nullptr;
};

}  // namespace dsv4
