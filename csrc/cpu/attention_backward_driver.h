// What the kernels of sparse_attention_backward share. Rows are taken in blocks, a few for each thread, in two steps.
// First each row by itself: probabilities from the saved lse, d s, d query; for every key and head the weights of query
// and G in the key's gradient stay in the row's memory. Then slices of dims: whoever works on a slice owns these dims
// of all keys, and adds the rows of the block to them in their order. So a key's gradient is the same sum however many
// threads there are and wherever a block ends. Sums are float32, in the gradient itself or, where that is bfloat16, in
// the workspace.
//
// A kernel is a class with
//   kBlockBytes   memory of the rows that a thread keeps at a time: a share of its second-level cache
//   static int64_t row_bytes(p, most_keys), slot_bytes(p, most_keys)   memory of a row between the steps; of
//   a thread
//   Kernel(p, row_memory, most_keys, slot_memory)   64-byte aligned
//   void differentiate(row, sums, gates)   the first step; gates[head] = delta (1 - g)
//   void add_to_keys(row, first_dim, end_dim)   the second; a multiple of kSliceDims, but for the end of a head
//   static void narrow(sums, dims, bf16*)   the sums of one key, rounded
#pragma once

#include "cpu/attention_keys.h"
#include "cpu/work.h"

namespace dsv4 {
namespace {

inline constexpr int64_t kSliceDims = 32;
inline constexpr int64_t kMostBlockRows = 32;

// Where the gradients of a pool's rows are summed, [rows of the pool, D]; null: the pool takes none.
struct KeySums {
  float *window, *compressed;
};

// The keys of a row, and where the gradient of each is summed; null as above.
struct TargetKeys {
  Key* keys;
  float** sums;
  KeyCounts* count;

  TargetKeys(int64_t most, Arena& arena)
      : keys(arena.take<Key>(most)), sums(arena.take<float*>(most)), count(arena.take<KeyCounts>(1)) {}

  void list(const SparseAttentionParams& p, int64_t row, const KeySums& of) const {
    *count = list_keys(p, row, keys);
    find(p.window_pool, of.window, 0, count->window, p.query.size(2));
    find(p.compressed, of.compressed, count->window, count->all, p.query.size(2));
  }

  // Runs body(begin, end) for the keys whose pool takes a gradient.
  template <class Body>
  void ranges(const Body& body) const {
    if (count->window > 0 && sums[0] != nullptr) body(int64_t{0}, count->window);
    if (count->all > count->window && sums[count->window] != nullptr) body(count->window, count->all);
  }

 private:
  // A plain pool is dense, so a key's place says which row it is.
  void find(const RowPool& pool, float* first, int64_t begin, int64_t end, int64_t head_dim) const {
    const uint8_t* data = static_cast<const uint8_t*>(pool.plain.data);
    const int64_t row_bytes = head_dim * (pool.plain.dtype == DType::kFloat32 ? 4 : 2);
    for (int64_t j = begin; j < end; ++j) {
      sums[j] = first == nullptr ? nullptr : first + (keys[j].data - data) / row_bytes * head_dim;
    }
  }
};

// A row without keys: nothing goes back.
template <class X>
void clear_row(const SparseAttentionBackwardParams& p, int64_t row, float* gates) {
  for (int64_t h = 0; h < p.forward.query.size(1); ++h) {
    gates[h] = 0;
    memset(p.grad_query.as<X>().at(row, h), 0, static_cast<size_t>(p.forward.query.size(2)) * sizeof(X));
  }
}

template <class Kernel>
class AttentionBackward {
 public:
  AttentionBackward(const SparseAttentionBackwardParams& p, const Context& context)
      : p_(p),
        context_(context),
        rows_(p.forward.query.size(0)),
        heads_(p.forward.query.size(1)),
        head_dim_(p.forward.query.size(2)),
        most_(most_keys_of_any_row(p.forward)),
        slots_(larger(1, context.threads)),
        row_bytes_(larger(64, Kernel::row_bytes(p, most_))),
        block_(smaller(rows_, slots_ * larger(1, smaller(kMostBlockRows, Kernel::kBlockBytes / row_bytes_)))) {}

  int64_t bytes() const {
    Arena arena{nullptr};
    Memory(*this, arena);
    return arena.used;
  }

