// The experts in AMX tiles, weights as the left operand (amx/moe_product.h), and the gate of bfloat16. Rows of
// activations lie as a tile's right operand wants them, 16 rows of an expert side by side: a token's row is prepared
// once and gathered once for each of its experts, and what w1 and w3 give is already in that form for w2
// (amx/moe_rows.h). Plain matrices of float32 are the AVX-512 kernel's.
//
// Measured on one core of Emerald Rapids (2.65 TFLOP/s in tiles, reads at 16 to 18 GB/s), FP4 weights, 4096 inputs: 512
// weights that come from a cache take 51 to 54 cycles with up to 8 rows, 57 with 16, 71 with 32, of which expanding
// alone is 43; from memory a call of 1 or 8 tokens reads 10 to 12 GB/s, plain weights 16 to 17. Products alone run at
// 38 % of the tile peak with 48 rows, 55 % with 192, a call of 512 tokens at 38 %. With 192 rows 512 weights take 360
// cycles: products 239, expanding 70, sums that come and go 43, activations from the second-level cache 40, a little of
// it at once. The activation, outputs brought back to rows and the gathering are 12 % of a call.
#include "cpu/moe.h"

#include "cpu/amx/moe_rows.h"
#include "cpu/avx512/gate_scores.h"
#include "cpu/moe_gate.h"

namespace dsv4::DSV4_AMX_NAMESPACE {
namespace {

constexpr int64_t kGroup = 512;  // rows of an expert whose sums wait in memory

template <class X>
class TileExperts : public MoeRouting<X> {
  using Base = MoeRouting<X>;
  using Base::expert, Base::top_k_, Base::has_shared_, Base::active_, Base::output_, Base::group_;
  using typename Base::Expert, typename Base::Slot;

 public:
  TileExperts(const MoeExpertsParams& p, const Context& context) : Base(p, context) {
    const int64_t rows = this->rows(), width = moe_row_bytes(hidden_);
    for (int f = 0; f < kFormats; ++f) {
      const bool read = this->reads_input(static_cast<WeightFormat>(f));
      prepared_[f] = this->template take<uint8_t>(read ? tokens_ * width : 0);
      if (read) input_order(static_cast<WeightFormat>(f), order_[f]);
    }
    input_order(p.w2.format, order_[static_cast<int>(p.w2.format)]);
    input_order(p.shared[2].format, order_[static_cast<int>(p.shared[2].format)]);
    // Outputs take the place of the gathered rows, which are not read any more by then.
    int64_t bytes = 0, at[2][kFormats] = {};
    for (int shared = 0; shared < (has_shared_ ? 2 : 1); ++shared) {
      const ExpertMatrix* w[2] = {shared ? &p.shared[0] : &p.w1, shared ? &p.shared[1] : &p.w3};
      for (int i = 0; i < (w[0]->format == w[1]->format ? 1 : 2); ++i) {
        at[shared][static_cast<int>(w[i]->format)] = bytes;
        bytes += (shared ? tokens_ : tokens_ * top_k_) * width + kTileBytes;
      }
    }
    const int64_t outputs = rows * hidden_ * static_cast<int64_t>(sizeof(X));
    uint8_t* gathered = this->template take<uint8_t>(bytes > outputs ? bytes : outputs);
    output_ = reinterpret_cast<X*>(gathered);
    for (int shared = 0; shared < 2; ++shared) {
      for (int f = 0; f < kFormats; ++f) gathered_[shared][f] = gathered + at[shared][f];
    }
    inner_ = this->template take<uint8_t>(rows * moe_row_bytes(widest_) + kTileBytes);
    this->take_slots(rows < kGroup ? round_up(rows, kSide) : kGroup,
                     round_up(TileProduct<Fp4Tiles>::memory(hidden_ > widest_ ? hidden_ : widest_), 64));
  }

 protected:
  using Base::kFormats;
  using Base::p_, Base::tokens_, Base::hidden_, Base::widest_, Base::groups_;

  static constexpr int64_t kDown = kStrips * kMoeOutputs;  // two strips

  void prepare(WeightFormat format, const X* x, int64_t token) const {
    prepare_row(format, x, hidden_, prepared(static_cast<int>(format), token));
  }

  int64_t gathers() const {
    int64_t units = 0;
    for (int64_t i = 0; i < groups_; ++i) units += (expert(active_[i]).count + kUnit - 1) / kUnit;
    return units;
  }

  // The unit of that number, counted over all experts.
  void gather(int64_t unit) const {
    int64_t group = 0;
    for (;; ++group) {
      const int64_t units = (expert(active_[group]).count + kUnit - 1) / kUnit;
      if (unit < units) break;
      unit -= units;
    }
    const Expert e = expert(active_[group]);
    const int64_t first = unit * kUnit, count = e.count - first < kUnit ? e.count - first : kUnit;
    for (int i = 0; i < (e.w1->format == e.w3->format ? 1 : 2); ++i) {
      const WeightFormat format = i == 0 ? e.w1->format : e.w3->format;
      const bf16* rows[kUnit];
      for (int64_t m = 0; m < count; ++m) rows[m] = prepared(static_cast<int>(format), this->token_of(e, first + m));
      gather_unit(rows, count, hidden_, reinterpret_cast<bf16*>(gathered(e, format) + first * moe_row_bytes(hidden_)));
    }
  }

