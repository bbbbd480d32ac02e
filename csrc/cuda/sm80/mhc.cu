// mhc_post: a thread makes one 16-byte piece of the four new streams. 18 D + 80 B a token (bfloat16), 40 D FLOP: bound
// by bandwidth; below some 500 tokens by launch latency.
//
// mhc_pre, mhc_head: the mixing product (mhc_mix.h: 128 tokens x 1024 of K a block, so that fn is read from L2 once for
// 128 tokens), then its use (mhc_apply.h). The streams are read twice: 18 D + 80 B a token and 256 B a split of partial
// sums, 208 D FLOP; bound by bandwidth on the tensor cores. Up to 64 bfloat16 tokens (mhc_mix_few.h): three blocks
// (mhc_head: one) a split and 16 tokens read all they need, fn's 384 D bytes in all, in one round trip; then latency
// bounds both kernels: 128 tensor-core products one after another in the first, Sinkhorn's divisions in the second.
//
// mhc_post_pre: the first kernel makes the new streams as well, in shared memory, so they are written once and read
// once: 28 D + 160 B a token against 36 D for the two ops.
#include "cuda/sm80/mhc.h"
#include "cuda/sm80/mhc_apply.h"
#include "cuda/sm80/mhc_launch.h"

namespace dsv4::sm80 {

struct PostArguments {
  MhcPostParams post;
  bool vector;
};

namespace {

constexpr int kPostThreads = 256;

// Grid: x over tokens, y over runs of kPostThreads pieces.
template <class X>
DSV4_DEVICE void post(const PostArguments& a) {
  const int64_t token = ptx::block_index_x(), hidden = a.post.streams.size(2);
  const int64_t column = (ptx::block_index_y() * kPostThreads + ptx::thread_index()) * kElements<X>;
  if (column >= hidden) return;
  const auto load = [&](const X* row) { return load_piece(row, column, hidden, a.vector); };
  const TokenPiece old = {load(row_of<X>(a.post.streams, token, 0)), load(row_of<X>(a.post.streams, token, 1)),
                          load(row_of<X>(a.post.streams, token, 2)), load(row_of<X>(a.post.streams, token, 3)),
                          load(row_of<X>(a.post.sublayer, token))};
  PostWeights weights;
  weights.load(a.post, token);
  DSV4_UNROLL
  for (int o = 0; o < kStreams; ++o) {
    const Words4 mixed = mixed_piece<X>(weights, old, o);
    store_piece(row_of<X>(a.post.result, token, o), column, hidden, a.vector, mixed);
  }
}

}  // namespace

DSV4_KERNEL(kPostThreads, 2) sm80_bf16_mhc_post(const PostArguments a) { post<bf16>(a); }
DSV4_KERNEL(kPostThreads, 2) sm80_f32_mhc_post(const PostArguments a) { post<float>(a); }
DSV4_KERNEL(kMixThreads, 2) sm80_bf16_mhc_pre_mix(const MixArguments a) { mix<bf16, kMixes, false>(a); }
DSV4_KERNEL(kMixThreads, 1) sm80_bf16_mhc_post_pre_mix(const MixArguments a) { mix<bf16, kMixes, true>(a); }
DSV4_KERNEL(kMixThreads, 2) sm80_bf16_mhc_head_mix(const MixArguments a) { mix<bf16, kStreams, false>(a); }
DSV4_KERNEL(kMixThreads, 3) sm80_bf16_mhc_pre_mix_few(const MixArguments a) { mix_few<kMixes, false>(a); }
DSV4_KERNEL(kMixThreads, 2) sm80_bf16_mhc_post_pre_mix_few(const MixArguments a) { mix_few<kMixes, true>(a); }
DSV4_KERNEL(kMixThreads, 3) sm80_bf16_mhc_head_mix_few(const MixArguments a) { mix_few<kStreams, false>(a); }
DSV4_KERNEL(kMixThreads, 2) sm80_f32_mhc_pre_mix(const MixArguments a) { mix<float, kMixes, false>(a); }
DSV4_KERNEL(kMixThreads, 2) sm80_f32_mhc_post_pre_mix(const MixArguments a) { mix<float, kMixes, true>(a); }
DSV4_KERNEL(kMixThreads, 2) sm80_f32_mhc_head_mix(const MixArguments a) { mix<float, kStreams, false>(a); }
DSV4_KERNEL(kMixThreads, 2) sm80_bf16_mhc_pre_backward_mix(const MixArguments a) { mix<bf16, kMixes, false, true>(a); }
DSV4_KERNEL(kMixThreads, 2) sm80_bf16_mhc_head_backward_mix(const MixArguments a) {
  mix<bf16, kStreams, false, true>(a);
}
DSV4_KERNEL(kMixThreads, 2) sm80_f32_mhc_pre_backward_mix(const MixArguments a) { mix<float, kMixes, false, true>(a); }
DSV4_KERNEL(kMixThreads, 2) sm80_f32_mhc_head_backward_mix(const MixArguments a) {
  mix<float, kStreams, false, true>(a);
}
DSV4_KERNEL(kApplyThreads, 4) sm80_bf16_mhc_pre_apply(const ApplyArguments a) { apply<bf16, true>(a); }
DSV4_KERNEL(kApplyThreads, 4) sm80_f32_mhc_pre_apply(const ApplyArguments a) { apply<float, true>(a); }
DSV4_KERNEL(kApplyThreads, 4) sm80_bf16_mhc_head_apply(const ApplyArguments a) { apply<bf16, false>(a); }
DSV4_KERNEL(kApplyThreads, 4) sm80_f32_mhc_head_apply(const ApplyArguments a) { apply<float, false>(a); }

namespace {

bool vector_post(const MhcPostParams& p) {
  return in_pieces(p.sublayer) && in_pieces(p.streams) && in_pieces(p.result);
}

// What mhc_pre, mhc_post_pre and mhc_head have in common. apply[0]: bfloat16, [1]: float32.
struct Mixing {
  const char* name;
  MixKernels mix;
  void (*apply[2])(ApplyArguments);
  bool makes_weights;
};

constexpr Mixing kPre = {"mhc_pre",
                         {{sm80_bf16_mhc_pre_mix, sm80_f32_mhc_pre_mix},
                          {kMixSharedBytes<bf16, kMixes, false>, kMixSharedBytes<float, kMixes, false>},
                          sm80_bf16_mhc_pre_mix_few,
                          kMixFewSharedBytes<false>,
                          kFewTiles<kMixes>},
                         {sm80_bf16_mhc_pre_apply, sm80_f32_mhc_pre_apply},
                         true};
constexpr Mixing kPostPre = {"mhc_post_pre",
                             {{sm80_bf16_mhc_post_pre_mix, sm80_f32_mhc_post_pre_mix},
                              {kMixSharedBytes<bf16, kMixes, true>, kMixSharedBytes<float, kMixes, true>},
                              sm80_bf16_mhc_post_pre_mix_few,
                              kMixFewSharedBytes<true>,
                              kFewTiles<kMixes>},
                             {sm80_bf16_mhc_pre_apply, sm80_f32_mhc_pre_apply},
                             true};
constexpr Mixing kHead = {"mhc_head",
                          {{sm80_bf16_mhc_head_mix, sm80_f32_mhc_head_mix},
                           {kMixSharedBytes<bf16, kStreams, false>, kMixSharedBytes<float, kStreams, false>},
                           sm80_bf16_mhc_head_mix_few,
                           kMixFewSharedBytes<false>,
                           kFewTiles<kStreams>},
                          {sm80_bf16_mhc_head_apply, sm80_f32_mhc_head_apply},
                          false};
// For gradients.
constexpr MixKernels kExactMix[2] = {
    {{sm80_bf16_mhc_pre_backward_mix, sm80_f32_mhc_pre_backward_mix},
     {kMixSharedBytes<bf16, kMixes, false, true>, kMixSharedBytes<float, kMixes, false, true>},
     nullptr,
     0,
     0},
    {{sm80_bf16_mhc_head_backward_mix, sm80_f32_mhc_head_backward_mix},
     {kMixSharedBytes<bf16, kStreams, false, true>, kMixSharedBytes<float, kStreams, false, true>},
     nullptr,
     0,
     0}};
static_assert(kMixSharedBytes<bf16, kMixes, true> <= cuda::kMaxSharedBytes);
static_assert(kMixSharedBytes<bf16, kMixes, false, true> <= cuda::kMaxSharedBytes);

// Both kernels on up to kTokensAtOnce tokens at a time.
Status run(const Mixing& mixing, MixArguments mix, ApplyArguments apply, const Workspace& workspace,
           const Context& context) {
  const int64_t tokens = apply.streams.size(0), hidden = apply.streams.size(2);
  const bool wide = apply.streams.dtype == DType::kFloat32;
  if (tokens == 0) return Status::ok();
  if (workspace.bytes < mhc_workspace_bytes(tokens, hidden)) {
    return Status::error("%s: workspace has %lld bytes, needs %lld", mixing.name,
                         static_cast<long long>(workspace.bytes),
                         static_cast<long long>(mhc_workspace_bytes(tokens, hidden)));
  }
  mix.hidden = apply.hidden = hidden;
  mix.partial = static_cast<float*>(workspace.data);
  apply.partial = mix.partial;
  apply.splits = static_cast<int>(splits_of(hidden));
  mix.vector = apply.vector && in_pieces(mix.fn);
  const int64_t trips = ceil_div(hidden, kApplyThreads * (wide ? kElements<float> : kElements<bf16>));
  const int kept_rows = !wide && apply.norm_weight.dtype == DType::kFloat32 ? 3 : 2;  // rounded sums and weights
  const bool keeps = apply.norm_weight.given() && apply_shared_bytes(trips, kept_rows) <= cuda::kMaxSharedBytes;
  apply.kept_trips = keeps ? static_cast<int>(trips) : 0;
  for (int64_t first = 0; first < tokens; first += kTokensAtOnce) {
    const int64_t count = tokens - first < kTokensAtOnce ? tokens - first : kTokensAtOnce;
    mix.first_token = apply.first_token = first;
    mix.end_token = apply.end_token = first + count;
    const Status mixed = launch_mix(mixing.name, mixing.mix, wide, mix, context);
    if (!mixed.is_ok()) return mixed;
    cuda::LaunchShape shape;
    shape.blocks_x = count + (mixing.makes_weights ? ceil_div(count, kCombTokens) : 0);
    shape.threads = kApplyThreads;
    shape.shared_bytes = static_cast<int>(apply_shared_bytes(apply.kept_trips, kept_rows));
    const Status applied = cuda::launch(mixing.name, mixing.apply[wide], shape, context, apply);
    if (!applied.is_ok()) return applied;
  }
  return Status::ok();
}

ApplyArguments apply_arguments(const MhcPreParams& p) {
  ApplyArguments apply = {};
  apply.streams = p.streams;
  apply.mixing = p.mixing;
  apply.norm_weight = p.norm_weight;
  apply.rms_eps = p.rms_eps;
  apply.output = p.input;
  apply.post = p.post;
  apply.comb = p.comb;
  apply.vector = in_pieces(p.streams) && in_pieces(p.input) && aligned(p.norm_weight.data);
  return apply;
}

}  // namespace

int64_t mhc_workspace_bytes(int64_t tokens, int64_t hidden) {
  const int64_t at_once = tokens < kTokensAtOnce ? tokens : kTokensAtOnce;
  return at_once * splits_of(hidden) * kPartialRow * static_cast<int64_t>(sizeof(float));
}

Status launch_exact_mix(const char* name, bool head, bool wide, const MixArguments& mix, const Context& context) {
  return launch_mix(name, kExactMix[head], wide, mix, context);
}

Status mhc_post(const MhcPostParams& p, const Context& context) {
  if (p.streams.size(0) == 0) return Status::ok();
  const bool wide = p.streams.dtype == DType::kFloat32;
  cuda::LaunchShape shape;
  shape.blocks_x = p.streams.size(0);
  shape.blocks_y = ceil_div(p.streams.size(2), kPostThreads * (wide ? kElements<float> : kElements<bf16>));
  shape.threads = kPostThreads;
  const PostArguments arguments = {p, vector_post(p)};
  return cuda::launch("mhc_post", wide ? sm80_f32_mhc_post : sm80_bf16_mhc_post, shape, context, arguments);
}

Status mhc_pre(const MhcPreParams& p, const Context& context) {
  MixArguments mix = {};
  mix.streams = p.streams;
  mix.fn = p.mixing.fn;
  return run(kPre, mix, apply_arguments(p), p.workspace, context);
}

Status mhc_post_pre(const MhcPostPreParams& p, const Context& context) {
  MixArguments mix = {};
  mix.post = p.post;
  mix.fn = p.pre.mixing.fn;
  ApplyArguments apply = apply_arguments(p.pre);
  apply.streams = p.post.result;
  apply.vector = apply.vector && vector_post(p.post);
  return run(kPostPre, mix, apply, p.pre.workspace, context);
}

Status mhc_head(const MhcHeadParams& p, const Context& context) {
  MixArguments mix = {};
  mix.streams = p.streams;
  mix.fn = p.mixing.fn;
  ApplyArguments apply = {};
  apply.streams = p.streams;
  apply.mixing = p.mixing;
  apply.output = p.output;
  apply.vector = in_pieces(p.streams) && in_pieces(p.output);
  return run(kHead, mix, apply, p.workspace, context);
}

}  // namespace dsv4::sm80
