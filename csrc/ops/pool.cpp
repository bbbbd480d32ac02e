#include "common/pages.h"
#include "ops/pool_checks.h"

namespace dsv4 {

void validate_pool(Validator& v, const char* pages, const char* table, const RowPool& pool, PoolKind kind,
                   int64_t sequences, int64_t head_dim, int64_t rope_dim) {
  v.require(pool.page_size >= 1, "the page size of %s must be at least 1, got %lld", pages,
            static_cast<long long>(pool.page_size));
  v.require(pool.page_size < (int64_t{1} << 31) && head_dim < (int64_t{1} << 28), "the page size of %s is too large",
            pages);
  v.require(!(pool.plain.given() && pool.bytes.given()), "%s must be either plain or bytes", pages);
  if (!v.status().is_ok()) return;
  if (!pool.bytes.given()) {
    v.floats(pages, pool.plain, {Validator::kAny, pool.page_size, head_dim});
  } else if (kind == PoolKind::kRows) {
    v.require(rope_dim >= 0 && rope_dim < head_dim, "rope_dim must lie in [0, %lld) for FP8 rows, got %lld",
              static_cast<long long>(head_dim), static_cast<long long>(rope_dim));
    if (!v.status().is_ok()) return;
    v.view(pages, pool.bytes, DType::kUInt8, {Validator::kAny, fp8_page_bytes(pool.page_size, head_dim, rope_dim)});
  } else {
    const bool fp4 = holds_fp4_keys(pool.bytes.size(1), pool.page_size, head_dim);
    v.view(pages, pool.bytes, DType::kUInt8,
           {Validator::kAny, pool.page_size * (fp4 ? fp4_key_bytes(head_dim) : fp8_key_bytes(head_dim))});
  }
  v.view(table, pool.table, DType::kInt32, {sequences, Validator::kAny});
}

void validate_sequences(Validator& v, const AnyView<1>& sequence, int64_t rows) {
  if (!v.status().is_ok()) return;
  int64_t low = 0, high = -1;
  for (int64_t row = 0; row < sequence.size(0); ++row) {
    const int64_t value = *sequence.as<const int32_t>().at(row);
    low = value < low ? value : low;
    high = value > high ? value : high;
  }
  v.require(low >= 0 && high < rows, "sequence must lie in [0, %lld), the rows of the table, got %lld",
            static_cast<long long>(rows), static_cast<long long>(low < 0 ? low : high));
}

}  // namespace dsv4
