// Keys in tiles for sparse_attention: rows of FP8 or plain pages as elements of type X, the type of the products, laid
// out in 32-bit words (two bfloat16 or one float32) as the multiplications read them.
#pragma once

#include "common/pages.h"
#include "cpu/attention_keys.h"
#include "cpu/avx512/lanes.h"

namespace dsv4::avx512 {
namespace {

inline constexpr int64_t kGroup = 32;      // keys of a group of scores, dims of a group of values
inline constexpr int64_t kTileKeys = 128;  // keys decoded at a time for values: 128 KiB at head_dim 512 in bfloat16
inline constexpr int64_t kBatch = 16;      // rows decoded before they go to their places

template <class X>
constexpr int64_t kWordElements = 4 / static_cast<int64_t>(sizeof(X));

// bfloat16 bits of the 128 e4m3 magnitudes, high and low bytes apart, as byte permutations read them.
struct E4m3Table {
  __m512i high[2], low[2];
};

DSV4_INLINE E4m3Table e4m3_table() {
  alignas(64) uint8_t high[128], low[128];
  for (int code = 0; code < 128; ++code) {
    const uint16_t bits = bf16_from_float(e4m3_value(static_cast<uint8_t>(code))).bits;
    high[code] = static_cast<uint8_t>(bits >> 8);
    low[code] = static_cast<uint8_t>(bits);
  }
  return {{_mm512_load_si512(high), _mm512_load_si512(high + 64)},
          {_mm512_load_si512(low), _mm512_load_si512(low + 64)}};
}

// 32 bfloat16, as they are or widened.
DSV4_INLINE void put(__m512i words, bf16* to, int64_t count) { _mm512_mask_storeu_epi16(to, mask32(count), words); }
DSV4_INLINE void put(__m512i words, float* to, int64_t count) {
  const __m512i first = _mm512_cvtepu16_epi32(_mm512_castsi512_si256(words));
  const __m512i second = _mm512_cvtepu16_epi32(_mm512_extracti64x4_epi64(words, 1));
  _mm512_mask_storeu_epi32(to, low16(count), _mm512_slli_epi32(first, 16));
  _mm512_mask_storeu_epi32(to + 16, high16(count), _mm512_slli_epi32(second, 16));
}

DSV4_INLINE void put(__m512i words, bf16* to) { _mm512_storeu_si512(to, words); }
DSV4_INLINE void put(__m512i words, float* to) {
  const __m512i first = _mm512_cvtepu16_epi32(_mm512_castsi512_si256(words));
  const __m512i second = _mm512_cvtepu16_epi32(_mm512_extracti64x4_epi64(words, 1));
  _mm512_storeu_si512(to, _mm512_slli_epi32(first, 16));
  _mm512_storeu_si512(to + 16, _mm512_slli_epi32(second, 16));
}

template <class X>
static __attribute__((noinline)) void decode_slowly(const uint8_t* codes, uint8_t scale, int64_t count, X* to) {
  for (int64_t d = 0; d < count; ++d) to[d] = from_float<X>(e4m3_value(codes[d]) * e8m0_value(scale));
}

// 64 codes that share a scale: their magnitudes from the table, then the scale's exponent added. That holds while no
// code is NaN and no result leaves the range of normal numbers; what is left goes one by one, and so does a shorter
// block.
template <class X>
DSV4_INLINE void decode_block(const uint8_t* codes, uint8_t scale, int64_t count, const E4m3Table& table, X* to) {
  constexpr unsigned kLeast = 10, kMost = 246;  // 2^-9 and 448 times these scales are normal
  if (count < kRowBlock || scale - kLeast > kMost - kLeast) return decode_slowly(codes, scale, count, to);
  const __m512i stored = _mm512_loadu_si512(codes), nan = _mm512_set1_epi8(0x7F);
  if (_mm512_cmpeq_epi8_mask(_mm512_and_si512(stored, nan), nan) != 0) return decode_slowly(codes, scale, count, to);
  // Bytes unpack within lanes of 16: quarters of 8 in this order come out in theirs.
  const __m512i code = _mm512_permutexvar_epi64(_mm512_setr_epi64(0, 4, 1, 5, 2, 6, 3, 7), stored);
  const __m512i high =
      _mm512_ternarylogic_epi32(nan, _mm512_permutex2var_epi8(table.high[0], code, table.high[1]), code,
                                0xCA);  // the sign of the code
  const __m512i low = _mm512_permutex2var_epi8(table.low[0], code, table.low[1]);
  const __m512i magnitude = _mm512_set1_epi16(0x7FFF);
  const __m512i shift = _mm512_set1_epi16(static_cast<int16_t>((scale - 127) * 128));
  const __m512i first = _mm512_unpacklo_epi8(low, high), second = _mm512_unpackhi_epi8(low, high);
  put(_mm512_mask_add_epi16(first, _mm512_test_epi16_mask(first, magnitude), first, shift), to);
  put(_mm512_mask_add_epi16(second, _mm512_test_epi16_mask(second, magnitude), second, shift), to + 32);
}

template <class X>
DSV4_INLINE void widen(const bf16* from, int64_t count, X* to) {
  int64_t d = 0;
  for (; d + 32 <= count; d += 32) put(_mm512_loadu_si512(from + d), to + d);
  if (d < count) put(_mm512_maskz_loadu_epi16(mask32(count - d), from + d), to + d, count - d);
}

// Reads the keys of a row's list, for scores first and then for values. A short list is kept decoded in between, in
// `kept` [keys, D]; a longer one would leave the second-level cache, and is decoded again.
template <class X>
class KeyReader {
 public:
  KeyReader(const SparseAttentionParams& p, const E4m3Table& table, const Key* keys, KeyCounts count, X* kept)
      : table_(table),
        keys_(keys),
        count_(count),
        kept_(kept),
        head_dim_(p.query.size(2)),
        rope_dim_(p.rope_dim),
        window_wide_(p.window_pool.plain.dtype == DType::kFloat32),
        compressed_wide_(p.compressed.plain.dtype == DType::kFloat32) {}

