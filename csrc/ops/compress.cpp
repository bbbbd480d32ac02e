#include "ops/compress.h"

#include "cpu/compress.h"
#include "cuda/sm80/compress.h"
#include "ops/candidates.h"
#include "ops/pool_checks.h"

namespace dsv4 {
namespace {

// The vector kernels work on 32 dims at a time.
template <class Params>
bool whole_steps(const Params& p) {
  return p.norm_weight.size(0) % 32 == 0 && p.rope.size(1) % 16 == 0;
}
[[maybe_unused]] bool whole_gradients(const CompressEntriesBackwardParams& p) { return whole_steps(p.forward); }

// The CUDA kernels hold an entry in shared memory.
template <class Params>
bool in_shared_memory(const Params& p) {
  return p.norm_weight.size(0) <= (p.rotate ? sm80::kMostKeyDims : sm80::kMostEntryDims) && p.ratio <= sm80::kMostRatio;
}
[[maybe_unused]] bool countable(const CompressEntriesParams& p) {
  return in_shared_memory(p) && p.kv.size(0) <= INT32_MAX;
}

constexpr Candidate<CompressParams> kCompress[] = {
    {"sm80", Isa::kSm80, DSV4_SM80(sm80::compress), in_shared_memory<CompressParams>},
    {"avx512", Isa::kAvx512, DSV4_AVX512(avx512::compress), whole_steps<CompressParams>},
    {"scalar", Isa::kScalar, DSV4_SCALAR(scalar::compress)},
};
const Op compress_op("compress", kCompress);

constexpr Candidate<CompressEntriesParams> kEntries[] = {
    {"sm80", Isa::kSm80, DSV4_SM80(sm80::compress_entries), countable},
    {"avx512", Isa::kAvx512, DSV4_AVX512(avx512::compress_entries), whole_steps<CompressEntriesParams>},
    {"scalar", Isa::kScalar, DSV4_SCALAR(scalar::compress_entries)},
};
const Op entries_op("compress_entries", kEntries);

[[maybe_unused]] bool countable(const CompressEntriesBackwardParams& p) { return countable(p.forward); }

constexpr Candidate<CompressEntriesBackwardParams> kEntriesBackward[] = {
    {"sm80", Isa::kSm80, DSV4_SM80(sm80::compress_entries_backward), countable},
    {"avx512", Isa::kAvx512, DSV4_AVX512(avx512::compress_entries_backward), whole_gradients},
    {"scalar", Isa::kScalar, DSV4_SCALAR(scalar::compress_entries_backward)},
};
const Op entries_backward_op("compress_entries_backward", kEntriesBackward);

// What the ops have in common; rope of `ropes` rows.
template <class Params>
void validate_inputs(Validator& v, const Params& p, int64_t ropes) {
  const int64_t tokens = p.kv.size(0), channels = p.kv.size(1), head_dim = p.norm_weight.size(0);
  v.at_least("ratio", p.ratio, 1);
  v.require(p.ratio < (int64_t{1} << 31), "ratio is too large");
  v.view("kv", p.kv, {Validator::kAny, Validator::kAny});
  v.view("gate", p.gate, {tokens, channels});
  v.view("ape", p.ape, {p.ratio, channels});
  v.floats("norm_weight", p.norm_weight, {Validator::kAny});
  v.require(channels == head_dim || channels == 2 * head_dim, "kv must have %lld or %lld channels, got %lld",
            static_cast<long long>(head_dim), static_cast<long long>(2 * head_dim), static_cast<long long>(channels));
  v.at_least("head_dim", head_dim, 1);
  v.rope(p.rope, ropes, head_dim);
  v.require(!p.rotate || (head_dim & (head_dim - 1)) == 0, "head_dim must be a power of two to be rotated, got %lld",
            static_cast<long long>(head_dim));
}

int64_t entries_of(const CompressEntriesParams& p) { return p.ratio < 1 ? 0 : p.kv.size(0) / p.ratio; }

void validate_arguments(Validator& v, const CompressEntriesParams& p) {
  validate_inputs(v, p, entries_of(p));
  v.view("result", p.result, p.norm_weight.dtype, {entries_of(p), p.norm_weight.size(0)});
}

void validate_arguments(Validator& v, const CompressEntriesBackwardParams& p) {
  const CompressEntriesParams& f = p.forward;
  const int64_t tokens = f.kv.size(0), channels = f.kv.size(1), head_dim = f.norm_weight.size(0);
  validate_inputs(v, f, entries_of(f));
  v.view("grad", p.grad, f.norm_weight.dtype, {entries_of(f), head_dim});
  v.view("grad_kv", p.grad_kv, {tokens, channels});
  v.view("grad_gate", p.grad_gate, {tokens, channels});
  v.view("grad_ape", p.grad_ape, {f.ratio, channels});
  v.view("grad_norm_weight", p.grad_norm_weight, f.norm_weight.dtype, {head_dim});
}

void validate_arguments(Validator& v, const CompressParams& p) {
  const int64_t tokens = p.kv.size(0), channels = p.kv.size(1), head_dim = p.norm_weight.size(0);
  validate_inputs(v, p, tokens);
  if (!v.status().is_ok()) return;
  validate_pool(v, "pages", "table", p.pool, p.rotate ? PoolKind::kKeys : PoolKind::kRows, Validator::kAny, head_dim,
                2 * p.rope.size(1));
  v.view("state", p.state, {p.pool.table.size(0), Validator::kAny, 2, channels});
  if (!v.status().is_ok()) return;
  const int64_t least = channels / head_dim * p.ratio;
  v.require(p.state.size(1) >= least, "state must have a ring of at least %lld positions, got %lld",
            static_cast<long long>(least), static_cast<long long>(p.state.size(1)));
  v.view("sequence", p.sequence, DType::kInt32, {tokens});
  v.view("position", p.position, DType::kInt32, {tokens});
}

// Only where the values lie in this processor's memory.
void validate_rows(Validator& v, const CompressParams& p) {
  validate_sequences(v, p.sequence, p.pool.table.size(0));
  if (!v.status().is_ok() || p.sequence.size(0) == 0) return;
  const auto sequence = p.sequence.as<const int32_t>();
  const auto position = p.position.as<const int32_t>();
  int32_t highest = -1;
  bool together = true, ascend = true;
  for (int64_t row = 0; row < sequence.size(0) && together; ++row) {
    const int32_t own = *sequence.at(row), at = *position.at(row);
    ascend = ascend && at >= 0;
    if (row > 0 && *sequence.at(row - 1) == own) {
      ascend = ascend && static_cast<int64_t>(at) == static_cast<int64_t>(*position.at(row - 1)) + 1;
    } else if (own > highest) {
      highest = own;
    } else {  // sequences out of order: this one may have begun before
      for (int64_t before = 0; before < row && together; ++before) together = *sequence.at(before) != own;
    }
  }
  v.require(together, "the rows of a sequence must stand together");
  v.require(ascend, "position must ascend by one within a sequence, from 0 or later");
}

Status validate(const CompressParams& p, const Context& context) {
  Validator v("compress");
  validate_arguments(v, p);
  if (v.status().is_ok() && context.device == Device::kCpu) validate_rows(v, p);
  if (v.status().is_ok()) v.workspace(p.workspace.data, p.workspace.bytes, compress_workspace_bytes(p, context));
  return v.status();
}

Status validate(const CompressEntriesParams& p, const Context& context) {
  Validator v("compress_entries");
  validate_arguments(v, p);
  if (v.status().is_ok()) {
    v.workspace(p.workspace.data, p.workspace.bytes, compress_entries_workspace_bytes(p, context));
  }
  return v.status();
}

Status validate(const CompressEntriesBackwardParams& p, const Context& context) {
  Validator v("compress_entries_backward");
  validate_arguments(v, p);
  if (v.status().is_ok()) {
    const Workspace& given = p.forward.workspace;
    v.workspace(given.data, given.bytes, compress_entries_backward_workspace_bytes(p, context));
  }
  return v.status();
}

}  // namespace

int64_t compress_workspace_bytes(const CompressParams& p, const Context& context) {
  Validator v("compress");
  validate_arguments(v, p);
  return v.status().is_ok() && context.device == Device::kCpu ? compress_slots_bytes(p, context) : 0;
}

int64_t compress_entries_workspace_bytes(const CompressEntriesParams& p, const Context& context) {
  Validator v("compress_entries");
  validate_arguments(v, p);
  return v.status().is_ok() && context.device == Device::kCpu ? compress_slots_bytes(p, context) : 0;
}

int64_t compress_entries_backward_workspace_bytes(const CompressEntriesBackwardParams& p, const Context& context) {
  Validator v("compress_entries_backward");
  validate_arguments(v, p);
  if (!v.status().is_ok()) return 0;
  if (context.device == Device::kCuda) {
#if defined(DSV4_WITH_SM80)
    return sm80::compress_entries_backward_workspace_bytes(p, context);
#else
    return 0;
#endif
  }
  return compress_gradient_bytes(p, context);
}

Status compress_entries(const CompressEntriesParams& p, const Context& c) {
  return entries_op.run(validate(p, c), p, c);
}

Status compress_entries_backward(const CompressEntriesBackwardParams& p, const Context& c) {
  return entries_backward_op.run(validate(p, c), p, c);
}

Status compress(const CompressParams& p, const Context& c) { return compress_op.run(validate(p, c), p, c); }

}  // namespace dsv4
