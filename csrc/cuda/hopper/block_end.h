// The end of a block of classes in the backward pass: the gradient by their centers is written, or a step of the
// optimizer is made with it.
#pragma once

#include "../center_sgd.h"
#include "../rows.h"
#include "block.h"

namespace fa::cuda::hopper {

// The centers of a chunk as the products took them.
struct StoredRows {
  const BFloat16* values;
  int64_t stride;
};

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

struct alignas(16) Centers {
  BFloat16 at[8];
};
// Eight neighbors of a row, in one access of 16 bytes, or two.
template <typename Out>
struct alignas(16) Eight {
  Out at[8];
};

// Writes the gradient by the 64 classes from `first` on, as far as they are below `count`, to rows that begin at `to`.
// With d the gradient by the unit center w^: (d - w^ <w^, d>) / |w|. The first warpgroup has written `numbers`.
template <typename Out>
__device__ __forceinline__ void write_gradient(const Sums& u, const StoredRows& rows, int64_t first, int64_t count,
                                               int half, const Numbers& numbers, Out* to, int64_t stride) {
  const Position at;
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    const int row = at.row + 8 * h, column = half * (kColumns / 2) + at.lane % 4 * 8;
    const bool present = first + row < count;
    const float projection = numbers[row], size = numbers[kRows + row];
    const BFloat16* const center = rows.values + (present ? first + row : 0) * rows.stride + column;
    Out* const out = to + row * stride + column;
    constexpr int kBatch = sizeof(Out) == 2 ? 4 : 2;  // loads under way, as far as registers go
#pragma unroll
    for (int group = 0; group < 8; group += kBatch) {
      Centers centers[kBatch];
#pragma unroll
      for (int k = 0; k < kBatch; ++k) centers[k] = *reinterpret_cast<const Centers*>(center + (group + k) * 32);
#pragma unroll
      for (int k = 0; k < kBatch; ++k) {
        float d[8];
        gather_columns(u, group + k, h, at.lane, d);
        Eight<Out> gradient;
#pragma unroll
        for (int i = 0; i < 8; ++i) convert((d[i] - to_float(centers[k].at[i]) * projection) * size, &gradient.at[i]);
        if (present) *reinterpret_cast<Eight<Out>*>(out + (group + k) * 32) = gradient;
      }
    }
  }
}

template <typename Out>
struct GradientOut {
  Out* d_weight;  // (classes of the chunk, 512), `stride` apart
  int64_t stride;

  __device__ __forceinline__ void prefetch(const RowSelection&, int64_t) const {}
  __device__ __forceinline__ void write(const Sums& u, const StoredRows& rows, const RowSelection& selection,
                                        int64_t first, int half, const Numbers& numbers) const {
    write_gradient(u, rows, first, selection.count, half, numbers, d_weight + first * stride, stride);
  }
};

__device__ __forceinline__ int size_of(MomentumType type) {
  if (type == MomentumType::kFloat64) return 8;
  if (type == MomentumType::kFloat32) return 4;
  if (type == MomentumType::kBFloat16) return 2;
  return type == MomentumType::kInt8 ? 1 : 0;
}

// The sums take 128 of a thread's 160 registers, too many for a step beside them. So the block first writes its
// gradient into memory of its own, which stays in the L2. Each warp then takes whole rows.
struct CenterStepOut {
  Matrix weight;
  CenterStep step;
  float* gradient;  // (blocks of the grid, 64, 512)

  static constexpr int kGroups = kColumns / kGroupColumns;

  static __device__ __forceinline__ void prefetch_row(const void* from, int bytes) {
    if (bytes > 0 && aligned(from, 16)) prefetch_bytes(from, bytes);
  }
  // Brings the rows of a block to the L2 while its products run. The first warpgroup calls this.
  __device__ __forceinline__ void prefetch(const RowSelection& selection, int64_t first) const {
    const int64_t row = selection.row(first + threadIdx.x / 2);
    if (row < 0) return;
    if (threadIdx.x % 2 == 0) {
      const int bytes = kColumns * size_of(step.momentum_type);
      prefetch_row(static_cast<const char*>(step.momentum) + row * bytes, bytes);
    } else if (weight.column_stride == 1) {
      visit_dtype(weight,
                  [&](const auto* data) { prefetch_row(data + row * weight.row_stride, kColumns * sizeof *data); });
    }
  }

  __device__ __forceinline__ void write(const Sums& u, const StoredRows& rows, const RowSelection& selection,
                                        int64_t first, int half, const Numbers& numbers) const {
    float* const mine = gradient + static_cast<int64_t>(blockIdx.x) * kRows * kColumns;
    write_gradient(u, rows, first, selection.count, half, numbers, mine, kColumns);
    named_sync<2, 2 * kWarpGroup>();
    const int column = threadIdx.x % kWarp * 4;
#pragma unroll 1
    for (int row = threadIdx.x / kWarp - kWarpGroup / kWarp; row < kRows; row += kReadingWarps) {
      const int64_t in_weight = selection.row(first + row);
      if (in_weight < 0) continue;  // the whole warp
      Columns<kGroups> by_row;
      load_columns<kGroups>(mine + row * kColumns + column, 1, kColumns - column, by_row);
      step_center<kGroups>(weight, step, in_weight, column, kColumns - column, by_row);
    }
    named_sync<2, 2 * kWarpGroup>();  // before the next block's gradient
  }
};

}  // namespace fa::cuda::hopper
