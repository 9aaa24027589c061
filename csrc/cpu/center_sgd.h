// One row's step of SGD with momentum, made where weight_pass leaves the row's gradient: read the center and its
// momentum, update, write both back. Storage below fp32 is rounded stochastically, with random bits that are functions
// of seed, step, global class id and column. kernels.cpp alone includes this file.
#pragma once

#include <algorithm>
#include <cmath>

#include "conversion.h"
#include "kernels.h"
#include "random.h"

namespace fa::FA_ISA {

// Up to kMomentumBlock columns of a row, in the compute type, between their storage and the update.
template <typename T>
struct RowBlock {
  T values[kMomentumBlock];
  uint32_t random[kMomentumBlock];  // 16 bits each
};

// `stride`: between neighboring columns.
template <typename Storage, typename T>
void store_block(const RowBlock<T>& block, int64_t count, Storage* to, int64_t stride) {
  for (int64_t i = 0; i < count; ++i) convert(block.values[i], to + i * stride);
}
template <typename T>
void store_block(const RowBlock<T>& block, int64_t count, BFloat16* to, int64_t stride) {
  for (int64_t i = 0; i < count; ++i)
    to[i * stride] = round_stochastically(static_cast<float>(block.values[i]), block.random[i]);
}
// int8 in units of the block's largest magnitude over 127.
template <typename T>
void store_block(const RowBlock<T>& block, int64_t count, int8_t* to, float* scale) {
  T largest = 0;
  for (int64_t i = 0; i < count; ++i) largest = std::max(largest, std::abs(block.values[i]));
  *scale = largest > T(1e-35) ? static_cast<float>(largest) / 127 : 0;  // below it the unit's inverse would overflow
  const T inverse = *scale > 0 ? T(1) / *scale : 0;
  for (int64_t i = 0; i < count; ++i) {
    const T uniform = (static_cast<T>(block.random[i]) + T(0.5)) / 65536;
    to[i] = static_cast<int8_t>(std::clamp(std::floor(block.values[i] * inverse + uniform), T(-127), T(127)));
  }
}

inline float to_float(int8_t x) { return x; }

template <typename Storage, typename T>
void load_block(const Storage* from, int64_t stride, int64_t count, T unit, RowBlock<T>* block) {
  for (int64_t i = 0; i < count; ++i) block->values[i] = static_cast<T>(to_float(from[i * stride])) * unit;
}

template <typename Fn>
void visit_momentum(const CenterStep& step, const Fn& fn) {
  switch (step.momentum_type) {
    case MomentumType::kNone:
      return;
    case MomentumType::kFloat64:
      return fn(static_cast<double*>(step.momentum));
    case MomentumType::kFloat32:
      return fn(static_cast<float*>(step.momentum));
    case MomentumType::kBFloat16:
      return fn(static_cast<BFloat16*>(step.momentum));
    case MomentumType::kInt8:
      return fn(static_cast<int8_t*>(step.momentum));
  }
}
// Updates row `row` of weight (any strides) and of the momentum (contiguous), from the gradient by that row.
template <typename T>
void step_row(const Matrix& weight, const CenterStep& step, int64_t row, const T* gradient) {
  const int64_t columns = weight.columns, blocks = (columns + kMomentumBlock - 1) / kMomentumBlock;
  const int64_t id = step.ids != nullptr ? step.ids[row] : step.class_start + row;
  const uint64_t row_key = fold(step.rounding_key, static_cast<uint64_t>(id));
  const T lr = static_cast<T>(step.lr), momentum = static_cast<T>(step.momentum_factor);
  const T weight_decay = static_cast<T>(step.weight_decay);

  RowBlock<T> center, velocity;
  for (int64_t first = 0; first < columns; first += kMomentumBlock) {
    const int64_t count = std::min(kMomentumBlock, columns - first);
    for (int64_t i = 0; i < count; ++i) {
      const uint32_t bits = random_bits(row_key, static_cast<uint32_t>(first + i));
      center.random[i] = bits & 0xffffu;
      velocity.random[i] = bits >> 16;
    }
    visit_dtype(weight, [&](auto* data) {
      auto* const at = data + row * weight.row_stride + first * weight.column_stride;
      load_block(at, weight.column_stride, count, T(1), &center);
      for (int64_t i = 0; i < count; ++i) velocity.values[i] = gradient[first + i] + weight_decay * center.values[i];
      visit_momentum(step, [&](auto* all) {
        auto* const buffer = all + row * columns + first;
        RowBlock<T> old;
        if constexpr (std::is_same_v<decltype(all), int8_t*>) {
          float* const scale = step.momentum_scale + row * blocks + first / kMomentumBlock;
          load_block(buffer, 1, count, static_cast<T>(*scale), &old);
          for (int64_t i = 0; i < count; ++i) velocity.values[i] += momentum * old.values[i];
          store_block(velocity, count, buffer, scale);
        } else {
          load_block(buffer, 1, count, T(1), &old);
          for (int64_t i = 0; i < count; ++i) velocity.values[i] += momentum * old.values[i];
          store_block(velocity, count, buffer, 1);
        }
      });
      for (int64_t i = 0; i < count; ++i) center.values[i] -= lr * velocity.values[i];
      store_block(center, count, at, weight.column_stride);
    });
  }
}

}  // namespace fa::FA_ISA
