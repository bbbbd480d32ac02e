// Keys in tiles for sparse_attention: rows of FP8 or plain pages as elements of type X, the type of the products, laid
// out in 32-bit words (two bfloat16 or one float32) as the multiplications read them.
#pragma once

#include <cstddef>

#include "common/pages.h"
#include "cpu/attention_keys.h"
#include "cpu/avx512/e4m3_bytes.h"
#include "cpu/avx512/lanes.h"

namespace dsv4::avx512 {
namespace {

inline constexpr int64_t kGroup = 32;      // keys of a group of scores, dims of a group of values
inline constexpr int64_t kBatch = 16;      // rows decoded before they go to their places
inline constexpr int64_t kSliceDims = 64;  // of values that are decoded at a time, for as many keys as share their sums
inline constexpr int64_t kSliceKeys = 512;
static_assert(kSliceDims == kRowBlock);

template <class X>
constexpr int64_t kWordElements = 4 / static_cast<int64_t>(sizeof(X));

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

// Words of 64 codes that share a scale, 32 bfloat16 each.
struct Words {
  __m512i first, second;
};
DSV4_INLINE bool folds(uint8_t scale) { return scale >= kLeastScale && scale <= kMostScaleFp8; }
DSV4_INLINE Words decode(const uint8_t* codes, uint8_t scale) {
  const E4m3Bytes::Table& table = kE4m3.of[kMostScaleFp8 - scale];
  // Bytes unpack within lanes of 16: quarters of 8 in this order come out in theirs.
  const __m512i code = _mm512_permutexvar_epi64(_mm512_setr_epi64(0, 4, 1, 5, 2, 6, 3, 7), _mm512_loadu_si512(codes));
  const __m512i high =
      _mm512_permutex2var_epi8(_mm512_load_si512(table.high), code, _mm512_load_si512(table.high + 64));
  const __m512i low = _mm512_permutex2var_epi8(_mm512_load_si512(table.low), code, _mm512_load_si512(table.low + 64));
  const __m512i with_sign = _mm512_ternarylogic_epi32(high, code, _mm512_set1_epi8(0x7F), 0xE4);  // C ? A : B
  return {_mm512_unpacklo_epi8(low, with_sign), _mm512_unpackhi_epi8(low, with_sign)};
}

// A block of codes. Scales that do not fold, and shorter blocks, go one by one.
template <class X>
DSV4_INLINE void decode_block(const uint8_t* codes, uint8_t scale, int64_t count, X* to) {
  if (count < kRowBlock || !folds(scale)) return decode_slowly(codes, scale, count, to);
  const Words words = decode(codes, scale);
  put(words.first, to);
  put(words.second, to + 32);
}

template <class X>
DSV4_INLINE void widen(const bf16* from, int64_t count, X* to) {
  int64_t d = 0;
  for (; d + 32 <= count; d += 32) put(_mm512_loadu_si512(from + d), to + d);
  if (d < count) put(_mm512_maskz_loadu_epi16(mask32(count - d), from + d), to + d, count - d);
}

// Reads the keys of a row's list, for scores first and then for values: decoding them again takes less time than
// writing and reading what was decoded.
template <class X>
class KeyReader {
 public:
  KeyReader(const SparseAttentionParams& p, const Key* keys, KeyCounts count)
      : keys_(keys),
        count_(count),
        head_dim_(p.query.size(2)),
        rope_dim_(p.rope_dim),
        window_wide_(p.window_pool.plain.dtype == DType::kFloat32),
        compressed_wide_(p.compressed.plain.dtype == DType::kFloat32),
        all_codes_(p.window_pool.bytes.given() && (!p.compressed.given() || p.compressed.bytes.given())),
        all_words_(are_words(p.window_pool) && (!p.compressed.given() || are_words(p.compressed))) {}

  // Dims [first, first + count) of a key, `first` a multiple of 64: where they lie, or decoded into `to`.
  DSV4_INLINE const X* read(const KeyReader& r, int64_t j, int64_t first, int64_t count, X* to) {
    const Key& key = r.keys_[j];
    if (r.fits(j)) return reinterpret_cast<const X*>(key.data) + first;
    if (key.scales == nullptr) {
      widen(reinterpret_cast<const bf16*>(key.data) + first, count, to);
      return to;
    }
    const int64_t codes = r.codes(), end = first + count;
    int64_t d = first;
    for (; d < smaller(codes, end); d += kRowBlock) {
      decode_block(key.data + d, key.scales[d / kRowBlock], smaller(smaller(codes, end) - d, kRowBlock),
                   to + d - first);
    }
    const int64_t rope = larger(first, codes);
    const bf16* plain = reinterpret_cast<const bf16*>(key.data + codes);
    if (rope < end) widen(plain + rope - codes, end - rope, to + rope - first);
    return to;
  }

