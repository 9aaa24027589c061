// Rows on their way into a product, and gradients on their way out: rows are read, normalised and laid out; gradients
// are projected.
#pragma once

#include <cmath>

#include "conversion.h"
#include "memory.h"
#include "simd.h"

namespace fa::FA_ISA {

constexpr double kNormEpsilon = 1e-12;  // as torch.nn.functional.normalize

// <a, b> over `size` elements, a multiple of the lane count. Four chains hide the latency of the additions.
template <typename T>
inline T dot(const T* a, const T* b, int64_t size) {
  Vec<T> sum[4] = {};
  int64_t d = 0;
  for (; d + 4 * kLanes<T> <= size; d += 4 * kLanes<T>)
    for (int chain = 0; chain < 4; ++chain)
      sum[chain] += load(a + d + chain * kLanes<T>) * load(b + d + chain * kLanes<T>);
  for (; d < size; d += kLanes<T>) sum[0] += load(a + d) * load(b + d);
  return sum_lanes<T>((sum[0] + sum[1]) + (sum[2] + sum[3]));
}

// |row| from the sum of its squares in T, or in fp64 where that under- or overflowed or is NaN.
template <typename T>
inline double norm(const T* row, int64_t padded, T squares) {
  double sum = squares;
  if (!(squares > T(1e-20) && squares < T(1e36))) {
    sum = 0;
    for (int64_t d = 0; d < padded; ++d) sum += static_cast<double>(row[d]) * row[d];
  }
  return std::sqrt(sum);
}

// Rows [first, first + count) of m, or with an index rows index[first] and on, divided by max(|row|, epsilon),
// zero-padded to `padded` elements, to `out` with the given stride. `inverse_norm` (count,) becomes 1 / max(|row|,
// epsilon), with a minus sign where epsilon was the greater: such a row takes no part in the projection of its
// gradient. One step after the other over all rows, not all steps row by row: the latency of one row's norm is hidden
// behind the next row's (bench/NOTES.md).
template <typename T>
inline void pack_rows(const Matrix& m, int64_t first, int64_t count, T* out, int64_t stride, int64_t padded,
                      T* inverse_norm, const int64_t* index = nullptr) {
  for (int64_t r = 0; r < count; ++r) {
    T* row = out + r * stride;
    read_row(m, index != nullptr ? index[first + r] : first + r, row);
    for (int64_t d = m.columns; d < padded; ++d) row[d] = 0;
    inverse_norm[r] = dot(row, row, padded);
  }
  for (int64_t r = 0; r < count; ++r) {
    const double length = norm(out + r * stride, padded, inverse_norm[r]);
    inverse_norm[r] = static_cast<T>(length < kNormEpsilon ? -1 / kNormEpsilon : 1 / length);
  }
  for (int64_t r = 0; r < count; ++r) {
    T* row = out + r * stride;
    const T factor = inverse_norm[r] < 0 ? -inverse_norm[r] : inverse_norm[r];
    for (int64_t d = 0; d < padded; d += kLanes<T>) store<T>(row + d, load(row + d) * factor);
  }
}

// d_row = J d_unit with J the Jacobian of w -> unit = w / max(|w|, epsilon): in place in d_unit.
template <typename T>
inline void project(T* d_unit, const T* unit, T inverse_norm, int64_t padded) {
  const T along = inverse_norm < 0 ? T(0) : dot(d_unit, unit, padded);
  const T factor = inverse_norm < 0 ? -inverse_norm : inverse_norm;
  for (int64_t d = 0; d < padded; d += kLanes<T>)
    store<T>(d_unit + d, (load(d_unit + d) - load(unit + d) * along) * factor);
}

}  // namespace fa::FA_ISA
