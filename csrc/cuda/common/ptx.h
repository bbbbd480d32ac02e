// Every PTX instruction and CUDA intrinsic that the kernels use, each behind a small function with two bodies: the
// instruction under nvcc, and its host model under any other compiler (host_model.h), so that a kernel's own source
// runs, and is tested, on the CPU. Kernels touch shared memory through these functions alone, by 32-bit address, and
// put every collective and every synchronisation on a line of its own: the line is how reports and the mutation test
// name it.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#include "common/dtype.h"

#if defined(__CUDACC__)
#define DSV4_DEVICE __device__ __forceinline__
#define DSV4_KERNEL(threads, min_blocks) __global__ void __launch_bounds__(threads, min_blocks)
#define DSV4_PRAGMA(text) _Pragma(#text)
#define DSV4_UNROLL DSV4_PRAGMA(unroll)
#define DSV4_UNROLL_IF(condition) DSV4_PRAGMA(unroll((condition) ? 32 : 1))
#else
#include "cuda/common/host_model.h"
#define DSV4_DEVICE inline
#define DSV4_KERNEL(threads, min_blocks) void
#define DSV4_UNROLL
#define DSV4_UNROLL_IF(condition)
#endif

namespace dsv4::ptx {

// The line that a wrapper was called from, as a defaulted argument; nothing on a GPU.
#if defined(__CUDACC__)
struct Site {
  static DSV4_DEVICE constexpr Site here() { return {}; }
};
#else
struct Site : simt::Site {
  static constexpr Site here(const char* file = __builtin_FILE(), int line = __builtin_LINE()) {
    return {{file, line}};
  }
};
#endif

// The widest access: 16 bytes.
struct alignas(16) Words4 {
  uint32_t word[4];
};

struct alignas(8) Words2 {
  uint32_t word[2];
};

// ---- Position of a thread ----

DSV4_DEVICE int thread_index() {
#if defined(__CUDACC__)
  return static_cast<int>(threadIdx.x);
#else
  return simt::thread_index();
#endif
}

DSV4_DEVICE int64_t block_index_x() {
#if defined(__CUDACC__)
  return blockIdx.x;
#else
  return simt::block_index(0);
#endif
}

DSV4_DEVICE int64_t block_index_y() {
#if defined(__CUDACC__)
  return blockIdx.y;
#else
  return simt::block_index(1);
#endif
}

// ---- Memory ----

#if defined(__CUDACC__)
extern __shared__ __align__(128) uint8_t dynamic_shared_memory[];
#endif

// Start of the dynamic shared memory, a multiple of 128.
DSV4_DEVICE uint32_t shared_base() {
#if defined(__CUDACC__)
  return static_cast<uint32_t>(__cvta_generic_to_shared(dynamic_shared_memory));
#else
  return simt::shared_base();
#endif
}

DSV4_DEVICE Words4 load_shared_16(uint32_t address, Site site = Site::here()) {
  Words4 value;
#if defined(__CUDACC__)
  asm volatile("ld.shared.v4.b32 {%0, %1, %2, %3}, [%4];"
               : "=r"(value.word[0]), "=r"(value.word[1]), "=r"(value.word[2]), "=r"(value.word[3])
               : "r"(address)
               : "memory");
#else
  simt::load_shared(address, &value, 16, site);
#endif
  return value;
}

DSV4_DEVICE Words2 load_shared_8(uint32_t address, Site site = Site::here()) {
  Words2 value;
#if defined(__CUDACC__)
  asm volatile("ld.shared.v2.b32 {%0, %1}, [%2];" : "=r"(value.word[0]), "=r"(value.word[1]) : "r"(address) : "memory");
#else
  simt::load_shared(address, &value, 8, site);
#endif
  return value;
}

DSV4_DEVICE float load_shared_float(uint32_t address, Site site = Site::here()) {
  float value;
#if defined(__CUDACC__)
  asm volatile("ld.shared.f32 %0, [%1];" : "=f"(value) : "r"(address) : "memory");
#else
  simt::load_shared(address, &value, 4, site);
#endif
  return value;
}

DSV4_DEVICE uint32_t load_shared_word(uint32_t address, Site site = Site::here()) {
  uint32_t value;
#if defined(__CUDACC__)
  asm volatile("ld.shared.b32 %0, [%1];" : "=r"(value) : "r"(address) : "memory");
#else
  simt::load_shared(address, &value, 4, site);
#endif
  return value;
}

DSV4_DEVICE void store_shared_16(uint32_t address, const Words4& value, Site site = Site::here()) {
#if defined(__CUDACC__)
  asm volatile("st.shared.v4.b32 [%0], {%1, %2, %3, %4};" ::"r"(address), "r"(value.word[0]), "r"(value.word[1]),
               "r"(value.word[2]), "r"(value.word[3])
               : "memory");
#else
  simt::store_shared(address, &value, 16, site);
#endif
}

DSV4_DEVICE void store_shared_8(uint32_t address, const Words2& value, Site site = Site::here()) {
#if defined(__CUDACC__)
  asm volatile("st.shared.v2.b32 [%0], {%1, %2};" ::"r"(address), "r"(value.word[0]), "r"(value.word[1]) : "memory");
#else
  simt::store_shared(address, &value, 8, site);
#endif
}

DSV4_DEVICE void store_shared_float(uint32_t address, float value, Site site = Site::here()) {
#if defined(__CUDACC__)
  asm volatile("st.shared.f32 [%0], %1;" ::"r"(address), "f"(value) : "memory");
#else
  simt::store_shared(address, &value, 4, site);
#endif
}

DSV4_DEVICE void store_shared_word(uint32_t address, uint32_t value, Site site = Site::here()) {
#if defined(__CUDACC__)
  asm volatile("st.shared.b32 [%0], %1;" ::"r"(address), "r"(value) : "memory");
#else
  simt::store_shared(address, &value, 4, site);
#endif
}

// The pointer to global memory, kept in registers: a compiler that sees how it came about may rather work it out again
// at each use.
DSV4_DEVICE const uint8_t* kept(const uint8_t* pointer) {
#if defined(__CUDACC__)
  size_t address = __cvta_generic_to_global(pointer);
  asm("" : "+l"(address));
  return static_cast<const uint8_t*>(__cvta_global_to_generic(address));
#else
  return pointer;
#endif
}

// The pointer must be a multiple of 16 bytes.
DSV4_DEVICE Words4 load_global_16(const void* source, Site site = Site::here()) {
#if defined(__CUDACC__)
  const uint4 value = *static_cast<const uint4*>(source);
  return {{value.x, value.y, value.z, value.w}};
#else
  simt::check_aligned(source, 16, site);
  return *static_cast<const Words4*>(source);
#endif
}

// The same from memory that nobody writes while the kernel runs: one instruction, which stays where it is written.
DSV4_DEVICE Words4 load_constant_16(const void* source, Site site = Site::here()) {
#if defined(__CUDACC__)
  Words4 value;
  asm volatile("ld.global.nc.v4.b32 {%0, %1, %2, %3}, [%4];"
               : "=r"(value.word[0]), "=r"(value.word[1]), "=r"(value.word[2]), "=r"(value.word[3])
               : "l"(__cvta_generic_to_global(source)));
  return value;
#else
  return load_global_16(source, site);
#endif
}

DSV4_DEVICE void store_global_16(void* destination, const Words4& value, Site site = Site::here()) {
#if defined(__CUDACC__)
  // As text: nvcc takes a store of floats through uint4 apart.
  asm volatile("st.global.v4.b32 [%0], {%1, %2, %3, %4};" ::"l"(__cvta_generic_to_global(destination)),
               "r"(value.word[0]), "r"(value.word[1]), "r"(value.word[2]), "r"(value.word[3])
               : "memory");
#else
  simt::check_aligned(destination, 16, site);
  *static_cast<Words4*>(destination) = value;
#endif
}

// Several elements as one access of 4 or 8 bytes, of which the pointer must be a multiple.
DSV4_DEVICE uint32_t load_global_4(const void* source, Site site = Site::here()) {
#if !defined(__CUDACC__)
  simt::check_aligned(source, 4, site);
#endif
  return *static_cast<const uint32_t*>(source);
}

DSV4_DEVICE Words2 load_global_8(const void* source, Site site = Site::here()) {
#if !defined(__CUDACC__)
  simt::check_aligned(source, 8, site);
#endif
  return *static_cast<const Words2*>(source);
}

DSV4_DEVICE void store_global_4(void* destination, uint32_t value, Site site = Site::here()) {
#if !defined(__CUDACC__)
  simt::check_aligned(destination, 4, site);
#endif
  *static_cast<uint32_t*>(destination) = value;
}

DSV4_DEVICE void store_global_8(void* destination, const Words2& value, Site site = Site::here()) {
#if defined(__CUDACC__)
  asm volatile("st.global.v2.b32 [%0], {%1, %2};" ::"l"(__cvta_generic_to_global(destination)), "r"(value.word[0]),
               "r"(value.word[1])
               : "memory");
#else
  simt::check_aligned(destination, 8, site);
  *static_cast<Words2*>(destination) = value;
#endif
}

// Copies 16 bytes to shared memory while the thread goes on, zeros after the first source_bytes (0 or 16). Visible to
// the thread itself after cp_async_wait, to others after a barrier that follows.
DSV4_DEVICE void cp_async_16(uint32_t destination, const void* source, int source_bytes, Site site = Site::here()) {
#if defined(__CUDACC__)
  asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16, %2;" ::"r"(destination),
               "l"(__cvta_generic_to_global(source)), "r"(source_bytes)
               : "memory");
#else
  simt::cp_async_16(destination, source, source_bytes, site);
#endif
}

