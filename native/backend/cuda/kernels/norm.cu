// RMSNorm and LayerNorm of rows, optionally of gathered rows. One CTA a row, its threads a function of
// the columns alone and its sums in a fixed order, so that a row has the same bits in every step. f32
// inside, one rounding at the end. A decode step waits for two of these a layer: aligned rows are held
// in registers, read once, with the weights fetched before the wait for the kernel that writes the
// row, and the next kernel is let in first of all. Bound by latency at decode, by memory bandwidth at
// prefill.
#include "backend/cuda/device/convert.cuh"
#include "backend/cuda/device/memory.cuh"
#include "backend/cuda/device/warp.cuh"
#include "backend/cuda/gemm/split_norm.cuh"
#include "backend/cuda/kernels/kernels.h"

namespace turbomind::cuda {
namespace {

constexpr int kMaxThreads = 512;
constexpr int kPlainThreads = 256;

// Sum over a CTA of whole warps, at most 32; every thread gets it. `shared`: 32 floats that no
// other sum uses.
__device__ __forceinline__ float sum_of_cta(float value, float* shared) {
  value = warp_sum(value);
  if (threadIdx.x % 32 == 0) shared[threadIdx.x / 32] = value;
  __syncthreads();
  const int lane = threadIdx.x % 32;
  return warp_sum(lane < blockDim.x / 32 ? shared[lane] : 0.0F);
}

// Rows of a multiple of 8 columns at 16-byte addresses: thread t holds pieces t, t + blockDim, ... of
// 8 values.
template <class T, NormKind kKind, int kPieces>
__global__ void __launch_bounds__(kMaxThreads) norm_kernel(const NormArgs args) {
  __shared__ float shared[2][32];
  grid_dependency_launch();
  const int pieces = args.columns / 8;
  float weight[kPieces][8];
#pragma unroll
  for (int p = 0; p < kPieces; ++p) {
    const int piece = threadIdx.x + p * blockDim.x;
#pragma unroll
    for (int i = 0; i < 8; i += 4) {
      const float4 four =
          piece < pieces ? *reinterpret_cast<const float4*>(args.weight + piece * 8 + i) : float4{};
      weight[p][i] = four.x;
      weight[p][i + 1] = four.y;
      weight[p][i + 2] = four.z;
      weight[p][i + 3] = four.w;
    }
  }
  grid_dependency_wait();

  const int64_t source = args.gather != nullptr ? args.gather[blockIdx.x] : blockIdx.x;
  const T* x = static_cast<const T*>(args.x) + source * args.ldx;
  T* y = static_cast<T*>(args.y) + static_cast<int64_t>(blockIdx.x) * args.ldy;
  const float inverse_columns = 1.0F / static_cast<float>(args.columns);
  float value[kPieces][8];
#pragma unroll
  for (int p = 0; p < kPieces; ++p) {
    const int piece = threadIdx.x + p * blockDim.x;
    const uint4 bits =
        piece < pieces ? *reinterpret_cast<const uint4*>(x + piece * 8) : uint4{0, 0, 0, 0};
    unpack8<T>(bits, value[p]);
  }
  if constexpr (kKind == NormKind::layer) {
    float sum = 0.0F;
#pragma unroll
    for (int p = 0; p < kPieces; ++p) {
#pragma unroll
      for (float x : value[p]) sum += x;
    }
    const float mean = sum_of_cta(sum, shared[0]) * inverse_columns;
#pragma unroll
    for (int p = 0; p < kPieces; ++p) {
      if (threadIdx.x + p * blockDim.x >= pieces) continue;
#pragma unroll
      for (float& x : value[p]) x -= mean;
    }
  }
  float squares = 0.0F;
#pragma unroll
  for (int p = 0; p < kPieces; ++p) {
#pragma unroll
    for (float x : value[p]) squares = fmaf(x, x, squares);
  }
  const float scale = rsqrtf(sum_of_cta(squares, shared[1]) * inverse_columns + args.eps);
#pragma unroll
  for (int p = 0; p < kPieces; ++p) {
    const int piece = threadIdx.x + p * blockDim.x;
    if (piece >= pieces) continue;
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      const float bias = args.bias != nullptr ? args.bias[piece * 8 + i] : 0.0F;
      value[p][i] = fmaf(value[p][i] * scale, weight[p][i], bias);
    }
    *reinterpret_cast<uint4*>(y + piece * 8) = pack8<T>(value[p]);
  }
}

// Any other row: three passes.
template <class T, NormKind kKind>
__global__ void __launch_bounds__(kPlainThreads) plain_norm_kernel(const NormArgs args) {
  __shared__ float shared[2][32];
  grid_dependency_launch();
  grid_dependency_wait();
  const int64_t source = args.gather != nullptr ? args.gather[blockIdx.x] : blockIdx.x;
  const T* x = static_cast<const T*>(args.x) + source * args.ldx;
  T* y = static_cast<T*>(args.y) + static_cast<int64_t>(blockIdx.x) * args.ldy;
  const float inverse_columns = 1.0F / static_cast<float>(args.columns);
  float mean = 0.0F;
  if constexpr (kKind == NormKind::layer) {
    float sum = 0.0F;
    for (int i = threadIdx.x; i < args.columns; i += kPlainThreads) sum += to_float(x[i]);
    mean = sum_of_cta(sum, shared[0]) * inverse_columns;
  }
  float squares = 0.0F;
  for (int i = threadIdx.x; i < args.columns; i += kPlainThreads) {
    const float value = to_float(x[i]) - mean;
    squares = fmaf(value, value, squares);
  }
  const float scale = rsqrtf(sum_of_cta(squares, shared[1]) * inverse_columns + args.eps);
  for (int i = threadIdx.x; i < args.columns; i += kPlainThreads) {
    const float bias = args.bias != nullptr ? args.bias[i] : 0.0F;
    y[i] = from_float<T>(fmaf((to_float(x[i]) - mean) * scale, args.weight[i], bias));
  }
}

// The factors of tokens whose norm is split between two products. Eight lanes have one.
__global__ void __launch_bounds__(kPlainThreads)
    fold_strips_kernel(const InputNorm norm, float* scales, int tokens) {
  grid_dependency_launch();
  grid_dependency_wait();
  const int t = (blockIdx.x * kPlainThreads + threadIdx.x) / 8;
  const float scale = fold_strips_of(norm, t, t < tokens);
  if (t < tokens && threadIdx.x % 8 == 0) scales[t] = scale;
}

bool aligned(const void* pointer) { return reinterpret_cast<uintptr_t>(pointer) % 16 == 0; }

template <class T, NormKind kKind>
void run(const LaunchContext& context, const NormArgs& args) {
  const bool vector = args.columns % 8 == 0 && args.ldx % 8 == 0 && args.ldy % 8 == 0 &&
                      aligned(args.x) && aligned(args.y) && aligned(args.weight);
  const int pieces = ceil_div(args.columns, 8);
  const auto run_kernel = [&](void (*kernel)(NormArgs), int threads) {
    launch(kernel, {.grid = dim3(static_cast<unsigned>(args.rows)), .threads = threads},
           context.stream, context.programmatic, args);
  };
  if (vector && pieces <= kMaxThreads / 2) {
    run_kernel(norm_kernel<T, kKind, 1>, round_up(pieces, 32));
  } else if (vector && pieces <= 2 * kMaxThreads) {
    run_kernel(norm_kernel<T, kKind, 2>, round_up(ceil_div(pieces, 2), 32));
  } else if (vector && pieces <= 4 * kMaxThreads) {
    run_kernel(norm_kernel<T, kKind, 4>, kMaxThreads);
  } else {
    run_kernel(plain_norm_kernel<T, kKind>, kPlainThreads);
  }
}

}  // namespace

void fold_strips(const LaunchContext& context, const InputNorm& norm, float* scales, int tokens) {
  const auto ctas = static_cast<unsigned>(ceil_div(tokens * 8, kPlainThreads));
  launch(fold_strips_kernel, {.grid = dim3(ctas), .threads = kPlainThreads}, context.stream,
         context.programmatic, norm, scales, tokens);
}

void norm(const LaunchContext& context, DType dtype, const NormArgs& args) {
  if (args.rows == 0) return;
  visit_dtype(dtype, [&]<class T>() {
    args.kind == NormKind::layer ? run<T, NormKind::layer>(context, args)
                                 : run<T, NormKind::rms>(context, args);
  });
}

}  // namespace turbomind::cuda
