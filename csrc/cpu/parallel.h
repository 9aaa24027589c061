// Threads for one call. They are started and joined inside it: no pool survives into a forked worker, and none idles
// beside torch's own. Starting one costs about 20 microseconds, so small calls stay on the caller's thread.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <exception>
#include <thread>
#include <vector>

namespace fa {

// Of work that is bound by memory: below this many numbers a second thread costs more than it brings.
constexpr int64_t kNumbersPerThread = 1 << 20;

// first(task, worker) for every task in [0, first_tasks), and when all of them are done then(task, worker) for every
// task in [0, tasks), worker in [0, threads). Tasks are handed out as workers become free, so a result must depend on
// its task alone. Neither may throw: scratch memory is taken before. The caller does the first tasks while the others
// start.
template <typename First, typename Then>
void for_each_task_in_turn(int threads, int64_t first_tasks, const First& first, int64_t tasks, const Then& then) {
  if (threads <= 1 || std::max(first_tasks, tasks) <= 1) {
    for (int64_t task = 0; task < first_tasks; ++task) first(task, 0);
    for (int64_t task = 0; task < tasks; ++task) then(task, 0);
    return;
  }
  std::atomic<int64_t> next_first{0}, done{0}, next{0};
  const auto work = [&](int worker) {
    for (int64_t task = next_first++; task < first_tasks; task = next_first++) {
      first(task, worker);
      done.fetch_add(1, std::memory_order_release);
    }
    // Each of the others has one task left at the most.
    while (done.load(std::memory_order_acquire) < first_tasks) std::this_thread::yield();
    for (int64_t task = next++; task < tasks; task = next++) then(task, worker);
  };
  std::vector<std::thread> others;
  others.reserve(threads - 1);
  try {
    for (int worker = 1; worker < threads && worker < std::max(first_tasks, tasks); ++worker)
      others.emplace_back(work, worker);
  } catch (const std::exception&) {
    // No more threads or no memory for one: those that started, and this one, do all the tasks. Nothing may leave this
    // function while they run: the end of a thread that was not joined ends the process.
  }
  work(0);
  for (std::thread& thread : others) thread.join();
}

// fn(task, worker) for every task in [0, tasks), as above.
template <typename Fn>
void for_each_task(int threads, int64_t tasks, const Fn& fn) {
  for_each_task_in_turn(threads, 0, fn, tasks, fn);
}

}  // namespace fa
