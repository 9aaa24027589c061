// The functions of csrc/cuda/ptx.h in C++, which includes this file; what they mean is said there.
#pragma once

#include <cmath>

#include "emulation.h"

namespace fa::cuda {

inline char* dynamic_shared() { return emulation::self().shared; }

// The destination is NaN until a wait, so that reading it too early shows; a race with it is one from here on.
inline void copy_async(char* shared, const char* global) {
  if (reinterpret_cast<uintptr_t>(shared) % 16 != 0 || reinterpret_cast<uintptr_t>(global) % 16 != 0)
    emulation::fail("copy_async: an address that is no multiple of 16");
  std::memset(shared, 0xff, 16);
  emulation::self().open_copies.push_back({shared, global});
}
inline void copy_commit() {
  emulation::Thread& thread = emulation::self();
  thread.committed_copies.push_back(std::move(thread.open_copies));
  thread.open_copies.clear();
}
template <int pending>
inline void copy_wait() {
  auto& groups = emulation::self().committed_copies;
  while (groups.size() > pending) {
    for (const emulation::Copy& copy : groups.front()) std::memcpy(copy.to, copy.from, 16);
    groups.pop_front();
  }
}

inline void load_matrices_as(emulation::Collective which, uint32_t (&to)[4], const char* row) {
  if (reinterpret_cast<uintptr_t>(row) % 16 != 0) emulation::fail("load_matrices: a row that is not aligned");
  emulation::MatrixRow in{reinterpret_cast<uintptr_t>(row), {}};
  std::memcpy(in.bytes, row, 16);
  emulation::collective(which, &in, to);
}
inline void load_matrices(uint32_t (&to)[4], const char* row) {
  load_matrices_as(emulation::Collective::kMatrices, to, row);
}
inline void load_matrices_transposed(uint32_t (&to)[4], const char* row) {
  load_matrices_as(emulation::Collective::kMatricesTransposed, to, row);
}

inline void mma_as(emulation::Collective which, float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  const emulation::MmaIn in{{a[0], a[1], a[2], a[3]}, {b[0], b[1]}, {d[0], d[1], d[2], d[3]}};
  emulation::collective(which, &in, d);
}
inline void mma_bf16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  mma_as(emulation::Collective::kMmaBFloat16, d, a, b);
}
inline void mma_fp16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  mma_as(emulation::Collective::kMmaFloat16, d, a, b);
}
inline void mma_tf32(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  mma_as(emulation::Collective::kMmaTf32, d, a, b);
}

inline float round_to_tf32(float x) {
  const uint32_t bits = __float_as_uint(x);
  return (bits & 0x7f800000u) == 0x7f800000u ? x : __uint_as_float((bits + 0x1000u) & 0xffffe000u);
}

inline float exp2_approximate(float x) {
  const float result = std::exp2(x);
  return result < 0x1p-126f ? 0.0f : result;  // NaN stays
}

inline BFloat16 to_bf16(float x) {
  const uint32_t bits = __float_as_uint(x);
  const bool nan = (bits & 0x7fffffffu) > 0x7f800000u;
  return {static_cast<uint16_t>(nan ? 0x7fffu : (bits + 0x7fffu + (bits >> 16 & 1u)) >> 16)};
}
inline Float16 to_fp16(float x) {
  const _Float16 half = static_cast<_Float16>(x);
  Float16 result;
  std::memcpy(&result, &half, sizeof result);
  return result;
}
inline float from_fp16(Float16 x) {
  _Float16 half;
  std::memcpy(&half, &x, sizeof half);
  return half;
}

}  // namespace fa::cuda
