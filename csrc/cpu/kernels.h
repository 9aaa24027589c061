// What the bindings call and every instruction set provides: the passes over the classes.
#pragma once

#include <cstdint>
#include <optional>
#include <string>

#include "arguments.h"

namespace fa {

// A logistic loss for each negative in place of its exponential: softplus(scale * (g(cos(theta - angle)) + offset) +
// bias) with g(z) = 2 ((z + 1) / 2)^exponent - 1. With by_bias class_stats sums the derivatives by the bias instead.
struct Logistic {
  double scale, exponent, angle, offset, bias;
  bool by_bias;
};

// How the negatives enter the sums, where it is not by the cosines of weight's rows as they are. With these, class c of
// embedding i has the cosine c_ic = max_k cos(x_i, w_r), r = c * sub_centers + k, its derivative is that of the
// greatest (the first of equals), and its logit is scale * f_i(c_ic), where f_i(c) = a c^2 + b c + d + e sqrt(1 - c^2)
// for c > threshold_i, else c; with logistic losses exp(scale * f(c)) is the loss of c. A target is the row of its
// class that is the greatest; the class's other rows get no gradient.
struct Negatives {
  int64_t sub_centers = 1;          // rows of weight that each class has, adjacent; weight's rows are a multiple of it
  const void* threshold = nullptr;  // (N,) of the compute type, or null: f_i(c) = c
  double a = 0, b = 1, d = 0, e = 0;
  std::optional<Logistic> logistic;
  bool plain() const { return sub_centers == 1 && threshold == nullptr && !logistic; }
};
constexpr int64_t kMaxSubCenters = 16;

// What a pass over the classes takes besides. With negatives that are not plain: exp(scale * f(c)) in both sums of
// class_stats, times f'(c) in the latter; negative_max is the greatest f(c) where only the maximum is wanted, else the
// greatest c; in weight_grad G_ij = negative_coefficient_i * exp(scale * f(c) - lse_i) * f'(c).
struct PassOptions {
  int threads;
  Negatives negatives;
  // With plain negatives only. (N, kMoments) or null: class_stats writes sum_j exp(scale * cos_ij - shift_i) cos_ij^k.
  double* moments = nullptr;
  // (N, D) contiguous, of the compute type, or null: weight_grad writes sum_j G_ij w_j / |w_j| over j != target_i.
  void* negative_grad = nullptr;
};
constexpr int kMoments = 16;  // MOMENTS of fused_arcface.engine.terms

// finish_negatives: sums of class_stats, over all shards, to lse_i = log(negative_sum_i) + shift_i and mean_center_i =
// center_sum_i / negative_sum_i; a row without negatives has the mean 0.
struct FinishArgs {
  int64_t rows, columns;
  const void* negative_sum;  // (rows,), like the next of the compute type
  const void* center_sum;    // (rows, columns) contiguous
  const double* shift;       // (rows,) or null: zero
  double* lse;               // (rows,)
  void* mean_center;         // (rows, columns) contiguous
};

// unit_embedding_grad: mean_center and d_unit (N, D) contiguous, coefficients (N,), all of the compute type.
struct UnitGradArgs {
  int64_t rows;
  const void *mean_center, *negative_coefficient, *target_coefficient;
  void* d_unit;
};

// margin_loss: (N,) each, of the compute type.
struct MarginLossArgs {
  int64_t rows;
  const void *negative_lse, *target_cosine;
  double scale, m1, m2, m3;
  std::string boundary;
  bool straight_through;
  void *loss, *lse, *d_lse, *d_cosine;
};

// Passes are found under the Dtype of their products: fp32 and fp64 everywhere, bf16 (with sums in fp32) where the
// processor multiplies it; null elsewhere.
constexpr int kDtypes = 4;
struct Kernels {
  const char* isa;
  void (*class_stats[kDtypes])(const ClassStatsArgs&, const PassOptions&);
  void (*weight_grad[kDtypes])(const WeightGradArgs&, const PassOptions&);
  // Writes weight, not d_weight.
  void (*update_centers[kDtypes])(const WeightGradArgs&, const CenterStep&, const PassOptions&);
  int64_t (*multiply_adds[kDtypes])(int64_t rounds, int threads);  // see peak.h

  // The stages over the rows (row_stages.h), under the compute type.
  void (*target_cosine[kDtypes])(const Matrix& embeddings, const Matrix& weight, const int64_t* target, void* cosine,
                                 int threads);
  void (*finish_negatives[kDtypes])(const FinishArgs&);
  void (*unit_embedding_grad[kDtypes])(const Matrix& weight, const int64_t* target, const UnitGradArgs&, int threads);
  void (*embedding_grad[kDtypes])(const void* d_unit, const Matrix& embeddings, const Matrix& d_embeddings,
                                  int threads);
  void (*margin_loss[kDtypes])(const MarginLossArgs&);
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
#if FA_AVX512_BF16
namespace avx512_bf16 {
extern const Kernels kKernels;
}
#endif
#endif

// The kernels for an instruction set by name, or null when this processor or this build lacks it; the best one for "".
const Kernels* find_kernels(const char* isa);

}  // namespace fa
