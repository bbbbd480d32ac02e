// index_topk in AMX tiles: the left operand is 16 keys x 32 dims (index_panel.h), the right one 16 heads, transposed
// once a row. Four tiles of products: of 16 keys and 64 heads, 32 keys and 32 heads, or 64 keys and 16 heads; with up
// to 4 or 8 heads a right tile holds 4 or 2 rows. 2 H D FLOPs a key are 16 tile cycles at 64 heads of 128 dims. Beside
// them, on two vector ports: relu and weights, 8 instructions a key, its sum over the heads, 3, and decoding it, 20,
// which a block of rows shares; a tile store of 16 lines a tile; 20 tile loads for 16 products. All of it goes between
// the tile instructions of another block, so that both run at once. The tiles are the bound of a block of rows; for a
// single row the vector ports are nearly as busy, 15 cycles a key, and neither reaches its bound.
#include "cpu/index.h"

#include "cpu/amx/index_panel.h"
#include "cpu/avx512/index_scores.h"

namespace dsv4::DSV4_AMX_NAMESPACE {
namespace {

// How a right operand is made of the heads of rows.
struct Shape {
  int64_t heads, steps;
  int64_t columns;   // of a row in a tile
  int64_t together;  // rows in a tile
  int64_t tiles;     // of a row, or of the rows that share one

  explicit Shape(const IndexTopkParams& p) : heads(p.query.size(1)), steps(p.query.size(2) / kStepDims) {
    columns = heads <= 4 ? 4 : heads <= 8 ? 8 : 16;
    together = kTileRows / columns;
    tiles = (heads + kTileRows - 1) / kTileRows;
  }
  int64_t query_bytes() const { return tiles * steps * kStepBytes; }
  int64_t weight_count() const { return tiles * kTileRows; }
  int64_t sets() const { return (kIndexRows + together - 1) / together; }
};

class Kernel {
 public:
  using Lanes = avx512::IndexLanes;

  static int64_t memory(const IndexTopkParams& p) {
    const Shape shape(p);
    return IndexRing::bytes(p.query.size(2)) + shape.sets() * (shape.query_bytes() + 4 * shape.weight_count());
  }

  Kernel(const IndexTopkParams& p, uint8_t* memory)
      : p_(p),
        shape_(p),
        keys_(IndexKeyPool(p), p.page_size, memory),
        query_(memory + IndexRing::bytes(p.query.size(2))),
        weights_(reinterpret_cast<float*>(query_ + shape_.sets() * shape_.query_bytes())),
        last_(avx512::low16(shape_.heads - (shape_.tiles - 1) * kTileRows)) {
    if (shape_.together > 1) {
      const uint32_t own = (1u << shape_.heads) - 1;
      last_ = static_cast<__mmask16>(shape_.columns == 4 ? own * 0x1111u : own * 0x0101u);
    }
  }

  int64_t together() const { return shape_.together; }

  void begin(int64_t row, int64_t end) {
    first_row_ = row;
    const int64_t sets = (end - row + shape_.together - 1) / shape_.together;
    for (int64_t set = 0; set < sets; ++set) arrange(set, row + set * shape_.together, end);
    const int64_t unit = unit_groups();
    alone_ = sets == 1;
    narrow_ = end - row == 1 && shape_.columns == kNarrow && shape_.steps == 4;
    TileConfig config;
    for (int tile = 0; tile < kTiles; ++tile) {
      const bool columns = tile < 4 || tile == 6;  // sums, and the query of run_narrow
      config.set(tile, kTileRows, narrow_ && columns ? 4 * kNarrow : kTileBytes);
    }
    tile_configure(config);
    keys_.begin(alone_ ? 4 * unit : IndexRing::kGroups);
    fetches_ = narrow_ || (alone_ && shape_.tiles == 4 && shape_.steps == 4);
    const int64_t passes = (shape_.tiles + 3) / 4;
    quota_ = (unit * kTileRows + sets * passes - 1) / (sets * passes);
  }

  void end() { tile_release(); }

  void prepare(const IndexKey* keys, int64_t count) { keys_.prepare(keys, count); }
  void expect(const IndexKey* keys, int64_t count) { keys_.expect(keys, count); }

