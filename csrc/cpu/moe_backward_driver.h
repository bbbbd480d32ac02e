// What the moe_experts_backward kernels share: which rows each expert gets, how the work is cut, the order of the sums.
// Experts are taken in batches, ascending, so that the inner rows of a batch stay near; a batch goes through three
// stages, each cut by expert and outputs:
//   inner     gate and up once more from x, the gradient of the inner row from grad; of those hidden = silu(gate) * up
//   *
//             weight, grad_gate and grad_up, and each row's part of the gradient of its routing weight
//   matrices  w1: grad_gate^T x, w3: grad_up^T x, w2: grad^T hidden, over the rows of the expert
//   inputs    grad_gate w1 + grad_up w3, added to the tokens' float32 sums, experts ascending
// What a result asks for that is none is left out.
// No cut can show in a result: a kernel's sums depend on their own rows alone, in the order of those.
//
// A kernel has, besides row_bytes and prepare as cpu/moe_driver.h asks for them, for tensors of type X:
//   kOutputs, kColumns, kRows                       of a piece: outputs, and columns; activation rows of a group
//   int64_t product_memory(int64_t inputs)          scratch memory of any of the products, bytes
//   void gate_up<X>(const ExpertMatrix (&w)[2], int64_t expert, int64_t row, int64_t rows, int64_t inputs,
//                   const uint8_t* const* x, int64_t count, float* const (&out)[2], uint8_t* memory)
//       out[i][c * kOutputs + r]: outputs [row, row + rows <= kOutputs) of w[i] for `count` prepared rows x[c], as in
//       the forward pass
//   void accumulate<X>(const MoeRows<const X>& a, int64_t count, int64_t inputs, const X* b, int64_t b_stride,
//                      int64_t n, bool first, const MoeRows<float>& c, uint8_t* memory)
//       the first n <= kOutputs elements of c's rows = (first) or += a b; a [count, inputs], b [inputs, n]
//   void outer<X>(const MoeRows<const X>& a, const MoeRows<const X>& b, int64_t count, int64_t m, int64_t n, X* out,
//                 int64_t out_stride, uint8_t* memory)
//       out [m <= kOutputs, n <= kColumns] = a^T b; a [count, m], b [count, n]
//   float activate_backward<X>(const float* gate, const float* up, const float* grad, float weight, float limit,
//                              int64_t n, const MoeInner<X>& to)
//       returns the sum of grad * silu(gate) * up
#pragma once

#include "cpu/moe_driver.h"

namespace dsv4 {
namespace {

inline constexpr int64_t kMoeColumns = 512;  // of a piece, where a kernel does not say otherwise

// Rows of a matrix, or those that an index names.
template <class T>
struct MoeRows {
  T* data;
  int64_t stride;
  const int64_t* index;  // or null
  T* at(int64_t row) const { return data + (index == nullptr ? row : index[row]) * stride; }
};

// Of one row of an expert.
template <class X>
struct MoeInner {
  X *hidden, *grad_gate, *grad_up;
};

// What kernels share whose products of gate and of up have nothing in common.
template <class Kernel>
struct MoeSingly : Kernel {
  static constexpr int64_t kOutputs = kMoeOutputs, kColumns = kMoeColumns, kRows = kMoeRows;

  template <class X>
  static void gate_up(const ExpertMatrix (&w)[2], int64_t expert, int64_t row, int64_t rows, int64_t inputs,
                      const uint8_t* const* x, int64_t count, float* const (&out)[2], uint8_t* memory) {
    for (int i = 0; i < 2; ++i) {
      Kernel::template project<X>(w[i], expert, row, rows, inputs, x, count, out[i], memory);
    }
  }
};

template <class Kernel, class X>
class MoeBackwardCall {
  static constexpr int64_t kOutputs = Kernel::kOutputs, kColumns = Kernel::kColumns, kRows = Kernel::kRows;

