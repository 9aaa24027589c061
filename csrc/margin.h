// fused_arcface.margins, and the loss of one row around it, on the CPU and the GPU: the Python module's names in its
// order. A test compares all of them point by point.
#pragma once

#include <cmath>
#include <stdexcept>
#include <string>

#include "host_device.h"

namespace fa {

// What happens past m1 * theta + m2 = pi; kLinear leaves the angle alone: cos - m3.
enum class Boundary : int { kNone, kHard, kFold, kClip, kEasy, kContinuous, kLinear };

template <typename T>
constexpr T kSinFloor = static_cast<T>(1e-2);  // least sine that a derivative is divided by
template <typename T>
constexpr T kPi = static_cast<T>(3.14159265358979323846);

template <typename T>
struct Margin {
  T m1, m2, m3;
  T drop;  // subtracted from the cosine past pi by kHard and kContinuous
  Boundary boundary;
  bool straight_through;  // derivative 1
};

template <typename T>
Margin<T> make_margin(double m1, double m2, double m3, const std::string& boundary, bool straight_through) {
  const char* const names[] = {"none", "hard", "fold", "clip", "easy", "continuous", "linear"};
  const double drop = boundary == "hard" ? m2 * std::sin(m2) : 1 + std::cos((kPi<double> - m2) / m1);
  for (int i = 0; i < 7; ++i)
    if (boundary == names[i])
      return {static_cast<T>(m1),   static_cast<T>(m2),       static_cast<T>(m3),
              static_cast<T>(drop), static_cast<Boundary>(i), straight_through};
  throw std::invalid_argument("boundary must be none, hard, fold, clip, easy, continuous or linear; got " + boundary);
}

// The mathematical functions under one name for both types: CUDA has the float ones under C's names only.
FA_BOTH float square_root(float x) { return sqrtf(x); }
FA_BOTH double square_root(double x) { return sqrt(x); }
FA_BOTH float arc_tangent(float y, float x) { return atan2f(y, x); }
FA_BOTH double arc_tangent(double y, double x) { return atan2(y, x); }
FA_BOTH float sine_of(float x) { return sinf(x); }
FA_BOTH double sine_of(double x) { return sin(x); }
FA_BOTH float cosine_of(float x) { return cosf(x); }
FA_BOTH double cosine_of(double x) { return cos(x); }
FA_BOTH float round_down(float x) { return floorf(x); }
FA_BOTH double round_down(double x) { return floor(x); }
FA_BOTH float exponential(float x) { return expf(x); }
FA_BOTH double exponential(double x) { return exp(x); }
FA_BOTH float log_of_1_plus(float x) { return log1pf(x); }
FA_BOTH double log_of_1_plus(double x) { return log1p(x); }

// theta, and the sine that its derivative -1 / sin(theta) is taken with.
template <typename T>
FA_BOTH T angle(T cosine, T* sine) {
  cosine = cosine > 1 ? T(1) : cosine < -1 ? T(-1) : cosine;  // NaN stays
  const T exact = square_root((1 - cosine) * (1 + cosine));
  *sine = exact < kSinFloor<T> ? kSinFloor<T> : exact;
  return arc_tangent(exact, cosine);
}

// psi of phi, its derivative by phi, and that by the cosine beside it.
template <typename T>
FA_BOTH T past_boundary(T phi, T cosine, const Margin<T>& margin, T* by_phi, T* by_cosine) {
  T value = cosine_of(phi);
  *by_phi = -sine_of(phi);
  *by_cosine = 0;
  if ((margin.boundary == Boundary::kHard || margin.boundary == Boundary::kContinuous) && !(phi <= kPi<T>)) {
    value = cosine - margin.drop;
    *by_phi = 0;
    *by_cosine = 1;
  } else if (margin.boundary == Boundary::kFold) {
    const T k = round_down(phi / kPi<T>), sign = 1 - 2 * (k - 2 * round_down(k / 2));
    value = sign * value - 2 * k;
    *by_phi *= sign;
  } else if (margin.boundary == Boundary::kClip && phi > kPi<T>) {
    value = -1;
    *by_phi = 0;
  } else if (margin.boundary == Boundary::kEasy && !(cosine > 0)) {
    value = cosine;
    *by_phi = 0;
    *by_cosine = 1;
  }
  return value;
}

// The target's cosine with its margin, and the derivative.
template <typename T>
FA_BOTH T modified_cosine(T cosine, const Margin<T>& margin, T* slope) {
  *slope = 1;
  if (margin.boundary == Boundary::kLinear) return cosine - margin.m3;
  T sine, by_phi, by_cosine;
  const T theta = angle(cosine, &sine);
  const T value = past_boundary(margin.m1 * theta + margin.m2, cosine, margin, &by_phi, &by_cosine) - margin.m3;
  if (!margin.straight_through) *slope = by_cosine - by_phi * margin.m1 / sine;
  return value;
}

// One row's end of the head: its loss, its full log-sum-exp, and the loss's derivatives by its arguments.
template <typename T>
struct RowLoss {
  T loss, lse, d_lse, d_cosine;
};

template <typename T>
FA_BOTH RowLoss<T> row_loss(T negative_lse, T target_cosine, T scale, const Margin<T>& margin) {
  T slope;
  const T target_logit = scale * modified_cosine(target_cosine, margin, &slope);
  const T difference = negative_lse - target_logit;
  // softplus and sigmoid from exp(-|difference|), which cannot overflow; not log(exp z + Z) - z, which cancels.
  const T small = exponential(difference > 0 ? -difference : difference), softplus = log_of_1_plus(small);
  const T sigmoid = (difference > 0 ? T(1) : small) / (1 + small);
  return {(difference > 0 ? difference : T(0)) + softplus, (difference > 0 ? negative_lse : target_logit) + softplus,
          sigmoid, -scale * sigmoid * slope};
}

}  // namespace fa
