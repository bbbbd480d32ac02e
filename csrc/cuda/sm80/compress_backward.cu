// compress_entries_backward, stage by stage:
// 1. A block pools an entry as the forward pass does (compress_pool.h), with its bits, and leaves in the workspace, of
//    each channel, the pooled value rounded to N and the unrounded one, the largest gate and the inverse sum of
//    weights; besides the entry's gradient in float32.
// 2. Keys: the Hadamard rotation of that gradient, which is its own transpose (quantize.cu).
// 3. The gradients of rotation and norm, of all entries as rows (norm_rope_backward.cu), and norm_weight's.
// 4. Rows: a thread takes four neighbouring channels of four rows, place by place the same of all entries of a piece
//    (piece_sums.h), so that it holds their sums for ape in registers; what it needs of an entry serves four rows,
//    whose loads are all on their way at once. A channel of a row lies in one entry at most, so nothing is added twice;
//    where it lies in none, the gradient is 0. Then ape's pieces.
// kv and gate are read twice, the second time from L2 where it holds them: 16 to 24 bytes a channel of a row, some 60
// instructions. Bound by memory; 60 % of the copy bandwidth expected of many rows.
#include "cuda/common/launch.h"
#include "cuda/sm80/compress_launch.h"
#include "cuda/sm80/norm_rope.h"
#include "cuda/sm80/piece_sums.h"
#include "cuda/sm80/quantize.h"

namespace dsv4::sm80 {

inline constexpr int kRowsOfThread = 4;
inline constexpr int kSpreadThreads = 256;

// Of an entry, each float32 [entries, width].
struct EntryRows {
  float *pooled, *mean, *most, *inverse;
};

struct PoolGradientArguments {
  CompressArguments pool;
  EntryRows entries;
  AnyView<2> grad;
  float* turned;
  int64_t width;
};

struct SpreadArguments {
  View<const float, 2> kv, gate, ape;
  View<float, 2> grad_kv, grad_gate;
  EntryRows entries;
  const float* gradient;          // of the pooled rows
  float* partial;                 // [pieces, ratio, sets, width]
  int64_t tokens, count, blocks;  // rows; entries; blocks of `ratio` rows, the remainder's included
  int64_t blocks_of_piece, work;  // threads of a piece
  int64_t threads;
  int64_t quads, fours;  // of a set of channels; of a block of rows
  int64_t ratio;
  int width, dim, sets;
  bool vector;
};

template <class N>
DSV4_DEVICE void pool_with_weights(const PoolGradientArguments& a) {
  const int64_t entry = ptx::block_index_x(), last = (entry + 1) * a.pool.ratio.value() - 1;
  pool_entry(a.pool, {last, 0, last});
  ptx::sync_threads();
  const N* grad = static_cast<const N*>(a.grad.data) + entry * a.grad.stride[0];
  for (int column = ptx::thread_index(); column < a.pool.dim; column += a.pool.threads) {
    const JoinedPool pool(a.pool, column);
    const float mean = pool.mean();
    const int64_t at = entry * a.width + column;
    a.entries.pooled[at] = rounded_to<N>(mean);
    a.entries.mean[at] = mean;
    a.entries.most[at] = pool.base;
    a.entries.inverse[at] = ptx::divide(1.0f, pool.weight);
    a.turned[at] = to_float(grad[column]);
  }
}

// What four channels of an entry bring to their rows.
struct EntryQuad {
  float most[4], inverse[4], mean[4], gradient[4];

  DSV4_DEVICE EntryQuad(const SpreadArguments& a, int64_t entry, int column) {
    const int64_t at = entry * a.width + column;
    unpack(ptx::load_global_16(a.entries.most + at), most);
    unpack(ptx::load_global_16(a.entries.inverse + at), inverse);
    unpack(ptx::load_global_16(a.entries.mean + at), mean);
    unpack(ptx::load_global_16(a.gradient + at), gradient);
  }
};

// Where a thread works: rows [first, first + kRowsOfThread) of each block of `ratio`, channels from `column` on of a
// set, which begins at `channel`.
struct SpreadPlace {
  int64_t piece, first;
  int set, column;
  int64_t channel;