  void score(int64_t row, int64_t count, float* scores) {
    const int64_t set = (row - first_row_) / shape_.together;
    const int64_t unit = unit_groups();
    pending_ = 0;
    for (int64_t group = 0; group * kTileRows < count; group += unit) {
      if (!fetches_) keys_.fetch(unit * kTileRows);
      keys_.require((group + unit) * kTileRows);
      limit_ = alone_ ? (group + 3 * unit) * kTileRows : 2 * kIndexChunk;
      for (int64_t tile = 0; tile < shape_.tiles; tile += 4) {
        Block& block = blocks_[turn_];
        block.query = query_ + set * shape_.query_bytes() + tile * shape_.steps * kStepBytes;
        block.weights = weights_ + set * shape_.weight_count() + tile * kTileRows;
        block.scores = scores + group * kTileRows;
        block.group = group;
        block.first = tile == 0;
        block.last = tile + 4 >= shape_.tiles;
        run(block, shape_.tiles - tile);
        turn_ = 1 - turn_;
      }
    }
    if (pending_ != 0) flush();
  }

  static void offer(Selection<Lanes>& best, const float* scores, const uint16_t* stored, int64_t count, int64_t first) {
    avx512::index_offer(best, scores, stored, count, first);
  }

 private:
  // The products of a block of keys and up to four tiles of heads, and where they belong.
  struct Block {
    const uint8_t* query;
    const float* weights;
    float* scores;
    int64_t group;
    bool first, last;
  };

  int64_t unit_groups() const { return shape_.tiles == 1 ? 4 : shape_.tiles == 2 ? 2 : 1; }

  // The query and the weights of the rows from `row` on that are multiplied together; zeros where there is no head.
  void arrange(int64_t set, int64_t row, int64_t end) const {
    const auto query = p_.query.as<const bf16>();
    const int64_t dim = p_.query.size(2);
    uint8_t* to = query_ + set * shape_.query_bytes();
    float* weights = weights_ + set * shape_.weight_count();
    for (int64_t tile = 0; tile < shape_.tiles; ++tile) {
      for (int64_t d = 0; d < dim;) {
        const int64_t width = index_width(dim - d), steps = width / kStepDims;
        __m512i x[4][kTileRows];
        for (int64_t c = 0; c < kTileRows; ++c) {
          const int64_t r = row + c / shape_.columns, h = tile * kTileRows + c % shape_.columns;
          __m512i parts[4] = {};
          if (r < end && h < shape_.heads) keys_.arrange(query.at(r, h, d), width, parts);
          for (int64_t s = 0; s < steps; ++s) x[s][c] = parts[s];
          if (d == 0) weights[tile * kTileRows + c] = r < end && h < shape_.heads ? *p_.weights.at(r, h) : 0.0f;
        }
        for (int64_t s = 0; s < steps; ++s, to += kStepBytes) {
          avx512::transpose(x[s]);
          for (int64_t c = 0; c < kTileRows; ++c) _mm512_store_si512(to + c * kTileBytes, x[s][c]);
        }
        d += width;
      }
    }
  }

  // `tiles` of heads are left to do of the block's keys.
  void run(const Block& block, int64_t tiles) {
    if (narrow_) {
      run_narrow(block);
    } else if (shape_.tiles == 1) {
      shape_.steps == 2 ? run<4, 1, 2>(block) : shape_.steps == 4 ? run<4, 1, 4>(block) : run<4, 1, 0>(block);
    } else if (shape_.tiles == 2) {
      shape_.steps == 4 ? run<2, 2, 4>(block) : run<2, 2, 0>(block);
    } else if (tiles >= 4) {
      shape_.steps == 4 ? run_halves(block) : run<1, 4, 0>(block);
    } else if (tiles == 3) {
      run<1, 3, 0>(block);
    } else if (tiles == 2) {
      run<1, 2, 0>(block);
    } else {
      run<1, 1, 0>(block);
    }
  }

  static constexpr int kHalves = 1, kNarrowBlock = 2;  // kinds of blocks, besides those that code() numbers
  static constexpr int kNarrow = 4;                    // columns of a row of few heads
  template <int kKeys, int kHeads>
  static constexpr int code() {
    return 8 * kKeys + kHeads;
  }

