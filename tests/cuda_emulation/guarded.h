// Memory that ends at an unmapped page and begins not far behind another: an access past it is a crash.
#pragma once

#include <sys/mman.h>
#include <unistd.h>

#include <cstring>

#include "emulation.h"

namespace emulation {

class GuardedMemory {
 public:
  explicit GuardedMemory(int64_t bytes) : bytes_((bytes + 127) / 128 * 128) {
    const int64_t page = sysconf(_SC_PAGESIZE), inner = (bytes_ + page - 1) / page * page;
    mapped_ = inner + 2 * page;
    const int flags = MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE;
    void* const base = mmap(nullptr, mapped_, PROT_NONE, flags, -1, 0);
    base_ = static_cast<char*>(base);
    if (base == MAP_FAILED || mprotect(base_ + page, inner, PROT_READ | PROT_WRITE) != 0) fail("out of memory");
    start_ = base_ + page + inner - bytes_;
  }
  ~GuardedMemory() { munmap(base_, mapped_); }
  GuardedMemory(const GuardedMemory&) = delete;
  GuardedMemory& operator=(const GuardedMemory&) = delete;
  char* start() const { return start_; }
  void poison() const { std::memset(start_, 0xff, bytes_); }

 private:
  int64_t bytes_, mapped_;
  char *base_, *start_;
};

}  // namespace emulation
