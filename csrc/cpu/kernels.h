// What the bindings call and every instruction set provides: two passes over the classes, each in fp32 and fp64.
#pragma once

#include <cstdint>

#include "arguments.h"

namespace fa {

// How the negatives enter the sums, where it is not by the cosines of weight's rows as they are. With these, class c of
// embedding i has the cosine c_ic = max_k cos(x_i, w_r), r = c * sub_centres + k, its derivative is that of the
// greatest (the first of equals), and its logit is scale * f_i(c_ic), where f_i(c) = a c^2 + b c + d for c >
// threshold_i, else c. A target is the row of its class that is the greatest; the class's other rows get no gradient.
struct Negatives {
  int64_t sub_centres = 1;          // rows of weight that each class has, adjacent; weight's rows are a multiple of it
  const void* threshold = nullptr;  // (N,) of the compute type, or null: f_i(c) = c
  double a = 0, b = 1, d = 0;
  bool plain() const { return sub_centres == 1 && threshold == nullptr; }
};
constexpr int64_t kMaxSubCentres = 16;

// What a pass over the classes takes besides. With negatives that are not plain: exp(scale * f(c)) in both sums of
// class_stats, times f'(c) in the latter; negative_max is the greatest f(c) where only the maximum is wanted, else the
// greatest c; in weight_grad G_ij = negative_coefficient_i * exp(scale * f(c) - lse_i) * f'(c).
struct PassOptions {
  int threads;
  Negatives negatives;
};

struct Kernels {
  const char* isa;
  void (*class_stats_fp32)(const ClassStatsArgs&, const PassOptions&);
  void (*class_stats_fp64)(const ClassStatsArgs&, const PassOptions&);
  void (*weight_grad_fp32)(const WeightGradArgs&, const PassOptions&);
  void (*weight_grad_fp64)(const WeightGradArgs&, const PassOptions&);
  void (*update_centres_fp32)(const WeightGradArgs&, const CentreStep&,
                              const PassOptions&);  // writes weight, not d_weight
  void (*update_centres_fp64)(const WeightGradArgs&, const CentreStep&, const PassOptions&);
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