  // Whether dims [first, first + 64) of all keys are blocks of codes.
  bool are_codes(int64_t first) const { return all_codes_ && first + kRowBlock <= codes(); }
  // Where these dims of all keys lie as bfloat16, in bytes from the begin of a row; -1 where they do not.
  int64_t words_at(int64_t first) const {
    if (first + kRowBlock > head_dim_) return -1;
    if (all_words_) return 2 * first;
    return all_codes_ && first >= codes() ? codes() + 2 * (first - codes()) : -1;
  }

  const Key* keys() const { return keys_; }

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
    for (int64_t at = 0; at < r.row_bytes(j); at += 64) __builtin_prefetch(key.data + at);
    if (key.scales != nullptr) __builtin_prefetch(key.scales);
  }

 private:
  static bool are_words(const RowPool& pool) { return !pool.bytes.given() && pool.plain.dtype == DType::kBFloat16; }
  int64_t codes() const { return head_dim_ - rope_dim_; }  // of an FP8 row
  bool wide(int64_t j) const { return j < count_.window ? window_wide_ : compressed_wide_; }
  // Whether the elements lie in memory as they are multiplied.
  bool fits(int64_t j) const { return keys_[j].scales == nullptr && wide(j) == (sizeof(X) == 4); }
  int64_t row_bytes(int64_t j) const {
    return keys_[j].scales != nullptr ? fp8_row_bytes(head_dim_, rope_dim_) : head_dim_ * (wide(j) ? 4 : 2);
  }

  const Key* keys_;
  KeyCounts count_;
  int64_t head_dim_, rope_dim_;
  bool window_wide_, compressed_wide_, all_codes_, all_words_;
};

// Words from one group of values to the next: not a power of two, or all groups would fall into the same sets of a
// cache.
constexpr int64_t group_stride(int64_t steps) { return (steps + 1) * kGroup; }

// A thread's memory for tiles.
template <class X>
struct TileMemory {
  static constexpr int64_t kBytes = sizeof(X);

  uint32_t* tile;
  X *rows, *zeros;        // [kBatch, D]; [D], zero
  const uint8_t** lines;  // of a group of keys
  const uint8_t** held;   // [kSliceKeys]

  static int64_t bytes(int64_t head_dim) {
    return 4 * tile_words(head_dim) + (kBatch + 1) * head_dim * kBytes +
           (kGroup * KeyReader<X>::most_lines(head_dim) + kSliceKeys) * static_cast<int64_t>(sizeof(uint8_t*));
  }
  // Of 32 keys for scores, or a slice of many for values.
  static int64_t tile_words(int64_t head_dim) {
    return larger(kGroup * head_dim * kBytes / 4, kSliceDims / kGroup * group_stride(kSliceKeys * kBytes / 4));
  }

  TileMemory(uint8_t* memory, int64_t head_dim)
      : tile(reinterpret_cast<uint32_t*>(memory)),
        rows(reinterpret_cast<X*>(tile + tile_words(head_dim))),
        zeros(rows + kBatch * head_dim),
        lines(reinterpret_cast<const uint8_t**>(zeros + head_dim)),
        held(lines + kGroup * KeyReader<X>::most_lines(head_dim)) {
    memset(zeros, 0, static_cast<size_t>(head_dim) * sizeof(X));
  }
};

// The keys that a tile holds, by the addresses of their rows, null for zeros: of rows that follow one another most are
// the same, and need not be decoded again.
struct Held {
  const uint8_t** keys = nullptr;  // null: not written down
  bool known = false;

