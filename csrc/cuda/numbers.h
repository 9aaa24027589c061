// Numbers between memory, in any of the dtypes, and fp32; and what each precision of a product takes for its operands.
#pragma once

#include "kernels.h"
#include "ptx.h"

namespace fa::cuda {

// First: the operand of X·Wᵀ. Second: that of the products with exponentials, which need bf16's range (fp16 ends at
// 65504).
template <Precision>
struct Operands {
  using First = float;
  using Second = float;
};
template <>
struct Operands<Precision::kBFloat16> {
  using First = BFloat16;
  using Second = BFloat16;
};
template <>
struct Operands<Precision::kFloat16> {
  using First = Float16;
  using Second = BFloat16;
};
// The precision of the second products.
template <Precision precision>
constexpr Precision kSecondPrecision = precision == Precision::kFloat16 ? Precision::kBFloat16 : precision;

constexpr double kNormEpsilon = 1e-12;  // as torch.nn.functional.normalize
constexpr int kRowThreads = 256;        // of kernels that are bound by memory: eight warps hide each other's latency

// Four neighbors, moved at once where they are aligned.
template <typename T>
struct alignas(4 * sizeof(T)) Four {
  T at[4];
};

__device__ __forceinline__ float to_float(float x) { return x; }
__device__ __forceinline__ float to_float(double x) { return static_cast<float>(x); }
__device__ __forceinline__ float to_float(int8_t x) { return x; }
__device__ __forceinline__ float to_float(Float16 x) { return from_fp16(x); }

__device__ __forceinline__ void convert(float x, float* to) { *to = x; }
__device__ __forceinline__ void convert(float x, double* to) { *to = x; }
__device__ __forceinline__ void convert(float x, BFloat16* to) { *to = to_bf16(x); }
__device__ __forceinline__ void convert(float x, Float16* to) { *to = to_fp16(x); }

template <typename T>
__device__ __forceinline__ float rounded(float x) {
  T as_stored;
  convert(x, &as_stored);
  return to_float(as_stored);
}

// As a gradient. In fp16 an overflow is infinite, but for rows shorter than epsilon, which `is_short` says: their
// finite numbers saturate.
template <typename T>
__device__ __forceinline__ void convert_gradient(float x, bool, T* to) {
  convert(x, to);
}
__device__ __forceinline__ void convert_gradient(float x, bool is_short, Float16* to) {
  constexpr float kMost = 65504, kLargest = 3.402823466e38f;
  if (is_short && fabsf(x) <= kLargest) x = fminf(fmaxf(x, -kMost), kMost);
  convert(x, to);
}

// A number as the second products will take it.
template <Precision precision>
__device__ __forceinline__ float rounded_operand(float x) {
  if constexpr (kSecondPrecision<precision> == Precision::kBFloat16) return to_float(to_bf16(x));
  if constexpr (precision == Precision::kTf32) return round_to_tf32(x);
  return x;
}

__host__ __device__ __forceinline__ bool aligned(const void* at, int bytes) {
  return reinterpret_cast<uintptr_t>(at) % static_cast<unsigned>(bytes) == 0;
}

// Up to four neighbors as fp32, zeros in place of those past `count`.
template <typename T>
__device__ __forceinline__ void load_four(const T* from, int64_t stride, int count, float (&to)[4]) {
  if (stride == 1 && count >= 4 && aligned(from, sizeof(Four<T>))) {
    const Four<T> four = *reinterpret_cast<const Four<T>*>(from);
#pragma unroll
    for (int i = 0; i < 4; ++i) to[i] = to_float(four.at[i]);
  } else {
#pragma unroll
    for (int i = 0; i < 4; ++i) to[i] = i < count ? to_float(from[i * stride]) : 0.0f;
  }
}

// Up to four neighbors from fp32, each by convert(value, T*).
template <typename T, typename Convert>
__device__ __forceinline__ void store_four(T* to, int64_t stride, int count, const float (&from)[4],
                                           const Convert& convert) {
  if (stride == 1 && count >= 4 && aligned(to, sizeof(Four<T>))) {
    Four<T> four;
#pragma unroll
    for (int i = 0; i < 4; ++i) convert(from[i], &four.at[i], i);
    *reinterpret_cast<Four<T>*>(to) = four;
  } else {
#pragma unroll
    for (int i = 0; i < 4; ++i)
      if (i < count) convert(from[i], &to[i * stride], i);
  }
}

// fn with the matrix's data under its own type. fp64 has no kernels: Python refuses it.
template <typename Fn>
__device__ __forceinline__ void visit_dtype(const Matrix& m, const Fn& fn) {
  if (m.dtype == Dtype::kFloat32)
    fn(static_cast<float*>(m.data));
  else if (m.dtype == Dtype::kBFloat16)
    fn(static_cast<BFloat16*>(m.data));
  else if (m.dtype == Dtype::kFloat16)
    fn(static_cast<Float16*>(m.data));
}

__device__ __forceinline__ float warp_sum(float x) {
#pragma unroll
  for (int mask = kWarp / 2; mask > 0; mask /= 2) x += __shfl_xor_sync(0xffffffffu, x, mask);
  return x;
}
__device__ __forceinline__ double warp_sum(double x) {
#pragma unroll
  for (int mask = kWarp / 2; mask > 0; mask /= 2) x += __shfl_xor_sync(0xffffffffu, x, mask);
  return x;
}
__device__ __forceinline__ float warp_max(float x) {
#pragma unroll
  for (int mask = kWarp / 2; mask > 0; mask /= 2) x = fmaxf(x, __shfl_xor_sync(0xffffffffu, x, mask));
  return x;
}

}  // namespace fa::cuda
