// The gradients of mHC with AVX2 and FMA: first blocks of tokens, what stays within one; then the sums over all tokens
// of some columns, in ascending order. Products with fn by cpu/avx2/product.h, those with the products' gradients by
// cpu/avx2/outer.h; what is small beside them is cpu/scalar/mhc_token_gradient.h.
#include "cpu/avx2/mhc_product.h"
#include "cpu/avx2/outer.h"
#include "cpu/scalar/mhc_token_gradient.h"

namespace dsv4::avx2 {
namespace {

using scalar::Mixes;
using scalar::NormGradient;
using scalar::Problem;
using scalar::Weights;

constexpr int64_t kTokenFloats = sizeof(MhcTokenGradient) / sizeof(float);
constexpr int64_t kSteps = 64;    // tokens whose columns are widened together
constexpr int64_t kColumns = 64;  // of a sum over tokens that one thread takes

int64_t slot_bytes(int64_t hidden) {
  return kMhcProductBytes + kOuterRows * round_up(hidden, kOuterColumns) * static_cast<int64_t>(sizeof(float));
}

// Eight elements from d on of a row that has the type of the streams, or of a weight that may be float32.
template <class T>
DSV4_INLINE __m256 norm_weight(const Problem& p, int64_t d, int64_t left) {
  if (p.norm_weight.dtype == DType::kFloat32) return load_some(static_cast<const float*>(p.norm_weight.data) + d, left);
  return load_some(static_cast<const T*>(p.norm_weight.data) + d, left);
}

// sum_i pre[i] * streams[i], rounded to T.
template <class T>
DSV4_INLINE __m256 collapsed(const View<const T, 3>& streams, int64_t token, int64_t d, int64_t left,
                             const float* pre) {
  __m256 sum = _mm256_setzero_ps();
  for (int i = 0; i < kStreams; ++i) {
    sum = _mm256_fmadd_ps(_mm256_set1_ps(pre[i]), load_some(streams.at(token, i, d), left), sum);
  }
  return rounded(sum, static_cast<const T*>(nullptr));
}

// A token's gradients; kMixes: rows of fn.
template <int kRows, class T>
class Tokens {
 public:
  Tokens(const Problem& p, uint8_t* memory)
      : p_(p),
        streams_(p.streams.as<const T>()),
        grad_(p.grad_input.as<const T>()),
        hidden_(p.streams.size(2)),
        memory_(memory),
        inputs_(reinterpret_cast<float*>(memory + kMhcProductBytes)) {}

  // grads[t]: of post and comb.
  void run(int64_t token, int64_t count, float (*grads)[kMixes]) {
    products_.find(streams_, p_.mixing, token, count, memory_);
    for (int64_t t = 0; t < count; t += kOuterRows) {
      const int64_t rows = count - t < kOuterRows ? count - t : kOuterRows;
      for (int64_t i = 0; i < rows; ++i) differentiate(token + t + i, t + i, inputs_ + i * stride(), grads[t + i]);
      for (int stream = 0; stream < kStreams; ++stream) write(token + t, rows, stream);
    }
  }

 private:
  int64_t stride() const { return round_up(hidden_, kOuterColumns); }

  // Token `token`, number t of its block; the gradient of the collapsed streams goes to `input`.
  void differentiate(int64_t token, int64_t t, float* input, float* grad) {
    Mixes mixes = {};
    mixes.rms = products_.rms[t];
    for (int j = 0; j < kRows; ++j) mixes.m[j] = products_.sums[t][j] * mixes.rms;
    const Weights weights =
        kRows == kStreams ? scalar::pre_alone(mixes, p_.mixing) : scalar::weights_of(mixes, p_.mixing);
    const NormGradient norm = norm_gradient(token, weights.pre);
    double dots[kStreams] = {};
    for (int64_t first = 0; first < hidden_; first += kPanelInputs) {
      const int64_t end = hidden_ - first < kPanelInputs ? hidden_ : first + kPanelInputs;
      __m256 sums[kStreams] = {};
      for (int64_t d = first; d < end; d += kLanes) {
        const int64_t left = hidden_ - d;
        __m256 g = load_some(grad_.at(token, d), left);
        if (p_.norm_weight.given()) {
          g = _mm256_mul_ps(_mm256_mul_ps(_mm256_set1_ps(norm.rms), norm_weight<T>(p_, d, left)), g);
          g = _mm256_fnmadd_ps(_mm256_set1_ps(norm.along), collapsed(streams_, token, d, left, weights.pre), g);
        }
        store(input + d, g);
        for (int i = 0; i < kStreams; ++i)
          sums[i] = _mm256_fmadd_ps(g, load_some(streams_.at(token, i, d), left), sums[i]);
      }
      for (int i = 0; i < kStreams; ++i) dots[i] += static_cast<double>(total(sums[i]));
    }
    p_.tokens[token] = scalar::token_gradient(p_, mixes, weights, norm, dots, grad);
  }

