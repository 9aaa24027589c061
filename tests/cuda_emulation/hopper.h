// The functions of csrc/cuda/hopper/ptx.h and wgmma.h in C++, which those include. Their meaning is said there;
// hopper.cpp has the copies, the barriers and the products, and the rules that it checks.
#pragma once

#include "cuda/ptx.h"
#include "emulation.h"

namespace emulation {

// A matrix of 16-bit numbers that boxes of 64 x 64 are copied of.
struct TensorMap {
  const uint16_t* data;
  int64_t rows, columns, stride;
};
// Fails where the driver would refuse such a map.
TensorMap encode(const void* data, int64_t rows, int64_t columns, int64_t stride);

// The time of products and copies: as soon as they may, when nobody can go on without them, or at random. `starved`:
// the warpgroup whose products come last of all, or -1.
enum class When { kEarly, kLate, kRandom };
struct Schedule {
  When products, copies;
  bool shuffled;  // the order of the warps
  int starved;
};
constexpr Schedule kSchedules[] = {
    {When::kEarly, When::kEarly, false, -1}, {When::kLate, When::kLate, false, -1},
    {When::kEarly, When::kLate, true, -1},   {When::kLate, When::kEarly, true, -1},
    {When::kLate, When::kRandom, true, -1},  {When::kLate, When::kEarly, true, 0},
    {When::kLate, When::kEarly, true, 1},    {When::kLate, When::kRandom, true, 2},
};
constexpr int kScheduleCount = sizeof kSchedules / sizeof *kSchedules;
// By its number; -1, as it begins: each cluster takes the next one.
void use_schedule(int number);

// 32-bit addresses of this block's shared memory, as instructions take them.
uint32_t shared_address(const void* at);

void barrier_init(uint64_t* barrier, int arrivals);
void barrier_arrive(uint64_t* barrier, int rank);
void barrier_expect(uint64_t* barrier, int bytes);
void barrier_wait(uint64_t* barrier, uint32_t parity);

void copy_box(char* to, const TensorMap* map, int column, int row, uint64_t* barrier, unsigned blocks);
void copy_bytes(void* to, const void* from, int bytes, uint64_t* barrier);
void prefetch_bytes(const void* from, int bytes);

// This thread has written so many bytes of shared memory, and has not fenced them.
void written(const void* at, int bytes);
void fence_async();

struct Product {
  int columns;                  // of b
  float* d;                     // columns / 2 numbers of this thread
  const uint32_t* a_registers;  // or null
  uint64_t a, b;                // where they lie in shared memory
  bool add, b_by_depth;         // b's rows are the depth
};
void product(const Product& product);
void product_fence();
void product_commit();
void product_wait();

void change_registers(int count, bool more);

}  // namespace emulation

namespace fa::cuda {

inline uint32_t shared_address(const void* at) { return emulation::shared_address(at); }

}  // namespace fa::cuda

namespace fa::cuda::hopper {

using TensorMap = emulation::TensorMap;

inline char* swizzled_shared() {
  const uintptr_t start = reinterpret_cast<uintptr_t>(emulation::self().shared);
  return reinterpret_cast<char*>((start + 1023) / 1024 * 1024);
}

inline void check_alignment() {}

inline void barrier_init(uint64_t* barrier, int arrivals) { emulation::barrier_init(barrier, arrivals); }
inline void barrier_init_fence() {}
inline void barrier_arrive(uint64_t* barrier) { emulation::barrier_arrive(barrier, emulation::self().rank); }
inline void barrier_arrive_at(uint64_t* barrier, int block) { emulation::barrier_arrive(barrier, block); }
inline void barrier_arrive_expecting(uint64_t* barrier, int bytes) {
  emulation::barrier_expect(barrier, bytes);
  barrier_arrive(barrier);
}
inline void barrier_wait(uint64_t* barrier, uint32_t parity) { emulation::barrier_wait(barrier, parity); }

inline void copy_box(char* to, const TensorMap* map, int column, int row, uint64_t* barrier) {
  emulation::copy_box(to, map, column, row, barrier, 1u << emulation::self().rank);
}
inline void copy_box_to_all(char* to, const TensorMap* map, int column, int row, uint64_t* barrier, uint16_t blocks) {
  emulation::copy_box(to, map, column, row, barrier, blocks);
}
inline void copy_bytes(void* to, const void* from, int bytes, uint64_t* barrier) {
  emulation::copy_bytes(to, from, bytes, barrier);
}
inline void prefetch_bytes(const void* from, int bytes) { emulation::prefetch_bytes(from, bytes); }

template <typename T>
inline void store_shared(T* to, const T& value) {
  *to = value;
  emulation::written(to, sizeof value);
}
inline void fence_async() { emulation::fence_async(); }

inline void product_fence() { emulation::product_fence(); }
inline void product_commit() { emulation::product_commit(); }
template <int count>
inline void product_wait(float (&)[count]) {
  emulation::product_wait();
}
inline void multiply_scores(float (&d)[32], const uint32_t (&a)[4], uint64_t b, bool add) {
  emulation::product({64, d, a, 0, b, add, false});
}
inline void multiply_scores(float (&d)[32], uint64_t a, uint64_t b) {
  emulation::product({64, d, nullptr, a, b, true, false});
}
inline void multiply_values(float (&d)[128], uint64_t a, uint64_t b) {
  emulation::product({256, d, nullptr, a, b, true, true});
}

inline void store_matrices(char* row, uint32_t a, uint32_t b, uint32_t c, uint32_t d) {
  if (reinterpret_cast<uintptr_t>(row) % 16 != 0) emulation::fail("store_matrices: a row that is not aligned");
  const emulation::StoreIn in{row, {a, b, c, d}};
  emulation::collective(emulation::Collective::kStoreMatrices, &in, nullptr);
  emulation::written(row, 16);
}

inline uint32_t pack_bf16(float low, float high) {
  return to_bf16(low).bits | static_cast<uint32_t>(to_bf16(high).bits) << 16;
}

inline int cluster_rank() { return emulation::self().rank; }
inline void cluster_sync() { emulation::cluster_barrier(); }
template <int barrier, int threads>
inline void named_sync() {
  static_assert(barrier > 0 && barrier < 16 && threads % 32 == 0, "what bar.sync takes");
  emulation::named_barrier(barrier, threads);
}
inline bool any_of_warp(bool value) {
  bool any;
  emulation::collective(emulation::Collective::kAny, &value, &any);
  return any;
}
inline int uniform(int value) {
  int first;
  emulation::collective(emulation::Collective::kFirst, &value, &first);
  return first;
}
inline int fresh(int value) { return value; }
template <int count>
inline void take_registers() {
  emulation::change_registers(count, true);
}
template <int count>
inline void give_registers() {
  emulation::change_registers(count, false);
}

}  // namespace fa::cuda::hopper
