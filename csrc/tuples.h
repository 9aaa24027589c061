// How Python writes the structs of arguments.h: tuples of numbers, addresses among them.
#pragma once

#include <cstdint>
#include <tuple>

#include "arguments.h"

namespace fa {

template <typename T>
T* pointer(uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

// (address, dtype code, rows, columns, row stride, column stride)
using MatrixTuple = std::tuple<uintptr_t, int, int64_t, int64_t, int64_t, int64_t>;

inline Matrix to_matrix(const MatrixTuple& m) {
  const auto& [data, dtype, rows, columns, row_stride, column_stride] = m;
  return {pointer<void>(data), static_cast<Dtype>(dtype), rows, columns, row_stride, column_stride};
}

// (rows or 0, classes, MomentumType code, momentum or 0, its scale or 0, lr, momentum factor, weight decay, rounding
// key, class start, global ids or 0)
using CenterStepTuple =
    std::tuple<uintptr_t, int64_t, int, uintptr_t, uintptr_t, double, double, double, uint64_t, int64_t, uintptr_t>;

inline CenterStep to_center_step(const CenterStepTuple& step) {
  const auto& [rows, classes, type, momentum, momentum_scale, lr, factor, weight_decay, key, class_start, ids] = step;
  return {pointer<const int64_t>(rows),
          classes,
          static_cast<MomentumType>(type),
          pointer<void>(momentum),
          pointer<float>(momentum_scale),
          lr,
          factor,
          weight_decay,
          key,
          class_start,
          pointer<const int64_t>(ids)};
}

}  // namespace fa
