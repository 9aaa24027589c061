// Between the caller's memory (any dtype, any strides) and the kernels' own: rows are read, converted to the compute
// type, normalized and laid out for the product; gradients are projected and written back.
#pragma once

#include <cmath>
#include <cstdlib>
#include <limits>
#include <new>

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include "kernels.h"
#include "simd.h"

namespace fa::FA_ISA {

constexpr double kNormEpsilon = 1e-12;  // as torch.nn.functional.normalize

// Cache-line aligned memory, uninitialized, for the time of one call.
template <typename T>
class Scratch {
 public:
  explicit Scratch(int64_t size)
      : data_(static_cast<T*>(::operator new(sizeof(T) * (size > 0 ? size : 1), std::align_val_t{64}))) {}
  ~Scratch() { ::operator delete(data_, std::align_val_t{64}); }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  T* get() const { return data_; }

 private:
  T* data_;
};

constexpr int64_t round_up(int64_t n, int64_t multiple) { return (n + multiple - 1) / multiple * multiple; }

// A row stride of an odd number of cache lines: successive rows then fall into different cache sets.
template <typename T>
constexpr int64_t padded_stride(int64_t columns) {
  constexpr int64_t line = 64 / sizeof(T);
  const int64_t lines = (columns + line - 1) / line;
  return (lines | 1) * line;
}

inline int64_t element_size(Dtype dtype) { return dtype == Dtype::kFloat64 ? 8 : dtype == Dtype::kFloat32 ? 4 : 2; }

struct BFloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};

inline float float_of(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}
inline uint32_t float_bits(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  return bits;
}

inline float to_float(float x) { return x; }
inline double to_float(double x) { return x; }
inline float to_float(BFloat16 x) { return float_of(static_cast<uint32_t>(x.bits) << 16); }
inline float to_float(Float16 x) {
  // Rebias the exponent; infinities and NaN need it twice, subnormals are normalized by a subtraction. Selects, not
  // branches.
  const uint32_t magnitude = (x.bits & 0x7fffu) << 13, exponent = magnitude & 0x0f800000u;
  const uint32_t normal = magnitude + (112u << 23) + (exponent == 0x0f800000u ? 112u << 23 : 0u);
  const float subnormal = float_of(magnitude + (113u << 23)) - float_of(113u << 23);
  const uint32_t bits = exponent == 0 ? float_bits(subnormal) : normal;
  return float_of(bits | (x.bits & 0x8000u) << 16);
}

inline void convert(float x, float* to) { *to = x; }
inline void convert(double x, float* to) { *to = static_cast<float>(x); }
inline void convert(double x, double* to) { *to = x; }
inline void convert(float x, BFloat16* to) {
  const uint32_t bits = float_bits(x);
  const bool nan = (bits & 0x7fffffffu) > 0x7f800000u;
  to->bits = static_cast<uint16_t>(nan ? bits >> 16 | 0x40u : (bits + 0x7fffu + (bits >> 16 & 1u)) >> 16);
}
inline void convert(float x, Float16* to) {
  const uint32_t bits = float_bits(x), sign = bits >> 16 & 0x8000u, magnitude = bits & 0x7fffffffu;
  uint32_t half;
  if (magnitude > 0x7f800000u)
    half = 0x7e00u;  // NaN
  else if (magnitude >= 0x477ff000u)
    half = 0x7c00u;                  // infinity, from 65520 on: a GradScaler has to see a gradient's overflow
  else if (magnitude < 0x38800000u)  // subnormal in fp16: adding 0.5 leaves it, rounded, in the lowest bits
    half = float_bits(float_of(magnitude) + 0.5f) - 0x3f000000u;
  else
    half = (magnitude - (112u << 23) + 0xfffu + (magnitude >> 13 & 1u)) >> 13;
  to->bits = static_cast<uint16_t>(sign | half);
}
// fp64 sums into a 16-bit gradient: only where the other input is fp64.
inline void convert(double x, BFloat16* to) { convert(static_cast<float>(x), to); }
inline void convert(double x, Float16* to) { convert(static_cast<float>(x), to); }

// A fresh gradient of hundreds of megabytes costs a page fault every 4 KiB as it is first written, a seventh of the
// backward pass; with 2 MiB pages, which Linux gives to those who ask, nearly none. A hint: failure means nothing.
inline void advise_huge_pages(const Matrix& m) {
#if defined(MADV_HUGEPAGE)
  constexpr uintptr_t kPage = 4096;
  const uintptr_t begin = (reinterpret_cast<uintptr_t>(m.data) + kPage - 1) & ~(kPage - 1);
  const uintptr_t end =
      (reinterpret_cast<uintptr_t>(m.data) + m.rows * m.row_stride * element_size(m.dtype)) & ~(kPage - 1);
  if (end > begin + (4 << 20)) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#else
  (void)m;
#endif
}

