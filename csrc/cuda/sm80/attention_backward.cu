// sparse_attention_backward, in two steps over as many rows at once as the workspace takes. First each row and group of
// 16 heads by itself (attention_gradient_tile.h, or in float32 attention_gradient_lanes.h): products of its keys with
// queries and G, for the sums over the row; once more, for the weights; d query. Queries, G and weights stay in
// memory. Then each key (attention_key_sums.h): blocks own dims of a class of keys and add the rows' parts in their
// order; which keys of a row are of a class is listed before. No sum depends on what else runs, and nothing is atomic.
// Sums of keys are float32, in the gradient itself or, where that is bfloat16, in the workspace.
//
// n keys and H heads of D: 10 H D n FLOP of a row for d query, 4 H D n for the keys. The first step reads keys twice
// for 16 or 32 heads: 40 or 80 FLOP a byte of bfloat16 rows, mostly from L2. The second moves, of 64 heads and 640
// keys in 32 classes, 4.2 MB of operands, 1.3 of weights and 2.6 of sums a row through L2, for 84 MFLOP: that bounds
// it.
#include "cuda/common/launch.h"
#include "cuda/sm80/attention.h"
#include "cuda/sm80/attention_gradient_lanes.h"
#include "cuda/sm80/attention_gradient_tile.h"
#include "cuda/sm80/attention_key_sums.h"

