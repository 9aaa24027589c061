// The first product where the negatives are not plain (Negatives in kernels.h): several centers a class, of which the
// nearest counts, and cosines above a row's threshold, which are replaced. The tile's scores go through shared memory,
// so that a center sees those of its class's other centers; scores.h has the kernels for plain negatives, which need no
// such turn. A tile ends with a class (RowSelection), so no class lies in two of them.
#pragma once

#include "margin.h"
#include "scores.h"

namespace fa::cuda {

// The rule of a pass, ready for a thread.
struct NegativeRule {
  int sub_centers;
  bool changes;
  float a, b, d, e;

  __device__ explicit NegativeRule(const Negatives& negatives)
      : sub_centers(negatives.sub_centers), changes(negatives.threshold != nullptr), a(0), b(0), d(0), e(0) {
    if (!changes) return;
    a = static_cast<float>(negatives.coefficients[0]), b = static_cast<float>(negatives.coefficients[1]);
    d = static_cast<float>(negatives.coefficients[2]), e = static_cast<float>(negatives.coefficients[3]);
  }

  // f(cosine) and f'(cosine).
  __device__ __forceinline__ float changed(float cosine, float threshold, float* slope) const {
    *slope = 1;
    if (!(changes && cosine > threshold)) return cosine;
    const float squared = (1 - cosine) * (1 + cosine), sine = squared > 0 ? sqrtf(squared) : 0.0f;
    *slope = 2 * a * cosine + b - e * cosine / fmaxf(sine, kSinFloor<float>);
    return (a * cosine + b) * cosine + d + e * sine;
  }

  // Whether center j of a tile is not its class's nearest, by cosine(j). Of equal ones the first is the nearest. A NaN
  // beats nothing and is not beaten: it reaches the sums.
  template <typename Cosine>
  __device__ __forceinline__ bool is_beaten(int j, float own, const Cosine& cosine) const {
    const int first = j / sub_centers * sub_centers;
    for (int k = first; k < first + sub_centers; ++k) {
      const float other = cosine(k);
      if (other > own || (other == own && k < j)) return true;
    }
    return false;
  }

  // Whether center j belongs to the class of the target, which may lie in another tile.
  __device__ __forceinline__ bool is_own(int j, int64_t target) const {
    return target >= 0 && target / sub_centers == j / sub_centers;
  }
};

// The threshold of a batch row; padding has none.
__device__ __forceinline__ float threshold_of(const Negatives& negatives, int64_t row, int64_t batch_rows) {
  return negatives.threshold != nullptr && row < batch_rows ? negatives.threshold[row] : INFINITY;
}

// class_stats_kernel's results, in one slot a tile of classes; maxima of cosines, or, `of_values`, of what they become.
// The terms' scale is that of a cosine.
template <Precision precision>
__global__ void __launch_bounds__(kThreads, 2)
    general_stats_kernel(Panel x, Chunk chunk, int depth, RowTerms terms, Negatives negatives, int64_t batch_rows,
                         RowStats stats, bool of_values, typename Operands<precision>::Second* exponentials) {
  using First = typename Operands<precision>::First;
  using Second = typename Operands<precision>::Second;
  const int64_t first_row = static_cast<int64_t>(blockIdx.x) * kTile;
  const int tile = static_cast<int>(blockIdx.y), first_class = tile * kTile;
  const int present = chunk.classes.present_in_tile(tile);
  const int64_t row_bytes = x.width * static_cast<int64_t>(sizeof(First));
  char* const shared = dynamic_shared();
  {
    Accumulators acc;
    multiply_tile<precision, First, BLayout::kByColumn>(acc, x.values + first_row * row_bytes, row_bytes,
                                                        chunk.panel.values + first_class * row_bytes, row_bytes,
                                                        stages_of<First>(depth), shared);
    stage_tile(acc, shared);
  }
  const NegativeRule rule(negatives);
  const float* const inverse = chunk.panel.inverse + first_class;
  Second* const out = exponentials == nullptr ? nullptr : exponentials + first_row * chunk.panel.rows + first_class;
  for_each_staged_row(shared, [&](int row, int column, const float (&scores)[4]) {
    const int64_t i = first_row + row;
    const float scale = terms.scale[i], shift = terms.shift[i], row_inverse = x.inverse[i];
    const float threshold = threshold_of(negatives, i, batch_rows);
    const int64_t target = terms.target[i] - chunk.classes.first - static_cast<int64_t>(tile) * chunk.classes.per_tile;
    float sum = 0, largest = -INFINITY, weights[4];
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      const int j = column + k;
      weights[k] = 0;
      if (j >= present || rule.is_own(j, target)) continue;
      const float score = scores[k] * inverse[j];
      if (rule.is_beaten(j, score, [&](int other) { return staged(shared, row, other) * inverse[other]; })) continue;
      const float cosine = score * row_inverse;
      float slope;
      const float value = rule.changed(cosine, threshold, &slope), compared = of_values ? value : cosine;
      if (compared > largest) largest = compared;
      const float exponential = exp2_approximate(fmaf(value, scale, -shift));
      sum += exponential;
      weights[k] = exponential * slope * inverse[j];
    }
    sum = warp_sum(sum), largest = warp_max(largest);
    if (threadIdx.x % kWarp == 0) {
      const int64_t at = static_cast<int64_t>(tile) * x.rows + i;
      stats.sums[at] = stats.accumulate ? stats.sums[at] + sum : sum;
      stats.maxima[at] = stats.accumulate ? fmaxf(stats.maxima[at], largest) : largest;
    }
    if (out == nullptr) return;
    store_four(out + row * chunk.panel.rows + column, 1, 4, weights, [](float value, Second* to, int) {
      convert(precision == Precision::kTf32 ? round_to_tf32(value) : value, to);
    });
  });
}

