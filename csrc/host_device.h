// FA_BOTH: a small function for the CPU and for the GPU, always inlined (csrc/cpu is compiled once per instruction set,
// and a copy that is not inlined would be the portable one everywhere).
#pragma once

#if defined(__CUDACC__)
#define FA_BOTH __host__ __device__ __forceinline__
#else
#define FA_BOTH inline __attribute__((always_inline))
#endif
