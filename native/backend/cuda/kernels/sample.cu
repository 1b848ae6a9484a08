// Greedy sampling: the index of each row's largest logit, the lowest among equals, NaN losing to
// everything. Pieces of a row go to kPieces CTAs; the last to finish compares their winners.
// Bound by reading R * V * 4 bytes.
#include "backend/cuda/device/memory.cuh"
#include "backend/cuda/kernels/kernels.h"

namespace turbomind::cuda {
namespace {

constexpr int kThreads = 512;
constexpr int kPieces = 32;

struct Best {
  float value;
  int32_t index;
};

__device__ Best better(Best a, Best b) {
  if (b.index < 0) return a;
  if (a.index < 0 || b.value > a.value || (b.value == a.value && b.index < a.index)) return b;
  return a;
}

__device__ Best cta_best(Best best, Best* shared) {
  for (int offset = 16; offset > 0; offset /= 2) {
    const Best other{__shfl_xor_sync(~0U, best.value, offset),
                     __shfl_xor_sync(~0U, best.index, offset)};
    best = better(best, other);
  }
  if (threadIdx.x % 32 == 0) shared[threadIdx.x / 32] = best;
  __syncthreads();
  best = shared[0];
  for (int i = 1; i < static_cast<int>(blockDim.x) / 32; ++i) best = better(best, shared[i]);
  return best;
}

// partial: [rows, kPieces]; tickets: [rows], zero between launches.
__global__ void __launch_bounds__(kThreads)
    argmax_kernel(const float* logits, int64_t vocab, Best* partial, uint32_t* tickets,
                  int32_t* ids) {
  __shared__ Best shared[kThreads / 32];
  __shared__ bool last;
  grid_dependency_wait();
  grid_dependency_launch();
  const int row = blockIdx.y;
  const int64_t piece = (vocab + kPieces - 1) / kPieces;
  const int64_t begin = blockIdx.x * piece;
  const int64_t end = begin + piece < vocab ? begin + piece : vocab;
  Best best{-INFINITY, -1};
  for (int64_t i = begin + threadIdx.x; i < end; i += kThreads) {
    const float value = logits[row * vocab + i];
    if (!isnan(value)) best = better(best, {value, static_cast<int32_t>(i)});
  }
  best = cta_best(best, shared);
  if (threadIdx.x == 0) {
    partial[row * kPieces + blockIdx.x] = best;
    __threadfence();
    last = atomicAdd(&tickets[row], 1U) == kPieces - 1;
  }
  __syncthreads();
  if (!last || threadIdx.x != 0) return;
  __threadfence();
  const volatile Best* pieces = partial + row * kPieces;
  best = {-INFINITY, -1};
  for (int i = 0; i < kPieces; ++i) best = better(best, {pieces[i].value, pieces[i].index});
  ids[row] = best.index;
  tickets[row] = 0;
}

}  // namespace

size_t argmax_scratch_bytes(int max_rows) {
  return static_cast<size_t>(max_rows) * (kPieces * sizeof(Best) + sizeof(uint32_t));
}

void argmax(const LaunchContext& context, const float* logits, int rows, int64_t vocab,
            void* scratch, int max_rows, int32_t* ids) {
  if (rows == 0) return;
  TM_CHECK(rows <= max_rows, "argmax of %d rows, sized for %d", rows, max_rows);
  auto* partial = static_cast<Best*>(scratch);
  auto* tickets = reinterpret_cast<uint32_t*>(partial + static_cast<int64_t>(max_rows) * kPieces);
  launch(argmax_kernel, {.grid = dim3(kPieces, static_cast<unsigned>(rows)), .threads = kThreads},
         context.stream, context.programmatic, logits, vocab, partial, tickets, ids);
}

}  // namespace turbomind::cuda
