// The gradients of mhc_pre and mhc_head. Four kernels:
//   1. the mixing product again (mhc_mix.h, kExact), 8192 tokens at a time
//   2. what follows within a token (mhc_backward_tokens.h): a block a token, and one for Sinkhorn's chains of 8 tokens
//   3. the streams' gradient and sums over pieces of the tokens (mhc_backward_streams.h): 64 columns of each stream a
//      block, 16 tokens a stage; pieces have 64 to 1024 tokens, so many that some 512 blocks are left
//   4. the sums of the pieces, in ascending order (mhc_backward_sums.h)
// The streams are read three times, their gradient is written once: 44 D bytes a token in bfloat16 with a residual, and
// 384 D bytes a piece twice; some 1,800 D FLOP a token on the tensor cores: bound by bandwidth. Where the gradient of
// fn is none its products run all the same, out of sight of that bound, but those bytes do not move.
#include "cuda/sm80/mhc.h"
#include "cuda/sm80/mhc_backward_streams.h"
#include "cuda/sm80/mhc_backward_sums.h"
#include "cuda/sm80/mhc_launch.h"

namespace dsv4::sm80 {

DSV4_KERNEL(kApplyThreads, 6) sm80_bf16_mhc_pre_backward_tokens(const TokenArguments a) {
  token_gradients<bf16, kMixes>(a);
}
DSV4_KERNEL(kApplyThreads, 6) sm80_f32_mhc_pre_backward_tokens(const TokenArguments a) {
  token_gradients<float, kMixes>(a);
}
DSV4_KERNEL(kApplyThreads, 6) sm80_bf16_mhc_head_backward_tokens(const TokenArguments a) {
  token_gradients<bf16, kStreams>(a);
}
DSV4_KERNEL(kApplyThreads, 6) sm80_f32_mhc_head_backward_tokens(const TokenArguments a) {
  token_gradients<float, kStreams>(a);
}
DSV4_KERNEL(kStreamThreads, 2) sm80_bf16_mhc_pre_backward_streams(const StreamArguments a) {
  stream_gradients<bf16, kMixes>(a);
}
DSV4_KERNEL(kStreamThreads, 2) sm80_f32_mhc_pre_backward_streams(const StreamArguments a) {
  stream_gradients<float, kMixes>(a);
}
DSV4_KERNEL(kStreamThreads, 2) sm80_bf16_mhc_head_backward_streams(const StreamArguments a) {
  stream_gradients<bf16, kStreams>(a);
}
DSV4_KERNEL(kStreamThreads, 2) sm80_f32_mhc_head_backward_streams(const StreamArguments a) {
  stream_gradients<float, kStreams>(a);
}
DSV4_KERNEL(kMhcSumThreads, 4) sm80_f32_mhc_backward_sums(const MhcSumArguments a) { add_pieces(a); }

namespace {

// kernels[0]: bfloat16, [1]: float32.
struct Gradient {
  const char* name;
  int mixes;
  int factor_bytes[2];
  void (*tokens[2])(TokenArguments);
  void (*streams[2])(StreamArguments);
  int stream_bytes[2];
};

constexpr Gradient kPre = {"mhc_pre_backward",
                           kMixes,
                           {Factors<bf16, kMixes>::kBytes, Factors<float, kMixes>::kBytes},
                           {sm80_bf16_mhc_pre_backward_tokens, sm80_f32_mhc_pre_backward_tokens},
                           {sm80_bf16_mhc_pre_backward_streams, sm80_f32_mhc_pre_backward_streams},
                           {kStreamSharedBytes<bf16, kMixes>, kStreamSharedBytes<float, kMixes>}};
constexpr Gradient kHead = {"mhc_head_backward",
                            kStreams,
                            {Factors<bf16, kStreams>::kBytes, Factors<float, kStreams>::kBytes},
                            {sm80_bf16_mhc_head_backward_tokens, sm80_f32_mhc_head_backward_tokens},
                            {sm80_bf16_mhc_head_backward_streams, sm80_f32_mhc_head_backward_streams},
                            {kStreamSharedBytes<bf16, kStreams>, kStreamSharedBytes<float, kStreams>}};
static_assert(kStreamSharedBytes<bf16, kMixes> <= cuda::kMaxSharedBytes);
static_assert(kStreamSharedBytes<float, kMixes> <= cuda::kMaxSharedBytes);

// How the tokens are cut for the sums over them.
struct Pieces {
  int64_t column_blocks, tokens, count;
};

Pieces pieces_of(int64_t tokens, int64_t hidden) {
  constexpr int64_t kBlocks = 512, kFewest = 64, kMost = 1024, kMostPieces = 32768;
  Pieces p = {ceil_div(hidden, kStreamColumns), 0, 0};
  p.tokens = ceil_div(ceil_div(tokens, ceil_div(kBlocks, p.column_blocks)), kStreamTokens) * kStreamTokens;
  p.tokens = p.tokens < kFewest ? kFewest : p.tokens > kMost ? kMost : p.tokens;
  const int64_t fewest = ceil_div(ceil_div(tokens, kMostPieces), kStreamTokens) * kStreamTokens;  // the grid's limit
  p.tokens = p.tokens < fewest ? fewest : p.tokens;
  p.count = ceil_div(tokens, p.tokens);
  return p;
}

// The workspace, every part a multiple of 16 bytes.
struct Memory {
  float *partial, *values, *summed, *fn_sums, *norm_sums, *rest_sums;
  uint8_t* factors;
  int64_t bytes = 0;

