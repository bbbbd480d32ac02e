// add_pieces: a thread takes four neighbouring columns and every `groups`th piece, eight loads on their way at once;
// the groups meet in shared memory, where a thread adds them in order for each column. Groups are as many as give each
// eight pieces, 32 at most; a block's 256 threads are groups by quads of columns. Sums in two floats (two_floats.h),
// one rounding at the end. 4 bytes a column and piece, read from where the kernel before left them, mostly L2: some
// microseconds beside the rows' own traffic, of which it is 8 bytes for every row of a piece's.
#include "cuda/common/launch.h"
#include "cuda/sm80/piece_sums.h"
#include "cuda/sm80/pieces.h"
#include "cuda/sm80/two_floats.h"

namespace dsv4::sm80 {

inline constexpr int kSumThreads = 256, kMostGroups = 32, kPiecesAtOnce = 8;

struct SumArguments {
  PieceSums sums;
  int64_t quads, quads_of_row;
  int groups, quads_of_block;
};

// Where a group's sums of a quad lie: the first floats, then the second ones.
DSV4_DEVICE uint32_t sum_memory(int half, int thread) {
  return ptx::shared_base() + static_cast<uint32_t>((half * kSumThreads + thread) * 16);
}

DSV4_DEVICE void sum_group(const SumArguments& a, int64_t quad, int group) {
  TwoFloats sum[4] = {};
  const float* from = a.sums.partial + 4 * quad;
  for (int64_t first = group; first < a.sums.pieces; first += kPiecesAtOnce * a.groups) {
    Words4 piece[kPiecesAtOnce];
    DSV4_UNROLL
    for (int i = 0; i < kPiecesAtOnce; ++i) {
      const int64_t at = first + i * a.groups;
      piece[i] = at < a.sums.pieces ? ptx::load_global_16(from + at * 4 * a.quads) : Words4{};
    }
    DSV4_UNROLL
    for (int i = 0; i < kPiecesAtOnce; ++i) {
      float value[4];
      unpack(piece[i], value);
      DSV4_UNROLL
      for (int c = 0; c < 4; ++c) sum[c] = add(sum[c], value[c]);
    }
  }
  const float high[4] = {sum[0].high, sum[1].high, sum[2].high, sum[3].high};
  const float low[4] = {sum[0].low, sum[1].low, sum[2].low, sum[3].low};
  ptx::store_shared_16(sum_memory(0, ptx::thread_index()), pack(high));
  ptx::store_shared_16(sum_memory(1, ptx::thread_index()), pack(low));
}

DSV4_DEVICE void join_groups(const SumArguments& a, int64_t first_quad, int at) {
  TwoFloats sum = {0.0f, 0.0f};
  for (int group = 0; group < a.groups; ++group) {
    const uint32_t offset = static_cast<uint32_t>(4 * at);
    const float high = ptx::load_shared_float(sum_memory(0, group * a.quads_of_block) + offset);
    const float low = ptx::load_shared_float(sum_memory(1, group * a.quads_of_block) + offset);
    sum = add(sum, {high, low});
  }
  const PieceSums& s = a.sums;
  const int64_t quad = first_quad + at / 4, row = quad / a.quads_of_row, column = quad % a.quads_of_row * 4 + at % 4;
  if (quad >= a.quads || column >= s.columns) return;
  const int64_t to = row / s.sets * s.stride + row % s.sets * s.columns + column;
  if (s.dtype == DType::kFloat32) {
    static_cast<float*>(s.result)[to] = nearest(sum);
  } else {
    static_cast<bf16*>(s.result)[to] = from_float<bf16>(nearest(sum));
  }
}

DSV4_KERNEL(kSumThreads, 4) sm80_f32_add_pieces(const SumArguments a) {
  const int64_t first_quad = ptx::block_index_x() * a.quads_of_block;
  const int64_t quad = first_quad + ptx::thread_index() % a.quads_of_block;
  sum_group(a, quad < a.quads ? quad : a.quads - 1, ptx::thread_index() / a.quads_of_block);
  ptx::sync_threads();
  for (int at = ptx::thread_index(); at < 4 * a.quads_of_block; at += kSumThreads) join_groups(a, first_quad, at);
}

Status add_pieces(const char* op, const PieceSums& sums, const Context& context) {
  SumArguments a = {};
  a.sums = sums;
  a.quads_of_row = padded_width(sums.columns) / 4;
  a.quads = sums.rows * sums.sets * a.quads_of_row;
  if (a.quads == 0) return Status::ok();
  a.groups = 1;
  while (a.groups < kMostGroups && a.groups * kPiecesAtOnce < sums.pieces) a.groups *= 2;
  a.quads_of_block = kSumThreads / a.groups;
  cuda::LaunchShape shape;
  shape.blocks_x = ceil_div(a.quads, a.quads_of_block);
  shape.threads = kSumThreads;
  shape.shared_bytes = 2 * kSumThreads * 16;
  return cuda::launch(op, sm80_f32_add_pieces, shape, context, a);
}

}  // namespace dsv4::sm80
