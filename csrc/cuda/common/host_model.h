// What the wrappers of ptx.h call where the compiler is not nvcc: a model of a GPU's thread blocks on the CPU,
// implemented in tests/cuda_host/simt. Addresses of shared memory are 32-bit, as in PTX.
#pragma once

#include <cstdint>

namespace dsv4::simt {

// The line of a kernel that a wrapper was called from. Reports name it, and the mutation test leaves one out at a time.
struct Site {
  const char* file;
  int line;
};

int thread_index();
int64_t block_index(int axis);  // 0: x, 1: y

uint32_t shared_base();
void load_shared(uint32_t address, void* value, int bytes, Site site);
void store_shared(uint32_t address, const void* value, int bytes, Site site);

void sync_threads(Site site);
void sync_named(int barrier, int threads, Site site);
void sync_warp(Site site);

uint32_t shuffle(uint32_t value, int source_lane, Site site);
uint32_t shuffle_xor(uint32_t value, int mask, Site site);
void ldmatrix_x4(uint32_t address, uint32_t matrices[4], Site site);
void ldmatrix_x4_transposed(uint32_t address, uint32_t matrices[4], Site site);
void mma_m16n8k16_bf16(float d[4], const uint32_t a[4], const uint32_t b[2], Site site);

void cp_async_16(uint32_t destination, const void* source, int source_bytes, Site site);
void cp_async_commit(Site site);
void cp_async_wait(int pending_groups, Site site);

void check_aligned(const void* pointer, int bytes, Site site);

}  // namespace dsv4::simt
