// How a kernel divides its scratch memory, and its items among threads.
#pragma once

#include "common/context.h"
#include "common/pages.h"

namespace dsv4 {
namespace {

// Hands out pieces of a memory.
struct Arena {
  uint8_t* base;  // null: only counts
  int64_t used = 0;

  template <class T>
  DSV4_HOST_DEVICE T* take(int64_t count) {
    const uintptr_t at = reinterpret_cast<uintptr_t>(base) + static_cast<uintptr_t>(used);
    used += round_up(count * static_cast<int64_t>(sizeof(T)), 64);
    return reinterpret_cast<T*>(at);
  }
};

// Runs body(slot, item) for every item, each once, on whatever slot is free.
template <class Body>
DSV4_HOST_DEVICE void spread(const Context& context, int64_t slots, int64_t items, const Body& body) {
  int64_t next = 0;
  parallel(context, slots < items ? slots : items, [&](int64_t begin, int64_t end) {
    for (int64_t slot = begin; slot < end; ++slot) {
      for (;;) {
        const int64_t item = __atomic_fetch_add(&next, 1, __ATOMIC_RELAXED);
        if (item >= items) break;
        body(slot, item);
      }
    }
  });
}

}  // namespace
}  // namespace dsv4
