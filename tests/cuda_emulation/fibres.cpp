// A GPU's cluster of blocks on a CPU, its threads as fibres of one thread. A warp runs on until something holds it, so
// that a missing barrier lets it overtake the others by a whole kernel. hopper.cpp has the copies
// and the products of warpgroups, which run meanwhile.

// Its longjmp takes a jump to another fibre's stack for a mistake, and aborts.
#undef _FORTIFY_SOURCE
#include "fibres.h"

#include <ucontext.h>

#include <algorithm>
#include <csetjmp>
#include <cstdio>
#include <memory>
#include <mutex>
#include <random>

#include "guarded.h"
#include "warp.h"

namespace emulation {

namespace {

constexpr int64_t kStackBytes = 256 << 10;

struct Fibre {
  Thread thread;
  int number = 0;
  bool done = true;
  const uint32_t* awaited = nullptr;  // a turn that must differ from `seen` before the fibre goes on
  uint32_t seen = 0;
  const std::function<bool()>* condition = nullptr;  // or what must be true
  const char* what = "";
  int64_t not_before = 0;  // a round of the scheduler
  jmp_buf where;
  std::unique_ptr<GuardedMemory> stack;
};

struct Meeting {
  int arrived = 0;
  uint32_t turn = 0;
};

struct Block {
  std::unique_ptr<GuardedMemory> shared;
  Meeting named[16];
};

std::mutex one_at_a_time;
std::vector<std::unique_ptr<Fibre>> fibres;
std::vector<Warp> warps;
std::vector<Meeting> warp_meetings;
std::vector<Block> blocks;
Meeting cluster_meeting;
int block_threads;
Fibre* current;
jmp_buf scheduler;
const std::function<void()>* body;
int64_t scheduler_round = 0;
std::mt19937 dice;

// Without the system calls that swapcontext makes.
void suspend() {
  if (_setjmp(current->where) == 0) _longjmp(scheduler, 1);
}
void resume(Fibre* fibre) {
  current = fibre;
  if (_setjmp(scheduler) == 0) _longjmp(fibre->where, 1);
}

void live() {
  for (;;) {
    suspend();
    (*body)();
    current->done = true;
  }
}

std::unique_ptr<Fibre> make_fibre(int number) {
  auto fibre = std::make_unique<Fibre>();
  fibre->number = number;
  fibre->stack = std::make_unique<GuardedMemory>(kStackBytes);
  ucontext_t context, here;
  getcontext(&context);
  context.uc_stack.ss_sp = fibre->stack->start();
  context.uc_stack.ss_size = kStackBytes;
  context.uc_link = nullptr;
  makecontext(&context, live, 0);
  current = fibre.get();
  if (_setjmp(scheduler) == 0) swapcontext(&here, &context);
  return fibre;
}

void await(const uint32_t& turn, const char* what) {
  current->awaited = &turn;
  current->seen = turn;
  current->what = what;
  suspend();
  current->awaited = nullptr;
}

void meet(Meeting& meeting, int all, const char* what) {
  if (++meeting.arrived == all) {
    meeting.arrived = 0;
    ++meeting.turn;
  } else {
    await(meeting.turn, what);
  }
}

bool can_run(const Fibre& fibre) {
  if (fibre.done || fibre.not_before > scheduler_round) return false;
  if (fibre.condition != nullptr) return (*fibre.condition)();
  return fibre.awaited == nullptr || *fibre.awaited != fibre.seen;
}

[[noreturn]] void report_deadlock(int threads) {
  const char* last = "";
  for (int t = 0; t < threads; ++t) {
    const char* const what = fibres[t]->done ? "has ended" : fibres[t]->what;
    if (t % kWarp == 0 || what != last)
      std::fprintf(stderr, "thread %d of block %d: %s\n", t % block_threads, t / block_threads, what);
    last = what;
  }
  fail("a deadlock, or a barrier that not all threads reach");
}

// In shuffled schedules, now and then: the other warps may overtake this one here.
void dawdle() {
  if (!is_shuffled() || dice() % 16 != 0) return;
  current->not_before = scheduler_round + 1;
  suspend();
}

// A warp as far as it comes, then the next. Warps of odd clusters begin with the last, or come in any order.
void run_cluster(int threads, bool backwards) {
  std::vector<int> order(threads / kWarp);
  for (size_t w = 0; w < order.size(); ++w) order[w] = static_cast<int>(backwards ? order.size() - 1 - w : w);
  for (;;) {
    bool any = false, all = true;
    ++scheduler_round;
    if (is_shuffled()) std::shuffle(order.begin(), order.end(), dice);
    for (const int w : order)
      for (bool moved = true; moved;) {
        moved = false;
        for (int t = w * kWarp; t < (w + 1) * kWarp; ++t)
          if (can_run(*fibres[t])) {
            resume(fibres[t].get());
            any = moved = true;
          }
      }
    for (int t = 0; t < threads; ++t) {
      all &= fibres[t]->done;
      any |= !fibres[t]->done && fibres[t]->not_before > scheduler_round;
    }
    if (all) return;
    if (!step_asynchronous(!any) && !any) report_deadlock(threads);
  }
}

}  // namespace

Thread& self() { return current->thread; }
int number_in_cluster() { return current->number; }
int threads_of_block() { return block_threads; }
bool has_ended(int rank) {
  const auto done = [](const std::unique_ptr<Fibre>& fibre) { return fibre->done; };
  const auto first = fibres.begin() + rank * block_threads;
  return std::all_of(first, first + block_threads, done);
}
char* shared_of(int rank) { return blocks[rank].shared->start(); }

void until(const std::function<bool()>& condition, const char* what) {
  dawdle();
  if (condition()) return;
  current->condition = &condition;
  current->what = what;
  suspend();
  current->condition = nullptr;
}

void run(dim3 grid, int threads, int shared_bytes, const std::function<void()>& kernel, int cluster) {
  if (threads % kWarp != 0 || threads > 1024) fail("a block of part of a warp, or too large");
  if (grid.x % static_cast<unsigned>(cluster) != 0) fail("a grid of part of a cluster");
  const std::lock_guard<std::mutex> lock(one_at_a_time);
  const int all = threads * cluster;
  while (static_cast<int>(fibres.size()) < all) fibres.push_back(make_fibre(static_cast<int>(fibres.size())));
  blocks.clear();
  blocks.resize(cluster);
  for (Block& block : blocks) block.shared = std::make_unique<GuardedMemory>(shared_bytes);
  block_threads = threads;
  body = &kernel;
  bool backwards = false;
  dice.seed(1);
  for_each_block(grid, [&](dim3 first) {
    if (first.x % static_cast<unsigned>(cluster) != 0) return;
    warps.assign(all / kWarp, Warp{});
    warp_meetings.assign(all / kWarp, Meeting{});
    cluster_meeting = Meeting{};
    for (Block& block : blocks) {
      block.shared->poison();
      for (Meeting& meeting : block.named) meeting = Meeting{};
    }
    for (int t = 0; t < all; ++t) {
      Fibre& fibre = *fibres[t];
      fibre.thread = Thread{};
      fibre.thread.rank = t / threads;
      fibre.thread.index = dim3(t % threads, 0, 0), fibre.thread.grid = grid;
      fibre.thread.block = dim3(first.x + fibre.thread.rank, first.y, first.z);
      fibre.thread.shared = shared_of(fibre.thread.rank);
      fibre.done = false;
    }
    begin_asynchronous(cluster, shared_bytes);
    run_cluster(all, backwards);
    end_asynchronous();
    backwards = !backwards;
  });
}

void block_barrier() { named_barrier(0, block_threads); }
void named_barrier(int id, int threads) {
  meet(blocks[current->thread.rank].named[id], threads, "a barrier of the block");
}
void cluster_barrier() {
  meet(cluster_meeting, block_threads * static_cast<int>(blocks.size()), "a barrier of the cluster");
}
void warp_barrier() { meet(warp_meetings[current->number / kWarp], kWarp, "a barrier of the warp"); }

void collective(Collective which, const void* in, void* out) {
  dawdle();
  Warp& warp = warps[current->number / kWarp];
  warp.bring(current->number % kWarp, which, in, out);
  if (warp.arrived < kWarp) return await(warp.turn, "an instruction of the whole warp");
  warp.perform();
  ++warp.turn;
}

}  // namespace emulation