  void flush() {
    switch (pending_) {
      case code<4, 1>():
        return finish<4, 1>();
      case code<2, 2>():
        return finish<2, 2>();
      case code<1, 4>():
        return finish<1, 4>();
      case kHalves:
        return finish_halves();
      case kNarrowBlock:
        return finish_narrow();
      case code<1, 3>():
        return finish<1, 3>();
      case code<1, 2>():
        return finish<1, 2>();
      default:
        return finish<1, 1>();
    }
  }
  void finish_halves() {
    tile_store<2>(products_[1 - turn_][2], kTileBytes);
    tile_store<3>(products_[1 - turn_][3], kTileBytes);
    const Block& block = blocks_[1 - turn_];
    for (int quad = 0; quad < 4; ++quad) sum<4>(block, quad);
    add<1>(block);
    pending_ = 0;
  }
  template <int kKeys, int kHeads>
  void finish() {
    const Block& block = blocks_[1 - turn_];
    for (int quad = 0; quad < 4 * kKeys; ++quad) sum<kHeads>(block, quad);
    add<kKeys>(block);
    pending_ = 0;
  }

  // Sixteen keys of 128 dims with 64 heads, the shape of the published models: two tiles of heads at a time, whose
  // products are stored while the other two are multiplied. Other keys are decoded between the steps of the first two;
  // the sums of the block before this one come between the other steps, when its products have reached the cache, or
  // between all but the first where few keys are decoded.
  void run_halves(const Block& block) {
    if (pending_ != 0 && pending_ != kHalves) flush();
    IndexRing::Run ahead = keys_.claim(quota_, limit_);
    IndexRing::Whole whole;
    switch (keys_.whole(ahead, &whole)) {
      case IndexRing::Kind::kFp4:
        return run_halves<IndexRing::Kind::kFp4>(block, whole, &ahead);
      case IndexRing::Kind::kFp8:
        return run_halves<IndexRing::Kind::kFp8>(block, whole, &ahead);
      default:
        return run_halves<IndexRing::Kind::kNone>(block, whole, &ahead);
    }
  }
  template <IndexRing::Kind kKind>
  __attribute__((noinline)) void run_halves(const Block& block, IndexRing::Whole whole, IndexRing::Run* ahead) {
    const Block& before = blocks_[1 - turn_];
    const uint8_t *keys = keys_.group(block.group), *query = block.query;
    const bool sums = pending_ != 0;
    const int64_t share = (ahead->count + 3) / 4;
    const auto decode = [&](int quad) __attribute__((always_inline)) {
      if constexpr (kKind == IndexRing::Kind::kNone) {
        if (ahead->count > 0) keys_.decode(ahead, share);
        if (fetches_) keys_.fetch(4);
      } else {
#pragma GCC unroll 4
        for (int i = 0; i < 4; ++i) keys_.decode_one<kKind>(whole, 4 * quad + i);
        keys_.fetch_four<kKind>();
      }
    };
    const auto sum_after = [&](int step) __attribute__((always_inline)) {
      constexpr bool kDecodes = kKind != IndexRing::Kind::kNone;
      const int quad = kDecodes                    ? step - 4
                       : step == 2 || step == 3    ? step - 2
                       : step > 4 && step % 2 == 1 ? step / 2
                                                   : -1;
      if (sums && quad >= 0) this->sum<4>(before, quad);
    };
    tile_zero<0>();
    tile_zero<1>();
#pragma GCC unroll 4
    for (int step = 0; step < 4; ++step) {
      dot_half<0>(keys + step * kStepBytes, query + step * kStepBytes);
      if (step == 0 && sums) {
        tile_store<2>(products_[1 - turn_][2], kTileBytes);
        tile_store<3>(products_[1 - turn_][3], kTileBytes);
      }
      decode(step);
      sum_after(step);
    }
    query += 8 * kStepBytes;
    tile_zero<2>();
    tile_zero<3>();
#pragma GCC unroll 4
    for (int step = 0; step < 4; ++step) {
      dot_half<2>(keys + step * kStepBytes, query + step * kStepBytes);
      if (step == 0) {
        tile_store<0>(products_[turn_][0], kTileBytes);
        tile_store<1>(products_[turn_][1], kTileBytes);
      }
      sum_after(4 + step);
    }
    if (sums) add<1>(before);
    pending_ = kHalves;
  }
  template <int kFirst>
  static __attribute__((always_inline)) void dot_half(const uint8_t* keys, const uint8_t* query) {
    tile_load<4>(keys, kTileBytes);
    tile_load<6>(query, kTileBytes);
    tile_dot<kFirst, 4, 6>();
    tile_load<7>(query + 4 * kStepBytes, kTileBytes);
    tile_dot<kFirst + 1, 4, 7>();
  }

