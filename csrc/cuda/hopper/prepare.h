// What the passes need of rows before they begin: norms of all, and copies of those that are no plain bf16 rows.
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
  int* odd;           // whether any factor is neither 0 nor 1
  int64_t rows;       // a multiple of 64
};

// Norms for which exponentials (2^93 at a scale of 64) times inverses, and sums of products with batch rows in [1, 2),
// keep well within bf16's and fp32's range. A zero row does so, too.
constexpr float kLeastSquares = 0x1p-80f, kMostSquares = 0x1p80f;

// Whether a row is used as it lies, by its numbers' squares and largest magnitude.
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
// Of a row that `factor` has brought to these squares.
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

// A warp a row. Copies have their largest magnitude in [1, 2) by a power of two, which is exact; what is used where it
// lies has a factor only where its norm is out of range.
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
  if (mended) *out.odd = 1;  // whoever writes it writes this
}

// Two threads of the first warpgroup have a row of a slot, half of its columns each, in chunks of 16 bytes. All of its
// threads come to what follows.
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
  // In another order for each thread of eight, so that their chunks lie in different banks.
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

// A tile of classes, row by row times its factor, before a product reads it.
__device__ __forceinline__ void mend_rows(char* slot, const float* factors) {
  const HalfRow mine(slot);
  mine.multiply(factors[mine.row]);
  fence_async();
  named_sync<1, kWarpGroup>();
}

// The terms of a block of classes, which lie in its slot as they are stored: each is brought into range there. A warp
// measures the rows that it reads the terms of afterwards.
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
