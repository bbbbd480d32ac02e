// sparse_attention: a block takes one row, 16 or 32 of its heads and one split of its slots (320, by their number in
// the row alone), tile by tile of 32 keys with a running softmax. A tile lies in shared memory once, as bfloat16, and
// serves as keys (mma.sync m16n8k16, scores) and, read by ldmatrix.trans, as values. bfloat16 rows come by cp.async;
// FP8 rows through registers, decoded two codes at once; both while the tile before is worked on. A row of one split is
// finished there; the partial results of longer rows are combined in order of the splits by a second kernel. Neither
// the heads of a block nor what stands beside a row has a part in any sum.
//
// Where queries or rows are float32, tiles are: 16 keys, by cp.async, for 16 heads, multiplied by FMA
// (attention_lanes.h); the rest is the same. Its roofline is that of FP32: at 16 heads, 16 FLOP a byte of the rows.
//
// n keys and H heads: 4 H D n FLOP a row; 584 n B of FP8 rows of D = 512 (1024 n B of bfloat16) and 4 H D B of query
// and out. At H = 64, 224 FLOP/B of FP8 rows: near the balance of Ampere and Hopper. A tile is decoded once for 32
// heads. Registers allow 8 warps an SM: one block of 32 heads, or two of 16. A split's partial result is 2 KB a head.
#include "cuda/common/launch.h"
#include "cuda/sm80/attention.h"
#include "cuda/sm80/attention_arguments.h"
#include "cuda/sm80/attention_lanes.h"
#include "cuda/sm80/attention_tile.h"

namespace dsv4::sm80 {
namespace {

constexpr int kCombineWarps = 4;
constexpr int kCombineEights = 4;  // of dims, of a warp
constexpr int kCombineSplits = 4;  // that are read at once
constexpr int kCombineDims = kCombineWarps * kCombineEights * 8;

// What a split knows of its heads, for `combine`.
DSV4_DEVICE void store_partial(const AttentionArguments& a, int64_t row, int64_t split, int64_t group, WarpPart& warp) {
  const int weighed = warp.weighed_head();
  float* partial = partial_of(a, row, split, group);
  if (warp.lane % 8 == 0) {
    partial[weighed] = warp.most;
    partial[kGroupHeads + weighed] = warp.total;
  }
  DSV4_UNROLL
  for (int i = 0; i < 2 * kSteps; ++i) {
    if (i >= 2 * warp.steps) break;
    ptx::store_global_16(partial + partial_sum(warp.first_dim / 8 + i, warp.lane),
                         Words4{{bits_from_float(warp.sum[i][0]), bits_from_float(warp.sum[i][1]),
                                 bits_from_float(warp.sum[i][2]), bits_from_float(warp.sum[i][3])}});
  }
}

// The part of a row that a block takes. Grid: x over rows, their splits, and runs of head groups, the last fastest.
struct BlockPart {
  int64_t row, split, run, begin, end;  // begin, end: tiles
  AttentionRow keys;

