// What happens in a tile of cosines between the two products: exponentials and statistics of the rows, or the gradient
// by the cosines. Negatives that are not plain have their own versions in negatives.h.
#pragma once

#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "kernels.h"
#include "memory.h"
#include "simd.h"

namespace fa::FA_ISA {

constexpr double kLog2e = 1.4426950408889634;

// Rows of logits' offsets in base 2: shift * log2(e) is rounded to T, which at a scale of 1000 would cost 3e-5 of every
// exponential; `correction` is what the rounding took, 2^(rounded - exact).
template <typename T>
struct Offsets {
  Scratch<T> log2;                 // (padded_rows,)
  std::vector<double> correction;  // (padded_rows,)
  Offsets(const double* offset, int64_t rows, int64_t padded_rows) : log2(padded_rows), correction(padded_rows, 1.0) {
    for (int64_t i = 0; i < padded_rows; ++i) {
      const double exact = offset != nullptr && i < rows ? offset[i] * kLog2e : 0;
      log2.get()[i] = static_cast<T>(exact);
      if (std::isfinite(exact)) correction[i] = std::exp2(log2.get()[i] - exact);
    }
  }
};

// Running statistics of the rows, kept in fp64: a million fp32 terms added one by one would lose four digits.
struct RowStats {
  double sum = 0, max = -std::numeric_limits<double>::infinity();
};

// One vector of rows of exponentiate(): exp(scale * cos - shift) of `count` classes, of which class `own` of each row
// is left out if `has_target`.
template <typename T, bool has_target>
void exponentiate_rows(T* tile, int64_t stride, int64_t count, Mask<T> own, Vec<T> log2_shift, T log2_scale,
                       bool want_sum, RowStats* stats) {
  const Vec<T> lowest = broadcast(-std::numeric_limits<T>::infinity());
  Vec<T> sum = {}, max = lowest;
  for (int64_t j = 0; j < count; ++j) {
    T* const at = tile + j * stride;
    const Vec<T> cosine = load(at);
    const Mask<T> is_target = own == static_cast<Index<T>>(j);
    max = maximum<T>(has_target ? (is_target ? lowest : cosine) : cosine, max);
    if (want_sum) {
      const Vec<T> exponential = exp2<T>(cosine * log2_scale - log2_shift);
      const Vec<T> e = has_target ? (is_target ? Vec<T>{} : exponential) : exponential;
      sum += e;
      store<T>(at, e);
    }
  }
  for (int lane = 0; lane < kLanes<T>; ++lane) {
    stats[lane].sum += sum[lane];
    stats[lane].max = std::max<double>(stats[lane].max, max[lane]);
  }
}

// The cosines of one tile become exp(scale * cos - shift), 0 in the target's place, and count in the rows' statistics.
template <typename T>
void exponentiate(T* tile, int64_t stride, int64_t count, int64_t lanes, int64_t first_class, const Index<T>* target,
                  const T* log2_shift, T log2_scale, bool want_sum, RowStats* stats) {
  for (int64_t i = 0; i < lanes; i += kLanes<T>) {
    const Mask<T> own = load_index<T>(target + i) - static_cast<Index<T>>(first_class);
    const auto rows = any_below<T>(own, count) ? exponentiate_rows<T, true> : exponentiate_rows<T, false>;
    rows(tile + i, stride, count, own, load(log2_shift + i), log2_scale, want_sum, stats + i);
  }
}

// The statistics of exponentiate() and the sums of exp(scale * cos - shift) * cos^k; the tile stays. `moments` is
// (rows, kMoments), like `stats` from the first row of the tile on.
template <typename T>
void sum_moments(const T* tile, int64_t stride, int64_t count, int64_t lanes, int64_t first_class,
                 const Index<T>* target, const T* log2_shift, T log2_scale, RowStats* stats, double* moments) {
  const Vec<T> lowest = broadcast(-std::numeric_limits<T>::infinity());
  for (int64_t i = 0; i < lanes; i += kLanes<T>) {
    const Mask<T> own = load_index<T>(target + i) - static_cast<Index<T>>(first_class);
    const Vec<T> shift = load(log2_shift + i);
    Vec<T> sums[kMoments] = {}, max = lowest;
    for (int64_t j = 0; j < count; ++j) {
      const Vec<T> cosine = load(tile + j * stride + i);
      const Mask<T> is_target = own == static_cast<Index<T>>(j);
      max = maximum<T>(is_target ? lowest : cosine, max);
      Vec<T> term = is_target ? Vec<T>{} : exp2<T>(cosine * log2_scale - shift);
#pragma GCC unroll 16
      for (int k = 0; k < kMoments; ++k) {
        sums[k] += term;
        term *= cosine;
      }
    }
    for (int lane = 0; lane < kLanes<T>; ++lane) {
      stats[i + lane].sum += sums[0][lane];
      stats[i + lane].max = std::max<double>(stats[i + lane].max, max[lane]);
      for (int k = 0; k < kMoments; ++k) moments[(i + lane) * kMoments + k] += sums[k][lane];
    }
  }
}

// The cosines of one tile become the gradient by them, G of WeightGradArgs, as if none were a target.
template <typename T>
void differentiate(T* tile, int64_t stride, int64_t count, int64_t lanes, const T* log2_lse,
                   const T* negative_coefficient, T log2_scale) {
  for (int64_t i = 0; i < lanes; i += kLanes<T>) {
    const Vec<T> lse = load(log2_lse + i), negative = load(negative_coefficient + i);
    for (int64_t j = 0; j < count; ++j) {
      T* const at = tile + j * stride + i;
      store<T>(at, negative * exp2<T>(load(at) * log2_scale - lse));
    }
  }
}

// In the places of the targets in a tile of `count` classes and `lanes` rows: the rows' values.
template <typename T>
void place_targets(T* tile, int64_t stride, int64_t count, int64_t lanes, int64_t first_class, const Index<T>* target,
                   const T* values) {
  for (int64_t i = 0; i < lanes; ++i) {
    const int64_t own = static_cast<int64_t>(target[i]) - first_class;
    if (own >= 0 && own < count) tile[own * stride + i] = values != nullptr ? values[i] : T(0);
  }
}

}  // namespace fa::FA_ISA
