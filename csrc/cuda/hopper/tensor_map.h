// Tensor maps: the description of a matrix for copies of its boxes. On the host.
#pragma once

#include "block.h"

#if defined(__CUDACC__)
#include <cudaTypedefs.h>
#endif

namespace fa::cuda::hopper {

// True if tensor maps can describe the matrix: bf16 rows, aligned to 16 bytes.
inline bool is_plain(const Matrix& m) {
  return m.dtype == Dtype::kBFloat16 && m.column_stride == 1 && aligned(m.data, 16) && m.row_stride % 8 == 0 &&
         m.row_stride > 0 && m.row_stride < int64_t{1} << 38;
}

#if defined(__CUDACC__)

// The driver's function. The module is not linked with the driver, so that it can be imported without one.
inline PFN_cuTensorMapEncodeTiled_v12000 encoder() {
  void* function = nullptr;
  cudaDriverEntryPointQueryResult found{};
#if CUDART_VERSION >= 12050
  check(cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &function, 12000, cudaEnableDefault, &found),
        "cuTensorMapEncodeTiled");
#else
  check(cudaGetDriverEntryPoint("cuTensorMapEncodeTiled", &function, cudaEnableDefault, &found),
        "cuTensorMapEncodeTiled");
#endif
  if (found != cudaDriverEntryPointSuccess || function == nullptr)
    throw std::runtime_error("the driver has no cuTensorMapEncodeTiled: it must be one for CUDA 12.0 or later");
  return reinterpret_cast<PFN_cuTensorMapEncodeTiled_v12000>(function);
}

// `rows` rows of 512 bf16 numbers, `stride` numbers apart, in boxes of 64 by 64.
inline TensorMap make_map(const void* data, int64_t rows, int64_t stride) {
  static const PFN_cuTensorMapEncodeTiled_v12000 encode = encoder();
  const cuuint64_t size[2] = {kColumns, static_cast<cuuint64_t>(rows)};
  const cuuint64_t bytes[1] = {static_cast<cuuint64_t>(stride) * sizeof(BFloat16)};
  const cuuint32_t box[2] = {64, kRows}, steps[2] = {1, 1};
  TensorMap map;
  const CUresult result = encode(&map, CU_TENSOR_MAP_DATA_TYPE_BFLOAT16, 2, const_cast<void*>(data), size, bytes, box,
                                 steps, CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B,
                                 CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  if (result != CUDA_SUCCESS)
    throw std::runtime_error("cuTensorMapEncodeTiled failed with error " + std::to_string(static_cast<int>(result)));
  return map;
}

#else

inline TensorMap make_map(const void* data, int64_t rows, int64_t stride) {
  return emulation::encode(data, rows, kColumns, stride);
}

#endif

}  // namespace fa::cuda::hopper
