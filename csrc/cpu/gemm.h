// The register-blocked product that every pass is made of: one tile C (kRows, kVectors * lanes) += A (kRows, depth) B,
// held in vector registers over the whole depth. B's rows are the vectorized side; A's elements are broadcast. Depths
// and strides of A and B count elements of the product P (product.h).
#pragma once

#include <algorithm>

#include "product.h"

namespace fa::FA_ISA {

#if defined(__AVX512F__)
constexpr int kRows = 8;  // 16 accumulators, twice what hides the latency; 12 and 14 measured the same or slower
#else
constexpr int kRows = 6;  // 12 accumulators + 2 of B + 1 broadcast of 16 registers
#endif
constexpr int kVectors = 2;
template <typename T>
constexpr int kColumns = kVectors * kLanes<T>;

// How A lies in memory: element (r, k) at r * stride + k, or, transposed, at k * stride + r.
enum class Layout { kRowMajor, kTransposed };

// What becomes of the sums at the end: C = sums, C = earlier sums + sums, and that times a factor for each row and each
// column (of the whole C, at `row_factor` and `column_factor`; BFloat16Pairs alone).
template <typename T>
struct Finish {
  bool accumulate = false;
  const T *row_factor = nullptr, *column_factor = nullptr;
};

template <typename P, int rows, Layout layout>
inline void multiply_tile(int64_t depth, const typename P::Element* a, int64_t a_stride, const typename P::Element* b,
                          int64_t b_stride, typename P::Sum* c, int64_t c_stride,
                          const Finish<typename P::Sum>& finish) {
  using T = typename P::Sum;
  // Earlier sums are fetched now and added at the end: no multiplication waits for them (bench/NOTES.md).
  if (finish.accumulate)
#pragma GCC unroll 16
    for (int r = 0; r < rows; ++r)
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) __builtin_prefetch(c + r * c_stride + v * kLanes<T>, 1, 3);
  Vec<T> acc[rows][kVectors] = {};

  for (int64_t k = 0; k < depth; ++k) {
    typename P::Operand row[kVectors];
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) row[v] = P::load(b + v * kLanes<T>);
#pragma GCC unroll 16
    for (int r = 0; r < rows; ++r) {
      const typename P::Operand element = P::broadcast(layout == Layout::kRowMajor ? a[r * a_stride] : a[r]);
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) acc[r][v] = P::multiply_add(acc[r][v], element, row[v]);
    }
    a += layout == Layout::kRowMajor ? 1 : a_stride;
    b += b_stride;
  }

  if (finish.accumulate)
#pragma GCC unroll 16
    for (int r = 0; r < rows; ++r)
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) acc[r][v] += load(c + r * c_stride + v * kLanes<T>);
  if constexpr (P::kDepth > 1) {
    if (finish.row_factor != nullptr)
#pragma GCC unroll 16
      for (int r = 0; r < rows; ++r)
#pragma GCC unroll 4
        for (int v = 0; v < kVectors; ++v)
          acc[r][v] *= finish.row_factor[r] * load(finish.column_factor + v * kLanes<T>);
  }
#pragma GCC unroll 16
  for (int r = 0; r < rows; ++r)
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) store(c + r * c_stride + v * kLanes<T>, acc[r][v]);
}

// Memory that will be read soon, brought into L2 a little at a time, so that the processor's few line-fill buffers
// never stall the arithmetic between. An empty one does nothing.
class Prefetch {
 public:
  Prefetch() = default;
  // `bytes` from `at`, to be spread over `steps` calls of step().
  Prefetch(const void* at, int64_t bytes, int64_t steps)
      : at_(static_cast<const char*>(at)), end_(at_ + bytes), stride_(((bytes + steps - 1) / steps + 63) / 64 * 64) {}
  void step() {
    const char* const stop = std::min(at_ + stride_, end_);
    for (; at_ < stop; at_ += 64) __builtin_prefetch(at_, 0, 2);
  }

 private:
  const char *at_ = nullptr, *end_ = nullptr;
  int64_t stride_ = 0;
};

// C (rows, kColumns) for any number of rows: full tiles of kRows, then one narrower tile.
template <typename P, Layout layout, int remainder = kRows - 1>
inline void multiply_last_rows(int rows, int64_t depth, const typename P::Element* a, int64_t a_stride,
                               const typename P::Element* b, int64_t b_stride, typename P::Sum* c, int64_t c_stride,
                               const Finish<typename P::Sum>& finish) {
  if constexpr (remainder > 0) {
    if (rows == remainder)
      multiply_tile<P, remainder, layout>(depth, a, a_stride, b, b_stride, c, c_stride, finish);
    else
      multiply_last_rows<P, layout, remainder - 1>(rows, depth, a, a_stride, b, b_stride, c, c_stride, finish);
  }
}

template <typename P, Layout layout>
inline void multiply_panel(int64_t rows, int64_t depth, const typename P::Element* a, int64_t a_stride,
                           const typename P::Element* b, int64_t b_stride, typename P::Sum* c, int64_t c_stride,
                           Finish<typename P::Sum> finish, Prefetch& ahead) {
  const int64_t a_step = layout == Layout::kRowMajor ? a_stride : 1;
  int64_t r = 0;
  for (; r + kRows <= rows; r += kRows) {
    ahead.step();
    multiply_tile<P, kRows, layout>(depth, a + r * a_step, a_stride, b, b_stride, c + r * c_stride, c_stride, finish);
    if (P::kDepth > 1 && finish.row_factor != nullptr) finish.row_factor += kRows;
  }
  multiply_last_rows<P, layout>(static_cast<int>(rows - r), depth, a + r * a_step, a_stride, b, b_stride,
                                c + r * c_stride, c_stride, finish);
}

}  // namespace fa::FA_ISA
