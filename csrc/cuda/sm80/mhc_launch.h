// How the mHC kernels are launched.
#pragma once

#include "cuda/common/launch.h"
#include "cuda/sm80/mhc_mix_few.h"
#include "cuda/sm80/operands.h"

namespace dsv4::sm80 {

inline constexpr int64_t kTokensAtOnce = 8192;  // of the mixing product: bounds the workspace

inline int64_t splits_of(int64_t hidden) { return ceil_div(hidden, kChunk * kChunksPerSplit); }

// A kernel of the mixing product. [0]: bfloat16, [1]: float32. few: of few bfloat16 tokens, where there is one.
struct MixKernels {
  void (*kernel[2])(MixArguments);
  int shared_bytes[2];
  void (*few)(MixArguments);
  int few_shared_bytes, few_tiles;
};

// The mixing product of tokens [first_token, end_token) into mix.partial. `wide`: float32 streams.
inline Status launch_mix(const char* name, const MixKernels& kernels, bool wide, MixArguments mix,
                         const Context& context) {
  constexpr int64_t kBlocks = 512;  // as many as fill every GPU; fewer, longer runs of splits beyond
  const int64_t splits = splits_of(mix.hidden), tokens = mix.end_token - mix.first_token;
  cuda::LaunchShape shape;
  shape.threads = kMixThreads;
  if (kernels.few != nullptr && !wide && tokens <= kFewTokens) {
    shape.blocks_x = splits * kernels.few_tiles;
    shape.blocks_y = ceil_div(tokens, MixStage<bf16, false, true>::kTokens);
    shape.shared_bytes = kernels.few_shared_bytes;
    return cuda::launch(name, kernels.few, shape, context, mix);
  }
  const int64_t token_blocks =
      ceil_div(tokens, wide ? MixStage<float, false>::kTokens : MixStage<bf16, false>::kTokens);
  mix.splits_per_block = static_cast<int>(ceil_div(splits, ceil_div(kBlocks, token_blocks)));
  shape.blocks_x = token_blocks;
  shape.blocks_y = ceil_div(splits, mix.splits_per_block);
  shape.shared_bytes = kernels.shared_bytes[wide];
  return cuda::launch(name, kernels.kernel[wide], shape, context, mix);
}

// The product for gradients, as exact as float32 (mhc.cu); of mhc_head's fn or of mhc_pre's.
Status launch_exact_mix(const char* name, bool head, bool wide, const MixArguments& mix, const Context& context);

}  // namespace dsv4::sm80