DSV4_DEVICE void cp_async_commit(Site site = Site::here()) {
#if defined(__CUDACC__)
  asm volatile("cp.async.commit_group;" ::: "memory");
#else
  simt::cp_async_commit(site);
#endif
}

// Waits until at most kPending of this thread's newest groups are still on their way.
template <int kPending>
DSV4_DEVICE void cp_async_wait(Site site = Site::here()) {
#if defined(__CUDACC__)
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
#else
  simt::cp_async_wait(kPending, site);
#endif
}

// ---- Synchronisation ----

DSV4_DEVICE void sync_threads(Site site = Site::here()) {
#if defined(__CUDACC__)
  __syncthreads();
#else
  simt::sync_threads(site);
#endif
}

// A barrier of some of the block's warps: kThreads of them (a multiple of 32) under a number from 1 to 15.
template <int kBarrier, int kThreads>
DSV4_DEVICE void sync_named(Site site = Site::here()) {
  static_assert(kBarrier >= 1 && kBarrier <= 15 && kThreads % 32 == 0);
#if defined(__CUDACC__)
  asm volatile("bar.sync %0, %1;" ::"n"(kBarrier), "n"(kThreads) : "memory");
#else
  simt::sync_named(kBarrier, kThreads, site);
#endif
}

DSV4_DEVICE void sync_warp(Site site = Site::here()) {
#if defined(__CUDACC__)
  __syncwarp();
#else
  simt::sync_warp(site);
#endif
}

