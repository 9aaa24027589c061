// The forward pass in one launch. For 64 batch rows and a slice of the classes, a block computes the sums and the
// maxima of the exponentials, and the sum of the centers weighted by them.
#pragma once

#include "../scores.h"
#include "prepare.h"

namespace fa::cuda::hopper {

// The numbers of a tile's classes.
struct ClassTerms {
  float inverse[kRows];
};

struct ForwardArgs {
  PreparedRows classes;  // of a chunk: from class selection.first on
  RowSelection selection;
  RowTerms row_terms;
  int64_t rows;       // of the batch, padded to whole blocks
  int slice;          // tiles of classes of a slice
  RowStats stats;     // (slices, rows)
  float* center_sum;  // (slices, rows, 512), added to
  bool ordered;
};

struct Forward {
  using Terms = ClassTerms;
  const ForwardArgs& args;
  const Terms* terms;

  // Tensor cores truncate their sums. A sum over 500 000 classes would lose 7e-4 of its value, so it is handed over
  // every 512 tiles. The exponentials' sums, which are rounded, are handed over every 64 tiles.
  static constexpr int kTilesAtOnce = 512, kTilesOfSum = 64;
  __device__ __forceinline__ bool is_due(int j, int tiles) const {
    return (j + 1) % kTilesAtOnce == 0 || j + 1 == tiles;
  }
  __device__ __forceinline__ void write(const Sums& u, int block, int half, const Numbers&) const {
    const Position at;
    float* const out = args.center_sum +
                       (static_cast<int64_t>(blockIdx.y) * args.rows + block * kRows + at.row) * kColumns +
                       half * (kColumns / 2) + at.column;
    struct alignas(8) Two {
      float at[2];
    };
    constexpr int kBatch = 16;  // loads under way
#pragma unroll
    for (int h = 0; h < 2; ++h)
#pragma unroll
      for (int first = 0; first < 32; first += kBatch) {
        Two* const to = reinterpret_cast<Two*>(out + h * 8 * kColumns);
        Two old[kBatch];
#pragma unroll
        for (int k = 0; k < kBatch; ++k) old[k] = to[(first + k) * 4];
#pragma unroll
        for (int k = 0; k < kBatch; ++k) {
          const float* const sums = u + 4 * (first + k) + 2 * h;
          to[(first + k) * 4] = {{old[k].at[0] + sums[0], old[k].at[1] + sums[1]}};
        }
      }
  }

  __device__ __forceinline__ int first_class() const { return static_cast<int>(blockIdx.y) * args.slice * kRows; }
  __device__ __forceinline__ int present() const {
    return static_cast<int>(args.selection.present_count()) - first_class();
  }

  // The numbers that a thread with scores keeps for its two batch rows.
  struct Rows {
    const Forward& task;
    Position at;
    int block;
    float scale[2], shift[2], largest[2] = {-INFINITY, -INFINITY};
    int target[2];  // in the slice; negative: not there
    float sum[2] = {0, 0};
    int plain;  // tiles before this one have neither padding nor an odd row

    __device__ __forceinline__ Rows(const Forward& task, const Walk& walk, int block, char*, Shared<Terms>& s)
        : task(task), block(block), plain(*task.args.classes.odd != 0 ? 0 : task.present() / kRows) {
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        s.numbers[h][threadIdx.x] = 0;
        const int64_t i = row(h);
        scale[h] = task.args.row_terms.scale[i], shift[h] = task.args.row_terms.shift[i];
        const int64_t in_slice = task.args.row_terms.target[i] - task.args.selection.first - task.first_class();
        target[h] =
            in_slice >= 0 && in_slice < static_cast<int64_t>(walk.tiles) * kRows ? static_cast<int>(in_slice) : -1;
      }
    }
    __device__ __forceinline__ int64_t row(int h) const { return static_cast<int64_t>(block) * kRows + at.row + 8 * h; }

    // Padding may be NaN, and 0 times NaN is NaN.
    __device__ __forceinline__ bool mends(int j) const { return j >= plain; }
    __device__ __forceinline__ void mend(int j, char* tile) const {
      mend_rows(tile, task.args.classes.factor + task.first_class() + j * kRows);
    }

