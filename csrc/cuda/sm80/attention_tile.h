// One tile's arithmetic. A block has 16 heads for each four of its warps; of a head group, warp w has a quarter of the
// dims, in both products: the tile's scores are sums of four warps' parts, and its values go to each warp's own
// columns. So a warp keeps its part of the queries and of the sums in registers and reads only its columns of the tile.
//
// In shared memory: two tiles of 32 keys, and whether each counts; the four parts of the scores, float32 [4, heads,
// 32], of which the first gives way to the numerators in bfloat16; a factor and a divisor of each head.
#pragma once

#include "cuda/sm80/attention_arguments.h"
#include "cuda/sm80/attention_load.h"

namespace dsv4::sm80 {

inline constexpr int kSteps = kMaxHeadDim / kGroupWarps / 16;  // of 16 dims, of a warp
inline constexpr int kTileKeys = Bf16Tile::kKeys;
inline constexpr int kScoreRow = kTileKeys * 4;  // bytes

// The four warps' parts of a tile's scores, and the bfloat16 weights that take the place of the first.
template <int kHeads>
struct ScoreArea {
  static constexpr int kBytes = kGroupWarps * kHeads * kScoreRow;
  uint32_t start;

  // Four keys' scores in one warp's part. Pieces are permuted so that writing fragments meets no bank twice.
  DSV4_DEVICE uint32_t score(int part, int head, int piece) const {
    return start + static_cast<uint32_t>((part * kHeads + head) * kScoreRow + (piece ^ (head & 3) * 2) * 16);
  }
  // Eight keys' weights.
  DSV4_DEVICE uint32_t weight(int head, int piece) const {
    return start + static_cast<uint32_t>(head * kScoreRow + (piece ^ turn_of_row(head)) * 16);
  }

  // A warp's fragments of 16 heads, from first_head on, and the tile's keys become its part.
  DSV4_DEVICE void store(int part, int first_head, const float (&scores)[kTileKeys / 8][4]) const {
    const int lane = ptx::thread_index() % 32;
    DSV4_UNROLL
    for (int n = 0; n < kTileKeys / 8; ++n) {
      DSV4_UNROLL
      for (int half = 0; half < 2; ++half) {
        const uint32_t address = score(part, first_head + lane / 4 + 8 * half, 2 * n + lane % 4 / 2);
        ptx::store_shared_8(
            address + static_cast<uint32_t>(lane % 2 * 8),
            ptx::Words2{{bits_from_float(scores[n][2 * half]), bits_from_float(scores[n][2 * half + 1])}});
      }
    }
  }

  // The sums of the four parts, of four keys.
  DSV4_DEVICE void gather(int head, int piece, float (&sum)[4]) const {
    const Words4 p0 = ptx::load_shared_16(score(0, head, piece));
    const Words4 p1 = ptx::load_shared_16(score(1, head, piece));
    const Words4 p2 = ptx::load_shared_16(score(2, head, piece));
    const Words4 p3 = ptx::load_shared_16(score(3, head, piece));
    DSV4_UNROLL
    for (int i = 0; i < 4; ++i) {
      const float left = ptx::add(float_from_bits(p0.word[i]), float_from_bits(p1.word[i]));
      const float right = ptx::add(float_from_bits(p2.word[i]), float_from_bits(p3.word[i]));
      sum[i] = ptx::add(left, right);
    }
  }

  // Four keys' weights, rounded. The parts that they replace have been read.
  DSV4_DEVICE void store_weights(int head, int piece, const float (&weight_of)[4]) const {
    ptx::store_shared_8(
        weight(head, piece / 2) + static_cast<uint32_t>(piece % 2 * 8),
        ptx::Words2{{ptx::pack_bf16(weight_of[0], weight_of[1]), ptx::pack_bf16(weight_of[2], weight_of[3])}});
  }
};

template <int kGroups>
struct AttentionShared : TilePair<Bf16Tile> {
  static constexpr int kHeads = kGroups * kGroupHeads;
  ScoreArea<kHeads> scores;
  uint32_t factors, divisors;

