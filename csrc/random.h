// Random bits for stochastic rounding as functions of seed, step, global class id and column, the same on every device;
// python/fused_arcface/keyed.py has the same functions.
#pragma once

#include "sixteen_bit.h"

namespace fa {

// SplitMix64's number n under a key.
FA_BOTH uint64_t fold(uint64_t key, uint64_t n) {
  uint64_t x = key + (n + 1) * 0x9E3779B97F4A7C15u;
  x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9u;
  x = (x ^ (x >> 27)) * 0x94D049BB133111EBu;
  return x ^ (x >> 31);
}

// 32 random bits for a column under a row's key: lowbias32 of a counter, in 32-bit arithmetic so that loops over it
// vectorize.
FA_BOTH uint32_t random_bits(uint64_t row_key, uint32_t column) {
  uint32_t x = static_cast<uint32_t>(row_key) + column * 0x9E3779B9u;
  x = (x ^ (x >> 16)) * 0x7FEB352Du;
  x = (x ^ (x >> 15)) * 0x846CA68Bu;
  return (x ^ (x >> 16)) ^ static_cast<uint32_t>(row_key >> 32);
}

// Rounds x to bf16: up with the probability of its distance from the value below. `random` has 16 bits. Infinities and
// NaN stay.
FA_BOTH BFloat16 round_stochastically(float x, uint32_t random) {
  const uint32_t bits = float_bits(x);
  const bool finite = (bits & 0x7f800000u) != 0x7f800000u;
  return {static_cast<uint16_t>((bits + (finite ? random : 0u)) >> 16)};
}

}  // namespace fa
