// What the passes over the classes start from and end with, a kernel each, all bound by memory: rows made ready for
// tensor cores, each batch row's terms of its exponentials, and the sums over a pass's partial results.
#pragma once

#include "gemm.h"

namespace fa::cuda {

constexpr double kLog2e = 1.4426950408889634;

// Rows ready for a product, zero-padded to whole tiles: unit row = values * inverse. A power of two has brought the
// largest magnitude of each into [1, 2): 16-bit rows stay exact, squares and products neither over- nor underflow.
struct Panel {
  char* values;       // (rows, width) of Operands::First
  char* second;       // (rows, width) of Operands::Second; values itself where they are the same
  float* inverse;     // (rows,)
  float* reciprocal;  // (rows,) 1 / max(norm, epsilon); negative where epsilon is greater: no projection there
  int64_t rows, width;
};

// Per batch row, zeros in the padding: exponent = scale * (values * w^) - shift in base 2. The factors already have
// what the shift's rounding takes (3e-5 of a probability at a scale of 1000) and, for the second product, the row's
// inverse.
struct RowTerms {
  float* scale;
  float* shift;
  float* factor;              // of the exponentials: 1, or the negatives' coefficient
  float* target_coefficient;  // in place of the target's exponential
  int64_t* target;            // -1: none
  bool of_cosine = false;     // the scale is that of a cosine, not of values * w^
};

// The rows of a matrix that a panel takes, `per_tile` of them in each of its tiles: with several centers a class a tile
// ends with a class. What only pads them is known to the device alone: it names no row of the matrix, or lies past
// *present.
struct RowSelection {
  int64_t first, count;    // of the index, or of the matrix's rows
  const int64_t* index;    // or null: the rows in order
  const int64_t* present;  // or null: all
  int64_t rows;            // of the matrix
  int per_tile = kTile;

  __device__ __forceinline__ int64_t present_count() const {
    if (present == nullptr) return count;
    const int64_t left = *present - first;
    return left < 0 ? 0 : left < count ? left : count;
  }
  // How many of the rows of a panel's tile are there.
  __device__ __forceinline__ int present_in_tile(int tile) const {
    const int64_t left = present_count() - static_cast<int64_t>(tile) * per_tile;
    return static_cast<int>(left < 0 ? 0 : left < per_tile ? left : per_tile);
  }
  // Of the panel's row i; -1 where that is padding.
  __device__ __forceinline__ int64_t row(int64_t i) const {
    const int64_t tile = i / kTile, in_tile = i % kTile, position = tile * per_tile + in_tile;
    if (in_tile >= per_tile || position >= present_count()) return -1;
    const int64_t row = index != nullptr ? index[first + position] : first + position;
    return row < rows ? row : -1;
  }
  // The panel's rows up to the last one that is not padding for certain.
  __host__ __device__ __forceinline__ int64_t panel_count() const {
    return count / per_tile * kTile + count % per_tile;
  }
};

template <typename T>
__device__ __forceinline__ void fill_zero(T* at) {
  *reinterpret_cast<Four<T>*>(at) = Four<T>{};
}

// A warp a row of the panel. Rows of another dtype than First's are rounded once, and their norms are those of the
// rounded rows.
template <typename Source, Precision precision>
__global__ void __launch_bounds__(kRowThreads)
    pack_rows_kernel(const Source* data, int64_t row_stride, int64_t column_stride, RowSelection selection, int columns,
                     Panel panel) {
  using First = typename Operands<precision>::First;
  using Second = typename Operands<precision>::Second;
  const int lane = threadIdx.x % kWarp;
  const int64_t row = static_cast<int64_t>(blockIdx.x) * (kRowThreads / kWarp) + threadIdx.x / kWarp;
  if (row >= panel.rows) return;
  First* const values = reinterpret_cast<First*>(panel.values) + row * panel.width;
  Second* const second = reinterpret_cast<Second*>(panel.second) + row * panel.width;
  const int width = static_cast<int>(panel.width);
  const int64_t in_matrix = selection.row(row);
  if (in_matrix < 0) {
    for (int d = 4 * lane; d < width; d += 4 * kWarp) {
      fill_zero(values + d);
      if (precision == Precision::kFloat16) fill_zero(second + d);
    }
    if (lane == 0) panel.inverse[row] = panel.reciprocal[row] = 0;
    return;
  }

  const Source* const from = data + in_matrix * row_stride;
  float largest = 0;
  for (int d = 4 * lane; d < columns; d += 4 * kWarp) {
    float x[4];
    load_four(from + d * column_stride, column_stride, columns - d, x);
#pragma unroll
    for (int i = 0; i < 4; ++i) largest = fmaxf(largest, fabsf(x[i]));
  }
  largest = warp_max(largest);
  // 2^-k for `largest` in [2^k, 2^(k+1)), kept within the normal numbers.
  const uint32_t exponent = __float_as_uint(largest) >> 23;
  const float factor = __uint_as_float((254u - (exponent < 1 ? 1 : exponent > 253 ? 253 : exponent)) << 23);

  float squares = 0;
  for (int d = 4 * lane; d < width; d += 4 * kWarp) {
    float x[4];
    load_four(from + d * column_stride, column_stride, columns - d, x);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      x[i] *= factor;
      if constexpr (sizeof(First) == 2) x[i] = rounded<First>(x[i]);  // exact for a row that is stored so
      squares += x[i] * x[i];
      if (precision == Precision::kTf32) x[i] = round_to_tf32(x[i]);
    }
    const auto store = [](float value, auto* to, int) { convert(value, to); };
    store_four(values + d, 1, 4, x, store);
    if (precision == Precision::kFloat16) store_four(second + d, 1, 4, x, store);
  }
  squares = warp_sum(squares);
  if (lane != 0) return;
  const double norm = sqrt(static_cast<double>(squares)) / factor;
  const double floored = norm < kNormEpsilon ? kNormEpsilon : norm;  // NaN stays
  panel.inverse[row] = static_cast<float>(1 / (floored * factor));
  panel.reciprocal[row] = static_cast<float>(norm < kNormEpsilon ? -1 / floored : 1 / floored);
}

