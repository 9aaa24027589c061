// Rows on their way into a product, and gradients on their way out: rows are read, normalized and laid out; gradients
// are projected.
#pragma once

#include <algorithm>
#include <cmath>

#include "conversion.h"
#include "memory.h"
#include "product.h"

namespace fa::FA_ISA {

constexpr double kNormEpsilon = 1e-12;  // as torch.nn.functional.normalize

template <typename T>
constexpr Dtype kDtypeOf = sizeof(T) == 8 ? Dtype::kFloat64 : Dtype::kFloat32;

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

// Longer rows are shortened first, by a power of two: their squares, their norm or its inverse may pass T's range, and
// their gradients be subnormal. What is left of them is still longer than epsilon.
template <typename T>
constexpr double kLongest = sizeof(T) == 8 ? 0x1p512 : 0x1p64;
template <typename T>
constexpr double kShortening = sizeof(T) == 8 ? 0x1p-540 : 0x1p-92;

// 1 / max(|row|, epsilon) = factor * power. The factor has a minus sign where epsilon was the greater: such a row takes
// no part in the projection of its gradient. The power is 1 but for rows past kLongest.
template <typename T>
struct InverseNorm {
  T factor, power;
  bool is_short() const { return factor < 0; }
};

template <typename T>
inline T inverse_of(double length) {
  return static_cast<T>(length < kNormEpsilon ? -1 / kNormEpsilon : 1 / length);
}

// What norms leave for later, for each row: its inverse norm, and the factor that makes the stored row a unit row
// (BFloat16Pairs alone; Full stores unit rows).
template <typename T>
struct Norms {
  InverseNorm<T>* inverse;
  T* to_unit;
};

// `from` times a factor, to `to`, which may be `from`.
template <typename T>
inline void scale(const T* from, int64_t padded, T factor, T* to) {
  for (int64_t d = 0; d < padded; d += kLanes<T>) store<T>(to + d, load(from + d) * factor);
}

// Rows [first, first + count) of m, or with an index rows index[first] and on, divided by max(|row|, epsilon),
// zero-padded to `padded` numbers, to `out` with the given stride in elements. A few rows at a time, one step after the
// other over all of them: the latency of one row's norm is hidden behind the next row's, and they stay in L1
// (bench/NOTES.md). Rows that are whole vectors of T already are read where they lie.
template <typename T>
inline void pack_rows(Full<T>, const Matrix& m, int64_t first, int64_t count, T* out, int64_t stride, int64_t padded,
                      const Norms<T>& norms, T*, const int64_t* index = nullptr) {
  constexpr int64_t kAtATime = 8;
  const bool in_place = m.dtype == kDtypeOf<T> && m.column_stride == 1 && m.columns == padded;
  for (int64_t begin = 0; begin < count; begin += kAtATime) {
    const int64_t end = std::min(begin + kAtATime, count);
    const T* from[kAtATime];
    for (int64_t r = begin; r < end; ++r) {
      const int64_t in_matrix = index != nullptr ? index[first + r] : first + r;
      T* const row = out + r * stride;
      from[r - begin] = in_place ? static_cast<const T*>(m.data) + in_matrix * m.row_stride : row;
      if (!in_place) {
        read_row(m, in_matrix, row);
        for (int64_t d = m.columns; d < padded; ++d) row[d] = 0;
      }
      norms.inverse[r].factor = dot(from[r - begin], from[r - begin], padded);
    }
    for (int64_t r = begin; r < end; ++r) {
      T power = 1;
      double length = norm(from[r - begin], padded, norms.inverse[r].factor);
      if (length > kLongest<T>) {
        T* const row = out + r * stride;
        power = static_cast<T>(kShortening<T>);
        scale(from[r - begin], padded, power, row);
        from[r - begin] = row;
        length = norm(row, padded, dot(row, row, padded));
      }
      norms.inverse[r] = {inverse_of<T>(length), power};
    }
    for (int64_t r = begin; r < end; ++r)
      scale(from[r - begin], padded, std::abs(norms.inverse[r].factor), out + r * stride);
  }
}

// Rows of kDepth numbers an element become elements of kDepth rows: what is deep in the second product. `to` has
// round_up(count, kDepth) / kDepth rows of `padded` elements. A row that is missing counts as zeros.
template <typename T>
inline void pack_depth(Full<T>, const T*, int64_t, int64_t, int64_t, T*, int64_t) {}

// The unit row that an operand's row stands for, as the projection takes it.
template <typename T>
inline const T* unit_row(Full<T>, const T* row, T, int64_t, T*) {
  return row;
}

#if defined(__AVX512BF16__)

inline void round_row(const float* numbers, int64_t padded, float factor, uint32_t* out) {
  for (int64_t d = 0; d < padded; d += 32) {
    const Vec<float> first = load(numbers + d) * factor, second = load(numbers + d + 16) * factor;
    _mm512_storeu_si512(out + d / 2, BFloat16Pairs::concatenate(first, second));
  }
}

// |row|^2 of a packed row.
inline float squares_of(const uint32_t* row, int64_t padded) {
  Vec<float> sums[2] = {};
  for (int64_t d = 0; d < padded; d += 32) {
    const auto pairs = BFloat16Pairs::load(row + d / 2);
    sums[d / 32 % 2] = BFloat16Pairs::multiply_add(sums[d / 32 % 2], pairs, pairs);
  }
  return sum_lanes<float>(sums[0] + sums[1]);
}

// As above, as bf16 numbers, kDepth of them in an element; norms are those of the rounded rows, so no cosine leaves
// [-1, 1]. Rows whose squares leave fp32's range are multiplied by a power of two first: no 16-bit number changes by
// that, and products neither over- nor underflow. `numbers`: room for `padded` of them.
inline void pack_rows(BFloat16Pairs, const Matrix& m, int64_t first, int64_t count, uint32_t* out, int64_t stride,
                      int64_t padded, const Norms<float>& norms, float* numbers, const int64_t* index = nullptr) {
  const bool stored_so = m.dtype == Dtype::kBFloat16 && m.column_stride == 1;
  std::fill(numbers + m.columns, numbers + padded, 0.0f);
  for (int64_t r = 0; r < count; ++r) {
    const int64_t in_matrix = index != nullptr ? index[first + r] : first + r;
    uint32_t* const row = out + r * stride;
    if (stored_so) {
      std::memcpy(row, static_cast<const BFloat16*>(m.data) + in_matrix * m.row_stride, 2 * m.columns);
      std::memset(reinterpret_cast<BFloat16*>(row) + m.columns, 0, 2 * (padded - m.columns));
    } else if (m.dtype == Dtype::kFloat32 && m.column_stride == 1 && m.columns == padded) {
      round_row(static_cast<const float*>(m.data) + in_matrix * m.row_stride, padded, 1, row);
    } else {
      read_row(m, in_matrix, numbers);
      round_row(numbers, padded, 1, row);
    }
    norms.to_unit[r] = squares_of(row, padded);
  }
  for (int64_t r = 0; r < count; ++r) {
    double squares = norms.to_unit[r], power = 1;
    if (!(squares > 1e-20 && squares < 1e20)) {
      read_row(m, index != nullptr ? index[first + r] : first + r, numbers);
      const double length = norm(numbers, padded, 0.0f);
      if (length > 0 && std::isfinite(length)) power = std::ldexp(1.0, std::clamp(-std::ilogb(length), -120, 120));
      round_row(numbers, padded, static_cast<float>(power), out + r * stride);
      squares = squares_of(out + r * stride, padded);
    }
    // The stored row is `power` times as long as the row.
    const double length = std::sqrt(squares);
    if (power < 1)
      norms.inverse[r] = {static_cast<float>(1 / length), static_cast<float>(power)};
    else
      norms.inverse[r] = {inverse_of<float>(length / power), 1};
    norms.to_unit[r] = static_cast<float>(1 / (length / power < kNormEpsilon ? kNormEpsilon * power : length));
  }
}

inline void pack_depth(BFloat16Pairs, const uint32_t* rows, int64_t stride, int64_t count, int64_t padded, uint32_t* to,
                       int64_t to_stride) {
  for (int64_t r = 0; r < count; r += 2)
    BFloat16Pairs::interleave_rows(rows + r * stride, r + 1 < count ? rows + (r + 1) * stride : nullptr, padded,
                                   to + r / 2 * to_stride);
}

inline const float* unit_row(BFloat16Pairs, const uint32_t* row, float to_unit, int64_t padded, float* numbers) {
  const BFloat16* const stored = reinterpret_cast<const BFloat16*>(row);
  for (int64_t d = 0; d < padded; ++d) numbers[d] = to_float(stored[d]) * to_unit;
  return numbers;
}

#endif

// d_row = J d_unit with J the Jacobian of w -> unit = w / max(|w|, epsilon): in place in d_unit.
template <typename T>
inline void project(T* d_unit, const T* unit, InverseNorm<T> inverse_norm, int64_t padded) {
  const T along = inverse_norm.is_short() ? T(0) : dot(d_unit, unit, padded);
  const T factor = std::abs(inverse_norm.factor);
  for (int64_t d = 0; d < padded; d += kLanes<T>)
    store<T>(d_unit + d, (load(d_unit + d) - load(unit + d) * along) * factor);
  if (inverse_norm.power < 1) {
    const KeepSubnormals keep;  // so small is what is left of the gradient
    scale(d_unit, padded, inverse_norm.power, d_unit);
  }
}

}  // namespace fa::FA_ISA
