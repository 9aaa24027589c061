/* A CUDA driver without a device: what Triton's launcher calls, with the answers of an H100. A launch is counted and
   checked against the device's limits; nothing runs. Numbers are those of cuda.h. */
#include <stdio.h>
#include <string.h>

typedef int Result;
enum { SUCCESS = 0, INVALID_VALUE = 1 };
enum {
  MAX_SHARED_MEMORY_PER_BLOCK = 8,
  WARP_SIZE = 10,
  MAX_REGISTERS_PER_BLOCK = 12,
  CLOCK_RATE = 13,
  MULTIPROCESSOR_COUNT = 16,
  MEMORY_CLOCK_RATE = 36,
  GLOBAL_MEMORY_BUS_WIDTH = 37,
  MAX_SHARED_MEMORY_PER_MULTIPROCESSOR = 81,
  MAX_REGISTERS_PER_MULTIPROCESSOR = 82,
  MAX_SHARED_MEMORY_PER_BLOCK_OPTIN = 97,
};
enum { MOST_SHARED_MEMORY = 232448 };

static long launches, modules;

long stub_launches(void) { return launches; }
long stub_modules(void) { return modules; }

Result cuInit(unsigned flags) { return SUCCESS; }
Result cuDriverGetVersion(int* version) { return *version = 13000, SUCCESS; }
Result cuGetErrorString(Result error, const char** text) { return *text = "refused by the stub", SUCCESS; }
Result cuDeviceGet(int* device, int index) { return *device = index, SUCCESS; }
Result cuDeviceGetAttribute(int* value, int attribute, int device) {
  switch (attribute) {
    case MAX_SHARED_MEMORY_PER_BLOCK:
      *value = 49152;
      break;
    case WARP_SIZE:
      *value = 32;
      break;
    case MAX_REGISTERS_PER_BLOCK:
      *value = 65536;
      break;
    case CLOCK_RATE:
      *value = 1755000;
      break;
    case MULTIPROCESSOR_COUNT:
      *value = 132;
      break;
    case MEMORY_CLOCK_RATE:
      *value = 2619000;
      break;
    case GLOBAL_MEMORY_BUS_WIDTH:
      *value = 5120;
      break;
    case MAX_SHARED_MEMORY_PER_MULTIPROCESSOR:
      *value = 233472;
      break;
    case MAX_REGISTERS_PER_MULTIPROCESSOR:
      *value = 65536;
      break;
    case MAX_SHARED_MEMORY_PER_BLOCK_OPTIN:
      *value = MOST_SHARED_MEMORY;
      break;
    default:
      *value = 0;
  }
  return SUCCESS;
}
Result cuDevicePrimaryCtxRetain(void** context, int device) { return *context = (void*)1, SUCCESS; }
Result cuCtxGetCurrent(void** context) { return *context = (void*)1, SUCCESS; }
Result cuCtxGetDevice(int* device) { return *device = 0, SUCCESS; }
Result cuStreamIsCapturing(void* stream, int* status) { return *status = 0, SUCCESS; }
Result cuCtxSetCurrent(void* context) { return SUCCESS; }
Result cuCtxGetLimit(size_t* size, int limit) { return *size = 0, SUCCESS; }
Result cuCtxSetLimit(int limit, size_t size) { return SUCCESS; }
Result cuModuleLoadData(void** module, const void* image) { return ++modules, *module = (void*)image, SUCCESS; }
Result cuModuleUnload(void* module) { return SUCCESS; }
Result cuModuleGetFunction(void** function, void* module, const char* name) {
  return *function = strdup(name), SUCCESS;
}
Result cuFuncGetAttribute(int* value, int attribute, void* function) {
  return *value = attribute == 0 ? 1024 : 0, SUCCESS; /* 0: most threads a block */
}
Result cuFuncSetAttribute(void* function, int attribute, int value) { return SUCCESS; }
Result cuFuncSetCacheConfig(void* function, int config) { return SUCCESS; }
Result cuOccupancyMaxActiveClusters(int* count, void* function, const void* config) { return *count = 1, SUCCESS; }
Result cuTensorMapEncodeTiled(void) { return SUCCESS; }
Result cuTensorMapEncodeIm2col(void) { return SUCCESS; }
Result cuPointerGetAttribute(void* value, int attribute, unsigned long long pointer) {
  return *(unsigned long long*)value = pointer, SUCCESS;
}
Result cuPointerGetAttributes(unsigned count, int* attributes, void** values, unsigned long long pointer) {
  for (unsigned i = 0; i < count; ++i) *(unsigned long long*)values[i] = pointer;
  return SUCCESS;
}

typedef struct {
  unsigned grid_x, grid_y, grid_z, block_x, block_y, block_z, shared_bytes;
  void* stream;
  void* attributes;
  unsigned attribute_count;
} LaunchConfig;

Result cuLaunchKernelEx(const LaunchConfig* config, void* function, void** parameters, void** extra) {
  const int fits = config->grid_x <= 2147483647u && config->grid_y <= 65535 && config->grid_z <= 65535 &&
                   config->block_x <= 1024 && config->shared_bytes <= MOST_SHARED_MEMORY;
  if (!fits)
    fprintf(stderr, "%s: grid %u %u %u, %u threads, %u bytes of shared memory\n", (char*)function, config->grid_x,
            config->grid_y, config->grid_z, config->block_x, config->shared_bytes);
  ++launches;
  return fits ? SUCCESS : INVALID_VALUE;
}
