// index_query: a head's eights stay in registers through rotation, Hadamard and FP4; 16 bytes a lane in and out, 4
// bytes a bfloat16 element from and to memory. Bound by its instructions, half of them the exact Hadamard sums: a third
// of the copy bandwidth expected; beside attention a small part of a layer.
#include "cuda/common/launch.h"
#include "cuda/sm80/head_rows.h"
#include "cuda/sm80/index_query.h"
#include "cuda/sm80/page_rows.h"

namespace dsv4::sm80 {

// The eight values after quantisation to e2m1, times the scale: what a code's bits are in a float's fields, times
// 2^126.
DSV4_DEVICE void fp4_round_trip(float (&value)[8], uint32_t largest) {
  const CodeScale by = code_scale(fp4_scale(largest));
  const float scale = e8m0_value(by.scale);
  DSV4_UNROLL
  for (int e = 0; e < 8; ++e) {
    const uint32_t code = e2m1_code(ptx::multiply(value[e], by.inverse));
    const float moved = float_from_bits((code & 8u) << 28 | (code & 7u) << 22);
    value[e] = ptx::multiply(ptx::multiply(moved, 0x1p126f), scale);
  }
}

template <class X, int kSteps>
DSV4_DEVICE void make_queries(const HeadArguments& a) {
  const HeadRow<X> row(a);
  const RowLanes& lanes = row.lanes;
  float value[kSteps][8];
  DSV4_UNROLL
  for (int s = 0; s < kSteps; ++s) {
    norm_rope_eight<X>(row.from, NoNorm{}, row.rope, 8 * (s * lanes.count + lanes.lane), value[s]);
  }
  hadamard_row(lanes, a.dim, a.hadamard, value);
  DSV4_UNROLL
  for (int s = 0; s < kSteps; ++s) {
    round_eight(value[s], X{});
    const int block = kIndexScaleDims / 8 < lanes.count ? kIndexScaleDims / 8 : lanes.count;
    fp4_round_trip(value[s], largest_of_lanes(largest_magnitude(value[s], 8), block));
    if (row.own) store_eight(row.to, 8 * (s * lanes.count + lanes.lane), a.dim, a.vector, value[s]);
  }
}

DSV4_KERNEL(kRowThreads, 8) sm80_bf16_index_query_1(const HeadArguments a) { make_queries<bf16, 1>(a); }
DSV4_KERNEL(kRowThreads, 8) sm80_f32_index_query_1(const HeadArguments a) { make_queries<float, 1>(a); }
DSV4_KERNEL(kRowThreads, 3) sm80_bf16_index_query_4(const HeadArguments a) { make_queries<bf16, 4>(a); }
DSV4_KERNEL(kRowThreads, 3) sm80_f32_index_query_4(const HeadArguments a) { make_queries<float, 4>(a); }

Status index_query(const IndexQueryParams& p, const Context& context) {
  HeadArguments a = head_arguments(p.query, p.rope, p.result);
  a.hadamard = hadamard_scale(p.query.size(2));
  const bool wide = p.query.dtype == DType::kFloat32, one = a.dim <= 32 * 8;
  const auto kernel = wide ? (one ? sm80_f32_index_query_1 : sm80_f32_index_query_4)
                           : (one ? sm80_bf16_index_query_1 : sm80_bf16_index_query_4);
  return launch_heads("index_query", kernel, a, context);
}

}  // namespace dsv4::sm80
