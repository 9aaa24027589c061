// A GPU's block on a CPU. By default its threads are fibres of one thread: a warp runs on until a barrier of the block
// holds it, so that a missing barrier lets it overtake the others by a whole kernel. With EMULATION_THREADS they are
// threads of the system, for ThreadSanitizer: this file is then compiled without it, so that of all that is done here
// the block's barrier (pthread's, which ThreadSanitizer knows) alone puts the kernel's accesses in an order.
#include "emulation.h"

#include <pthread.h>

#include <cstdio>
#include <cstdlib>
#include <memory>

#include "cuda/ptx.h"
#include "guarded.h"

#if defined(EMULATION_THREADS)
#include <atomic>
#include <thread>
#else
#include <ucontext.h>

#include <csetjmp>
#endif

namespace emulation {

void fail(const char* why) {
  std::fprintf(stderr, "emulation: %s\n", why);
  std::abort();
}

namespace {

constexpr int kWarp = 32;
int64_t conflicts = 0;

float operand(Collective which, uint32_t word, int half) {
  if (which == Collective::kMmaTf32) return __uint_as_float(word & 0xffffe000u);
  const uint16_t bits = static_cast<uint16_t>(word >> (16 * half));
  return which == Collective::kMmaBFloat16 ? __uint_as_float(static_cast<uint32_t>(bits) << 16)
                                           : fa::cuda::from_fp16({bits});
}

// The fragment layouts as the PTX ISA's figures give them ("Matrix fragments for mma.m16n8k8" and "mma.m16n8k16").
void multiply(Collective which, const void* const (&in)[kWarp], void* const (&out)[kWarp]) {
  const int packed = which == Collective::kMmaTf32 ? 1 : 2,
            depth = 8 * packed;  // numbers of a register; of the product
  float a[16][16], b[16][8];
  for (int lane = 0; lane < kWarp; ++lane) {
    const MmaIn& mine = *static_cast<const MmaIn*>(in[lane]);
    const int g = lane / 4, t = lane % 4;
    for (int half = 0; half < packed; ++half) {
      for (int i = 0; i < 4; ++i)
        a[g + i % 2 * 8][t * packed + half + i / 2 * 4 * packed] = operand(which, mine.a[i], half);
      for (int i = 0; i < 2; ++i) b[t * packed + half + i * 4 * packed][g] = operand(which, mine.b[i], half);
    }
  }
  for (int lane = 0; lane < kWarp; ++lane) {
    const MmaIn& mine = *static_cast<const MmaIn*>(in[lane]);
    float result[4];
    for (int i = 0; i < 4; ++i) {
      double sum = mine.d[i];
      for (int k = 0; k < depth; ++k)
        sum += static_cast<double>(a[lane / 4 + i / 2 * 8][k]) * b[k][lane % 4 * 2 + i % 2];
      result[i] = static_cast<float>(sum);
    }
    std::memcpy(out[lane], result, sizeof result);
  }
}

// The eight rows of a matrix are read at once: each of them must lie in other banks of 16 bytes.
void count_conflicts(const void* const (&in)[kWarp]) {
  for (int matrix = 0; matrix < 4; ++matrix) {
    unsigned banks = 0;
    for (int r = 0; r < 8; ++r) banks |= 1u << (static_cast<const MatrixRow*>(in[8 * matrix + r])->address / 16 % 8);
    if (banks != 0xff) ++conflicts;
  }
}

void load(bool transposed, const void* const (&in)[kWarp], void* const (&out)[kWarp]) {
  count_conflicts(in);
  for (int lane = 0; lane < kWarp; ++lane) {
    uint16_t result[4][2];
    for (int matrix = 0; matrix < 4; ++matrix)
      for (int half = 0; half < 2; ++half) {
        const int r = lane / 4, c = lane % 4 * 2 + half;
        const char* const row = static_cast<const MatrixRow*>(in[8 * matrix + (transposed ? c : r)])->bytes;
        std::memcpy(&result[matrix][half], row + 2 * (transposed ? r : c), 2);
      }
    std::memcpy(out[lane], result, sizeof result);
  }
}

void shuffle(const void* const (&in)[kWarp], void* const (&out)[kWarp]) {
  uint32_t values[kWarp];
  for (int lane = 0; lane < kWarp; ++lane)
    values[lane] = static_cast<const ShuffleIn*>(in[lane ^ static_cast<const ShuffleIn*>(in[lane])->mask])->value;
  for (int lane = 0; lane < kWarp; ++lane) std::memcpy(out[lane], &values[lane], 4);
}

// A warp's meeting point: what each lane brought, and how many have come.
struct Warp {
  Collective which;
  const void* in[kWarp];
  void* out[kWarp];
  int arrived = 0;
  uint32_t turn = 0;