  // A key's elements: where they lie, or decoded into `row` or into what is kept.
  template <bool kAgain>
  DSV4_INLINE const X* read(const KeyReader& r, const E4m3Table& table, int64_t j, X* row) {
    const Key& key = r.keys_[j];
    if (r.fits(j)) return reinterpret_cast<const X*>(key.data);
    if (r.kept_ != nullptr) {
      row = r.kept_ + j * r.head_dim_;
      if (kAgain) return row;
    }
    if (key.scales == nullptr) {
      widen(reinterpret_cast<const bf16*>(key.data), r.head_dim_, row);
      return row;
    }
    const int64_t codes = r.head_dim_ - r.rope_dim_;
    for (int64_t d = 0; d < codes; d += kRowBlock) {
      decode_block(key.data + d, key.scales[d / kRowBlock], smaller(codes - d, kRowBlock), table, row + d);
    }
    widen(reinterpret_cast<const bf16*>(key.data + codes), r.rope_dim_, row + codes);
    return row;
  }

  const E4m3Table& table() const { return table_; }

  // The lines of memory of keys [begin, end), up to most_lines a key; returns how many. Rows lie scattered, in pages
  // that the processor does not know: it is asked for the ends of all rows first, since a core waits while an address
  // is translated, but for many no longer than for one.
  DSV4_INLINE int64_t lines(const KeyReader& r, int64_t begin, int64_t end, const uint8_t** to) {
    int64_t count = 0;
    for (int64_t j = begin; j < end; ++j) {
      const Key& key = r.keys_[j];
      const int64_t bytes = r.row_bytes(j);
      __builtin_prefetch(key.data);
      __builtin_prefetch(key.data + bytes - 1);
      if (key.scales != nullptr) __builtin_prefetch(key.scales);
      for (int64_t at = 64; at < bytes; at += 64) to[count++] = key.data + at;
    }
    return count;
  }
  static int64_t most_lines(int64_t head_dim) { return head_dim * 4 / 64; }
  // Asks for a key that was read before, and may have left the caches.
  DSV4_INLINE void prefetch_again(const KeyReader& r, int64_t j) {
    const Key& key = r.keys_[j];
    if (r.kept_ != nullptr && !r.fits(j)) return;
    for (int64_t at = 0; at < r.row_bytes(j); at += 64) __builtin_prefetch(key.data + at);
    if (key.scales != nullptr) __builtin_prefetch(key.scales);
  }