// ---- Whole warps: all 32 lanes take part ----

DSV4_DEVICE float shuffle(float value, int source_lane, Site site = Site::here()) {
#if defined(__CUDACC__)
  return __shfl_sync(0xFFFFFFFFu, value, source_lane);
#else
  return float_from_bits(simt::shuffle(bits_from_float(value), source_lane, site));
#endif
}

DSV4_DEVICE uint32_t shuffle(uint32_t value, int source_lane, Site site = Site::here()) {
#if defined(__CUDACC__)
  return __shfl_sync(0xFFFFFFFFu, value, source_lane);
#else
  return simt::shuffle(value, source_lane, site);
#endif
}

DSV4_DEVICE float shuffle_xor(float value, int mask, Site site = Site::here()) {
#if defined(__CUDACC__)
  return __shfl_xor_sync(0xFFFFFFFFu, value, mask);
#else
  return float_from_bits(simt::shuffle_xor(bits_from_float(value), mask, site));
#endif
}

DSV4_DEVICE uint32_t shuffle_xor(uint32_t value, int mask, Site site = Site::here()) {
#if defined(__CUDACC__)
  return __shfl_xor_sync(0xFFFFFFFFu, value, mask);
#else
  return simt::shuffle_xor(value, mask, site);
#endif
}

