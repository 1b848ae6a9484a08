// Reductions inside a warp and a CTA, in a fixed order so that a row's result never depends on what
// runs beside it. Device only.
#pragma once

#include <cuda_runtime.h>

namespace turbomind::cuda {

__device__ __forceinline__ float warp_sum(float value) {
#pragma unroll
  for (int offset = 16; offset > 0; offset /= 2) value += __shfl_xor_sync(~0U, value, offset);
  return value;
}

// Sum over the four lanes that hold one row of an mma accumulator.
__device__ __forceinline__ float quad_sum(float value) {
  value += __shfl_xor_sync(~0U, value, 1);
  return value + __shfl_xor_sync(~0U, value, 2);
}
__device__ __forceinline__ float quad_max(float value) {
  value = fmaxf(value, __shfl_xor_sync(~0U, value, 1));
  return fmaxf(value, __shfl_xor_sync(~0U, value, 2));
}

// Sum over a CTA of kThreads; every thread gets it. `shared`: kThreads / 32 floats.
template <int kThreads>
__device__ __forceinline__ float cta_sum(float value, float* shared) {
  constexpr int kWarps = kThreads / 32;
  value = warp_sum(value);
  __syncthreads();  // `shared` may still be read from an earlier sum
  if (threadIdx.x % 32 == 0) shared[threadIdx.x / 32] = value;
  __syncthreads();
  float total = 0.0F;
#pragma unroll
  for (int i = 0; i < kWarps; ++i) total += shared[i];
  return total;
}

// 2^x with denormals flushed: one MUFU operation, relative error about 2^-22.
__device__ __forceinline__ float fast_exp2(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

}  // namespace turbomind::cuda
