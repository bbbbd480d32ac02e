// hadamard: rows of up to 1024 dims in registers (hadamard_row.h), longer ones in shared memory, a block a row. 4 bytes
// a bfloat16 element from and to memory and, at 128 dims, some 40 instructions, half of them additions: two thirds of
// the copy bandwidth expected.
// quantize_fp8, quantize_fp4: a block of 128 (or 32) values is a row of 8 (or 2) lanes, 16 values each, and stays in
// registers between its maximum and its codes; 3 (or 2.5) bytes a bfloat16 element and 15 (or 23) instructions: bound
// by memory in FP8, where the processor converts to e4m3 (8.9 and newer), 80 % of the copy bandwidth expected; by
// instructions in FP4, 60 %.
// dequantize_*: eight codes a thread; 3 (or 2.5) bytes an element and 19 (or 17) instructions, half of them for
// addresses: near the limit of both.
#include "cuda/common/launch.h"
#include "cuda/sm80/code_pairs.h"
#include "cuda/sm80/divisor.h"
#include "cuda/sm80/hadamard_row.h"
#include "cuda/sm80/page_rows.h"
#include "cuda/sm80/quantize.h"
#include "cuda/sm80/row_launch.h"

namespace dsv4::sm80 {

inline constexpr int kLongThreads = 256;
inline constexpr int kHeldEights = 2;  // of a block to quantise, in a lane's registers

struct HadamardArguments {
  HadamardParams params;
  HadamardScale scale;
  int64_t rows;
  int dim, lanes;
  bool vector;
};

struct QuantizeArguments {
  QuantizeParams params;
  int64_t first_row;
  uint32_t units;  // blocks of this launch
  Divisor blocks;  // of a row
  int dim, block, lanes;
  bool vector;
};

// The codes of eight values of a block of `count`, from `column` on.
template <bool kFp4>
DSV4_DEVICE void store_codes(uint8_t* codes, int column, int count, bool vector, const float (&value)[8],
                             const CodeScale& by) {
  const int left = count - column < 8 ? count - column : 8;
  if constexpr (kFp4) {
    const uint32_t four = e2m1_eight(value, by);
    if (vector) {
      ptx::store_global_4(codes + column / 2, four);
    } else {
      store_bytes(codes + column / 2, left / 2, {{four, 0}});
    }
  } else {
    const ptx::Words2 eight = e4m3_eight(value, by);
    if (vector) {
      ptx::store_global_8(codes + column, eight);
    } else {
      store_bytes(codes + column, left, eight);
    }
  }
}

// A lane's eights of a block of `count`, all loads on their way at once. Past the end stand zeros or, of whole eights,
// the block's first once more, on which no maximum depends either.
template <class X>
DSV4_DEVICE void load_held(const X* block, int first, int step, int count, bool vector, float (&held)[kHeldEights][8]) {
  DSV4_UNROLL
  for (int s = 0; vector && s < kHeldEights; ++s) {
    const int column = first + s * step < count ? first + s * step : 0;
    load_eight(block, column, column + 8, true, held[s]);
  }
  DSV4_UNROLL
  for (int s = 0; !vector && s < kHeldEights; ++s) load_eight(block, first + s * step, count, false, held[s]);
}

template <class X, bool kFp4>
DSV4_DEVICE void quantize_blocks(const QuantizeArguments& a) {
  const RowLanes lanes(a.lanes);
  const bool own = lanes.row < a.units;
  const uint32_t unit = own ? static_cast<uint32_t>(lanes.row) : a.units - 1;  // shuffles need whole warps
  const auto [launch_row, block] = a.blocks.divide(unit);
  const int64_t row = a.first_row + launch_row;
  const int start = static_cast<int>(block) * a.block, count = a.dim - start < a.block ? a.dim - start : a.block;
  const X* x = static_cast<const X*>(a.params.x.data) + row * a.params.x.stride[0] + start;
  uint8_t* codes = static_cast<uint8_t*>(a.params.codes.data) + row * a.params.codes.stride[0] + start / (kFp4 ? 2 : 1);
  float held[kHeldEights][8];
  uint32_t largest = 0;
  const auto add = [&](const float (&value)[8]) {
    const uint32_t other = largest_magnitude(value, 8);
    largest = largest < other ? other : largest;
  };
  const int first = 8 * lanes.lane, beyond = first + kHeldEights * lanes.step();
  load_held(x, first, lanes.step(), count, a.vector, held);
  DSV4_UNROLL
  for (int s = 0; s < kHeldEights; ++s) add(held[s]);
  for (int column = beyond; column < count; column += lanes.step()) {
    float value[8];
    load_eight(x, column, count, a.vector, value);
    add(value);
  }
  largest = largest_of_lanes(largest, lanes.count);
  if (!own) return;
  const CodeScale by = code_scale(kFp4 ? fp4_scale(largest) : fp8_scale(largest));
  if (lanes.lane == 0) static_cast<uint8_t*>(a.params.scale.data)[row * a.params.scale.stride[0] + block] = by.scale;
  DSV4_UNROLL
  for (int s = 0; s < kHeldEights; ++s) {
    const int column = first + s * lanes.step();
    if (column < count) store_codes<kFp4>(codes, column, count, a.vector, held[s], by);
  }
  for (int column = beyond; column < count; column += lanes.step()) {
    float value[8];
    load_eight(x, column, count, a.vector, value);
    store_codes<kFp4>(codes, column, count, a.vector, value, by);
  }
}

struct DequantizeArguments {
  DequantizeParams params;
  int64_t first_batch;
  uint32_t first_row, units;  // of the first batch; eights of this launch
  Divisor eights, rows;       // of a row; of a batch
  Divisor group, block;
  int dim;
  bool vector;
};

// A code moved into a float's fields, with copies of its sign masked out, is its value times 2^-126 (e2m1) or 2^-120
// (e4m3).
template <bool kFp4>
DSV4_DEVICE void values_of(const ptx::Words2& codes, float (&value)[8]) {
  DSV4_UNROLL
  for (int e = 0; e < 8; ++e) {
    const uint32_t first = kFp4 ? codes.word[0] << (28 - 4 * e) : codes.word[e / 4] << (24 - e % 4 * 8);
    const uint32_t moved = static_cast<uint32_t>(static_cast<int32_t>(first) >> (kFp4 ? 6 : 4));
    value[e] = ptx::multiply(float_from_bits(moved & (kFp4 ? 0x81C00000u : 0x87F00000u)), kFp4 ? 0x1p126f : 0x1p120f);
  }
  if constexpr (kFp4) return;
  const uint32_t any[2] = {e4m3_nans(codes.word[0]), e4m3_nans(codes.word[1])};
  if ((any[0] | any[1]) == 0) return;
  DSV4_UNROLL
  for (int e = 0; e < 8; ++e) {
    if ((any[e / 4] >> (e % 4 * 8) & 0x80u) != 0) value[e] = float_from_bits(0x7FC00000u);
  }
}

// Scales of a row, one a block.
struct ScaleRow {
  const void* data;
  bool wide;

