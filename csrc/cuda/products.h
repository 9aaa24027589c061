// The second products, of a chunk's exponentials with its centers and of their gradient with the batch, and what
// becomes of a tile of the latter: projected through the centers' normalization, it is written out as a gradient, or
// the centers are updated in place and it never exists.
#pragma once

#include "center_sgd.h"
#include "scores.h"

namespace fa::cuda {

// partial (splits, x.rows, width) (+)= exponentials (x.rows, chunk.panel.rows) times the chunk's centers, a split of
// the chunk's classes each: so few rows alone would leave most multiprocessors without a tile.
template <Precision precision>
__global__ void __launch_bounds__(kThreads, 2)
    center_sum_kernel(const typename Operands<precision>::Second* exponentials, Chunk chunk, int64_t rows,
                      bool accumulate, float* partial) {
  using Second = typename Operands<precision>::Second;
  const int64_t first_row = static_cast<int64_t>(blockIdx.y) * kTile, width = chunk.panel.width;
  const int first_column = static_cast<int>(blockIdx.x) * kTile;
  const int all = stages_of<Second>(chunk.classes.panel_count()), share = (all + gridDim.z - 1) / gridDim.z;
  const int begin = min(static_cast<int>(blockIdx.z) * share, all), end = min(begin + share, all);
  const int64_t first_class = static_cast<int64_t>(begin) * kDepth<Second>;
  const int64_t size = sizeof(Second);
  char* const shared = dynamic_shared();
  Accumulators acc;
  multiply_tile<kSecondPrecision<precision>, Second, BLayout::kByDepth>(
      acc, reinterpret_cast<const char*>(exponentials + first_row * chunk.panel.rows + first_class),
      chunk.panel.rows * size, chunk.panel.second + (first_class * width + first_column) * size, width * size,
      end - begin, shared);
  float* const out = partial + (blockIdx.z * rows + first_row) * width + first_column;
  for_each_row(acc, shared, [&](int row, int column, const float (&values)[4]) {
    Four<float>* const to = reinterpret_cast<Four<float>*>(out + row * width + column);
    Four<float> sum = accumulate ? *to : Four<float>{};
#pragma unroll
    for (int i = 0; i < 4; ++i) sum.at[i] += values[i];
    *to = sum;
  });
}

// What becomes of the gradient by a row of the weight.
struct CenterGradient {
  Matrix d_weight;  // written, unless data is null: then the step is made
  Matrix weight;
  CenterStep step;
  const bool* active;  // or null; where false nothing is changed
};

// gradient (chunk.panel.rows, x.rows) times the batch, projected: with d the gradient by the unit center w^,
// (d - w^ <w^, d>) / |w|, where <w^, d> is what class_gradient_kernel left in `along` (slots, chunk.panel.rows).
template <Precision precision>
__global__ void __launch_bounds__(kThreads, 2)
    center_gradient_kernel(const typename Operands<precision>::Second* gradient, Panel x, int64_t batch_rows,
                           Chunk chunk, const float* along, int slots, CenterGradient out) {
  using First = typename Operands<precision>::First;
  using Second = typename Operands<precision>::Second;
  if (out.active != nullptr && !*out.active) return;
  const int first_class = static_cast<int>(blockIdx.y) * kTile, first_column = static_cast<int>(blockIdx.x) * kTile;
  const int64_t size = sizeof(Second), width = x.width;
  char* const shared = dynamic_shared();
  Accumulators acc;
  multiply_tile<kSecondPrecision<precision>, Second, BLayout::kByDepth>(
      acc, reinterpret_cast<const char*>(gradient + first_class * x.rows), x.rows * size,
      x.second + first_column * size, width * size, stages_of<Second>(batch_rows), shared);

  const int columns = static_cast<int>(out.weight.columns), lane = threadIdx.x % kWarp;
  for_each_row(acc, shared, [&](int row, int column, const float (&d_unit)[4]) {
    const int j = first_class + row, d = first_column + column;
    const int64_t in_weight = chunk.classes.row(j);
    if (in_weight < 0) return;  // the whole warp
    float sum = 0;
    for (int slot = lane; slot < slots; slot += kWarp) sum += along[slot * chunk.panel.rows + j];
    const float inverse = chunk.panel.inverse[j], reciprocal = chunk.panel.reciprocal[j];
    const float factor = reciprocal < 0 ? 0.0f : warp_sum(sum) * inverse * inverse;
    float center[4];
    Columns<1> gradient_columns;
    float (&by_row)[4] = gradient_columns[0];
    load_four(reinterpret_cast<const First*>(chunk.panel.values) + j * width + d, 1, 4, center);
#pragma unroll
    for (int i = 0; i < 4; ++i) by_row[i] = (d_unit[i] - center[i] * factor) * fabsf(reciprocal);

    const int count = columns - d;
    if (out.d_weight.data == nullptr) {
      step_center<1>(out.weight, out.step, in_weight, d, count, gradient_columns);
    } else {
      visit_dtype(out.d_weight, [&](auto* data) {
        store_four(data + in_weight * out.d_weight.row_stride + d * out.d_weight.column_stride,
                   out.d_weight.column_stride, count, by_row,
                   [reciprocal](float value, auto* to, int) { convert_gradient(value, reciprocal < 0, to); });
      });
    }
  });
}

}  // namespace fa::cuda
