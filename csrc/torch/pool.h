// The pages and the tables of ops that read or write pools.
#pragma once

#include "ops/pool.h"
#include "torch/glue.h"

namespace dsv4::binding {

// Pages of the argument `name`: rows of head_dim dims, or with `keys` index keys.
void check_pages(Check& check, const char* name, bool keys, const Tensor& pages, int64_t page_size, int64_t head_dim,
                 int64_t rope_dim);

// A tensor that an op writes: itself where its last axis lies densely in memory, else a copy that `finish` puts back.
class Written {
 public:
  explicit Written(const Tensor& tensor) : original_(tensor), dense_(dense(tensor)) {}

  const Tensor& tensor() const { return dense_; }
  void finish() {
    if (dense_.mutable_data_ptr() != original_.mutable_data_ptr()) torch::stable::copy_(original_, dense_);
  }

 private:
  Tensor original_, dense_;
};

// Rows of head_dim dims, or index keys. Holds what had to be copied, so it must outlive the call.
class WrittenPool {
 public:
  WrittenPool(Check& check, bool keys, const Tensor& pages, const Tensor& table, int64_t page_size, int64_t head_dim,
              int64_t rope_dim);

  operator RowPool() const;
  void finish() { pages_.finish(); }

 private:
  Written pages_;
  Tensor table_;
  int64_t page_size_;
};

}  // namespace dsv4::binding
