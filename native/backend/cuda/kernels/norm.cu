// RMSNorm and LayerNorm of rows, optionally of gathered rows. One CTA of fixed size a row, sums in
// a fixed order. f32 inside, one rounding at the end. Bound by launch latency at decode, by memory
// bandwidth at prefill (the second and third read of a row hit L1).
#include "backend/cuda/device/convert.cuh"
#include "backend/cuda/device/memory.cuh"
#include "backend/cuda/device/warp.cuh"
#include "backend/cuda/kernels/kernels.h"

namespace turbomind::cuda {
namespace {

constexpr int kThreads = 256;

// Calls f(column, values, count) for this thread's pieces of a row: 8 values where rows are aligned.
template <class T, bool kVector, class F>
__device__ __forceinline__ void for_row(const T* row, int columns, F&& f) {
  if constexpr (kVector) {
    for (int i = threadIdx.x * 8; i < columns; i += kThreads * 8) {
      float values[8];
      unpack8<T>(*reinterpret_cast<const uint4*>(row + i), values);
      f(i, values);
    }
  } else {
    for (int i = threadIdx.x; i < columns; i += kThreads) {
      float values[1] = {to_float(row[i])};
      f(i, values);
    }
  }
}

template <class T, bool kVector, NormKind kKind>
__global__ void __launch_bounds__(kThreads) norm_kernel(const NormArgs args) {
  __shared__ float shared[kThreads / 32];
  grid_dependency_launch();  // the GEMM after this one may fetch its weights
  grid_dependency_wait();
  const int64_t source = args.gather != nullptr ? args.gather[blockIdx.x] : blockIdx.x;
  const T* x = static_cast<const T*>(args.x) + source * args.ldx;
  T* y = static_cast<T*>(args.y) + static_cast<int64_t>(blockIdx.x) * args.ldy;
  const float inverse_columns = 1.0F / static_cast<float>(args.columns);

  float mean = 0.0F;
  if constexpr (kKind == NormKind::layer) {
    float sum = 0.0F;
    for_row<T, kVector>(x, args.columns, [&](int, auto& values) {
      for (float value : values) sum += value;
    });
    mean = cta_sum<kThreads>(sum, shared) * inverse_columns;
  }
  float squares = 0.0F;
  for_row<T, kVector>(x, args.columns, [&](int, auto& values) {
    for (float value : values) squares = fmaf(value - mean, value - mean, squares);
  });
  const float scale = rsqrtf(cta_sum<kThreads>(squares, shared) * inverse_columns + args.eps);
  for_row<T, kVector>(x, args.columns, [&](int column, auto& values) {
    constexpr int kCount = sizeof(values) / sizeof(float);
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      const float bias = args.bias != nullptr ? args.bias[column + i] : 0.0F;
      values[i] = fmaf((values[i] - mean) * scale, args.weight[column + i], bias);
    }
    if constexpr (kCount == 8) {
      *reinterpret_cast<uint4*>(y + column) = pack8<T>(values);
    } else {
      y[column] = from_float<T>(values[0]);
    }
  });
}

}  // namespace

void norm(const LaunchContext& context, DType dtype, const NormArgs& args) {
  if (args.rows == 0) return;
  const bool vector = args.columns % 8 == 0 && args.ldx % 8 == 0 && args.ldy % 8 == 0;
  visit_dtype(dtype, [&]<class T>() {
    auto* kernel =
        args.kind == NormKind::layer
            ? (vector ? norm_kernel<T, true, NormKind::layer>
                      : norm_kernel<T, false, NormKind::layer>)
            : (vector ? norm_kernel<T, true, NormKind::rms> : norm_kernel<T, false, NormKind::rms>);
    launch(kernel, {.grid = dim3(static_cast<unsigned>(args.rows)), .threads = kThreads},
           context.stream, context.programmatic, args);
  });
}

}  // namespace turbomind::cuda
