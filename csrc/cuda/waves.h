// How many blocks a launch should have: counts that leave few places of the multiprocessors empty at its end.
#pragma once

#include <algorithm>
#include <cstdint>
#include <initializer_list>

#include "runtime.h"

namespace fa::cuda {

// A block that has its multiprocessor to itself takes this part of the time of two blocks there (gemm.h). An H100's
// times before and after a change of the chunks give it (bench/NOTES.md).
constexpr double kAlone = 0.65;

// The time of `blocks` blocks that are all alike, in times of two blocks on a multiprocessor.
inline double rounds(int64_t blocks, int multiprocessors) {
  const int64_t at_once = 2 * static_cast<int64_t>(multiprocessors), rest = blocks % at_once;
  return static_cast<double>(blocks / at_once) + (rest == 0 ? 0 : rest <= multiprocessors ? kAlone : 1);
}

// What the choices below give up of the least time for another aim.
constexpr double kNearly = 0.98;

// Splits of `tiles` blocks, at most `most`: the fewest that take nearly the least time.
inline int64_t best_splits(int64_t tiles, int64_t most, int multiprocessors) {
  const auto time = [&](int64_t splits) {
    return rounds(tiles * splits, multiprocessors) / static_cast<double>(splits);
  };
  double least = time(1);
  for (int64_t splits = 2; splits <= most; ++splits) least = std::min(least, time(splits));
  int64_t splits = 1;
  while (time(splits) * kNearly > least) ++splits;
  return splits;
}

// A product over a chunk: its blocks for each tile of classes, and the depth that each of them adds up.
struct ChunkProduct {
  int64_t blocks, depth;
};

// Tiles of classes of a chunk, more than half of `most`: the most whose products take nearly the least time for each
// class. All of `needed` where they fit.
inline int64_t best_tiles(std::initializer_list<ChunkProduct> products, int64_t needed, int64_t most,
                          int multiprocessors) {
  if (needed <= most) return needed;
  const auto time = [&](int64_t tiles) {
    double sum = 0;
    for (const ChunkProduct& product : products)
      sum += rounds(product.blocks * tiles, multiprocessors) * static_cast<double>(product.depth);
    return sum / static_cast<double>(tiles);
  };
  double least = time(most);
  for (int64_t tiles = most / 2 + 1; tiles < most; ++tiles) least = std::min(least, time(tiles));
  int64_t tiles = most;
  while (time(tiles) * kNearly > least) --tiles;
  return tiles;
}

}  // namespace fa::cuda
