// The asynchronous part of sm_90a, beside the threads of a cluster: copies, barriers of arrivals and bytes, products of
// warpgroups. The results of copies and products are NaN until they are there. A broken rule of the PTX ISA is a
// failure:
//
// - a product reads what a thread has written without a fence; or is issued without product_fence, or not by all
// threads
// - an arrival too many, a barrier that was not made, a wait that has missed a phase
// - addresses off their alignment or outside the block's memory, a copy or an arrival at a block that has ended
// - more registers than the block has
#include "hopper.h"

#include <map>
#include <memory>
#include <random>

#include "cuda/hopper/ptx.h"
#include "fibres.h"

namespace emulation {

namespace {

constexpr int kGroup = 128, kDepth = 16;
constexpr uint32_t kBase = 1024;  // what the system keeps of a block's memory
constexpr int kEntryRegisters = 168;

struct Barrier {
  int expected = 0, pending = 0;
  int64_t bytes = 0;
  uint64_t completed = 0;
};

struct Block {
  std::map<uint32_t, Barrier> barriers;
  std::vector<int> unfenced;  // by 16 bytes: the thread that wrote them, or -1
  int pool = 0;               // registers that are free
};

// One product of a warpgroup, as its threads issue it.
struct Issued {
  Product of[kGroup];
  int threads = 0;
};
struct Group {
  std::vector<Issued> products;
  size_t executed = 0;
};

// The accumulators of one thread while products that it has not waited for are under way.
struct Flight {
  float* d;
  std::vector<float> truth;
};
struct ThreadState {
  size_t issued = 0, committed = 0;
  bool fenced = false;
  std::vector<Flight> flights;
};

int chosen = -1, launches = 0;
Schedule schedule = kSchedules[0];
std::mt19937 random_bits;
std::vector<Block> blocks;
std::vector<Group> groups;
std::vector<ThreadState> states;
std::vector<std::function<void()>> copies;
int memory_bytes = 0;

Block& mine() { return blocks[self().rank]; }
ThreadState& my_state() { return states[number_in_cluster()]; }
char* aligned_start(int rank) {
  return reinterpret_cast<char*>(reinterpret_cast<uintptr_t>(shared_of(rank)) / 1024 * 1024);
}
char* at(int rank, uint32_t address, int64_t bytes) {
  char* const to = aligned_start(rank) + (address - kBase);
  if (address < kBase || to < shared_of(rank) || to + bytes > shared_of(rank) + memory_bytes)
    fail("an address outside the block's shared memory");
  return to;
}
size_t grain(uint32_t address) { return (address - kBase) / 16; }

Barrier& barrier_at(int rank, uint32_t address) {
  if (address % 8 != 0) fail("a barrier off its alignment");
  if (rank < 0 || rank >= static_cast<int>(blocks.size())) fail("a block that the cluster does not have");
  if (has_ended(rank)) fail("a copy or an arrival at a block that has ended");
  const auto found = blocks[rank].barriers.find(address);
  if (found == blocks[rank].barriers.end()) fail("a barrier that was not made");
  return found->second;
}
void complete(Barrier& barrier) {
  if (barrier.pending != 0 || barrier.bytes != 0) return;
  barrier.pending = barrier.expected;
  ++barrier.completed;
}

using Bytes = std::shared_ptr<std::vector<char>>;

void put(unsigned to_blocks, uint32_t to, const Bytes& bytes, uint32_t barrier, bool there) {
  for (int rank = 0; rank < static_cast<int>(blocks.size()); ++rank) {
    if ((to_blocks >> rank & 1) == 0) continue;
    char* const memory = at(rank, to, static_cast<int64_t>(bytes->size()));
    for (size_t i = 0; i < bytes->size(); i += 16) blocks[rank].unfenced[grain(to + static_cast<uint32_t>(i))] = -1;
    if (!there) {
      std::memset(memory, 0xff, bytes->size());
      continue;
    }
    std::memcpy(memory, bytes->data(), bytes->size());
    Barrier& arrived = barrier_at(rank, barrier);
    arrived.bytes -= static_cast<int64_t>(bytes->size());
    complete(arrived);
  }
}

void start_copy(unsigned to_blocks, uint32_t to, const Bytes& bytes, uint32_t barrier) {
  if (to_blocks >> blocks.size() != 0) fail("a copy to a block that the cluster does not have");
  for (int rank = 0; rank < static_cast<int>(blocks.size()); ++rank)
    if ((to_blocks >> rank & 1) != 0) barrier_at(rank, barrier);
  if (schedule.copies == When::kEarly) return put(to_blocks, to, bytes, barrier, true);
  put(to_blocks, to, bytes, barrier, false);
  copies.push_back([=] { put(to_blocks, to, bytes, barrier, true); });
}

float from_bf16(uint16_t bits) { return __uint_as_float(static_cast<uint32_t>(bits) << 16); }

// The operand's number at (row or column `i`, depth `k`), by its descriptor.
float number(int rank, uint64_t descriptor, bool by_depth, int i, int k) {
  if (descriptor >> 62 != 1 || (descriptor >> 49 & 7) != 0) fail("a descriptor of another swizzle than 128 bytes");
  const auto field = [&](int shift) { return static_cast<uint32_t>(descriptor >> shift & 0x3fff) << 4; };
  const uint32_t start = field(0), leading = field(16), stride = field(32);
  const uint32_t offset =
      by_depth ? i / 64 * leading + k / 8 * stride + k % 8 * 128 + i % 64 * 2 : i / 8 * stride + i % 8 * 128 + k * 2;
  const uint32_t linear = start + offset, address = linear ^ (linear >> 7 & 7) << 4;
  const char* const memory = at(rank, address, 2);
  if (blocks[rank].unfenced[grain(address)] >= 0) fail("a product reads what a thread has written without fence_async");
  uint16_t bits;
  std::memcpy(&bits, memory, 2);
  return from_bf16(bits);
}

float* truth_of(ThreadState& state, float* d) {
  for (Flight& flight : state.flights)
    if (flight.d == d) return flight.truth.data();
  fail("a product whose accumulators are not under way");
}

// Register v of thread t holds this row and column (PTX ISA, register fragments of wgmma's d; of a by kDepth).
int row_of(int t, int v) { return 16 * (t / 32) + t % 32 / 4 + 8 * (v / 2 % 2); }
int column_of(int t, int v) { return 2 * (t % 4) + v % 2 + 8 * (v / 4); }

void execute(int group, const Issued& issued) {
  const Product& first = issued.of[0];
  const int rank = group * kGroup / threads_of_block(), columns = first.columns;
  static float a[64][kDepth];
  static double b[kDepth][256];
  for (const Product& each : issued.of)
    if (each.columns != columns || (each.a_registers == nullptr) != (first.a_registers == nullptr) ||
        each.a != first.a || each.b != first.b || each.add != first.add)
      fail("threads of a warpgroup issue different products");
  if (first.a_registers != nullptr) {
    for (int t = 0; t < kGroup; ++t)
      for (int v = 0; v < 8; ++v)
        a[row_of(t, v)][column_of(t, v)] =
            from_bf16(static_cast<uint16_t>(issued.of[t].a_registers[v / 2] >> (v % 2 * 16)));
  } else {
    for (int i = 0; i < 64; ++i)
      for (int k = 0; k < kDepth; ++k) a[i][k] = number(rank, first.a, false, i, k);
  }
  for (int n = 0; n < columns; ++n)
    for (int k = 0; k < kDepth; ++k) b[k][n] = number(rank, first.b, first.b_by_depth, n, k);
  for (int t = 0; t < kGroup; ++t) {
    float* const d = truth_of(states[group * kGroup + t], issued.of[t].d);
    for (int v = 0; v < columns / 2; ++v) {
      double sum = first.add ? d[v] : 0.0;
      for (int k = 0; k < kDepth; ++k) sum += static_cast<double>(a[row_of(t, v)][k]) * b[k][column_of(t, v)];
      d[v] = toward_zero(sum);
    }
  }
}

bool can_execute(const Group& group) {
  return group.executed < group.products.size() && group.products[group.executed].threads == kGroup;
}
void execute_next(int number) {
  Group& group = groups[number];
  execute(number, group.products[group.executed]);
  ++group.executed;
}

void perform_copy(size_t i) {
  const std::function<void()> copy = copies[i];
  copies.erase(copies.begin() + static_cast<std::ptrdiff_t>(i));
  copy();
}

}  // namespace

void use_schedule(int number) { chosen = number; }
bool is_shuffled() { return schedule.shuffled; }

void begin_asynchronous(int cluster, int shared_bytes) {
  // A grid's clusters differ, too.
  schedule = kSchedules[chosen >= 0 ? chosen : launches++ % kScheduleCount];
  random_bits.seed(static_cast<unsigned>(launches));
  memory_bytes = shared_bytes;
  blocks.assign(static_cast<size_t>(cluster), Block{});
  for (Block& block : blocks) block.unfenced.assign(static_cast<size_t>(shared_bytes + 1024) / 16 + 1, -1);
  const int threads = cluster * threads_of_block();
  groups.assign(static_cast<size_t>((threads + kGroup - 1) / kGroup), Group{});
  states.assign(static_cast<size_t>(threads), ThreadState{});
  copies.clear();
}

bool step_asynchronous(bool idle) {
  if (!idle) {
    if (schedule.copies != When::kRandom || copies.empty() || random_bits() % 2 != 0) return false;
    perform_copy(random_bits() % copies.size());
    return true;
  }
  std::vector<int> ready, others;
  for (int g = 0; g < static_cast<int>(groups.size()); ++g)
    if (can_execute(groups[g])) ready.push_back(g);
  for (const int g : ready)
    if (g % 3 != schedule.starved) others.push_back(g);
  if (!others.empty() || !copies.empty()) ready = others;
  const size_t choices = copies.size() + ready.size();
  if (choices == 0) return false;
  const size_t choice = random_bits() % choices;
  if (choice < copies.size())
    perform_copy(choice);
  else
    execute_next(ready[choice - copies.size()]);
  return true;
}

void end_asynchronous() {
  if (!copies.empty()) fail("a block ends with copies under way");
  for (const Group& group : groups)
    if (group.executed != group.products.size()) fail("a block ends with products under way");
}

TensorMap encode(const void* data, int64_t rows, int64_t columns, int64_t stride) {
  const int64_t bytes = stride * 2;
  if (reinterpret_cast<uintptr_t>(data) % 16 != 0) fail("a tensor map's address is no multiple of 16");
  if (bytes % 16 != 0 || bytes <= 0 || bytes >= int64_t{1} << 40) fail("a tensor map's stride is not allowed");
  if (rows < 1 || rows > int64_t{1} << 32 || columns < 1) fail("a tensor map's size is not allowed");
  return {static_cast<const uint16_t*>(data), rows, columns, stride};
}

uint32_t shared_address(const void* at) {
  return static_cast<uint32_t>(static_cast<const char*>(at) - aligned_start(self().rank)) + kBase;
}

void barrier_init(uint64_t* barrier, int arrivals) {
  mine().barriers[shared_address(barrier)] = {arrivals, arrivals, 0, 0};
}
void barrier_expect(uint64_t* barrier, int bytes) { barrier_at(self().rank, shared_address(barrier)).bytes += bytes; }
void barrier_arrive(uint64_t* barrier, int rank) {
  Barrier& at = barrier_at(rank, shared_address(barrier));
  if (at.pending == 0) fail("more arrivals at a barrier than it expects");
  --at.pending;
  complete(at);
}
void barrier_wait(uint64_t* barrier, uint32_t parity) {
  Barrier& at = barrier_at(self().rank, shared_address(barrier));
  const uint64_t seen = at.completed;
  until([&at, parity] { return (at.completed & 1) != parity; }, "a barrier of arrivals and bytes");
  if (at.completed > seen + 1) fail("a wait that has missed a phase");
}

void copy_box(char* to, const TensorMap* map, int column, int row, uint64_t* barrier, unsigned to_blocks) {
  const uint32_t address = shared_address(to);
  if (address % 1024 != 0) fail("a box off the alignment of its swizzle");
  const auto bytes = std::make_shared<std::vector<char>>(64 * 128);
  for (int r = 0; r < 64; ++r)
    for (int c = 0; c < 64; ++c) {
      const bool inside = row + r >= 0 && row + r < map->rows && column + c >= 0 && column + c < map->columns;
      const uint16_t value = inside ? map->data[(row + r) * map->stride + column + c] : uint16_t{0};
      std::memcpy(bytes->data() + r * 128 + ((c / 8 ^ (r & 7)) << 4) + c % 8 * 2, &value, 2);
    }
  start_copy(to_blocks, address, bytes, shared_address(barrier));
}

void copy_bytes(void* to, const void* from, int count, uint64_t* barrier) {
  const uint32_t address = shared_address(to);
  if (address % 16 != 0 || reinterpret_cast<uintptr_t>(from) % 16 != 0 || count % 16 != 0)
    fail("a copy of bytes off its alignment");
  const char* const first = static_cast<const char*>(from);
  start_copy(1u << self().rank, address, std::make_shared<std::vector<char>>(first, first + count),
             shared_address(barrier));
}

// Reads the bytes, which must exist.
void prefetch_bytes(const void* from, int count) {
  if (reinterpret_cast<uintptr_t>(from) % 16 != 0 || count % 16 != 0) fail("a prefetch off its alignment");
  std::vector<char>(static_cast<const char*>(from), static_cast<const char*>(from) + count);
}

void written(const void* to, int bytes) {
  const uint32_t address = shared_address(to);
  for (int i = 0; i < bytes; i += 16) mine().unfenced[grain(address + static_cast<uint32_t>(i))] = number_in_cluster();
}
void fence_async() {
  for (int& writer : mine().unfenced)
    if (writer == number_in_cluster()) writer = -1;
}

void product_fence() { my_state().fenced = true; }

void product(const Product& product) {
  ThreadState& state = my_state();
  if (!state.fenced) fail("a product without product_fence before it");
  Flight* flight = nullptr;
  for (Flight& each : state.flights)
    if (each.d == product.d) flight = &each;
  if (flight == nullptr) {
    state.flights.push_back({product.d, std::vector<float>(product.d, product.d + product.columns / 2)});
    for (int i = 0; i < product.columns / 2; ++i) product.d[i] = NAN;
  }
  const int number = number_in_cluster() / kGroup;
  Group& group = groups[number];
  if (state.issued == group.products.size()) group.products.push_back({});
  Issued& issued = group.products[state.issued++];
  issued.of[number_in_cluster() % kGroup] = product;
  ++issued.threads;
  if (schedule.products == When::kEarly)
    while (can_execute(group)) execute_next(number);
}

void product_commit() { my_state().committed = my_state().issued; }

void product_wait() {
  ThreadState& state = my_state();
  const int number = number_in_cluster() / kGroup;
  const size_t limit = state.committed;
  until([number, limit] { return groups[number].executed >= limit; }, "a wait for products");
  if (state.issued == limit) {
    for (const Flight& flight : state.flights) std::copy(flight.truth.begin(), flight.truth.end(), flight.d);
    state.flights.clear();
  }
  state.fenced = false;
}

void change_registers(int count, bool more) {
  if (count % 8 != 0 || count < 24 || count > 256) fail("a number of registers that setmaxnreg does not take");
  if (more ? count < kEntryRegisters : count > kEntryRegisters) fail("setmaxnreg in the wrong direction");
  if (number_in_cluster() % 32 != 0) return;
  Block& block = mine();
  const int change = (more ? count - kEntryRegisters : kEntryRegisters - count) * 32;
  if (!more) {
    block.pool += change;
    return;
  }
  until([&block, change] { return block.pool >= change; }, "registers of the block's pool");
  block.pool -= change;
}

}  // namespace emulation