    // Only few tiles hold a row's target or padding.
    __device__ __forceinline__ void weigh(const Scores& d, const Terms& terms, int j, Weights& p, Shared<Terms>& s) {
      const unsigned in_tile[2] = {static_cast<unsigned>(target[0] - j * kRows),
                                   static_cast<unsigned>(target[1] - j * kRows)};
      if (any_of_warp(in_tile[0] < kRows || in_tile[1] < kRows) || j >= plain)
        weigh_as<true>(d, terms, j, p);
      else
        weigh_as<false>(d, terms, j, p);
      if ((j + 1) % kTilesOfSum == 0) hand_over(s);
    }
    // Keep the number of terms of each sum small.
    __device__ __forceinline__ void hand_over(Shared<Terms>& s) {
#pragma unroll
      for (int h = 0; h < 2; ++h) s.numbers[h][threadIdx.x] += sum[h], sum[h] = 0;
    }
    template <bool masked>
    __device__ __forceinline__ void weigh_as(const Scores& d, const Terms& terms, int j, Weights& p) {
      float sums[2] = {0, 0};
      const int present = masked ? task.present() - j * kRows : kRows;
#pragma unroll
      for (int n = 0; n < 8; ++n)
#pragma unroll
        for (int h = 0; h < 2; ++h) {
          float weight[2];
#pragma unroll
          for (int i = 0; i < 2; ++i) {
            const int column = at.column + n * 8 + i;
            const float inverse = terms.inverse[column], cosine = d[4 * n + 2 * h + i] * inverse;
            const bool negative = !masked || (column != target[h] - j * kRows && column < present);
            const float exponential = negative ? exp2_approximate(fmaf(cosine, scale[h], -shift[h])) : 0.0f;
            if (negative) largest[h] = fmaxf(largest[h], cosine);
            sums[h] += exponential;
            weight[i] = exponential * inverse;
          }
          p[2 * n + h] = pack_bf16(weight[0], weight[1]);
        }
#pragma unroll
      for (int h = 0; h < 2; ++h) sum[h] += sums[h];
    }

    // The row's other columns lie in the three lanes beside this one.
    __device__ __forceinline__ void finish(Shared<Terms>& s, uint32_t) {
      hand_over(s);
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        float total = s.numbers[h][threadIdx.x], maximum = largest[h];
#pragma unroll
        for (int mask = 1; mask <= 2; mask *= 2) {
          total += __shfl_xor_sync(0xffffffffu, total, mask);
          maximum = fmaxf(maximum, __shfl_xor_sync(0xffffffffu, maximum, mask));
        }
        if (at.lane % 4 != 0) continue;
        const int64_t to = blockIdx.y * task.args.rows + row(h);
        task.args.stats.sums[to] += total;
        task.args.stats.maxima[to] = fmaxf(task.args.stats.maxima[to], maximum);
      }
    }
  };
};

// Returns how many tiles of classes there are from `first` on, at most those of a slice.
__device__ __forceinline__ int tiles_of_slice(const ForwardArgs& args, int first) {
  const int present = static_cast<int>(args.selection.present_count());
  return min(args.slice, (present + kRows - 1) / kRows - first);
}

// Grid: (blocks of batch rows, slices). It adds to sums that start_kernel has set to zero.
template <int cluster>
__global__ void __cluster_dims__(cluster, 1, 1) __launch_bounds__(kBlockThreads, 1)
    class_sums_kernel(const __grid_constant__ TensorMap batch, const __grid_constant__ TensorMap classes,
                      const __grid_constant__ ForwardArgs args) {
  const int first = static_cast<int>(blockIdx.y) * args.slice;
  const int tiles = tiles_of_slice(args, first);
  if (tiles <= 0) return;  // all blocks of the cluster
  const Forward task{args, reinterpret_cast<const ClassTerms*>(args.classes.inverse)};
  run<cluster>(task, {&batch, &classes, static_cast<int>(blockIdx.x), 1, static_cast<int>(blockIdx.x) + 1, first, tiles,
                      args.ordered});
}

// Sets the sums to zero, the maxima to -infinity and the flag of odd rows to 0.
static __global__ void __launch_bounds__(kRowThreads)
    start_kernel(int64_t sums, RowStats stats, int64_t numbers, float* center_sum, int* odd) {
  const int64_t all = static_cast<int64_t>(gridDim.x) * kRowThreads;
  const int64_t first = static_cast<int64_t>(blockIdx.x) * kRowThreads + threadIdx.x;
  if (first == 0) *odd = 0;
  for (int64_t i = first; i < sums; i += all) stats.sums[i] = 0, stats.maxima[i] = -INFINITY;
  for (int64_t i = first; i < numbers; i += all) center_sum[i] = 0;
}

}  // namespace fa::cuda::hopper