 public:
  MoeBackwardCall(const MoeExpertsBackwardParams& p, const Context& context)
      : p_(p),
        context_(context),
        tokens_(p.x.size(0)),
        top_k_(p.weights.size(1)),
        hidden_(p.x.size(1)),
        experts_(p.matrices[0].size(0)),
        has_shared_(p.shared[0].given()),
        slots_(context.threads < 1 ? 1 : context.threads) {
    const int64_t inter = p.matrices[0].size(1), own = has_shared_ ? p.shared[0].size(1) : 0;
    widest_ = inter > own ? inter : own;
    const int64_t pairs = tokens_ * top_k_, shared = has_shared_ ? tokens_ : 0;
    most_ = larger(pairs, shared);  // rows of a batch: of one group, or few
    most_ = larger(most_, smaller(pairs + shared, slots_ * kRows));
    start_ = take<int64_t>(experts_ + 1);
    order_ = take<int64_t>(pairs);
    token_ = take<int64_t>(pairs);
    input_bytes_ = round_up(Kernel::template row_bytes<X>(WeightFormat::kPlain, hidden_), 64);
    input_ = take<uint8_t>(tokens_ * input_bytes_);
    row_ = round_up(widest_, 32) + 32;  // rows in different sets of the caches
    inner_ = take<X>(most_ * row_ * 3);
    blocks_ = pieces(widest_, kOutputs);
    parts_ = take<float>(most_ * blocks_);
    sums_ = take<float>(kNarrow ? tokens_ * sums_stride() : 0);
    group_ = smaller(most_, kRows);
    memory_bytes_ = round_up(Kernel::product_memory(hidden_), 64);
    slot_bytes_ = 3 * tile_bytes() + round_up(group_ * static_cast<int64_t>(sizeof(void*)), 64) + memory_bytes_;
    slot_memory_ = take<uint8_t>(slots_ * slot_bytes_);
  }

  int64_t bytes() const { return used_; }

  Status run() {
    moe_sort(p_.indices, 0, tokens_, experts_, start_, order_, static_cast<int64_t*>(nullptr));
    for (int64_t row = 0; row < start_[experts_]; ++row) token_[row] = order_[row] / top_k_;
    moe_spread(context_, row_slots(), tokens_, [&](int64_t, int64_t token) { begin(token); });
    const int64_t groups = experts_ + (has_shared_ ? 1 : 0);
    for (int64_t first = 0; first < groups;) {
      int64_t end = first, rows = 0;
      do {
        rows += expert(end++).count;
      } while (end < groups && rows + expert(end).count <= slots_ * kRows);
      batch(first, end - first, rows);
      first = end;
    }
    if (kNarrow && wants_x()) {
      moe_spread(context_, row_slots(), tokens_, [&](int64_t, int64_t token) { finish(token); });
    }
    return Status::ok();
  }

 private:
  static constexpr bool kNarrow = sizeof(X) < sizeof(float);

  bool wants_x() const { return p_.grad_x.given(); }
  bool wants_weights() const { return p_.grad_weights.given(); }

  static int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
  static int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }
  static int64_t pieces(int64_t size, int64_t piece) { return (size + piece - 1) / piece; }
  int64_t tile_bytes() const { return group_ * kOutputs * static_cast<int64_t>(sizeof(float)); }

  template <class T>
  T* take(int64_t count) {
    uint8_t* at = static_cast<uint8_t*>(p_.workspace.data) + used_;
    used_ += round_up(count * static_cast<int64_t>(sizeof(T)), 64);
    return reinterpret_cast<T*>(at);
  }

  // Rows and matrices of an expert; the shared one is the last group.
  struct Expert {
    const AnyView<3>*matrices, *grads;
    int64_t index, inter, first, count;
    bool shared;
  };
  Expert expert(int64_t group) const {
    if (group == experts_) return {p_.shared, p_.grad_shared, 0, p_.shared[0].size(1), start_[experts_], tokens_, true};
    const int64_t first = start_[group];
    return {p_.matrices, p_.grad_matrices, group, p_.matrices[0].size(1), first, start_[group + 1] - first, false};
  }

  // Of the expert's rows from `from` on, those of a tensor of tokens, from column `column` on.
  template <class T>
  MoeRows<T> of_tokens(T* data, int64_t stride, const Expert& e, int64_t from, int64_t column) const {
    if (e.shared) return {data + from * stride + column, stride, nullptr};
    return {data + column, stride, token_ + e.first + from};
  }
  MoeRows<const X> of_tokens(const AnyView<2>& tensor, const Expert& e, int64_t from, int64_t column) const {
    return of_tokens(static_cast<const X*>(tensor.data), tensor.stride[0], e, from, column);
  }

  // The inner rows of a batch: hidden (0), grad_gate (1), grad_up (2).
  X* inner(int64_t row, int kind, int64_t column) const { return inner_ + (row * 3 + kind) * row_ + column; }
  MoeRows<const X> inner_rows(int64_t row, int kind, int64_t column) const {
    return {inner(row, kind, column), 3 * row_, nullptr};
  }