  NormGradient norm_gradient(int64_t token, const float* pre) const {
    NormGradient result;
    if (!p_.norm_weight.given()) return result;
    double squares = 0, dot = 0;
    for (int64_t first = 0; first < hidden_; first += kPanelInputs) {
      const int64_t end = hidden_ - first < kPanelInputs ? hidden_ : first + kPanelInputs;
      __m256 square_lanes = _mm256_setzero_ps(), dot_lanes = square_lanes;
      for (int64_t d = first; d < end; d += kLanes) {
        const int64_t left = hidden_ - d;
        const __m256 mixed = collapsed(streams_, token, d, left, pre);
        square_lanes = _mm256_fmadd_ps(mixed, mixed, square_lanes);
        const __m256 weighted = _mm256_mul_ps(norm_weight<T>(p_, d, left), load_some(grad_.at(token, d), left));
        dot_lanes = _mm256_fmadd_ps(mixed, weighted, dot_lanes);
      }
      squares += static_cast<double>(total(square_lanes));
      dot += static_cast<double>(total(dot_lanes));
    }
    const double rms = 1 / std::sqrt(squares / static_cast<double>(hidden_) + static_cast<double>(p_.rms_eps));
    result.rms = static_cast<float>(rms);
    result.along = static_cast<float>(rms * rms * rms * dot / static_cast<double>(hidden_));
    return result;
  }

  // The gradient of one stream of up to kOuterRows tokens.
  void write(int64_t token, int64_t rows, int stream) const {
    for (int64_t d = 0; d < hidden_; d += kOuterColumns) {
      const int64_t width = hidden_ - d < kOuterColumns ? hidden_ - d : kOuterColumns;
      const float* fn = p_.mixing.fn.at(0, stream * hidden_ + d);
      int64_t fn_stride = p_.mixing.fn.stride[0];
      float last[kRows][kOuterColumns];
      if (width < kOuterColumns) {
        for (int j = 0; j < kRows; ++j) widen(fn + j * fn_stride, width, last[j]);
        fn = last[0], fn_stride = kOuterColumns;
      }
      float sums[kOuterRows][kOuterColumns] = {};  // the largest terms come last: they would round the small ones
      add_outer({p_.tokens[token].product, kTokenFloats, 1, fn, fn_stride, kRows}, rows, sums[0], kOuterColumns);
      for (int64_t i = 0; i < rows; ++i) {
        for (int64_t at = 0; at < width; at += kLanes)
          finish(token + i, stream, d + at, inputs_ + i * stride(), sums[i] + at);
      }
    }
  }

  void finish(int64_t token, int stream, int64_t d, const float* input, const float* sums) const {
    const int64_t left = hidden_ - d;
    const MhcTokenGradient& t = p_.tokens[token];
    const __m256 along = _mm256_mul_ps(_mm256_set1_ps(t.along), load_some(streams_.at(token, stream, d), left));
    __m256 sum = _mm256_add_ps(load(sums), _mm256_fmsub_ps(_mm256_set1_ps(t.pre[stream]), load(input + d), along));
    if (p_.grad_residual.given()) {
      sum = _mm256_add_ps(sum, load_some(p_.grad_residual.as<const T>().at(token, stream, d), left));
    }
    store_some(p_.grad_streams.as<T>().at(token, stream, d), sum, left);
  }

