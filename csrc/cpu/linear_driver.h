// What the linear kernels share. Rows of activations are prepared once, then panels of weight rows go to the threads.
// Of many rows a thread takes some, prepares them and goes through all panels: they need not leave its caches.
//
// A kernel is a class with
//   static constexpr int64_t kUnit                   rows of activations that are prepared together
//   static int64_t unit_bytes(const LinearParams&)   of such rows, prepared
//   static int64_t panel(const LinearParams&, int64_t threads)    weight rows of a piece of work
//   static int64_t rows(const LinearParams&)        rows of activations of one, at most; a multiple of kUnit, or
//                                                   kAllRows
//   static int64_t memory(const LinearParams&)                    scratch memory of one, bytes
//   static void prepare(const LinearParams&, int64_t token, int64_t group, uint8_t* to)   a unit from `token` on
//   Kernel(const LinearParams&, uint8_t* memory)
//   void run(const uint8_t* units, const LinearPiece&)   the prepared units of its rows lie one after another
#pragma once

#include "common/pages.h"
#include "ops/linear.h"

namespace dsv4 {
namespace {

inline constexpr int64_t kLinearPanel = 32;  // weight rows of the kernels without tiles

inline constexpr int64_t kAllRows = int64_t{1} << 62;

// Outputs [begin, end) of a group for rows [row, row + rows) of activations.
struct LinearPiece {
  int64_t group, begin, end, row, rows;
};

// Products below which one thread is done before a second one has woken.
inline constexpr int64_t kAloneProducts = 1 << 18;
inline constexpr int64_t kAlonePrepared = 1 << 15;  // activations, alike

// body(slot, next) on each of `slots` threads; next() gives the items 0 to items - 1, each once, then -1.
template <class Body>
void linear_spread(const Context& context, int64_t slots, int64_t items, int64_t products, const Body& body) {
  if (items == 0) return;
  int64_t taken = 0;
  if (slots <= 1 || products <= kAloneProducts) {
    return body(0, [&] { return taken < items ? taken++ : -1; });
  }
  parallel(context, slots, [&](int64_t begin, int64_t end) {
    for (int64_t slot = begin; slot < end; ++slot) {
      body(slot, [&] {
        const int64_t item = __atomic_fetch_add(&taken, 1, __ATOMIC_RELAXED);
        return item < items ? item : -1;
      });
    }
  });
}

template <class Kernel>
class LinearCall {
 public:
  LinearCall(const LinearParams& p, const Context& context)
      : p_(p),
        context_(context),
        units_((p.x.size(0) + Kernel::kUnit - 1) / Kernel::kUnit),
        groups_(p.x.size(1)),
        outputs_(p.weight.size(0) / p.x.size(1)),
        panel_(Kernel::panel(p, context.threads > 1 ? context.threads : 1)),
        panels_((outputs_ + panel_ - 1) / panel_),
        unit_bytes_(round_up(Kernel::unit_bytes(p), 64)),
        rows_(Kernel::rows(p)),
        chunks_((p.x.size(0) + rows_ - 1) / rows_),
        apart_(chunks_ * groups_ >= kChunksEach * context.threads && rows_ < kAllRows),
        slot_bytes_(round_up(Kernel::memory(p), 64) + (apart_ ? rows_ / Kernel::kUnit * unit_bytes_ : 0)),
        slots_(pieces() < context.threads ? pieces() : context.threads) {}

  int64_t bytes() const {
    return units_ == 0 ? 0 : (apart_ ? 0 : units_ * groups_ * unit_bytes_) + slots_ * slot_bytes_;
  }

  Status run() const {
    if (units_ == 0 || outputs_ == 0) return Status::ok();
    const int64_t rows = p_.x.size(0), inputs = p_.x.size(2);
    if (!apart_) {
      const auto prepare = [&](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; ++i) Kernel::prepare(p_, i % units_ * Kernel::kUnit, i / units_, unit(i));
      };
      if (rows * groups_ * inputs <= kAlonePrepared) {
        prepare(0, units_ * groups_);
      } else {
        parallel(context_, units_ * groups_, prepare);
      }
    }
    const auto work = [&](int64_t slot, const auto& next) {
      uint8_t* memory = (apart_ ? unit(0) : unit(units_ * groups_)) + slot * slot_bytes_;
      Kernel kernel(p_, memory);
      for (int64_t item = next(); item >= 0; item = next()) {
        if (apart_) {
          run_chunk(kernel, item, memory + slot_bytes_ - rows_ / Kernel::kUnit * unit_bytes_);
        } else {
          run_piece(kernel, item);
        }
      }
    };
    linear_spread(context_, slots_, pieces(), rows * p_.weight.size(0) * inputs, work);
    return Status::ok();
  }