  struct Slot {
    float *gate, *up, *grad;
    const uint8_t** rows;
    uint8_t* memory;
  };
  Slot slot(int64_t index) const {
    uint8_t* at = slot_memory_ + index * slot_bytes_;
    const auto tile = [&](int64_t i) { return reinterpret_cast<float*>(at + i * tile_bytes()); };
    return {tile(0), tile(1), tile(2), reinterpret_cast<const uint8_t**>(at + 3 * tile_bytes()),
            at + slot_bytes_ - memory_bytes_};
  }

  float* sums(int64_t token) const {
    return kNarrow ? sums_ + token * sums_stride() : reinterpret_cast<float*>(p_.grad_x.template as<X>().at(token));
  }
  int64_t sums_stride() const { return kNarrow ? round_up(hidden_, 16) + 16 : p_.grad_x.stride[0]; }

  int64_t row_slots() const { return smaller(tokens_ * hidden_ / (kMoeShare / 16), slots_); }

  void begin(int64_t token) const {
    Kernel::template prepare<X>(WeightFormat::kPlain, p_.x.template as<const X>().at(token), hidden_,
                                input_ + token * input_bytes_);
    if (wants_x()) {
      float* sum = sums(token);
      for (int64_t i = 0; i < hidden_; ++i) sum[i] = 0;
    }
    for (int64_t k = 0; wants_weights() && k < top_k_; ++k) *p_.grad_weights.at(token, k) = 0;
  }

  void finish(int64_t token) const {
    X* to = p_.grad_x.template as<X>().at(token);
    const float* sum = sums(token);
    for (int64_t i = 0; i < hidden_; ++i) to[i] = from_float<X>(sum[i]);
  }

  // Groups [first, first + groups), which have `rows` rows. Neighbouring pieces belong to different experts, so that
  // every thread meets both long and short ones.
  void batch(int64_t first, int64_t groups, int64_t rows) {
    first_row_ = expert(first).first;
    const int64_t most = rows * hidden_ * widest_ * 3 / kMoeShare, slots = smaller(most, slots_);
    const int64_t wide = pieces(hidden_, kColumns), up = blocks_ * wide,
                  down = pieces(hidden_, kOutputs) * pieces(widest_, kColumns);
    if (rows > 0) {
      moe_spread(context_, slots, blocks_ * groups,
                 [&](int64_t s, int64_t i) { inner_piece(slot(s), expert(first + i % groups), i / groups); });
    }
    moe_spread(context_, slots, (2 * up + down) * groups, [&](int64_t s, int64_t i) {
      const Expert e = expert(first + i % groups);
      const int64_t piece = i / groups;
      if (piece < 2 * up) {
        const int kind = piece < up ? 0 : 1;
        up_piece(slot(s), e, kind, piece % up / wide, piece % wide);
      } else {
        const int64_t columns = pieces(widest_, kColumns);
        down_piece(slot(s), e, (piece - 2 * up) / columns, (piece - 2 * up) % columns);
      }
    });
    if (rows > 0 && wants_x()) {
      // Experts follow one another, so narrower pieces are what gives every thread some.
      const int64_t share = larger(pieces(hidden_, 4 * larger(slots, 1)), 1);
      const int64_t width = smaller(kOutputs, round_up(share, kMoeOutputs));
      moe_spread(context_, slots, pieces(hidden_, width), [&](int64_t s, int64_t piece) {
        for (int64_t i = 0; i < groups; ++i) input_piece(slot(s), expert(first + i), piece * width, width);
      });
    }
    for (int64_t i = 0; wants_weights() && i < groups; ++i) grad_weights(expert(first + i));
  }

  // Where the expert's rows lie among those of the batch.
  int64_t place(const Expert& e) const { return e.first - first_row_; }

  // kOutputs inner values of all rows of the expert.
  void inner_piece(const Slot& s, const Expert& e, int64_t block) const {
    const int64_t column = block * kOutputs, n = smaller(e.inter - column, kOutputs);
    if (n <= 0) return;
    const AnyView<3>& w2 = e.matrices[2];
    for (int64_t from = 0; from < e.count; from += group_) {
      const int64_t count = smaller(e.count - from, group_);
      for (int64_t i = 0; i < count; ++i) {
        s.rows[i] = input_ + (e.shared ? from + i : token_[e.first + from + i]) * input_bytes_;
      }
      ExpertMatrix w[2];
      for (int i = 0; i < 2; ++i) w[i].format = WeightFormat::kPlain, w[i].data = e.matrices[i];
      Kernel::template gate_up<X>(w, e.index, column, n, hidden_, s.rows, count, {s.gate, s.up}, s.memory);
      Kernel::template accumulate<X>(of_tokens(p_.grad, e, from, 0), count, hidden_,
                                     w2.as<const X>().at(e.index, 0, column), w2.stride[1], n, true,
                                     MoeRows<float>{s.grad, kOutputs, nullptr}, s.memory);
      for (int64_t i = 0; i < count; ++i) {
        const int64_t row = place(e) + from + i, at = i * kOutputs;
        const MoeInner<X> to{inner(row, 0, column), inner(row, 1, column), inner(row, 2, column)};
        parts_[row * blocks_ + block] = Kernel::template activate_backward<X>(
            s.gate + at, s.up + at, s.grad + at, weight(e, from + i), p_.swiglu_limit, n, to);
      }
    }
  }

