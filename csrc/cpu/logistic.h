// A logistic loss for each negative (Logistic in kernels.h), as a map f of its cosine: exp(scale * f(c)) is the loss.
// So the passes of negatives.h serve it as they are. negatives.h alone includes this file.
#pragma once

#include <cmath>
#include <limits>

#include "kernels.h"
#include "margin.h"
#include "simd.h"
#include "tile.h"

namespace fa::FA_ISA {

// 2 atanh(z) for |z| <= 1/3, to the last bits of T: by z the relative error stays small near 0 too.
template <typename T>
inline Vec<T> twice_atanh(Vec<T> z) {
  constexpr int kTerms = sizeof(T) == sizeof(double) ? 15 : 6;
  const Vec<T> square = z * z;
  Vec<T> p = broadcast(T(2) / (2 * kTerms + 1));
#pragma GCC unroll 16
  for (int k = kTerms - 1; k >= 0; --k) p = p * square + T(2) / (2 * k + 1);
  return p * z;
}

// log x of a normal x > 0; NaN stays NaN. x = m * 2^n with m in [sqrt(1/2), sqrt(2)).
template <typename T>
inline Vec<T> logarithm(Vec<T> x) {
  constexpr int kBits = Exp2<T>::kMantissaBits;
  const T root = static_cast<T>(0.70710678118654752440);
  Index<T> root_bits;
  std::memcpy(&root_bits, &root, sizeof root);
  Mask<T> bits;
  std::memcpy(&bits, &x, sizeof bits);
  const Mask<T> exponent = (bits - root_bits) >> kBits;
  bits -= exponent << kBits;
  Vec<T> m;
  std::memcpy(&m, &bits, sizeof m);
  const Vec<T> n = __builtin_convertvector(exponent, Vec<T>);
  const Vec<T> result = n * static_cast<T>(0.69314718055994530942) + twice_atanh<T>((m - 1) / (m + 1));
  return x != x ? x : result;
}

// The numbers of Logistic, as the passes take them.
template <typename T>
struct LogisticLoss {
  T scale, exponent, cosine, sine, offset, bias;  // cosine and sine of the angle
  int whole_exponent;                             // the exponent if it is a small whole number, else 0
  bool by_bias;

  explicit LogisticLoss(const Logistic& l)
      : scale(static_cast<T>(l.scale)),
        exponent(static_cast<T>(l.exponent)),
        cosine(static_cast<T>(std::cos(l.angle))),
        sine(static_cast<T>(std::sin(l.angle))),
        offset(static_cast<T>(l.offset)),
        bias(static_cast<T>(l.bias)),
        whole_exponent(l.exponent <= 8 && l.exponent == std::floor(l.exponent) ? static_cast<int>(l.exponent) : 0),
        by_bias(l.by_bias) {}
};

// half^(exponent - 1) for half in [0, 1].
template <typename T>
inline Vec<T> lower_power(const LogisticLoss<T>& loss, Vec<T> half) {
  if (loss.whole_exponent > 0) {
    Vec<T> power = broadcast<T>(1);
    for (int k = 1; k < loss.whole_exponent; ++k) power *= half;
    return power;
  }
  const Vec<T> log = logarithm<T>(maximum<T>(half, broadcast(std::numeric_limits<T>::min())));
  return exp2<T>(log * ((loss.exponent - 1) * static_cast<T>(kLog2e)));
}

// *value = f(c) and *slope = f'(c). A loss below e^-80 (in fp64 e^-600) counts as that, with the derivative 0.
template <typename T>
inline void logistic_value(const LogisticLoss<T>& loss, Vec<T> c, Vec<T>* value, Vec<T>* slope) {
  constexpr T kLowest = sizeof(T) == sizeof(double) ? T(-600) : T(-80);
  Vec<T> turned = c, by_cosine = broadcast<T>(1);
  if (loss.sine != 0) {
    const Vec<T> sine = square_roots<T>(maximum<T>((1 - c) * (1 + c), Vec<T>{}));
    turned = c * loss.cosine + sine * loss.sine;
    by_cosine = loss.cosine - loss.sine * c / maximum<T>(sine, broadcast(kSinFloor<T>));
  }
  Vec<T> half = (turned + 1) * T(0.5);
  half = half < 0 ? Vec<T>{} : half;  // NaN stays
  const Vec<T> lower = lower_power<T>(loss, half);
  Vec<T> u = loss.scale * (2 * (lower * half) - 1 + loss.offset) + loss.bias;
  const Mask<T> counts = u > kLowest;
  u = u < kLowest ? broadcast(kLowest) : u;
  const Vec<T> small = exp2<T>((u < 0 ? u : -u) * static_cast<T>(kLog2e));  // e^-|u|
  // log(1 + e^-|u|) = 2 atanh(e^-|u| / (2 + e^-|u|))
  const Vec<T> softplus = (u < 0 ? Vec<T>{} : u) + twice_atanh<T>(small / (2 + small));
  const Vec<T> sigmoid = (u < 0 ? small : broadcast<T>(1)) / (1 + small);
  if (loss.by_bias) {
    *value = (u - softplus) / loss.scale;  // log(sigmoid)
    *slope = Vec<T>{};
    return;
  }
  *value = logarithm<T>(softplus) / loss.scale;
  *slope = counts ? sigmoid / softplus * loss.exponent * lower * by_cosine : Vec<T>{};
}

}  // namespace fa::FA_ISA
