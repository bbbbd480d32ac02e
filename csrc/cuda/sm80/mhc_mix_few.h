// The mixing product of few bfloat16 tokens: the sums of mhc_mix.h, bit for bit, by more blocks that have all they read
// on its way at once. A block takes 16 tokens, one split and 8 rows of fn. Its threads copy four chunks as one group,
// 64 threads the streams of each; fn comes as float32. One warp multiplies, and cuts fn into its two parts in
// registers: the sums of a split are one chain of products however many warps there are.
#pragma once

#include "cuda/sm80/mhc_mix.h"

namespace dsv4::sm80 {

inline constexpr int64_t kFewTokens = 64;
inline constexpr int kFewRows = 8;                             // of fn in a block
inline constexpr int kFewFnBytes = kFewRows * 4 * kChunk * 4;  // of a chunk

template <bool kPost>
inline constexpr int kMixFewSharedBytes = kChunksPerSplit * (MixStage<bf16, kPost, true>::kBytes + kFewFnBytes);

template <int kMixes>
inline constexpr int kFewTiles = kFnRows<bf16, kMixes> / kFewRows;  // blocks that share a split

// Of 4 of the 128 columns of a row of fn. Permuted so that four rows' same 8 columns lie in different banks.
DSV4_DEVICE uint32_t few_fn_address(uint32_t fn, int row, int piece) {
  return fn + static_cast<uint32_t>((row * kChunk + (piece ^ (row % 4 * 2))) * 16);
}

template <int kMixes, bool kVector>
DSV4_DEVICE void load_few_fn(const MixArguments& a, uint32_t fn, int first_row, int chunk) {
  const int row = ptx::thread_index() / kChunk, piece = ptx::thread_index() % kChunk;
  const int64_t column = static_cast<int64_t>(chunk) * kChunk + piece % 8 * 4;
  const bool exists = first_row + row < kMixes && column < a.hidden;
  const float* source = a.fn.data;
  if (exists) source += (first_row + row) * a.fn.stride[0] + piece / 8 * a.hidden;
  const uint32_t destination = few_fn_address(fn, row, piece);
  if constexpr (kVector) {
    ptx::cp_async_16(destination, source + (exists ? column : 0), exists ? 16 : 0);
  } else {
    ptx::store_shared_16(destination, load_piece_slowly(source, column, exists ? a.hidden : 0));
  }
}

// As Sums::accumulate.
template <class Sums, class Stage>
DSV4_DEVICE void accumulate_few(Sums& sums, uint32_t stage, uint32_t fn, bool squares) {
  const int lane = ptx::thread_index() % 32;
  DSV4_UNROLL
  for (int step = 0; step < 4 * kChunk / 16; ++step) {
    uint32_t r[4], high[2], low[2];  // of fn: k 0-7 and 8-15
    ptx::ldmatrix_x4(r, Stage::address(stage, step / 2, lane % 16, step % 2 * 2 + lane / 16));
    DSV4_UNROLL
    for (int half = 0; half < 2; ++half) {
      const int piece = 4 * step + 2 * half + lane % 4 / 2;
      const ptx::Words2 f = ptx::load_shared_8(few_fn_address(fn, lane / 4, piece) + lane % 2 * 8);
      const float first = float_from_bits(f.word[0]), second = float_from_bits(f.word[1]);
      high[half] = ptx::pack_bf16(first, second);
      low[half] =
          ptx::pack_bf16(ptx::add(first, -ptx::low_bf16(high[half])), ptx::add(second, -ptx::high_bf16(high[half])));
    }
    ptx::mma_m16n8k16(sums.product[0], r, high[0], high[1]);
    ptx::mma_m16n8k16(sums.product[0], r, low[0], low[1]);
    if (squares) sums.add_squares(r);
  }
}

// Grid: x over splits and rows of fn, y over blocks of tokens.
template <int kMixes, bool kPost, bool kVector>
DSV4_DEVICE void mix_few(const MixArguments& a) {
  using Block = MixBlock<bf16, kPost, kVector, true>;
  using Stage = typename Block::Stage;
  constexpr int kChunks = kMixThreads / Stage::kThreads, kGroups = kChunksPerSplit / kChunks;
  const uint32_t stages = ptx::shared_base(), fns = stages + kChunksPerSplit * Stage::kBytes;
  const int64_t split = ptx::block_index_x() / kFewTiles<kMixes>;
  const int first_row = static_cast<int>(ptx::block_index_x() % kFewTiles<kMixes>) * kFewRows;
  const int first = static_cast<int>(split) * kChunksPerSplit, own = ptx::thread_index() / Stage::kThreads;
  const int left = static_cast<int>((a.hidden + kChunk - 1) / kChunk) - first;
  const int end = left < kChunksPerSplit ? left : kChunksPerSplit;
  const Block block{a, a.first_token + ptx::block_index_y() * Stage::kTokens, first_row == 0};
  const int64_t tokens = a.end_token - block.first_token;
  DSV4_UNROLL_IF(kVector)
  for (int chunk = 0; chunk < kChunksPerSplit; chunk += kChunks) {
    if (chunk < end) {
      block.load(stages + (chunk + own) * Stage::kBytes, first + chunk + own);
      DSV4_UNROLL_IF(kVector)
      for (int i = chunk; i < chunk + kChunks; ++i) {
        load_few_fn<kMixes, kVector>(a, fns + i * kFewFnBytes, first_row, first + i);
      }
    }
    ptx::cp_async_commit();
  }
  PostWeights weights[1];
  if constexpr (kPost) {
    weights[0].clear();
    if (block.token(0) < tokens) weights[0].load(a.post, block.first_token + block.token(0));
  }
  Sums<bf16, kFewRows, false, Stage> sums;
  sums.clear();
  DSV4_UNROLL_IF(false)
  for (int chunk = 0; chunk < end; chunk += kChunks) {
    ptx::cp_async_wait<kGroups - 1>();
    ptx::cp_async_commit();  // an empty group, so that the same wait is for the next one
    if constexpr (kPost) block.apply_post(stages + (chunk + own) * Stage::kBytes, first + chunk + own, weights);
    ptx::sync_threads();  // the group's chunks are whole
    if (ptx::thread_index() >= 32) continue;
    DSV4_UNROLL_IF(false)
    for (int i = chunk; i < end && i < chunk + kChunks; ++i) {
      accumulate_few<decltype(sums), Stage>(sums, stages + i * Stage::kBytes, fns + i * kFewFnBytes, first_row == 0);
    }
  }
  const int64_t row = split * (a.end_token - a.first_token) + block.first_token - a.first_token;
  if (ptx::thread_index() < 32) sums.write(a.partial + row * kPartialRow, tokens, first_row);
}

template <int kMixes, bool kPost>
DSV4_DEVICE void mix_few(const MixArguments& a) {
  if (a.vector) {
    mix_few<kMixes, kPost, true>(a);
  } else {
    mix_few<kMixes, kPost, false>(a);
  }
}

}  // namespace dsv4::sm80
