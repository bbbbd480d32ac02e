// What the moe_experts kernels share: which rows each expert gets, how the work is cut, the order of the sums. Tokens
// are taken kMoeTokens at a time, so that scratch memory does not grow with the prompt. A piece of work is some outputs
// of one matrix for rows of one expert. No cut can show in a result, since a kernel's dot product depends on its two
// rows alone.
//
// MoeCall is the driver. Below it, a class of experts, based on MoeRouting, says how the rows of experts are stored and
// multiplied:
//   Experts(const MoeExpertsParams&, const Context&)   takes its memory, `output_` and the slots among it
//   void prepare(WeightFormat, const X* x, int64_t token)   a token's activations as matrices of that format read them
//   int64_t gathers(); void gather(int64_t item)    what else has to be done before the products, in so many items
//   int64_t kDown                                   outputs of a piece of w2; of w1 and w3 they are kMoeOutputs
//   int64_t cut()                                   the groups' rows into parts; how many
//   void gate_up(int64_t slot, int64_t piece, int64_t pieces, int64_t slots)
//   void project_down(the same)                     one of pieces * cut() pieces, with `pieces` to a part, in an
//                                                   order of its own; the slot will have `piece + slots` next
//
// RowExperts is such a class with rows one after another, in groups of kMoeRows, for a kernel of static functions:
//   int64_t row_bytes<X>(WeightFormat, int64_t n)   of n activations as `project` reads them; for multiples of 128 also
//                                                   where the activation of that number begins
//   void prepare<X>(WeightFormat, const X* x, int64_t n, uint8_t* to)   to that form: quantised, but for plain weights
//   int64_t memory(int64_t in)                      scratch memory of `project`, bytes
//   void project<X>(const ExpertMatrix&, int64_t expert, int64_t row, int64_t rows, int64_t in, const uint8_t* const*
//   x,
//                   int64_t count, float* out, uint8_t* memory)
//                                                   out[c * kMoeOutputs + r] of `count` activation rows x[c]; row is a
//                                                   multiple of kMoeOutputs, rows at most that
//   void activate<X>(const float* gate, const float* up, float weight, float limit, int64_t n, X* out)
#pragma once

#include "common/pages.h"
#include "cpu/moe.h"
#include "cpu/moe_map.h"

namespace dsv4 {
namespace {

inline constexpr int64_t kMoeTokens = 2048;    // tokens taken at a time
inline constexpr int64_t kMoeRows = 256;       // activation rows of a group
inline constexpr int64_t kMoeOutputs = 128;    // outputs of a piece; a block of the quantiser
inline constexpr int64_t kMoeShare = 1 << 20;  // products that are worth waking a thread for, some 20 us

// Runs body(slot, item) for every item, each once, on whatever slot is free.
template <class Body>
void moe_spread(const Context& context, int64_t slots, int64_t items, const Body& body) {
  slots = slots < items ? slots : items;
  if (slots <= 1) {
    for (int64_t item = 0; item < items; ++item) body(0, item);
    return;
  }
  int64_t next = 0;
  parallel(context, slots, [&](int64_t begin, int64_t end) {
    for (int64_t slot = begin; slot < end; ++slot) {
      for (;;) {
        const int64_t item = __atomic_fetch_add(&next, 1, __ATOMIC_RELAXED);
        if (item >= items) break;
        body(slot, item);
      }
    }
  });
}

// Which rows each expert gets, the outputs of those rows and their sums: what does not depend on how rows are stored.
template <class X>
class MoeRouting {
 public:
  using Type = X;
  static constexpr int kFormats = 4;

  int64_t bytes() const { return used_; }

 protected:
  MoeRouting(const MoeExpertsParams& p, const Context& context)
      : p_(p),
        context_(context),
        tokens_(p.x.size(0) < kMoeTokens ? p.x.size(0) : kMoeTokens),
        top_k_(p.weights.size(1)),
        hidden_(p.x.size(1)),
        experts_(p.w1.data.size(0)),
        has_shared_(p.shared[0].format != WeightFormat::kNone),
        slots_(context.threads < 1 ? 1 : context.threads) {
    const int64_t inter = p.w1.data.size(1), own = has_shared_ ? p.shared[0].data.size(1) : 0;
    widest_ = inter > own ? inter : own;
    start_ = take<int64_t>(experts_ + 1);
    active_ = take<int64_t>(experts_ + 1);
    order_ = take<int64_t>(tokens_ * top_k_);
    place_ = take<int64_t>(tokens_ * top_k_);
  }

  // Of all experts, the shared one's last.
  int64_t rows() const { return tokens_ * top_k_ + (has_shared_ ? tokens_ : 0); }

