// The backward pass in one launch. For 64 classes at a time and all batch rows, a block computes the scores again, and
// from them the gradient by the class centers. block_end.h has the ways to end a block of classes.
#pragma once

#include "../scores.h"
#include "block_end.h"
#include "prepare.h"

namespace fa::cuda::hopper {

// The numbers of a tile's batch rows.
struct BatchTerms {
  struct alignas(16) Row {
    float scale, shift, factor, target_coefficient;
  };
  Row row[kRows];
  int target[kRows];
};

// End: what becomes of the gradient by a block of classes, GradientOut or CenterStepOut.
template <typename End>
struct BackwardArgs {
  PreparedRows classes;  // of a chunk, from class selection.first on; where they have no terms, slots are measured
  RowSelection selection;
  StoredRows rows;
  const BatchTerms* batch_terms;
  int tiles;  // of the batch
  End end;
  const bool* active;  // or null; if false, nothing is written
  bool ordered;
};

template <typename End>
struct Backward {
  using Terms = BatchTerms;
  const BackwardArgs<End>& args;
  const Terms* terms;

  __device__ __forceinline__ bool is_due(int j, int tiles) const { return j + 1 == tiles; }

  // `numbers` is written by finish.
  __device__ __forceinline__ void write(const Sums& u, int block, int half, const Numbers& numbers) const {
    args.end.write(u, args.rows, args.selection, static_cast<int64_t>(block) * kRows, half, numbers);
  }

  // The numbers that a thread of the first warpgroup keeps for its two classes.
  struct Rows {
    const Backward& task;
    Position at;
    int first_class;
    float inverse[2], along[2] = {0, 0};

    __device__ __forceinline__ Rows(const Backward& task, const Walk&, int block, char* slot, Shared<Terms>& s)
        : task(task), first_class(static_cast<int>(task.args.selection.first) + block * kRows) {
      task.args.end.prefetch(task.args.selection, static_cast<int64_t>(block) * kRows);
      if (task.args.classes.inverse == nullptr)
        measure_rows(slot, s.block);
      else
        load_terms(static_cast<int64_t>(block) * kRows, s.block);
#pragma unroll
      for (int h = 0; h < 2; ++h) inverse[h] = s.block.inverse[at.row + 8 * h];
    }
    // Each warp loads the terms of its own rows. Another warp may still read those of its rows of the block before.
    __device__ __forceinline__ void load_terms(int64_t first, BlockTerms& terms) const {
      const PreparedRows& classes = task.args.classes;
      __syncwarp();
      if (at.lane < 16) {
        const int row = at.warp * 16 + at.lane;
        const bool exists = first < classes.rows;  // the last block of a cluster may be past the end
        terms.inverse[row] = exists ? classes.inverse[first + row] : 0.0f;
        terms.reciprocal[row] = exists ? classes.reciprocal[first + row] : 0.0f;
        terms.factor[row] = exists ? classes.factor[first + row] : 0.0f;
      }
      __syncwarp();
    }
    __device__ __forceinline__ bool mends(int) const { return false; }
    __device__ __forceinline__ void mend(int, char*) const {}

    // Few tiles have a row whose target is among these classes.
    __device__ __forceinline__ void weigh(const Scores& d, const Terms& terms, int, Weights& p, Shared<Terms>&) {
      const unsigned first = static_cast<unsigned>(terms.target[at.lane] - first_class);
      const unsigned second = static_cast<unsigned>(terms.target[at.lane + kWarp] - first_class);
      if (any_of_warp(first < kRows || second < kRows))
        weigh_as<true>(d, terms, p);
      else
        weigh_as<false>(d, terms, p);
    }
    template <bool with_targets>
    __device__ __forceinline__ void weigh_as(const Scores& d, const Terms& terms, Weights& p) {
      float sums[2] = {0, 0};
#pragma unroll
      for (int n = 0; n < 8; ++n) {
        const int column = at.column + n * 8;
        const BatchTerms::Row batch[2] = {terms.row[column], terms.row[column + 1]};
#pragma unroll
        for (int h = 0; h < 2; ++h) {
          float gradient[2];
#pragma unroll
          for (int i = 0; i < 2; ++i) {
            const float exponent = fmaf(d[4 * n + 2 * h + i] * inverse[h], batch[i].scale, -batch[i].shift);
            gradient[i] = batch[i].factor * exp2_approximate(exponent);
            if (with_targets && terms.target[column + i] - first_class == at.row + 8 * h)
              gradient[i] = batch[i].target_coefficient;
          }
          const uint32_t both = pack_bf16(gradient[0], gradient[1]);
          p[2 * n + h] = both;
          // From the very numbers that the product will take.
          sums[h] = fmaf(__uint_as_float(both << 16), d[4 * n + 2 * h], sums[h]);
          sums[h] = fmaf(__uint_as_float(both & 0xffff0000u), d[4 * n + 2 * h + 1], sums[h]);
        }
      }
#pragma unroll
      for (int h = 0; h < 2; ++h) along[h] += sums[h];
    }

    // Numbers for write: the factor that makes <w^, d> w^ of the row as it is stored, and 1 / |w|.
    __device__ __forceinline__ void finish(Shared<Terms>& s, uint32_t place) {
#pragma unroll
      for (int h = 0; h < 2; ++h) {
#pragma unroll
        for (int mask = 1; mask <= 2; mask *= 2) along[h] += __shfl_xor_sync(0xffffffffu, along[h], mask);
        if (at.lane % 4 != 0) continue;
        const int row = at.row + 8 * h;
        const float reciprocal = s.block.reciprocal[row];
        s.numbers[place][row] = reciprocal < 0 ? 0.0f : along[h] * inverse[h] * (inverse[h] * s.block.factor[row]);
        s.numbers[place][kRows + row] = fabsf(reciprocal);
      }
    }
  };
};

// Grid: as many blocks as run at once; each takes every gridDim.x-th block of classes.
template <int cluster, typename End>
__global__ void __cluster_dims__(cluster, 1, 1) __launch_bounds__(kBlockThreads, 1)
    weight_grad_kernel(const __grid_constant__ TensorMap classes, const __grid_constant__ TensorMap batch,
                       const __grid_constant__ BackwardArgs<End> args) {
  if (args.active != nullptr && !*args.active) return;
  const int blocks = static_cast<int>((args.selection.count + kRows - 1) / kRows);
  const int padded = (blocks + cluster - 1) / cluster * cluster, first = static_cast<int>(blockIdx.x);
  run<cluster>(Backward<End>{args, args.batch_terms},
               {&classes, &batch, first, static_cast<int>(gridDim.x), padded, 0, args.tiles, args.ordered});
}

// The terms of each tile of batch rows, from the terms of all rows.
static __global__ void __launch_bounds__(kRowThreads)
    batch_terms_kernel(RowTerms terms, int64_t rows, BatchTerms* out) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kRowThreads + threadIdx.x;
  if (i >= rows) return;
  BatchTerms& tile = out[i / kRows];
  tile.row[i % kRows] = {terms.scale[i], terms.shift[i], terms.factor[i], terms.target_coefficient[i]};
  const int64_t target = terms.target[i];
  tile.target[i % kRows] = target >= 0 && target <= 0x7fffffff ? static_cast<int>(target) : -1;
}

}  // namespace fa::cuda::hopper
