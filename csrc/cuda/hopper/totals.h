// The forward pass without the sum of the centers, as nobody asks for gradients: for 128 batch rows and a slice of the
// classes, a block computes the sums and the maxima of the exponentials.
//
// There is no second product, so the roles differ from those of block.h. Two warpgroups have scores, each of 64
// stationary rows, which are all in registers; a warp of the third one fills the ring. Both read each tile, so a block
// fetches half as many bytes a product. Their products take turns: while one computes exponentials, the tensor cores
// have the other one's products.
#pragma once

#include "forward.h"

namespace fa::cuda::hopper {

constexpr int kTotalGroups = 2;  // warpgroups that have scores
constexpr int kTotalRegisters = 216, kFillRegisters = 72;
static_assert(kTotalGroups * kWarpGroup / kWarp == kReadingWarps, "arrivals that empty a slot");

struct Totals : Forward {
  struct Rows : Forward::Rows {
    using Forward::Rows::Rows;
    // One warpgroup mends the tile for both.
    __device__ __forceinline__ void mend(int j, char* tile) const {
      if (threadIdx.x < kWarpGroup) Forward::Rows::mend(j, tile);
      named_sync<2, kTotalGroups * kWarpGroup>();
    }
  };
};

// A warpgroup's part. The items of the ring are the stationary rows of either warpgroup, then the tiles.
template <int cluster>
__device__ __forceinline__ void add_totals(const Totals& task, const Walk& walk, int group, Shared<ClassTerms>& s) {
  const Position at;
  uint32_t stationary[kSteps][4];
  Slot slot;
#pragma unroll
  for (int i = 0; i < kTotalGroups; ++i) {
    barrier_wait(&s.full[slot.place][0], slot.parity);
    barrier_wait(&s.full[slot.place][1], slot.parity);
    if (i == group) load_steps(stationary, s.ring[slot.place], static_cast<int>(threadIdx.x) % kWarpGroup);
    // Also by warps that do not read the item: another one in its slot would be a phase that they have missed.
    __syncwarp();
    release<cluster>(&s.empty[slot.place], at.lane, 1);
    slot.advance();
  }
  Totals::Rows rows(task, walk, walk.first_block + group, nullptr, s);
#pragma unroll 1
  for (int j = 0; j < walk.tiles; ++j) {
    Scores d;
    receive_tile(rows, j, slot, s);
    // The first one's products of a tile come after the second one's of the tile before.
    if (walk.ordered) barrier_wait(&s.scores_done[1 - group], (j + group + 1) & 1);
    start_scores(d, stationary, slot, s);
    __syncwarp();  // all lanes have had their turn
    if (at.lane == 0) barrier_arrive(&s.scores_done[group]);
    product_wait(d);
    Weights unused;
    rows.weigh(d, s.terms[slot.place], j, unused, s);
    __syncwarp();  // all lanes have read the terms
    release<cluster>(&s.empty[slot.place], at.lane, 1);
    slot.advance();
  }
  rows.finish(s, 0);
}

template <int cluster>
__device__ __forceinline__ void fill_ring(const Totals& task, const Walk& walk, Shared<ClassTerms>& s) {
  Slot slot;
#pragma unroll 1
  for (int item = 0; item < kTotalGroups + walk.tiles; ++item) {
    barrier_wait(&s.empty[slot.place], slot.parity ^ 1);
    const bool is_tile = item >= kTotalGroups;
    fill<cluster>(task, walk, s, slot.place, walk.first_block + (is_tile ? 0 : item),
                  is_tile ? item - kTotalGroups + 1 : 0);
    slot.advance();
  }
}

// Grid: (pairs of blocks of batch rows, slices). It adds to sums that start_kernel has set to zero.
template <int cluster>
__global__ void __cluster_dims__(cluster, 1, 1) __launch_bounds__(kBlockThreads, 1)
    class_totals_kernel(const __grid_constant__ TensorMap batch, const __grid_constant__ TensorMap classes,
                        const __grid_constant__ ForwardArgs args) {
  const int first = static_cast<int>(blockIdx.y) * args.slice;
  const int tiles = tiles_of_slice(args, first);
  if (tiles <= 0) return;  // all blocks of the cluster
  const int block = kTotalGroups * static_cast<int>(blockIdx.x);
  const Totals task{{args, reinterpret_cast<const ClassTerms*>(args.classes.inverse)}};
  const Walk walk{&batch, &classes, block, 1, block + kTotalGroups, first, tiles, args.ordered};
  auto& s = shared_memory<ClassTerms>();
  make_barriers<cluster>(s);
  const int group = uniform(threadIdx.x / kWarpGroup);
  if (group < kTotalGroups) {
    take_registers<kTotalRegisters>();
    add_totals<cluster>(task, walk, group, s);
  } else {
    give_registers<kFillRegisters>();
    if (uniform(threadIdx.x / kWarp) == kReadingWarps) fill_ring<cluster>(task, walk, s);
  }
  if constexpr (cluster > 1) cluster_sync();  // no block ends while another one's copies or arrivals may reach it
}

}  // namespace fa::cuda::hopper
