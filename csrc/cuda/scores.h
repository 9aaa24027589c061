// The first product: scores of a tile of batch rows with a tile of classes, X·Wᵀ, and what becomes of them while they
// are still in registers. The target is masked in the tile; nothing of size N x C exists beyond one chunk of classes.
#pragma once

#include "rows.h"

namespace fa::cuda {

// A pass's classes from classes.first on, packed.
struct Chunk {
  Panel panel;
  RowSelection classes;
};

// Two columns of slots a tile of classes, one for each half of it, (slots, x.rows) each.
struct RowStats {
  float *sums, *maxima;
  bool accumulate;  // onto what an earlier chunk left
};

// The stage `width` of a panel in stages of the product's depth.
template <typename T>
__host__ __device__ constexpr int stages_of(int64_t depth) {
  return static_cast<int>((depth + kDepth<T> - 1) / kDepth<T>);
}

// The column, or row, of a tile of classes that is a row's target; -1 if the target is elsewhere.
__device__ __forceinline__ int target_in_tile(const RowTerms& terms, int64_t row, const Chunk& chunk, int first_class) {
  const int64_t at = terms.target[row] - chunk.classes.first - first_class;
  return at >= 0 && at < kTile ? static_cast<int>(at) : -1;
}

// Sums and maxima of exp(scale * cos - shift), and, if wanted, exponentials (x.rows, chunk.panel.rows), each times its
// center's inverse, for the product with the centers.
template <Precision precision>
__global__ void __launch_bounds__(kThreads, 2)
    class_stats_kernel(Panel x, Chunk chunk, int depth, RowTerms terms, RowStats stats,
                       typename Operands<precision>::Second* exponentials) {
  using First = typename Operands<precision>::First;
  using Second = typename Operands<precision>::Second;
  const int64_t first_row = static_cast<int64_t>(blockIdx.x) * kTile;
  const int first_class = static_cast<int>(blockIdx.y) * kTile;
  const int present = chunk.classes.present_in_tile(static_cast<int>(blockIdx.y));
  const int64_t row_bytes = x.width * static_cast<int64_t>(sizeof(First));
  char* const shared = dynamic_shared();
  Accumulators acc;
  multiply_tile<precision, First, BLayout::kByColumn>(acc, x.values + first_row * row_bytes, row_bytes,
                                                      chunk.panel.values + first_class * row_bytes, row_bytes,
                                                      stages_of<First>(depth), shared);

  const Place place;
  float inverse[kTilesN][2];
#pragma unroll
  for (int n = 0; n < kTilesN; ++n)
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int column = place.column + n * 8 + i;
      // Any number but padding's zero: a score that does not count is -inf.
      inverse[n][i] = column < present ? chunk.panel.inverse[first_class + column] : 1.0f;
    }
#pragma unroll
  for (int m = 0; m < kTilesM; ++m)
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int64_t row = first_row + place.row + m * 16 + half * 8;
      const float scale = terms.scale[row], shift = terms.shift[row];
      const int target = target_in_tile(terms, row, chunk, first_class);
      float sum = 0, largest = -INFINITY;
      // Rare, so masks cost the other rows nothing.
      if (target >= 0 || present < kTile) {
#pragma unroll
        for (int n = 0; n < kTilesN; ++n)
#pragma unroll
          for (int i = 0; i < 2; ++i) {
            const int column = place.column + n * 8 + i;
            if (column == target || column >= present) acc[m][n][2 * half + i] = -INFINITY;
          }
      }
#pragma unroll
      for (int n = 0; n < kTilesN; ++n)
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          float& value = acc[m][n][2 * half + i];
          const float cosine = value * inverse[n][i];
          largest = fmaxf(largest, cosine);
          const float exponential = exp2_approximate(fmaf(cosine, scale, -shift));
          sum += exponential;
          value = exponential * inverse[n][i];
        }
    // The row's other columns lie in the three lanes beside this one.
