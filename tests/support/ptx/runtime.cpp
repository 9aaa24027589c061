// The CUDA runtime in the place of NVIDIA's, as far as the host code that nvcc makes of csrc/cuda calls it. A launch
// goes to a function of Python's (host.py), which runs the kernel. With csrc/cuda/bindings.cpp it is a Python module.
#include <cstdint>
#include <map>
#include <string>

#include "cuda/bindings.cpp"  // one unit, since the headers of pybind11 take seconds

namespace {

struct Size3 {  // CUDA's dim3
  unsigned x, y, z;
};

// Returns 0, or writes why the launch failed: at most `most` bytes, the last of them 0.
using Launcher = int (*)(const char* kernel, const unsigned geometry[7], void** arguments, char* why, size_t most);
Launcher launcher;

char why[4096];
int status;  // cudaError_t of the last launch
int device;

struct Function {
  std::string name;
  int most_shared = 48 << 10;  // bytes that a block may have unless it asks for more
};
std::map<const void*, Function>& functions() {  // constructors of other objects are the first to call this
  static std::map<const void*, Function> all;
  return all;
}

struct Configuration {
  Size3 grid, block;
  size_t shared;
  void* stream;
} configuration;

int run(const void* function, Size3 grid, Size3 block, void** arguments, size_t shared) {
  const Function& kernel = functions().at(function);
  const unsigned geometry[] = {grid.x, grid.y, grid.z, block.x, block.y, block.z, static_cast<unsigned>(shared)};
  why[0] = 0;
  if (shared > static_cast<size_t>(kernel.most_shared)) {
    std::snprintf(why, sizeof why, "%zu bytes of shared memory, %d allowed", shared, kernel.most_shared);
    return status = 1;
  }
  return status = launcher(kernel.name.c_str(), geometry, arguments, why, sizeof why);
}

}  // namespace

extern "C" {

__attribute__((visibility("default"))) void set_launcher(Launcher to) { launcher = to; }
__attribute__((visibility("default"))) int* current_device() { return &device; }

void** __cudaRegisterFatBinary(void*) { return nullptr; }
void __cudaRegisterFatBinaryEnd(void**) {}
void __cudaUnregisterFatBinary(void**) {}
char __cudaInitModule(void**) { return 1; }
void __cudaRegisterFunction(void**, const char* host, char*, const char* name, int, void*, void*, void*, void*, int*) {
  functions()[host].name = name;
}
unsigned __cudaPushCallConfiguration(Size3 grid, Size3 block, size_t shared, void* stream) {
  configuration = {grid, block, shared, stream};
  return 0;
}
int __cudaPopCallConfiguration(Size3* grid, Size3* block, size_t* shared, void* stream) {
  *grid = configuration.grid, *block = configuration.block, *shared = configuration.shared;
  *static_cast<void**>(stream) = configuration.stream;
  return 0;
}
int cudaLaunchKernel(const void* function, Size3 grid, Size3 block, void** arguments, size_t shared, void*) {
  return run(function, grid, block, arguments, shared);
}
int __cudaGetKernel(const void** kernel, const void* function) { return *kernel = function, 0; }
int __cudaLaunchKernel(const void* kernel, Size3 grid, Size3 block, void** arguments, size_t shared, void*) {
  return run(kernel, grid, block, arguments, shared);
}
int cudaFuncSetAttribute(const void* function, int attribute, int value) {
  constexpr int kMaxDynamicSharedMemorySize = 8;
  if (attribute == kMaxDynamicSharedMemorySize) functions().at(function).most_shared = value;
  return attribute == kMaxDynamicSharedMemorySize ? 0 : 1;
}
// As without a driver.
int cudaDriverGetVersion(int* version) { return *version = 0, 0; }
int cudaRuntimeGetVersion(int* version) { return *version = 13000, 0; }
int cudaFuncGetAttributes(void*, const void*) {
  std::snprintf(why, sizeof why, "CUDA driver version is insufficient for CUDA runtime version");
  return status = 35;
}
int cudaGetLastError() {
  const int last = status;
  status = 0;
  return last;
}
const char* cudaGetErrorString(int) { return why; }
int cudaGetDevice(int* which) { return *which = device, 0; }
int cudaSetDevice(int which) { return device = which, 0; }
}

PYBIND11_MODULE(cuda_in_ptx, m) { fa::cuda::bind(m); }