  template <class T>
  T* take(int64_t count) {
    uint8_t* at = static_cast<uint8_t*>(p_.workspace.data) + used_;
    used_ += round_up(count * static_cast<int64_t>(sizeof(T)), 64);
    return reinterpret_cast<T*>(at);
  }

  // What a thread works with: sums of a piece of two matrices for group_ rows, and memory of the kernel's own.
  struct Slot {
    float *gate, *up;
    uint8_t* rest;
  };
  void take_slots(int64_t group, int64_t rest) {
    group_ = group;
    slot_bytes_ = 2 * sums_bytes() + rest;
    slot_memory_ = take<uint8_t>(slots_ * slot_bytes_);
  }
  Slot slot(int64_t index) const {
    uint8_t* at = slot_memory_ + index * slot_bytes_;
    return {reinterpret_cast<float*>(at), reinterpret_cast<float*>(at + sums_bytes()), at + 2 * sums_bytes()};
  }

  bool reads_input(WeightFormat format) const {
    return p_.w1.format == format || p_.w3.format == format ||
           (has_shared_ && (p_.shared[0].format == format || p_.shared[1].format == format));
  }

  // What a group of rows is multiplied with; the shared expert is the last group.
  struct Expert {
    const ExpertMatrix *w1, *w3, *w2;
    int64_t index, inter, first, count;  // its rows
    bool shared;
  };
  Expert expert(int64_t group) const {
    if (group == experts_) {
      const ExpertMatrix* s = p_.shared;
      return {s, s + 1, s + 2, 0, s->data.size(1), start_[experts_], count_, true};
    }
    return {&p_.w1, &p_.w3, &p_.w2, group, p_.w1.data.size(1), start_[group], start_[group + 1] - start_[group], false};
  }

  int64_t token_of(const Expert& e, int64_t row) const {
    return e.shared ? e.first - start_[experts_] + row : order_[e.first + row] / top_k_;
  }
  float weight_of(const Expert& e, int64_t row) const {
    if (e.shared) return 1;
    const int64_t pair = order_[e.first + row];
    return *p_.weights.at(first_ + pair / top_k_, pair % top_k_);
  }

  // Threads for the products of the tokens at hand, and for work on each token's row alone.
  int64_t product_slots() const {
    const int64_t products = (count_ * top_k_ + (has_shared_ ? count_ : 0)) * hidden_ * widest_,
                  most = products / kMoeShare;
    return most < slots_ ? most : slots_;
  }
  int64_t row_slots() const {
    const int64_t most = count_ * hidden_ / (kMoeShare / 16);
    return most < slots_ ? most : slots_;
  }

  // Tokens first_ ... first_ + count_ - 1: order_[row] = pair, place_[pair] = row or -1; the groups that have rows.
  void map(int64_t first, int64_t count) {
    first_ = first;
    count_ = count;
    moe_sort(p_.indices, first_, count_, experts_, start_, order_, place_);
    groups_ = 0;
    for (int64_t e = 0; e < experts_; ++e) {
      if (start_[e + 1] > start_[e]) active_[groups_++] = e;
    }
    if (has_shared_) active_[groups_++] = experts_;
  }

  // The sum over a token's experts by ascending index, an index that it has twice by slot: the order of its rows.
  void combine(int64_t token) const {
    X* result = p_.result.template as<X>().at(first_ + token);
    const int64_t* place = place_ + token * top_k_;
    for (int64_t from = 0; from < hidden_; from += kMoeOutputs) {
      const int64_t n = hidden_ - from < kMoeOutputs ? hidden_ - from : kMoeOutputs;
      float sum[kMoeOutputs] = {};
      const auto add = [&](int64_t row) {
        const X* output = output_ + row * hidden_ + from;
        for (int64_t i = 0; i < n; ++i) sum[i] += to_float(output[i]);
      };
      for (int64_t last = -1;;) {
        int64_t next = INT64_MAX;
        for (int64_t k = 0; k < top_k_; ++k) next = place[k] > last && place[k] < next ? place[k] : next;
        if (next == INT64_MAX) break;
        add(next);
        last = next;
      }
      if (has_shared_) add(start_[experts_] + token);
      for (int64_t i = 0; i < n; ++i) result[from + i] = from_float<X>(sum[i]);
    }
  }

  const MoeExpertsParams& p_;
  const Context& context_;
  int64_t tokens_, top_k_, hidden_, experts_;
  bool has_shared_;
  int64_t slots_, widest_ = 0, used_ = 0;
  int64_t *start_, *active_, *order_, *place_;
  X* output_ = nullptr;  // [row][hidden]
  int64_t first_ = 0, count_ = 0, groups_ = 0;
  int64_t group_ = 0;  // rows of an expert that are taken together