  const Problem& p_;
  View<const T, 3> streams_;
  View<const T, 2> grad_;
  int64_t hidden_;
  uint8_t* memory_;
  float* inputs_;  // [kOuterRows][stride()]
  MhcProducts<kRows> products_;
};

// kColumns columns of one stream's part of the gradient of fn.
template <class T>
void fn_columns(const Problem& p, const View<float, 2>& grad_fn, int stream, int64_t column) {
  const auto streams = p.streams.as<const T>();
  const int64_t tokens = streams.size(0), hidden = streams.size(2);
  const int64_t width = hidden - column < kColumns ? hidden - column : kColumns;
  float sums[kMixes][kColumns] = {}, wide[kSteps][kColumns] = {};
  for (int64_t first = 0; first < tokens; first += kSteps) {
    const int64_t steps = tokens - first < kSteps ? tokens - first : kSteps;
    for (int64_t i = 0; i < steps; ++i) widen(streams.at(first + i, stream, column), width, wide[i]);
    for (int64_t j = 0; j < p.mixes; j += kOuterRows) {
      for (int64_t d = 0; d < width; d += kOuterColumns) {
        add_outer({p.tokens[first].product + j, 1, kTokenFloats, wide[0] + d, kColumns, steps}, p.mixes - j,
                  sums[j] + d, kColumns);
      }
    }
  }
  for (int64_t j = 0; j < p.mixes; ++j) narrow(sums[j], width, grad_fn.at(j, stream * hidden + column));
}

template <class T>
void norm_columns(const Problem& p, const View<float, 1>& grad_weight, int64_t d) {
  const auto streams = p.streams.as<const T>();
  const auto grad = p.grad_input.as<const T>();
  const int64_t left = streams.size(2) - d;
  __m256 sum = _mm256_setzero_ps();
  for (int64_t token = 0; token < streams.size(0); ++token) {
    const MhcTokenGradient& t = p.tokens[token];
    const __m256 normed = _mm256_mul_ps(collapsed(streams, token, d, left, t.pre), _mm256_set1_ps(t.rms));
    sum = _mm256_fmadd_ps(load_some(grad.at(token, d), left), normed, sum);
  }
  store_some(grad_weight.at(d), sum, left);
}

int64_t token_bytes(int64_t tokens) { return tokens * static_cast<int64_t>(sizeof(MhcTokenGradient)); }

// set_grads(token, grad): of post and comb.
template <int kRows, class T, class SetGrads>
void backward(const Problem& p, const Context& context, const View<float, 2>& grad_fn, const SetGrads& set_grads) {
  const int64_t tokens = p.streams.size(0), hidden = p.streams.size(2);
  uint8_t* slots = reinterpret_cast<uint8_t*>(p.tokens) + token_bytes(tokens);
  mhc_blocks(tokens, context, [&](int64_t slot, int64_t token, int64_t count) {
    float grads[kMhcTokens][kMixes] = {};
    for (int64_t t = 0; t < count; ++t) set_grads(token + t, grads[t]);
    Tokens<kRows, T>(p, slots + slot * slot_bytes(hidden)).run(token, count, grads);
  });
  if (!grad_fn.given()) return;
  const int64_t pieces = (hidden + kColumns - 1) / kColumns;
  parallel(context, kStreams * pieces, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      fn_columns<T>(p, grad_fn, static_cast<int>(i / pieces), i % pieces * kColumns);
    }
  });
}

template <class T>
void pre_backward(const MhcPreBackwardParams& params, const Context& context) {
  const Problem p{params.grad_input,
                  params.grad_residual,
                  params.streams,
                  params.grad_streams,
                  params.mixing,
                  params.norm_weight,
                  params.rms_eps,
                  kMixes,
                  static_cast<MhcTokenGradient*>(params.workspace.data)};
  backward<kMixes, T>(p, context, params.grad_fn, [&](int64_t token, float* grad) {
    for (int i = 0; i < kStreams; ++i) grad[kStreams + i] = *params.grad_post.at(token, i);
    for (int k = 0; k < kStreams * kStreams; ++k) {
      grad[2 * kStreams + k] = *params.grad_comb.at(token, k / kStreams, k % kStreams);
    }
  });
  if (p.norm_weight.given()) {
    parallel(context, (p.streams.size(2) + kLanes - 1) / kLanes, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) norm_columns<T>(p, params.grad_norm_weight, i * kLanes);
    });
  }
  scalar::small_sums(p, p.streams.size(0), params.grad_scale, params.grad_base);
}

