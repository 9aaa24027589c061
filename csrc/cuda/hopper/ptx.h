// The instructions of sm_90a beyond ../ptx.h, one function each, with the PTX ISA's rules for their operands.
// tests/cuda_emulation/hopper.h has the same functions in C++.
#pragma once

#include "../ptx.h"

#if !defined(__CUDACC__)
#include "hopper.h"
#else

#include <cuda.h>

namespace fa::cuda::hopper {

using TensorMap = CUtensorMap;

// The block's dynamic shared memory. The swizzle needs a start at a multiple of 1024 bytes. The system keeps the first
// 1024 bytes and the kernels have no other shared memory, so it begins there. check_alignment ends the kernel if not.
__device__ __forceinline__ char* swizzled_shared() {
  extern __shared__ __align__(1024) char swizzled_memory[];
  return swizzled_memory;
}
__device__ __forceinline__ void check_alignment() {
  if (shared_address(swizzled_shared()) % 1024 != 0) __trap();
}

// Barriers of arrivals and bytes (mbarrier). A phase ends when all arrivals and all announced bytes have come; the next
// one begins at once. The first phase has parity 0.
__device__ __forceinline__ void barrier_init(uint64_t* barrier, int arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(barrier)), "r"(arrivals) : "memory");
}
// Shows the initial barriers to the other blocks of the cluster and to copies. A barrier of the cluster must follow.
__device__ __forceinline__ void barrier_init_fence() {
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}
__device__ __forceinline__ void barrier_arrive(uint64_t* barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_address(barrier)) : "memory");
}
// Arrives at the same barrier of another block of the cluster. There is no .release.cluster, as in CUTLASS: it would
// wait for a fence of the whole GPU, and the other block reads nothing that this thread has written.
__device__ __forceinline__ void barrier_arrive_at(uint64_t* barrier, int block) {
  asm volatile(
      "{\n.reg .b32 at;\nmapa.shared::cluster.u32 at, %0, %1;\nmbarrier.arrive.shared::cluster.b64 _, [at];\n}" ::"r"(
          shared_address(barrier)),
      "r"(block)
      : "memory");
}
// Arrives, and announces the bytes that copies will bring in this phase.
__device__ __forceinline__ void barrier_arrive_expecting(uint64_t* barrier, int bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(barrier)), "r"(bytes)
               : "memory");
}
// Waits until the phase of this parity has ended.
__device__ __forceinline__ void barrier_wait(uint64_t* barrier, uint32_t parity) {
  asm volatile(
      "{\n.reg .pred ended;\nagain%=:\nmbarrier.try_wait.parity.shared::cta.b64 ended, [%0], %1;\n@ended bra done%=;\n"
      "bra again%=;\ndone%=:\n}" ::"r"(shared_address(barrier)),
      "r"(parity)
      : "memory");
}

// The copies to shared memory arrive at `barrier` with their bytes.
// Copies a box of a tensor map: 64 rows of 64 numbers, zeros where the matrix has none, in the 128-byte swizzle.
__device__ __forceinline__ void copy_box(char* to, const TensorMap* map, int column, int row, uint64_t* barrier) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4}], [%2];" ::
          "r"(shared_address(to)),
      "l"(map), "r"(shared_address(barrier)), "r"(column), "r"(row)
      : "memory");
}
// Copies the same to several blocks of the cluster, one for each bit of `blocks`, to the same place and barrier in
// each.
__device__ __forceinline__ void copy_box_to_all(char* to, const TensorMap* map, int column, int row, uint64_t* barrier,
                                                uint16_t blocks) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes.multicast::cluster [%0], "
      "[%1, {%3, %4}], [%2], %5;" ::"r"(shared_address(to)),
      "l"(map), "r"(shared_address(barrier)), "r"(column), "r"(row), "h"(blocks)
      : "memory");
}
// Copies consecutive bytes. Both addresses and the size are multiples of 16.
__device__ __forceinline__ void copy_bytes(void* to, const void* from, int bytes, uint64_t* barrier) {
  asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(
                   shared_address(to)),
               "l"(from), "r"(bytes), "r"(shared_address(barrier))
               : "memory");
}
// Brings bytes of global memory to the L2. The address and the size are multiples of 16.
__device__ __forceinline__ void prefetch_bytes(const void* from, int bytes) {
  asm volatile("cp.async.bulk.prefetch.L2.global [%0], %1;" ::"l"(from), "r"(bytes) : "memory");
}

// Stores to shared memory what a product reads later, after a fence_async. The emulation checks that there is one.
template <typename T>
__device__ __forceinline__ void store_shared(T* to, const T& value) {
  *to = value;
}
// Orders this thread's accesses of shared memory before the later ones of copies and of warpgroup products, which reach
// memory by another way. A barrier must follow where another thread starts those.
__device__ __forceinline__ void fence_async() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

// Products of a warpgroup. The fence comes before the first one after other accesses to the registers of its operands;
// until the wait those registers, and what lies in shared memory, must be left alone.
__device__ __forceinline__ void product_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ __forceinline__ void product_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
// Waits until all committed products are done. The accumulators are named, so that the compiler reads none of them
// before.
template <int count>
__device__ __forceinline__ void product_wait(float (&accumulators)[count]) {
  asm volatile("wgmma.wait_group.sync.aligned 0;" ::: "memory");
#pragma unroll
  for (int i = 0; i < count; ++i) asm volatile("" : "+f"(accumulators[i])::"memory");
}

// Four 8 x 8 matrices of 16-bit numbers to shared memory, laid out as load_matrices reads them.
__device__ __forceinline__ void store_matrices(char* row, uint32_t a, uint32_t b, uint32_t c, uint32_t d) {
  asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(shared_address(row)), "r"(a),
               "r"(b), "r"(c), "r"(d)
               : "memory");
}

// Two numbers to the nearest bf16, the first one in the lower half.
__device__ __forceinline__ uint32_t pack_bf16(float low, float high) {
  uint32_t packed;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(packed) : "f"(high), "f"(low));
  return packed;
}

__device__ __forceinline__ int cluster_rank() {
  int rank;
  asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return rank;
}
__device__ __forceinline__ void cluster_sync() {
  asm volatile("barrier.cluster.arrive.release.aligned;\nbarrier.cluster.wait.acquire.aligned;" ::: "memory");
}
// A barrier of `threads` threads of the block, which are whole warps. Barrier 0 is __syncthreads.
template <int barrier, int threads>
__device__ __forceinline__ void named_sync() {
  asm volatile("bar.sync %0, %1;" ::"n"(barrier), "n"(threads) : "memory");
}
__device__ __forceinline__ bool any_of_warp(bool value) { return __any_sync(0xffffffffu, value); }
// Returns the first lane's value, which the compiler then knows to be the same in all lanes.
__device__ __forceinline__ int uniform(int value) { return __shfl_sync(0xffffffffu, value, 0); }

// Returns the same value, which the compiler takes for another. So it keeps nothing in registers that follows from it.
__device__ __forceinline__ int fresh(int value) {
  asm volatile("" : "+r"(value));
  return value;
}

// The registers of each thread of this warpgroup from here on: taken from, or given back to, the block's pool.
template <int count>
__device__ __forceinline__ void take_registers() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(count));
}
template <int count>
__device__ __forceinline__ void give_registers() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(count));
}

}  // namespace fa::cuda::hopper

#endif
