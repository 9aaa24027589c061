// The skeleton of both passes. A block of three warpgroups keeps 64 stationary rows: of the batch in the forward pass,
// of the classes in the backward pass. Tiles of 64 streaming rows, the other ones, pass by. For each tile the block
// computes
//
//   scores  = stationary rows times the tile's rows, 64 x 64
//   weights = a function of them, rounded to bf16
//   sums   += weights times the tile's rows, 64 x 512
//
// The first warpgroup computes scores and weights. It keeps its stationary rows in registers. Each of the two others
// holds the sums of half of the columns. Tiles are copied into a ring of three slots. Weights are handed over in two
// places.
//
// Reasons:
// - Keys and values are the same bytes, so one copy of a tile serves both products.
// - A tile takes 1024 clocks of the tensor cores for each product. Shared memory then gives 112 of its 128 bytes a
//   clock. With the stationary rows in shared memory it would have to give 140.
// - A multiprocessor has 184 + 160 + 160 registers for the threads of three warpgroups. 28 of the 32 steps of the
//   stationary rows' depth fit into 184.
// - The sums of a tile wait for the scores of the next tile. They then run beside the next tile's exponentials, during
//   which the tensor cores would be idle.
// bench/NOTES.md has the model.
#pragma once

#include "../numbers.h"
#include "wgmma.h"

namespace fa::cuda::hopper {

constexpr int kRows = 64;      // of a stationary block, of a tile
constexpr int kColumns = 512;  // of all matrices
constexpr int kBoxBytes = kRows * 128, kBoxes = kColumns / 64, kTileBytes = kBoxes * kBoxBytes;
constexpr int kSlots = 3;
constexpr int kSteps = kColumns / 16;  // of the scores' depth
constexpr int kRegisterSteps = 28;     // those whose stationary rows are in registers
constexpr int kWarpGroup = 128, kBlockThreads = 3 * kWarpGroup;
constexpr int kScoreRegisters = 184, kSumRegisters = 160;
constexpr int kReadingWarps = 8;  // those that read a tile last: of the two warpgroups of the sums
static_assert(kSteps - kRegisterSteps == 4, "the steps of one box");

// The accumulators of a thread: of the scores' 64 columns, of the sums' 256.
using Scores = float[32];
using Sums = float[128];
using Weights = uint32_t[16];
// Numbers of a task. The forward pass keeps two for each thread that has scores, of one warpgroup or of two. The
// backward pass hands two for each stationary row to the warpgroups that write the sums; they lie in the place of the
// block's last weights.
using Numbers = float[2 * kWarpGroup];
// Terms of a block's stationary rows, as in PreparedRows.
struct BlockTerms {
  float inverse[kRows], reciprocal[kRows], factor[kRows];
};

// Terms: the numbers of a tile's rows that a task needs.
template <typename Terms>
struct alignas(1024) Shared {
  char ring[kSlots][kTileBytes];
  char weights[2][kBoxBytes];
  char last_box[kBoxBytes];  // the stationary rows' columns that are not in registers
  Terms terms[kSlots];
  Numbers numbers[2];
  BlockTerms block;
  uint64_t full[kSlots][2];  // each half of a slot: its bytes
  uint64_t empty[kSlots];    // all warps of the cluster that read it
  uint64_t weights_full[2], weights_empty[2];
  uint64_t scores_done[2];
};

template <typename Terms>
__device__ __forceinline__ Shared<Terms>& shared_memory() {
  static_assert(sizeof(Shared<Terms>) <= 232448, "what a block of sm_90 can have");
  return *reinterpret_cast<Shared<Terms>*>(swizzled_shared());
}

// The work of a block of threads. It takes stationary blocks from first_block to end_block, block_stride apart, and for
// each of them `tiles` tiles from first_tile on. All blocks of a cluster have the same number of blocks and the same
// tiles.
struct Walk {
  const TensorMap* stationary;
  const TensorMap* streaming;
  int first_block, block_stride, end_block;
  int first_tile, tiles;
  bool ordered;  // sums wait for the next scores
};

// A slot of the ring, and the parity of its barriers' phase.
struct Slot {
  int place = 0;
  uint32_t parity = 0;
  __device__ __forceinline__ void advance() {
    if (++place == kSlots) place = 0, parity ^= 1;
  }
};
// One of the two places of weights, by a count of the tiles, and the parity of its barriers' phase.
struct Turn {
  uint32_t count = 0;
  __device__ __forceinline__ uint32_t place() const { return count & 1; }
  __device__ __forceinline__ uint32_t parity() const { return count >> 1 & 1; }
};

// The place of this thread's numbers in the rows of its warpgroup: rows `row` and row + 8, columns column + 8 n and
// column + 8 n + 1.
struct Position {
  int warp, lane, row, column;
  __device__ __forceinline__ Position()
      : warp(threadIdx.x % kWarpGroup / kWarp),
        lane(threadIdx.x % kWarp),
        row(warp * 16 + lane / 4),
        column(lane % 4 * 2) {}
};

// Bytes from the start of a swizzled box to a 16-byte chunk of a row.
__device__ __forceinline__ int chunk_offset(int row, int chunk) { return row * 128 + ((chunk ^ (row & 7)) << 4); }

// Copies an item of a block's walk into a slot: at position 0 the stationary rows, from position 1 on the tiles. Each
// block of a cluster copies a part of every tile for all blocks. A whole warp calls this and its first lane acts: so
// the compiler keeps the numbers in uniform registers.
template <int cluster, typename Task>
__device__ __forceinline__ void fill(const Task& task, const Walk& walk, Shared<typename Task::Terms>& s, int slot,
                                     int block, int position) {
  constexpr int kTermsBytes = sizeof(typename Task::Terms);
  const int rank = cluster > 1 ? cluster_rank() : 0;
  const bool is_tile = position > 0;
  const int row = (is_tile ? walk.first_tile + position - 1 : block) * kRows;
  if (threadIdx.x % kWarp == 0) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      uint64_t* const full = &s.full[slot][half];
      char* const boxes = s.ring[slot] + half * (kTileBytes / 2);
      barrier_arrive_expecting(full, kTileBytes / 2 + (is_tile && half == 0 ? kTermsBytes : 0));
      if (is_tile && half == 0) copy_bytes(&s.terms[slot], task.terms + row / kRows, kTermsBytes, full);
      if (cluster > 1 && is_tile) {
#pragma unroll
        for (int box = rank; box < 4; box += cluster)
          copy_box_to_all(boxes + box * kBoxBytes, walk.streaming, half * 256 + box * 64, row, full,
                          (1 << cluster) - 1);
      } else {
#pragma unroll
        for (int box = 0; box < 4; ++box)
          copy_box(boxes + box * kBoxBytes, is_tile ? walk.streaming : walk.stationary, half * 256 + box * 64, row,
                   full);
      }
    }
  }
  __syncwarp();
}

