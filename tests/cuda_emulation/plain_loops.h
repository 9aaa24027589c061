// A problem and its answer in plain loops in fp64, and the comparison with it: for the programs that check the kernels
// by themselves, check.cpp and check_hopper.cpp.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <random>
#include <vector>

#include "cuda/numbers.h"
#include "guarded.h"

namespace plain {

constexpr double kScale = 12;

struct Problem {
  int N, C, D;
  std::vector<double> x, w;  // (N, D), (C, D), numbers that bf16 holds
  std::vector<int64_t> target;

  Problem(int N, int C, int D) : N(N), C(C), D(D), x(N * D), w(C * D), target(N) {
    std::mt19937 random(N * 31 + C * 7 + D);
    std::uniform_int_distribution<int> digit(-40, 40);
    for (double& value : x) value = digit(random) / 16.0;
    for (double& value : w) value = digit(random) / 16.0;
    for (int i = 0; i < N; ++i) target[i] = i % 5 == 4 ? -1 : static_cast<int64_t>(i) * 37 % C;
    target[0] = C - 1;
  }

  std::vector<double> units(const std::vector<double>& rows, int count) const {
    std::vector<double> unit(rows);
    for (int r = 0; r < count; ++r) {
      double squares = 0;
      for (int d = 0; d < D; ++d) squares += rows[r * D + d] * rows[r * D + d];
      for (int d = 0; d < D; ++d) unit[r * D + d] /= std::max(std::sqrt(squares), 1e-12);
    }
    return unit;
  }
};

// The right results of the passes, and the arguments of the backward pass.
struct Answer {
  std::vector<double> sum, largest, center_sum, lse, gradient;
  std::vector<float> negative, positive;  // coefficients of the rows

  explicit Answer(const Problem& p)
      : sum(p.N), largest(p.N, -2), center_sum(p.N * p.D), lse(p.N), gradient(p.C * p.D), negative(p.N), positive(p.N) {
    const int N = p.N, C = p.C, D = p.D;
    const auto unit_x = p.units(p.x, N), unit_w = p.units(p.w, C);
    std::vector<double> d_unit(C * D), cosine(static_cast<size_t>(N) * C);
    for (int i = 0; i < N; ++i) {
      for (int j = 0; j < C; ++j) {
        double value = 0;
        for (int d = 0; d < D; ++d) value += unit_x[i * D + d] * unit_w[j * D + d];
        cosine[static_cast<size_t>(i) * C + j] = value;
        if (j == p.target[i]) continue;
        const double e = std::exp(kScale * value);
        sum[i] += e;
        largest[i] = std::max(largest[i], value);
        for (int d = 0; d < D; ++d) center_sum[i * D + d] += e * unit_w[j * D + d];
      }
      lse[i] = std::log(sum[i]);
      negative[i] = 0.5f + static_cast<float>(i % 7) / 4;
      positive[i] = -1.5f + static_cast<float>(i % 3) / 4;
    }
    for (int j = 0; j < C; ++j) {
      double squares = 0, along = 0;
      for (int d = 0; d < D; ++d) squares += p.w[j * D + d] * p.w[j * D + d];
      for (int i = 0; i < N; ++i) {
        const double g = j == p.target[i]
                             ? static_cast<double>(positive[i])
                             : negative[i] * std::exp(kScale * cosine[static_cast<size_t>(i) * C + j] - lse[i]);
        for (int d = 0; d < D; ++d) d_unit[j * D + d] += g * unit_x[i * D + d];
      }
      for (int d = 0; d < D; ++d) along += d_unit[j * D + d] * unit_w[j * D + d];
      const double norm = std::max(std::sqrt(squares), 1e-12);
      for (int d = 0; d < D; ++d) gradient[j * D + d] = (d_unit[j * D + d] - along * unit_w[j * D + d]) / norm;
    }
  }
};

inline std::vector<uint16_t> to_bf16(const std::vector<double>& values) {
  std::vector<uint16_t> bits;
  for (const double value : values) bits.push_back(fa::cuda::to_bf16(static_cast<float>(value)).bits);
  return bits;
}
inline std::vector<float> to_fp32(const std::vector<double>& values) { return {values.begin(), values.end()}; }

inline int failures = 0;

// Errors relative to the largest number of each row of `columns`, the least of which is `floor`.
inline void compare(const char* what, const std::vector<float>& got, const std::vector<double>& right, double tolerance,
                    int columns = 0, double floor = 0) {
  const size_t width = columns > 0 ? static_cast<size_t>(columns) : right.size();
  double worst = 0;
  for (size_t first = 0; first < right.size(); first += width) {
    double largest = floor;
    for (size_t i = first; i < first + width; ++i) largest = std::max(largest, std::abs(right[i]));
    for (size_t i = first; i < first + width; ++i) {
      const double error = std::abs(got[i] - right[i]) / largest;
      worst = std::isnan(error) ? INFINITY : std::max(worst, error);
    }
  }
  const bool ok = worst <= tolerance;
  std::printf("%-24s error %.1e, allowed %.1e%s\n", what, worst, tolerance, ok ? "" : "  WRONG");
  failures += !ok;
}

template <typename T>
int64_t rows_bytes(int64_t rows, int64_t stride, int64_t columns) {
  return ((rows - 1) * stride + columns) * static_cast<int64_t>(sizeof(T));
}
// Rows that lie one after the other, `stride` apart in guarded memory.
template <typename T>
T* place(const std::vector<T>& values, int rows, int64_t stride, const emulation::GuardedMemory& memory) {
  T* const to = reinterpret_cast<T*>(memory.start());
  const int64_t columns = static_cast<int64_t>(values.size()) / rows;
  for (int r = 0; r < rows; ++r) std::copy_n(values.data() + r * columns, columns, to + r * stride);
  return to;
}

// Workspace of a pass: NaN, and aligned.
class Workspace {
 public:
  explicit Workspace(int64_t bytes) : memory_(static_cast<size_t>(bytes) + 256, '\xff') {}
  void* start() { return reinterpret_cast<void*>((reinterpret_cast<uintptr_t>(memory_.data()) + 255) / 256 * 256); }

 private:
  std::vector<char> memory_;
};

}  // namespace plain