// Bit l: whether the condition holds in lane l.
DSV4_DEVICE uint32_t ballot(bool condition, Site site = Site::here()) {
#if defined(__CUDACC__)
  return __ballot_sync(0xFFFFFFFFu, condition);
#else
  uint32_t lanes = condition ? 1u << (simt::thread_index() % 32) : 0u;
  for (int mask = 1; mask < 32; mask *= 2) lanes |= simt::shuffle_xor(lanes, mask, site);
  return lanes;
#endif
}

// The sum over the lanes, modulo 2^32.
DSV4_DEVICE uint32_t warp_sum(uint32_t value, Site site = Site::here()) {
#if defined(__CUDACC__)
  return __reduce_add_sync(0xFFFFFFFFu, value);
#else
  for (int mask = 1; mask < 32; mask *= 2) value += simt::shuffle_xor(value, mask, site);
  return value;
#endif
}

// Four 8 x 8 matrices of 16-bit elements. Lane 8 i + r gives the address of row r (16 bytes) of matrix i; lane l
// receives from matrix i the elements (row l / 4, columns 2 (l % 4) and the next), the lower column in the low half.
DSV4_DEVICE void ldmatrix_x4(uint32_t (&matrix)[4], uint32_t address, Site site = Site::here()) {
#if defined(__CUDACC__)
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(matrix[0]), "=r"(matrix[1]), "=r"(matrix[2]), "=r"(matrix[3])
               : "r"(address)
               : "memory");
#else
  simt::ldmatrix_x4(address, matrix, site);
#endif
}

// The same, each matrix transposed: lane l receives the elements (rows 2 (l % 4) and the next, column l / 4), the lower
// row in the low half.
DSV4_DEVICE void ldmatrix_x4_transposed(uint32_t (&matrix)[4], uint32_t address, Site site = Site::here()) {
#if defined(__CUDACC__)
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(matrix[0]), "=r"(matrix[1]), "=r"(matrix[2]), "=r"(matrix[3])
               : "r"(address)
               : "memory");
#else
  simt::ldmatrix_x4_transposed(address, matrix, site);
#endif
}

// d [16, 8] += a [16, 16] b [16, 8], bfloat16 in, float32 out. Lane l, register j, element e (low half first):
//   a: row l / 4 + 8 (j % 2), column 2 (l % 4) + 8 (j / 2) + e     b: column l / 4, row 2 (l % 4) + 8 j + e
//   d: row l / 4 + 8 (j / 2), column 2 (l % 4) + j % 2
DSV4_DEVICE void mma_m16n8k16(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1,
                              Site site = Site::here()) {
#if defined(__CUDACC__)
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, "
      "%3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
#else
  const uint32_t b[2] = {b0, b1};
  simt::mma_m16n8k16_bf16(d, a, b, site);
#endif
}

// ---- Arithmetic: spelled out, so that no compiler fuses what another does not ----

DSV4_DEVICE float fma(float a, float b, float c) {
#if defined(__CUDACC__)
  return __fmaf_rn(a, b, c);
#else
  return std::fma(a, b, c);
#endif
}

DSV4_DEVICE double fma(double a, double b, double c) {
#if defined(__CUDACC__)
  return __fma_rn(a, b, c);
#else
  return std::fma(a, b, c);
#endif
}

DSV4_DEVICE float add(float a, float b) {
#if defined(__CUDACC__)
  return __fadd_rn(a, b);
#else
  return a + b;
#endif
}

