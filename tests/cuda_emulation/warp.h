// A warp's meeting point, for both ways to run a block: fibres.cpp and threads.cpp.
#pragma once

#include "emulation.h"

namespace emulation {

constexpr int kWarp = 32;

// The operands of each lane, and the number of lanes that have come.
struct Warp {
  Collective which;
  const void* in[kWarp];
  void* out[kWarp];
  int arrived = 0;
  uint32_t turn = 0;

  void bring(int lane, Collective what, const void* from, void* to) {
    if (arrived > 0 && what != which) fail("lanes of a warp are at different instructions");
    which = what;
    in[lane] = from, out[lane] = to;
    ++arrived;
  }
  void perform();
};

template <typename Fn>
void for_each_block(dim3 grid, const Fn& fn) {
  for (unsigned z = 0; z < grid.z; ++z)
    for (unsigned y = 0; y < grid.y; ++y)
      for (unsigned x = 0; x < grid.x; ++x) fn(dim3(x, y, z));
}

}  // namespace emulation
