// sparse_attention: a block takes one row, 16 or 32 of its heads and one split of its slots (320, by their number in
// the row alone), tile by tile of 32 keys with a running softmax. A tile lies in shared memory once, as bfloat16, and
// serves as keys (mma.sync m16n8k16, scores) and, read by ldmatrix.trans, as values. bfloat16 rows come by cp.async;
// FP8 rows through registers, decoded by bit operations; both while the tile before is worked on. A row of one split is
// finished there; the partial results of longer rows are combined in order of the splits by a second kernel. Neither
// the heads of a block nor what stands beside a row has a part in any sum.
//
// n keys and H heads: 4 H D n FLOP a row; 584 n B of FP8 rows of D = 512 (1024 n B of bfloat16) and 4 H D B of query
// and out. At H = 64, 224 FLOP/B of FP8 rows: near the balance of Ampere and Hopper. A tile is decoded once for 32
// heads. Registers allow 8 warps an SM: one block of 32 heads, or two of 16. A split's partial result is 2 KB a head.
#include "cuda/common/launch.h"
#include "cuda/sm80/attention.h"
#include "cuda/sm80/attention_tile.h"

namespace dsv4::sm80 {
namespace {

constexpr int kCombineThreads = 32 * kGroupWarps;

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
    ptx::store_global_16(partial_sum(a, partial, warp, i),
                         Words4{{bits_from_float(warp.sum[i][0]), bits_from_float(warp.sum[i][1]),
                                 bits_from_float(warp.sum[i][2]), bits_from_float(warp.sum[i][3])}});
  }
}

// Grid: x over rows, their splits, and runs of kGroups head groups, the last fastest.
template <int kGroups>
DSV4_DEVICE void attend(const AttentionArguments& a) {
  constexpr int kThreads = 32 * kGroupWarps * kGroups;
  using Loader = TileLoader<kThreads>;
  const int64_t runs = (a.groups + kGroups - 1) / kGroups, block = ptx::block_index_x();
  const int64_t split = block / runs % a.splits, row = a.first_row + block / runs / a.splits;
  AttentionRow keys_of_row;
  keys_of_row.load(a, row);
  if (split >= keys_of_row.splits()) return;
  const int64_t begin = split * kSplitTiles, tiles = keys_of_row.tiles();
  const int64_t end = begin + kSplitTiles < tiles ? begin + kSplitTiles : tiles;

  const AttentionShared<kGroups> shared(a);
  WarpPart warp;
  warp.locate(a, block % runs * kGroups);
  warp.clear();
  warp.load_query(a, row);

  // A slot is looked up two tiles before its key is needed, its page one tile before: each waits for the one before it.
  Loader loader;
  AttentionSlot slot;
  AttentionKey key, next;
  const auto look_up = [&](int64_t tile) { slot.load(keys_of_row, tile * kTileKeys + Loader::key()); };
  const auto finish = [&](int64_t tile) {
    loader.finish(a, key, shared.tile(tile, a));
    if (Loader::member() == 0) {
      const float counts = key.form == KeyForm::kNone ? 0.0f : 1.0f;
      ptx::store_shared_float(shared.count(tile) + static_cast<uint32_t>(Loader::key() * 4), counts);
    }
  };
  look_up(begin);
  key.find(a, keys_of_row, slot);
  look_up(begin + 1);
  if (begin < end) {
    loader.start(a, key, shared.tile(begin, a));
    finish(begin);
  }
  ptx::cp_async_commit();
  next.find(a, keys_of_row, slot);
  look_up(begin + 2);
  DSV4_UNROLL_IF(false)
  for (int64_t tile = begin; tile < end; ++tile) {
    ptx::cp_async_wait<0>();
    ptx::sync_threads();  // the tile is whole; nobody reads the other one, nor the numerators
    key = next;
    if (tile + 1 < end) loader.start(a, key, shared.tile(tile + 1, a));
    ptx::cp_async_commit();
    next.find(a, keys_of_row, slot);
    look_up(tile + 3);
    warp.score(a, shared, shared.tile(tile, a));
    ptx::sync_threads();  // all parts of the scores are there
    warp.weigh(a, shared, shared.count(tile));
    ptx::sync_threads();  // and all numerators
    warp.accumulate(a, shared, shared.tile(tile, a));
    if (tile + 1 < end) finish(tile + 1);
  }

  warp.close();
  const int weighed = warp.weighed_head();
  if (keys_of_row.splits() > 1) {
    const int64_t group = block % runs * kGroups + warp.group;
    if (group >= a.groups) return;
    store_partial(a, row, split, group, warp);
    return;
  }
  const HeadEnd ends(warp.most, warp.total, sink_of(a, warp.first_head + weighed));
  if (warp.lane % 8 == 0) {
    ends.write_lse(a, row, warp.first_head + weighed);
    const int head = warp.group * kGroupHeads + weighed;
    ptx::store_shared_float(shared.divisors + static_cast<uint32_t>(head * 4), ends.divisor);
  }
  ptx::sync_threads();  // the divisors of all heads are there
  const uint32_t mine = shared.divisors + static_cast<uint32_t>((warp.group * kGroupHeads + warp.lane / 4) * 4);
  const float divisor[2] = {ptx::load_shared_float(mine), ptx::load_shared_float(mine + 32)};
  warp.write(a, row, divisor);
}