  DSV4_DEVICE BlockPart(const AttentionArguments& a, int64_t runs, int tile_keys) {
    const int64_t block = ptx::block_index_x();
    run = block % runs;
    split = block / runs % a.splits;
    row = a.first_row + block / runs / a.splits;
    keys.load(a, row);
    const int64_t tiles = (keys.slots + tile_keys - 1) / tile_keys, of_split = kSplitSlots / tile_keys;
    begin = split * of_split;
    end = begin + of_split < tiles ? begin + of_split : tiles;
  }
  DSV4_DEVICE bool exists() const { return split < keys.splits(); }
};

template <int kGroups>
DSV4_DEVICE void attend(const AttentionArguments& a) {
  const BlockPart block(a, (a.groups + kGroups - 1) / kGroups, kTileKeys);
  if (!block.exists()) return;
  const AttentionShared<kGroups> shared(a);
  WarpPart warp;
  warp.locate(a, block.run * kGroups);
  warp.clear();
  warp.load_query(a, block.row);
  walk_tiles<Bf16Tile, 32 * kGroupWarps * kGroups>(a, block.keys, block.begin, block.end, shared, [&](int64_t tile) {
    warp.score(a, shared, shared.tile(tile));
    ptx::sync_threads();  // all parts of the scores are there
    warp.weigh(a, shared, shared.count(tile));
    ptx::sync_threads();  // and all numerators
    warp.accumulate(a, shared, shared.tile(tile));
  });

  warp.close();
  const int weighed = warp.weighed_head();
  if (block.keys.splits() > 1) {
    const int64_t group = block.run * kGroups + warp.group;
    if (group >= a.groups) return;
    store_partial(a, block.row, block.split, group, warp);
    return;
  }
  const HeadEnd ends(warp.most, warp.total, sink_of(a, warp.first_head + weighed));
  if (warp.lane % 8 == 0) {
    ends.write_lse(a, block.row, warp.first_head + weighed);
    const int head = warp.group * kGroupHeads + weighed;
    ptx::store_shared_float(shared.divisors + static_cast<uint32_t>(head * 4), ends.divisor);
  }
  ptx::sync_threads();  // the divisors of all heads are there
  const uint32_t mine = shared.divisors + static_cast<uint32_t>((warp.group * kGroupHeads + warp.lane / 4) * 4);
  const float divisor[2] = {ptx::load_shared_float(mine), ptx::load_shared_float(mine + 32)};
  write_sums<bf16>(a, block.row, warp.first_head, warp.first_dim, warp.sum, 2 * warp.steps, divisor);
}

template <class X>
DSV4_DEVICE void attend_in_lanes(const AttentionArguments& a) {
  const BlockPart block(a, a.groups, F32Tile::kKeys);
  if (!block.exists()) return;
  WarpHeads<X> heads;
  heads.locate(a, block.run);
  heads.load_query(a, block.row);
  const LanesShared shared(a, heads.first / kLaneHeads);
  walk_tiles<F32Tile, 32 * kLaneWarps>(a, block.keys, block.begin, block.end, shared, [&](int64_t tile) {
    if (heads.exist(a)) heads.add(a, shared, tile);
  });
  heads.close();
  if (block.keys.splits() > 1) {
    heads.store(a, partial_of(a, block.row, block.split, block.run));
  } else {
    heads.write(a, block.row);
  }
}

// What a warp of `combine` reads of a split.
struct SplitPart {
  float most[2], total[2];  // of heads lane / 4 and 8 more
  Words4 sum[kCombineEights];

