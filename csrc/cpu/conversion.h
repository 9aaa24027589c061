// Numbers between the caller's memory (any dtype, any strides) and the compute type.
#pragma once

#include <cmath>

#include "arguments.h"
#include "product.h"
#include "sixteen_bit.h"

namespace fa::FA_ISA {

inline float to_float(float x) { return x; }
inline double to_float(double x) { return x; }
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

#if defined(__AVX512BF16__)
// Whole vectors of a row in bf16, to nearest even; how many numbers that were.
inline int64_t convert_vectors(const float* from, int64_t count, BFloat16* to) {
  int64_t d = 0;
  for (; d + 32 <= count; d += 32)
    _mm512_storeu_si512(to + d, BFloat16Pairs::concatenate(load(from + d), load(from + d + 16)));
  return d;
}
#endif
template <typename T, typename Stored>
inline int64_t convert_vectors(const T*, int64_t, Stored*) {
  return 0;
}

template <typename T>
inline void write_row(const Matrix& m, int64_t row, const T* values) {
  visit_dtype(m, [&](auto* data) {
    auto* to = data + row * m.row_stride;
    if (m.column_stride == 1)
      for (int64_t d = convert_vectors(values, m.columns, to); d < m.columns; ++d) convert(values[d], to + d);
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

}  // namespace fa::FA_ISA
