// wgmma, as C++ functions over arrays of registers. d (64, n) += a (64, 16) b (16, n) in fp32, from bf16.
//
// Thread t of the warpgroup holds of d, with v counting its registers, row 16 (t / 32) + t % 32 / 4 + 8 (v / 2 % 2) and
// column 2 (t % 4) + v % 2 + 8 (v / 4). An operand a in registers has the same rows, and depth
// 2 (t % 4) + v % 2 + 8 (v / 4) with v counting its eight numbers.
#pragma once

#include "ptx.h"

namespace fa::cuda::hopper {

// Descriptors of an operand in shared memory, in the 128-byte swizzle. It lies in boxes of 64 rows of 128 bytes, so
// groups of eight rows are 1024 bytes apart. The rows hold the depth, which begins at `at`.
__device__ __forceinline__ uint64_t rows_of_depth(uint32_t at) {
  return static_cast<uint64_t>((at & 0x3ffff) >> 4) | uint64_t{1} << 16 | uint64_t{1024 >> 4} << 32 | uint64_t{1} << 62;
}
// The rows are the depth. Each holds 64 of the operand's columns; the next 64 columns lie `box` bytes further on.
__device__ __forceinline__ uint64_t rows_of_columns(uint32_t at, int box) {
  return static_cast<uint64_t>((at & 0x3ffff) >> 4) | static_cast<uint64_t>(box >> 4) << 16 |
         uint64_t{1024 >> 4} << 32 | uint64_t{1} << 62;
}

// The same operand `bytes` further on. Addresses end below 2^18, so nothing is carried out of their field. This is one
// addition. A new descriptor would take four dependent instructions, longer than a product may take.
__device__ __forceinline__ uint64_t further(uint64_t operand, int bytes) {
  return (operand & 0xffffffff00000000u) | static_cast<uint32_t>(operand + static_cast<uint32_t>(bytes >> 4));
}

#if defined(__CUDACC__)

#define FA_D4(i) "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3])
#define FA_D16(i) FA_D4(i), FA_D4(i + 4), FA_D4(i + 8), FA_D4(i + 12)
#define FA_D64(i) FA_D16(i), FA_D16(i + 16), FA_D16(i + 32), FA_D16(i + 48)
#define FA_NAMES_32                                                                       \
  "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, " \
  "%19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
#define FA_NAMES_128                                                                           \
  "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, "      \
  "%19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, %32, %33, %34, %35, "      \
  "%36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, %48, %49, %50, %51, %52, "      \
  "%53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63, %64, %65, %66, %67, %68, %69, "      \
  "%70, %71, %72, %73, %74, %75, %76, %77, %78, %79, %80, %81, %82, %83, %84, %85, %86, "      \
  "%87, %88, %89, %90, %91, %92, %93, %94, %95, %96, %97, %98, %99, %100, %101, %102, %103, "  \
  "%104, %105, %106, %107, %108, %109, %110, %111, %112, %113, %114, %115, %116, %117, %118, " \
  "%119, %120, %121, %122, %123, %124, %125, %126, %127"

// Operand a is in registers. With `add` the product is added to d, else it overwrites d.
__device__ __forceinline__ void multiply_scores(float (&d)[32], const uint32_t (&a)[4], uint64_t b, bool add) {
  asm volatile(
      "{\n.reg .pred add;\nsetp.ne.b32 add, %37, 0;\nwgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 "
      "{" FA_NAMES_32 "}, {%32, %33, %34, %35}, %36, add, 1, 1, 0;\n}\n"
      : FA_D16(0), FA_D16(16)
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(static_cast<int>(add)));
}
// Operand a is in shared memory. The product is added to d.
__device__ __forceinline__ void multiply_scores(float (&d)[32], uint64_t a, uint64_t b) {
  asm volatile(
      "{\n.reg .pred add;\nsetp.ne.b32 add, 1, 0;\nwgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 "
      "{" FA_NAMES_32 "}, %32, %33, add, 1, 1, 0, 0;\n}\n"
      : FA_D16(0), FA_D16(16)
      : "l"(a), "l"(b));
}
// Operand a is in shared memory, and b's rows are the depth. The product is added to d.
__device__ __forceinline__ void multiply_values(float (&d)[128], uint64_t a, uint64_t b) {
  asm volatile(
      "{\n.reg .pred add;\nsetp.ne.b32 add, 1, 0;\nwgmma.mma_async.sync.aligned.m64n256k16.f32.bf16.bf16 "
      "{" FA_NAMES_128 "}, %128, %129, add, 1, 1, 0, 1;\n}\n"
      : FA_D64(0), FA_D64(64)
      : "l"(a), "l"(b));
}

#undef FA_D4
#undef FA_D16
#undef FA_D64
#undef FA_NAMES_32
#undef FA_NAMES_128

#endif

}  // namespace fa::cuda::hopper