 private:
  int64_t sums_bytes() const { return group_ * kMoeOutputs * static_cast<int64_t>(sizeof(float)); }

  int64_t slot_bytes_ = 0;
  uint8_t* slot_memory_ = nullptr;
};

// A call: tokens prepared, gathered, multiplied by their experts' w1 and w3, then w2, and summed.
template <class Experts>
class MoeCall : public Experts {
  using X = typename Experts::Type;
  using Experts::p_, Experts::context_, Experts::tokens_, Experts::hidden_, Experts::widest_;

 public:
  using Experts::Experts;

  Status run() {
    for (int64_t first = 0; first < p_.x.size(0); first += tokens_) {
      const int64_t left = p_.x.size(0) - first;
      some(first, left < tokens_ ? left : tokens_);
    }
    return Status::ok();
  }

 private:
  void some(int64_t first, int64_t count) {
    this->map(first, count);
    const int64_t rows = this->row_slots(), slots = this->product_slots();
    moe_spread(context_, rows, count, [&](int64_t, int64_t token) {
      const X* x = p_.x.template as<const X>().at(first + token);
      for (int format = 0; format < Experts::kFormats; ++format) {
        const auto f = static_cast<WeightFormat>(format);
        if (this->reads_input(f)) this->prepare(f, x, token);
      }
    });
    moe_spread(context_, rows, this->gathers(), [&](int64_t, int64_t item) { this->gather(item); });
    if (const int64_t parts = this->cut(); parts > 0) {
      const int64_t up = (widest_ + kMoeOutputs - 1) / kMoeOutputs,
                    down = (hidden_ + Experts::kDown - 1) / Experts::kDown;
      moe_spread(context_, slots, up * parts,
                 [&](int64_t slot, int64_t piece) { this->gate_up(slot, piece, up, slots); });
      moe_spread(context_, slots, down * parts,
                 [&](int64_t slot, int64_t piece) { this->project_down(slot, piece, down, slots); });
    }
    moe_spread(context_, rows, count, [&](int64_t, int64_t token) { this->combine(token); });
  }
};

template <class Kernel, class X>
class RowExperts : public MoeRouting<X> {
  using Base = MoeRouting<X>;
  using Base::has_shared_, Base::used_, Base::active_, Base::output_;
  using typename Base::Expert;

 public:
  RowExperts(const MoeExpertsParams& p, const Context& context) : Base(p, context) {
    const int64_t rows = this->rows();
    parts_ = this->template take<Part>(this->experts_ + 1 + rows / kMoeRows);
    for (int format = 0; format < kFormats; ++format) {
      const auto f = static_cast<WeightFormat>(format);
      input_bytes_[format] = this->reads_input(f) ? round_up(Kernel::template row_bytes<X>(f, hidden_), 64) : 0;
      input_[format] = this->template take<uint8_t>(tokens_ * input_bytes_[format]);
      const bool down = p.w2.format == f || (has_shared_ && p.shared[2].format == f);
      const int64_t bytes = down ? round_up(Kernel::template row_bytes<X>(f, widest_), 64) : 0;
      inner_bytes_ = bytes > inner_bytes_ ? bytes : inner_bytes_;
    }
    inner_ = this->template take<uint8_t>(rows * inner_bytes_);
    output_ = this->template take<X>(rows * hidden_);
    const int64_t in = hidden_ > widest_ ? hidden_ : widest_, group = rows < kMoeRows ? rows : kMoeRows;
    pointers_ = round_up(group * static_cast<int64_t>(sizeof(void*)), 64);
    this->take_slots(group, kValuesBytes + pointers_ + round_up(Kernel::memory(in), 64));
  }

 protected:
  using Base::kFormats;
  using Base::p_, Base::tokens_, Base::hidden_, Base::widest_, Base::groups_;

  static constexpr int64_t kDown = kMoeOutputs;

  void prepare(WeightFormat format, const X* x, int64_t token) const {
    Kernel::template prepare<X>(format, x, hidden_, input(format, token));
  }
  int64_t gathers() const { return 0; }
  void gather(int64_t) const {}

  // Parts of as many rows as share an expansion of weights, so that an expert of many, as the shared one, is work for
  // every thread.
  int64_t cut() {
    part_count_ = 0;
    for (int64_t i = 0; i < groups_; ++i) {
      const int64_t rows = this->expert(active_[i]).count;
      for (int64_t from = 0; from < rows; from += kMoeRows) parts_[part_count_++] = {active_[i], from};
    }
    return part_count_;
  }

