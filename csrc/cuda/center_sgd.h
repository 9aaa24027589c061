// A step of SGD with momentum on columns of a class center, made where their gradient is: read center
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

// Four neighboring columns of a row, for `groups` groups of kGroupColumns columns beside each other: what a lane has.
constexpr int kGroupColumns = 4 * kWarp;
template <int groups>
using Columns = float[groups][4];

template <int groups, typename T>
__device__ __forceinline__ void load_columns(const T* from, int64_t stride, int count, Columns<groups>& to) {
#pragma unroll
  for (int g = 0; g < groups; ++g)
    load_four(from + g * kGroupColumns * stride, stride, count - g * kGroupColumns, to[g]);
}
template <int groups, typename T, typename Convert>
__device__ __forceinline__ void store_columns(T* to, int64_t stride, int count, const Columns<groups>& from,
                                              const Convert& convert) {
#pragma unroll
  for (int g = 0; g < groups; ++g)
    store_four(to + g * kGroupColumns * stride, stride, count - g * kGroupColumns, from[g],
               [&](float value, T* at, int i) { convert(value, at, g, i); });
}

template <int groups, typename T>
__device__ __forceinline__ void add_momentum(T* buffer, int count, float momentum, const uint32_t (&random)[groups][4],
                                             Columns<groups>& velocity) {
  Columns<groups> old;
  load_columns<groups>(buffer, 1, count, old);
#pragma unroll
  for (int g = 0; g < groups; ++g)
#pragma unroll
    for (int i = 0; i < 4; ++i) velocity[g][i] += momentum * old[g][i];
  store_columns<groups>(buffer, 1, count, velocity,
                        [&](float value, T* to, int g, int i) { round_stochastically(value, to, random[g][i] >> 16); });
}

// int8 in units of the largest magnitude over 127 of the 64 columns that half a warp holds. The whole warp comes here.
template <int groups>
__device__ __forceinline__ void add_momentum(int8_t* buffer, float* units, int count, float momentum,
                                             const uint32_t (&random)[groups][4], Columns<groups>& velocity) {
  constexpr unsigned kAll = 0xffffffffu;
  constexpr int kGroupUnits = kGroupColumns / kMomentumBlock;
  Columns<groups> old;
  float old_unit[groups], inverse[groups];
#pragma unroll
  for (int g = 0; g < groups; ++g) old_unit[g] = count > g * kGroupColumns ? units[g * kGroupUnits] : 0.0f;
  load_columns<groups>(buffer, 1, count, old);
  __syncwarp();  // all lanes have read the units
#pragma unroll
  for (int g = 0; g < groups; ++g) {
    float largest = 0;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      velocity[g][i] += momentum * (old[g][i] * old_unit[g]);
      if (i < count - g * kGroupColumns) largest = fmaxf(largest, fabsf(velocity[g][i]));
    }
#pragma unroll
    for (int mask = 1; mask < kMomentumBlock / 4; mask *= 2)
      largest = fmaxf(largest, __shfl_xor_sync(kAll, largest, mask));
    const float unit = largest > 1e-35f ? largest / 127 : 0;  // below it the unit's inverse would overflow
    if (threadIdx.x % (kMomentumBlock / 4) == 0 && count > g * kGroupColumns) units[g * kGroupUnits] = unit;
    inverse[g] = unit > 0 ? 1 / unit : 0;
  }
  store_columns<groups>(buffer, 1, count, velocity, [&](float value, int8_t* to, int g, int i) {
    const float uniform = (static_cast<float>(random[g][i] >> 16) + 0.5f) / 65536;
    *to = static_cast<int8_t>(fminf(fmaxf(floorf(value * inverse[g] + uniform), -127.0f), 127.0f));
  });
}

// Columns [d, d + 4) of each group, of which `count` exist from d on (none if it is not positive), of row `row` of the
// weight and its momentum. All groups are loaded before any is stored.
template <int groups>
__device__ __forceinline__ void step_center(const Matrix& weight, const CenterStep& step, int64_t row, int d, int count,
                                            const Columns<groups>& gradient) {
  const int64_t id = step.ids != nullptr ? step.ids[row] : step.class_start + row;
  const uint64_t row_key = fold(step.rounding_key, static_cast<uint64_t>(id));
  const float lr = static_cast<float>(step.lr), momentum = static_cast<float>(step.momentum_factor);
  const float weight_decay = static_cast<float>(step.weight_decay);
  uint32_t random[groups][4];
#pragma unroll
  for (int g = 0; g < groups; ++g)
#pragma unroll
    for (int i = 0; i < 4; ++i) random[g][i] = random_bits(row_key, static_cast<uint32_t>(d + g * kGroupColumns + i));

  visit_dtype(weight, [&](auto* data) {
    auto* const at = data + row * weight.row_stride + d * weight.column_stride;
    Columns<groups> center, velocity;
    load_columns<groups>(at, weight.column_stride, count, center);
#pragma unroll
    for (int g = 0; g < groups; ++g)
#pragma unroll
      for (int i = 0; i < 4; ++i)
        velocity[g][i] = i < count - g * kGroupColumns ? gradient[g][i] + weight_decay * center[g][i] : 0.0f;
    const int64_t offset = row * weight.columns + d;
    if (step.momentum_type == MomentumType::kFloat64)
      add_momentum<groups>(static_cast<double*>(step.momentum) + offset, count, momentum, random, velocity);
    else if (step.momentum_type == MomentumType::kFloat32)
      add_momentum<groups>(static_cast<float*>(step.momentum) + offset, count, momentum, random, velocity);
    else if (step.momentum_type == MomentumType::kBFloat16)
      add_momentum<groups>(static_cast<BFloat16*>(step.momentum) + offset, count, momentum, random, velocity);
    else if (step.momentum_type == MomentumType::kInt8)
      add_momentum<groups>(
          static_cast<int8_t*>(step.momentum) + offset,
          step.momentum_scale + row * ((weight.columns + kMomentumBlock - 1) / kMomentumBlock) + d / kMomentumBlock,
          count, momentum, random, velocity);
#pragma unroll
    for (int g = 0; g < groups; ++g)
#pragma unroll
      for (int i = 0; i < 4; ++i) center[g][i] -= lr * velocity[g][i];
    store_columns<groups>(at, weight.column_stride, count, center, [&](float value, auto* to, int g, int i) {
      round_stochastically(value, to, random[g][i] & 0xffffu);
    });
  });
}

}  // namespace fa::cuda
