// The instructions that C++ has no words for, one function each, with what the PTX ISA says of their operands. All of
// them are collective over a warp or asynchronous; tests/cuda_emulation/ptx_emulation.h has the same functions in C++.
#pragma once

#include "runtime.h"
#include "sixteen_bit.h"

#if !defined(__CUDACC__)
#include "ptx_emulation.h"
#else

namespace fa::cuda {

__device__ __forceinline__ char* dynamic_shared() {
  extern __shared__ __align__(128) char memory[];
  return memory;
}

__device__ __forceinline__ uint32_t shared_address(const void* at) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(at));
}

// 16 bytes from global to shared memory, both so aligned, past L1. They are there after a copy_wait of this thread that
// counts their group, and for the other threads after a barrier behind it.
__device__ __forceinline__ void copy_async(char* shared, const char* global) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(shared_address(shared)), "l"(global) : "memory");
}
__device__ __forceinline__ void copy_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
// Until at most `pending` of the groups that this thread has committed are under way.
template <int pending>
__device__ __forceinline__ void copy_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(pending) : "memory");
}

// Four matrices of 8 rows by 16 bytes. Lanes 8m to 8m + 7 give the addresses of matrix m's rows; lane 4r + c receives
// the four bytes c of row r of each.
__device__ __forceinline__ void load_matrices(uint32_t (&to)[4], const char* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
               : "r"(shared_address(row))
               : "memory");
}
// The same of 8 by 8 16-bit numbers, each matrix transposed on the way: lane 4r + c receives column r's numbers 2c and
// 2c + 1.
__device__ __forceinline__ void load_matrices_transposed(uint32_t (&to)[4], const char* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
               : "r"(shared_address(row))
               : "memory");
}

// d (16, 8) += a (16, 16) b (16, 8), in fp32. With g = lane / 4, t = lane % 4 a lane holds
//   a[0] = a(g, 2t..2t+1), a[1] = a(g + 8, ..), a[2] = a(g, 2t+8..2t+9), a[3] = a(g + 8, ..)
//   b[0] = b(2t..2t+1, g), b[1] = b(2t+8..2t+9, g);  d[0] = d(g, 2t), d[1] = d(g, 2t+1), d[2], d[3] = d(g + 8, ..)
#define FA_MMA(name, instruction)                                                                       \
  __device__ __forceinline__ void name(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) { \
    asm(instruction " {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"                  \
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])                                                \
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));                            \
  }
FA_MMA(mma_bf16, "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32")
FA_MMA(mma_fp16, "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32")
// The same with a (16, 8) and b (8, 8) of fp32 numbers whose last 13 bits count for nothing:
//   a[0] = a(g, t), a[1] = a(g + 8, t), a[2] = a(g, t + 4), a[3] = a(g + 8, t + 4);  b[0] = b(t, g), b[1] = b(t + 4, g)
FA_MMA(mma_tf32, "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32")
#undef FA_MMA

// To the nearest number of tf32's ten fraction bits.
__device__ __forceinline__ float round_to_tf32(float x) {
  uint32_t bits;
  asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(bits) : "f"(x));
  return __uint_as_float(bits);
}

// 2^x to 2^-22, 0 where that is no normal number.
__device__ __forceinline__ float exp2_approximate(float x) {
  float result;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(x));
  return result;
}

__device__ __forceinline__ BFloat16 to_bf16(float x) {
  BFloat16 result;
  asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(result.bits) : "f"(x));
  return result;
}
__device__ __forceinline__ Float16 to_fp16(float x) {
  Float16 result;
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(result.bits) : "f"(x));
  return result;
}
__device__ __forceinline__ float from_fp16(Float16 x) {
  float result;
  asm("cvt.f32.f16 %0, %1;" : "=f"(result) : "h"(x.bits));
  return result;
}

}  // namespace fa::cuda

#endif