  void run() const {
    Arena arena{static_cast<uint8_t*>(p_.workspace.data)};
    const Memory memory(*this, arena);
    clear(memory.sums.window, p_.grad_window);
    clear(memory.sums.compressed, p_.grad_compressed);
    const bool keys_wanted = memory.sums.window != nullptr || memory.sums.compressed != nullptr;
    for (int64_t first = 0; first < rows_; first += block_) {
      const int64_t count = smaller(rows_ - first, block_);
      spread(context_, slots_, count, [&](int64_t slot, int64_t i) {
        kernel(memory, slot, i).differentiate(first + i, memory.sums, memory.gates + (first + i) * heads_);
      });
      if (keys_wanted) add_to_keys(memory, first, count);
    }
    finish_pool(memory.sums.window, p_.grad_window);
    finish_pool(memory.sums.compressed, p_.grad_compressed);
    finish_sink(memory.gates);
  }

 private:
  struct Memory {
    KeySums sums;
    float* gates;  // [T, H]
    uint8_t *rows, *slots;

    Memory(const AttentionBackward& call, Arena& arena) {
      sums.window = call.sums_of(call.p_.forward.window_pool.plain, call.p_.grad_window, arena);
      sums.compressed = call.sums_of(call.p_.forward.compressed.plain, call.p_.grad_compressed, arena);
      gates = arena.take<float>(call.rows_ * call.heads_);
      rows = arena.take<uint8_t>(call.block_ * round_up(call.row_bytes_, 64));
      slots = arena.take<uint8_t>(call.slots_ * round_up(Kernel::slot_bytes(call.p_, call.most_), 64));
    }
  };

  static float* sums_of(const AnyView<3>& pool, const AnyView<3>& grad, Arena& arena) {
    if (!pool.given()) return nullptr;
    if (pool.dtype == DType::kFloat32) return static_cast<float*>(grad.data);
    return arena.take<float>(pool.size(0) * pool.size(1) * pool.size(2));
  }

  Kernel kernel(const Memory& memory, int64_t slot, int64_t i) const {
    return Kernel(p_, memory.rows + i * round_up(row_bytes_, 64), most_,
                  memory.slots + slot * round_up(Kernel::slot_bytes(p_, most_), 64));
  }

  void clear(float* sums, const AnyView<3>& grad) const {
    if (sums == nullptr) return;
    parallel(context_, grad.size(0) * grad.size(1) * grad.size(2), 1 << 18, [&](int64_t begin, int64_t end) {
      memset(sums + begin, 0, static_cast<size_t>(end - begin) * sizeof(float));
    });
  }

  void add_to_keys(const Memory& memory, int64_t first, int64_t count) const {
    // Twice as many slices as threads, so that one that is held up holds up little.
    const int64_t wanted = slots_ == 1 ? 1 : 2 * slots_;
    const int64_t dims = round_up((head_dim_ + wanted - 1) / wanted, kSliceDims);
    spread(context_, slots_, (head_dim_ + dims - 1) / dims, [&](int64_t slot, int64_t slice) {
      for (int64_t i = 0; i < count; ++i) {
        kernel(memory, slot, i).add_to_keys(first + i, slice * dims, smaller(head_dim_, (slice + 1) * dims));
      }
    });
  }

  void finish_pool(const float* sums, const AnyView<3>& grad) const {
    if (sums == nullptr || grad.dtype == DType::kFloat32) return;
    bf16* to = static_cast<bf16*>(grad.data);
    parallel(context_, grad.size(0) * grad.size(1), 64, [&](int64_t begin, int64_t end) {
      for (int64_t row = begin; row < end; ++row)
        Kernel::narrow(sums + row * head_dim_, head_dim_, to + row * head_dim_);
    });
  }

  void finish_sink(const float* gates) const {
    for (int64_t h = 0; h < heads_; ++h) {
      double total = 0;
      for (int64_t row = 0; row < rows_; ++row) total += static_cast<double>(gates[row * heads_ + h]);
      *p_.grad_sink.as<float>().at(h) = static_cast<float>(0 - total);
    }
  }

  const SparseAttentionBackwardParams& p_;
  const Context& context_;
  int64_t rows_, heads_, head_dim_, most_, slots_, row_bytes_, block_;
};

}  // namespace
}  // namespace dsv4