  DSV4_DEVICE SpreadPlace(const SpreadArguments& a, int64_t thread) {
    const int64_t quads = a.quads * a.sets, of_piece = thread % a.work, quad = of_piece % quads;
    piece = thread / a.work;
    first = of_piece / quads * kRowsOfThread;
    set = static_cast<int>(quad / a.quads);
    column = static_cast<int>(quad % a.quads) * 4;
    channel = static_cast<int64_t>(set) * a.dim;
  }
};

DSV4_DEVICE void store_gradients(const SpreadArguments& a, int64_t row, const SpreadPlace& place,
                                 const float (&of_kv)[4], const float (&of_gate)[4]) {
  float* kv = a.grad_kv.data + row * a.grad_kv.stride[0] + place.channel;
  float* gate = a.grad_gate.data + row * a.grad_gate.stride[0] + place.channel;
  store_piece(kv, place.column, a.dim, a.vector, pack(of_kv));
  store_piece(gate, place.column, a.dim, a.vector, pack(of_gate));
}

// A block's rows, as far as there are any, from the entry that pools the channels.
DSV4_DEVICE void spread_entry(const SpreadArguments& a, int64_t entry, int64_t row, int rows, const SpreadPlace& place,
                              const float (&bias)[kRowsOfThread][4], float (&sum)[kRowsOfThread][4]) {
  float gate[kRowsOfThread][4], value[kRowsOfThread][4];
  DSV4_UNROLL
  for (int r = 0; r < kRowsOfThread; ++r) {
    if (r >= rows) break;
    load_quad(a.gate.data + (row + r) * a.gate.stride[0] + place.channel, place.column, a.dim, a.vector, gate[r]);
    load_quad(a.kv.data + (row + r) * a.kv.stride[0] + place.channel, place.column, a.dim, a.vector, value[r]);
  }
  const EntryQuad of(a, entry, place.column);
  DSV4_UNROLL
  for (int r = 0; r < kRowsOfThread; ++r) {
    if (r >= rows) break;
    DSV4_UNROLL
    for (int c = 0; c < 4; ++c) {
      const float whole = ptx::add(gate[r][c], bias[r][c]);
      const float weight = ptx::multiply(ptx::exponential(ptx::add(whole, -of.most[c])), of.inverse[c]);
      const float apart = ptx::add(value[r][c], -of.mean[c]);
      value[r][c] = ptx::multiply(weight, of.gradient[c]);
      gate[r][c] = ptx::multiply(value[r][c], apart);
      sum[r][c] = ptx::add(sum[r][c], gate[r][c]);
    }
    store_gradients(a, row + r, place, value[r], gate[r]);
  }
}

DSV4_DEVICE void spread_gradients(const SpreadArguments& a) {
  const int64_t thread = ptx::block_index_x() * kSpreadThreads + ptx::thread_index();
  if (thread >= a.threads) return;
  const SpreadPlace place(a, thread);
  const int64_t left = a.ratio - place.first;
  const int rows = left < kRowsOfThread ? static_cast<int>(left) : kRowsOfThread;
  float bias[kRowsOfThread][4];
  float sum[kRowsOfThread][4] = {};
  DSV4_UNROLL
  for (int r = 0; r < kRowsOfThread; ++r) {
    if (r >= rows) break;
    load_quad(a.ape.data + (place.first + r) * a.ape.stride[0] + place.channel, place.column, a.dim, a.vector, bias[r]);
  }
  const int64_t begin = place.piece * a.blocks_of_piece;
  for (int64_t block = begin; block < begin + a.blocks_of_piece && block < a.blocks; ++block) {
    const int64_t row = block * a.ratio + place.first, entry = block + (place.set + 1 < a.sets ? 1 : 0);
    if (entry < a.count) {
      spread_entry(a, entry, row, rows, place, bias, sum);
    } else {
      constexpr float kNone[4] = {0.0f, 0.0f, 0.0f, 0.0f};
      for (int r = 0; r < rows && row + r < a.tokens; ++r) store_gradients(a, row + r, place, kNone, kNone);
    }
  }
  DSV4_UNROLL
  for (int r = 0; r < kRowsOfThread; ++r) {
    if (r >= rows) break;
    const int64_t at = ((place.piece * a.ratio + place.first + r) * a.sets + place.set) * a.width + place.column;
    ptx::store_global_16(a.partial + at, pack(sum[r]));
  }
}

DSV4_KERNEL(kPoolThreads, 1) sm80_bf16_compress_backward_pool(const PoolGradientArguments a) {
  pool_with_weights<bf16>(a);
}
DSV4_KERNEL(kPoolThreads, 1) sm80_f32_compress_backward_pool(const PoolGradientArguments a) {
  pool_with_weights<float>(a);
}
DSV4_KERNEL(kSpreadThreads, 2) sm80_f32_compress_backward_rows(const SpreadArguments a) { spread_gradients(a); }

namespace {

// The workspace, in floats: the rows of entries, then the sums of pieces of norm_weight's and of ape's gradients.
struct Memory {
  int64_t entries, dim, width, sets, ratio, blocks, work, pieces;
  int64_t row_floats, ape_floats, norm_bytes = 0;

  static constexpr int64_t kEntryRows = 6;

  explicit Memory(const CompressEntriesBackwardParams& p)
      : entries(p.grad.size(0)),
        dim(p.grad.size(1)),
        width(padded_width(dim)),
        sets(p.forward.kv.size(1) / dim),
        ratio(p.forward.ratio),
        blocks(ceil_div(p.forward.kv.size(0), ratio)),
        work(ceil_div(ratio, kRowsOfThread) * sets * (width / 4)),
        pieces(pieces_of(blocks, work)),
        row_floats(round_up(entries * width, 16)),
        ape_floats(pieces * ratio * sets * width) {
    norm_bytes = round_up(norm_rope_backward_workspace_bytes(norm(p, nullptr)), 64);
  }