#pragma unroll
      for (int mask = 1; mask <= 2; mask *= 2) {
        sum += __shfl_xor_sync(0xffffffffu, sum, mask);
        largest = fmaxf(largest, __shfl_xor_sync(0xffffffffu, largest, mask));
      }
      if (threadIdx.x % 4 == 0) {
        const int64_t slot = 2 * static_cast<int64_t>(blockIdx.y) + place.column / kWarpTile;
        const int64_t at = slot * x.rows + row;
        stats.sums[at] = stats.accumulate ? stats.sums[at] + sum : sum;
        stats.maxima[at] = stats.accumulate ? fmaxf(stats.maxima[at], largest) : largest;
      }
    }
  if (exponentials == nullptr) return;
  Second* const out = exponentials + first_row * chunk.panel.rows + first_class;
  for_each_row(acc, shared, [&](int row, int column, const float (&values)[4]) {
    store_four(out + row * chunk.panel.rows + column, 1, 4, values, [](float value, Second* to, int) {
      convert(precision == Precision::kTf32 ? round_to_tf32(value) : value, to);
    });
  });
}

// The gradient by the cosines, transposed, each times its batch row's inverse: gradient (chunk.panel.rows, x.rows), for
// the product with the batch. And for the projection of what that product will give, sum_i gradient_ji * score_ij
// (slots, chunk.panel.rows), two slots a tile of batch rows, from the very numbers that it will take.
template <Precision precision>
__global__ void __launch_bounds__(kThreads, 2)
    class_gradient_kernel(Panel x, Chunk chunk, int depth, RowTerms terms, float* along,
                          typename Operands<precision>::Second* gradient) {
  using First = typename Operands<precision>::First;
  using Second = typename Operands<precision>::Second;
  const int64_t first_row = static_cast<int64_t>(blockIdx.x) * kTile;
  const int first_class = static_cast<int>(blockIdx.y) * kTile;
  const int64_t row_bytes = x.width * static_cast<int64_t>(sizeof(First));
  char* const shared = dynamic_shared();
  Accumulators acc;
  multiply_tile<precision, First, BLayout::kByColumn>(acc, chunk.panel.values + first_class * row_bytes, row_bytes,
                                                      x.values + first_row * row_bytes, row_bytes,
                                                      stages_of<First>(depth), shared);

  const Place place;
  float inverse[kTilesM][2], sums[kTilesM][2];
#pragma unroll
  for (int m = 0; m < kTilesM; ++m)
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      inverse[m][half] = chunk.panel.inverse[first_class + place.row + m * 16 + half * 8];
      sums[m][half] = 0;
    }
#pragma unroll
  for (int n = 0; n < kTilesN; ++n)
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int64_t row = first_row + place.column + n * 8 + i;
      const float scale = terms.scale[row], shift = terms.shift[row], factor = terms.factor[row];
      const float of_target = terms.target_coefficient[row];
      const int target = target_in_tile(terms, row, chunk, first_class) - place.row;
#pragma unroll
      for (int m = 0; m < kTilesM; ++m)
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          float& value = acc[m][n][2 * half + i];
          const float exponential = exp2_approximate(fmaf(value * inverse[m][half], scale, -shift));
          const bool is_target = m * 16 + half * 8 == target;
          const float rounded = rounded_operand<precision>(is_target ? of_target : factor * exponential);
          sums[m][half] += rounded * value;
          value = rounded;
        }
    }
#pragma unroll
  for (int m = 0; m < kTilesM; ++m)
#pragma unroll
    for (int half = 0; half < 2; ++half) {
#pragma unroll
      for (int mask = 1; mask <= 2; mask *= 2) sums[m][half] += __shfl_xor_sync(0xffffffffu, sums[m][half], mask);
      if (threadIdx.x % 4 == 0) {
        const int64_t slot = 2 * static_cast<int64_t>(blockIdx.x) + place.column / kWarpTile;
        along[slot * chunk.panel.rows + first_class + place.row + m * 16 + half * 8] = sums[m][half];
      }
    }
  Second* const out = gradient + static_cast<int64_t>(first_class) * x.rows + first_row;
  for_each_row(acc, shared, [&](int row, int column, const float (&values)[4]) {
    store_four(out + row * x.rows + column, 1, 4, values, [](float value, Second* to, int) { convert(value, to); });
  });
}

}  // namespace fa::cuda