  DSV4_DEVICE void load(const float* partial, int first, int eights) {
    const int lane = ptx::thread_index() % 32;
    DSV4_UNROLL
    for (int half = 0; half < 2; ++half) {
      most[half] = partial[lane / 4 + 8 * half];
      total[half] = partial[kGroupHeads + lane / 4 + 8 * half];
    }
    DSV4_UNROLL
    for (int i = 0; i < kCombineEights; ++i) {
      sum[i] = i < eights ? ptx::load_global_16(partial + partial_sum(first + i, lane)) : Words4{};
    }
  }
};

// Grid: x over rows, head groups and runs of kCombineDims dims, the last fastest.
template <class X>
DSV4_DEVICE void combine(const AttentionArguments& a) {
  const int64_t runs = (a.padded_dim + kCombineDims - 1) / kCombineDims, block = ptx::block_index_x() / runs;
  const int64_t group = block % a.groups, row = a.first_row + block / a.groups;
  AttentionRow keys_of_row;
  keys_of_row.load(a, row);
  const int64_t splits = keys_of_row.splits();
  const int run = static_cast<int>(ptx::block_index_x() % runs), lane = ptx::thread_index() % 32;
  const int first = (run * kCombineWarps + ptx::thread_index() / 32) * kCombineEights;
  const int eights = a.padded_dim / 8 - first;
  if (splits == 1 || eights <= 0) return;
  const float* partial = partial_of(a, row, 0, group);
  const int64_t stride = partial_of(a, row, 1, group) - partial;
  float most[2] = {-INFINITY, -INFINITY}, total[2] = {0.0f, 0.0f};
  for (int64_t split = 0; split < splits; ++split) {
    const float* heads = partial + split * stride + lane / 4;
    most[0] = ptx::maximum(most[0], heads[0]);
    most[1] = ptx::maximum(most[1], heads[8]);
  }
  // From -0 on, so that the first split that has keys is taken as if it were the only one.
  float sum[kCombineEights][4];
  DSV4_UNROLL
  for (int i = 0; i < 4 * kCombineEights; ++i) sum[i / 4][i % 4] = -0.0f;
  for (int64_t split = 0; split < splits; split += kCombineSplits) {
    SplitPart parts[kCombineSplits];
    DSV4_UNROLL
    for (int s = 0; s < kCombineSplits; ++s) {
      if (split + s < splits) parts[s].load(partial + (split + s) * stride, first, eights);
    }
    DSV4_UNROLL
    for (int s = 0; s < kCombineSplits; ++s) {
      if (split + s >= splits) break;
      DSV4_UNROLL
      for (int half = 0; half < 2; ++half) {
        const float base = most[half] == -INFINITY ? 0.0f : most[half], share = parts[s].total[half];
        const float weight = ptx::exponential(ptx::add(parts[s].most[half], -base));
        total[half] = ptx::fma(weight, share, total[half]);
        DSV4_UNROLL
        for (int i = 0; i < 2 * kCombineEights; ++i) {
          float& so_far = sum[i / 2][2 * half + i % 2];
          const float more = ptx::fma(weight, float_from_bits(parts[s].sum[i / 2].word[2 * half + i % 2]), so_far);
          so_far = share != 0.0f ? more : so_far;
        }
      }
    }
  }
  float divisor[2];
  DSV4_UNROLL
  for (int half = 0; half < 2; ++half) {
    const int64_t head = group * kGroupHeads + lane / 4 + 8 * half;
    const HeadEnd ends(most[half], total[half], sink_of(a, head));
    divisor[half] = ends.divisor;
    if (first == 0 && lane % 4 == 0) ends.write_lse(a, row, head);
    DSV4_UNROLL
    for (int i = 0; i < 2 * kCombineEights; ++i) {
      if (total[half] == 0.0f) sum[i / 2][2 * half + i % 2] = 0.0f;
    }
  }
  write_sums<X>(a, row, group * kGroupHeads, 8 * first, sum, eights, divisor);
}

}  // namespace

DSV4_KERNEL(128, 2) sm80_bf16_sparse_attention_16(const AttentionArguments a) { attend<1>(a); }
DSV4_KERNEL(256, 1) sm80_bf16_sparse_attention_32(const AttentionArguments a) { attend<2>(a); }
DSV4_KERNEL(128, 2) sm80_bf16_sparse_attention_f32_rows(const AttentionArguments a) { attend_in_lanes<bf16>(a); }
DSV4_KERNEL(128, 2) sm80_f32_sparse_attention(const AttentionArguments a) { attend_in_lanes<float>(a); }
DSV4_KERNEL(32 * kCombineWarps, 3) sm80_bf16_sparse_attention_combine(const AttentionArguments a) { combine<bf16>(a); }
DSV4_KERNEL(32 * kCombineWarps, 3) sm80_f32_sparse_attention_combine(const AttentionArguments a) { combine<float>(a); }

namespace {

static_assert(AttentionShared<2>::bytes(2 * kMaxHeadDim) <= cuda::kMaxSharedBytes);
static_assert(LanesShared::bytes(4 * kMaxHeadDim) <= cuda::kMaxSharedBytes);

constexpr int64_t kPartialBytes = int64_t{256} << 20;  // at most, unless one row needs more

// What does not depend on where the tensors lie.
struct Plan {
  int64_t groups, splits, rows_at_once, partial_bytes;  // of one row

