#include "ops/mhc.h"

#include "torch/glue.h"

namespace dsv4::binding {
namespace {

Tensor mhc_post(const Tensor& sublayer, const Tensor& streams, const Tensor& post, const Tensor& comb) {
  Check check("mhc_post");
  const auto sizes =
      check.tensor("streams", streams, {kAny, kStreams, kAny}, {ScalarType::BFloat16, ScalarType::Float});
  const int64_t tokens = sizes[0], hidden = sizes[2];
  check.tensor("sublayer", sublayer, {tokens, hidden}, {streams.scalar_type()});
  check.tensor("post", post, {tokens, kStreams}, {ScalarType::Float});
  check.tensor("comb", comb, {tokens, kStreams, kStreams}, {ScalarType::Float});
  Tensor result = empty({tokens, kStreams, hidden}, streams.scalar_type(), streams);
  check.run<MhcPostParams>(dsv4::mhc_post,
                           {view(sublayer), view(streams), view(post), view(comb), mutable_view(result)}, streams);
  return result;
}
DSV4_OP("mhc_post(Tensor sublayer, Tensor streams, Tensor post, Tensor comb) -> Tensor", mhc_post)

}  // namespace
}  // namespace dsv4::binding