  int64_t cut() const { return groups_; }

  // One piece of w1 and w3: the inner activations of all rows of the expert, in the form that w2 reads.
  void gate_up(int64_t slot_index, int64_t piece, int64_t pieces, int64_t slots) const {
    const Expert e = piece_expert(piece, pieces), later = piece_expert(piece + slots, pieces);
    const int64_t row = piece % pieces * kMoeOutputs, left = e.inter - row;
    const int64_t rows = left < kMoeOutputs ? left : kMoeOutputs;
    if (rows <= 0) return;
    const Slot s = this->slot(slot_index);
    const int64_t later_row = (piece + slots) % pieces * kMoeOutputs;
    const uint8_t* codes = row_codes(*later.w1, later.index, later_row);
    const uint8_t* scales[] = {row_scales(*later.w1, later.index, later_row),
                               row_scales(*later.w3, later.index, later_row)};
    const int64_t width = moe_row_bytes(hidden_), part = part_of(e);
    for (int64_t from = 0; from < e.count; from += part) {
      const int64_t count = e.count - from < part ? e.count - from : part;
      configure_tiles(count);
      const Strip strips[] = {{e.w1, row, rows, s.gate}, {e.w3, row, rows, s.up}};
      const ExpertRows x1{gathered(e, e.w1->format) + from * width, width, count};
      if (e.w1->format == e.w3->format) {
        project(e, hidden_, x1, strips, 2, s.rest, {codes, {scales[0], scales[1]}});
      } else {
        const ExpertRows x3{gathered(e, e.w3->format) + from * width, width, count};
        project(e, hidden_, x1, strips, 1, s.rest, {row_codes(*e.w3, e.index, row), {scales[0]}});
        project(e, hidden_, x3, strips + 1, 1, s.rest, {codes, {scales[1]}});
      }
      tile_release();
      for (int64_t m = 0; m < count; m += kUnit) {
        const int64_t some = count - m < kUnit ? count - m : kUnit;
        float weights[kUnit];
        for (int64_t i = 0; i < some; ++i) weights[i] = this->weight_of(e, from + m + i);
        bf16* to = reinterpret_cast<bf16*>(inner(e, from + m)) + row * some;
        activate_unit<X>(sums_of_unit(s.gate, m / kUnit), sums_of_unit(s.up, m / kUnit), weights, some, rows,
                         p_.swiglu_limit, e.w2->format, order_[static_cast<int>(e.w2->format)], to,
                         kUnit * moe_row_bytes(widest_));
      }
    }
  }

  // One piece of w2: two strips.
  void project_down(int64_t slot_index, int64_t piece, int64_t pieces, int64_t slots) const {
    const Expert e = piece_expert(piece, pieces), later = piece_expert(piece + slots, pieces);
    const int64_t row = piece % pieces * kDown, left = hidden_ - row;
    const Slot s = this->slot(slot_index);
    const int64_t later_row = (piece + slots) % pieces * kDown;
    const Later next{
        row_codes(*later.w2, later.index, later_row),
        {row_scales(*later.w2, later.index, later_row), row_scales(*later.w2, later.index, later_row + kMoeOutputs)}};
    const int64_t width = moe_row_bytes(widest_), part = part_of(e);
    const Strip strips[] = {{e.w2, row, left < kMoeOutputs ? left : kMoeOutputs, s.gate},
                            {e.w2, row + kMoeOutputs, left < kDown ? left - kMoeOutputs : kMoeOutputs, s.up}};
    for (int64_t from = 0; from < e.count; from += part) {
      const int64_t count = e.count - from < part ? e.count - from : part;
      configure_tiles(count);
      project(e, e.inter, {inner(e, from), width, count}, strips, 2, s.rest, next);
      tile_release();
      for (const Strip& strip : strips) {
        for (int64_t m = 0; m < count && strip.rows > 0; m += kUnit) {
          put_unit(sums_of_unit(strip.sums, m / kUnit), count - m < kUnit ? count - m : kUnit, strip.rows,
                   output_ + (e.first + from + m) * hidden_ + strip.row, hidden_);
        }
      }
    }
  }

 private:
  bf16* prepared(int format, int64_t token) const {
    return reinterpret_cast<bf16*>(prepared_[format] + token * moe_row_bytes(hidden_));
  }
  uint8_t* gathered(const Expert& e, WeightFormat format) const {
    return gathered_[e.shared][static_cast<int>(format)] + (e.shared ? 0 : e.first * moe_row_bytes(hidden_));
  }
  uint8_t* inner(const Expert& e, int64_t row) const { return inner_ + (e.first + row) * moe_row_bytes(widest_); }

