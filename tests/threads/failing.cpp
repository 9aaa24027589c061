// for_each_task_in_turn where the memory for a thread is refused after so many allocations. Prints how many tasks were
// done exactly once, the later ones after all of the first ones, or bad_alloc.
#include <atomic>
#include <cstdio>
#include <cstdlib>
#include <new>

#include "parallel.h"

static int allocations_left = -1;  // -1: without a limit

void* operator new(std::size_t size) {
  if (allocations_left == 0) throw std::bad_alloc();
  if (allocations_left > 0) --allocations_left;
  void* const memory = std::malloc(size);
  if (memory == nullptr) throw std::bad_alloc();
  return memory;
}
void operator delete(void* memory) noexcept { std::free(memory); }
void operator delete(void* memory, std::size_t) noexcept { std::free(memory); }

int main(int, char** arguments) {
  constexpr int kThreads = 4, kFirst = 200, kTasks = 1000;
  static int first_done[kFirst], done[kTasks];
  std::atomic<int> first{0};
  // The first allocation is the list of threads; each thread takes one more.
  allocations_left = std::atoi(arguments[1]);
  try {
    fa::for_each_task_in_turn(
        kThreads, kFirst,
        [&](int64_t task, int) {
          ++first_done[task];
          ++first;
        },
        kTasks, [&](int64_t task, int) { done[task] += first == kFirst ? 1 : 1000; });
  } catch (const std::bad_alloc&) {
    std::puts("bad_alloc");
    return 0;
  }
  int once = 0;
  for (const int times : first_done) once += times == 1;
  for (const int times : done) once += times == 1;
  std::printf("%d\n", once);
}