DSV4_DEVICE float multiply(float a, float b) {
#if defined(__CUDACC__)
  return __fmul_rn(a, b);
#else
  return a * b;
#endif
}

DSV4_DEVICE float divide(float a, float b) {
#if defined(__CUDACC__)
  return __fdiv_rn(a, b);
#else
  return a / b;
#endif
}

DSV4_DEVICE float square_root(float value) {
#if defined(__CUDACC__)
  return __fsqrt_rn(value);
#else
  return std::sqrt(value);
#endif
}

// At most 2 ulp from exact on a GPU; the host's differs by as little.
DSV4_DEVICE float exponential(float value) {
#if defined(__CUDACC__)
  return expf(value);
#else
  return std::exp(value);
#endif
}

// Natural; at most 1 ulp from exact on a GPU.
DSV4_DEVICE float logarithm(float value) {
#if defined(__CUDACC__)
  return logf(value);
#else
  return std::log(value);
#endif
}

// Of 1 + value; at most 2 ulp from exact on a GPU.
DSV4_DEVICE float logarithm_1p(float value) {
#if defined(__CUDACC__)
  return log1pf(value);
#else
  return std::log1p(value);
#endif
}

DSV4_DEVICE float maximum(float a, float b) {
#if defined(__CUDACC__)
  return fmaxf(a, b);
#else
  return std::fmax(a, b);
#endif
}

// How many bits are set.
DSV4_DEVICE int count_ones(uint32_t bits) {
#if defined(__CUDACC__)
  return __popc(bits);
#else
  return __builtin_popcount(bits);
#endif
}

// Two floats rounded to nearest even, the first in the low half.
DSV4_DEVICE uint32_t pack_bf16(float low, float high) {
#if defined(__CUDACC__)
  uint32_t packed;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(packed) : "f"(high), "f"(low));
  return packed;
#else
  return bf16_from_float(low).bits | static_cast<uint32_t>(bf16_from_float(high).bits) << 16;
#endif
}

// The e4m3 codes of two finite floats, clamped to +-448, rounded to nearest even, the first in the low byte.
DSV4_DEVICE uint32_t pack_e4m3(float low, float high) {
#if defined(__CUDACC__) && __CUDA_ARCH__ >= 890
  uint16_t packed;
  asm("cvt.rn.satfinite.e4m3x2.f32 %0, %1, %2;" : "=h"(packed) : "f"(high), "f"(low));
  return packed;
#else
  return e4m3_code(low) | static_cast<uint32_t>(e4m3_code(high)) << 8;
#endif
}

// Four of the eight bytes of a (0 to 3) and b (4 to 7): the lowest nibble of the selector names the lowest byte.
DSV4_DEVICE uint32_t select_bytes(uint32_t a, uint32_t b, uint32_t selector) {
#if defined(__CUDACC__)
  return __byte_perm(a, b, selector);
#else
  const uint64_t bytes = static_cast<uint64_t>(b) << 32 | a;
  uint32_t result = 0;
  for (int i = 0; i < 4; ++i)
    result |= static_cast<uint32_t>(bytes >> (8 * (selector >> (4 * i) & 7u)) & 0xFFu) << (8 * i);
  return result;
#endif
}

// The products of two pairs of bfloat16, each rounded once. Denormals count.
DSV4_DEVICE uint32_t multiply_bf16_pairs(uint32_t a, uint32_t b) {
#if defined(__CUDACC__)
  uint32_t product;  // plus -0: a product alone is an instruction of newer GPUs
  asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(product) : "r"(a), "r"(b), "r"(0x80008000u));
  return product;
#else
  const float low = float_from_bits(a << 16) * float_from_bits(b << 16);
  return pack_bf16(low, float_from_bits(a & 0xFFFF0000u) * float_from_bits(b & 0xFFFF0000u));
#endif
}

DSV4_DEVICE float low_bf16(uint32_t packed) { return float_from_bits(packed << 16); }
DSV4_DEVICE float high_bf16(uint32_t packed) { return float_from_bits(packed & 0xFFFF0000u); }

}  // namespace dsv4::ptx
