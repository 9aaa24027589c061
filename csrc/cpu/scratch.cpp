// See take_scratch in memory.h.
#include <atomic>
#include <new>

#include "memory.h"

namespace fa {
namespace {

// What precedes the memory handed out; as large as a cache line, so that the memory is aligned to one.
struct alignas(64) Block {
  size_t size;
};

constexpr size_t kSlots = 24;             // blocks kept
constexpr size_t kLargestKept = 2 << 20;  // bytes of a block; a large call does not notice its page faults
constexpr size_t kMostKept = 12 << 20;    // bytes of all blocks together
constexpr size_t kLeast = 4096;

// No lock: after a fork a slot holds a block or nothing, whatever the parent's threads were doing.
std::atomic<Block*> slots[kSlots];
std::atomic<size_t> kept{0};  // bytes of the blocks in the slots

Block* allocate(size_t size) {
  void* const memory = ::operator new(sizeof(Block) + size, std::align_val_t{64});
  return new (memory) Block{size};
}

void release(Block* block) { ::operator delete(block, std::align_val_t{64}); }

bool keep(Block* block) {
  const size_t size = block->size;
  if (size > kLargestKept) return false;
  if (kept.fetch_add(size, std::memory_order_relaxed) + size <= kMostKept) {
    for (auto& slot : slots) {
      Block* empty = nullptr;
      if (slot.load(std::memory_order_relaxed) == nullptr &&
          slot.compare_exchange_strong(empty, block, std::memory_order_acq_rel))
        return true;
    }
  }
  kept.fetch_sub(size, std::memory_order_relaxed);
  return false;
}

}  // namespace

void* take_scratch(size_t bytes) {
  const size_t size = bytes < kLeast ? kLeast : bytes;
  for (auto& slot : slots) {
    if (size > kLargestKept) break;
    if (slot.load(std::memory_order_relaxed) == nullptr) continue;
    Block* const block = slot.exchange(nullptr, std::memory_order_acq_rel);
    if (block == nullptr) continue;
    kept.fetch_sub(block->size, std::memory_order_relaxed);
    if (block->size >= size && block->size <= 2 * size) return block + 1;
    if (!keep(block)) release(block);
  }
  return allocate(size) + 1;
}

void give_scratch(void* memory) {
  Block* const block = static_cast<Block*>(memory) - 1;
  if (!keep(block)) release(block);
}

}  // namespace fa