 private:
  bool wide(int64_t j) const { return j < count_.window ? window_wide_ : compressed_wide_; }
  // Whether the elements lie in memory as they are multiplied.
  bool fits(int64_t j) const { return keys_[j].scales == nullptr && wide(j) == (sizeof(X) == 4); }
  int64_t row_bytes(int64_t j) const {
    return keys_[j].scales != nullptr ? fp8_row_bytes(head_dim_, rope_dim_) : head_dim_ * (wide(j) ? 4 : 2);
  }

  const E4m3Table& table_;
  const Key* keys_;
  KeyCounts count_;
  X* kept_;
  int64_t head_dim_, rope_dim_;
  bool window_wide_, compressed_wide_;
};

// A thread's memory for tiles.
template <class X>
struct TileMemory {
  static constexpr int64_t kBytes = sizeof(X);

  uint32_t* tile;
  X *rows, *zeros;        // [kBatch, D]; [D], zero
  const uint8_t** lines;  // of a group of keys

  static int64_t bytes(int64_t head_dim) {
    return 4 * tile_words(head_dim) + (kBatch + 1) * head_dim * kBytes +
           kGroup * KeyReader<X>::most_lines(head_dim) * static_cast<int64_t>(sizeof(uint8_t*));
  }
  static int64_t tile_words(int64_t head_dim) { return kTileKeys * head_dim * kBytes / 4 + head_dim; }

  TileMemory(uint8_t* memory, int64_t head_dim)
      : tile(reinterpret_cast<uint32_t*>(memory)),
        rows(reinterpret_cast<X*>(tile + tile_words(head_dim))),
        zeros(rows + kBatch * head_dim),
        lines(reinterpret_cast<const uint8_t**>(zeros + head_dim)) {
    memset(zeros, 0, static_cast<size_t>(head_dim) * sizeof(X));
  }
};

// What will be read next, asked for line by line while something else is multiplied: faster than memory delivers, the
// processor would drop some.
class Lookahead {
 public:
  static constexpr int64_t kWords = 8;  // of a product to one step

  Lookahead() = default;
  // Keys [begin, end), kGroup at most, over so many steps.
  template <class X>
  static Lookahead at(const KeyReader<X>& reader, int64_t begin, int64_t end, int64_t steps,
                      const TileMemory<X>& memory) {
    Lookahead ahead;
    const int64_t count = KeyReader<X>::lines(reader, begin, end, memory.lines);
    ahead.next_ = memory.lines, ahead.end_ = memory.lines + count, ahead.each_ = (count + steps - 1) / steps;
    return ahead;
  }

  DSV4_INLINE void step(Lookahead& ahead) {
    for (int64_t i = 0; i < ahead.each_ && ahead.next_ < ahead.end_; ++i) __builtin_prefetch(*ahead.next_++);
  }