  // One piece of w1 and w3: the inner activations of a part's rows, in the form that w2 reads. Neighbouring pieces
  // belong to different parts, so that every thread meets both long and short ones.
  void gate_up(int64_t slot_index, int64_t piece, int64_t, int64_t) const {
    const Expert e = part(piece % part_count_);
    const int64_t row = piece / part_count_ * kMoeOutputs, left = e.inter - row;
    const int64_t rows = left < kMoeOutputs ? left : kMoeOutputs;
    if (rows <= 0) return;
    const Memory s = memory(slot_index);
    const int64_t offset = Kernel::template row_bytes<X>(e.w2->format, row);
    project_input(s, e, *e.w1, row, rows, s.gate);
    project_input(s, e, *e.w3, row, rows, s.up);
    for (int64_t i = 0; i < e.count; ++i) {
      Kernel::template activate<X>(s.gate + i * kMoeOutputs, s.up + i * kMoeOutputs, this->weight_of(e, i),
                                   p_.swiglu_limit, rows, s.values);
      Kernel::template prepare<X>(e.w2->format, s.values, rows, inner_ + (e.first + i) * inner_bytes_ + offset);
    }
  }

  // One piece of w2.
  void project_down(int64_t slot_index, int64_t piece, int64_t, int64_t) const {
    const Expert e = part(piece % part_count_);
    const int64_t row = piece / part_count_ * kMoeOutputs, left = hidden_ - row;
    const int64_t rows = left < kMoeOutputs ? left : kMoeOutputs;
    const Memory s = memory(slot_index);
    for (int64_t i = 0; i < e.count; ++i) s.rows[i] = inner_ + (e.first + i) * inner_bytes_;
    Kernel::template project<X>(*e.w2, e.index, row, rows, e.inter, s.rows, e.count, s.gate, s.kernel);
    for (int64_t i = 0; i < e.count; ++i) {
      X* to = output_ + (e.first + i) * hidden_ + row;
      const float* outputs = s.gate + i * kMoeOutputs;
      for (int64_t r = 0; r < rows; ++r) to[r] = from_float<X>(outputs[r]);
    }
  }

 private:
  static constexpr int64_t kValuesBytes = kMoeOutputs * static_cast<int64_t>(sizeof(X));

  struct Memory {
    float *gate, *up;
    X* values;
    const uint8_t** rows;
    uint8_t* kernel;
  };
  Memory memory(int64_t slot_index) const {
    const typename Base::Slot s = this->slot(slot_index);
    uint8_t* pointers = s.rest + kValuesBytes;
    return {s.gate, s.up, reinterpret_cast<X*>(s.rest), reinterpret_cast<const uint8_t**>(pointers),
            pointers + pointers_};
  }

  uint8_t* input(WeightFormat format, int64_t token) const {
    return input_[static_cast<int>(format)] + token * input_bytes_[static_cast<int>(format)];
  }

  // Rows of a group from one of them on.
  struct Part {
    int64_t group, from;
  };
  Expert part(int64_t index) const {
    Expert e = this->expert(parts_[index].group);
    e.first += parts_[index].from;
    e.count -= parts_[index].from;
    e.count = e.count < kMoeRows ? e.count : kMoeRows;
    return e;
  }

  // out = the matrix's outputs [row, row + rows) for the expert's rows.
  void project_input(const Memory& s, const Expert& e, const ExpertMatrix& w, int64_t row, int64_t rows,
                     float* out) const {
    for (int64_t i = 0; i < e.count; ++i) s.rows[i] = input(w.format, this->token_of(e, i));
    Kernel::template project<X>(w, e.index, row, rows, hidden_, s.rows, e.count, out, s.kernel);
  }

  Part* parts_;
  int64_t part_count_ = 0, input_bytes_[kFormats] = {}, inner_bytes_ = 0, pointers_ = 0;
  uint8_t *input_[kFormats], *inner_;
};

// The call for activations of either type, with a class of experts for it.
template <template <class> class Experts>
int64_t moe_bytes(const MoeExpertsParams& p, const Context& context) {
  return p.x.dtype == DType::kBFloat16 ? MoeCall<Experts<bf16>>(p, context).bytes()
                                       : MoeCall<Experts<float>>(p, context).bytes();
}

template <template <class> class Experts>
Status moe_run(const MoeExpertsParams& p, const Context& context) {
  return p.x.dtype == DType::kBFloat16 ? MoeCall<Experts<bf16>>(p, context).run()
                                       : MoeCall<Experts<float>>(p, context).run();
}

}  // namespace
}  // namespace dsv4