  // 64 keys of 128 dims with up to four heads of one row, whose products lie close together: [64 keys][4 heads]. Beside
  // each step 16 other keys are decoded, and the scores of 16 keys of the block before are summed.
  void run_narrow(const Block& block) {
    const Block& before = blocks_[1 - turn_];
    const uint8_t* keys[4];
    for (int k = 0; k < 4; ++k) keys[k] = keys_.group(block.group + k);
    tile_zero<0>();
    tile_zero<1>();
    tile_zero<2>();
    tile_zero<3>();
#pragma GCC unroll 4
    for (int step = 0; step < 4; ++step) {
      dot<4, 1>(keys, step * kStepBytes, block.query + step * kStepBytes, 0);
      decode_group();
      if (pending_ != 0) sum_narrow(before, step);
    }
    float* products = products_[turn_][0];
    constexpr int64_t kStride = 4 * kNarrow;
    tile_store<0>(products, kStride);
    tile_store<1>(products + kTileRows * kNarrow, kStride);
    tile_store<2>(products + 2 * kTileRows * kNarrow, kStride);
    tile_store<3>(products + 3 * kTileRows * kNarrow, kStride);
    pending_ = kNarrowBlock;
  }
  void finish_narrow() {
    for (int group = 0; group < 4; ++group) sum_narrow(blocks_[1 - turn_], group);
    pending_ = 0;
  }
  // The next 16 keys.
  __attribute__((always_inline)) void decode_group() {
    IndexRing::Run ahead = keys_.claim(kTileRows, limit_);
    IndexRing::Whole whole;
    const auto decode = [&](auto kind) __attribute__((always_inline)) {
#pragma GCC unroll 4
      for (int i = 0; i < kTileRows; ++i) keys_.decode_one<decltype(kind)::value>(whole, i);
      for (int i = 0; i < 4; ++i) keys_.fetch_four<decltype(kind)::value>();
    };
    switch (ahead.count > 0 ? keys_.whole(ahead, &whole) : IndexRing::Kind::kNone) {
      case IndexRing::Kind::kFp4:
        return decode(IndexRing::KindConstant<IndexRing::Kind::kFp4>{});
      case IndexRing::Kind::kFp8:
        return decode(IndexRing::KindConstant<IndexRing::Kind::kFp8>{});
      default:
        keys_.decode(&ahead, ahead.count);
        keys_.fetch(kTileRows);
    }
  }
  // The scores of 16 keys. The sum of four heads is (0 + 2) + (1 + 3), as in sum().
  __attribute__((always_inline)) void sum_narrow(const Block& block, int group) {
    const float* products = products_[1 - turn_][0] + group * kTileRows * kNarrow;
    const __m512 weights = _mm512_broadcast_f32x4(_mm_load_ps(block.weights));
    __m512 x[4];
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {  // four keys
      const __m512 product = _mm512_load_ps(products + 16 * i);
      x[i] = _mm512_mul_ps(weights, _mm512_maskz_max_ps(last_, _mm512_setzero_ps(), product));
    }
    const auto halves = [](__m512 a, __m512 b) __attribute__((always_inline)) {
      const __m512d c = _mm512_castps_pd(a), d = _mm512_castps_pd(b);
      return _mm512_add_ps(_mm512_castpd_ps(_mm512_unpacklo_pd(c, d)), _mm512_castpd_ps(_mm512_unpackhi_pd(c, d)));
    };
    const __m512 ab = halves(x[0], x[1]), cd = halves(x[2], x[3]);
    const __m512 sums = _mm512_add_ps(_mm512_shuffle_ps(ab, cd, 0x88), _mm512_shuffle_ps(ab, cd, 0xDD));
    // Key 4 i + l is element i of lane l.
    const __m512i order = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
    store(block, group, 0, _mm512_permutexvar_ps(order, sums));
  }

