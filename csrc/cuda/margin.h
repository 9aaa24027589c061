// fused_arcface.margins on the device: its functions' names in its order; a test compares the two point by point. With
// the end of the head around it, one launch makes of each row's negative log-sum-exp and target cosine its loss and
// both derivatives.
#pragma once

#include "runtime.h"

namespace fa::cuda {

constexpr float kSinFloor = 1e-2f;  // least sine that a derivative is divided by
constexpr float kPi = 3.14159265358979f;

// theta, and the sine that its derivative -1 / sin(theta) is taken with.
__device__ __forceinline__ float angle(float cosine, float* sine) {
  cosine = cosine > 1 ? 1.0f : cosine < -1 ? -1.0f : cosine;  // NaN stays
  const float exact = sqrtf((1 - cosine) * (1 + cosine));
  *sine = exact < kSinFloor ? kSinFloor : exact;
  return atan2f(exact, cosine);
}

// psi of phi, its derivative by phi, and that by the cosine beside it.
__device__ __forceinline__ float past_boundary(float phi, float cosine, const Margin& margin, float* by_phi,
                                               float* by_cosine) {
  float value = cosf(phi);
  *by_phi = -sinf(phi);
  *by_cosine = 0;
  if (margin.boundary == Boundary::kHard && !(phi <= kPi)) {
    value = cosine - margin.hard_value;
    *by_phi = 0;
    *by_cosine = 1;
  } else if (margin.boundary == Boundary::kFold) {
    const float k = floorf(phi / kPi), sign = 1 - 2 * (k - 2 * floorf(k / 2));
    value = sign * value - 2 * k;
    *by_phi *= sign;
  } else if (margin.boundary == Boundary::kClip && phi > kPi) {
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
__device__ __forceinline__ float modified_cosine(float cosine, const Margin& margin, float* slope) {
  *slope = 1;
  if (margin.boundary == Boundary::kLinear) return cosine - margin.m3;
  float sine, by_phi, by_cosine;
  const float theta = angle(cosine, &sine);
  const float value = past_boundary(margin.m1 * theta + margin.m2, cosine, margin, &by_phi, &by_cosine) - margin.m3;
  if (!margin.straight_through) *slope = by_cosine - by_phi * margin.m1 / sine;
  return value;
}

constexpr int kMarginThreads = 128;
static __global__ void __launch_bounds__(kMarginThreads)
    margin_loss_kernel(const float* negative_lse, const float* target_cosine, int64_t count, float scale, Margin margin,
                       float* loss, float* lse, float* d_lse, float* d_cosine) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kMarginThreads + threadIdx.x;
  if (i >= count) return;
  float slope;
  const float target_logit = scale * modified_cosine(target_cosine[i], margin, &slope);
  const float negatives = negative_lse[i], difference = negatives - target_logit;
  // softplus and sigmoid from exp(-|difference|), which cannot overflow; not log(exp z + Z) - z, which cancels.
  const float small = expf(-fabsf(difference)), softplus = log1pf(small);
  const float sigmoid = (difference > 0 ? 1.0f : small) / (1 + small);
  loss[i] = (difference > 0 ? difference : 0.0f) + softplus;
  lse[i] = (difference > 0 ? negatives : target_logit) + softplus;
  d_lse[i] = sigmoid;
  d_cosine[i] = -scale * sigmoid * slope;
}

}  // namespace fa::cuda