  Memory(void* data, int64_t tokens, int64_t hidden, const Gradient& gradient, bool wide) {
    const Pieces pieces = pieces_of(tokens, hidden);
    uint8_t* base = static_cast<uint8_t*>(data);
    const auto take = [&](int64_t count) {
      uint8_t* taken = base == nullptr ? nullptr : base + bytes;
      bytes += count;
      return taken;
    };
    const auto floats = [&](int64_t count) {
      return reinterpret_cast<float*>(take(count * static_cast<int64_t>(sizeof(float))));
    };
    partial = reinterpret_cast<float*>(take(mhc_workspace_bytes(tokens, hidden)));
    factors = take(tokens * gradient.factor_bytes[wide]);
    values = floats(tokens * kTokenValues);
    summed = floats(tokens * kSummed);
    fn_sums = floats(pieces.count * gradient.mixes * kStreams * hidden);
    norm_sums = floats(gradient.mixes == kMixes ? pieces.count * ceil_div(hidden, 4) * 4 : 0);
    rest_sums = floats(pieces.count * kSummed * 2);
  }
};

Status run_tokens(const Gradient& gradient, const MhcPreBackwardParams& p, const Memory& memory,
                  const Context& context) {
  const int64_t tokens = p.streams.size(0), hidden = p.streams.size(2);
  const bool wide = p.streams.dtype == DType::kFloat32;
  MixArguments mix = {};
  mix.streams = p.streams;
  mix.fn = p.mixing.fn;
  mix.partial = memory.partial;
  mix.hidden = hidden;
  mix.vector = in_pieces(p.streams) && in_pieces(p.mixing.fn);
  TokenArguments a = {};
  a.forward.streams = p.streams;
  a.forward.mixing = p.mixing;
  a.forward.norm_weight = p.norm_weight;
  a.forward.rms_eps = p.rms_eps;
  a.forward.partial = memory.partial;
  a.forward.hidden = hidden;
  a.forward.splits = static_cast<int>(splits_of(hidden));
  a.forward.vector = in_pieces(p.streams) && in_pieces(p.grad_input) && aligned(p.norm_weight.data);
  a.grad_input = p.grad_input;
  a.grad_post = p.grad_post;
  a.grad_comb = p.grad_comb;
  a.factors = memory.factors;
  a.values = memory.values;
  a.summed = memory.summed;
  for (int64_t first = 0; first < tokens; first += kTokensAtOnce) {
    const int64_t count = tokens - first < kTokensAtOnce ? tokens - first : kTokensAtOnce;
    mix.first_token = a.forward.first_token = first;
    mix.end_token = a.forward.end_token = first + count;
    const Status mixed = launch_exact_mix(gradient.name, gradient.mixes == kStreams, wide, mix, context);
    if (!mixed.is_ok()) return mixed;
    cuda::LaunchShape shape;
    shape.blocks_x = count + (gradient.mixes == kMixes ? ceil_div(count, kCombTokens) : 0);
    shape.threads = kApplyThreads;
    shape.shared_bytes = gradient.mixes == kMixes ? kTokenSharedBytes : kDotsSharedBytes;
    const Status made = cuda::launch(gradient.name, gradient.tokens[wide], shape, context, a);
    if (!made.is_ok()) return made;
  }
  return Status::ok();
}

Status run_streams(const Gradient& gradient, const MhcPreBackwardParams& p, const Memory& memory,
                   const Context& context) {
  const int64_t tokens = p.streams.size(0), hidden = p.streams.size(2);
  const bool wide = p.streams.dtype == DType::kFloat32;
  const Pieces pieces = pieces_of(tokens, hidden);
  StreamArguments a = {};
  a.grad_input = p.grad_input;
  a.grad_residual = p.grad_residual;
  a.streams = p.streams;
  a.grad_streams = p.grad_streams;
  a.fn = p.mixing.fn;
  a.norm_weight = p.norm_weight;
  a.factors = memory.factors;
  a.values = memory.values;
  a.summed = memory.summed;
  a.fn_sums = p.grad_fn.given() ? memory.fn_sums : nullptr;
  a.norm_sums = memory.norm_sums;
  a.rest_sums = memory.rest_sums;
  a.tokens = tokens;
  a.hidden = hidden;
  a.piece_tokens = pieces.tokens;
  a.column_blocks = pieces.column_blocks;
  a.vector = in_pieces(p.streams) && in_pieces(p.grad_streams) && in_pieces(p.grad_input) && in_pieces(p.grad_residual);
  cuda::LaunchShape shape;
  shape.blocks_x = pieces.column_blocks + 1;
  shape.blocks_y = pieces.count;
  shape.threads = kStreamThreads;
  shape.shared_bytes = gradient.stream_bytes[wide];
  return cuda::launch(gradient.name, gradient.streams[wide], shape, context, a);
}

Status run_sums(const Gradient& gradient, const MhcPreBackwardParams& p, const Memory& memory, const Context& context) {
  const int64_t tokens = p.streams.size(0), hidden = p.streams.size(2);
  MhcSumArguments a = {};
  a.fn_sums = memory.fn_sums;
  a.norm_sums = memory.norm_sums;
  a.rest_sums = memory.rest_sums;
  a.grad_fn = p.grad_fn;
  a.grad_scale = p.grad_scale;
  a.grad_base = p.grad_base;
  if (p.norm_weight.given()) a.grad_norm_weight = p.grad_norm_weight;
  a.pieces = pieces_of(tokens, hidden).count;
  a.mixes = gradient.mixes;
  a.hidden = hidden;
  a.vector_fn = in_pieces(p.grad_fn);
  a.vector_norm = in_pieces(p.grad_norm_weight);
  cuda::LaunchShape shape;
  const int64_t fn_fours = p.grad_fn.given() ? gradient.mixes * hidden : 0;
  const int64_t norm_fours = p.norm_weight.given() ? ceil_div(hidden, 4) : 0;
  shape.blocks_x = ceil_div(fn_fours + norm_fours + kSummed, kMhcSumThreads);
  shape.threads = kMhcSumThreads;
  return cuda::launch(gradient.name, sm80_f32_mhc_backward_sums, shape, context, a);
}

Status run(const Gradient& gradient, const MhcPreBackwardParams& p, const Context& context) {
  const int64_t tokens = p.streams.size(0), hidden = p.streams.size(2);
  const bool wide = p.streams.dtype == DType::kFloat32;
  const Memory memory(p.workspace.data, tokens, hidden, gradient, wide);
  if (p.workspace.bytes < memory.bytes) {
    return Status::error("%s: workspace has %lld bytes, needs %lld", gradient.name,
                         static_cast<long long>(p.workspace.bytes), static_cast<long long>(memory.bytes));
  }
  if (tokens > 0) {
    Status status = run_tokens(gradient, p, memory, context);
    if (status.is_ok()) status = run_streams(gradient, p, memory, context);
    if (!status.is_ok()) return status;
  }
  return run_sums(gradient, p, memory, context);
}

}  // namespace

int64_t mhc_backward_workspace_bytes(int64_t tokens, int64_t hidden, DType x, bool head) {
  return Memory(nullptr, tokens, hidden, head ? kHead : kPre, x == DType::kFloat32).bytes;
}

Status mhc_pre_backward(const MhcPreBackwardParams& p, const Context& context) { return run(kPre, p, context); }

Status mhc_head_backward(const MhcHeadBackwardParams& p, const Context& context) {
  MhcPreBackwardParams pre = {};  // without what mhc_head does not have
  pre.grad_input = p.grad_output;
  pre.streams = p.streams;
  pre.grad_streams = p.grad_streams;
  pre.mixing = p.mixing;
  pre.grad_fn = p.grad_fn;
  pre.grad_scale = p.grad_scale;
  pre.grad_base = p.grad_base;
  pre.workspace = p.workspace;
  return run(kHead, pre, context);
}

}  // namespace dsv4::sm80
