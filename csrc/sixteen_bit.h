// The 16-bit floating-point types as they lie in memory, and bf16 as the upper half of an fp32. How fp16 is converted
// is each device's own: csrc/cpu/conversion.h, csrc/cuda/numbers.h.
#pragma once

#include <cstdint>
#include <cstring>

#include "host_device.h"

namespace fa {

struct BFloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};

FA_BOTH float float_of(uint32_t bits) {
  float value;
  memcpy(&value, &bits, sizeof value);
  return value;
}
FA_BOTH uint32_t float_bits(float value) {
  uint32_t bits;
  memcpy(&bits, &value, sizeof bits);
  return bits;
}

FA_BOTH float to_float(BFloat16 x) { return float_of(static_cast<uint32_t>(x.bits) << 16); }

}  // namespace fa