// Coefficients are null in the forward pass, shift may be. device_scale, where it is not null, is the scale.
static __global__ void __launch_bounds__(kRowThreads)
    row_terms_kernel(Panel x, int64_t count, double scale, const double* device_scale, const double* shift,
                     const int64_t* target, const float* negative_coefficient, const float* target_coefficient,
                     RowTerms terms) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kRowThreads + threadIdx.x;
  if (i >= x.rows) return;
  const bool present = i < count;
  const double exact = present && shift != nullptr ? shift[i] * kLog2e : 0;
  const float rounded = static_cast<float>(exact);
  const double lost = fabs(exact) <= 1e300 ? static_cast<double>(rounded) - exact : 0;
  const float correction = static_cast<float>(exp2(lost));
  const double inverse = terms.of_cosine ? 1.0 : x.inverse[i];
  if (device_scale != nullptr) scale = *device_scale;
  terms.scale[i] = present ? static_cast<float>(inverse * scale * kLog2e) : 0.0f;
  terms.shift[i] = rounded;
  terms.target[i] = present ? target[i] : -1;
  if (negative_coefficient == nullptr) {
    terms.factor[i] = correction;
  } else {
    terms.factor[i] = present ? negative_coefficient[i] * correction * x.inverse[i] : 0.0f;
    terms.target_coefficient[i] = present ? target_coefficient[i] * x.inverse[i] : 0.0f;
  }
}

// Sums and maxima (slots, stride) of `count` rows into one each: 32 rows a block, its warps a part of the slots each.
// The order of the additions depends on the sizes alone. `inverse`: of the rows, which the maxima still lack, or null.
constexpr int kFinishSharedBytes = 2 * kRowThreads * static_cast<int>(sizeof(double));
static __global__ void __launch_bounds__(kRowThreads)
    finish_row_stats_kernel(const float* sums, const float* maxima, int slots, int64_t stride, int64_t count,
                            RowTerms terms, const float* inverse, float* negative_sum, float* negative_max) {
  constexpr int kParts = kRowThreads / kWarp;
  const int lane = threadIdx.x % kWarp, part = threadIdx.x / kWarp;
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kWarp + lane;
  double* const parts = reinterpret_cast<double*>(dynamic_shared());
  double sum = 0, largest = -INFINITY;
  if (i < count)
    for (int slot = part; slot < slots; slot += kParts) {
      const int64_t at = slot * stride + i;
      if (negative_sum != nullptr) sum += sums[at];
      largest = fmax(largest, static_cast<double>(maxima[at]));
    }
  parts[part * kWarp + lane] = sum;
  parts[kRowThreads + part * kWarp + lane] = largest;
  __syncthreads();
  if (part != 0 || i >= count) return;
  for (int other = 1; other < kParts; ++other) {
    sum += parts[other * kWarp + lane];
    largest = fmax(largest, parts[kRowThreads + other * kWarp + lane]);
  }
  negative_max[i] = static_cast<float>(inverse != nullptr ? largest * inverse[i] : largest);
  if (negative_sum != nullptr) negative_sum[i] = static_cast<float>(sum * terms.factor[i]);
}

// Partial center sums (splits, rows, width) into center_sum (count, columns).
static __global__ void __launch_bounds__(kRowThreads)
    finish_center_sum_kernel(const float* partial, int splits, int64_t rows, int64_t width, int64_t count, int columns,
                             RowTerms terms, float* center_sum) {
  const int lane = threadIdx.x % kWarp;
  const int64_t row = static_cast<int64_t>(blockIdx.x) * (kRowThreads / kWarp) + threadIdx.x / kWarp;
  if (row >= count) return;
  for (int d = 4 * lane; d < columns; d += 4 * kWarp) {
    float sum[4] = {};
    for (int split = 0; split < splits; ++split) {
      const Four<float> part = *reinterpret_cast<const Four<float>*>(partial + (split * rows + row) * width + d);
#pragma unroll
      for (int i = 0; i < 4; ++i) sum[i] += part.at[i];
    }
    const float factor = terms.factor[row];
    store_four(center_sum + row * columns + d, 1, columns - d, sum,
               [factor](float value, float* to, int) { *to = value * factor; });
  }
}

}  // namespace fa::cuda