  // Tiles: from 0 on the products, [keys][heads]; 4 and 5 keys, 6 and 7 the query. kSteps: how many, 0: any number.
  template <int kKeys, int kHeads, int kSteps>
  __attribute__((noinline)) void run(const Block& block) {
    const Block& before = blocks_[1 - turn_];
    if (pending_ != 0 && pending_ != code<kKeys, kHeads>()) flush();
    const int64_t steps = kSteps > 0 ? kSteps : shape_.steps, head_bytes = steps * kStepBytes;
    const uint8_t* keys[kKeys];
    for (int k = 0; k < kKeys; ++k) keys[k] = keys_.group(block.group + k);
    constexpr int kCount = kKeys * kHeads;
    tile_zero<0>();
    if constexpr (kCount > 1) tile_zero<1>();
    if constexpr (kCount > 2) tile_zero<2>();
    if constexpr (kCount > 3) tile_zero<3>();
    IndexRing::Run ahead = keys_.claim(quota_, limit_);
    float (*products)[kTileRows * kTileRows] = products_[turn_];
    const auto finish_products = [&]() __attribute__((always_inline)) {
      tile_store<0>(products[0], kTileBytes);
      if constexpr (kCount > 1) tile_store<1>(products[1], kTileBytes);
      if constexpr (kCount > 2) tile_store<2>(products[2], kTileBytes);
      if constexpr (kCount > 3) tile_store<3>(products[3], kTileBytes);
    };
    if constexpr (kSteps > 0) {
      constexpr int kQuads = 4 * kKeys / kSteps;
      const int64_t share = (ahead.count + kSteps - 1) / kSteps;
#pragma GCC unroll 4
      for (int s = 0; s < kSteps; ++s) {
        dot<kKeys, kHeads>(keys, s * kStepBytes, block.query + s * kStepBytes, head_bytes);
        if (s == kSteps - 1) finish_products();
        if (ahead.count > 0) keys_.decode(&ahead, share);
        if (pending_ == 0) continue;
#pragma GCC unroll 8
        for (int quad = s * kQuads; quad < (s + 1) * kQuads; ++quad) sum<kHeads>(before, quad);
      }
    } else {
      for (int64_t s = 0; s < steps; ++s) {
        dot<kKeys, kHeads>(keys, s * kStepBytes, block.query + s * kStepBytes, head_bytes);
      }
      finish_products();
      keys_.decode(&ahead, ahead.count);
      for (int quad = 0; pending_ != 0 && quad < 4 * kKeys; ++quad) sum<kHeads>(before, quad);
    }
    if (pending_ != 0) add<kKeys>(before);
    pending_ = code<kKeys, kHeads>();
  }

  template <int kKeys, int kHeads>
  static __attribute__((always_inline)) void dot(const uint8_t* const* keys, int64_t at, const uint8_t* query,
                                                 int64_t head_bytes) {
    tile_load<4>(keys[0] + at, kTileBytes);
    tile_load<6>(query, kTileBytes);
    tile_dot<0, 4, 6>();
    if constexpr (kKeys == 1) {
      if constexpr (kHeads > 1) {
        tile_load<7>(query + head_bytes, kTileBytes);
        tile_dot<1, 4, 7>();
      }
      if constexpr (kHeads > 2) {
        tile_load<5>(query + 2 * head_bytes, kTileBytes);
        tile_dot<2, 4, 5>();
      }
      if constexpr (kHeads > 3) {
        tile_load<6>(query + 3 * head_bytes, kTileBytes);
        tile_dot<3, 4, 6>();
      }
    } else if constexpr (kKeys == 2) {
      tile_load<7>(query + head_bytes, kTileBytes);
      tile_dot<1, 4, 7>();
      tile_load<5>(keys[1] + at, kTileBytes);
      tile_dot<2, 5, 6>();
      tile_dot<3, 5, 7>();
    } else {
      tile_load<5>(keys[1] + at, kTileBytes);
      tile_dot<1, 5, 6>();
      tile_load<7>(keys[2] + at, kTileBytes);
      tile_dot<2, 7, 6>();
      tile_load<4>(keys[3] + at, kTileBytes);
      tile_dot<3, 4, 6>();
    }
  }

