// The end of a block of classes in the backward pass: the gradient by its centers, projected out of the accumulators,
// 64 columns of a row at a time. It is written, or a step of the optimizer is made with it (center_step.h).
#pragma once

#include "../rows.h"
#include "block.h"

namespace fa::cuda::hopper {

// Eight neighbors of a row, in accesses of up to 16 bytes.
template <typename T>
struct alignas(sizeof(T) > 2 ? 16 : 8 * sizeof(T)) Eight {
  T at[8];
};
template <typename T>
__device__ __forceinline__ Eight<T> load_eight(const T* from) {
  return *reinterpret_cast<const Eight<T>*>(from);
}
template <typename T>
__device__ __forceinline__ void store_eight(T* to, const Eight<T>& values) {
  *reinterpret_cast<Eight<T>*>(to) = values;
}

// The sums of 32 columns of a row are two neighbors in each of four lanes beside each other, four times. Afterwards
// each of the lanes has eight neighbors, which it moves at once.
__device__ __forceinline__ void gather_columns(const Sums& u, int group, int h, int lane, float (&to)[8]) {
  const bool odd = lane % 2 != 0, upper = lane % 4 >= 2;
  float pairs[2][4];  // of n = 4 group + 2 k + odd: the columns of this lane and of the one beside it
#pragma unroll
  for (int k = 0; k < 2; ++k)
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int n = 4 * group + 2 * k;
      const float even_n = u[4 * n + 2 * h + i], odd_n = u[4 * n + 4 + 2 * h + i];
      const float other = __shfl_xor_sync(0xffffffffu, odd ? even_n : odd_n, 1);
      pairs[k][i] = odd ? other : even_n;
      pairs[k][2 + i] = odd ? odd_n : other;
    }
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const float other = __shfl_xor_sync(0xffffffffu, upper ? pairs[0][i] : pairs[1][i], 2);
    to[i] = upper ? other : pairs[0][i];
    to[4 + i] = upper ? pairs[1][i] : other;
  }
}

// The centers of a chunk as the products took them, for the projection.
struct StoredRows {
  const BFloat16* values;
  int64_t stride;
};

// Of one row: with d the gradient by the unit center w^, (d - w^ <w^, d>) / |w|.
struct Projection {
  const BFloat16* center;  // of this lane's first column
  float factor, size;      // w^ <w^, d> = center * factor, 1 / |w|

  // `numbers` is what the block's first warpgroup has handed over.
  __device__ __forceinline__ Projection(const StoredRows& rows, int64_t j, int column, const Numbers& numbers, int row)
      : center(rows.values + j * rows.stride + column), factor(numbers[row]), size(numbers[kRows + row]) {}
  // Eight columns of this lane, of a group of 32.
  __device__ __forceinline__ void apply(const Eight<BFloat16>& centers, float (&d)[8]) const {
#pragma unroll
    for (int i = 0; i < 8; ++i) d[i] = (d[i] - to_float(centers.at[i]) * factor) * size;
  }
};

// Writes the gradient of a chunk's classes.
template <typename Out>
struct GradientOut {
  Out* d_weight;  // (classes of the chunk, 512), `stride` apart
  int64_t stride;

  __device__ __forceinline__ void prefetch(const RowSelection&, int64_t) const {}

  __device__ __forceinline__ void write(const Sums& u, const StoredRows& rows, const RowSelection& selection,
                                        int64_t first, int half, const Numbers& numbers) const {
    const Position at;
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const int row = at.row + 8 * h, column = half * (kColumns / 2) + at.lane % 4 * 8;
      const bool present = first + row < selection.count;
      const int64_t j = present ? first + row : 0;
      const Projection projection(rows, j, column, numbers, row);
      Out* const out = d_weight + j * stride + column;
      constexpr int kBatch = sizeof(Out) == 2 ? 4 : 2;  // loads under way, as far as registers go
#pragma unroll
      for (int group = 0; group < 8; group += kBatch) {
        Eight<BFloat16> centers[kBatch];
#pragma unroll
        for (int k = 0; k < kBatch; ++k) centers[k] = load_eight(projection.center + (group + k) * 32);
#pragma unroll
        for (int k = 0; k < kBatch; ++k) {
          float d[8];
          gather_columns(u, group + k, h, at.lane, d);
          projection.apply(centers[k], d);
          Eight<Out> gradient;
#pragma unroll
          for (int i = 0; i < 8; ++i) convert(d[i], &gradient.at[i]);
          if (present) store_eight(out + (group + k) * 32, gradient);
        }
      }
    }
  }
};

}  // namespace fa::cuda::hopper
