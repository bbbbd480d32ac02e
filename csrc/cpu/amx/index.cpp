// index_topk in AMX tiles: 32 heads x 32 keys in four tiles, 32 dims a step. A tile of the query is 16 heads as they
// lie in memory, one of the keys the panel of 16 keys that the AVX-512 kernel uses, so preparing keys, relu, weights
// and the selection are that kernel's. 2 H D FLOPs a key make 64 tile cycles a key at 64 heads of 128 dims, beside
// about 20 for preparing the key (once for a block of rows) and 10 for relu and weights. The products of one block of
// tiles are added up while the next is multiplied. Expected: 50 % of the tile peak for a single row, 70 % for a block
// of rows.
#include "cpu/index.h"

#include "cpu/amx/tile.h"
#include "cpu/avx512/index_scores.h"

namespace dsv4::DSV4_AMX_NAMESPACE {
namespace {

constexpr int kSide = 2 * kTileRows;  // heads and keys of a block of tiles
constexpr int kStepDims = 32, kStepWords = 16 * kTileRows;

static_assert(avx512::kIndexLanes == kTileRows);

// Products of a block of tiles, and where they belong.
struct Block {
  alignas(64) float products[kSide][kSide];
  int64_t head, key;
  int heads, groups;
};

class Kernel {
 public:
  using Lanes = avx512::IndexLanes;

  static int64_t memory(const IndexTopkParams& p) { return query_bytes(p) + avx512::IndexKeys<bf16>::bytes(p); }

  Kernel(const IndexTopkParams& p, uint8_t* memory)
      : p_(p), keys_(p, memory + query_bytes(p)), whole_(reinterpret_cast<bf16*>(memory)) {}

  void prepare(const IndexKey* keys, int64_t count) { keys_.prepare(keys, count); }
  void expect(const IndexKey* keys, int64_t count) { keys_.expect(keys, count); }

  void score(int64_t row, int64_t count, float* scores) {
    const int64_t heads = p_.query.size(1), dim = p_.query.size(2);
    const bf16* query = p_.query.as<const bf16>().at(row);
    int64_t stride = p_.query.stride[1];
    if (heads % kTileRows != 0) {
      copy(query, stride);
      query = whole_, stride = dim;
    }
    for (int64_t key = 0; key < count; key += kTileRows) _mm512_store_ps(scores + key, _mm512_setzero_ps());
    TileConfig config;
    for (int tile = 0; tile < kTiles; ++tile) config.set(tile, kTileRows, kTileBytes);
    tile_configure(config);
    Block blocks[2];
    int turn = 0;
    bool pending = false;
    for (int64_t key = 0; key < count; key += kSide) {
      keys_.fetch(kSide);
      for (int64_t head = 0; head < heads; head += kSide) {
        Block& block = blocks[turn];
        block.key = key, block.head = head;
        block.heads = static_cast<int>(heads - head < kSide ? heads - head : kSide);
        block.groups = count - key > kTileRows ? 2 : 1;
        multiply(query + head * stride, stride, block);
        if (pending) add(row, blocks[1 - turn], scores);
        pending = true;
        turn = 1 - turn;
      }
    }
    tile_release();
    if (pending) add(row, blocks[1 - turn], scores);
    keys_.scale(count, scores);
  }

  static void offer(Selection<Lanes>& best, const float* scores, const uint16_t* stored, int64_t count, int64_t first) {
    avx512::index_offer(best, scores, stored, count, first);
  }

 private:
  // A copy of a row's query with zeros for the heads that fill the last tile.
  static int64_t query_bytes(const IndexTopkParams& p) {
    const int64_t heads = p.query.size(1);
    return heads % kTileRows == 0 ? 0 : round_up(heads, kTileRows) * p.query.size(2) * 2;
  }
  void copy(const bf16* query, int64_t stride) const {
    const int64_t heads = p_.query.size(1), dim = p_.query.size(2);
    for (int64_t h = 0; h < round_up(heads, kTileRows); ++h) {
      for (int64_t d = 0; d < dim; d += kStepDims) {
        const __m512i dims = h < heads ? _mm512_loadu_si512(query + h * stride + d) : _mm512_setzero_si512();
        _mm512_store_si512(whole_ + h * dim + d, dims);
      }
    }
  }

