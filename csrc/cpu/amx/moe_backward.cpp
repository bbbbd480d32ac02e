// Gradients of plain experts of bfloat16 in AMX tiles. gate and up are the forward pass's own products
// (amx/moe_product.h), so that both passes clamp alike; the other six products of a row, of which weights or rows are
// read across, are those of amx/outer_product.h. 16 hidden inter FLOPs a row of an expert.
#include "cpu/amx/moe_rows.h"
#include "cpu/amx/outer_product.h"
#include "cpu/avx512/expert_gradient.h"

namespace dsv4::DSV4_AMX_NAMESPACE {
namespace {

struct Kernel : OuterProduct {
  static constexpr int64_t kOutputs = kWidth, kColumns = 4 * kWidth, kRows = 512;
  static constexpr int64_t kSumsBytes = kRows * kMoeOutputs * static_cast<int64_t>(sizeof(float));

  static int64_t product_memory(int64_t inputs) {
    const int64_t forward = kStrips * kSumsBytes + round_up(TileProduct<PlainTiles>::memory(inputs), 64);
    const int64_t both = kRows * moe_row_bytes(inputs) + kTileBytes + forward, others = outer_memory();
    return both > others ? both : others;
  }

  template <class X>
  static int64_t row_bytes(WeightFormat, int64_t n) {
    return moe_row_bytes(n);
  }
  template <class X>
  static void prepare(WeightFormat format, const X* x, int64_t n, uint8_t* to) {
    prepare_row(format, x, n, reinterpret_cast<bf16*>(to));
  }

  template <class X>
  static void gate_up(const ExpertMatrix (&w)[2], int64_t expert, int64_t row, int64_t rows, int64_t inputs,
                      const uint8_t* const* x, int64_t count, float* const (&out)[2], uint8_t* memory) {
    const int64_t width = moe_row_bytes(inputs);
    for (int64_t m = 0; m < count; m += kUnit) {
      const int64_t some = smaller(count - m, kUnit);
      const bf16* unit[kUnit];
      for (int64_t i = 0; i < some; ++i) unit[i] = reinterpret_cast<const bf16*>(x[m + i]);
      gather_unit(unit, some, inputs, reinterpret_cast<bf16*>(memory + m * width));
    }
    uint8_t* sums = memory + kRows * width + kTileBytes;
    configure_tiles(count);
    for (int64_t r = 0; r < rows; r += kMoeOutputs) {
      Strip strips[kStrips];
      for (int i = 0; i < kStrips; ++i) {
        strips[i] = {&w[i], row + r, smaller(rows - r, kMoeOutputs), reinterpret_cast<float*>(sums + i * kSumsBytes)};
      }
      TileProduct<PlainTiles>(expert, inputs, {memory, width, count}, sums + kStrips * kSumsBytes)
          .run(strips, kStrips, {row_codes(w[0], expert, row + r + kMoeOutputs), {}});
      for (int i = 0; i < kStrips; ++i) {
        for (int64_t m = 0; m < count; m += kUnit) {
          put_unit(sums_of_unit(strips[i].sums, m / kUnit), smaller(count - m, kUnit), strips[i].rows,
                   out[i] + m * kOutputs + r, kOutputs);
        }
      }
    }
    tile_release();
  }

  template <class X>
  static float activate_backward(const float* gate, const float* up, const float* grad, float weight, float limit,
                                 int64_t n, const MoeInner<X>& to) {
    return avx512::activate_backward(gate, up, grad, weight, limit, n, to);
  }
};

}  // namespace

int64_t moe_experts_backward_workspace_bytes(const MoeExpertsBackwardParams& p, const Context& c) {
  return MoeBackwardCall<Kernel, bf16>(p, c).bytes();
}
Status moe_experts_backward(const MoeExpertsBackwardParams& p, const Context& c) {
  return MoeBackwardCall<Kernel, bf16>(p, c).run();
}

}  // namespace dsv4::DSV4_AMX_NAMESPACE
