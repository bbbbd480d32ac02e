// compress and compress_entries, for the arithmetic `L` of an instruction set (see page_writer.h). compress in two
// passes: every row that completes an entry makes it, from rows of the call and from what `state` held before; then the
// last rows of each sequence go into their slots. Entries do not depend on each other, so neither pass depends on how
// it is cut.
#pragma once

#include <math.h>

#include "cpu/compress.h"
#include "cpu/page_writer.h"

namespace dsv4 {

DSV4_HOST_DEVICE double hadamard_factor(int64_t dim) { return ::pow(static_cast<double>(dim), -0.5); }

// The positions that the entry of row t pools, oldest first; returns how many. Position `back` before the row's own is
// row t - back, unless that belongs to another sequence: then it came in an earlier call.
DSV4_HOST_DEVICE int64_t list_pooled_rows(const CompressParams& p, int64_t t, PooledRow* rows) {
  const auto sequence = p.sequence.as<const int32_t>();
  const int64_t own = *sequence.at(t), position = *p.position.as<const int32_t>().at(t);
  const int64_t dim = p.norm_weight.size(0), ring = p.state.size(1), sets = p.kv.size(1) / dim;
  int64_t count = 0;
  for (int64_t back = sets * p.ratio - 1; back >= 0; --back) {
    const int64_t at = position - back, row = t - back;
    if (at < 0) continue;
    const int64_t channel = sets == 2 && back < p.ratio ? dim : 0;
    if (row >= 0 && *sequence.at(row) == own) {
      rows[count++] = {p.kv.at(row, channel), p.gate.at(row, channel), p.ape.at(at % p.ratio, channel)};
    } else {
      rows[count++] = {p.state.at(own, at % ring, 0, channel), p.state.at(own, at % ring, 1, channel), nullptr};
    }
  }
  return count;
}

// A finished entry from the positions that it pools, in float32.
template <class N, class L, class Params>
DSV4_HOST_DEVICE void make_entry(const L& lanes, const Params& p, const PooledRow* pooled, int64_t count,
                                 const float* rope, double* work, float* row) {
  const int64_t dim = p.norm_weight.size(0);
  lanes.template pool<N>(pooled, count, dim, row);
  norm_rope<N>(lanes, row, dim, p.norm_weight, p.eps, rope, p.rope.size(1));
  if (p.rotate) lanes.template hadamard<N>(row, dim, hadamard_factor(dim), work, row);
}

template <class N, class L>
Status compress_rows(const L& lanes, const CompressParams& p, const Context& context) {
  const int64_t tokens = p.kv.size(0), dim = p.norm_weight.size(0), pairs = p.rope.size(1), ring = p.state.size(1);
  const int64_t channels = p.kv.size(1);
  const auto sequence = p.sequence.as<const int32_t>();
  const auto position = p.position.as<const int32_t>();
  const PageWriter writer(p.pool, dim, 2 * pairs, p.rotate);
  const int64_t slot_bytes = compress_slot_bytes(p), row_bytes = row_slot_bytes(dim);
  in_slots(context, p.workspace, tokens, slot_bytes, [&](uint8_t* memory, int64_t begin, int64_t end) {
    float* row = reinterpret_cast<float*>(memory);
    double* work = reinterpret_cast<double*>(memory + row_bytes);
    PooledRow* pooled = reinterpret_cast<PooledRow*>(memory + row_bytes + row_slot_bytes(2 * dim));
    for (int64_t t = begin; t < end; ++t) {
      const int64_t at = *position.at(t);
      if ((at + 1) % p.ratio != 0) continue;
      const auto place = writer.find(*sequence.at(t), at / p.ratio);
      if (place.data == nullptr) continue;
      const int64_t count = list_pooled_rows(p, t, pooled);
      make_entry<N>(lanes, p, pooled, count, p.rope.as<const float>().at(t), work, row);
      writer.write(lanes, row, place);
    }
  });
  parallel(context, tokens, [&](int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; ++t) {
      const int64_t own = *sequence.at(t), at = *position.at(t);
      if (t + ring < tokens && *sequence.at(t + ring) == own) continue;
      lanes.load(p.kv.at(t), channels, p.state.at(own, at % ring, 0));
      lanes.add(p.gate.at(t), p.ape.at(at % p.ratio), channels, p.state.at(own, at % ring, 1));
    }
  });
  return Status::ok();
}

// body(row, first channel) of the positions that entry j of a whole sequence pools, oldest first.
template <class Body>
DSV4_HOST_DEVICE void each_pooled_row(const CompressEntriesParams& p, int64_t j, const Body& body) {
  const int64_t dim = p.norm_weight.size(0), sets = p.kv.size(1) / dim;
  for (int64_t back = sets * p.ratio - 1; back >= 0; --back) {
    const int64_t row = (j + 1) * p.ratio - 1 - back;
    if (row >= 0) body(row, sets == 2 && back < p.ratio ? dim : 0);
  }
}

DSV4_HOST_DEVICE int64_t list_pooled_rows_of(const CompressEntriesParams& p, int64_t j, PooledRow* rows) {
  int64_t count = 0;
  each_pooled_row(p, j, [&](int64_t row, int64_t channel) {
    rows[count++] = {p.kv.at(row, channel), p.gate.at(row, channel), p.ape.at(row % p.ratio, channel)};
  });
  return count;
}

template <class N, class L>
Status compress_entries_rows(const L& lanes, const CompressEntriesParams& p, const Context& context) {
  const int64_t dim = p.norm_weight.size(0), row_bytes = row_slot_bytes(dim);
  const int64_t entries = p.result.size(0), slot_bytes = compress_slot_bytes(p);
  in_slots(context, p.workspace, entries, slot_bytes, [&](uint8_t* memory, int64_t begin, int64_t end) {
    float* row = reinterpret_cast<float*>(memory);
    double* work = reinterpret_cast<double*>(memory + row_bytes);
    PooledRow* pooled = reinterpret_cast<PooledRow*>(memory + row_bytes + row_slot_bytes(2 * dim));
    for (int64_t j = begin; j < end; ++j) {
      const int64_t count = list_pooled_rows_of(p, j, pooled);
      make_entry<N>(lanes, p, pooled, count, p.rope.as<const float>().at(j), work, row);
      lanes.store(row, dim, p.result.as<N>().at(j));
    }
  });
  return Status::ok();
}

}  // namespace dsv4