// Each warp that has read a slot arrives `times` times at all blocks whose copies fill that slot.
template <int cluster>
__device__ __forceinline__ void release(uint64_t* empty, int lane, int times) {
  if constexpr (cluster > 1) {
    if (lane < cluster * times) barrier_arrive_at(empty, lane % cluster);
  } else {
    if (lane < times) barrier_arrive(empty);
  }
}

// Loads the first steps of the stationary rows' depth from a slot into registers.
template <int steps>
__device__ __forceinline__ void load_steps(uint32_t (&rows)[steps][4], const char* slot, int t) {
  const int lane = t % kWarp, row = t / kWarp * 16 + (lane & 15);
#pragma unroll
  for (int k = 0; k < steps; ++k)
    load_matrices(rows[k], slot + k / 4 * kBoxBytes + chunk_offset(row, k % 4 * 2 + (lane >> 4)));
}

// Loads the stationary rows from a slot into registers, except for the last box, which is copied. The addresses are
// computed anew for each block, since the loop over the tiles needs the registers.
template <typename Terms>
__device__ __forceinline__ void load_stationary(uint32_t (&rows)[kRegisterSteps][4], const char* slot,
                                                Shared<Terms>& s) {
  const int t = fresh(threadIdx.x % kWarpGroup);
  named_sync<1, kWarpGroup>();  // no warp's products of the block before read the last box any more
  load_steps(rows, slot, t);
  struct alignas(16) Chunk {
    uint32_t word[4];
  };
#pragma unroll
  for (int i = 0; i < kBoxBytes / 16 / kWarpGroup; ++i)
    store_shared(reinterpret_cast<Chunk*>(s.last_box) + i * kWarpGroup + t,
                 reinterpret_cast<const Chunk*>(slot + (kBoxes - 1) * kBoxBytes)[i * kWarpGroup + t]);
  fence_async();
  named_sync<1, kWarpGroup>();
}

