// A block's threads as threads of the system, for ThreadSanitizer. This file is compiled without it, so that of all
// that is done here the block's barrier (pthread's, which ThreadSanitizer knows) alone puts the kernel's accesses in an
// order.
#include <pthread.h>

#include <atomic>
#include <memory>
#include <thread>

#include "guarded.h"
#include "warp.h"

namespace emulation {

namespace {

thread_local Thread current;
thread_local int number;
std::vector<Warp> warps;
std::unique_ptr<pthread_barrier_t[]> warp_barriers;
pthread_barrier_t barrier;

std::unique_ptr<std::atomic_flag[]> spin;

}  // namespace

Thread& self() { return current; }

void run(dim3 grid, int threads, int shared_bytes, const std::function<void()>& kernel, int cluster) {
  if (cluster != 1) fail("a cluster of blocks has no emulation by the system's threads");
  const GuardedMemory shared(shared_bytes);
  const int num_warps = threads / kWarp;
  warps.assign(num_warps, Warp{});
  spin.reset(new std::atomic_flag[num_warps]{});
  warp_barriers.reset(new pthread_barrier_t[num_warps]);
  pthread_barrier_init(&barrier, nullptr, threads);
  for (int w = 0; w < num_warps; ++w) pthread_barrier_init(&warp_barriers[w], nullptr, kWarp);
  std::vector<std::thread> all;
  for (int t = 0; t < threads; ++t)
    all.emplace_back([&, t] {
      number = t;
      for_each_block(grid, [&](dim3 block) {
        if (t == 0) shared.poison();
        current = Thread{};
        current.index = dim3(t, 0, 0), current.block = block, current.grid = grid, current.shared = shared.start();
        pthread_barrier_wait(&barrier);
        kernel();
        pthread_barrier_wait(&barrier);
      });
    });
  for (std::thread& thread : all) thread.join();
  for (int w = 0; w < num_warps; ++w) pthread_barrier_destroy(&warp_barriers[w]);
  pthread_barrier_destroy(&barrier);
}

void block_barrier() { pthread_barrier_wait(&barrier); }
void warp_barrier() { pthread_barrier_wait(&warp_barriers[number / kWarp]); }

// By atomics that ThreadSanitizer does not see: a warp's instructions order no memory.
void collective(Collective which, const void* in, void* out) {
  Warp& warp = warps[number / kWarp];
  std::atomic_flag& lock = spin[number / kWarp];
  while (lock.test_and_set(std::memory_order_acquire)) std::this_thread::yield();
  const uint32_t turn = warp.turn;
  warp.bring(number % kWarp, which, in, out);
  if (warp.arrived == kWarp) {
    warp.perform();
    __atomic_store_n(&warp.turn, turn + 1, __ATOMIC_RELEASE);
    lock.clear(std::memory_order_release);
    return;
  }
  lock.clear(std::memory_order_release);
  while (__atomic_load_n(&warp.turn, __ATOMIC_ACQUIRE) == turn) std::this_thread::yield();
}

}  // namespace emulation
