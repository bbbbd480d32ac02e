// compress in two kernels, since entries read what the state held before: the entries; then the last rows of each
// sequence to their slots.
//
// Entries (compress_pool.h): a block looks through rows, a lane each, for those that complete an entry, pools it, and a
// warp norms, rotates, quantises and writes it; compress_entries the same, where every row's place is known. Every row
// of kv and gate is read once from memory, 8 c D bytes (of a block's 512 threads some 96 KB on their way), for some 25
// instructions an element: bound by memory, 60 % of the read bandwidth expected of long prompts, since the one warp
// keeps others waiting. An entry of 128 positions keeps its block some microseconds: few of them leave a GPU idle.
// State: 16 c D bytes for each of at most `ring` rows a sequence.
#include "cuda/sm80/compress.h"
#include "cuda/sm80/compress_launch.h"

namespace dsv4::sm80 {

// Norm, rotation and store of the pooled row, by the first warp. Keys: kSteps eights of each lane; rows: kSteps = 0.
template <class N, int kSteps>
DSV4_DEVICE void finish_entry(const CompressArguments& a, int64_t rope_row, const PagePlaces::Place& place) {
  const RowLanes lanes(a.lanes, rope_row);
  const bool first_copy = ptx::thread_index() < a.lanes;  // of a row of fewer than 32 lanes
  const SharedRow row = {pool_memory(a, 0, 0, 0), a.dim};
  const RowRope rope = row_rope(a.params.rope, rope_row, a.dim, a.vector_rope);
  const WeightedNorm norm = {inverse_rms(sum_of_squares<ExactSquare>(lanes, row), a.dim, a.eps), a.weight};
  const PageRow to(a.places, first_copy ? place : PagePlaces::Place{nullptr, nullptr}, lanes, a.vector_place);
  if constexpr (kSteps == 0) {
    for (int column = 8 * lanes.lane; column - 8 * lanes.lane < a.dim; column += lanes.step()) {
      float value[8];
      norm_rope_eight<N>(row, norm, rope, column, value);
      to.write_row(column, value);
    }
  } else {
    float value[kSteps][8];
    DSV4_UNROLL
    for (int s = 0; s < kSteps; ++s) norm_rope_eight<N>(row, norm, rope, s * lanes.step() + 8 * lanes.lane, value[s]);
    hadamard_row(lanes, a.dim, a.hadamard, value);
    DSV4_UNROLL
    for (int s = 0; s < kSteps; ++s) round_eight(value[s], N{});
    to.write_key(lanes, value);
  }
}

// Of the `count` rows first, first + step, ..., as far as they are below `end`: body(row) for those that are wanted,
// one after another and the same in every warp. Each lane asks for one row, so that 32 take the time of one.
template <class Wanted, class Body>
DSV4_DEVICE void each_wanted(int64_t first, int64_t step, int count, int64_t end, const Wanted& wanted,
                             const Body& body) {
  const int lane = ptx::thread_index() % 32;
  for (int start = 0; start < count; start += 32) {
    const int64_t row = first + (start + lane) * step;
    uint32_t found = ptx::ballot(start + lane < count && row < end && wanted(row));
    for (; found != 0; found &= found - 1) {
      const int lowest = ptx::count_ones(~found & (found - 1));
      body(first + (start + lowest) * step);
    }
  }
}

template <class N, int kSteps>
DSV4_DEVICE void make_entries(const CompressArguments& a) {
  const auto position_of = [&](int64_t t) -> int64_t {
    return a.whole ? t : static_cast<const int32_t*>(a.params.position.data)[t * a.params.position.stride[0]];
  };
  const auto completes = [&](int64_t t) {
    const int64_t at = position_of(t);
    return at >= 0 && a.ratio.divide(static_cast<uint32_t>(at)).rest + 1 == a.ratio.value();
  };
  const auto make = [&](int64_t t) {
    const int64_t at = position_of(t), entry = a.ratio.quotient(static_cast<uint32_t>(at));
    const int64_t own =
        a.whole ? 0 : static_cast<const int32_t*>(a.params.sequence.data)[t * a.params.sequence.stride[0]];
    const PagePlaces::Place place =
        a.whole ? PagePlaces::Place{a.places.data + entry * a.places.row_stride, nullptr} : a.places.find(own, entry);
    if (place.data == nullptr) return;
    pool_entry(a, {t, own, at});
    ptx::sync_threads();
    join_pools<N>(a);
    ptx::sync_threads();
    if (ptx::thread_index() < 32) finish_entry<N, kSteps>(a, a.whole ? entry : t, place);
    ptx::sync_threads();  // the next entry is pooled where this one lies
  };
  each_wanted(ptx::block_index_x() * a.rows_per_block, 1, a.rows_per_block, a.tokens, completes, make);
}

// The rows that no later one of their sequence replaces in its slot: they stand together at a sequence's end, so that a
// block takes rows far from each other.
DSV4_DEVICE void keep_rows(const CompressArguments& a) {
  const CompressParams& p = a.params;
  const auto sequence_of = [&](int64_t t) -> int64_t {
    return static_cast<const int32_t*>(p.sequence.data)[t * p.sequence.stride[0]];
  };
  const auto position_of = [&](int64_t t) -> int64_t {
    return static_cast<const int32_t*>(p.position.data)[t * p.position.stride[0]];
  };
  const int64_t ring = a.ring.value();
  const auto stays = [&](int64_t t) {
    const int64_t own = sequence_of(t);
    const bool stored = own >= 0 && own < p.state.shape[0] && position_of(t) >= 0;
    return stored && !(t + ring < a.tokens && sequence_of(t + ring) == own);
  };
  const int channels = static_cast<int>(p.kv.shape[1]);
  const auto keep = [&](int64_t t) {
    const uint32_t at = static_cast<uint32_t>(position_of(t));
    const float *kv = p.kv.data + t * p.kv.stride[0], *gate = p.gate.data + t * p.gate.stride[0];
    const float* bias = p.ape.data + a.ratio.divide(at).rest * p.ape.stride[0];
    float* slot = p.state.data + sequence_of(t) * p.state.stride[0] + a.ring.divide(at).rest * p.state.stride[1];
    for (int column = 4 * ptx::thread_index(); column < channels; column += 4 * kRowThreads) {
      float value[4], by[4];
      store_piece(slot, column, channels, a.vector, load_piece(kv, column, channels, a.vector));
      load_quad(gate, column, channels, a.vector, value);
      load_quad(bias, column, channels, a.vector, by);
      DSV4_UNROLL
      for (int c = 0; c < 4; ++c) value[c] = ptx::add(value[c], by[c]);
      store_piece(slot + p.state.stride[2], column, channels, a.vector, pack(value));
    }
  };
  each_wanted(ptx::block_index_x(), a.blocks, a.rows_per_block, a.tokens, stays, keep);
}

DSV4_KERNEL(kPoolThreads, 1) sm80_bf16_compress_rows(const CompressArguments a) { make_entries<bf16, 0>(a); }
DSV4_KERNEL(kPoolThreads, 1) sm80_f32_compress_rows(const CompressArguments a) { make_entries<float, 0>(a); }
DSV4_KERNEL(kPoolThreads, 1) sm80_bf16_compress_keys_1(const CompressArguments a) { make_entries<bf16, 1>(a); }
DSV4_KERNEL(kPoolThreads, 1) sm80_f32_compress_keys_1(const CompressArguments a) { make_entries<float, 1>(a); }
DSV4_KERNEL(kWideKeyThreads, 1) sm80_bf16_compress_keys_4(const CompressArguments a) { make_entries<bf16, 4>(a); }
DSV4_KERNEL(kWideKeyThreads, 1) sm80_f32_compress_keys_4(const CompressArguments a) { make_entries<float, 4>(a); }
DSV4_KERNEL(kRowThreads, 8) sm80_f32_compress_state(const CompressArguments a) { keep_rows(a); }

namespace {

constexpr int64_t kBlocksAtLeast = 256;  // before a block looks through several rows

void look_through(CompressArguments& a, int rows_per_block) {
  a.rows_per_block = rows_per_block;
  a.blocks = ceil_div(a.tokens, rows_per_block);
}

Status launch_entries(const char* op, CompressArguments& a, int rows_per_block, bool rotate, const Context& context) {
  cut_block(a, rotate);
  look_through(a, rows_per_block);
  cuda::LaunchShape shape;
  shape.blocks_x = a.blocks;
  shape.threads = a.threads;
  shape.shared_bytes = 12 * a.groups * a.dim;
  const bool wide = a.params.norm_weight.dtype == DType::kFloat32;
  const auto rows = wide ? sm80_f32_compress_rows : sm80_bf16_compress_rows;
  const auto keys = wide_keys(a.dim, rotate) ? (wide ? sm80_f32_compress_keys_4 : sm80_bf16_compress_keys_4)
                                             : (wide ? sm80_f32_compress_keys_1 : sm80_bf16_compress_keys_1);
  return cuda::launch(op, rotate ? keys : rows, shape, context, a);
}

int rows_to_look_through(int64_t tokens, int64_t most) {
  const int64_t rows = tokens / kBlocksAtLeast;
  return static_cast<int>(rows < 1 ? 1 : rows < most ? rows : most);
}

// One entry a block of a long prompt.
int entry_rows(int64_t tokens, int64_t ratio) { return rows_to_look_through(tokens, ratio < 128 ? ratio : 128); }

}  // namespace

CompressRows compress_rows_per_block(const CompressParams& p) {
  const int64_t tokens = p.kv.size(0);
  return {entry_rows(tokens, p.ratio), rows_to_look_through(tokens, 32)};
}

Status compress(const CompressParams& p, CompressRows rows_per_block, const Context& context) {
  if (p.kv.size(0) == 0) return Status::ok();
  CompressArguments a = arguments_of(p);
  a.params = p;
  a.places = PagePlaces(p.pool, a.dim, 2 * p.rope.size(1), p.rotate);
  a.ring = Divisor(static_cast<uint32_t>(p.state.size(1) < INT32_MAX ? p.state.size(1) : INT32_MAX));
  a.vector = whole_quads(p) && in_pieces(p.state);
  a.vector_place = whole_places(a.places);
  const Status status = launch_entries("compress", a, rows_per_block.entries, p.rotate, context);
  if (!status.is_ok()) return status;
  look_through(a, rows_per_block.state);
  cuda::LaunchShape shape;
  shape.blocks_x = a.blocks;
  shape.threads = kRowThreads;
  return cuda::launch("compress", sm80_f32_compress_state, shape, context, a);
}

Status compress(const CompressParams& p, const Context& context) {
  return compress(p, compress_rows_per_block(p), context);
}

Status compress_entries(const CompressEntriesParams& p, int rows_per_block, const Context& context) {
  const int64_t entries = p.result.size(0), dim = p.result.size(1);
  if (entries == 0) return Status::ok();
  CompressArguments a = arguments_of(p);
  RowPool pool = {};
  pool.plain = {
      p.result.data, p.result.dtype, {1, entries, dim}, {entries * p.result.stride[0], p.result.stride[0], 1}};
  pool.page_size = entries;
  a.places = PagePlaces(pool, dim, 2 * p.rope.size(1), p.rotate);
  a.whole = true;
  a.params.state.data = const_cast<float*>(p.kv.data);  // never read: positions before the first do not exist
  a.vector = whole_quads(p);
  a.vector_place = whole_places(a.places);
  return launch_entries("compress_entries", a, rows_per_block, p.rotate, context);
}

Status compress_entries(const CompressEntriesParams& p, const Context& context) {
  return compress_entries(p, entry_rows(p.kv.size(0), p.ratio), context);
}

}  // namespace dsv4::sm80