  // relu and weights of four keys, and the sums of their heads in fours: lane 4 l + i of a quad belongs to key i.
  template <int kHeads>
  __attribute__((always_inline)) void sum(const Block& block, int quad) {
    const float* tiles[kHeads];
    for (int t = 0; t < kHeads; ++t) tiles[t] = products_[1 - turn_][quad / 4 * kHeads + t];
    sum<kHeads>(block, tiles, quad);
  }
  template <int kHeads>
  __attribute__((always_inline)) void sum(const Block& block, const float* const* tiles, int quad) {
    const __mmask16 mask = block.last ? last_ : static_cast<__mmask16>(0xFFFF);
    __m512 x[4];
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
#pragma GCC unroll 4
      for (int t = 0; t < kHeads; ++t) {
        const __m512 product = _mm512_load_ps(tiles[t] + (quad % 4 * 4 + i) * kTileRows);
        const __m512 positive = t == kHeads - 1 ? _mm512_maskz_max_ps(mask, _mm512_setzero_ps(), product)
                                                : _mm512_max_ps(_mm512_setzero_ps(), product);
        const __m512 weight = _mm512_load_ps(block.weights + t * kTileRows);
        x[i] = t == 0 ? _mm512_mul_ps(weight, positive) : _mm512_fmadd_ps(weight, positive, x[i]);
      }
    }
    const __m512 ab = _mm512_add_ps(_mm512_unpacklo_ps(x[0], x[1]), _mm512_unpackhi_ps(x[0], x[1]));
    const __m512 cd = _mm512_add_ps(_mm512_unpacklo_ps(x[2], x[3]), _mm512_unpackhi_ps(x[2], x[3]));
    const __m512d low = _mm512_unpacklo_pd(_mm512_castps_pd(ab), _mm512_castps_pd(cd));
    const __m512d high = _mm512_unpackhi_pd(_mm512_castps_pd(ab), _mm512_castps_pd(cd));
    _mm512_store_ps(quads_[quad], _mm512_add_ps(_mm512_castpd_ps(low), _mm512_castpd_ps(high)));
  }

  // The quads of a block to the scores of its keys.
  template <int kKeys>
  __attribute__((always_inline)) void add(const Block& block) {
    for (int k = 0; k < kKeys; ++k) {
      const __m512 a = _mm512_load_ps(quads_[4 * k]), b = _mm512_load_ps(quads_[4 * k + 1]),
                   c = _mm512_load_ps(quads_[4 * k + 2]), d = _mm512_load_ps(quads_[4 * k + 3]);
      const __m512 even = _mm512_shuffle_f32x4(a, b, 0x88), odd = _mm512_shuffle_f32x4(a, b, 0xDD);
      const __m512 more_even = _mm512_shuffle_f32x4(c, d, 0x88), more_odd = _mm512_shuffle_f32x4(c, d, 0xDD);
      if (shape_.columns == 4) {
        store(block, k, 0, _mm512_shuffle_f32x4(even, more_even, 0x88));
        store(block, k, 1, _mm512_shuffle_f32x4(odd, more_odd, 0x88));
        store(block, k, 2, _mm512_shuffle_f32x4(even, more_even, 0xDD));
        store(block, k, 3, _mm512_shuffle_f32x4(odd, more_odd, 0xDD));
        continue;
      }
      const __m512 pairs = _mm512_add_ps(even, odd), more = _mm512_add_ps(more_even, more_odd);
      const __m512 first = _mm512_shuffle_f32x4(pairs, more, 0x88), second = _mm512_shuffle_f32x4(pairs, more, 0xDD);
      if (shape_.columns == 8) {
        store(block, k, 0, first);
        store(block, k, 1, second);
      } else {
        store(block, k, 0, _mm512_add_ps(first, second));
      }
    }
  }
  __attribute__((always_inline)) void store(const Block& block, int key_tile, int64_t row, __m512 score) {
    float* to = block.scores + row * kIndexScores + key_tile * kTileRows;
    if (!block.first) score = _mm512_add_ps(_mm512_load_ps(to), score);
    if (block.last && keys_.scales_scores()) {
      score = _mm512_mul_ps(score, _mm512_load_ps(keys_.scales(block.group + key_tile)));
    }
    _mm512_store_ps(to, score);
  }

  const IndexTopkParams& p_;
  const Shape shape_;
  IndexRing keys_;
  uint8_t* query_;
  float* weights_;
  __mmask16 last_;  // columns of the last tile that have a head
  int64_t first_row_ = 0, quota_ = 0, limit_ = 0;
  bool alone_ = false;    // one set of rows: keys are decoded shortly before they are multiplied
  bool narrow_ = false;   // one row of up to four heads
  bool fetches_ = false;  // run_halves and run_narrow fetch keys
  int pending_ = 0;       // which kind of block waits in products_, 0: none
  int turn_ = 0;
  Block blocks_[2];
  alignas(64) float products_[2][4][kTileRows * kTileRows];
  alignas(64) float quads_[16][16];
};

}  // namespace

int64_t index_topk_workspace_bytes(const IndexTopkParams& p, const Context& context) {
  return IndexCall<Kernel>(p, context).bytes();
}

Status index_topk(const IndexTopkParams& p, const Context& context) { return IndexCall<Kernel>(p, context).run(); }

}  // namespace dsv4::DSV4_AMX_NAMESPACE