  float weight(const Expert& e, int64_t row) const {
    if (e.shared) return 1;
    const int64_t pair = order_[e.first + row];
    return *p_.weights.at(pair / top_k_, pair % top_k_);
  }

  // kOutputs rows and kColumns columns of the gradient of w1 (kind 0) or w3 (1).
  void up_piece(const Slot& s, const Expert& e, int kind, int64_t row_block, int64_t column_block) const {
    const int64_t row = row_block * kOutputs, column = column_block * kColumns;
    outer(s, e, e.grads[kind], inner_rows(place(e), 1 + kind, row), of_tokens(p_.x, e, 0, column), row, e.inter - row,
          column, hidden_ - column);
  }
  // The same of w2.
  void down_piece(const Slot& s, const Expert& e, int64_t row_block, int64_t column_block) const {
    const int64_t row = row_block * kOutputs, column = column_block * kColumns;
    outer(s, e, e.grads[2], of_tokens(p_.grad, e, 0, row), inner_rows(place(e), 0, column), row, hidden_ - row, column,
          e.inter - column);
  }
  void outer(const Slot& s, const Expert& e, const AnyView<3>& to, const MoeRows<const X>& a, const MoeRows<const X>& b,
             int64_t row, int64_t rows, int64_t column, int64_t columns) const {
    if (!to.given()) return;
    if (rows <= 0 || columns <= 0) return;
    Kernel::template outer<X>(a, b, e.count, smaller(rows, kOutputs), smaller(columns, kColumns),
                              to.as<X>().at(e.index, row, column), to.stride[1], s.memory);
  }

  // Some columns, `width` at most, of the sums of all tokens of the expert.
  void input_piece(const Slot& s, const Expert& e, int64_t column, int64_t width) const {
    const int64_t n = smaller(hidden_ - column, width);
    const MoeRows<float> to = of_tokens(sums(0), sums_stride(), e, 0, column);
    for (int kind = 0; kind < 2; ++kind) {
      const AnyView<3>& w = e.matrices[kind];
      Kernel::template accumulate<X>(inner_rows(place(e), 1 + kind, 0), e.count, e.inter,
                                     w.as<const X>().at(e.index, 0, column), w.stride[1], n, false, to, s.memory);
    }
  }

  void grad_weights(const Expert& e) const {
    for (int64_t row = 0; row < (e.shared ? 0 : e.count); ++row) {
      const float* parts = parts_ + (place(e) + row) * blocks_;
      double sum = 0;
      for (int64_t i = 0; i < pieces(e.inter, kOutputs); ++i) sum += parts[i];
      const int64_t pair = order_[e.first + row];
      *p_.grad_weights.at(pair / top_k_, pair % top_k_) = static_cast<float>(sum);
    }
  }

  const MoeExpertsBackwardParams& p_;
  const Context& context_;
  int64_t tokens_, top_k_, hidden_, experts_;
  bool has_shared_;
  int64_t slots_, widest_, most_, used_ = 0;
  int64_t row_, blocks_, group_, input_bytes_, memory_bytes_, slot_bytes_;
  int64_t *start_, *order_, *token_;
  uint8_t *input_, *slot_memory_;
  X* inner_;
  float *parts_, *sums_;
  int64_t first_row_ = 0;  // of the batch among the rows of all experts, the shared one's behind them
};

template <class Kernel>
int64_t moe_backward_bytes(const MoeExpertsBackwardParams& p, const Context& context) {
  return p.x.dtype == DType::kBFloat16 ? MoeBackwardCall<Kernel, bf16>(p, context).bytes()
                                       : MoeBackwardCall<Kernel, float>(p, context).bytes();
}

template <class Kernel>
Status moe_backward_run(const MoeExpertsBackwardParams& p, const Context& context) {
  return p.x.dtype == DType::kBFloat16 ? MoeBackwardCall<Kernel, bf16>(p, context).run()
                                       : MoeBackwardCall<Kernel, float>(p, context).run();
}

}  // namespace
}  // namespace dsv4
