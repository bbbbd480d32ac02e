// Keys as the portable attention kernels read and multiply them, and the rotations around them.
#pragma once

#include "cpu/attention_keys.h"

namespace dsv4::scalar {
namespace {

inline void decode(const Key& key, const RowPool& pool, int64_t head_dim, int64_t rope_dim, float* values) {
  if (key.scales != nullptr) {
    const int64_t codes = head_dim - rope_dim;
    for (int64_t d = 0; d < codes; ++d) values[d] = e4m3_value(key.data[d]) * e8m0_value(key.scales[d / kRowBlock]);
    for (int64_t d = 0; d < rope_dim; ++d) {
      bf16 value;
      std::memcpy(&value, key.data + codes + 2 * d, sizeof(value));
      values[codes + d] = to_float(value);
    }
  } else if (pool.plain.dtype == DType::kFloat32) {
    std::memcpy(values, key.data, static_cast<size_t>(head_dim) * sizeof(float));
  } else {
    const bf16* row = reinterpret_cast<const bf16*>(key.data);
    for (int64_t d = 0; d < head_dim; ++d) values[d] = to_float(row[d]);
  }
}

template <class A, class B>
float dot(const A* a, const B* b, int64_t count) {
  float parts[8] = {};
  int64_t d = 0;
  for (; d + 8 <= count; d += 8) {
    for (int i = 0; i < 8; ++i) parts[i] += to_float(a[d + i]) * to_float(b[d + i]);
  }
  for (; d < count; ++d) parts[0] += to_float(a[d]) * to_float(b[d]);
  const float even = (parts[0] + parts[4]) + (parts[2] + parts[6]);
  const float odd = (parts[1] + parts[5]) + (parts[3] + parts[7]);
  return even + odd;
}

// Undoes the rotation in pairs of the last dims.
template <class X>
void rotate_back(X* out, int64_t head_dim, const float* rope, int64_t pairs) {
  X* pair = out + head_dim - 2 * pairs;
  for (int64_t i = 0; i < pairs; ++i, pair += 2, rope += 2) {
    const float even = to_float(pair[0]), odd = to_float(pair[1]), cos = rope[0], sin = rope[1];
    pair[0] = from_float<X>(even * cos + odd * sin);
    pair[1] = from_float<X>(odd * cos - even * sin);
  }
}

// Turns pairs of the last dims, as for a query.
template <class X>
void rotate(float* grad, int64_t head_dim, const float* rope, int64_t pairs) {
  float* pair = grad + head_dim - 2 * pairs;
  for (int64_t i = 0; i < pairs; ++i, pair += 2, rope += 2) {
    const float even = pair[0], odd = pair[1], cos = rope[0], sin = rope[1];
    pair[0] = to_float(from_float<X>(even * cos - odd * sin));
    pair[1] = to_float(from_float<X>(odd * cos + even * sin));
  }
}

}  // namespace
}  // namespace dsv4::scalar
