// Preparation of rows for the passes: their norms, and bf16 copies of rows that are not plain bf16.
#pragma once

#include "../rows.h"
#include "block.h"

namespace fa::cuda::hopper {

// Rows of 512 bf16 numbers as the passes take them: unit row = inverse * (factor * row as stored).
struct PreparedRows {
  BFloat16* values;   // (rows, 512), or null: they are used where they lie
  float* inverse;     // (rows,) 0 for padding
  float* reciprocal;  // (rows,) as Panel's: 1 / max(norm, epsilon), negative where epsilon is greater
  float* factor;      // (rows,) a power of two; 0 for padding, whose numbers may be NaN
  int* odd;           // 1 if any factor is neither 0 nor 1
  int64_t rows;       // a multiple of 64
};

// Norms in [2^-40, 2^40]. There an exponential (at most 2^93 at a scale of 64) times an inverse stays well within
// bf16's range, and a sum of products with batch rows in [1, 2) within fp32's. Those of a zero row are zero.
constexpr float kLeastSquares = 0x1p-80f, kMostSquares = 0x1p80f;

// True if a row is used as it is stored, given the sum of its squares and its largest magnitude.
__device__ __forceinline__ bool is_ordinary(float squares, float largest) {
  return (squares >= kLeastSquares && squares <= kMostSquares) || largest == 0;
}
// 2^-k for `largest` in [2^k, 2^(k+1)), kept within the normal numbers.
__device__ __forceinline__ float scaling_of(float largest) {
  const uint32_t exponent = __float_as_uint(largest) >> 23;
  return __uint_as_float((254u - (exponent < 1 ? 1 : exponent > 253 ? 253 : exponent)) << 23);
}

struct Norm {
  float inverse, reciprocal;  // as in PreparedRows
};
// Returns the norm of a row whose numbers, times `factor`, have this sum of squares.
__device__ __forceinline__ Norm norm_of(float squares, float factor) {
  constexpr float kEpsilon = static_cast<float>(kNormEpsilon);
  if (factor == 1) {  // most of them, so without fp64
    const float norm = sqrtf(squares), inverse = 1 / (norm < kEpsilon ? kEpsilon : norm);  // NaN stays
    return {inverse, norm < kEpsilon ? -inverse : inverse};
  }
  const double norm = sqrt(static_cast<double>(squares)) / factor;
  const double floored = norm < kNormEpsilon ? kNormEpsilon : norm;
  return {static_cast<float>(1 / (floored * factor)),
          static_cast<float>(norm < kNormEpsilon ? -1 / floored : 1 / floored)};
}

// One warp for each row. A power of two brings the largest magnitude of each copied row into [1, 2), which is exact. A
// row that is used where it is stored has a factor other than 1 only if its norm is out of range.
template <typename Source>
__global__ void __launch_bounds__(kRowThreads)
    prepare_rows_kernel(const Source* data, int64_t row_stride, int64_t column_stride, RowSelection selection,
                        PreparedRows out) {
  constexpr int kEach = kColumns / kWarp;
  const int lane = threadIdx.x % kWarp;
  const int64_t row = static_cast<int64_t>(blockIdx.x) * (kRowThreads / kWarp) + threadIdx.x / kWarp;
  if (row >= out.rows) return;
  const int64_t in_matrix = selection.row(row);
  float x[kEach] = {};
  if (in_matrix >= 0) {
    const Source* const from = data + in_matrix * row_stride;
#pragma unroll
    for (int i = 0; i < kEach; i += 4) {
      float four[4];
      const int d = (i / 4 * kWarp + lane) * 4;
      load_four(from + d * column_stride, column_stride, kColumns - d, four);
      // Rounded once to the numbers of the product; bf16 stays as it is.
#pragma unroll
      for (int k = 0; k < 4; ++k) x[i + k] = to_float(to_bf16(four[k]));
    }
  }
  float largest = 0, plain_squares = 0;
#pragma unroll
  for (int i = 0; i < kEach; ++i) {
    largest = fmaxf(largest, fabsf(x[i]));
    plain_squares += x[i] * x[i];
  }
  largest = warp_max(largest);
  plain_squares = warp_sum(plain_squares);
  const float factor = out.values == nullptr && is_ordinary(plain_squares, largest) ? 1.0f : scaling_of(largest);
  float squares = 0;
#pragma unroll
  for (int i = 0; i < kEach; ++i) {
    x[i] *= factor;
    squares += x[i] * x[i];
  }
  squares = warp_sum(squares);
  if (out.values != nullptr) {
#pragma unroll
    for (int i = 0; i < kEach; i += 4) {
      const float four[4] = {x[i], x[i + 1], x[i + 2], x[i + 3]};
      store_four(out.values + row * kColumns + (i / 4 * kWarp + lane) * 4, 1, 4, four,
                 [](float value, BFloat16* to, int) { convert(value, to); });
    }
  }
  if (lane != 0) return;
  const bool present = in_matrix >= 0;
  if (!present) {
    out.inverse[row] = out.reciprocal[row] = out.factor[row] = 0;
    return;
  }
  const Norm norm = norm_of(squares, factor);
  out.inverse[row] = norm.inverse;
  out.reciprocal[row] = norm.reciprocal;
  const bool mended = out.values == nullptr && factor != 1;
  out.factor[row] = mended ? factor : 1.0f;
  if (mended) *out.odd = 1;  // all threads that write here write this value
}

// A row of a slot belongs to two threads of the first warpgroup, half of its columns to each, in chunks of 16 bytes.
// All threads of that warpgroup call the functions below together.
constexpr int kChunks = kColumns / 8 / 2;
struct alignas(16) Chunk {
  BFloat16 at[8];
};
struct HalfRow {
  char* slot;
  int t, row, half;
  __device__ __forceinline__ explicit HalfRow(char* slot) : slot(slot) {
    t = fresh(threadIdx.x % kWarpGroup), row = t / 2, half = t % 2;
  }
  // Each of eight neighboring threads has another order, so that their chunks lie in different banks.
  __device__ __forceinline__ Chunk* chunk(int i) const {
    return reinterpret_cast<Chunk*>(slot + (half * (kBoxes / 2) + i / 8) * kBoxBytes + row * 128 + ((i ^ t) & 7) * 16);
  }
  __device__ __forceinline__ void multiply(float factor) const {
    if (factor == 1) return;
    for (int i = 0; i < kChunks; ++i) {
      Chunk mended = *chunk(i);
#pragma unroll
      for (int k = 0; k < 8; ++k) mended.at[k] = factor == 0 ? BFloat16{0} : to_bf16(to_float(mended.at[k]) * factor);
      store_shared(chunk(i), mended);
    }
  }
};

// Multiplies each row of a tile of classes by its factor, before a product reads the tile.
__device__ __forceinline__ void mend_rows(char* slot, const float* factors) {
  const HalfRow mine(slot);
  mine.multiply(factors[mine.row]);
  fence_async();
  named_sync<1, kWarpGroup>();
}

// Computes the terms of a block of classes in its slot, and brings rows into range there. Each warp measures the rows
// whose terms it reads afterwards.
__device__ __forceinline__ void measure_rows(char* slot, BlockTerms& terms) {
  const HalfRow mine(slot);
  const auto measure = [&](float* squares, float* largest) {
    *squares = *largest = 0;
#pragma unroll 4
    for (int i = 0; i < kChunks; ++i) {
      const Chunk chunk = *mine.chunk(i);
#pragma unroll
      for (int k = 0; k < 8; ++k) {
        const float x = to_float(chunk.at[k]);
        *squares = fmaf(x, x, *squares);
        *largest = fmaxf(*largest, fabsf(x));
      }
    }
    *squares += __shfl_xor_sync(0xffffffffu, *squares, 1);
    *largest = fmaxf(*largest, __shfl_xor_sync(0xffffffffu, *largest, 1));
  };
  float squares, largest;
  measure(&squares, &largest);
  const float factor = is_ordinary(squares, largest) ? 1.0f : scaling_of(largest);
  if (any_of_warp(factor != 1)) {
    mine.multiply(factor);
    measure(&squares, &largest);
  }
  const Norm norm = norm_of(squares, factor);
  if (mine.half == 0) {
    terms.inverse[mine.row] = norm.inverse;
    terms.reciprocal[mine.row] = norm.reciprocal;
    terms.factor[mine.row] = factor;
  }
  fence_async();
  named_sync<1, kWarpGroup>();
}

}  // namespace fa::cuda::hopper