// Grid: x over rows and head groups.
DSV4_DEVICE void combine(const AttentionArguments& a) {
  const int64_t group = ptx::block_index_x() % a.groups, row = a.first_row + ptx::block_index_x() / a.groups;
  AttentionRow keys_of_row;
  keys_of_row.load(a, row);
  const int64_t splits = keys_of_row.splits();
  if (splits == 1) return;
  WarpPart warp;
  warp.locate(a, group);
  warp.clear();
  const int low = warp.lane / 4;  // this lane's heads: low and low + 8
  float most[2] = {-INFINITY, -INFINITY}, total[2] = {0.0f, 0.0f};
  for (int64_t split = 0; split < splits; ++split) {
    const float* partial = partial_of(a, row, split, group);
    most[0] = ptx::maximum(most[0], partial[low]);
    most[1] = ptx::maximum(most[1], partial[low + 8]);
  }
  bool empty[2] = {true, true};
  for (int64_t split = 0; split < splits; ++split) {
    float* partial = partial_of(a, row, split, group);
    float weight[2];
    DSV4_UNROLL
    for (int half = 0; half < 2; ++half) {
      const float share = partial[kGroupHeads + low + 8 * half], base = most[half] == -INFINITY ? 0.0f : most[half];
      weight[half] = ptx::exponential(ptx::add(partial[low + 8 * half], -base));
      total[half] = ptx::fma(weight[half], share, total[half]);
    }
    const bool some[2] = {partial[kGroupHeads + low] != 0.0f, partial[kGroupHeads + low + 8] != 0.0f};
    DSV4_UNROLL
    for (int i = 0; i < 2 * kSteps; ++i) {
      if (i >= 2 * warp.steps) break;
      const Words4 sum = ptx::load_global_16(partial_sum(a, partial, warp, i));
      DSV4_UNROLL
      for (int j = 0; j < 4; ++j) {
        const int half = j / 2;
        const float value = float_from_bits(sum.word[j]);
        // The first that has keys is taken as it is, zeros with their sign: as if it were the only one.
        if (some[half]) {
          warp.sum[i][j] =
              empty[half] ? ptx::multiply(weight[half], value) : ptx::fma(weight[half], value, warp.sum[i][j]);
        }
      }
    }
    DSV4_UNROLL
    for (int half = 0; half < 2; ++half) empty[half] = empty[half] && !some[half];
  }
  float divisor[2];
  DSV4_UNROLL
  for (int half = 0; half < 2; ++half) {
    const int64_t head = warp.first_head + low + 8 * half;
    const HeadEnd ends(most[half], total[half], sink_of(a, head));
    divisor[half] = ends.divisor;
    if (warp.part == 0 && warp.lane % 4 == 0) ends.write_lse(a, row, head);
  }
  warp.write(a, row, divisor);
}

}  // namespace

