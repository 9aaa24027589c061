// What the bindings call and every instruction set provides: two passes over the classes, each in fp32 and fp64.
#pragma once

#include <cstdint>

#include "arguments.h"

namespace fa {

struct Kernels {
  const char* isa;
  void (*class_stats_fp32)(const ClassStatsArgs&);
  void (*class_stats_fp64)(const ClassStatsArgs&);
  void (*weight_grad_fp32)(const WeightGradArgs&);
  void (*weight_grad_fp64)(const WeightGradArgs&);
  void (*update_centers_fp32)(const WeightGradArgs&, const CenterStep&);  // weight is written, d_weight not used
  void (*update_centers_fp64)(const WeightGradArgs&, const CenterStep&);
  int64_t (*multiply_adds_fp32)(int64_t rounds, int threads);  // see peak.h
};

namespace portable {
extern const Kernels kKernels;
}
#if FA_X86
namespace avx2 {
extern const Kernels kKernels;
}
namespace avx512 {
extern const Kernels kKernels;
}
#endif

// The kernels for an instruction set by name, or null when this processor or this build lacks it; the best one for "".
const Kernels* find_kernels(const char* isa);

}  // namespace fa
