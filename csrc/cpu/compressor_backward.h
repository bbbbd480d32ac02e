// The gradients of compress_entries, for the arithmetic `L` of an instruction set (see page_writer.h). A channel of a
// row lies in one entry at most, so entries write their rows' gradients themselves; ape's is then summed from gate's,
// column by column in ascending order. No sum depends on how the work is cut.
#pragma once

#include "cpu/compressor.h"
#include "cpu/norm_gradient_rows.h"
#include "cpu/work.h"

namespace dsv4 {
namespace {

// What a thread works in.
struct GradientSlot {
  float *row, *turned;
  double *work, *pooled_gradient, *weights;
  PooledRow* pooled;
  PooledGradient* targets;

  DSV4_HOST_DEVICE GradientSlot(uint8_t* memory, const CompressEntriesParams& p) {
    const int64_t dim = p.norm_weight.size(0), positions = pooled_positions(p);
    Arena arena{memory};
    row = arena.take<float>(dim);
    turned = arena.take<float>(dim);
    work = arena.take<double>(dim);
    pooled_gradient = arena.take<double>(dim);
    weights = arena.take<double>(kPoolChannels * positions);
    pooled = arena.take<PooledRow>(positions);
    targets = arena.take<PooledGradient>(positions);
  }
};

template <class N, class L>
DSV4_HOST_DEVICE void entry_gradient(const L& lanes, const CompressEntriesBackwardParams& p, int64_t j,
                                     const GradientSlot& slot, double* sums) {
  const CompressEntriesParams& f = p.forward;
  const int64_t dim = f.norm_weight.size(0), pairs = f.rope.size(1), count = list_pooled_rows_of(f, j, slot.pooled);
  const float* rope = f.rope.as<const float>().at(j);
  const N* grad = p.grad.as<const N>().at(j);
  lanes.template pool<N>(slot.pooled, count, dim, slot.row);
  if (f.rotate) {  // the matrix is its own transpose
    lanes.template hadamard<float>(grad, dim, hadamard_factor(dim), slot.work, slot.turned);
    norm_gradient(lanes, slot.turned, slot.row, dim, f.norm_weight, f.eps, rope, pairs, sums, slot.pooled_gradient);
  } else {
    norm_gradient(lanes, grad, slot.row, dim, f.norm_weight, f.eps, rope, pairs, sums, slot.pooled_gradient);
  }
  PooledGradient* target = slot.targets;
  each_pooled_row(f, j, [&](int64_t row, int64_t channel) {
    *target++ = {p.grad_kv.at(row, channel), p.grad_gate.at(row, channel)};
  });
  lanes.pool_gradient(slot.pooled, slot.targets, count, dim, slot.pooled_gradient, slot.weights);
}

// Rows past the last entry; with overlap, the first channels of the last entry's own rows, which no later one pools.
DSV4_HOST_DEVICE void clear_unpooled(const CompressEntriesBackwardParams& p) {
  const int64_t entries = p.grad.size(0), dim = p.grad.size(1), rows = p.grad_kv.size(0), channels = p.grad_kv.size(1);
  const int64_t ratio = p.forward.ratio,
                first = channels > dim && entries > 0 ? (entries - 1) * ratio : entries * ratio;
  for (int64_t row = first; row < rows; ++row) {
    const size_t bytes = static_cast<size_t>(row < entries * ratio ? dim : channels) * sizeof(float);
    memset(p.grad_kv.at(row), 0, bytes);
    memset(p.grad_gate.at(row), 0, bytes);
  }
}

DSV4_HOST_DEVICE void add_ape_gradient(const CompressEntriesBackwardParams& p, const Context& context) {
  constexpr int64_t kColumns = 64;
  const int64_t entries = p.grad.size(0), ratio = p.forward.ratio, channels = p.grad_gate.size(1);
  const int64_t pieces = (channels + kColumns - 1) / kColumns;
  parallel(context, ratio * pieces, rows_a_piece(entries * kColumns), [&](int64_t begin, int64_t end) {
    for (int64_t piece = begin; piece < end; ++piece) {
      const int64_t row = piece / pieces, first = piece % pieces * kColumns;
      const int64_t count = channels - first < kColumns ? channels - first : kColumns;
      double sum[kColumns] = {};
      for (int64_t j = 0; j < entries; ++j) {
        const float* from = p.grad_gate.at(j * ratio + row, first);
        for (int64_t i = 0; i < count; ++i) sum[i] += from[i];
      }
      float* to = p.grad_ape.at(row, first);
      for (int64_t i = 0; i < count; ++i) to[i] = static_cast<float>(sum[i]);
    }
  });
}

template <class N, class L>
Status compress_entries_gradients(const L& lanes, const CompressEntriesBackwardParams& p, const Context& context) {
  const int64_t entries = p.grad.size(0), dim = p.grad.size(1), groups = row_groups(entries);
  const int64_t slot_bytes = compress_gradient_slot_bytes(p.forward);
  uint8_t* memory = static_cast<uint8_t*>(p.forward.workspace.data);
  double* sums = reinterpret_cast<double*>(memory + row_slots(groups, context) * slot_bytes);
  in_slots(context, p.forward.workspace, groups, slot_bytes, [&](uint8_t* own, int64_t begin, int64_t end) {
    const GradientSlot slot(own, p.forward);
    for (int64_t group = begin; group < end; ++group) {
      double* group_sums = sums + group * dim;
      for (int64_t d = 0; d < dim; ++d) group_sums[d] = 0;
      for (int64_t j = entries * group / groups; j < entries * (group + 1) / groups; ++j) {
        entry_gradient<N>(lanes, p, j, slot, group_sums);
      }
    }
  });
  clear_unpooled(p);
  add_ape_gradient(p, context);
  add_groups(context, entries, sums, p.grad_norm_weight);
  return Status::ok();
}

}  // namespace
}  // namespace dsv4
