// How many blocks a launch should have: counts that leave few places of the multiprocessors empty in its last wave.
#pragma once

#include <algorithm>
#include <cstdint>

#include "runtime.h"

namespace fa::cuda {

// The share of the places that `blocks` fill in the waves that they take, two blocks on a multiprocessor (gemm.h).
inline double fullness(int64_t blocks, int multiprocessors) {
  return static_cast<double>(blocks) / static_cast<double>(round_up(blocks, 2 * static_cast<int64_t>(multiprocessors)));
}

// What the choices below give up of the fullest waves for another aim.
constexpr double kNearlyFull = 0.98;

// Splits of `tiles` blocks, at most `most`: the fewest that fill their waves nearly as well as any.
inline int64_t fullest_splits(int64_t tiles, int64_t most, int multiprocessors) {
  double best = 0;
  for (int64_t splits = 1; splits <= most; ++splits) best = std::max(best, fullness(tiles * splits, multiprocessors));
  int64_t splits = 1;
  while (splits < most && fullness(tiles * splits, multiprocessors) < kNearlyFull * best) ++splits;
  return splits;
}

// Tiles of classes of a chunk, more than half of `most`: the most that fill their waves nearly as well as any, with
// `blocks` blocks for each. All of `needed` where they fit.
inline int64_t fullest_tiles(int64_t blocks, int64_t needed, int64_t most, int multiprocessors) {
  if (needed <= most) return needed;
  double best = 0;
  for (int64_t tiles = most / 2 + 1; tiles <= most; ++tiles)
    best = std::max(best, fullness(tiles * blocks, multiprocessors));
  int64_t tiles = most;
  while (fullness(tiles * blocks, multiprocessors) < kNearlyFull * best) --tiles;
  return tiles;
}

}  // namespace fa::cuda
