// Each wrapper of ptx.h against what its instruction is documented to do: on a GPU the instruction's text is under
// test, on the host model the model is.
#include <array>
#include <cmath>

#include "buffer.h"
#include "common/pages.h"
#include "cuda/common/launch.h"
#include "cuda/common/ptx.h"

namespace {

using namespace dsv4;
using namespace dsv4::testing;

struct Arguments {
  const uint32_t* in;
  uint32_t* out;
};

constexpr int kThreads = 128;

// Runs a kernel on `in` and returns what it wrote: 16 words a thread.
std::vector<uint32_t> run(void (*kernel)(Arguments), const std::vector<uint32_t>& in, int64_t x = 1, int64_t y = 1) {
  DeviceBytes input(in.size() * 4), output(static_cast<size_t>(x * y * kThreads) * 16 * 4);
  memcpy(input.host(), in.data(), in.size() * 4);
  input.upload();
  cuda::LaunchShape shape;
  shape.blocks_x = x;
  shape.blocks_y = y;
  shape.threads = kThreads;
  shape.shared_bytes = 8192;
  const Arguments arguments = {static_cast<const uint32_t*>(input.device()), static_cast<uint32_t*>(output.device())};
  const Status status = cuda::launch("test_ptx", kernel, shape, cuda_context(), arguments);
  CHECK_MESSAGE(status.is_ok(), status.message());
  finish_device();
  CHECK(output.intact());
  output.download();
  const uint32_t* words = static_cast<const uint32_t*>(output.host());
  return std::vector<uint32_t>(words, words + x * y * kThreads * 16);
}

std::vector<uint32_t> random_words(size_t count, uint64_t seed) {
  Random random(seed);
  std::vector<uint32_t> words(count);
  for (uint32_t& word : words) word = static_cast<uint32_t>(random.bits() >> 20);
  return words;
}

DSV4_KERNEL(kThreads, 1) position(const Arguments a) {
  const int64_t block = ptx::block_index_y() * 3 + ptx::block_index_x();
  uint32_t* out = a.out + (block * kThreads + ptx::thread_index()) * 16;
  out[0] = static_cast<uint32_t>(ptx::thread_index());
  out[1] = static_cast<uint32_t>(ptx::block_index_x());
  out[2] = static_cast<uint32_t>(ptx::block_index_y());
}

TEST(threads_and_blocks_have_positions) {
  if (no_device()) return;
  const auto out = run(position, {0}, 3, 2);
  for (uint32_t t = 0; t < 6 * kThreads; ++t) {
    CHECK(out[t * 16] == t % kThreads && out[t * 16 + 1] == t / kThreads % 3 && out[t * 16 + 2] == t / kThreads / 3);
  }
}

// Single words, through another thread's part of shared memory.
DSV4_KERNEL(kThreads, 1) words(const Arguments a) {
  const int t = ptx::thread_index();
  ptx::store_shared_word(ptx::shared_base() + static_cast<uint32_t>(t * 4), a.in[t]);
  ptx::sync_threads();
  a.out[16 * t] = ptx::load_shared_word(ptx::shared_base() + static_cast<uint32_t>((t + 77) % kThreads * 4));
}

TEST(memory_of_single_words) {
  if (no_device()) return;
  const auto in = random_words(kThreads, 8), out = run(words, in);
  for (size_t t = 0; t < kThreads; ++t) CHECK(out[16 * t] == in[(t + 77) % kThreads]);
}

// Every width of access, through another thread's part of shared memory.
DSV4_KERNEL(kThreads, 1) memory(const Arguments a) {
  const int t = ptx::thread_index();
  const uint32_t mine = ptx::shared_base() + static_cast<uint32_t>(t * 32);
  ptx::store_shared_16(mine, ptx::load_global_16(a.in + 8 * t));
  ptx::store_shared_8(mine + 16, ptx::load_global_8(a.in + 8 * t + 4));
  ptx::store_shared_float(mine + 24, float_from_bits(ptx::load_global_4(a.in + 8 * t + 6)));
  ptx::store_shared_float(mine + 28, float_from_bits(a.in[8 * t + 7]));
  ptx::sync_threads();
  const uint32_t other = ptx::shared_base() + static_cast<uint32_t>((t + 37) % kThreads * 32);
  ptx::store_global_16(a.out + 16 * t, ptx::load_shared_16(other));
  ptx::store_global_16(a.out + 16 * t + 8, ptx::load_constant_16(a.in + 8 * t + 4));
  const ptx::Words2 pair = ptx::load_shared_8(other + 24);
  ptx::store_global_4(a.out + 16 * t + 12, pair.word[0]);
  a.out[16 * t + 13] = pair.word[1];
  ptx::store_global_8(a.out + 16 * t + 14, ptx::Words2{{a.in[8 * t], a.in[8 * t + 1]}});
  for (int i = 0; i < 4; ++i) {
    a.out[16 * t + 4 + i] = bits_from_float(ptx::load_shared_float(other + 16 + static_cast<uint32_t>(4 * i)));
  }
}

TEST(memory_of_every_width) {
  if (no_device()) return;
  const auto in = random_words(8 * kThreads, 1), out = run(memory, in);
  for (size_t t = 0; t < kThreads; ++t) {
    for (size_t i = 0; i < 8; ++i) CHECK(out[16 * t + i] == in[8 * ((t + 37) % kThreads) + i]);
    for (size_t i = 0; i < 4; ++i) CHECK(out[16 * t + 8 + i] == in[8 * t + 4 + i]);
    for (size_t i = 0; i < 2; ++i) CHECK(out[16 * t + 12 + i] == in[8 * ((t + 37) % kThreads) + 6 + i]);
    for (size_t i = 0; i < 2; ++i) CHECK(out[16 * t + 14 + i] == in[8 * t + i]);
  }
}

// Two groups: the first is there when one may be pending, the second when none may. Odd threads copy zeros.
DSV4_KERNEL(kThreads, 1) copies(const Arguments a) {
  const int t = ptx::thread_index();
  const uint32_t mine = ptx::shared_base() + static_cast<uint32_t>(t * 32);
  ptx::cp_async_16(mine, a.in + 8 * t, t % 2 == 0 ? 16 : 0);
  ptx::cp_async_commit();
  ptx::cp_async_16(mine + 16, a.in + 8 * t + 4, 16);
  ptx::cp_async_commit();
  ptx::cp_async_wait<1>();
  ptx::store_global_16(a.out + 16 * t, ptx::load_shared_16(mine));
  ptx::cp_async_wait<0>();
  ptx::sync_threads();
  const uint32_t other = ptx::shared_base() + static_cast<uint32_t>((t + 5) % kThreads * 32);
  ptx::store_global_16(a.out + 16 * t + 4, ptx::load_shared_16(other + 16));
}

TEST(asynchronous_copies_land_by_their_wait) {
  if (no_device()) return;
  const auto in = random_words(8 * kThreads, 2), out = run(copies, in);
  for (size_t t = 0; t < kThreads; ++t) {
    for (size_t i = 0; i < 4; ++i) {
      CHECK(out[16 * t + i] == (t % 2 == 0 ? in[8 * t + i] : 0));
      CHECK(out[16 * t + 4 + i] == in[8 * ((t + 5) % kThreads) + 4 + i]);
    }
  }
}

// Each half of the block meets at a barrier of its own; inside a warp, sync_warp is enough.
DSV4_KERNEL(kThreads, 1) barriers(const Arguments a) {
  const int t = ptx::thread_index(), half = t / 64;
  const uint32_t mine = ptx::shared_base() + static_cast<uint32_t>(t * 8);
  ptx::store_shared_float(mine, float_from_bits(a.in[t]));
  if (half == 0) {
    ptx::sync_named<1, 64>();
  } else {
    ptx::sync_named<2, 64>();
  }
  const int other = half * 64 + (t + 33) % 64;
  a.out[16 * t] = bits_from_float(ptx::load_shared_float(ptx::shared_base() + static_cast<uint32_t>(other * 8)));
  ptx::store_shared_float(mine + 4, float_from_bits(a.in[t] + 1));
  ptx::sync_warp();
  const int lane = t / 32 * 32 + (t + 1) % 32;
  a.out[16 * t + 1] = bits_from_float(ptx::load_shared_float(ptx::shared_base() + static_cast<uint32_t>(lane * 8 + 4)));
}

TEST(barriers_of_halves_and_warps) {
  if (no_device()) return;
  const auto in = random_words(kThreads, 3), out = run(barriers, in);
  for (size_t t = 0; t < kThreads; ++t) {
    CHECK(out[16 * t] == in[t / 64 * 64 + (t + 33) % 64]);
    CHECK(out[16 * t + 1] == in[t / 32 * 32 + (t + 1) % 32] + 1);
  }
}

DSV4_KERNEL(kThreads, 1) shuffles(const Arguments a) {
  const int t = ptx::thread_index();
  const float value = float_from_bits(a.in[t]);
  const float turned = ptx::shuffle(value, (t * 7 + 3) % 32);
  const uint32_t turned_bits = ptx::shuffle(a.in[t], (t * 5 + 2) % 32);
  const float crossed = ptx::shuffle_xor(value, 21);
  const uint32_t crossed_bits = ptx::shuffle_xor(a.in[t], 9);
  a.out[16 * t] = bits_from_float(turned);
  a.out[16 * t + 1] = bits_from_float(crossed);
  a.out[16 * t + 2] = crossed_bits;
  a.out[16 * t + 3] = turned_bits;
}

TEST(shuffles_within_a_warp) {
  if (no_device()) return;
  const auto in = random_words(kThreads, 4), out = run(shuffles, in);
  for (size_t t = 0; t < kThreads; ++t) {
    CHECK(out[16 * t] == in[t / 32 * 32 + (t * 7 + 3) % 32]);
    CHECK(out[16 * t + 1] == in[t ^ 21]);
    CHECK(out[16 * t + 2] == in[t ^ 9]);
    CHECK(out[16 * t + 3] == in[t / 32 * 32 + (t * 5 + 2) % 32]);
  }
}

DSV4_KERNEL(kThreads, 1) votes(const Arguments a) {
  const int t = ptx::thread_index();
  const uint32_t odd = ptx::ballot(a.in[t] % 2 == 1);
  const uint32_t sum = ptx::warp_sum(a.in[t]);
  a.out[16 * t] = odd;
  a.out[16 * t + 1] = sum;
  a.out[16 * t + 2] = static_cast<uint32_t>(ptx::count_ones(a.in[t]));
}

TEST(votes_and_sums_of_a_warp) {
  if (no_device()) return;
  const auto in = random_words(kThreads, 9), out = run(votes, in);
  for (size_t t = 0; t < kThreads; ++t) {
    uint32_t odd = 0, sum = 0, ones = 0;
    for (size_t l = 0; l < 32; ++l) {
      odd |= (in[t / 32 * 32 + l] % 2) << l;
      sum += in[t / 32 * 32 + l];
      ones += in[t] >> l & 1;
    }
    CHECK(out[16 * t] == odd && out[16 * t + 1] == sum && out[16 * t + 2] == ones);
  }
}

// Rows lie in shared memory in a scrambled order.
DSV4_KERNEL(kThreads, 1) matrices(const Arguments a) {
  const int t = ptx::thread_index(), lane = t % 32;
  const uint32_t base = ptx::shared_base() + static_cast<uint32_t>(t / 32 * 512);
  ptx::store_shared_16(base + static_cast<uint32_t>(lane * 5 % 32 * 16), ptx::load_global_16(a.in + 4 * t));
  ptx::sync_warp();
  uint32_t matrix[4];
  ptx::ldmatrix_x4(matrix, base + static_cast<uint32_t>(lane * 5 % 32 * 16));
  for (int i = 0; i < 4; ++i) a.out[16 * t + i] = matrix[i];
  ptx::ldmatrix_x4_transposed(matrix, base + static_cast<uint32_t>(lane * 5 % 32 * 16));
  for (int i = 0; i < 4; ++i) a.out[16 * t + 4 + i] = matrix[i];
}

TEST(ldmatrix_hands_out_rows_and_columns) {
  if (no_device()) return;
  const auto in = random_words(4 * kThreads, 5), out = run(matrices, in);
  for (size_t t = 0; t < kThreads; ++t) {
    const size_t warp = t / 32 * 32, lane = t % 32;
    // Word w of a row holds columns 2 w and 2 w + 1.
    const auto element = [&](size_t i, size_t row, size_t column) {
      return in[4 * (warp + 8 * i + row) + column / 2] >> (column % 2 * 16) & 0xFFFFu;
    };
    for (size_t i = 0; i < 4; ++i) {
      CHECK(out[16 * t + i] == in[4 * (warp + 8 * i + lane / 4) + lane % 4]);
      const uint32_t low = element(i, lane % 4 * 2, lane / 4), high = element(i, lane % 4 * 2 + 1, lane / 4);
      CHECK(out[16 * t + 4 + i] == (low | high << 16));
    }
  }
}

DSV4_KERNEL(kThreads, 1) products(const Arguments a) {
  const uint32_t* in = a.in + 10 * ptx::thread_index();
  float d[4];
  for (int i = 0; i < 4; ++i) d[i] = float_from_bits(in[i]);
  const uint32_t left[4] = {in[4], in[5], in[6], in[7]};
  ptx::mma_m16n8k16(d, left, in[8], in[9]);
  for (int i = 0; i < 4; ++i) a.out[16 * ptx::thread_index() + i] = bits_from_float(d[i]);
}

// Small integers: exact in any order of summation. Fragments are filled from whole matrices by the documented
// positions.
TEST(mma_multiplies_whole_matrices) {
  if (no_device()) return;
  Random random(6);
  const auto integer = [&] { return std::floor(random.uniform(-8, 8)); };
  const auto half = [](float value) { return static_cast<uint32_t>(bf16_from_float(value).bits); };
  std::vector<uint32_t> in;
  std::vector<std::array<std::array<float, 8>, 16>> expected;
  for (int warp = 0; warp < kThreads / 32; ++warp) {
    float a[16][16], b[16][8], c[16][8];
    for (int i = 0; i < 16; ++i) {
      for (int j = 0; j < 16; ++j) a[i][j] = integer();
      for (int j = 0; j < 8; ++j) b[i][j] = integer(), c[i][j] = integer();
    }
    expected.emplace_back();
    for (int i = 0; i < 16; ++i) {
      for (int j = 0; j < 8; ++j) {
        expected.back()[i][j] = c[i][j];
        for (int k = 0; k < 16; ++k) expected.back()[i][j] += a[i][k] * b[k][j];
      }
    }
    for (int l = 0; l < 32; ++l) {
      const int row = l / 4, pair = 2 * (l % 4);
      in.insert(in.end(), {bits_from_float(c[row][pair]), bits_from_float(c[row][pair + 1]),
                           bits_from_float(c[row + 8][pair]), bits_from_float(c[row + 8][pair + 1])});
      in.push_back(half(a[row][pair]) | half(a[row][pair + 1]) << 16);
      in.push_back(half(a[row + 8][pair]) | half(a[row + 8][pair + 1]) << 16);
      in.push_back(half(a[row][pair + 8]) | half(a[row][pair + 9]) << 16);
      in.push_back(half(a[row + 8][pair + 8]) | half(a[row + 8][pair + 9]) << 16);
      in.push_back(half(b[pair][row]) | half(b[pair + 1][row]) << 16);
      in.push_back(half(b[pair + 8][row]) | half(b[pair + 9][row]) << 16);
    }
  }
  const auto out = run(products, in);
  for (size_t t = 0; t < kThreads; ++t) {
    const size_t row = t % 32 / 4, pair = 2 * (t % 4);
    const auto& d = expected[t / 32];
    CHECK(float_from_bits(out[16 * t]) == d[row][pair] && float_from_bits(out[16 * t + 1]) == d[row][pair + 1]);
    CHECK(float_from_bits(out[16 * t + 2]) == d[row + 8][pair] &&
          float_from_bits(out[16 * t + 3]) == d[row + 8][pair + 1]);
  }
}

DSV4_KERNEL(kThreads, 1) arithmetic(const Arguments a) {
  const float* in = reinterpret_cast<const float*>(a.in) + 3 * ptx::thread_index();
  uint32_t* out = a.out + 16 * ptx::thread_index();
  const uint32_t packed = ptx::pack_bf16(in[0], in[1]);
  const float results[] = {ptx::fma(in[0], in[1], in[2]), ptx::add(in[0], in[1]),         ptx::multiply(in[0], in[1]),
                           ptx::divide(in[0], in[1]),     ptx::square_root(fabsf(in[0])), ptx::exponential(in[0]),
                           ptx::maximum(in[0], in[1]),    ptx::low_bf16(packed),          ptx::high_bf16(packed),
                           ptx::logarithm(fabsf(in[0]))};
  for (int i = 0; i < 10; ++i) out[i] = bits_from_float(results[i]);
  out[10] = packed;
  const double wide = ptx::fma(static_cast<double>(in[0]), static_cast<double>(in[1]), -1.0 / in[2]);
  memcpy(out + 12, &wide, 8);
}

TEST(arithmetic_rounds_as_it_says) {
  if (no_device()) return;
  Random random(7);
  std::vector<uint32_t> in;
  for (int i = 0; i < 3 * kThreads; ++i) in.push_back(bits_from_float(random.uniform(-20, 20)));
  in[0] = bits_from_float(-104.0f);  // the exponential's underflow
  in[3] = bits_from_float(88.5f);
  const auto out = run(arithmetic, in);
  for (size_t t = 0; t < kThreads; ++t) {
    const float a = float_from_bits(in[3 * t]), b = float_from_bits(in[3 * t + 1]), c = float_from_bits(in[3 * t + 2]);
    const auto got = [&](size_t i) { return float_from_bits(out[16 * t + i]); };
    CHECK(got(0) == std::fma(a, b, c));
    CHECK(got(1) == a + b);
    double wide;
    memcpy(&wide, &out[16 * t + 12], 8);
    CHECK(wide == std::fma(static_cast<double>(a), static_cast<double>(b), -1.0 / c));
    CHECK(got(2) == a * b);
    CHECK(got(3) == a / b);
    CHECK(got(4) == std::sqrt(std::fabs(a)));
    const double exact = std::exp(static_cast<double>(a));
    CHECK(std::fabs(got(5) - exact) <= 2.5e-7 * exact + 1.5e-45);
    CHECK(got(6) == std::fmax(a, b));
    CHECK(got(7) == to_float(bf16_from_float(a)));
    CHECK(got(8) == to_float(bf16_from_float(b)));
    const double log = std::log(std::fabs(static_cast<double>(a)));
    CHECK(std::fabs(got(9) - log) <= 1.5e-7 * std::fabs(log));
    CHECK(out[16 * t + 10] == (bf16_from_float(a).bits | static_cast<uint32_t>(bf16_from_float(b).bits) << 16));
  }
}

DSV4_KERNEL(kThreads, 1) codes(const Arguments a) {
  const float* in = reinterpret_cast<const float*>(a.in) + 32 * ptx::thread_index();
  for (int i = 0; i < 16; ++i) a.out[16 * ptx::thread_index() + i] = ptx::pack_e4m3(in[2 * i], in[2 * i + 1]);
}

// Every code, the middles between neighbours and the floats beside those, of both signs; then what is clamped.
TEST(e4m3_codes_are_the_nearest) {
  if (no_device()) return;
  std::vector<float> values;
  for (int code = 0; code < 0x7E; ++code) {
    const float value = e4m3_value(static_cast<uint8_t>(code)), next = e4m3_value(static_cast<uint8_t>(code + 1));
    const float middle = (value + next) / 2;
    for (const float x : {value, middle, std::nextafter(middle, 0.f), std::nextafter(middle, 1e9f)}) {
      values.push_back(x);
      values.push_back(-x);
    }
  }
  for (const float x : {448.f, 449.f, 464.f, 1e30f, 1e-30f}) values.push_back(x);
  values.resize(32 * kThreads, 0.f);
  std::vector<uint32_t> in;
  for (const float value : values) in.push_back(bits_from_float(value));
  const auto out = run(codes, in);
  for (size_t i = 0; i < 16 * kThreads; ++i) {
    CHECK(out[i] == (e4m3_code(values[2 * i]) | static_cast<uint32_t>(e4m3_code(values[2 * i + 1])) << 8));
  }
}

// Pairs of bfloat16, denormal ones too, and every selector of bytes without replication of signs.
DSV4_KERNEL(kThreads, 1) packed_pairs(const Arguments a) {
  const int t = ptx::thread_index();
  const auto* in = reinterpret_cast<const uint32_t*>(ptx::kept(reinterpret_cast<const uint8_t*>(a.in + 3 * t)));
  a.out[16 * t] = ptx::select_bytes(in[0], in[1], in[2] & 0x7777u);
  a.out[16 * t + 1] = ptx::multiply_bf16_pairs(in[0], in[1]);
}

TEST(packed_pairs_are_taken_apart_and_multiplied) {
  if (no_device()) return;
  auto in = random_words(3 * kThreads, 11);
  // Products with zeros of both signs and of denormal numbers: 2^-133 * 2^120, 2^-126 * 2^-7.
  in[0] = 0x80000000u, in[1] = 0x40004000u;
  in[3] = 0x00010080u, in[4] = 0x7B803C00u;
  const auto out = run(packed_pairs, in);
  for (size_t t = 0; t < kThreads; ++t) {
    const uint32_t words[] = {in[3 * t], in[3 * t + 1]}, selector = in[3 * t + 2];
    uint32_t selected = 0;
    for (size_t i = 0; i < 4; ++i) {
      const uint32_t byte = selector >> (4 * i) & 7u;
      selected |= (words[byte / 4] >> (8 * (byte % 4)) & 0xFFu) << (8 * i);
    }
    CHECK(out[16 * t] == selected);
    for (int half = 0; half < 2; ++half) {
      const auto value = [&](uint32_t word) { return float_from_bits((word >> (16 * half) & 0xFFFFu) << 16); };
      const float product = value(words[0]) * value(words[1]), got = value(out[16 * t + 1]);
      if (product != 0 && std::fabs(product) < 0x1p-126f) continue;  // the float has been rounded already
      CHECK(product != product ? got != got : bits_from_float(got) >> 16 == bf16_from_float(product).bits);
    }
  }
  CHECK(out[1] == 0x80000000u && out[16 + 1] == 0x39000001u);
}

DSV4_KERNEL(kThreads, 1) logarithms_1p(const Arguments a) {
  const int t = ptx::thread_index();
  a.out[16 * t] = bits_from_float(ptx::logarithm_1p(float_from_bits(a.in[t])));
}

TEST(logarithms_near_one_keep_their_digits) {
  if (no_device()) return;
  std::vector<uint32_t> in;
  for (int i = 0; i < kThreads; ++i) in.push_back(bits_from_float(std::ldexp(1.0f + 0.01f * i, i / 2 - 40)));
  const auto out = run(logarithms_1p, in);
  for (size_t t = 0; t < kThreads; ++t) {
    const double exact = std::log1p(static_cast<double>(float_from_bits(in[t])));
    CHECK(std::fabs(float_from_bits(out[16 * t]) - exact) <= 2.5e-7 * exact);
  }
}

}  // namespace
