// What Python hands over, whichever device computes: plain structs of pointers and sizes. Python owns every buffer
// named here and has checked every size. What only one kind of device takes is in its own kernels.h.
#pragma once

#include <cstdint>

namespace fa {

enum class Dtype : int { kFloat32, kFloat64, kBFloat16, kFloat16 };

// A matrix in the caller's memory, any strides (in elements).
struct Matrix {
  void* data;
  Dtype dtype;
  int64_t rows, columns, row_stride, column_stride;
};

// The negatives' statistics of each embedding against all classes of this shard. With theta_ij the angle between
// embedding i and center j and every sum and maximum over the classes j != target_i:
//   negative_max_i = max_j cos_ij
//   negative_sum_i = sum_j exp(scale * cos_ij - shift_i)
//   center_sum_i   = sum_j exp(scale * cos_ij - shift_i) * w_j / |w_j|
// The last is the embedding gradient before its division by the total: softmax is attention whose keys and values are
// both the class centers, so it can be accumulated while the total is still unknown.
struct ClassStatsArgs {
  Matrix embeddings;      // (N, D)
  Matrix weight;          // (C, D)
  const int64_t* target;  // (N,) index into this weight, or -1: no column to leave out
  double scale;
  const double* shift;  // (N,) or null: zero
  void* negative_max;   // (N,), like the next two of the compute type
  void* negative_sum;   // (N,) or null: only the maximum is wanted
  void* center_sum;     // (N, D) contiguous, or null: not wanted
};

// d_weight_j = J_j sum_i G_ij x_i / |x_i|, J_j the Jacobian of w -> w / max(|w|, eps), and
//   G_ij = negative_coefficient_i * exp(scale * cos_ij - lse_i)   for j != target_i
//   G_ij = target_coefficient_i                                  for j == target_i
struct WeightGradArgs {
  Matrix embeddings;      // (N, D)
  Matrix weight;          // (C, D)
  const int64_t* target;  // (N,)
  double scale;
  const double* lse;                 // (N,) log-sum-exp of the negatives of all shards
  const void* negative_coefficient;  // (N,), like the next of the compute type
  const void* target_coefficient;    // (N,)
  Matrix d_weight;                   // (C, D), written
};

enum class MomentumType : int { kNone, kFloat64, kFloat32, kBFloat16, kInt8 };
constexpr int64_t kMomentumBlock = 64;  // columns that share an int8 momentum's unit: 1/16 byte an element for it

// In place of a gradient, one step of SGD with momentum on the class centers. With class j of weight_grad's standing
// for row r = rows[j], and its gradient g_j:  m_r = momentum * m_r + (g_j + weight_decay * w_r);  w_r -= lr * m_r.
struct CenterStep {
  const int64_t* rows;  // (classes,) ascending, or null: all rows of weight, in order; on a GPU, past weight: padding
  int64_t classes;
  MomentumType momentum_type;
  void* momentum;         // (rows of weight, D) contiguous, or null
  float* momentum_scale;  // (rows of weight, ceil(D / kMomentumBlock)): the units of an int8 momentum
  double lr, momentum_factor, weight_decay;
  uint64_t rounding_key;  // of seed and step
  int64_t class_start;    // global id of weight's first row
  const int64_t* ids;     // (rows of weight,) global ids, or null: those from class_start on
};

}  // namespace fa
