// The pass over logits that every sampled row needs, greedy or not: block maxima, the index of the
// largest, and whether all are finite. Pieces of a row go to kPieces CTAs; the last to finish
// compares their winners. Bound by reading R * V * 4 bytes.
#include "backend/cuda/device/memory.cuh"
#include "backend/cuda/kernels/kernels.h"
#include "backend/sampling_math.h"

namespace turbomind::cuda {
namespace {

constexpr int kThreads = 512;
constexpr int kPieces = 32;
constexpr int kBlocksARound = kThreads / 16;

struct Best {
  float value;
  int32_t index;  // kNotFinite beats everything, kNoTokenLeft nothing
};

__device__ Best better(Best a, Best b) {
  if (a.index == kNotFinite || b.index == kNotFinite) return {0.0F, kNotFinite};
  if (b.index < 0) return a;
  if (a.index < 0 || b.value > a.value || (b.value == a.value && b.index < a.index)) return b;
  return a;
}

__device__ Best shuffled(Best best, int offset) {
  return {__shfl_xor_sync(~0U, best.value, offset), __shfl_xor_sync(~0U, best.index, offset)};
}

// partial: [rows, kPieces]; tickets: [rows], zero between launches.
__global__ void __launch_bounds__(kThreads)
    scan_kernel(const ScanArgs args, Best* partial, uint32_t* tickets) {
  __shared__ Best shared[kThreads / 32];
  __shared__ bool last;
  grid_dependency_wait();
  grid_dependency_launch();
  const int64_t vocab = args.vocab;
  const int64_t row = blockIdx.y;
  const float* x = args.logits + row * vocab;
  const int blocks = static_cast<int>((vocab + kSumBlock - 1) / kSumBlock);
  const int piece = (blocks + kPieces - 1) / kPieces;
  const int begin = blockIdx.x * piece;
  const int end = min(blocks, begin + piece);
  const int lane = threadIdx.x % 16;
  Best best{-INFINITY, kNoTokenLeft};
  for (int round = begin; round < end; round += kBlocksARound) {
    const int block = round + static_cast<int>(threadIdx.x) / 16;
    Best mine{-INFINITY, kNoTokenLeft};
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      const int id = block * kSumBlock + 16 * j + lane;
      const float value = block < end && id < vocab ? x[id] : -INFINITY;
      if (isnan(value) || value == INFINITY) mine = {0.0F, kNotFinite};
      if (value > -INFINITY) mine = better(mine, {value, id});
    }
#pragma unroll
    for (int offset = 8; offset > 0; offset /= 2) mine = better(mine, shuffled(mine, offset));
    if (lane == 0 && block < end) {
      args.block_max[row * blocks + block] = mine.index >= 0 ? mine.value : -INFINITY;
    }
    best = better(best, mine);
  }
  best = better(best, shuffled(best, 16));
  if (threadIdx.x % 32 == 0) shared[threadIdx.x / 32] = best;
  __syncthreads();
  if (threadIdx.x == 0) {
    for (int i = 1; i < kThreads / 32; ++i) best = better(best, shared[i]);
    partial[row * kPieces + blockIdx.x] = best;
    __threadfence();
    last = atomicAdd(&tickets[row], 1U) == kPieces - 1;
  }
  __syncthreads();
  if (!last || threadIdx.x != 0) return;
  __threadfence();
  const volatile Best* pieces = partial + row * kPieces;
  best = {-INFINITY, kNoTokenLeft};
  for (int i = 0; i < kPieces; ++i) best = better(best, {pieces[i].value, pieces[i].index});
  args.ids[row] = best.index;
  args.host_ids[(args.slot != nullptr ? *args.slot : 0) * args.max_rows + row] = best.index;
  tickets[row] = 0;
}

}  // namespace

size_t scan_scratch_bytes(int max_rows) {
  return static_cast<size_t>(max_rows) * (kPieces * sizeof(Best) + sizeof(uint32_t));
}

void scan_logits(const LaunchContext& context, const ScanArgs& args, int rows) {
  if (rows == 0) return;
  TM_CHECK(rows <= args.max_rows, "a scan of %d rows, sized for %d", rows, args.max_rows);
  auto* partial = static_cast<Best*>(args.scratch);
  auto* tickets =
      reinterpret_cast<uint32_t*>(partial + static_cast<int64_t>(args.max_rows) * kPieces);
  launch(scan_kernel, {.grid = dim3(kPieces, static_cast<unsigned>(rows)), .threads = kThreads},
         context.stream, context.programmatic, args, partial, tickets);
}

}  // namespace turbomind::cuda
