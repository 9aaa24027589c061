// Vectors of the widest kind this translation unit was compiled for, as compiler vector types, and the handful of
// operations the kernels need on them. kernels.cpp is compiled once per instruction set and includes this file; nothing
// else does.
#pragma once

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>

#if defined(__SSE__)
#include <immintrin.h>
#endif

namespace fa::FA_ISA {

#if defined(__AVX512F__)
constexpr int kVectorBytes = 64;
#elif defined(__AVX2__)
constexpr int kVectorBytes = 32;
#else
constexpr int kVectorBytes = 16;  // SSE2, NEON, or whatever the compiler lowers 16 bytes to
#endif

template <typename T>
struct VectorOf;
template <>
struct VectorOf<float> {
  typedef float type __attribute__((vector_size(kVectorBytes)));
  typedef int32_t mask __attribute__((vector_size(kVectorBytes)));
  typedef int32_t index;
};
template <>
struct VectorOf<double> {
  typedef double type __attribute__((vector_size(kVectorBytes)));
  typedef int64_t mask __attribute__((vector_size(kVectorBytes)));
  typedef int64_t index;
};

template <typename T>
using Vec = typename VectorOf<T>::type;
template <typename T>
using Mask = typename VectorOf<T>::mask;  // integer lanes as wide as T's: comparison results, bit patterns
template <typename T>
using Index = typename VectorOf<T>::index;
template <typename T>
constexpr int kLanes = kVectorBytes / static_cast<int>(sizeof(T));

template <typename T>
inline Vec<T> load(const T* from) {
  Vec<T> v;
  std::memcpy(&v, from, sizeof v);
  return v;
}
template <typename T>
inline void store(T* to, Vec<T> v) {
  std::memcpy(to, &v, sizeof v);
}
template <typename T>
inline Mask<T> load_index(const Index<T>* from) {
  Mask<T> v;
  std::memcpy(&v, from, sizeof v);
  return v;
}
template <typename T>
inline Vec<T> broadcast(T value) {
  return value - Vec<T>{};  // subtracting zero keeps -0.0, adding it does not
}
// Whether an integer lane lies in [0, count).
template <typename T>
inline bool any_below(Mask<T> v, int64_t count) {
  const Mask<T> inside = (v >= 0) & (v < static_cast<Index<T>>(count));
  Index<T> any = 0;
  for (int lane = 0; lane < kLanes<T>; ++lane) any |= inside[lane];
  return any != 0;
}
template <typename T>
inline T sum_lanes(Vec<T> v) {
  T lanes[kLanes<T>];
  store(lanes, v);
  for (int step = kLanes<T> / 2; step > 0; step /= 2)
    for (int i = 0; i < step; ++i) lanes[i] += lanes[i + step];
  return lanes[0];
}

template <typename T>
inline Vec<T> square_roots(Vec<T> v) {
  for (int lane = 0; lane < kLanes<T>; ++lane) v[lane] = std::sqrt(v[lane]);
  return v;
}

// a > b ? a : b in every lane: b where either is NaN.
template <typename T>
inline Vec<T> maximum(Vec<T> a, Vec<T> b) {
  return a > b ? a : b;
}
#if defined(__AVX512F__)
template <>
inline Vec<float> maximum<float>(Vec<float> a, Vec<float> b) {
  return (Vec<float>)_mm512_max_ps((__m512)a, (__m512)b);
}
template <>
inline Vec<double> maximum<double>(Vec<double> a, Vec<double> b) {
  return (Vec<double>)_mm512_max_pd((__m512d)a, (__m512d)b);
}
#endif

// 2^t: t = n + f with |f| <= 1/2, a minimax polynomial of 2^f (relative error 2e-9 in fp32, 3e-18 in fp64) times 2^n
// through the exponent bits. For t <= kLow the result is exactly 0, never subnormal; NaN stays NaN; t must be below
// kHigh.
template <typename T>
struct Exp2;
template <>
struct Exp2<float> {
  static constexpr float kLow = -126, kHigh = 127.5f;
  // Adding it rounds to an integer, which then stands in the low bits with the exponent's bias already added.
  static constexpr float kRound = 12582912.0f + 127;  // 1.5 * 2^23
  static constexpr int kMantissaBits = 23, kDegree = 6;
  static constexpr float kPolynomial[] = {1.0000000005541648f,   0.69314720573719575f,  0.24022646890645521f,
                                          0.055503287771053248f, 0.009618488956331182f, 0.001339993117723974f,
                                          0.000153458121613116f};
};
template <>
struct Exp2<double> {
  static constexpr double kLow = -1022, kHigh = 1023.5;
  static constexpr double kRound = 6755399441055744.0 + 1023;  // 1.5 * 2^52
  static constexpr int kMantissaBits = 52, kDegree = 11;
  static constexpr double kPolynomial[] = {
      0.9999999999999999971,    0.69314718055994533046,   0.24022650695910156204,    0.055504108664819921605,
      0.0096181291075883352443, 0.0013333558146789921722, 0.00015403530462514432062, 0.000015252733489988525649,
      1.321543308967639918e-6,  1.0178198021671930844e-7, 7.0741056135081427963e-9,  4.4352827069572771511e-10};
};

template <typename T>
inline Vec<T> exp2_of_fraction(Vec<T> f) {
  using K = Exp2<T>;
  Vec<T> p = broadcast(K::kPolynomial[K::kDegree]);
#pragma GCC unroll 16
  for (int i = K::kDegree - 1; i >= 0; --i) p = p * f + K::kPolynomial[i];
  return p;
}

#if defined(__AVX512DQ__)

// The processor splits t and multiplies by 2^n: half the operations of the code below. With subnormals flushed (see
// FlushSubnormals), what is too small is 0.
template <typename T>
inline Vec<T> exp2(Vec<T> t);
template <>
inline Vec<float> exp2<float>(Vec<float> t) {
  const __m512 n = _mm512_roundscale_ps((__m512)t, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  const __m512 f = _mm512_reduce_ps((__m512)t, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  return (Vec<float>)_mm512_scalef_ps((__m512)exp2_of_fraction<float>((Vec<float>)f), n);
}
template <>
inline Vec<double> exp2<double>(Vec<double> t) {
  const __m512d n = _mm512_roundscale_pd((__m512d)t, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  const __m512d f = _mm512_reduce_pd((__m512d)t, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  return (Vec<double>)_mm512_scalef_pd((__m512d)exp2_of_fraction<double>((Vec<double>)f), n);
}

#else

template <typename T>
inline Vec<T> exp2(Vec<T> t) {
  using K = Exp2<T>;
  const Mask<T> tiny = t <= K::kLow;
  t = tiny ? broadcast(K::kLow) : t;
  const Vec<T> rounded = t + K::kRound;
  const Vec<T> f = t - (rounded - K::kRound);
  const Vec<T> p = exp2_of_fraction<T>(f);
  Mask<T> bits;
  std::memcpy(&bits, &rounded, sizeof bits);
  bits <<= K::kMantissaBits;
  Vec<T> power;
  std::memcpy(&power, &bits, sizeof power);
  return tiny ? Vec<T>{} : p * power;
}

#endif

// Whether subnormal numbers count as zero, for the time of a scope. Such operands cost hundreds of cycles on some
// processors and carry nothing for most of a kernel.
template <bool flushed>
class [[maybe_unused]] Subnormals {
 public:
#if defined(__SSE__)
  Subnormals() : saved_(_mm_getcsr()) { _mm_setcsr(flushed ? saved_ | 0x8040 : saved_ & ~0x8040u); }
  ~Subnormals() { _mm_setcsr(saved_); }

 private:
  unsigned saved_;
#endif
};
using FlushSubnormals = Subnormals<true>;
using KeepSubnormals = Subnormals<false>;

}  // namespace fa::FA_ISA