template <class T>
void head_backward(const MhcHeadBackwardParams& params, const Context& context) {
  const Problem p{params.grad_output,
                  {},
                  params.streams,
                  params.grad_streams,
                  params.mixing,
                  {},
                  0,
                  kStreams,
                  static_cast<MhcTokenGradient*>(params.workspace.data)};
  backward<kStreams, T>(p, context, params.grad_fn, [](int64_t, float*) {});
  scalar::small_sums(p, p.streams.size(0), params.grad_scale, params.grad_base);
}

template <class T>
void post_rows_backward(const MhcPostBackwardParams& p, int64_t begin, int64_t end) {
  const auto grad = p.grad_result.as<const T>(), streams = p.streams.as<const T>();
  const auto sublayer = p.sublayer.as<const T>();
  const int64_t hidden = streams.size(2);
  for (int64_t token = begin; token < end; ++token) {
    double post[kStreams] = {}, comb[kStreams][kStreams] = {};
    for (int64_t first = 0; first < hidden; first += kPanelInputs) {
      const int64_t last = hidden - first < kPanelInputs ? hidden : first + kPanelInputs;
      __m256 dots[kStreams] = {};
      for (int64_t d = first; d < last; d += kLanes) {
        const __m256 inner = load_some(sublayer.at(token, d), hidden - d);
        __m256 sum = _mm256_setzero_ps();
        for (int out = 0; out < kStreams; ++out) {
          const __m256 g = load_some(grad.at(token, out, d), hidden - d);
          dots[out] = _mm256_fmadd_ps(g, inner, dots[out]);
          sum = _mm256_fmadd_ps(_mm256_broadcast_ss(p.post.at(token, out)), g, sum);
        }
        store_some(p.grad_sublayer.as<T>().at(token, d), sum, hidden - d);
      }
      for (int out = 0; out < kStreams; ++out) post[out] += static_cast<double>(total(dots[out]));
      for (int in = 0; in < kStreams; ++in) {
        __m256 products[kStreams] = {};
        for (int64_t d = first; d < last; d += kLanes) {
          const __m256 stream = load_some(streams.at(token, in, d), hidden - d);
          __m256 back = _mm256_setzero_ps();
          for (int out = 0; out < kStreams; ++out) {
            const __m256 g = load_some(grad.at(token, out, d), hidden - d);
            products[out] = _mm256_fmadd_ps(g, stream, products[out]);
            back = _mm256_fmadd_ps(_mm256_broadcast_ss(p.comb.at(token, in, out)), g, back);
          }
          store_some(p.grad_streams.as<T>().at(token, in, d), back, hidden - d);
        }
        for (int out = 0; out < kStreams; ++out) comb[in][out] += static_cast<double>(total(products[out]));
      }
    }
    for (int i = 0; i < kStreams; ++i) *p.grad_post.at(token, i) = static_cast<float>(post[i]);
    for (int k = 0; k < kStreams * kStreams; ++k) {
      *p.grad_comb.at(token, k / kStreams, k % kStreams) = static_cast<float>(comb[k / kStreams][k % kStreams]);
    }
  }
}

}  // namespace

int64_t mhc_backward_bytes(int64_t tokens, int64_t hidden, const Context& context) {
  return token_bytes(tokens) + mhc_slots(tokens, context) * slot_bytes(hidden);
}

Status mhc_pre_backward(const MhcPreBackwardParams& params, const Context& context) {
  (params.streams.dtype == DType::kBFloat16 ? pre_backward<bf16> : pre_backward<float>)(params, context);
  return Status::ok();
}

Status mhc_head_backward(const MhcHeadBackwardParams& params, const Context& context) {
  (params.streams.dtype == DType::kBFloat16 ? head_backward<bf16> : head_backward<float>)(params, context);
  return Status::ok();
}

Status mhc_post_backward(const MhcPostBackwardParams& params, const Context& context) {
  const auto rows = params.streams.dtype == DType::kBFloat16 ? post_rows_backward<bf16> : post_rows_backward<float>;
  parallel(context, params.streams.size(0), [&](int64_t begin, int64_t end) { rows(params, begin, end); });
  return Status::ok();
}

}  // namespace dsv4::avx2
