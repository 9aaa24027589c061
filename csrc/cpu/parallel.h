// Threads for one call. They are started and joined inside it: no pool survives into a forked worker, and none idles
// beside torch's own. Starting one costs about 20 microseconds, so small calls stay on the caller's thread.
#pragma once

#include <atomic>
#include <cstdint>
#include <exception>
#include <thread>
#include <vector>

namespace fa {

// Of work that is bound by memory: below this many numbers a second thread costs more than it brings.
constexpr int64_t kNumbersPerThread = 1 << 20;

// fn(task, worker) for every task in [0, tasks), worker in [0, threads). Tasks are handed out as workers become free,
// so a result must depend on its task alone. fn must not throw: scratch memory is taken before.
template <typename Fn>
void for_each_task(int threads, int64_t tasks, const Fn& fn) {
  if (threads <= 1 || tasks <= 1) {
    for (int64_t task = 0; task < tasks; ++task) fn(task, 0);
    return;
  }
  std::atomic<int64_t> next{0};
  const auto work = [&](int worker) {
    for (int64_t task = next++; task < tasks; task = next++) fn(task, worker);
  };
  std::vector<std::thread> others;
  others.reserve(threads > 1 ? threads - 1 : 0);
  try {
    for (int worker = 1; worker < threads && worker < tasks; ++worker) others.emplace_back(work, worker);
  } catch (const std::exception&) {
    // No more threads or no memory for one: those that started, and this one, do all the tasks. Nothing may leave this
    // function while they run: the end of a thread that was not joined ends the process.
  }
  work(0);
  for (std::thread& thread : others) thread.join();
}

}  // namespace fa