DSV4_KERNEL(128, 2) sm80_bf16_sparse_attention_16(const AttentionArguments a) { attend<1>(a); }
DSV4_KERNEL(256, 1) sm80_bf16_sparse_attention_32(const AttentionArguments a) { attend<2>(a); }
DSV4_KERNEL(kCombineThreads, 2) sm80_bf16_sparse_attention_combine(const AttentionArguments a) { combine(a); }

namespace {

static_assert(AttentionShared<2>::bytes(2 * kMaxHeadDim) <= cuda::kMaxSharedBytes);

constexpr int64_t kPartialBytes = int64_t{256} << 20;  // at most, unless one row needs more
constexpr int64_t kManyBlocks = 264;                   // two on each SM of the largest GPUs
constexpr int64_t kMaxBlocks = 0x7FFFFFFF;

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
bool aligned(const void* data, uintptr_t bytes) { return reinterpret_cast<uintptr_t>(data) % bytes == 0; }

// Whether pairs of elements are aligned words.
bool paired(const AnyView<3>& view) {
  return aligned(view.data, 4) && view.stride[0] % 2 == 0 && view.stride[1] % 2 == 0;
}

AttentionPool pool_of(const RowPool& from, int64_t head_dim, int64_t rope_dim) {
  AttentionPool pool = {};
  pool.given = from.given();
  if (!pool.given) return pool;
  pool.fp8 = from.bytes.given();
  pool.table = static_cast<const int32_t*>(from.table.data);
  pool.table_stride = from.table.stride[0];
  pool.blocks = from.table.shape[1];
  constexpr int64_t kLargestPage = int64_t{1} << 31;  // entries have 31 bits
  pool.page_size = static_cast<uint32_t>(from.page_size < kLargestPage ? from.page_size : kLargestPage);
  if (pool.fp8) {
    pool.data = static_cast<const uint8_t*>(from.bytes.data);
    pool.pages = from.bytes.shape[0];
    pool.page_stride = from.bytes.stride[0];
    pool.row_stride = fp8_row_bytes(head_dim, rope_dim);
    pool.scales = fp8_scales_at(0, from.page_size, head_dim, rope_dim);
    pool.scale_stride = static_cast<int>(fp8_row_scale_bytes(head_dim, rope_dim));
    pool.vector = pool.row_stride % 16 == 0 && (head_dim - rope_dim) % 16 == 0;
  } else {
    pool.data = static_cast<const uint8_t*>(from.plain.data);
    pool.pages = from.plain.shape[0];
    pool.page_stride = 2 * from.plain.stride[0];
    pool.row_stride = 2 * from.plain.stride[1];
    pool.vector = pool.row_stride % 16 == 0 && head_dim % 8 == 0;
  }
  pool.vector = pool.vector && aligned(pool.data, 16) && pool.page_stride % 16 == 0;
  return pool;
}

int64_t slots_of_any_row(const SparseAttentionParams& p) {
  int64_t entries = 0;
  if (p.compressed.given()) {
    entries = p.indices.given() ? p.indices.shape[1] : p.compressed.table.shape[1] * p.compressed.page_size;
  }
  constexpr int64_t kMost = int64_t{1} << 31;  // positions and lengths have 31 bits
  const auto bounded = [](int64_t count) { return count < kMost ? count : kMost; };
  return bounded(p.window) + bounded(entries);
}

// What does not depend on where the tensors lie.
struct Plan {
  int slice;
  int64_t groups, splits, rows_at_once, partial_bytes;  // of one row

