// Hopper's product of a warpgroup, each wrapper of wgmma.h in it: on a Hopper GPU the text of the instructions, on the
// machine what it takes them for.
#include <vector>

#include "buffer.h"
#include "cuda/common/launch.h"
#include "cuda/common/wgmma.h"

namespace {

using namespace dsv4;
using namespace dsv4::testing;

constexpr int kDepth = 64, kThreads = 128, kStages = 2;

struct Arguments {
  const bf16 *a, *b;  // [64, 64], [columns, 64]
  const float* c;     // [64, columns]
  float* d;
  bool adds;  // c
};

// d = a b (+ c). The second of two matrices in shared memory.
template <int kColumns, class Multiply>
DSV4_DEVICE void product(const Arguments& arguments, const Multiply& multiply) {
  const int t = ptx::thread_index(), lane = t % 32, first_row = t / 32 * 16;
  const uint32_t start = (ptx::shared_base() + 1023u) / 1024u * 1024u, matrix = start + 128 * kColumns;
  for (int i = t; i < kColumns * 8; i += kThreads) {
    const int row = i / 8, piece = i % 8;
    ptx::store_shared_16(matrix + static_cast<uint32_t>(row * 128 + (piece ^ row % 8) * 16),
                         ptx::load_global_16(arguments.b + row * kDepth + piece * 8));
  }
  float d[kColumns / 8][4];
  DSV4_UNROLL
  for (int i = 0; i < kColumns / 2; ++i) {
    d[i / 4][i % 4] = arguments.c[(first_row + lane / 4 + i % 4 / 2 * 8) * kColumns + i / 4 * 8 + lane % 4 * 2 + i % 2];
  }
  ptx::fence_async_proxy();
  ptx::sync_threads();
  const uint64_t first = ptx::wgmma_moved(ptx::wgmma_matrix(start), 128 * kColumns);
  DSV4_UNROLL
  for (int step = 0; step < kDepth / 16; ++step) {
    uint32_t a[4];
    DSV4_UNROLL
    for (int r = 0; r < 4; ++r) {
      const int row = first_row + lane / 4 + r % 2 * 8, column = step * 16 + lane % 4 * 2 + r / 2 * 8;
      a[r] = ptx::load_global_4(arguments.a + row * kDepth + column);
    }
    ptx::wgmma_fence();
    multiply(d, a, ptx::wgmma_moved(first, static_cast<uint32_t>(step * 32)), arguments.adds || step > 0);
    ptx::wgmma_commit();
  }
  ptx::wgmma_wait<1>();
  ptx::wgmma_wait<0>();
  DSV4_UNROLL
  for (int i = 0; i < kColumns / 2; ++i) {
    arguments.d[(first_row + lane / 4 + i % 4 / 2 * 8) * kColumns + i / 4 * 8 + lane % 4 * 2 + i % 2] = d[i / 4][i % 4];
  }
}

DSV4_KERNEL(kThreads, 1) product_128(const Arguments arguments) {
  product<128>(arguments, [](auto& d, auto& a, uint64_t b, bool adds) { ptx::wgmma_m64n128k16(d, a, b, adds); });
}
DSV4_KERNEL(kThreads, 1) product_64(const Arguments arguments) {
  product<64>(arguments, [](auto& d, auto& a, uint64_t b, bool adds) { ptx::wgmma_m64n64k16(d, a, b, adds); });
}

// Whole numbers, whose sums no tensor core rounds.
void check_product(void (*kernel)(Arguments), int columns) {
  DeviceTensor<bf16> a({64, kDepth}), b({columns, kDepth});
  DeviceTensor<float> c({64, columns}), d({64, columns});
  Random random(5);
  const auto whole = [&] { return static_cast<float>(static_cast<int>(random.uniform(-8, 8))); };
  for (int k = 0; k < kDepth; ++k) {
    for (int row = 0; row < 64; ++row) a.at(row, k) = from_float<bf16>(whole());
    for (int column = 0; column < columns; ++column) b.at(column, k) = from_float<bf16>(whole());
  }
  for (int i = 0; i < 64 * columns; ++i) c.at(i / columns, i % columns) = whole();
  a.upload(), b.upload(), c.upload();
  for (const bool adds : {false, true}) {
    cuda::LaunchShape shape;
    shape.threads = kThreads;
    shape.shared_bytes = kStages * 128 * columns + 1024;
    const Status status = cuda::launch("test_wgmma", kernel, shape, cuda_context(),
                                       Arguments{a.device(), b.device(), c.device(), d.device(), adds});
    CHECK_MESSAGE(status.is_ok(), status.message());
    finish_device();
    d.download();
    CHECK(a.intact() && b.intact() && c.intact() && d.intact());
    for (int row = 0; row < 64; ++row) {
      for (int column = 0; column < columns; ++column) {
        float sum = adds ? c.at(row, column) : 0;
        for (int k = 0; k < kDepth; ++k) sum += to_float(a.at(row, k)) * to_float(b.at(column, k));
        CHECK(d.at(row, column) == sum);
      }
    }
  }
}

TEST(warpgroups_multiply_whole_matrices) {
  if (!has_device() || !has_warpgroups()) return not_run("no Hopper GPU");
  check_product(product_128, 128);
  check_product(product_64, 64);
}

}  // namespace
