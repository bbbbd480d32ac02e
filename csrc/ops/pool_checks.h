// Validation that the ops which read or write pools share.
#pragma once

#include "ops/pool.h"
#include "ops/validate.h"

namespace dsv4 {

enum class PoolKind : int8_t { kRows, kKeys };

// A pool of rows or index keys of head_dim dims and its table of `sequences` (or Validator::kAny) rows.
void validate_pool(Validator& v, const char* pages, const char* table, const RowPool& pool, PoolKind kind,
                   int64_t sequences, int64_t head_dim, int64_t rope_dim);

// Every value is a row of the table: the lowest if it is negative is named, else the highest. Only where the values lie
// in this processor's memory.
void validate_sequences(Validator& v, const AnyView<1>& sequence, int64_t rows);

}  // namespace dsv4
