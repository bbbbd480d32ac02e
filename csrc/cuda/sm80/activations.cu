// prepare_activations (activations.h): a half warp a block of 128 inputs, eight a lane, and for quantised weights the
// block's scale by shuffles. 16 bytes a lane and access, 4 to 10 bytes an input from and to memory and some 20
// instructions; beside the product's weights a small part.
#include "cuda/common/launch.h"
#include "cuda/sm80/activations.h"

namespace dsv4::sm80 {

DSV4_KERNEL(kPrepareThreads, 4) sm80_bf16_prepare_activations(const PrepareArguments a) { prepare<bf16>(a); }
DSV4_KERNEL(kPrepareThreads, 4) sm80_f32_prepare_activations(const PrepareArguments a) { prepare<float>(a); }

Status prepare_activations(const char* op, const AnyView<3>& x, void* to, int planes, bool quantise, InputOrder order,
                           const Context& context) {
  PrepareArguments a = {};
  a.x = x;
  a.to = static_cast<uint8_t*>(to);
  a.units = ceil_div(x.size(2), kBlockInputs) * 16;
  a.rows = x.size(0) * x.size(1);
  a.planes = planes;
  a.quantise = quantise;
  a.order = order;
  a.vector = in_eights(x);
  cuda::LaunchShape shape;
  shape.blocks_x = ceil_div(a.rows * a.units, kPrepareThreads);
  shape.threads = kPrepareThreads;
  if (shape.blocks_x == 0) return Status::ok();
  const bool narrow = x.dtype == DType::kBFloat16;
  return cuda::launch(op, narrow ? sm80_bf16_prepare_activations : sm80_f32_prepare_activations, shape, context, a);
}

}  // namespace dsv4::sm80