  DSV4_INLINE bool has(const Held& held, int64_t place, const uint8_t* key) {
    return held.known && held.keys[place] == key;
  }
  // Which of 8 places hold other keys than they will: the first `count` of `keys`, then zeros.
  DSV4_INLINE uint32_t change(const Held& held, int64_t place, const Key* keys, int64_t count) {
    static_assert(sizeof(Key) == 16 && offsetof(Key, data) == 0);
    if (held.keys == nullptr) return 0xFF;
    const __mmask16 words = count >= 8 ? 0xFFFF : count <= 0 ? 0 : static_cast<__mmask16>((1u << 2 * count) - 1);
    const __m512i first = _mm512_maskz_loadu_epi64(static_cast<__mmask8>(words), keys),
                  second = _mm512_maskz_loadu_epi64(static_cast<__mmask8>(words >> 8), keys + 4);
    const __m512i now = _mm512_permutex2var_epi64(first, _mm512_setr_epi64(0, 2, 4, 6, 8, 10, 12, 14), second);
    const __mmask8 same = held.known ? _mm512_cmpeq_epi64_mask(now, _mm512_loadu_si512(held.keys + place)) : 0;
    _mm512_storeu_si512(held.keys + place, now);
    return static_cast<uint8_t>(~same);
  }
};

// What will be read next, asked for line by line while something else is multiplied: faster than memory delivers, the
// processor would drop some.
class Lookahead {
 public:
  static constexpr int64_t kWords = 8;  // of a product to one step

