// The tiles' elementwise passes for negatives that are not plain (Negatives in kernels.h): several centers a class, of
// which the nearest counts, cosines above a row's threshold that are replaced, and logistic losses. kernels.cpp alone
// includes this file; its own passes over plain cosines know nothing of it.
#pragma once

#include <algorithm>
#include <limits>
#include <optional>

#include "kernels.h"
#include "logistic.h"
#include "margin.h"
#include "memory.h"
#include "simd.h"

namespace fa::FA_ISA {

template <typename T>
struct GeneralNegatives {
  int64_t sub_centers;
  Scratch<T> threshold;  // (padded_rows,)
  T a, b, d, e;
  std::optional<LogisticLoss<T>> logistic;

  GeneralNegatives(const Negatives& negatives, int64_t rows, int64_t padded_rows)
      : sub_centers(negatives.sub_centers),
        threshold(padded_rows),
        a(static_cast<T>(negatives.a)),
        b(static_cast<T>(negatives.b)),
        d(static_cast<T>(negatives.d)),
        e(static_cast<T>(negatives.e)) {
    if (negatives.logistic) logistic.emplace(*negatives.logistic);
    const T* const from = static_cast<const T*>(negatives.threshold);
    for (int64_t i = 0; i < padded_rows; ++i)
      threshold.get()[i] = from != nullptr && i < rows ? from[i] : std::numeric_limits<T>::infinity();
  }
};

// One class of one vector of rows.
template <typename T>
struct ClassOfRows {
  Vec<T> cosine, value, slope;  // c, f(c), f'(c)
  Mask<T> winner;               // which sub-center the cosine is of
  Mask<T> is_target;
};

// `at` is the class's first row of the tile, row `j` of its block; `own` the target's row of the block.
template <typename T>
inline ClassOfRows<T> read_class(const GeneralNegatives<T>& negatives, const T* at, int64_t stride, int64_t j,
                                 Mask<T> own, Vec<T> threshold) {
  ClassOfRows<T> c;
  c.cosine = load(at);
  c.winner = Mask<T>{};
  for (int64_t k = 1; k < negatives.sub_centers; ++k) {
    const Vec<T> other = load(at + k * stride);
    const Mask<T> wins = (other > c.cosine) | (other != other);  // a NaN stays to be seen
    c.cosine = wins ? other : c.cosine;
    c.winner = wins ? Mask<T>{} + static_cast<Index<T>>(k) : c.winner;
  }
  c.is_target = (own >= static_cast<Index<T>>(j)) & (own < static_cast<Index<T>>(j + negatives.sub_centers));
  if (negatives.logistic) {
    logistic_value<T>(*negatives.logistic, c.cosine, &c.value, &c.slope);
    return c;
  }
  const Mask<T> hard = c.cosine > threshold;
  Vec<T> value = (c.cosine * negatives.a + negatives.b) * c.cosine + negatives.d;
  Vec<T> slope = c.cosine * (2 * negatives.a) + negatives.b;
  if (negatives.e != 0) {
    const Vec<T> sine = square_roots<T>(maximum<T>((1 - c.cosine) * (1 + c.cosine), Vec<T>{}));
    value += negatives.e * sine;
    slope -= negatives.e * c.cosine / maximum<T>(sine, broadcast(kSinFloor<T>));
  }
  c.value = hard ? value : c.cosine;
  c.slope = hard ? slope : broadcast<T>(1);
  return c;
}

// exponentiate() of kernels.cpp: in the tile exp(scale * f(c) - shift) * f'(c) in the place of each class's nearest
// center, zeros in the others.
template <typename T, typename Stats>
void exponentiate_general(const GeneralNegatives<T>& negatives, T* tile, int64_t stride, int64_t count, int64_t lanes,
                          int64_t first_class, const Index<T>* target, const T* threshold, const T* log2_shift,
                          T log2_scale, bool want_sum, Stats* stats) {
  const Vec<T> lowest = broadcast(-std::numeric_limits<T>::infinity());
  for (int64_t i = 0; i < lanes; i += kLanes<T>) {
    const Mask<T> own = load_index<T>(target + i) - static_cast<Index<T>>(first_class);
    const Vec<T> row_threshold = load(threshold + i), row_shift = load(log2_shift + i);
    Vec<T> sum = {}, max = lowest;
    for (int64_t j = 0; j < count; j += negatives.sub_centers) {
      T* at = tile + j * stride + i;
      const ClassOfRows<T> c = read_class(negatives, at, stride, j, own, row_threshold);
      const Vec<T> compared = c.is_target ? lowest : want_sum ? c.cosine : c.value;
      max = compared > max ? compared : max;
      if (want_sum) {
        const Vec<T> e = c.is_target ? Vec<T>{} : exp2<T>(c.value * log2_scale - row_shift);
        sum += e;
        for (int64_t k = 0; k < negatives.sub_centers; ++k)
          store<T>(at + k * stride, c.winner == static_cast<Index<T>>(k) ? e * c.slope : Vec<T>{});
      }
    }
    for (int lane = 0; lane < kLanes<T>; ++lane) {
      stats[i + lane].sum += sum[lane];
      stats[i + lane].max = std::max<double>(stats[i + lane].max, max[lane]);
    }
  }
}

// differentiate() of kernels.cpp.
template <typename T>
void differentiate_general(const GeneralNegatives<T>& negatives, T* tile, int64_t stride, int64_t count, int64_t lanes,
                           int64_t first_class, const Index<T>* target, const T* threshold, const T* log2_lse,
                           const T* negative_coefficient, const T* target_coefficient, T log2_scale) {
  for (int64_t i = 0; i < lanes; i += kLanes<T>) {
    const Mask<T> own = load_index<T>(target + i) - static_cast<Index<T>>(first_class);
    const Vec<T> row_threshold = load(threshold + i), lse = load(log2_lse + i);
    const Vec<T> negative = load(negative_coefficient + i), positive = load(target_coefficient + i);
    for (int64_t j = 0; j < count; j += negatives.sub_centers) {
      T* at = tile + j * stride + i;
      const ClassOfRows<T> c = read_class(negatives, at, stride, j, own, row_threshold);
      const Vec<T> of_winner = c.is_target ? Vec<T>{} : negative * exp2<T>(c.value * log2_scale - lse) * c.slope;
      for (int64_t k = 0; k < negatives.sub_centers; ++k) {
        const Vec<T> of_negative = c.winner == static_cast<Index<T>>(k) ? of_winner : Vec<T>{};
        store<T>(at + k * stride, own == static_cast<Index<T>>(j + k) ? positive : of_negative);
      }
    }
  }
}

}  // namespace fa::FA_ISA