  DSV4_DEVICE float at(uint32_t block) const {
    const uint32_t bits = wide ? static_cast<const uint32_t*>(data)[block] : static_cast<const uint8_t*>(data)[block];
    return wide ? float_from_bits(bits) : e8m0_value(static_cast<uint8_t>(bits));
  }
};

// Eight codes a thread.
template <class X, bool kFp4>
DSV4_DEVICE void expand_codes(const DequantizeArguments& a) {
  const DequantizeParams& p = a.params;
  const uint32_t unit = static_cast<uint32_t>(ptx::block_index_x() * kRowThreads + ptx::thread_index());
  if (unit >= a.units) return;
  const auto [launch_row, eight] = a.eights.divide(unit);
  const auto [launch_batch, row] = a.rows.divide(a.first_row + launch_row);
  const int64_t batch = a.first_batch + launch_batch;
  const int column = static_cast<int>(eight) * 8;
  const uint8_t* from = static_cast<const uint8_t*>(p.codes.data) + batch * p.codes.stride[0] + row * p.codes.stride[1];
  X* to = static_cast<X*>(p.result.data) + batch * p.result.stride[0] + row * p.result.stride[1];
  const bool wide = p.scale.dtype == DType::kFloat32;
  const int64_t scales = batch * p.scale.stride[0] + a.group.quotient(row) * p.scale.stride[1];
  const ScaleRow scale = {static_cast<const uint8_t*>(p.scale.data) + scales * (wide ? 4 : 1), wide};
  if (a.vector) {
    ptx::Words2 codes;
    if constexpr (kFp4) {
      codes.word[0] = ptx::load_global_4(from + column / 2);
    } else {
      codes = ptx::load_global_8(from + column);
    }
    const float by = scale.at(a.block.quotient(static_cast<uint32_t>(column)));
    float value[8];
    values_of<kFp4>(codes, value);
    DSV4_UNROLL
    for (int e = 0; e < 8; ++e) value[e] = ptx::multiply(value[e], by);
    store_eight(to, column, column + 8, true, value);
  } else {
    for (int d = column; d < column + 8 && d < a.dim; ++d) {
      const float value =
          kFp4 ? e2m1_value(static_cast<uint8_t>(from[d / 2] >> (d % 2 * 4) & 15)) : e4m3_value(from[d]);
      to[d] = from_float<X>(ptx::multiply(value, scale.at(a.block.quotient(static_cast<uint32_t>(d)))));
    }
  }
}

template <class X, int kSteps>
DSV4_DEVICE void rotate_rows(const HadamardArguments& a) {
  const RowLanes lanes(a.lanes);
  const int64_t row = lanes.row < a.rows ? lanes.row : a.rows - 1;  // shuffles need whole warps
  const X* from = static_cast<const X*>(a.params.x.data) + row * a.params.x.stride[0];
  X* to = static_cast<X*>(a.params.result.data) + row * a.params.result.stride[0];
  float value[kSteps][8];
  DSV4_UNROLL
  for (int s = 0; s < kSteps; ++s) load_eight(from, 8 * (s * lanes.count + lanes.lane), a.dim, a.vector, value[s]);
  hadamard_row(lanes, a.dim, a.scale, value);
  if (lanes.row >= a.rows) return;
  DSV4_UNROLL
  for (int s = 0; s < kSteps; ++s) store_eight(to, 8 * (s * lanes.count + lanes.lane), a.dim, a.vector, value[s]);
}

// The largest magnitude of a row over the block, in every thread.
template <class X>
DSV4_DEVICE uint32_t largest_of_block(const X* row, int dim) {
  uint32_t largest = 0;
  for (int d = ptx::thread_index(); d < dim; d += kLongThreads) {
    const uint32_t bits = bits_from_float(to_float(row[d])) & 0x7FFFFFFFu;
    largest = largest < bits ? bits : largest;
  }
  largest = largest_of_lanes(largest, 32);
  const uint32_t memory = ptx::shared_base();
  if (ptx::thread_index() % 32 == 0) {
    ptx::store_shared_word(memory + static_cast<uint32_t>(ptx::thread_index() / 32 * 4), largest);
  }
  ptx::sync_threads();
  DSV4_UNROLL
  for (int warp = 0; warp < kLongThreads / 32; ++warp) {
    const uint32_t other = ptx::load_shared_word(memory + static_cast<uint32_t>(warp * 4));
    largest = largest < other ? other : largest;
  }
  return largest;
}

DSV4_DEVICE void shared_butterfly(uint32_t memory, int low, int half) {
  float a = ptx::load_shared_float(memory + static_cast<uint32_t>(4 * low));
  float b = ptx::load_shared_float(memory + static_cast<uint32_t>(4 * (low + half)));
  butterfly(a, b);
  ptx::store_shared_float(memory + static_cast<uint32_t>(4 * low), a);
  ptx::store_shared_float(memory + static_cast<uint32_t>(4 * (low + half)), b);
}

// Shared memory: what largest_of_block needs, then the coarse and the fine parts.
template <class X>
DSV4_DEVICE void rotate_long_row(const HadamardArguments& a) {
  const int64_t row = ptx::block_index_x();
  const X* from = static_cast<const X*>(a.params.x.data) + row * a.params.x.stride[0];
  X* to = static_cast<X*>(a.params.result.data) + row * a.params.result.stride[0];
  const HadamardCut cut(largest_of_block(from, a.dim), a.scale.levels);
  const uint32_t coarse = ptx::shared_base() + kLongThreads / 8, fine = coarse + static_cast<uint32_t>(4 * a.dim);
  for (int d = ptx::thread_index(); d < a.dim; d += kLongThreads) {
    float high, low;
    cut.cut(to_float(from[d]), high, low);
    ptx::store_shared_float(coarse + static_cast<uint32_t>(4 * d), high);
    ptx::store_shared_float(fine + static_cast<uint32_t>(4 * d), low);
  }
  for (int half = 1; half < a.dim; half *= 2) {
    ptx::sync_threads();
    for (int pair = ptx::thread_index(); pair < a.dim / 2; pair += kLongThreads) {
      const int low = pair / half * 2 * half + pair % half;
      shared_butterfly(coarse, low, half);
      shared_butterfly(fine, low, half);
    }
  }
  // The last stage left every thread what it stores: half a row is a multiple of the threads.
  for (int d = ptx::thread_index(); d < a.dim; d += kLongThreads) {
    const float high = ptx::load_shared_float(coarse + static_cast<uint32_t>(4 * d));
    const float low = ptx::load_shared_float(fine + static_cast<uint32_t>(4 * d));
    to[d] = from_float<X>(cut.join(high, low, a.scale.factor));
  }
}

DSV4_KERNEL(kRowThreads, 8) sm80_bf16_quantize_fp8(const QuantizeArguments a) { quantize_blocks<bf16, false>(a); }
DSV4_KERNEL(kRowThreads, 8) sm80_f32_quantize_fp8(const QuantizeArguments a) { quantize_blocks<float, false>(a); }
DSV4_KERNEL(kRowThreads, 8) sm80_bf16_quantize_fp4(const QuantizeArguments a) { quantize_blocks<bf16, true>(a); }
DSV4_KERNEL(kRowThreads, 8) sm80_f32_quantize_fp4(const QuantizeArguments a) { quantize_blocks<float, true>(a); }
DSV4_KERNEL(kRowThreads, 8) sm80_bf16_dequantize_fp8(const DequantizeArguments a) { expand_codes<bf16, false>(a); }
DSV4_KERNEL(kRowThreads, 8) sm80_f32_dequantize_fp8(const DequantizeArguments a) { expand_codes<float, false>(a); }
DSV4_KERNEL(kRowThreads, 8) sm80_bf16_dequantize_fp4(const DequantizeArguments a) { expand_codes<bf16, true>(a); }
DSV4_KERNEL(kRowThreads, 8) sm80_f32_dequantize_fp4(const DequantizeArguments a) { expand_codes<float, true>(a); }
DSV4_KERNEL(kRowThreads, 8) sm80_bf16_hadamard_1(const HadamardArguments a) { rotate_rows<bf16, 1>(a); }
DSV4_KERNEL(kRowThreads, 8) sm80_f32_hadamard_1(const HadamardArguments a) { rotate_rows<float, 1>(a); }
DSV4_KERNEL(kRowThreads, 3) sm80_bf16_hadamard_4(const HadamardArguments a) { rotate_rows<bf16, 4>(a); }
DSV4_KERNEL(kRowThreads, 3) sm80_f32_hadamard_4(const HadamardArguments a) { rotate_rows<float, 4>(a); }
DSV4_KERNEL(kLongThreads, 2) sm80_bf16_hadamard_long(const HadamardArguments a) { rotate_long_row<bf16>(a); }
DSV4_KERNEL(kLongThreads, 2) sm80_f32_hadamard_long(const HadamardArguments a) { rotate_long_row<float>(a); }

namespace {

// Eights or blocks of a launch; with the rows of a batch before the first they stay below what a Divisor divides. A
// row has fewer: ops/quantize.cpp bounds dims and rows.
constexpr int64_t kUnitsAtOnce = int64_t{1} << 30;

Status quantize(const char* name, void (*kernel)(QuantizeArguments), const QuantizeParams& p, const Context& context) {
  const int64_t rows = p.x.size(0), dim = p.x.size(1), block = p.block < dim ? p.block : dim;
  if (rows == 0 || dim == 0) return Status::ok();
  QuantizeArguments a = {};
  a.params = p;
  const int64_t blocks = ceil_div(dim, block);
  a.blocks = Divisor(static_cast<uint32_t>(blocks));
  a.dim = static_cast<int>(dim);
  a.block = static_cast<int>(block);
  a.lanes = row_lanes((block + kHeldEights - 1) / kHeldEights);
  a.vector = in_eights(p.x) && block % 8 == 0 && aligned(p.codes.data) && p.codes.stride[0] % 8 == 0;
  const int64_t at_once = kUnitsAtOnce / blocks;
  for (a.first_row = 0; a.first_row < rows; a.first_row += at_once) {
    const int64_t left = rows - a.first_row;
    a.units = static_cast<uint32_t>((left < at_once ? left : at_once) * blocks);
    const Status status = cuda::launch(name, kernel, row_shape(a.units, a.lanes), context, a);
    if (!status.is_ok()) return status;
  }
  return Status::ok();
}

}  // namespace

Status dequantize(const DequantizeParams& p, const Context& context) {
  const int64_t batches = p.result.size(0), rows = p.result.size(1), dim = p.result.size(2), size = p.fp4 ? 4 : 8;
  if (batches == 0 || rows == 0 || dim == 0) return Status::ok();
  const int64_t eights = ceil_div(dim, 8), block = p.block < dim ? p.block : dim;
  DequantizeArguments a = {};
  a.params = p;
  a.eights = Divisor(static_cast<uint32_t>(eights));
  a.rows = Divisor(static_cast<uint32_t>(rows));
  a.group = Divisor(static_cast<uint32_t>(p.group < rows ? p.group : rows));
  a.block = Divisor(static_cast<uint32_t>(block));
  a.dim = static_cast<int>(dim);
  a.vector = in_eights(p.result) && block % 8 == 0 && aligned(p.codes.data, 8) && p.codes.stride[0] % size == 0 &&
             p.codes.stride[1] % size == 0;
  const bool wide = p.result.dtype == DType::kFloat32;
  const auto kernel = p.fp4 ? (wide ? sm80_f32_dequantize_fp4 : sm80_bf16_dequantize_fp4)
                            : (wide ? sm80_f32_dequantize_fp8 : sm80_bf16_dequantize_fp8);
  const int64_t at_once = kUnitsAtOnce / eights;
  for (int64_t first = 0; first < batches * rows; first += at_once) {
    const int64_t left = batches * rows - first;
    a.first_batch = first / rows;
    a.first_row = static_cast<uint32_t>(first % rows);
    a.units = static_cast<uint32_t>((left < at_once ? left : at_once) * eights);
    const Status status = cuda::launch("dequantize", kernel, row_shape(a.units, 1), context, a);
    if (!status.is_ok()) return status;
  }
  return Status::ok();
}

Status quantize_fp8(const QuantizeParams& p, const Context& context) {
  const bool wide = p.x.dtype == DType::kFloat32;
  return quantize("quantize_fp8", wide ? sm80_f32_quantize_fp8 : sm80_bf16_quantize_fp8, p, context);
}

Status quantize_fp4(const QuantizeParams& p, const Context& context) {
  const bool wide = p.x.dtype == DType::kFloat32;
  return quantize("quantize_fp4", wide ? sm80_f32_quantize_fp4 : sm80_bf16_quantize_fp4, p, context);
}

Status hadamard(const HadamardParams& p, const Context& context) {
  const int64_t rows = p.x.size(0), dim = p.x.size(1);
  if (rows == 0) return Status::ok();
  HadamardArguments a = {};
  a.params = p;
  a.scale = hadamard_scale(dim);
  a.rows = rows;
  a.dim = static_cast<int>(dim);
  a.lanes = row_lanes(dim);
  a.vector = in_eights(p.x) && in_eights(p.result);
  const bool wide = p.x.dtype == DType::kFloat32;
  if (dim > kHadamardDims) {
    cuda::LaunchShape shape;
    shape.blocks_x = rows;
    shape.threads = kLongThreads;
    shape.shared_bytes = kLongThreads / 8 + 8 * a.dim;
    return cuda::launch("hadamard", wide ? sm80_f32_hadamard_long : sm80_bf16_hadamard_long, shape, context, a);
  }
  const bool one = dim <= 32 * 8;
  const auto kernel =
      wide ? (one ? sm80_f32_hadamard_1 : sm80_f32_hadamard_4) : (one ? sm80_bf16_hadamard_1 : sm80_bf16_hadamard_4);
  return cuda::launch("hadamard", kernel, row_shape(rows, a.lanes), context, a);
}

}  // namespace dsv4::sm80