namespace dsv4::sm80 {

struct KeySumClearArguments {
  float* data;
  int64_t count;
};

struct KeySumNarrowArguments {
  const float* from;
  bf16* to;
  int64_t count;
  bool aligned;  // both to 16 bytes
};

struct SinkSumArguments {
  const float* gates;  // [rows, heads]
  AnyView<1> grad_sink;
  int64_t rows, heads;
};

namespace {

constexpr int kElementThreads = 256, kElements = 8;  // of a thread, of kernels on single elements
constexpr int kSinkHeads = 8, kSinkParts = 32;       // of a block

DSV4_DEVICE int64_t first_element() {
  return (ptx::block_index_x() * kElementThreads + ptx::thread_index()) * kElements;
}

}  // namespace

// Grid: x over rows and groups, or pairs of groups, the last fastest.
DSV4_KERNEL(128, 2) sm80_bf16_sparse_attention_backward_16(const AttentionGradientArguments g) {
  differentiate<1>(g, ptx::block_index_x() / g.call.groups, ptx::block_index_x() % g.call.groups);
}
DSV4_KERNEL(256, 1) sm80_bf16_sparse_attention_backward_32(const AttentionGradientArguments g) {
  const int64_t runs = (g.call.groups + 1) / 2;
  differentiate<2>(g, ptx::block_index_x() / runs, ptx::block_index_x() % runs);
}
DSV4_KERNEL(kGradientLaneThreads, 1) sm80_bf16_sparse_attention_backward_f32_rows(const AttentionGradientArguments g) {
  differentiate_in_lanes<bf16>(g, ptx::block_index_x() / g.call.groups, ptx::block_index_x() % g.call.groups);
}
DSV4_KERNEL(kGradientLaneThreads, 1) sm80_f32_sparse_attention_backward(const AttentionGradientArguments g) {
  differentiate_in_lanes<float>(g, ptx::block_index_x() / g.call.groups, ptx::block_index_x() % g.call.groups);
}

// Grid: x over rows.
DSV4_KERNEL(kKeyThreads, 8) sm80_i32_sparse_attention_backward_numbers(const AttentionGradientArguments g) {
  number_keys(g, ptx::block_index_x());
}
DSV4_KERNEL(kKeyThreads, 8) sm80_i32_sparse_attention_backward_lists(const AttentionGradientArguments g) {
  list_keys(g, ptx::block_index_x());
}

// Grid: x over classes, y over slices of dims.
DSV4_KERNEL(kKeyThreads, 3) sm80_bf16_sparse_attention_backward_keys(const AttentionGradientArguments g) {
  add_to_keys<TensorKeySums>(g, ptx::block_index_y(), ptx::block_index_x());
}
DSV4_KERNEL(kKeyThreads, 3) sm80_f32_sparse_attention_backward_keys(const AttentionGradientArguments g) {
  add_to_keys<FloatKeySums>(g, ptx::block_index_y(), ptx::block_index_x());
}

DSV4_KERNEL(kElementThreads, 4) sm80_f32_sparse_attention_backward_clear(const KeySumClearArguments a) {
  const int64_t stride = kElementThreads, first = ptx::block_index_x() * kElementThreads * kElements;
  for (int64_t i = first + ptx::thread_index(); i < a.count && i < first + stride * kElements; i += stride)
    a.data[i] = 0;
}

DSV4_KERNEL(kElementThreads, 4) sm80_bf16_sparse_attention_backward_narrow(const KeySumNarrowArguments a) {
  const int64_t first = first_element();
  if (a.aligned && first + kElements <= a.count) {
    const Words4 low = ptx::load_global_16(a.from + first), high = ptx::load_global_16(a.from + first + 4);
    Words4 narrow;
    DSV4_UNROLL
    for (int i = 0; i < 4; ++i) {
      const Words4& half = i < 2 ? low : high;
      narrow.word[i] =
          ptx::pack_bf16(float_from_bits(half.word[2 * (i % 2)]), float_from_bits(half.word[2 * (i % 2) + 1]));
    }
    ptx::store_global_16(a.to + first, narrow);
    return;
  }
  for (int64_t i = first; i < a.count && i < first + kElements; ++i) a.to[i] = from_float<bf16>(a.from[i]);
}

// Sums over the rows in float64: each thread takes every 32nd row of a head, then one adds what they have. Grid: x over
// eights of heads.
DSV4_KERNEL(kSinkHeads* kSinkParts, 1) sm80_f32_sparse_attention_backward_sink(const SinkSumArguments a) {
  const int part = ptx::thread_index() / kSinkHeads, own = ptx::thread_index() % kSinkHeads;
  const int64_t head = ptx::block_index_x() * kSinkHeads + own;
  const uint32_t mine = ptx::shared_base() + static_cast<uint32_t>(ptx::thread_index() * 8);
  double sum = 0;
  for (int64_t row = part; row < a.rows && head < a.heads; row += kSinkParts) {
    sum += static_cast<double>(a.gates[row * a.heads + head]);
  }
  ptx::Words2 bits;
  memcpy(&bits, &sum, 8);
  ptx::store_shared_8(mine, bits);
  ptx::sync_threads();  // all parts are there
  if (part > 0 || head >= a.heads) return;
  for (int other = 1; other < kSinkParts; ++other) {
    double value;
    bits = ptx::load_shared_8(mine + static_cast<uint32_t>(other * kSinkHeads * 8));
    memcpy(&value, &bits, 8);
    sum += value;
  }
  static_cast<float*>(a.grad_sink.data)[head * a.grad_sink.stride[0]] = static_cast<float>(0 - sum);
}

namespace {

static_assert(GradientShared<2>::bytes(2 * kMaxHeadDim) <= cuda::kMaxSharedBytes);
static_assert(GradientLanesShared::bytes(4 * kMaxHeadDim) <= cuda::kMaxSharedBytes);
static_assert(TensorKeySums::Shared::kBytes <= cuda::kMaxSharedBytes);
static_assert(FloatKeySums::Shared::kBytes <= cuda::kMaxSharedBytes);

constexpr int64_t kRowsBytes = int64_t{512} << 20;  // of the workspace at most, unless one row needs more
constexpr int64_t kKeyBlocks = 256;                 // at least, of the second step: two on each SM of the largest GPUs

// Lays the workspace out; with no memory, counts its bytes.
struct Room {
  uint8_t* data;
  int64_t used = 0;

  template <class T>
  T* take(int64_t count) {
    T* taken = data == nullptr ? nullptr : reinterpret_cast<T*>(data + used);
    used += round_up(count * static_cast<int64_t>(sizeof(T)), 256);
    return taken;
  }
};

bool has_gradient(const RowPool& pool) { return pool.plain.given(); }

int64_t rows_of(const RowPool& pool) {
  return pool.bytes.given() ? pool.bytes.shape[0] * pool.page_size : pool.plain.shape[0] * pool.plain.shape[1];
}

// What does not depend on where the tensors lie.
struct GradientPlan {
  bool lanes, keys_wanted;
  int classes;
  int64_t slots, wide_dim, groups, rows_at_once;

  explicit GradientPlan(const SparseAttentionParams& p) {
    lanes = in_lanes(p);
    keys_wanted = has_gradient(p.window_pool) || has_gradient(p.compressed);
    groups = ceil_div(p.query.shape[1], kGroupHeads);
    wide_dim = round_up(p.query.shape[2], kSliceDims);
    slots = round_up(slots_of_any_row(p), kTileKeys);
    classes = 1;
    while (classes < kMostClasses && classes * (wide_dim / kSliceDims) < kKeyBlocks) classes *= 2;
    rows_at_once = cuda::kMaxBlocks / (groups + 1);
    if (keys_wanted && kRowsBytes / row_bytes() < rows_at_once) rows_at_once = kRowsBytes / row_bytes();
    if (rows_at_once < 1) rows_at_once = 1;
  }

