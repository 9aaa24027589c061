// The kinds of product that the passes are made of. An operand is made of elements, one to a lane of a vector: a
// number, or a pair of bf16 numbers that are neighbors along the product's depth. Sums are fp32, or fp64 for fp64.
//
// Full<T>: both operands in T. Rows are stored normalized, so a product of two rows is their cosine.
// BFloat16Pairs: rows are stored as their own values, which are exact if they came as bf16; their norms are applied to
// the sums. One instruction multiplies and adds two numbers a lane. AMX tiles would read the same layout.
#pragma once

#include "simd.h"
#include "sixteen_bit.h"

#if defined(__AVX512BF16__)
#include <immintrin.h>
#endif

namespace fa::FA_ISA {

template <typename T>
struct Full {
  using Sum = T;
  using Element = T;
  using Operand = Vec<T>;
  static constexpr int kDepth = 1;  // numbers of an element

  static Operand load(const T* from) { return FA_ISA::load(from); }
  static Operand broadcast(T element) { return FA_ISA::broadcast(element); }
  static Vec<T> multiply_add(Vec<T> sum, Operand a, Operand b) { return sum + a * b; }
};

#if defined(__AVX512BF16__)

struct BFloat16Pairs {
  using Sum = float;
  using Element = uint32_t;
  using Operand = __m512bh;
  static constexpr int kDepth = 2;

  static Operand load(const uint32_t* from) { return (Operand)_mm512_loadu_si512(from); }
  static Operand broadcast(uint32_t element) { return (Operand)_mm512_set1_epi32(static_cast<int>(element)); }
  static Vec<float> multiply_add(Vec<float> sum, Operand a, Operand b) {
    return (Vec<float>)_mm512_dpbf16_ps((__m512)sum, a, b);
  }

  // Pairs (low, high) of two vectors' lanes, rounded to nearest even.
  static __m512i interleave(Vec<float> low, Vec<float> high) {
    // Lane i of `low` is number i, of `high` number 16 + i.
    const __m512i numbers = (__m512i)_mm512_cvtne2ps_pbh((__m512)high, (__m512)low);
    const __m512i order = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8, 23, 7, 22, 6,
                                           21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
    return _mm512_permutexvar_epi16(order, numbers);
  }
  // The lanes of two vectors one after the other: 16 pairs of neighbors.
  static __m512i concatenate(Vec<float> first, Vec<float> second) {
    return (__m512i)_mm512_cvtne2ps_pbh((__m512)second, (__m512)first);
  }
  // Rows `low` and `high` of bf16 pairs along the columns become pairs down the rows: to[c] = (low[c], high[c]) for
  // `columns` numbers, a multiple of 32. Without a row `high` its numbers are 0.
  static void interleave_rows(const uint32_t* low, const uint32_t* high, int64_t columns, uint32_t* to) {
    const __m512i left = _mm512_set_epi16(47, 15, 46, 14, 45, 13, 44, 12, 43, 11, 42, 10, 41, 9, 40, 8, 39, 7, 38, 6,
                                          37, 5, 36, 4, 35, 3, 34, 2, 33, 1, 32, 0);
    const __m512i right = _mm512_add_epi16(left, _mm512_set1_epi16(16));
    for (int64_t c = 0; c < columns; c += 32) {
      const __m512i a = _mm512_loadu_si512(low + c / 2),
                    b = high != nullptr ? _mm512_loadu_si512(high + c / 2) : _mm512_setzero_si512();
      _mm512_storeu_si512(to + c, _mm512_permutex2var_epi16(a, left, b));
      _mm512_storeu_si512(to + c + 16, _mm512_permutex2var_epi16(a, right, b));
    }
  }
};

#endif

}  // namespace fa::FA_ISA