  DSV4_DEVICE explicit AttentionShared(const AttentionArguments& a) : TilePair<Bf16Tile>(a) {
    scores.start = end();
    factors = scores.start + ScoreArea<kHeads>::kBytes;
    divisors = factors + kHeads * 4;
  }
  static constexpr int bytes(int tile_row) {
    return TilePair<Bf16Tile>::bytes(tile_row) + ScoreArea<kHeads>::kBytes + 2 * kHeads * 4;
  }
};

// The part of a warp: registers that a lane holds between tiles.
struct WarpPart {
  int lane, group, part;      // group: of the block's
  int64_t first_head;         // of the group
  int first_dim, steps;       // of 16 dims each; none where the head has too few
  uint32_t query[kSteps][4];  // fragments of [16 heads, 16 dims]
  float sum[2 * kSteps][4];   // of [16 heads, 8 dims]
  float most, total;          // of head 4 part + lane / 8: the greatest score; this lane's share of the numerators

  DSV4_DEVICE void locate(const AttentionArguments& a, int64_t first_group) {
    lane = ptx::thread_index() % 32;
    group = ptx::thread_index() / 32 / kGroupWarps;
    part = ptx::thread_index() / 32 % kGroupWarps;
    first_head = (first_group + group) * kGroupHeads;
    first_dim = part * a.slice;
    const int dims = a.padded_dim - first_dim < a.slice ? a.padded_dim - first_dim : a.slice;
    steps = dims > 0 ? dims / 16 : 0;
  }

  DSV4_DEVICE void clear() {
    DSV4_UNROLL
    for (int i = 0; i < 2 * kSteps; ++i) {
      DSV4_UNROLL
      for (int j = 0; j < 4; ++j) sum[i][j] = 0.0f;
    }
    most = -INFINITY;
    total = 0.0f;
  }

  DSV4_DEVICE void load_query(const AttentionArguments& a, int64_t row) {
    DSV4_UNROLL
    for (int i = 0; i < kSteps; ++i) {
      DSV4_UNROLL
      for (int j = 0; j < 4; ++j) {
        query[i][j] = load_pair(a, a.params.query, a.paired_query, row, head_of(j), dim_of(i, j), i < steps);
      }
    }
  }

  // Scores of the 16 heads and 32 keys over this warp's dims, into its part.
  template <int kGroups>
  DSV4_DEVICE void score(const AttentionArguments& a, const AttentionShared<kGroups>& shared, uint32_t tile) const {
    float scores[kTileKeys / 8][4] = {};
    each_keys(a, tile, [&](int i, int half, const uint32_t (&keys)[4]) {
      ptx::mma_m16n8k16(scores[2 * half], query[i], keys[0], keys[1]);
      ptx::mma_m16n8k16(scores[2 * half + 1], query[i], keys[2], keys[3]);
    });
    shared.scores.store(part, group * kGroupHeads, scores);
  }

  // The softmax of four heads, eight lanes each: numerators, and what the sums so far are to be multiplied by.
  template <int kGroups>
  DSV4_DEVICE void weigh(const AttentionArguments& a, const AttentionShared<kGroups>& shared, uint32_t counts) {
    const int head = group * kGroupHeads + weighed_head(), piece = lane % 8;
    float score[4], greatest = -INFINITY;
    shared.scores.gather(head, piece, score);
    const Words4 count = ptx::load_shared_16(counts + static_cast<uint32_t>(piece * 16));
    DSV4_UNROLL
    for (int i = 0; i < 4; ++i) {
      score[i] = count.word[i] != 0 ? ptx::multiply(score[i], a.params.scale) : -INFINITY;
      greatest = ptx::maximum(greatest, score[i]);
    }
    greatest = ptx::maximum(greatest, ptx::shuffle_xor(greatest, 1));
    greatest = ptx::maximum(greatest, ptx::shuffle_xor(greatest, 2));
    greatest = ptx::maximum(greatest, ptx::shuffle_xor(greatest, 4));
    const float newest = ptx::maximum(most, greatest), base = newest == -INFINITY ? 0.0f : newest;
    const float factor = ptx::exponential(ptx::add(most, -base));
    DSV4_UNROLL
    for (int i = 0; i < 4; ++i) score[i] = ptx::exponential(ptx::add(score[i], -base));
    most = newest;
    total = ptx::fma(total, factor, ptx::add(ptx::add(score[0], score[1]), ptx::add(score[2], score[3])));
    ptx::sync_warp();  // the lanes have read the scores that the numerators replace
    shared.scores.store_weights(head, piece, score);
    if (piece == 0) ptx::store_shared_float(shared.factors + static_cast<uint32_t>(head * 4), factor);
  }

