// mHC, portable: the arithmetic in the order the contract gives it. Also the yardstick for the other kernels.
#include "cpu/mhc.h"

namespace dsv4::scalar {
namespace {

template <class T>
void post_rows(const MhcPostParams& params, int64_t begin, int64_t end) {
  const auto sublayer = params.sublayer.as<const T>();
  const auto streams = params.streams.as<const T>();
  const auto result = params.result.as<T>();
  const int64_t hidden = sublayer.size(1);
  for (int64_t token = begin; token < end; ++token) {
    for (int out = 0; out < kStreams; ++out) {
      for (int64_t column = 0; column < hidden; ++column) {
        float sum = *params.post.at(token, out) * to_float(*sublayer.at(token, column));
        for (int in = 0; in < kStreams; ++in) {
          sum += *params.comb.at(token, in, out) * to_float(*streams.at(token, in, column));
        }
        *result.at(token, out, column) = from_float<T>(sum);
      }
    }
  }
}

}  // namespace

Status mhc_post(const MhcPostParams& params, const Context& context) {
  const auto rows = params.streams.dtype == DType::kBFloat16 ? post_rows<bf16> : post_rows<float>;
  parallel(context, params.streams.size(0), [&](int64_t begin, int64_t end) { rows(params, begin, end); });
  return Status::ok();
}

}  // namespace dsv4::scalar
