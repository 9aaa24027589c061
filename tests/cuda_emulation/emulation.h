// CUDA's words in C++17, so that csrc/cuda compiles for the CPU as it stands, and what the runs of its kernels need:
// see fibres.cpp and threads.cpp. csrc/cuda/runtime.h and ptx.h include this directory's headers where nvcc is not the
// compiler.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <deque>
#include <functional>
#include <vector>

struct dim3 {
  unsigned x = 1, y = 1, z = 1;
  dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

namespace emulation {

struct Copy {
  char* to;
  const char* from;
};

// What a thread of a block knows.
struct Thread {
  dim3 index, block, grid;
  int rank = 0;  // of the block in its cluster
  char* shared = nullptr;
  std::vector<Copy> open_copies;
  std::deque<std::vector<Copy>> committed_copies;
};

Thread& self();

// Runs every cluster of a grid, one after the other, with each block's shared memory full of NaN (bytes 0xff) at its
// start and unmapped pages on both sides of it. A cluster is so many neighbors in x.
void run(dim3 grid, int threads, int shared_bytes, const std::function<void()>& kernel, int cluster = 1);

void block_barrier();
void named_barrier(int id, int threads);
void cluster_barrier();
void warp_barrier();

// What 32 threads do together. Each gives its `in` and receives its `out`; no memory is ordered by it.
enum class Collective {
  kShuffleXor,
  kFirst,
  kAny,
  kMatrices,
  kMatricesTransposed,
  kStoreMatrices,
  kMmaBFloat16,
  kMmaFloat16,
  kMmaTf32
};
void collective(Collective which, const void* in, void* out);

// How many matrices of load_matrices and store_matrices had two rows in the same banks of shared memory so far.
int64_t bank_conflicts();

struct ShuffleIn {
  uint32_t value;
  int mask;
};
struct MatrixRow {
  uintptr_t address;
  char bytes[16];
};
struct StoreIn {
  char* row;
  uint32_t words[4];
};
struct MmaIn {
  uint32_t a[4], b[2];
  float d[4];
};

[[noreturn]] void fail(const char* why);

// A product's sum as tensor cores keep it: cut off, not rounded.
float toward_zero(double sum);

template <typename T>
T shuffle_xor(unsigned lanes, T value, int mask) {
  static_assert(sizeof(T) % 4 == 0, "whole words");
  if (lanes != 0xffffffffu) fail("a shuffle of part of a warp");
  uint32_t words[sizeof(T) / 4];
  std::memcpy(words, &value, sizeof value);
  for (uint32_t& word : words) {
    const ShuffleIn in{word, mask};
    collective(Collective::kShuffleXor, &in, &word);
  }
  std::memcpy(&value, words, sizeof value);
  return value;
}

}  // namespace emulation

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __cluster_dims__(...)
#define __grid_constant__
#define threadIdx (::emulation::self().index)
#define blockIdx (::emulation::self().block)
#define gridDim (::emulation::self().grid)
#define __syncthreads() ::emulation::block_barrier()
#define __syncwarp() ::emulation::warp_barrier()
#define __shfl_xor_sync(lanes, value, mask) ::emulation::shuffle_xor(lanes, value, mask)

inline float __uint_as_float(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}
inline uint32_t __float_as_uint(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  return bits;
}
inline int min(int a, int b) { return a < b ? a : b; }