  int64_t bytes() const { return (kEntryRows * row_floats + ape_floats) * 4 + norm_bytes; }
  float* row(const CompressEntriesBackwardParams& p, int64_t i) const {
    return static_cast<float*>(p.forward.workspace.data) + i * row_floats;
  }

  AnyView<2> rows_at(float* data) const { return {data, DType::kFloat32, {entries, dim}, {width, 1}}; }

  // Stage 3, where `base` is the workspace.
  NormRopeBackwardParams norm(const CompressEntriesBackwardParams& p, float* base) const {
    const CompressEntriesParams& f = p.forward;
    const auto rows = [&](int64_t i) { return rows_at(base == nullptr ? nullptr : base + i * row_floats); };
    const int64_t grad = f.rotate ? 5 : 4, result = f.rotate ? 4 : 5;
    NormRopeBackwardParams norm = {rows(grad), rows(0),      f.norm_weight,      f.rope,
                                   f.eps,      rows(result), p.grad_norm_weight, {}};
    norm.workspace = {rows(kEntryRows).data, norm_bytes};
    return norm;
  }
};

Status pool_entries(const CompressEntriesBackwardParams& p, const Memory& memory, const Context& context) {
  PoolGradientArguments a = {};
  a.pool = arguments_of(p.forward);
  a.pool.whole = true;
  a.pool.params.state.data = const_cast<float*>(p.forward.kv.data);  // never read, see compress_entries
  a.pool.vector = whole_quads(p.forward);
  cut_block(a.pool, p.forward.rotate);
  a.entries = {memory.row(p, 0), memory.row(p, 1), memory.row(p, 2), memory.row(p, 3)};
  a.grad = p.grad;
  a.turned = memory.row(p, 4);
  a.width = memory.width;
  cuda::LaunchShape shape;
  shape.blocks_x = memory.entries;
  shape.threads = a.pool.threads;
  shape.shared_bytes = 12 * a.pool.groups * a.pool.dim;
  const auto kernel =
      p.grad.dtype == DType::kFloat32 ? sm80_f32_compress_backward_pool : sm80_bf16_compress_backward_pool;
  return cuda::launch("compress_entries_backward", kernel, shape, context, a);
}

Status spread_rows(const CompressEntriesBackwardParams& p, const Memory& memory, float* partial,
                   const Context& context) {
  const CompressEntriesParams& f = p.forward;
  SpreadArguments a = {};
  a.kv = f.kv, a.gate = f.gate, a.ape = f.ape;
  a.grad_kv = p.grad_kv, a.grad_gate = p.grad_gate;
  a.entries = {memory.row(p, 0), memory.row(p, 1), memory.row(p, 2), memory.row(p, 3)};
  a.gradient = memory.row(p, f.rotate ? 4 : 5);
  a.partial = partial;
  a.tokens = f.kv.size(0);
  a.count = memory.entries;
  a.blocks = memory.blocks;
  a.blocks_of_piece = rows_of_piece(memory.blocks, memory.work);
  a.work = memory.work;
  a.threads = memory.pieces * memory.work;
  a.quads = memory.width / 4;
  a.ratio = memory.ratio;
  a.width = static_cast<int>(memory.width);
  a.dim = static_cast<int>(memory.dim);
  a.sets = static_cast<int>(memory.sets);
  a.vector = whole_quads(f) && in_pieces(p.grad_kv) && in_pieces(p.grad_gate);
  cuda::LaunchShape shape;
  shape.blocks_x = ceil_div(a.threads, kSpreadThreads);
  shape.threads = kSpreadThreads;
  return cuda::launch("compress_entries_backward", sm80_f32_compress_backward_rows, shape, context, a);
}

}  // namespace

int64_t compress_entries_backward_workspace_bytes(const CompressEntriesBackwardParams& p, const Context&) {
  return Memory(p).bytes();
}

Status compress_entries_backward(const CompressEntriesBackwardParams& p, const Context& context) {
  const char* op = "compress_entries_backward";
  const Memory memory(p);
  float* partial = memory.row(p, Memory::kEntryRows) + memory.norm_bytes / 4;
  Status status = Status::ok();
  if (memory.entries > 0) {
    status = pool_entries(p, memory, context);
    if (status.is_ok() && p.forward.rotate) {
      const HadamardParams turn = {memory.rows_at(memory.row(p, 4)), memory.rows_at(memory.row(p, 5)), {}};
      status = sm80::hadamard(turn, context);
    }
  }
  if (status.is_ok()) status = norm_rope_backward(op, memory.norm(p, memory.row(p, 0)), context);
  if (status.is_ok() && memory.pieces > 0) status = spread_rows(p, memory, partial, context);
  if (!status.is_ok()) return status;
  return add_pieces(op,
                    {partial, memory.pieces, memory.ratio, memory.sets, memory.dim, p.grad_ape.data, DType::kFloat32,
                     p.grad_ape.stride[0]},
                    context);
}

}  // namespace dsv4::sm80
