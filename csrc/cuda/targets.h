// The stages of O(N D): target cosines and the two halves of the embedding gradient, a warp a row. Sums are fp64: there
// is little to add, and squares of norms past 2e19 fit there.
#pragma once

#include "numbers.h"

namespace fa::cuda {

// Where dtypes differ from launch to launch and little is computed: an element under its own type.
__device__ __forceinline__ float load(const Matrix& m, int64_t row, int64_t column) {
  float value = NAN;
  visit_dtype(m, [&](const auto* data) { value = to_float(data[row * m.row_stride + column * m.column_stride]); });
  return value;
}

// |row|, by all lanes of a warp.
__device__ __forceinline__ double norm_of(const Matrix& m, int64_t row) {
  double squares = 0;
  for (int64_t d = threadIdx.x % kWarp; d < m.columns; d += kWarp) {
    const double x = load(m, row, d);
    squares += x * x;
  }
  return sqrt(warp_sum(squares));
}
__device__ __forceinline__ double floored(double norm) { return norm < kNormEpsilon ? kNormEpsilon : norm; }

__device__ __forceinline__ int64_t row_of_warp() {
  return static_cast<int64_t>(blockIdx.x) * (kRowThreads / kWarp) + threadIdx.x / kWarp;
}
inline int64_t row_blocks(int64_t rows) { return ceil_div(rows, kRowThreads / kWarp); }

// 0 where the target is -1 (not here), NaN where it is below (no class).
static __global__ void __launch_bounds__(kRowThreads)
    target_cosine_kernel(Matrix embeddings, Matrix weight, const int64_t* target, float* cosine) {
  const int64_t i = row_of_warp();
  if (i >= embeddings.rows) return;
  const int64_t j = target[i];
  double result = j < -1 ? NAN : 0.0;
  if (j >= 0) {
    double product = 0;
    for (int64_t d = threadIdx.x % kWarp; d < weight.columns; d += kWarp)
      product += static_cast<double>(load(embeddings, i, d)) * load(weight, j, d);
    result = warp_sum(product) / (floored(norm_of(embeddings, i)) * floored(norm_of(weight, j)));
    result = result > 1 ? 1 : result < -1 ? -1 : result;  // NaN stays
  }
  if (threadIdx.x % kWarp == 0) cosine[i] = static_cast<float>(result);
}

// negative_coefficient * mean_centre + target_coefficient * (unit centre of the target), mean_centre and out (N, D).
static __global__ void __launch_bounds__(kRowThreads)
    unit_embedding_grad_kernel(Matrix weight, const int64_t* target, const float* mean_centre,
                               const float* negative_coefficient, const float* target_coefficient, int64_t count,
                               float* out) {
  const int64_t i = row_of_warp();
  if (i >= count) return;
  const int64_t j = target[i];
  const float negative = negative_coefficient[i];
  const double of_target = j < 0 ? 0 : target_coefficient[i] / floored(norm_of(weight, j));
  for (int64_t d = threadIdx.x % kWarp; d < weight.columns; d += kWarp) {
    const int64_t at = i * weight.columns + d;
    out[at] = negative * mean_centre[at] + (j < 0 ? 0.0f : static_cast<float>(of_target * load(weight, j, d)));
  }
}

// d_embeddings from d_unit (N, D), the gradient by the unit embeddings.
static __global__ void __launch_bounds__(kRowThreads)
    embedding_grad_kernel(const float* d_unit, Matrix embeddings, Matrix d_embeddings) {
  const int64_t i = row_of_warp();
  if (i >= embeddings.rows) return;
  const double norm = norm_of(embeddings, i), reciprocal = 1 / floored(norm);
  double along = 0;
  for (int64_t d = threadIdx.x % kWarp; d < embeddings.columns; d += kWarp)
    along += load(embeddings, i, d) * reciprocal * d_unit[i * embeddings.columns + d];
  along = norm < kNormEpsilon ? 0 : warp_sum(along);
  for (int64_t d = threadIdx.x % kWarp; d < embeddings.columns; d += kWarp) {
    const double unit = load(embeddings, i, d) * reciprocal;
    const float value = static_cast<float>((d_unit[i * embeddings.columns + d] - unit * along) * reciprocal);
    visit_dtype(d_embeddings, [&](auto* data) {
      convert_gradient(value, norm < kNormEpsilon, &data[i * d_embeddings.row_stride + d * d_embeddings.column_stride]);
    });
  }
}

}  // namespace fa::cuda