  void bring(int lane, Collective what, const void* from, void* to) {
    if (arrived > 0 && what != which) fail("lanes of a warp are at different instructions");
    which = what;
    in[lane] = from, out[lane] = to;
    ++arrived;
  }
  void perform() {
    if (which == Collective::kShuffleXor)
      shuffle(in, out);
    else if (which == Collective::kMatrices || which == Collective::kMatricesTransposed)
      load(which == Collective::kMatricesTransposed, in, out);
    else
      multiply(which, in, out);
    arrived = 0;
  }
};

template <typename Fn>
void for_each_block(dim3 grid, const Fn& fn) {
  for (unsigned z = 0; z < grid.z; ++z)
    for (unsigned y = 0; y < grid.y; ++y)
      for (unsigned x = 0; x < grid.x; ++x) fn(dim3(x, y, z));
}

}  // namespace

int64_t bank_conflicts() { return conflicts; }

#if defined(EMULATION_THREADS)

namespace {

thread_local Thread current;
thread_local int number;
std::vector<Warp> warps;
std::unique_ptr<pthread_barrier_t[]> warp_barriers;
pthread_barrier_t barrier;

std::unique_ptr<std::atomic_flag[]> spin;

}  // namespace

Thread& self() { return current; }

void run(dim3 grid, int threads, int shared_bytes, const std::function<void()>& kernel) {
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

#else

namespace {

constexpr int64_t kStackBytes = 256 << 10;

struct Fibre {
  Thread thread;
  int number = 0;
  bool done = true;
  const uint32_t* awaited = nullptr;  // a turn that must differ from `seen` before the fibre goes on
  uint32_t seen = 0;
  jmp_buf where;
  std::unique_ptr<GuardedMemory> stack;
};

std::vector<std::unique_ptr<Fibre> > fibres;
std::vector<Warp> warps;
struct {
  int arrived = 0;
  uint32_t turn = 0;
} barrier, warp_barriers[64];
int block_threads;
Fibre* current;
jmp_buf scheduler;
const std::function<void()>* body;

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

void await(const uint32_t& turn) {
  current->awaited = &turn;
  current->seen = turn;
  suspend();
  current->awaited = nullptr;
}

template <typename Meeting>
void meet(Meeting& meeting, int all) {
  if (++meeting.arrived == all) {
    meeting.arrived = 0;
    ++meeting.turn;
  } else {
    await(meeting.turn);
  }
}

bool can_run(const Fibre& fibre) { return !fibre.done && (fibre.awaited == nullptr || *fibre.awaited != fibre.seen); }

// A warp as far as it comes, then the next; odd blocks begin with the last.
void run_block(int threads, bool backwards) {
  const int num_warps = threads / kWarp;
  for (bool any = true; any;) {
    any = false;
    for (int w = 0; w < num_warps; ++w) {
      const int first = (backwards ? num_warps - 1 - w : w) * kWarp;
      for (bool moved = true; moved;) {
        moved = false;
        for (int t = first; t < first + kWarp; ++t)
          if (can_run(*fibres[t])) {
            resume(fibres[t].get());
            any = moved = true;
          }
      }
    }
  }
  for (int t = 0; t < threads; ++t)
    if (!fibres[t]->done) fail("a barrier that not all threads reach");
}

}  // namespace

Thread& self() { return current->thread; }

void run(dim3 grid, int threads, int shared_bytes, const std::function<void()>& kernel) {
  if (threads % kWarp != 0 || threads > 1024) fail("a block of part of a warp, or too large");
  const GuardedMemory shared(shared_bytes);
  while (static_cast<int>(fibres.size()) < threads) fibres.push_back(make_fibre(static_cast<int>(fibres.size())));
  warps.assign(threads / kWarp, Warp{});
  block_threads = threads;
  body = &kernel;
  bool backwards = false;
  for_each_block(grid, [&](dim3 block) {
    shared.poison();
    for (int t = 0; t < threads; ++t) {
      Fibre& fibre = *fibres[t];
      fibre.thread = Thread{};
      fibre.thread.index = dim3(t, 0, 0), fibre.thread.block = block, fibre.thread.grid = grid;
      fibre.thread.shared = shared.start();
      fibre.done = false;
    }
    run_block(threads, backwards);
    backwards = !backwards;
  });
}

void block_barrier() { meet(barrier, block_threads); }
void warp_barrier() { meet(warp_barriers[current->number / kWarp], kWarp); }

void collective(Collective which, const void* in, void* out) {
  Warp& warp = warps[current->number / kWarp];
  warp.bring(current->number % kWarp, which, in, out);
  if (warp.arrived < kWarp) return await(warp.turn);
  warp.perform();
  ++warp.turn;
}

#endif

}  // namespace emulation