  int64_t element() const { return lanes ? 4 : 2; }
  int64_t row_bytes() const {
    return (groups * kGroupWeights * (wide_dim + slots)) * element() +
           slots * static_cast<int64_t>(sizeof(ListedKey) + sizeof(uint32_t)) + (classes + 1) * 4;
  }
};

void lay_out(AttentionGradientArguments& g, const SparseAttentionBackwardParams& p, const GradientPlan& plan,
             int64_t rows, Room& room) {
  const auto sums_of = [&](const RowPool& pool, const AnyView<3>& grad) -> float* {
    if (!has_gradient(pool)) return nullptr;
    if (pool.plain.dtype == DType::kFloat32) return static_cast<float*>(grad.data);
    return room.take<float>(rows_of(pool) * p.forward.query.shape[2]);
  };
  g.window_sums = sums_of(p.forward.window_pool, p.grad_window);
  g.compressed_sums = sums_of(p.forward.compressed, p.grad_compressed);
  g.gates = room.take<float>(p.forward.query.shape[0] * p.forward.query.shape[1]);
  if (!plan.keys_wanted) return;
  g.operands = room.take<uint8_t>(rows * plan.groups * kGroupWeights * plan.wide_dim * plan.element());
  g.weights = room.take<uint8_t>(rows * plan.groups * kGroupWeights * plan.slots * plan.element());
  g.lists = room.take<ListedKey>(rows * plan.slots);
  g.numbers = room.take<uint32_t>(rows * plan.slots);
  g.begins = room.take<uint32_t>(rows * (plan.classes + 1));
}

int64_t rows_together(const SparseAttentionParams& p, const GradientPlan& plan) {
  return p.query.shape[0] < plan.rows_at_once ? p.query.shape[0] : plan.rows_at_once;
}

AttentionGradientArguments gradient_arguments_of(const SparseAttentionBackwardParams& p, const GradientPlan& plan) {
  AttentionGradientArguments g = {};
  g.call = arguments_of(p.forward);
  g.grad_out = p.grad_out;
  g.grad_query = p.grad_query;
  g.grad_lse = p.grad_lse;
  g.paired_grad_out = paired(p.grad_out);
  g.paired_grad_query = paired(p.grad_query);
  g.window_rows = rows_of(p.forward.window_pool);
  g.slots = plan.slots;
  g.wide_dim = plan.wide_dim;
  g.classes = plan.classes;
  Room room{static_cast<uint8_t*>(p.workspace.data)};
  lay_out(g, p, plan, rows_together(p.forward, plan), room);
  g.paired_sums = aligned(g.window_sums, 8) && aligned(g.compressed_sums, 8);
  return g;
}

constexpr char kName[] = "sparse_attention_backward";

template <class Arguments>
Status launch(void (*kernel)(Arguments), const Arguments& arguments, int64_t blocks_x, int64_t blocks_y, int threads,
              int shared_bytes, const Context& context) {
  if (blocks_x == 0) return Status::ok();
  cuda::LaunchShape shape;
  shape.blocks_x = blocks_x;
  shape.blocks_y = blocks_y;
  shape.threads = threads;
  shape.shared_bytes = shared_bytes;
  return cuda::launch(kName, kernel, shape, context, arguments);
}

int64_t element_blocks(int64_t count) { return ceil_div(count, kElementThreads * kElements); }

Status clear(float* sums, const RowPool& pool, int64_t head_dim, const Context& context) {
  if (sums == nullptr) return Status::ok();
  const KeySumClearArguments a = {sums, rows_of(pool) * head_dim};
  return launch(sm80_f32_sparse_attention_backward_clear, a, element_blocks(a.count), 1, kElementThreads, 0, context);
}

Status narrow(const float* sums, const RowPool& pool, const AnyView<3>& grad, int64_t head_dim,
              const Context& context) {
  if (sums == nullptr || grad.dtype == DType::kFloat32) return Status::ok();
  const KeySumNarrowArguments a = {sums, static_cast<bf16*>(grad.data), rows_of(pool) * head_dim,
                                   aligned(sums) && aligned(grad.data)};
  return launch(sm80_bf16_sparse_attention_backward_narrow, a, element_blocks(a.count), 1, kElementThreads, 0, context);
}

// The first step, of g.rows rows.
Status differentiate_rows(const AttentionGradientArguments& g, const GradientPlan& plan, int heads_per_block,
                          const Context& context) {
  const int64_t blocks = g.rows * g.call.groups;
  if (plan.lanes) {
    const auto kernel = g.call.params.query.dtype == DType::kFloat32 ? sm80_f32_sparse_attention_backward
                                                                     : sm80_bf16_sparse_attention_backward_f32_rows;
    return launch(kernel, g, blocks, 1, kGradientLaneThreads, GradientLanesShared::bytes(g.call.tile_row), context);
  }
  if (heads_per_block == kGroupHeads) {
    return launch(sm80_bf16_sparse_attention_backward_16, g, blocks, 1, 32 * kGroupWarps,
                  GradientShared<1>::bytes(g.call.tile_row), context);
  }
  return launch(sm80_bf16_sparse_attention_backward_32, g, g.rows * ceil_div(g.call.groups, 2), 1, 64 * kGroupWarps,
                GradientShared<2>::bytes(g.call.tile_row), context);
}

// The second, of the same rows.
Status add_rows_to_keys(const AttentionGradientArguments& g, const GradientPlan& plan, const Context& context) {
  Status done = launch(sm80_i32_sparse_attention_backward_numbers, g, g.rows, 1, kKeyThreads, 0, context);
  if (!done.is_ok()) return done;
  done = launch(sm80_i32_sparse_attention_backward_lists, g, g.rows, 1, kKeyThreads, kMostClasses * 4, context);
  if (!done.is_ok()) return done;
  const auto kernel = plan.lanes ? sm80_f32_sparse_attention_backward_keys : sm80_bf16_sparse_attention_backward_keys;
  const int shared_bytes = plan.lanes ? FloatKeySums::Shared::kBytes : TensorKeySums::Shared::kBytes;
  return launch(kernel, g, g.classes, g.wide_dim / kSliceDims, kKeyThreads, shared_bytes, context);
}

}  // namespace

bool accepts_sparse_attention_backward(const SparseAttentionBackwardParams& p) {
  const int64_t keys =
      rows_of(p.forward.window_pool) + (p.forward.compressed.given() ? rows_of(p.forward.compressed) : 0);
  return accepts_sparse_attention(p.forward) && keys < kNoNumber;
}

int64_t sparse_attention_backward_workspace_bytes(const SparseAttentionBackwardParams& p, const Context&) {
  if (!accepts_sparse_attention_backward(p)) return 0;
  const GradientPlan plan(p.forward);
  AttentionGradientArguments g = {};
  Room room{nullptr};
  lay_out(g, p, plan, rows_together(p.forward, plan), room);
  return room.used;
}

Status sparse_attention_backward(const SparseAttentionBackwardParams& p, const Context& context, int heads_per_block) {
  const SparseAttentionParams& call = p.forward;
  const int64_t rows = call.query.shape[0], heads = call.query.shape[1], head_dim = call.query.shape[2];
  const GradientPlan plan(call);
  AttentionGradientArguments g = gradient_arguments_of(p, plan);
  Status done = clear(g.window_sums, call.window_pool, head_dim, context);
  if (done.is_ok()) done = clear(g.compressed_sums, call.compressed, head_dim, context);
  for (g.call.first_row = 0; done.is_ok() && heads > 0 && g.call.first_row < rows; g.call.first_row += g.rows) {
    g.rows = rows - g.call.first_row < plan.rows_at_once ? rows - g.call.first_row : plan.rows_at_once;
    done = differentiate_rows(g, plan, heads_per_block, context);
    if (done.is_ok() && plan.keys_wanted) done = add_rows_to_keys(g, plan, context);
  }
  if (done.is_ok()) done = narrow(g.window_sums, call.window_pool, p.grad_window, head_dim, context);
  if (done.is_ok()) done = narrow(g.compressed_sums, call.compressed, p.grad_compressed, head_dim, context);
  if (!done.is_ok()) return done;
  const SinkSumArguments sink = {g.gates, p.grad_sink, rows, heads};
  return launch(sm80_f32_sparse_attention_backward_sink, sink, ceil_div(heads, kSinkHeads), 1, kSinkHeads * kSinkParts,
                kSinkHeads * kSinkParts * 8, context);
}

Status sparse_attention_backward(const SparseAttentionBackwardParams& p, const Context& context) {
  return sparse_attention_backward(p, context, heads_of_block(p.forward));
}

}  // namespace dsv4::sm80
