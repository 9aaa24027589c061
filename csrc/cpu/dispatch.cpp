// Chooses the instantiation of the kernels at run time: a wheel built on one processor must run on another.
#include <cstring>

#include "kernels.h"

namespace fa {

namespace {

bool supported(const Kernels& kernels) {
#if FA_X86
  __builtin_cpu_init();
  const bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
                      __builtin_cpu_supports("fma");
#if FA_AVX512_BF16
  if (&kernels == &avx512_bf16::kKernels) return avx512 && __builtin_cpu_supports("avx512bf16");
#endif
  if (&kernels == &avx512::kKernels) return avx512;
  if (&kernels == &avx2::kKernels) return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
#endif
  return &kernels == &portable::kKernels;
}

}  // namespace

const Kernels* find_kernels(const char* isa) {
  static const Kernels* const fastest_first[] = {
#if FA_AVX512_BF16
      &avx512_bf16::kKernels,
#endif
#if FA_X86
      &avx512::kKernels, &avx2::kKernels,
#endif
      &portable::kKernels};
  for (const Kernels* kernels : fastest_first)
    if (supported(*kernels) && (*isa == '\0' || std::strcmp(isa, kernels->isa) == 0)) return kernels;
  return nullptr;
}

}  // namespace fa