// class_gradient_kernel's results, with one slot of `along` a tile of batch rows.
template <Precision precision>
__global__ void __launch_bounds__(kThreads, 2)
    general_gradient_kernel(Panel x, Chunk chunk, int depth, RowTerms terms, Negatives negatives, int64_t batch_rows,
                            float* along, typename Operands<precision>::Second* gradient) {
  using First = typename Operands<precision>::First;
  using Second = typename Operands<precision>::Second;
  const int64_t first_row = static_cast<int64_t>(blockIdx.x) * kTile;
  const int tile = static_cast<int>(blockIdx.y), first_class = tile * kTile;
  const int present = chunk.classes.present_in_tile(tile);
  const int64_t row_bytes = x.width * static_cast<int64_t>(sizeof(First));
  char* const shared = dynamic_shared();
  {
    Accumulators acc;
    multiply_tile<precision, First, BLayout::kByColumn>(acc, chunk.panel.values + first_class * row_bytes, row_bytes,
                                                        x.values + first_row * row_bytes, row_bytes,
                                                        stages_of<First>(depth), shared);
    stage_tile(acc, shared);
  }
  const NegativeRule rule(negatives);
  const float* const inverse = chunk.panel.inverse + first_class;
  Second* const out = gradient + static_cast<int64_t>(first_class) * x.rows + first_row;
  for_each_staged_row(shared, [&](int j, int column, const float (&scores)[4]) {
    float sum = 0, derivatives[4];
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      const int64_t i = first_row + column + k;
      const int64_t target =
          terms.target[i] - chunk.classes.first - static_cast<int64_t>(tile) * chunk.classes.per_tile;
      float derivative = 0;
      if (j == target) {
        derivative = terms.target_coefficient[i];
      } else if (j < present && !rule.is_own(j, target)) {
        const float score = scores[k] * inverse[j];
        const auto of = [&](int other) { return staged(shared, other, column + k) * inverse[other]; };
        if (!rule.is_beaten(j, score, of)) {
          float slope;
          const float value = rule.changed(score * x.inverse[i], threshold_of(negatives, i, batch_rows), &slope);
          derivative = terms.factor[i] * exp2_approximate(fmaf(value, terms.scale[i], -terms.shift[i])) * slope;
        }
      }
      derivatives[k] = rounded_operand<precision>(derivative);
      sum += derivatives[k] * scores[k];
    }
    sum = warp_sum(sum);
    if (threadIdx.x % kWarp == 0) along[static_cast<int64_t>(blockIdx.x) * chunk.panel.rows + first_class + j] = sum;
    store_four(out + j * x.rows + column, 1, 4, derivatives, [](float value, Second* to, int) { convert(value, to); });
  });
}

}  // namespace fa::cuda
