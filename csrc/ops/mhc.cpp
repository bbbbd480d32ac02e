#include "ops/mhc.h"

#include "cpu/mhc.h"
#include "cuda/sm80/mhc.h"
#include "ops/candidates.h"
#include "ops/validate.h"

namespace dsv4 {
namespace {

// The tile kernels multiply bfloat16.
template <class Params>
bool has_bf16_streams(const Params& p) {
  return p.streams.dtype == DType::kBFloat16;
}
bool post_pre_has_bf16_streams(const MhcPostPreParams& p) { return has_bf16_streams(p.pre); }

constexpr Candidate<MhcPostParams> kMhcPost[] = {
    {"sm80", Isa::kSm80, DSV4_SM80(sm80::mhc_post)},
    {"avx512", Isa::kAvx512, DSV4_AVX512(avx512::mhc_post)},
    {"avx2", Isa::kAvx2, DSV4_AVX2(avx2::mhc_post)},
    {"scalar", Isa::kScalar, DSV4_SCALAR(scalar::mhc_post)},
};
constexpr Candidate<MhcPreParams> kMhcPre[] = {
    {"sm80", Isa::kSm80, DSV4_SM80(sm80::mhc_pre)},
    {"amx", Isa::kAmx, DSV4_AMX(amx::mhc_pre), has_bf16_streams<MhcPreParams>},
    {"avx512", Isa::kAvx512, DSV4_AVX512(avx512::mhc_pre)},
    {"avx2", Isa::kAvx2, DSV4_AVX2(avx2::mhc_pre)},
    {"scalar", Isa::kScalar, DSV4_SCALAR(scalar::mhc_pre)},
};
constexpr Candidate<MhcPostPreParams> kMhcPostPre[] = {
    {"sm80", Isa::kSm80, DSV4_SM80(sm80::mhc_post_pre)},
    {"amx", Isa::kAmx, DSV4_AMX(amx::mhc_post_pre), post_pre_has_bf16_streams},
    {"avx512", Isa::kAvx512, DSV4_AVX512(avx512::mhc_post_pre)},
    {"avx2", Isa::kAvx2, DSV4_AVX2(avx2::mhc_post_pre)},
    {"scalar", Isa::kScalar, DSV4_SCALAR(scalar::mhc_post_pre)},
};
constexpr Candidate<MhcHeadParams> kMhcHead[] = {
    {"sm80", Isa::kSm80, DSV4_SM80(sm80::mhc_head)},
    {"amx", Isa::kAmx, DSV4_AMX(amx::mhc_head), has_bf16_streams<MhcHeadParams>},
    {"avx512", Isa::kAvx512, DSV4_AVX512(avx512::mhc_head)},
    {"avx2", Isa::kAvx2, DSV4_AVX2(avx2::mhc_head)},
    {"scalar", Isa::kScalar, DSV4_SCALAR(scalar::mhc_head)},
};
constexpr Candidate<MhcPreBackwardParams> kMhcPreBackward[] = {
    {"sm80", Isa::kSm80, DSV4_SM80(sm80::mhc_pre_backward)},
    {"amx", Isa::kAmx, DSV4_AMX(amx::mhc_pre_backward), has_bf16_streams<MhcPreBackwardParams>},
    {"avx512", Isa::kAvx512, DSV4_AVX512(avx512::mhc_pre_backward)},
    {"avx2", Isa::kAvx2, DSV4_AVX2(avx2::mhc_pre_backward)},
    {"scalar", Isa::kScalar, DSV4_SCALAR(scalar::mhc_pre_backward)},
};
constexpr Candidate<MhcPostBackwardParams> kMhcPostBackward[] = {
    {"sm80", Isa::kSm80, DSV4_SM80(sm80::mhc_post_backward)},
    {"avx512", Isa::kAvx512, DSV4_AVX512(avx512::mhc_post_backward)},
    {"avx2", Isa::kAvx2, DSV4_AVX2(avx2::mhc_post_backward)},
    {"scalar", Isa::kScalar, DSV4_SCALAR(scalar::mhc_post_backward)},
};
constexpr Candidate<MhcHeadBackwardParams> kMhcHeadBackward[] = {
    {"sm80", Isa::kSm80, DSV4_SM80(sm80::mhc_head_backward)},
    {"amx", Isa::kAmx, DSV4_AMX(amx::mhc_head_backward), has_bf16_streams<MhcHeadBackwardParams>},
    {"avx512", Isa::kAvx512, DSV4_AVX512(avx512::mhc_head_backward)},
    {"avx2", Isa::kAvx2, DSV4_AVX2(avx2::mhc_head_backward)},
    {"scalar", Isa::kScalar, DSV4_SCALAR(scalar::mhc_head_backward)},
};
const Op mhc_post_op("mhc_post", kMhcPost);
const Op mhc_pre_op("mhc_pre", kMhcPre);
const Op mhc_post_pre_op("mhc_post_pre", kMhcPostPre);
const Op mhc_head_op("mhc_head", kMhcHead);
const Op mhc_pre_backward_op("mhc_pre_backward", kMhcPreBackward);
const Op mhc_post_backward_op("mhc_post_backward", kMhcPostBackward);
const Op mhc_head_backward_op("mhc_head_backward", kMhcHeadBackward);

void validate_streams(Validator& v, const AnyView<3>& streams) {
  v.floats("streams", streams, {Validator::kAny, kStreams, Validator::kAny});
  v.at_least("hidden", streams.size(2), 1);
}

void validate_mixing(Validator& v, const MhcMixing& mixing, int64_t hidden, bool head) {
  const int64_t mixes = head ? kStreams : kMixes;
  v.view("fn", mixing.fn, {mixes, kStreams * hidden});
  v.view("scale", mixing.scale, {head ? 1 : 3});
  v.view("base", mixing.base, {mixes});
  v.not_negative("norm_eps", mixing.norm_eps);
  v.not_negative("hc_eps", mixing.hc_eps);
  if (head) return;
  const int64_t iterations = mixing.sinkhorn_iterations;
  v.require(iterations >= 1 && iterations <= kMostSinkhornIterations,
            "sinkhorn_iterations must be from 1 to %d, got %lld", kMostSinkhornIterations,
            static_cast<long long>(iterations));
}

void validate_norm(Validator& v, const AnyView<1>& weight, float eps, int64_t hidden, DType x) {
  if (weight.given()) {
    v.view("norm_weight", weight, weight.dtype == DType::kFloat32 ? DType::kFloat32 : x, {hidden});
  }
  v.not_negative("rms_eps", eps);
}

void validate_post(Validator& v, const MhcPostParams& p) {
  validate_streams(v, p.streams);
  const int64_t tokens = p.streams.size(0), hidden = p.streams.size(2);
  v.view("sublayer", p.sublayer, p.streams.dtype, {tokens, hidden});
  v.view("post", p.post, {tokens, kStreams});
  v.view("comb", p.comb, {tokens, kStreams, kStreams}, 2);
  v.view("result", p.result, p.streams.dtype, {tokens, kStreams, hidden});
}

void validate_pre(Validator& v, const MhcPreParams& p, const Context& context) {
  validate_streams(v, p.streams);
  const int64_t tokens = p.streams.size(0), hidden = p.streams.size(2);
  const DType x = p.streams.dtype;
  validate_mixing(v, p.mixing, hidden, false);
  validate_norm(v, p.norm_weight, p.rms_eps, hidden, x);
  v.view("input", p.input, x, {tokens, hidden});
  v.view("post", p.post, {tokens, kStreams});
  v.view("comb", p.comb, {tokens, kStreams, kStreams}, 2);
  if (!v.status().is_ok()) return;
  v.workspace(p.workspace.data, p.workspace.bytes, mhc_pre_workspace_bytes(tokens, hidden, x, context));
}

Status validate(const MhcPostParams& p) {
  Validator v("mhc_post");
  validate_post(v, p);
  return v.status();
}

Status validate(const MhcPreParams& p, const Context& context) {
  Validator v("mhc_pre");
  validate_pre(v, p, context);
  return v.status();
}

Status validate(const MhcPostPreParams& p, const Context& context) {
  Validator v("mhc_post_pre");
  validate_post(v, p.post);
  const AnyView<3>&made = p.post.result, &read = p.pre.streams;
  v.require(made.data == read.data && made.stride[0] == read.stride[0] && made.stride[1] == read.stride[1],
            "the streams of pre must be the result of post");
  v.view("streams", read, made.dtype, {made.size(0), kStreams, made.size(2)});
  validate_pre(v, p.pre, context);
  return v.status();
}

Status validate(const MhcHeadParams& p, const Context& context) {
  Validator v("mhc_head");
  validate_streams(v, p.streams);
  const int64_t tokens = p.streams.size(0), hidden = p.streams.size(2);
  validate_mixing(v, p.mixing, hidden, true);
  v.view("output", p.output, p.streams.dtype, {tokens, hidden});
  if (!v.status().is_ok()) return v.status();
  v.workspace(p.workspace.data, p.workspace.bytes, mhc_head_workspace_bytes(tokens, hidden, p.streams.dtype, context));
  return v.status();
}

Status validate(const MhcPostBackwardParams& p) {
  Validator v("mhc_post_backward");
  validate_streams(v, p.streams);
  const int64_t tokens = p.streams.size(0), hidden = p.streams.size(2);
  const DType x = p.streams.dtype;
  v.view("grad_result", p.grad_result, x, {tokens, kStreams, hidden});
  v.view("sublayer", p.sublayer, x, {tokens, hidden});
  v.view("post", p.post, {tokens, kStreams});
  v.view("comb", p.comb, {tokens, kStreams, kStreams}, 2);
  v.view("grad_sublayer", p.grad_sublayer, x, {tokens, hidden});
  v.view("grad_streams", p.grad_streams, x, {tokens, kStreams, hidden});
  v.view("grad_post", p.grad_post, {tokens, kStreams});
  v.view("grad_comb", p.grad_comb, {tokens, kStreams, kStreams}, 2);
  return v.status();
}

Status validate(const MhcPreBackwardParams& p, const Context& context) {
  Validator v("mhc_pre_backward");
  validate_streams(v, p.streams);
  const int64_t tokens = p.streams.size(0), hidden = p.streams.size(2);
  const DType x = p.streams.dtype;
  v.view("grad_input", p.grad_input, x, {tokens, hidden});
  v.view("grad_post", p.grad_post, {tokens, kStreams});
  v.view("grad_comb", p.grad_comb, {tokens, kStreams, kStreams}, 2);
  if (p.grad_residual.given()) v.view("grad_residual", p.grad_residual, x, {tokens, kStreams, hidden});
  validate_mixing(v, p.mixing, hidden, false);
  validate_norm(v, p.norm_weight, p.rms_eps, hidden, x);
  v.view("grad_streams", p.grad_streams, x, {tokens, kStreams, hidden});
  if (p.grad_fn.given()) v.view("grad_fn", p.grad_fn, {kMixes, kStreams * hidden});
  v.view("grad_scale", p.grad_scale, {3});
  v.view("grad_base", p.grad_base, {kMixes});
  if (p.norm_weight.given()) v.view("grad_norm_weight", p.grad_norm_weight, {hidden});
  if (!v.status().is_ok()) return v.status();
  v.workspace(p.workspace.data, p.workspace.bytes, mhc_pre_backward_workspace_bytes(tokens, hidden, x, context));
  return v.status();
}

Status validate(const MhcHeadBackwardParams& p, const Context& context) {
  Validator v("mhc_head_backward");
  validate_streams(v, p.streams);
  const int64_t tokens = p.streams.size(0), hidden = p.streams.size(2);
  const DType x = p.streams.dtype;
  v.view("grad_output", p.grad_output, x, {tokens, hidden});
  validate_mixing(v, p.mixing, hidden, true);
  v.view("grad_streams", p.grad_streams, x, {tokens, kStreams, hidden});
  if (p.grad_fn.given()) v.view("grad_fn", p.grad_fn, {kStreams, kStreams * hidden});
  v.view("grad_scale", p.grad_scale, {1});
  v.view("grad_base", p.grad_base, {kStreams});
  if (!v.status().is_ok()) return v.status();
  v.workspace(p.workspace.data, p.workspace.bytes, mhc_head_backward_workspace_bytes(tokens, hidden, x, context));
  return v.status();
}

// The largest need of the implementations that this library may choose: which one runs is the candidate list's
// business.
int64_t forward_workspace(int64_t tokens, int64_t hidden, int mixes, const Context& context) {
  int64_t bytes = 0;
  const auto at_least = [&](int64_t needed) { bytes = needed > bytes ? needed : bytes; };
  if (context.device == Device::kCuda) {
#if defined(DSV4_WITH_SM80)
    at_least(sm80::mhc_workspace_bytes(tokens, hidden));
#endif
    return bytes;
  }
  (void)tokens, (void)mixes;
#if defined(DSV4_WITH_AVX2)
  if (context.best >= Isa::kAvx2) at_least(avx2::mhc_workspace_bytes(tokens, context));
#endif
#if defined(DSV4_WITH_AVX512)
  if (context.best >= Isa::kAvx512) at_least(avx512::mhc_workspace_bytes(hidden, mixes));
#endif
#if defined(DSV4_WITH_AMX)
  if (context.best >= Isa::kAmx) at_least(amx::mhc_workspace_bytes(hidden, mixes));
#endif
  return bytes;
}

int64_t backward_workspace(int64_t tokens, int64_t hidden, DType x, int mixes, const Context& context) {
#if defined(DSV4_WITH_SM80)
  if (context.device == Device::kCuda) {
    return sm80::mhc_backward_workspace_bytes(tokens, hidden, x, mixes == kStreams);
  }
#endif
  int64_t bytes = tokens * static_cast<int64_t>(sizeof(MhcTokenGradient));
  const auto at_least = [&](int64_t needed) { bytes = needed > bytes ? needed : bytes; };
  (void)hidden, (void)x, (void)mixes, (void)context, (void)at_least;
#if defined(DSV4_WITH_AVX2)
  if (context.best >= Isa::kAvx2) at_least(avx2::mhc_backward_bytes(tokens, hidden, context));
#endif
#if defined(DSV4_WITH_AVX512)
  if (context.best >= Isa::kAvx512) at_least(avx512::mhc_backward_bytes(tokens, hidden, mixes, context));
#endif
#if defined(DSV4_WITH_AMX)
  if (context.best >= Isa::kAmx) at_least(amx::mhc_backward_bytes(tokens, hidden, mixes, context));
#endif
  return bytes;
}

}  // namespace

int64_t mhc_pre_workspace_bytes(int64_t tokens, int64_t hidden, DType x, const Context& context) {
  int64_t bytes = forward_workspace(tokens, hidden, kMixes, context);
#if defined(DSV4_WITH_AVX512)
  if (context.device == Device::kCpu && context.best >= Isa::kAvx512) {
    bytes += avx512::mhc_kept_bytes(tokens, hidden, x, context);
  }
#endif
  (void)x;
  return bytes;
}

int64_t mhc_head_workspace_bytes(int64_t tokens, int64_t hidden, DType, const Context& context) {
  return forward_workspace(tokens, hidden, kStreams, context);
}

int64_t mhc_pre_backward_workspace_bytes(int64_t tokens, int64_t hidden, DType x, const Context& context) {
  return backward_workspace(tokens, hidden, x, kMixes, context);
}

int64_t mhc_head_backward_workspace_bytes(int64_t tokens, int64_t hidden, DType x, const Context& context) {
  return backward_workspace(tokens, hidden, x, kStreams, context);
}

Status mhc_post(const MhcPostParams& p, const Context& c) { return mhc_post_op.run(validate(p), p, c); }
Status mhc_pre(const MhcPreParams& p, const Context& c) { return mhc_pre_op.run(validate(p, c), p, c); }
Status mhc_post_pre(const MhcPostPreParams& p, const Context& c) { return mhc_post_pre_op.run(validate(p, c), p, c); }
Status mhc_head(const MhcHeadParams& p, const Context& c) { return mhc_head_op.run(validate(p, c), p, c); }
Status mhc_pre_backward(const MhcPreBackwardParams& p, const Context& c) {
  return mhc_pre_backward_op.run(validate(p, c), p, c);
}
Status mhc_post_backward(const MhcPostBackwardParams& p, const Context& c) {
  return mhc_post_backward_op.run(validate(p), p, c);
}
Status mhc_head_backward(const MhcHeadBackwardParams& p, const Context& c) {
  return mhc_head_backward_op.run(validate(p, c), p, c);
}

}  // namespace dsv4
