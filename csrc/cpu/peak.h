// The processor's own ceiling: multiply-adds that touch registers alone. The benchmark reports it beside what the
// kernels and the libraries reach.
#pragma once

#include <atomic>
#include <cstdint>

#include "gemm.h"
#include "parallel.h"
#include "simd.h"

namespace fa::FA_ISA {

// `rounds` multiply-adds on each of as many independent vectors as the micro-kernel holds, on each of `threads`
// threads; the flops done.
template <typename P>
int64_t multiply_adds(int64_t rounds, int threads) {
  using T = typename P::Sum;
  constexpr int kVectorsHeld = kRows * kVectors;
  std::atomic<T> sink{0};
  for_each_task(threads, threads, [&](int64_t, int) {
    Vec<T> acc[kVectorsHeld];
    for (int i = 0; i < kVectorsHeld; ++i) acc[i] = broadcast(static_cast<T>(i));  // all different: none is another's
    if constexpr (P::kDepth == 1) {
      const Vec<T> factor = broadcast(static_cast<T>(0.5)), term = broadcast(static_cast<T>(1));
      for (int64_t round = 0; round < rounds; ++round)
#pragma GCC unroll 16
        for (int i = 0; i < kVectorsHeld; ++i) acc[i] = P::multiply_add(term, acc[i], factor);
    } else {
      const auto one = P::broadcast(0x3f803f80);
      for (int64_t round = 0; round < rounds; ++round)
#pragma GCC unroll 16
        for (int i = 0; i < kVectorsHeld; ++i) acc[i] = P::multiply_add(acc[i], one, one);
    }
    Vec<T> sum = {};
    for (int i = 0; i < kVectorsHeld; ++i) sum += acc[i];
    // Used, so that the loop is not left out; which thread writes last does not matter.
    sink.store(sum_lanes<T>(sum), std::memory_order_relaxed);
  });
  return 2 * P::kDepth * rounds * kVectorsHeld * kLanes<T> * threads;
}

}  // namespace fa::FA_ISA