// Waits for the first half of a tile, and mends the tile if it has to.
template <typename Rows, typename Terms>
__device__ __forceinline__ void receive_tile(const Rows& rows, int j, const Slot& slot, Shared<Terms>& s) {
  barrier_wait(&s.full[slot.place][0], slot.parity);
  if (rows.mends(j)) {
    barrier_wait(&s.full[slot.place][1], slot.parity);
    rows.mend(j, s.ring[slot.place]);
  }
}

// Starts the products of the stationary rows with a tile. Steps that are not in registers are in the last box.
template <int steps, typename Terms>
__device__ __forceinline__ void start_scores(Scores& d, const uint32_t (&stationary)[steps][4], const Slot& slot,
                                             Shared<Terms>& s) {
  const uint64_t rows_of_tile = rows_of_depth(shared_address(s.ring[slot.place]));
  const uint64_t last_box = rows_of_depth(shared_address(s.last_box));
  const auto step = [](uint64_t rows, int k) { return further(rows, k / 4 * kBoxBytes + k % 4 * 32); };
  product_fence();
#pragma unroll
  for (int k = 0; k < kSteps / 2; ++k) multiply_scores(d, stationary[k], step(rows_of_tile, k), k > 0);
  barrier_wait(&s.full[slot.place][1], slot.parity);
  product_fence();  // the wait's branch has ended the batch
#pragma unroll
  for (int k = kSteps / 2; k < steps; ++k) multiply_scores(d, stationary[k], step(rows_of_tile, k), true);
#pragma unroll
  for (int k = steps; k < kSteps; ++k) multiply_scores(d, step(last_box, k - steps), step(rows_of_tile, k));
  product_commit();
}

// The first warpgroup.
template <int cluster, typename Task>
__device__ __forceinline__ void make_weights(const Task& task, const Walk& walk, Shared<typename Task::Terms>& s) {
  const Position at;
  uint32_t stationary[kRegisterSteps][4];
  Slot slot;
  Turn turn;
#pragma unroll 1
  for (int block = walk.first_block; block < walk.end_block; block += walk.block_stride) {
    barrier_wait(&s.full[slot.place][0], slot.parity);
    barrier_wait(&s.full[slot.place][1], slot.parity);
    typename Task::Rows rows(task, walk, block, s.ring[slot.place], s);
    load_stationary(stationary, s.ring[slot.place], s);
    release<cluster>(&s.empty[slot.place], at.lane, 2);  // four warps in place of eight
    slot.advance();
#pragma unroll 1
    for (int j = 0; j < walk.tiles; ++j) {
      Scores d;
      receive_tile(rows, j, slot, s);
      start_scores(d, stationary, slot, s);
      product_wait(d);
      if (at.lane == 0) barrier_arrive(&s.scores_done[turn.place()]);

      Weights p;
      rows.weigh(d, s.terms[slot.place], j, p, s);
      barrier_wait(&s.weights_empty[turn.place()], turn.parity() ^ 1);
      const int row = at.warp * 16 + (at.lane & 15);
#pragma unroll
      for (int q = 0; q < 4; ++q)
        store_matrices(s.weights[turn.place()] + chunk_offset(row, q * 2 + (at.lane >> 4)), p[4 * q], p[4 * q + 1],
                       p[4 * q + 2], p[4 * q + 3]);
      if (j + 1 == walk.tiles) rows.finish(s, turn.place());
      fence_async();
      barrier_arrive(&s.weights_full[turn.place()]);
      ++turn.count;
      slot.advance();
    }
  }
}

