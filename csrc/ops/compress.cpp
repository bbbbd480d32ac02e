#include "ops/compress.h"

#include "cpu/compress.h"
#include "cuda/sm80/compress.h"
#include "ops/candidates.h"
#include "ops/pool_checks.h"

namespace dsv4 {
namespace {

// The vector kernel works on 32 dims at a time.
[[maybe_unused]] bool whole_steps(const CompressParams& p) {
  return p.norm_weight.size(0) % 32 == 0 && p.rope.size(1) % 16 == 0;
}

// The CUDA kernel holds an entry in shared memory.
[[maybe_unused]] bool in_shared_memory(const CompressParams& p) {
  return p.norm_weight.size(0) <= (p.rotate ? sm80::kMostKeyDims : sm80::kMostEntryDims) && p.ratio <= sm80::kMostRatio;
}

constexpr Candidate<CompressParams> kCompress[] = {
    {"sm80", Isa::kSm80, DSV4_SM80(sm80::compress), in_shared_memory},
    {"avx512", Isa::kAvx512, DSV4_AVX512(avx512::compress), whole_steps},
    {"scalar", Isa::kScalar, DSV4_SCALAR(scalar::compress)},
};
const Op compress_op("compress", kCompress);

void validate_arguments(Validator& v, const CompressParams& p) {
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
  v.rope(p.rope, tokens, head_dim);
  v.require(!p.rotate || (head_dim & (head_dim - 1)) == 0, "head_dim must be a power of two to be rotated, got %lld",
            static_cast<long long>(head_dim));
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

}  // namespace

int64_t compress_workspace_bytes(const CompressParams& p, const Context& context) {
  Validator v("compress");
  validate_arguments(v, p);
  return v.status().is_ok() && context.device == Device::kCpu ? compress_slots_bytes(p, context) : 0;
}

Status compress(const CompressParams& p, const Context& c) { return compress_op.run(validate(p, c), p, c); }

}  // namespace dsv4
