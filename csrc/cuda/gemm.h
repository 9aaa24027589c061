// The product that every pass is made of: one output tile of 128 x 128 in the registers of four warps, its operands
// streaming through shared memory. Operands are panels (rows.h): padded to whole tiles, so that nothing here has edges.
//
// Why these sizes: a warp's 64 x 64 takes 64 bytes a clock out of shared memory at the tensor cores' full rate of an
// A100, half of what there is, where 64 x 32 would take three quarters; its accumulators are 128 of the 255 registers a
// thread. Four stages of 16 KiB leave room for two blocks on a multiprocessor (128 of an A100's 164 KiB), whose
// products and epilogues hide each other. Three copies are under way while one stage is multiplied: some 20 KiB a block
// against a latency of half a microsecond. No number here was measured on a GPU yet (bench/NOTES.md).
#pragma once

#include "numbers.h"

namespace fa::cuda {

constexpr int kTile = 128;                            // rows and columns of an output tile
constexpr int kWarps = 4, kThreads = kWarps * kWarp;  // two by two
constexpr int kWarpTile = 64;                         // rows and columns of one warp's part
constexpr int kStages = 4;
constexpr int kStageRowBytes = 64;  // a stage's depth: 32 numbers of 16 bits, 16 of 32
constexpr int kSharedBytes = kStages * 2 * kTile * kStageRowBytes;
constexpr int kTilesM = kWarpTile / 16, kTilesN = kWarpTile / 8;  // a warp's mma tiles
static_assert(kSharedBytes == kTile * kTile * static_cast<int>(sizeof(float)), "an output tile fits there afterwards");

template <typename T>
constexpr int kDepth = kStageRowBytes / static_cast<int>(sizeof(T));  // of a stage, in numbers

// acc[m][n] is the fragment of rows 16 m, columns 8 n of the warp's part, laid out as mma's d.
using Accumulators = float[kTilesM][kTilesN][4];

// Where this thread's fragments lie in the tile: rows row + 16 m and row + 16 m + 8, columns column + 8 n and the next.
struct Place {
  int row, column;
  __device__ __forceinline__ Place() {
    const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
    row = warp / 2 * kWarpTile + lane / 4;
    column = warp % 2 * kWarpTile + lane % 4 * 2;
  }
};

// Offset of a 16-byte chunk of a row in shared memory. Chunks are permuted within their row, by the row, so that what a
// warp reads or writes at once lies in different banks: eight rows of one chunk for load_matrices, and of 512-byte rows
// (fp32) two neighboring chunks of four rows.
template <int row_bytes>
__device__ __forceinline__ int swizzled(int row, int chunk) {
  static_assert(row_bytes == 64 || row_bytes == 256 || row_bytes == 512, "no permutation for rows of this size");
  const int permutation = row_bytes == 64 ? row >> 1 & 3 : row_bytes == 256 ? row & 7 : (row & 3) << 1;
  return row * row_bytes + ((chunk ^ permutation) << 4);
}

// Has `rows` rows of row_bytes brought from `from`, `stride` bytes apart, into shared memory.
template <int rows, int row_bytes>
__device__ __forceinline__ void copy_rows(char* to, const char* from, int64_t stride) {
  constexpr int kChunks = row_bytes / 16;
  static_assert(rows * kChunks % kThreads == 0, "each thread copies as much");
#pragma unroll
  for (int i = 0; i < rows * kChunks / kThreads; ++i) {
    const int index = i * kThreads + static_cast<int>(threadIdx.x), row = index / kChunks, chunk = index % kChunks;
    copy_async(to + swizzled<row_bytes>(row, chunk), from + row * stride + chunk * 16);
  }
}

// Fragment m of A in one step of 32 bytes of depth.
__device__ __forceinline__ void load_a(uint32_t (&a)[4], const char* shared, int step, int m) {
  const int lane = threadIdx.x % kWarp, row = threadIdx.x / kWarp / 2 * kWarpTile + (lane & 15);
  load_matrices(a, shared + swizzled<kStageRowBytes>(row, 2 * step + (lane >> 4)) + m * 16 * kStageRowBytes);
}

// All of B's fragments in one step, from rows (columns of the product) that hold the depth.
__device__ __forceinline__ void load_b_by_column(uint32_t (&b)[kTilesN][2], const char* shared, int step) {
  const int lane = threadIdx.x % kWarp;
  const int row = threadIdx.x / kWarp % 2 * kWarpTile + (lane & 7) + (lane >> 4 << 3);
  const char* const at = shared + swizzled<kStageRowBytes>(row, 2 * step + (lane >> 3 & 1));
#pragma unroll
  for (int n = 0; n < kTilesN; n += 2) {
    uint32_t pair[4];
    load_matrices(pair, at + n * 8 * kStageRowBytes);
    b[n][0] = pair[0], b[n][1] = pair[1], b[n + 1][0] = pair[2], b[n + 1][1] = pair[3];
  }
}

// The same from rows that are the depth and hold the product's columns.
template <typename T>
__device__ __forceinline__ void load_b_by_depth(uint32_t (&b)[kTilesN][2], const char* shared, int step) {
  constexpr int kRowBytes = kTile * static_cast<int>(sizeof(T));
  const int lane = threadIdx.x % kWarp, first_column = threadIdx.x / kWarp % 2 * kWarpTile;
  if constexpr (sizeof(T) == 2) {
    const int row = step * 16 + (lane & 15), chunk = first_column / 8 + (lane >> 4);
#pragma unroll
    for (int n = 0; n < kTilesN; n += 2) {
      uint32_t pair[4];
      load_matrices_transposed(pair, shared + swizzled<kRowBytes>(row, chunk + n));
      b[n][0] = pair[0], b[n][1] = pair[1], b[n + 1][0] = pair[2], b[n + 1][1] = pair[3];
    }
  } else {
    // ldmatrix transposes 16-bit numbers only.
#pragma unroll
    for (int n = 0; n < kTilesN; ++n) {
      const int row = step * 8 + lane % 4, column = first_column + n * 8 + lane / 4;
#pragma unroll
      for (int half = 0; half < 2; ++half)
        b[n][half] = *reinterpret_cast<const uint32_t*>(shared + swizzled<kRowBytes>(row + 4 * half, column / 4) +
                                                        column % 4 * 4);
    }
  }
}

// x = high + low, both of 11 bits: their sum misses the last one or two of x's 24.
__device__ __forceinline__ void split(uint32_t bits, uint32_t* high, uint32_t* low) {
  const float x = __uint_as_float(bits), rounded = round_to_tf32(x);
  *high = __float_as_uint(rounded);
  // An infinity has no remainder.
  *low = __float_as_uint(fabsf(rounded) <= 3.402823466e38f ? round_to_tf32(x - rounded) : 0.0f);
}

// acc += a step's part of A, in shared memory, times that of B.
template <Precision precision>
__device__ __forceinline__ void multiply(Accumulators& acc, const char* shared_a, int step,
                                         const uint32_t (&b)[kTilesN][2]) {
  uint32_t a[4];
  if constexpr (precision == Precision::kFloat32) {
    uint32_t b_high[kTilesN][2], b_low[kTilesN][2];
#pragma unroll
    for (int n = 0; n < kTilesN; ++n)
#pragma unroll
      for (int i = 0; i < 2; ++i) split(b[n][i], &b_high[n][i], &b_low[n][i]);
#pragma unroll
    for (int m = 0; m < kTilesM; ++m) {
      uint32_t a_high[4], a_low[4];
      load_a(a, shared_a, step, m);
#pragma unroll
      for (int i = 0; i < 4; ++i) split(a[i], &a_high[i], &a_low[i]);
#pragma unroll
      for (int n = 0; n < kTilesN; ++n) {
        mma_tf32(acc[m][n], a_low, b_high[n]);
        mma_tf32(acc[m][n], a_high, b_low[n]);
        mma_tf32(acc[m][n], a_high, b_high[n]);
      }
    }
  } else {
#pragma unroll
    for (int m = 0; m < kTilesM; ++m) {
      load_a(a, shared_a, step, m);
#pragma unroll
      for (int n = 0; n < kTilesN; ++n) {
        if constexpr (precision == Precision::kBFloat16) mma_bf16(acc[m][n], a, b[n]);
        if constexpr (precision == Precision::kFloat16) mma_fp16(acc[m][n], a, b[n]);
        if constexpr (precision == Precision::kTf32) mma_tf32(acc[m][n], a, b[n]);
      }
    }
  }
}

enum class BLayout { kByColumn, kByDepth };

// acc = A B over `stages` stages of depth. `a` points to the tile's first row, whose rows hold the depth; `b` to its
// first column, whose rows hold the depth or, by depth, are it. Strides are in bytes.
template <Precision precision, typename T, BLayout layout>
__device__ __forceinline__ void multiply_tile(Accumulators& acc, const char* a, int64_t a_stride, const char* b,
                                              int64_t b_stride, int stages, char* shared) {
  constexpr int kHalf = kTile * kStageRowBytes;  // B follows A in each stage
  const auto copy_stage = [&](int stage) {
    char* const to = shared + stage % kStages * 2 * kHalf;
    copy_rows<kTile, kStageRowBytes>(to, a + static_cast<int64_t>(stage) * kStageRowBytes, a_stride);
    if constexpr (layout == BLayout::kByColumn)
      copy_rows<kTile, kStageRowBytes>(to + kHalf, b + static_cast<int64_t>(stage) * kStageRowBytes, b_stride);
    else
      copy_rows<kDepth<T>, kTile* static_cast<int>(sizeof(T))>(to + kHalf, b + stage * (kDepth<T> * b_stride),
                                                               b_stride);
  };

#pragma unroll
  for (int m = 0; m < kTilesM; ++m)
#pragma unroll
    for (int n = 0; n < kTilesN; ++n)
#pragma unroll
      for (int i = 0; i < 4; ++i) acc[m][n][i] = 0;

#pragma unroll
  for (int stage = 0; stage < kStages - 1; ++stage) {
    if (stage < stages) copy_stage(stage);
    copy_commit();  // an empty group where there is no stage: the waits count groups
  }
  for (int stage = 0; stage < stages; ++stage) {
    copy_wait<kStages - 2>();
    __syncthreads();  // this stage has landed for all threads, and all are done with the one before it
    if (stage + kStages - 1 < stages) copy_stage(stage + kStages - 1);
    copy_commit();
    const char* const at = shared + stage % kStages * 2 * kHalf;
    // Unrolled, the split operands of both steps would not fit into the registers.
#pragma unroll precision == Precision::kFloat32 ? 1 : 2
    for (int step = 0; step < 2; ++step) {
      uint32_t b_part[kTilesN][2];
      if constexpr (layout == BLayout::kByColumn)
        load_b_by_column(b_part, at + kHalf, step);
      else
        load_b_by_depth<T>(b_part, at + kHalf, step);
      multiply<precision>(acc, at, step, b_part);
    }
  }
}

constexpr int kStagedRowBytes = kTile * static_cast<int>(sizeof(float));

// Lays the tile out in shared memory, row by row. Every thread of the block comes here.
__device__ __forceinline__ void stage_tile(const Accumulators& acc, char* shared) {
  const Place place;
  __syncthreads();  // all warps are done with the operands that lie there
#pragma unroll
  for (int m = 0; m < kTilesM; ++m)
#pragma unroll
    for (int n = 0; n < kTilesN; ++n)
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int row = place.row + m * 16 + half * 8, column = place.column + n * 8;
        struct alignas(8) Two {
          float at[2];
        };
        *reinterpret_cast<Two*>(shared + swizzled<kStagedRowBytes>(row, column / 4) +
                                column % 4 * 4) = {{acc[m][n][2 * half], acc[m][n][2 * half + 1]}};
      }
  __syncthreads();
}

// A number of the tile that stage_tile laid out.
__device__ __forceinline__ float staged(const char* shared, int row, int column) {
  return *reinterpret_cast<const float*>(shared + swizzled<kStagedRowBytes>(row, column / 4) + column % 4 * 4);
}

// Hands that tile out row by row: fn(row, column, values) with four neighbors a lane, a warp a row at a time, so that
// what fn reads and writes of memory is coalesced.
template <typename Fn>
__device__ __forceinline__ void for_each_staged_row(const char* shared, const Fn& fn) {
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  for (int row = warp; row < kTile; row += kWarps) {
    const Four<float> four = *reinterpret_cast<const Four<float>*>(shared + swizzled<kStagedRowBytes>(row, lane));
    fn(row, 4 * lane, four.at);
  }
}

// Both at once. Every thread of the block comes here.
template <typename Fn>
__device__ __forceinline__ void for_each_row(const Accumulators& acc, char* shared, const Fn& fn) {
  stage_tile(acc, shared);
  for_each_staged_row(shared, fn);
}

}  // namespace fa::cuda