// The second and the third. Their first warp keeps the ring filled.
template <int cluster, typename Task>
__device__ __forceinline__ void add_up(const Task& task, const Walk& walk, Shared<typename Task::Terms>& s) {
  const int lane = threadIdx.x % kWarp, warp = uniform(threadIdx.x / kWarp), half = warp / 4 - 1;
  const bool fills = warp == kWarpGroup / kWarp;
  // Fill a slot with the item that comes kSlots after `position` of a block's walk.
  const auto refill = [&](int slot, int block, int position) {
    position += kSlots;
    while (position > walk.tiles) position -= walk.tiles + 1, block += walk.block_stride;
    if (block < walk.end_block) fill<cluster>(task, walk, s, slot, block, position);
  };
  if (fills)
    for (int i = 0; i < kSlots; ++i) refill(i, walk.first_block, i - kSlots);

  Sums u;
#pragma unroll
  for (int i = 0; i < 128; ++i) u[i] = 0;
  Slot slot;
  Turn turn;
#pragma unroll 1
  for (int block = walk.first_block; block < walk.end_block; block += walk.block_stride) {
    if (fills) {
      barrier_wait(&s.empty[slot.place], slot.parity);
      refill(slot.place, block, 0);
    }
    slot.advance();
#pragma unroll 1
    for (int j = 0; j < walk.tiles; ++j) {
      barrier_wait(&s.weights_full[turn.place()], turn.parity());
      const Turn next{turn.count + 1};
      if (walk.ordered && j + 1 < walk.tiles) barrier_wait(&s.scores_done[next.place()], next.parity());
      const uint64_t weights = rows_of_depth(shared_address(s.weights[turn.place()]));
      const uint64_t columns = rows_of_columns(shared_address(s.ring[slot.place]) + half * (kTileBytes / 2), kBoxBytes);
      product_fence();
#pragma unroll
      for (int k = 0; k < kRows / 16; ++k) multiply_values(u, further(weights, k * 32), further(columns, k * 16 * 128));
      product_commit();
      product_wait(u);
      release<cluster>(&s.empty[slot.place], lane, 1);
      const bool due = task.is_due(j, walk.tiles);
      // This lets the first warpgroup overwrite the weights' place, and the block's numbers, two tiles later.
      if (!due && lane == 0) barrier_arrive(&s.weights_empty[turn.place()]);
      // All blocks of the cluster must be done with this tile before another one takes its place.
      if (fills) {
        barrier_wait(&s.empty[slot.place], slot.parity);
        refill(slot.place, block, j + 1);
      }
      if (due) {
        task.write(u, block, half, s.numbers[turn.place()]);
#pragma unroll
        for (int i = 0; i < 128; ++i) u[i] = 0;
        __syncwarp();
        if (lane == 0) barrier_arrive(&s.weights_empty[turn.place()]);
      }
      ++turn.count;
      slot.advance();
    }
  }
}

// Makes the block's barriers. Every thread comes here.
template <int cluster, typename Terms>
__device__ __forceinline__ void make_barriers(Shared<Terms>& s) {
  if (threadIdx.x == 0) {
    check_alignment();
    for (int i = 0; i < kSlots; ++i) {
      barrier_init(&s.full[i][0], 1);
      barrier_init(&s.full[i][1], 1);
      barrier_init(&s.empty[i], kReadingWarps * cluster);
    }
    for (int i = 0; i < 2; ++i) {
      barrier_init(&s.weights_full[i], kWarpGroup);
      barrier_init(&s.weights_empty[i], kReadingWarps);
      barrier_init(&s.scores_done[i], kWarpGroup / kWarp);
    }
    barrier_init_fence();
  }
  if constexpr (cluster > 1)
    cluster_sync();
  else
    __syncthreads();
}

template <int cluster, typename Task>
__device__ __forceinline__ void run(const Task& task, const Walk& walk) {
  auto& s = shared_memory<typename Task::Terms>();
  make_barriers<cluster>(s);
  if (uniform(threadIdx.x / kWarpGroup) == 0) {
    take_registers<kScoreRegisters>();
    make_weights<cluster>(task, walk, s);
  } else {
    give_registers<kSumRegisters>();
    add_up<cluster>(task, walk, s);
  }
  if constexpr (cluster > 1) cluster_sync();  // no block ends while another one's copies or arrivals may reach it
}

}  // namespace fa::cuda::hopper
