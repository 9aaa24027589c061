// The one place that launches a kernel and asks the CUDA runtime whether it could. Without nvcc these sources are
// ordinary C++ over tests/cuda_emulation, where the same kernels run on the CPU.
#pragma once

#if defined(__CUDACC__)
#include <cuda_runtime.h>
#else
#include "emulation.h"
#endif

#include <cstdint>
#include <stdexcept>
#include <string>

#include "kernels.h"

namespace fa::cuda {

constexpr int kWarp = 32;

#if defined(__CUDACC__)
inline void check(cudaError_t status, const char* what, const char* more = "") {
  if (status != cudaSuccess) throw std::runtime_error(std::string(what) + more + ": " + cudaGetErrorString(status));
}
#endif

// The stream's device is the current one while this lives; afterwards, and when a launch throws, the one before.
class OnDevice {
 public:
#if defined(__CUDACC__)
  explicit OnDevice(const Stream& stream) {
    check(cudaGetDevice(&before_), "cudaGetDevice");
    check(cudaSetDevice(stream.device), "cudaSetDevice");
  }
  ~OnDevice() { cudaSetDevice(before_); }

 private:
  int before_ = 0;
#else
  explicit OnDevice(const Stream&) {}
#endif
  OnDevice(const OnDevice&) = delete;
  OnDevice& operator=(const OnDevice&) = delete;
};

struct Grid {
  int64_t x, y = 1, z = 1;
  int cluster = 1;  // neighbors in x that run together: of the kernel's __cluster_dims__, for the emulation
};

template <typename... Parameters, typename... Arguments>
void launch(const char* name, void (*kernel)(Parameters...), const Grid& grid, int threads, int shared_bytes,
            const Stream& stream, const Arguments&... arguments) {
  if (grid.x == 0 || grid.y == 0 || grid.z == 0) return;
  // What the hardware's grid can count (CUDA C++ programming guide, technical specifications).
  if (grid.x > 0x7fffffff || grid.y > 0xffff || grid.z > 0xffff)
    throw std::runtime_error(std::string(name) + ": a grid of " + std::to_string(grid.x) + " x " +
                             std::to_string(grid.y) + " x " + std::to_string(grid.z) + " blocks is too large");
  const dim3 blocks(static_cast<unsigned>(grid.x), static_cast<unsigned>(grid.y), static_cast<unsigned>(grid.z));
#if defined(__CUDACC__)
  if (shared_bytes > 48 << 10)  // more than every kernel may have unasked
    check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared_bytes), name);
  kernel<<<blocks, threads, shared_bytes, static_cast<cudaStream_t>(stream.handle)>>>(arguments...);
  // An error of an earlier kernel comes up here as well, as launches are not waited for.
  check(cudaGetLastError(), name, " (or an earlier kernel)");
#else
  (void)stream;
  emulation::run(blocks, threads, shared_bytes, [&] { kernel(arguments...); }, grid.cluster);
#endif
}

constexpr int64_t ceil_div(int64_t n, int64_t of) { return (n + of - 1) / of; }
constexpr int64_t round_up(int64_t n, int64_t multiple) { return ceil_div(n, multiple) * multiple; }

}  // namespace fa::cuda