  explicit Plan(const SparseAttentionParams& p) {
    const int64_t padded = round_up(p.query.shape[2], 16);
    slice = static_cast<int>(round_up(ceil_div(padded, kGroupWarps), 16));
    groups = ceil_div(p.query.shape[1], kGroupHeads);
    splits = ceil_div(slots_of_any_row(p), int64_t{kTileKeys} * kSplitTiles);
    const int64_t floats = 2 * kGroupHeads + static_cast<int64_t>(slice) * 64;
    partial_bytes = splits > 1 ? splits * groups * floats * static_cast<int64_t>(sizeof(float)) : 0;
    rows_at_once = kMaxBlocks / (groups * splits + 1);
    if (partial_bytes > 0 && kPartialBytes / partial_bytes < rows_at_once) rows_at_once = kPartialBytes / partial_bytes;
    if (rows_at_once < 1) rows_at_once = 1;
  }
};

AttentionArguments arguments_of(const SparseAttentionParams& p, const Plan& plan) {
  AttentionArguments a = {};
  const int64_t head_dim = p.query.shape[2];
  a.params = p;
  a.window = pool_of(p.window_pool, head_dim, p.rope_dim);
  a.compressed = pool_of(p.compressed, head_dim, p.rope_dim);
  a.partial = static_cast<float*>(p.workspace.data);
  a.splits = plan.splits;
  a.sequences = p.window_pool.table.shape[0];
  a.heads = p.query.shape[1];
  a.groups = plan.groups;
  a.head_dim = static_cast<int>(head_dim);
  a.rope = static_cast<int>(p.rope_dim);
  a.nope = a.head_dim - a.rope;
  a.padded_dim = static_cast<int>(round_up(head_dim, 16));
  a.slice = plan.slice;
  a.tile_row = static_cast<int>(round_up(2 * head_dim, 128));
  a.paired_query = paired(p.query);
  a.paired_out = paired(p.out);
  return a;
}

template <int kGroups>
Status launch_attend(void (*kernel)(AttentionArguments), const AttentionArguments& a, int64_t rows,
                     const Context& context) {
  cuda::LaunchShape shape;
  shape.blocks_x = rows * a.splits * ceil_div(a.groups, kGroups);
  shape.threads = 32 * kGroupWarps * kGroups;
  shape.shared_bytes = AttentionShared<kGroups>::bytes(a.tile_row);
  return cuda::launch("sparse_attention", kernel, shape, context, a);
}

}  // namespace

bool accepts_sparse_attention(const SparseAttentionParams& p) {
  const auto fits = [](const RowPool& pool) { return !pool.plain.given() || pool.plain.dtype == DType::kBFloat16; };
  return p.query.dtype == DType::kBFloat16 && fits(p.window_pool) && fits(p.compressed) && p.query.size(2) % 2 == 0 &&
         p.query.size(2) <= kMaxHeadDim;
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
  AttentionArguments a = arguments_of(p, plan);
  for (a.first_row = 0; a.first_row < rows; a.first_row += plan.rows_at_once) {
    const int64_t count = rows - a.first_row < plan.rows_at_once ? rows - a.first_row : plan.rows_at_once;
    const Status attended = heads_per_block == kGroupHeads
                                ? launch_attend<1>(sm80_bf16_sparse_attention_16, a, count, context)
                                : launch_attend<2>(sm80_bf16_sparse_attention_32, a, count, context);
    if (!attended.is_ok()) return attended;
    if (a.splits == 1) continue;
    cuda::LaunchShape shape;
    shape.blocks_x = count * a.groups;
    shape.threads = kCombineThreads;
    const Status combined = cuda::launch("sparse_attention", sm80_bf16_sparse_attention_combine, shape, context, a);
    if (!combined.is_ok()) return combined;
  }
  return Status::ok();
}

Status sparse_attention(const SparseAttentionParams& p, const Context& context) {
  const int64_t groups = ceil_div(p.query.shape[1], kGroupHeads);
  const bool many = groups > 1 && p.query.shape[0] * (groups / 2) >= kManyBlocks;
  return sparse_attention(p, context, many ? 2 * kGroupHeads : kGroupHeads);
}

}  // namespace dsv4::sm80
