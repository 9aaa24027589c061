// Scratch memory that is kept between calls. Prints the bytes that are held after each of three things: as many of the
// largest blocks as are kept at all, blocks of many sizes, and the same blocks again.
#include <cstdio>
#include <cstdlib>
#include <new>
#include <vector>

#include "cpu/memory.h"

namespace {
size_t live = 0;  // bytes
}

void* operator new(size_t bytes, std::align_val_t align) {
  live += bytes;
  const size_t alignment = static_cast<size_t>(align);
  auto* const memory = static_cast<char*>(std::aligned_alloc(alignment, bytes / alignment * alignment + 2 * alignment));
  *reinterpret_cast<size_t*>(memory) = bytes;
  return memory + alignment;
}
void operator delete(void* memory, std::align_val_t align) noexcept {
  char* const begin = static_cast<char*>(memory) - static_cast<size_t>(align);
  live -= *reinterpret_cast<size_t*>(begin);
  std::free(begin);
}

void take_and_give(const std::vector<size_t>& sizes) {
  std::vector<void*> taken;
  for (const size_t size : sizes) taken.push_back(fa::take_scratch(size));
  for (void* const memory : taken) fa::give_scratch(memory);
  std::printf("%zu\n", live);
}

int main() {
  take_and_give(std::vector<size_t>(24, 2 << 20));
  std::vector<size_t> sizes;
  for (size_t size = 100; size < (8 << 20); size += size / 3) sizes.push_back(size);
  take_and_give(sizes);
  take_and_give(sizes);
}