  Lookahead() = default;
  // Keys [begin, end), kGroup at most, over so many steps; not those that a tile holds.
  template <class X>
  static Lookahead at(const KeyReader<X>& reader, int64_t begin, int64_t end, int64_t steps,
                      const TileMemory<X>& memory, const Held& held = Held()) {
    Lookahead ahead;
    int64_t count = 0;
    for (int64_t last; begin < end; begin = last + 1) {
      for (last = begin; last < end && !Held::has(held, last % kGroup, reader.keys()[last].data);) ++last;
      count += KeyReader<X>::lines(reader, begin, last, memory.lines + count);
    }
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
                                                      int64_t head_dim, const TileMemory<X>& memory,
                                                      const Held& held = Held()) {
  constexpr int kSingly = 3;  // keys that take less time one by one than all 16
  const int64_t words = head_dim / kWordElements<X>;
  for (int64_t half = 0; half < kGroup; half += kBatch) {
    const auto row = [&](int64_t i) {
      const int64_t key = begin + half + i;
      return key < end ? KeyReader<X>::read(reader, key, 0, head_dim, memory.rows + i * head_dim) : memory.zeros;
    };
    uint32_t* to = memory.tile + half;
    uint32_t changed = 0;
    for (int64_t i = 0; i < kBatch; i += 8) {
      const int64_t key = begin + half + i;
      changed |= Held::change(held, half + i, reader.keys() + key, end - key) << i;
    }
    if (__builtin_popcount(changed) <= kSingly) {
      for (; changed != 0; changed &= changed - 1) {
        const int64_t i = __builtin_ctz(changed);
        const X* from = row(i);
        for (int64_t word = 0; word < words; ++word) memcpy(to + word * kGroup + i, from + word * kWordElements<X>, 4);
      }
      continue;
    }
    const X* rows[kBatch];
    for (int64_t i = 0; i < kBatch; ++i) rows[i] = row(i);
    for (int64_t word = 0; word < words; word += 16) {
      __m512i x[16];
      for (int i = 0; i < 16; ++i) x[i] = _mm512_loadu_si512(reinterpret_cast<const uint8_t*>(rows[i]) + 4 * word);
      transpose(x);
      for (int i = 0; i < 16; ++i) _mm512_storeu_si512(to + (word + i) * kGroup, x[i]);
    }
  }
}

// 32 dims of two keys as words of pairs.
DSV4_INLINE void put_pair(__m512i a, __m512i b, uint32_t* to) {
  _mm512_storeu_si512(to, _mm512_unpacklo_epi16(a, b));
  _mm512_storeu_si512(to + 16, _mm512_unpackhi_epi16(a, b));
}

// 64 dims of keys two by two, without rows in memory between; returns of how many keys: codes (kCodes) end where scales
// do not fold. They lie `at` bytes behind the begin of a row, and are block `block`. The second 32 dims come `stride`
// words after the first.
template <bool kCodes>
static __attribute__((noinline)) int64_t put_pairs(const Key* keys, int64_t count, int64_t at, int64_t block,
                                                   uint32_t* to, int64_t stride) {
  const auto words = [&](const Key& key) __attribute__((always_inline)) {
    const uint8_t* from = key.data + at;
    if constexpr (kCodes) return decode(from, key.scales[block]);
    return Words{_mm512_loadu_si512(from), _mm512_loadu_si512(from + 64)};
  };
  int64_t done = 0;
  for (; done + 2 <= count; done += 2, to += kGroup) {
    const Key &a = keys[done], &b = keys[done + 1];
    if (kCodes && !(folds(a.scales[block]) && folds(b.scales[block]))) break;
    const Words x = words(a), y = words(b);
    put_pair(x.first, y.first, to);
    put_pair(x.second, y.second, to + stride);
  }
  return done;
}

// Steps [step, last) of what tile_for_values makes.
template <class X>
static __attribute__((noinline)) void value_steps(const KeyReader<X>& reader, int64_t begin, int64_t end,
                                                  int64_t first_dim, int64_t dims, int64_t step, int64_t last,
                                                  int64_t steps, const TileMemory<X>& memory) {
  const int64_t stride = group_stride(steps);
  for (; step < last; ++step) {
    if constexpr (sizeof(X) == 2) {
      const Key* keys = reader.keys() + begin + 2 * step;
      const int64_t left = smaller(end - begin - 2 * step, 2 * (last - step)), words = reader.words_at(first_dim);
      uint32_t* to = memory.tile + step * kGroup;
      if (reader.are_codes(first_dim)) {
        step += put_pairs<true>(keys, left, first_dim, first_dim / kRowBlock, to, stride) / 2;
      } else if (words >= 0) {
        step += put_pairs<false>(keys, left, words, 0, to, stride) / 2;
      }
      if (step == last) return;
    }
    uint32_t* to = memory.tile + step * kGroup;
    const int64_t first = begin + step * kWordElements<X>;
    const X* rows[kWordElements<X>];
    for (int64_t i = 0; i < kWordElements<X>; ++i) {
      rows[i] = first + i < end ? KeyReader<X>::read(reader, first + i, first_dim, dims, memory.rows + i * kSliceDims)
                                : memory.zeros;
    }
    for (int64_t d = 0; d < dims; d += kGroup, to += stride) {
      if constexpr (sizeof(X) == 2) {
        put_pair(_mm512_loadu_si512(rows[0] + d), _mm512_loadu_si512(rows[1] + d), to);
      } else {
        _mm512_storeu_ps(to, _mm512_loadu_ps(rows[0] + d));
        _mm512_storeu_ps(to + 16, _mm512_loadu_ps(rows[0] + d + 16));
      }
    }
  }
}

// Dims [first_dim, first_dim + dims), a slice at most, of keys [begin, end), zeros up to a multiple of 32, as values:
// [group of 32 dims][step][32 words]. A step is one key, or two whose bfloat16 elements stand together in words; these
// unpack within lanes, so the dims of a group come in the order of `value_order`. Before the first slice all keys are
// asked for.
template <class X>
static __attribute__((noinline)) void tile_for_values(const KeyReader<X>& reader, int64_t begin, int64_t end,
                                                      int64_t first_dim, int64_t dims, const TileMemory<X>& memory,
                                                      const Held& held = Held()) {
  const int64_t steps = round_up(end - begin, kGroup) / kWordElements<X>;
  for (int64_t key = begin; first_dim == 0 && !held.known && key < end; ++key) {
    KeyReader<X>::prefetch_again(reader, key);
  }
  if (held.keys == nullptr) return value_steps(reader, begin, end, first_dim, dims, 0, steps, steps, memory);
  constexpr int64_t kEach = kWordElements<X>;
  int64_t from = -1;  // of a run of steps that change
  for (int64_t key = begin, step = 0; step < steps; key += 8) {
    uint32_t changed = Held::change(held, key - begin, reader.keys() + key, end - key);
    for (const int64_t last = step + 8 / kEach; step < last; ++step, changed >>= kEach) {
      if (changed == 0 && from < 0) {
        step = last;
        break;
      }
      if ((changed & ((1u << kEach) - 1)) != 0) {
        from = from < 0 ? step : from;
      } else if (from >= 0) {
        value_steps(reader, begin, end, first_dim, dims, from, step, steps, memory);
        from = -1;
      }
    }
  }
  if (from >= 0) value_steps(reader, begin, end, first_dim, dims, from, steps, steps, memory);
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
