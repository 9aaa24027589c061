// A step of SGD with momentum on four neighboring columns of a class center, made where their gradient is: read center
// and momentum, update, write both back. Storage below fp32 is rounded stochastically, with random bits that are
// functions of seed, step, global class id and column.
#pragma once

#include "numbers.h"
#include "random.h"

namespace fa::cuda {

// x in its storage; to bf16 up with the probability of its distance from the value below, by 16 random bits. Infinities
// and NaN stay.
template <typename T>
__device__ __forceinline__ void round_stochastically(float x, T* to, uint32_t) {
  convert(x, to);
}
__device__ __forceinline__ void round_stochastically(float x, BFloat16* to, uint32_t random) {
  *to = fa::round_stochastically(x, random);
}

template <typename T>
__device__ __forceinline__ void add_momentum(T* buffer, int count, float momentum, const uint32_t (&random)[4],
                                             float (&velocity)[4]) {
  float old[4];
  load_four(buffer, 1, count, old);
#pragma unroll
  for (int i = 0; i < 4; ++i) velocity[i] += momentum * old[i];
  store_four(buffer, 1, count, velocity,
             [&](float value, T* to, int i) { round_stochastically(value, to, random[i] >> 16); });
}

// int8 in units of the largest magnitude over 127 of the 64 columns that half a warp holds. The whole warp comes here.
__device__ __forceinline__ void add_momentum(int8_t* buffer, float* unit, int count, float momentum,
                                             const uint32_t (&random)[4], float (&velocity)[4]) {
  constexpr unsigned kAll = 0xffffffffu;
  float old[4], largest = 0;
  const float old_unit = count > 0 ? *unit : 0.0f;
  load_four(buffer, 1, count, old);
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    velocity[i] += momentum * (old[i] * old_unit);
    if (i < count) largest = fmaxf(largest, fabsf(velocity[i]));
  }
#pragma unroll
  for (int mask = 1; mask < kMomentumBlock / 4; mask *= 2)
    largest = fmaxf(largest, __shfl_xor_sync(kAll, largest, mask));
  __syncwarp();                                                 // all lanes have read the unit
  const float new_unit = largest > 1e-35f ? largest / 127 : 0;  // below it the unit's inverse would overflow
  if (threadIdx.x % (kMomentumBlock / 4) == 0 && count > 0) *unit = new_unit;
  const float inverse = new_unit > 0 ? 1 / new_unit : 0;
  store_four(buffer, 1, count, velocity, [&](float value, int8_t* to, int i) {
    const float uniform = (static_cast<float>(random[i] >> 16) + 0.5f) / 65536;
    *to = static_cast<int8_t>(fminf(fmaxf(floorf(value * inverse + uniform), -127.0f), 127.0f));
  });
}

// Columns [d, d + 4), of which `count` exist (none if it is not positive), of row `row` of the weight and its momentum.
__device__ __forceinline__ void step_center(const Matrix& weight, const CenterStep& step, int64_t row, int d, int count,
                                            const float (&gradient)[4]) {
  const int64_t id = step.ids != nullptr ? step.ids[row] : step.class_start + row;
  const uint64_t row_key = fold(step.rounding_key, static_cast<uint64_t>(id));
  const float lr = static_cast<float>(step.lr), momentum = static_cast<float>(step.momentum_factor);
  const float weight_decay = static_cast<float>(step.weight_decay);
  uint32_t random[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) random[i] = random_bits(row_key, static_cast<uint32_t>(d + i));

  visit_dtype(weight, [&](auto* data) {
    auto* const at = data + row * weight.row_stride + d * weight.column_stride;
    float center[4], velocity[4];
    load_four(at, weight.column_stride, count, center);
#pragma unroll
    for (int i = 0; i < 4; ++i) velocity[i] = i < count ? gradient[i] + weight_decay * center[i] : 0.0f;
    const int64_t offset = row * weight.columns + d;
    if (step.momentum_type == MomentumType::kFloat64)
      add_momentum(static_cast<double*>(step.momentum) + offset, count, momentum, random, velocity);
    else if (step.momentum_type == MomentumType::kFloat32)
      add_momentum(static_cast<float*>(step.momentum) + offset, count, momentum, random, velocity);
    else if (step.momentum_type == MomentumType::kBFloat16)
      add_momentum(static_cast<BFloat16*>(step.momentum) + offset, count, momentum, random, velocity);
    else if (step.momentum_type == MomentumType::kInt8)
      add_momentum(
          static_cast<int8_t*>(step.momentum) + offset,
          step.momentum_scale + row * ((weight.columns + kMomentumBlock - 1) / kMomentumBlock) + d / kMomentumBlock,
          count, momentum, random, velocity);
#pragma unroll
    for (int i = 0; i < 4; ++i) center[i] -= lr * velocity[i];
    store_four(at, weight.column_stride, count, center,
               [&](float value, auto* to, int i) { round_stochastically(value, to, random[i] & 0xffffu); });
  });
}

}  // namespace fa::cuda
