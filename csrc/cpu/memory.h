// The kernels' own memory, and advice to the system about the caller's.
#pragma once

#include <cstddef>
#include <cstdint>

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include "arguments.h"

namespace fa {

// Memory for a Scratch and back. Small blocks are kept for the next call, at most 12 MiB in all: fresh memory costs a
// page fault every 4 KiB, which is what a small problem would mostly do. Any thread may call these, and a forked
// process.
void* take_scratch(size_t bytes);
void give_scratch(void* memory);

}  // namespace fa

#if defined(FA_ISA)
namespace fa::FA_ISA {

// Cache-line aligned memory, uninitialized, for the time of one call.
template <typename T>
class Scratch {
 public:
  explicit Scratch(int64_t size)
      : data_(size > 0 ? static_cast<T*>(take_scratch(sizeof(T) * static_cast<size_t>(size))) : nullptr) {}
  ~Scratch() {
    if (data_ != nullptr) give_scratch(data_);
  }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  T* get() const { return data_; }

 private:
  T* data_;
};

constexpr int64_t round_up(int64_t n, int64_t multiple) { return (n + multiple - 1) / multiple * multiple; }

// A row stride of an odd number of cache lines: successive rows then fall into different cache sets.
template <typename T>
constexpr int64_t padded_stride(int64_t columns) {
  constexpr int64_t line = 64 / sizeof(T);
  const int64_t lines = (columns + line - 1) / line;
  return (lines | 1) * line;
}

inline int64_t element_size(Dtype dtype) { return dtype == Dtype::kFloat64 ? 8 : dtype == Dtype::kFloat32 ? 4 : 2; }

// A fresh gradient of hundreds of megabytes costs a page fault every 4 KiB as it is first written, a seventh of the
// backward pass; with 2 MiB pages, which Linux gives to those who ask, nearly none. A hint: failure means nothing.
inline void advise_huge_pages(const Matrix& m) {
#if defined(MADV_HUGEPAGE)
  constexpr uintptr_t kPage = 4096;
  const uintptr_t begin = (reinterpret_cast<uintptr_t>(m.data) + kPage - 1) & ~(kPage - 1);
  const uintptr_t end =
      (reinterpret_cast<uintptr_t>(m.data) + m.rows * m.row_stride * element_size(m.dtype)) & ~(kPage - 1);
  if (end > begin + (4 << 20)) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#else
  (void)m;
#endif
}

}  // namespace fa::FA_ISA
#endif