 private:
  static constexpr int64_t kChunksEach = 8;  // for each thread, at least, where it takes all panels of a chunk of rows

  int64_t pieces() const { return chunks_ * groups_ * (apart_ ? 1 : panels_); }

  // The panel of a group with rows [row, row + rows_) of activations, of which there may be fewer.
  LinearPiece piece(int64_t group, int64_t panel, int64_t row) const {
    const int64_t first = panel * panel_, end = first + panel_ < outputs_ ? first + panel_ : outputs_;
    const int64_t left = p_.x.size(0) - row;
    return {group, first, end, row, left < rows_ ? left : rows_};
  }

  // All outputs of some rows, then of the next: it is the activations that shall stay near.
  void run_piece(Kernel& kernel, int64_t item) const {
    const int64_t group = item / panels_ % groups_, row = item / panels_ / groups_ * rows_;
    kernel.run(unit(group * units_ + row / Kernel::kUnit), piece(group, item % panels_, row));
  }

  void run_chunk(Kernel& kernel, int64_t item, uint8_t* units) const {
    const int64_t group = item % groups_, row = item / groups_ * rows_, end = row + piece(group, 0, row).rows;
    for (int64_t token = row; token < end; token += Kernel::kUnit) {
      Kernel::prepare(p_, token, group, units + (token - row) / Kernel::kUnit * unit_bytes_);
    }
    for (int64_t panel = 0; panel < panels_; ++panel) kernel.run(units, piece(group, panel, row));
  }

  uint8_t* unit(int64_t index) const { return static_cast<uint8_t*>(p_.workspace.data) + index * unit_bytes_; }

  const LinearParams& p_;
  const Context& context_;
  int64_t units_, groups_, outputs_, panel_, panels_, unit_bytes_, rows_, chunks_;
  bool apart_;
  int64_t slot_bytes_, slots_;
};

// A kernel's functions for one op.
template <class Kernel>
int64_t linear_workspace_bytes(const LinearParams& p, const Context& context) {
  return LinearCall<Kernel>(p, context).bytes();
}
template <class Kernel>
Status run_linear(const LinearParams& p, const Context& context) {
  return LinearCall<Kernel>(p, context).run();
}

// dense_linear: pieces of kDenseOutputs weight rows with kDenseRows rows of activations go to the threads. A kernel is
// a class with
//   static int64_t memory(const DenseLinearParams&)    scratch memory of one, bytes
//   Kernel(const DenseLinearParams&, uint8_t* memory)
//   void run(int64_t row, int64_t rows, int64_t output, int64_t outputs)
inline constexpr int64_t kDenseOutputs = 32;
inline constexpr int64_t kDenseRows = 64;

template <class Kernel>
class DenseCall {
 public:
  DenseCall(const DenseLinearParams& p, const Context& context)
      : p_(p),
        context_(context),
        chunks_((p.x.size(0) + kDenseRows - 1) / kDenseRows),
        panels_((p.weight.size(0) + kDenseOutputs - 1) / kDenseOutputs),
        slot_bytes_(round_up(Kernel::memory(p), 64)),
        slots_(chunks_ * panels_ < context.threads ? chunks_ * panels_ : context.threads) {}

  int64_t bytes() const { return slots_ * slot_bytes_; }

  Status run() const {
    linear_spread(context_, slots_, chunks_ * panels_, p_.x.size(0) * p_.weight.size(0) * p_.x.size(1),
                  [&](int64_t slot, const auto& next) {
                    Kernel kernel(p_, static_cast<uint8_t*>(p_.workspace.data) + slot * slot_bytes_);
                    for (int64_t item = next(); item >= 0; item = next()) {
                      // All outputs of some rows, then of the next: activations stay in the second-level cache.
                      const int64_t row = item / panels_ * kDenseRows, output = item % panels_ * kDenseOutputs;
                      const int64_t rows = p_.x.size(0) - row, outputs = p_.weight.size(0) - output;
                      kernel.run(row, rows < kDenseRows ? rows : kDenseRows, output,
                                 outputs < kDenseOutputs ? outputs : kDenseOutputs);
                    }
                  });
    return Status::ok();
  }

 private:
  const DenseLinearParams& p_;
  const Context& context_;
  int64_t chunks_, panels_, slot_bytes_, slots_;
};

template <class Kernel>
int64_t dense_workspace_bytes(const DenseLinearParams& p, const Context& context) {
  return DenseCall<Kernel>(p, context).bytes();
}
template <class Kernel>
Status run_dense(const DenseLinearParams& p, const Context& context) {
  return DenseCall<Kernel>(p, context).run();
}

}  // namespace
}  // namespace dsv4