  // Adds the tile's values, weighed, to this warp's sums.
  template <int kGroups>
  DSV4_DEVICE void accumulate(const AttentionArguments& a, const AttentionShared<kGroups>& shared, uint32_t tile) {
    const int row = group * kGroupHeads + lane / 4;
    const float low = ptx::load_shared_float(shared.factors + static_cast<uint32_t>(row * 4));
    const float high = ptx::load_shared_float(shared.factors + static_cast<uint32_t>((row + 8) * 4));
    if (low != 1.0f || high != 1.0f) {
      DSV4_UNROLL
      for (int i = 0; i < 2 * kSteps; ++i) {
        DSV4_UNROLL
        for (int j = 0; j < 4; ++j) sum[i][j] = ptx::multiply(sum[i][j], j < 2 ? low : high);
      }
    }
    add_values(a, shared.scores, tile);
  }

  // For each step of this warp's dims and half of the tile's keys, use(step, half, keys): fragments of [16 dims, 16
  // keys].
  template <class Use>
  DSV4_DEVICE void each_keys(const AttentionArguments& a, uint32_t tile, const Use& use) const {
    DSV4_UNROLL
    for (int i = 0; i < kSteps; ++i) {
      if (i >= steps) break;
      DSV4_UNROLL
      for (int half = 0; half < 2; ++half) {
        uint32_t keys[4];
        const int key = 16 * half + lane / 16 * 8 + lane % 8, piece = first_dim / 8 + 2 * i + lane / 8 % 2;
        ptx::ldmatrix_x4(keys, Bf16Tile::address(a, tile, key, piece));
        use(i, half, keys);
      }
    }
  }

  // Adds a tile's values, weighed by what stands in place of the scores.
  template <int kHeads>
  DSV4_DEVICE void add_values(const AttentionArguments& a, const ScoreArea<kHeads>& scores, uint32_t tile) {
    uint32_t weights[2][4];  // of 16 heads, 16 keys
    DSV4_UNROLL
    for (int half = 0; half < 2; ++half) {
      ptx::ldmatrix_x4(weights[half], scores.weight(group * kGroupHeads + lane % 16, 2 * half + lane / 16));
    }
    DSV4_UNROLL
    for (int i = 0; i < kSteps; ++i) {
      if (i >= steps) break;
      DSV4_UNROLL
      for (int half = 0; half < 2; ++half) {
        uint32_t values[4];
        const int key = 16 * half + lane / 8 % 2 * 8 + lane % 8, piece = first_dim / 8 + 2 * i + lane / 16;
        ptx::ldmatrix_x4_transposed(values, Bf16Tile::address(a, tile, key, piece));
        ptx::mma_m16n8k16(sum[2 * i], weights[half], values[0], values[1]);
        ptx::mma_m16n8k16(sum[2 * i + 1], weights[half], values[2], values[3]);
      }
    }
  }

  // Adds the lanes' shares of a head's numerators: `total` becomes whole.
  DSV4_DEVICE void close() {
    total = ptx::add(total, ptx::shuffle_xor(total, 1));
    total = ptx::add(total, ptx::shuffle_xor(total, 2));
    total = ptx::add(total, ptx::shuffle_xor(total, 4));
  }

  // The head of the group whose softmax this lane takes part in.
  DSV4_DEVICE int weighed_head() const { return 4 * part + lane / 8; }

  // The head, and the first of the two dims, of a word of a fragment [16 heads, 16 dims].
  DSV4_DEVICE int64_t head_of(int word) const { return first_head + lane / 4 + word % 2 * 8; }
  DSV4_DEVICE int dim_of(int step, int word) const { return first_dim + 16 * step + lane % 4 * 2 + word / 2 * 8; }

  // Two dims of a row of queries, or of what is like them; paired: they are one aligned word.
  static DSV4_DEVICE uint32_t load_pair(const AttentionArguments& a, const AnyView<3>& rows, bool paired, int64_t row,
                                        int64_t head, int dim, bool exists) {
    if (!exists || head >= a.heads || dim >= a.head_dim) return 0;
    const bf16* from = static_cast<const bf16*>(rows.data) + row * rows.stride[0] + head * rows.stride[1] + dim;
    if (paired) return ptx::load_global_4(from);
    return from[0].bits | static_cast<uint32_t>(from[1].bits) << 16;
  }
};

}  // namespace dsv4::sm80