 private:
  const uint8_t* const* next_ = nullptr;
  const uint8_t* const* end_ = nullptr;
  int64_t each_ = 0;
};

// Up to 32 keys from `begin` on, and zeros, for scores: [word of a row][32 keys].
template <class X>
static __attribute__((noinline)) void tile_for_scores(const KeyReader<X>& reader, int64_t begin, int64_t end,
                                                      int64_t head_dim, const TileMemory<X>& memory) {
  const int64_t words = head_dim / kWordElements<X>;
  const E4m3Table table = reader.table();
  for (int64_t half = 0; half < kGroup; half += kBatch) {
    const X* rows[kBatch];
    for (int64_t i = 0; i < kBatch; ++i) {
      const int64_t key = begin + half + i;
      rows[i] =
          key < end ? KeyReader<X>::template read<false>(reader, table, key, memory.rows + i * head_dim) : memory.zeros;
    }
    uint32_t* to = memory.tile + half;
    for (int64_t word = 0; word < words; word += 16) {
      __m512i x[16];
      for (int i = 0; i < 16; ++i) x[i] = _mm512_loadu_si512(reinterpret_cast<const uint8_t*>(rows[i]) + 4 * word);
      transpose(x);
      for (int i = 0; i < 16; ++i) _mm512_storeu_si512(to + (word + i) * kGroup, x[i]);
    }
  }
}

// Words from one group of values to the next: not a power of two, or all groups would fall into the same sets of a
// cache.
constexpr int64_t group_stride(int64_t steps) { return (steps + 1) * kGroup; }

// Keys [begin, end), with a look at those up to `ahead`, zeros up to a multiple of 32, as values: [group of 32
// dims][step][32 words]. A step is one key, or two whose bfloat16 elements stand together in words; these unpack within
// lanes, so the dims of a group come in the order of `value_order`.
template <class X>
static __attribute__((noinline)) void tile_for_values(const KeyReader<X>& reader, int64_t begin, int64_t end,
                                                      int64_t ahead, int64_t head_dim, const TileMemory<X>& memory) {
  const int64_t keys = round_up(end - begin, kGroup), steps = keys / kWordElements<X>;
  const E4m3Table table = reader.table();
  for (int64_t step = 0; step < steps; ++step) {
    const X* rows[kWordElements<X>];
    for (int64_t i = 0; i < kWordElements<X>; ++i) {
      const int64_t key = begin + step * kWordElements<X> + i;
      if (key + kBatch < ahead) KeyReader<X>::prefetch_again(reader, key + kBatch);
      rows[i] =
          key < end ? KeyReader<X>::template read<true>(reader, table, key, memory.rows + i * head_dim) : memory.zeros;
    }
    for (int64_t group = 0; group < head_dim / kGroup; ++group) {
      uint32_t* to = memory.tile + group * group_stride(steps) + step * kGroup;
      if constexpr (sizeof(X) == 2) {
        const __m512i a = _mm512_loadu_si512(rows[0] + group * kGroup),
                      b = _mm512_loadu_si512(rows[1] + group * kGroup);
        _mm512_storeu_si512(to, _mm512_unpacklo_epi16(a, b));
        _mm512_storeu_si512(to + 16, _mm512_unpackhi_epi16(a, b));
      } else {
        _mm512_storeu_ps(to, _mm512_loadu_ps(rows[0] + group * kGroup));
        _mm512_storeu_ps(to + 16, _mm512_loadu_ps(rows[0] + group * kGroup + 16));
      }
    }
  }
}

// 32 sums of a group, in the order of their dims.
DSV4_INLINE Pair value_order(const float* sums, const bf16*) {
  const __m512i first = _mm512_setr_epi32(0, 1, 2, 3, 16, 17, 18, 19, 4, 5, 6, 7, 20, 21, 22, 23);
  const __m512i second = _mm512_setr_epi32(8, 9, 10, 11, 24, 25, 26, 27, 12, 13, 14, 15, 28, 29, 30, 31);
  const Pair x = load(sums);
  return {_mm512_permutex2var_ps(x.a, first, x.b), _mm512_permutex2var_ps(x.a, second, x.b)};
}
DSV4_INLINE Pair value_order(const float* sums, const float*) { return load(sums); }

}  // namespace
}  // namespace dsv4::avx512