  static void project(const Expert& e, int64_t in, const ExpertRows& x, const Strip* strips, int count, uint8_t* memory,
                      const Later& later) {
    switch (strips[0].w->format) {
      case WeightFormat::kFp8:
        return TileProduct<Fp8Tiles>(e.index, in, x, memory).run(strips, count, later);
      case WeightFormat::kFp4:
        return TileProduct<Fp4Tiles>(e.index, in, x, memory).run(strips, count, later);
      default:
        return TileProduct<PlainTiles>(e.index, in, x, memory).run(strips, count, later);
    }
  }

  // Rows of an expert that are taken together: equal parts, no more than its slot has room for.
  int64_t part_of(const Expert& e) const {
    const int64_t parts = (e.count + group_ - 1) / group_;
    return round_up((e.count + parts - 1) / parts, kSide);
  }
  // What a piece belongs to; beyond the last one, the last. Neighbouring pieces belong to one expert, so that its
  // activations stay in the caches; the shared one, which has the longest, comes first.
  Expert piece_expert(int64_t piece, int64_t pieces) const {
    const int64_t group = groups_ - 1 - piece / pieces;
    return expert(active_[group < 0 ? 0 : group]);
  }

  uint8_t *prepared_[kFormats], *gathered_[2][kFormats], *inner_;
  uint8_t order_[kFormats][kBlock];
};

// The gate of bfloat16: its weights are a plain matrix.
struct Gate {
  static constexpr int64_t kTokens = 64;
  static constexpr int64_t kSumsBytes = kTokens * kMoeOutputs * static_cast<int64_t>(sizeof(float));

  static int64_t memory(const MoeGateParams& p) {
    const int64_t hidden = p.x.size(1);
    return (kTokens + kUnit) * moe_row_bytes(hidden) + kTileBytes + kStrips * kSumsBytes +
           TileProduct<PlainTiles>::memory(hidden);
  }
  static void scores(float* z, int64_t count) { avx512::gate_scores(z, count); }

  static void logits(const MoeGateParams& p, int64_t first, int64_t count, float* z, uint8_t* memory) {
    const int64_t hidden = p.x.size(1), width = moe_row_bytes(hidden), experts = p.weight.size(0);
    uint8_t* prepared = memory + kTokens * width + kTileBytes;
    float* sums = reinterpret_cast<float*>(prepared + kUnit * width);
    uint8_t* product = reinterpret_cast<uint8_t*>(sums) + kStrips * kSumsBytes;
    for (int64_t m = 0; m < count; m += kUnit) {
      const int64_t some = count - m < kUnit ? count - m : kUnit;
      const bf16* rows[kUnit];
      for (int64_t i = 0; i < some; ++i) {
        bf16* row = reinterpret_cast<bf16*>(prepared + i * width);
        prepare_row(WeightFormat::kPlain, p.x.as<const bf16>().at(first + m + i), hidden, row);
        rows[i] = row;
      }
      gather_unit(rows, some, hidden, reinterpret_cast<bf16*>(memory + m * width));
    }
    ExpertMatrix w;
    w.format = WeightFormat::kPlain;
    w.data = {p.weight.data, p.weight.dtype, {1, experts, hidden}, {0, p.weight.stride[0], 1}};
    configure_tiles(count);
    for (int64_t e = 0; e < experts; e += kStrips * kMoeOutputs) {
      Strip strips[kStrips];
      for (int64_t i = 0; i < kStrips; ++i) {
        const int64_t row = e + i * kMoeOutputs, left = experts - row;
        strips[i] = {&w, row, left < kMoeOutputs ? left : kMoeOutputs, sums + i * kTokens * kMoeOutputs};
      }
      TileProduct<PlainTiles>(0, hidden, {memory, width, count}, product)
          .run(strips, kStrips, {row_codes(w, 0, e + kStrips * kMoeOutputs), {}});
      for (const Strip& strip : strips) {
        for (int64_t m = 0; m < count && strip.rows > 0; m += kUnit) {
          put_unit(sums_of_unit(strip.sums, m / kUnit), count - m < kUnit ? count - m : kUnit, strip.rows,
                   z + m * experts + strip.row, experts);
        }
      }
    }
    tile_release();
  }
};

}  // namespace

int64_t moe_gate_workspace_bytes(const MoeGateParams& p, const Context& c) { return GateCall<Gate>(p, c).bytes(); }
Status moe_gate(const MoeGateParams& p, const Context& c) { return GateCall<Gate>(p, c).run(); }

int64_t moe_experts_workspace_bytes(const MoeExpertsParams& p, const Context& c) {
  return moe_bytes<TileExperts>(p, c);
}
Status moe_experts(const MoeExpertsParams& p, const Context& c) { return moe_run<TileExperts>(p, c); }

}  // namespace dsv4::DSV4_AMX_NAMESPACE