template <typename Fn>
inline void visit_dtype(const Matrix& m, const Fn& fn) {
  switch (m.dtype) {
    case Dtype::kFloat32:
      return fn(static_cast<float*>(m.data));
    case Dtype::kFloat64:
      return fn(static_cast<double*>(m.data));
    case Dtype::kBFloat16:
      return fn(static_cast<BFloat16*>(m.data));
    case Dtype::kFloat16:
      return fn(static_cast<Float16*>(m.data));
  }
}

// Row `row` of m, converted, into out[0, columns).
template <typename T>
inline void read_row(const Matrix& m, int64_t row, T* out) {
  visit_dtype(m, [&](const auto* data) {
    const auto* from = data + row * m.row_stride;
    if (m.column_stride == 1)
      for (int64_t d = 0; d < m.columns; ++d) out[d] = static_cast<T>(to_float(from[d]));
    else
      for (int64_t d = 0; d < m.columns; ++d) out[d] = static_cast<T>(to_float(from[d * m.column_stride]));
  });
}

template <typename T>
inline void write_row(const Matrix& m, int64_t row, const T* values) {
  visit_dtype(m, [&](auto* data) {
    auto* to = data + row * m.row_stride;
    if (m.column_stride == 1)
      for (int64_t d = 0; d < m.columns; ++d) convert(values[d], to + d);
    else
      for (int64_t d = 0; d < m.columns; ++d) convert(values[d], to + d * m.column_stride);
  });
}

// Finite numbers of a row within the range of m's dtype, in place: for the gradient of a row that epsilon divides, 1e12
// large in fp16, which has to stay finite.
template <typename T>
inline void saturate(const Matrix& m, T* row) {
  constexpr T kMost = 65504;
  if (m.dtype != Dtype::kFloat16) return;
  for (int64_t d = 0; d < m.columns; ++d)
    if (std::isfinite(row[d])) row[d] = row[d] > kMost ? kMost : row[d] < -kMost ? -kMost : row[d];
}

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
};

template <typename T>
inline void scale(T* row, int64_t padded, T factor) {
  for (int64_t d = 0; d < padded; d += kLanes<T>) store<T>(row + d, load(row + d) * factor);
}

// Rows [first, first + count) of m, or with an index rows index[first] and on, divided by max(|row|, epsilon),
// zero-padded to `padded` elements, to `out` with the given stride; `inverse_norm` (count,) is written. One step after
// the other over all rows, not all steps row by row: the latency of one row's norm is hidden behind the next row's
// (bench/NOTES.md).
template <typename T>
inline void pack_rows(const Matrix& m, int64_t first, int64_t count, T* out, int64_t stride, int64_t padded,
                      InverseNorm<T>* inverse_norm, const int64_t* index = nullptr) {
  for (int64_t r = 0; r < count; ++r) {
    T* row = out + r * stride;
    read_row(m, index != nullptr ? index[first + r] : first + r, row);
    for (int64_t d = m.columns; d < padded; ++d) row[d] = 0;
    inverse_norm[r].factor = dot(row, row, padded);
  }
  for (int64_t r = 0; r < count; ++r) {
    T* row = out + r * stride;
    T power = 1;
    double length = norm(row, padded, inverse_norm[r].factor);
    if (length > kLongest<T>) {
      power = static_cast<T>(kShortening<T>);
      scale(row, padded, power);
      length = norm(row, padded, dot(row, row, padded));
    }
    inverse_norm[r] = {static_cast<T>(length < kNormEpsilon ? -1 / kNormEpsilon : 1 / length), power};
  }
  for (int64_t r = 0; r < count; ++r) scale(out + r * stride, padded, std::abs(inverse_norm[r].factor));
}

// d_row = J d_unit with J the Jacobian of w -> unit = w / max(|w|, epsilon): in place in d_unit.
template <typename T>
inline void project(T* d_unit, const T* unit, InverseNorm<T> inverse_norm, int64_t padded) {
  const T along = inverse_norm.factor < 0 ? T(0) : dot(d_unit, unit, padded);
  const T factor = std::abs(inverse_norm.factor);
  for (int64_t d = 0; d < padded; d += kLanes<T>)
    store<T>(d_unit + d, (load(d_unit + d) - load(unit + d) * along) * factor);
  if (inverse_norm.power < 1) {
    const KeepSubnormals keep;  // so small is what is left of the gradient
    scale(d_unit, padded, inverse_norm.power);
  }
}

}  // namespace fa::FA_ISA