  explicit Plan(const SparseAttentionParams& p) {
    groups = ceil_div(p.query.shape[1], kGroupHeads);
    const int64_t slots = slots_of_any_row(p);
    splits = slots > 0 ? ceil_div(slots, kSplitSlots) : 1;
    const int64_t bytes = partial_floats(warp_slice(p.query.shape[2])) * static_cast<int64_t>(sizeof(float));
    partial_bytes = splits > 1 ? splits * groups * bytes : 0;
    rows_at_once = cuda::kMaxBlocks / (groups * splits + 1);
    if (partial_bytes > 0 && kPartialBytes / partial_bytes < rows_at_once) rows_at_once = kPartialBytes / partial_bytes;
    if (rows_at_once < 1) rows_at_once = 1;
  }
};

using Kernel = void (*)(AttentionArguments);

Status launch_attend(Kernel kernel, int64_t blocks_of_split, int threads, int shared_bytes, const AttentionArguments& a,
                     int64_t rows, const Context& context) {
  cuda::LaunchShape shape;
  shape.blocks_x = rows * a.splits * blocks_of_split;
  shape.threads = threads;
  shape.shared_bytes = shared_bytes;
  return cuda::launch("sparse_attention", kernel, shape, context, a);
}

template <int kGroups>
Status launch_attend(Kernel kernel, const AttentionArguments& a, int64_t rows, const Context& context) {
  return launch_attend(kernel, ceil_div(a.groups, kGroups), 32 * kGroupWarps * kGroups,
                       AttentionShared<kGroups>::bytes(a.tile_row), a, rows, context);
}

Status attend_rows(const AttentionArguments& a, int64_t rows, int heads_per_block, const Context& context) {
  if (in_lanes(a.params)) {
    const Kernel kernel =
        a.params.query.dtype == DType::kFloat32 ? sm80_f32_sparse_attention : sm80_bf16_sparse_attention_f32_rows;
    return launch_attend(kernel, a.groups, 32 * kLaneWarps, LanesShared::bytes(a.tile_row), a, rows, context);
  }
  return heads_per_block == kGroupHeads ? launch_attend<1>(sm80_bf16_sparse_attention_16, a, rows, context)
                                        : launch_attend<2>(sm80_bf16_sparse_attention_32, a, rows, context);
}

Status combine_rows(const AttentionArguments& a, int64_t rows, const Context& context) {
  const Kernel kernel =
      a.params.query.dtype == DType::kFloat32 ? sm80_f32_sparse_attention_combine : sm80_bf16_sparse_attention_combine;
  cuda::LaunchShape shape;
  shape.blocks_x = rows * a.groups * ceil_div(a.padded_dim, kCombineDims);
  shape.threads = 32 * kCombineWarps;
  return cuda::launch("sparse_attention", kernel, shape, context, a);
}

}  // namespace

bool accepts_sparse_attention(const SparseAttentionParams& p) {
  return p.query.size(2) % 2 == 0 && p.query.size(2) <= kMaxHeadDim;
}

int64_t sparse_attention_workspace_bytes(const SparseAttentionParams& p, const Context&) {
  if (!accepts_sparse_attention(p) || p.query.shape[1] == 0) return 0;
  const Plan plan(p);
  const int64_t rows = p.query.shape[0];
  return (rows < plan.rows_at_once ? rows : plan.rows_at_once) * plan.partial_bytes;
}

Status sparse_attention(const SparseAttentionParams& p, const Context& context, int heads_per_block) {
  const int64_t rows = p.query.shape[0];
  if (rows == 0 || p.query.shape[1] == 0) return Status::ok();
  const Plan plan(p);
  AttentionArguments a = arguments_of(p);
  a.partial = static_cast<float*>(p.workspace.data);
  a.splits = plan.splits;
  for (a.first_row = 0; a.first_row < rows; a.first_row += plan.rows_at_once) {
    const int64_t count = rows - a.first_row < plan.rows_at_once ? rows - a.first_row : plan.rows_at_once;
    const Status attended = attend_rows(a, count, heads_per_block, context);
    if (!attended.is_ok()) return attended;
    if (a.splits == 1) continue;
    const Status combined = combine_rows(a, count, context);
    if (!combined.is_ok()) return combined;
  }
  return Status::ok();
}

Status sparse_attention(const SparseAttentionParams& p, const Context& context) {
  return sparse_attention(p, context, heads_of_block(p));
}

}  // namespace dsv4::sm80
