// The operations that the 32 threads of a warp do together: products, matrices to and from shared memory, shuffles,
// votes.
#include <cstdio>
#include <cstdlib>

#include "cuda/ptx.h"
#include "warp.h"

namespace emulation {

void fail(const char* why) {
  std::fprintf(stderr, "emulation: %s\n", why);
  std::abort();
}

namespace {

int64_t conflicts = 0;

float operand(Collective which, uint32_t word, int half) {
  if (which == Collective::kMmaTf32) return __uint_as_float(word & 0xffffe000u);
  const uint16_t bits = static_cast<uint16_t>(word >> (16 * half));
  return which == Collective::kMmaBFloat16 ? __uint_as_float(static_cast<uint32_t>(bits) << 16)
                                           : fa::cuda::from_fp16({bits});
}

// The fragment layouts as the PTX ISA's figures give them ("Matrix fragments for mma.m16n8k8" and "mma.m16n8k16").
void multiply(Collective which, const void* const (&in)[kWarp], void* const (&out)[kWarp]) {
  const int packed = which == Collective::kMmaTf32 ? 1 : 2,
            depth = 8 * packed;  // numbers of a register; of the product
  float a[16][16], b[16][8];
  for (int lane = 0; lane < kWarp; ++lane) {
    const MmaIn& mine = *static_cast<const MmaIn*>(in[lane]);
    const int g = lane / 4, t = lane % 4;
    for (int half = 0; half < packed; ++half) {
      for (int i = 0; i < 4; ++i)
        a[g + i % 2 * 8][t * packed + half + i / 2 * 4 * packed] = operand(which, mine.a[i], half);
      for (int i = 0; i < 2; ++i) b[t * packed + half + i * 4 * packed][g] = operand(which, mine.b[i], half);
    }
  }
  for (int lane = 0; lane < kWarp; ++lane) {
    const MmaIn& mine = *static_cast<const MmaIn*>(in[lane]);
    float result[4];
    for (int i = 0; i < 4; ++i) {
      double sum = mine.d[i];
      for (int k = 0; k < depth; ++k)
        sum += static_cast<double>(a[lane / 4 + i / 2 * 8][k]) * b[k][lane % 4 * 2 + i % 2];
      result[i] = toward_zero(sum);
    }
    std::memcpy(out[lane], result, sizeof result);
  }
}

// The eight rows of a matrix are moved at once: each of them must lie in other banks of 16 bytes.
template <typename Address>
void count_conflicts(const Address& address) {
  for (int matrix = 0; matrix < 4; ++matrix) {
    unsigned banks = 0;
    for (int r = 0; r < 8; ++r) banks |= 1u << (address(8 * matrix + r) / 16 % 8);
    if (banks != 0xff) ++conflicts;
  }
}

void load(bool transposed, const void* const (&in)[kWarp], void* const (&out)[kWarp]) {
  count_conflicts([&](int lane) { return static_cast<const MatrixRow*>(in[lane])->address; });
  for (int lane = 0; lane < kWarp; ++lane) {
    uint16_t result[4][2];
    for (int matrix = 0; matrix < 4; ++matrix)
      for (int half = 0; half < 2; ++half) {
        const int r = lane / 4, c = lane % 4 * 2 + half;
        const char* const row = static_cast<const MatrixRow*>(in[8 * matrix + (transposed ? c : r)])->bytes;
        std::memcpy(&result[matrix][half], row + 2 * (transposed ? r : c), 2);
      }
    std::memcpy(out[lane], result, sizeof result);
  }
}

void store(const void* const (&in)[kWarp]) {
  const auto of = [&](int lane) { return static_cast<const StoreIn*>(in[lane]); };
  count_conflicts([&](int lane) { return reinterpret_cast<uintptr_t>(of(lane)->row); });
  for (int matrix = 0; matrix < 4; ++matrix)
    for (int lane = 0; lane < kWarp; ++lane)
      std::memcpy(of(8 * matrix + lane / 4)->row + lane % 4 * 4, &of(lane)->words[matrix], 4);
}

void shuffle(const void* const (&in)[kWarp], void* const (&out)[kWarp]) {
  uint32_t values[kWarp];
  for (int lane = 0; lane < kWarp; ++lane)
    values[lane] = static_cast<const ShuffleIn*>(in[lane ^ static_cast<const ShuffleIn*>(in[lane])->mask])->value;
  for (int lane = 0; lane < kWarp; ++lane) std::memcpy(out[lane], &values[lane], 4);
}

void vote(const void* const (&in)[kWarp], void* const (&out)[kWarp]) {
  bool any = false;
  for (int lane = 0; lane < kWarp; ++lane) any |= *static_cast<const bool*>(in[lane]);
  for (int lane = 0; lane < kWarp; ++lane) *static_cast<bool*>(out[lane]) = any;
}

void hand_out_first(const void* const (&in)[kWarp], void* const (&out)[kWarp]) {
  const int first = *static_cast<const int*>(in[0]);
  for (int lane = 0; lane < kWarp; ++lane) *static_cast<int*>(out[lane]) = first;
}

}  // namespace

int64_t bank_conflicts() { return conflicts; }

float toward_zero(double sum) {
  const float nearest = static_cast<float>(sum);
  const bool past = std::abs(static_cast<double>(nearest)) > std::abs(sum) && std::isfinite(nearest);
  return past ? std::nextafter(nearest, 0.0f) : nearest;
}

void Warp::perform() {
  switch (which) {
    case Collective::kShuffleXor:
      shuffle(in, out);
      break;
    case Collective::kFirst:
      hand_out_first(in, out);
      break;
    case Collective::kAny:
      vote(in, out);
      break;
    case Collective::kMatrices:
      load(false, in, out);
      break;
    case Collective::kMatricesTransposed:
      load(true, in, out);
      break;
    case Collective::kStoreMatrices:
      store(in);
      break;
    default:
      multiply(which, in, out);
  }
  arrived = 0;
}

}  // namespace emulation