  void multiply(const bf16* query, int64_t stride, Block& block) const {
    if (block.heads > kTileRows) {
      block.groups == 2 ? multiply<2, 2>(query, stride, block) : multiply<2, 1>(query, stride, block);
    } else {
      block.groups == 2 ? multiply<1, 2>(query, stride, block) : multiply<1, 1>(query, stride, block);
    }
  }

  // Tiles: 0 to 3 products (2 heads + groups), 4 and 5 the query, 6 and 7 the keys.
  template <int kHeads, int kGroups>
  void multiply(const bf16* query, int64_t stride, Block& block) const {
    const uint32_t* first = keys_.group(block.key / kTileRows);
    const uint32_t* second = first + (kGroups == 2 ? keys_.group_elements() : 0);
    const int64_t bytes = 2 * stride, steps = p_.query.size(2) / kStepDims;
    tile_zero<0>();
    if constexpr (kGroups == 2) tile_zero<1>();
    if constexpr (kHeads == 2) tile_zero<2>();
    if constexpr (kHeads == 2 && kGroups == 2) tile_zero<3>();
    for (int64_t s = 0; s < steps; ++s) {
      tile_load<4>(query + s * kStepDims, bytes);
      tile_load<6>(first + s * kStepWords, kTileBytes);
      tile_dot<0, 4, 6>();
      if constexpr (kGroups == 2) {
        tile_load<7>(second + s * kStepWords, kTileBytes);
        tile_dot<1, 4, 7>();
      }
      if constexpr (kHeads == 2) {
        tile_load<5>(query + kTileRows * stride + s * kStepDims, bytes);
        tile_dot<2, 5, 6>();
        if constexpr (kGroups == 2) tile_dot<3, 5, 7>();
      }
    }
    constexpr int64_t kRow = sizeof(block.products[0]);
    tile_store<0>(block.products[0], kRow);
    if constexpr (kGroups == 2) tile_store<1>(block.products[0] + kTileRows, kRow);
    if constexpr (kHeads == 2) tile_store<2>(block.products[kTileRows], kRow);
    if constexpr (kHeads == 2 && kGroups == 2) tile_store<3>(block.products[kTileRows] + kTileRows, kRow);
  }

  // Even and odd heads apart, so that the additions do not wait for one another.
  void add(int64_t row, const Block& block, float* scores) const {
    const float* weights = p_.weights.at(row, block.head);
    for (int group = 0; group < block.groups; ++group) {
      const float* products = block.products[0] + group * kTileRows;
      float* to = scores + block.key + group * kTileRows;
      __m512 even = _mm512_load_ps(to), odd = _mm512_setzero_ps();
      int h = 0;
      for (; h + 2 <= block.heads; h += 2) {
        even = avx512::index_add(even, weights[h], _mm512_load_ps(products + h * kSide));
        odd = avx512::index_add(odd, weights[h + 1], _mm512_load_ps(products + (h + 1) * kSide));
      }
      if (h < block.heads) even = avx512::index_add(even, weights[h], _mm512_load_ps(products + h * kSide));
      _mm512_store_ps(to, _mm512_add_ps(even, odd));
    }
  }

  const IndexTopkParams& p_;
  avx512::IndexKeys<bf16> keys_;
  bf16* whole_;
};

}  // namespace

int64_t index_topk_workspace_bytes(const IndexTopkParams& p, const Context& context) {
  return IndexCall<Kernel>(p, context).bytes();
}

Status index_topk(const IndexTopkParams& p, const Context& context) { return IndexCall<Kernel>(p, context).run(); }

}  // namespace dsv4::DSV4_AMX_NAMESPACE
