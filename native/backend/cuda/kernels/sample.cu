// The pass over logits that every sampled row needs, greedy or not: block maxima, the index of the
// largest, and whether all are finite. Pieces of a row go to several CTAs, the fewer the more rows there
// are; the last to finish compares their winners and looks for the token in the winning block. Bound
// by reading R * V * 4 bytes.
#include <algorithm>

#include "backend/cuda/device/memory.cuh"
#include "backend/cuda/kernels/kernels.h"
#include "backend/sampling_math.h"

namespace turbomind::cuda {
namespace {

constexpr int kThreads = 512;
constexpr int kMaxPieces = 32;  // a lane each in the comparison at the end
constexpr int kBlocksARound = kThreads / 16;
constexpr int kRounds = 4;            // whose loads are in flight together
constexpr int kWantedCtas = 8 * 132;  // what keeps an H100 reading; a matter of speed only
static_assert(kSumBlock == 64, "four logits a lane, sixteen lanes a block");

// The largest logit of some blocks and the first block that has it. In place of a block kNotFinite beats
// everything, kNoTokenLeft nothing.
struct Best {
  float value;
  int32_t block;
};

__device__ Best better(Best a, Best b) {
  if (a.block == kNotFinite || b.block == kNotFinite) return {0.0F, kNotFinite};
  if (b.block < 0) return a;
  if (a.block < 0 || b.value > a.value || (b.value == a.value && b.block < a.block)) return b;
  return a;
}

template <int kLanes>
__device__ Best best_of_lanes(Best best) {
#pragma unroll
  for (int offset = kLanes / 2; offset > 0; offset /= 2) {
    best = better(
        best, {__shfl_xor_sync(~0U, best.value, offset), __shfl_xor_sync(~0U, best.block, offset)});
  }
  return best;
}

// Logits id to id + 3 of a row; -INFINITY past its end.
template <bool kAligned>
__device__ __forceinline__ float4 load_logits(const float* x, int64_t id, int64_t vocab) {
  if constexpr (kAligned) {
    if (id < vocab) return *reinterpret_cast<const float4*>(x + id);
    return {-INFINITY, -INFINITY, -INFINITY, -INFINITY};
  } else {
    const auto at = [&](int i) { return id + i < vocab ? x[id + i] : -INFINITY; };
    return {at(0), at(1), at(2), at(3)};
  }
}

__device__ __forceinline__ bool all_below_infinity(const float4& v) {  // false for NaN too
  return v.x < INFINITY && v.y < INFINITY && v.z < INFINITY && v.w < INFINITY;
}

// The best of blocks begin to end, on every lane of the warp's half that has read them; block maxima
// are stored.
template <bool kAligned>
__device__ Best scan_blocks(const float* x, int64_t vocab, float* block_max, int begin, int end) {
  const int group = static_cast<int>(threadIdx.x) / 16;
  const int lane = threadIdx.x % 16;
  Best best{-INFINITY, kNoTokenLeft};
  for (int first = begin; first < end; first += kBlocksARound * kRounds) {
    float4 v[kRounds];
#pragma unroll
    for (int r = 0; r < kRounds; ++r) {
      const int block = first + r * kBlocksARound + group;
      const int64_t id = static_cast<int64_t>(block) * kSumBlock + 4 * lane;
      v[r] = load_logits<kAligned>(x, block < end ? id : vocab, vocab);
    }
#pragma unroll
    for (int r = 0; r < kRounds; ++r) {
      const int block = first + r * kBlocksARound + group;
      float most = fmaxf(fmaxf(v[r].x, v[r].y), fmaxf(v[r].z, v[r].w));
      int finite = all_below_infinity(v[r]) ? 1 : 0;
#pragma unroll
      for (int offset = 8; offset > 0; offset /= 2) {
        most = fmaxf(most, __shfl_xor_sync(~0U, most, offset));
        finite &= __shfl_xor_sync(~0U, finite, offset);
      }
      if (block >= end) continue;
      if (lane == 0) block_max[block] = finite != 0 ? most : -INFINITY;
      if (finite == 0) {
        best = {0.0F, kNotFinite};
      } else if (most > -INFINITY) {
        best = better(best, {most, block});
      }
    }
  }
  return best;
}

// The token that `best` stands for: the first of its block with that logit. A whole warp calls it.
template <bool kAligned>
__device__ int32_t token_of(Best best, const float* x, int64_t vocab) {
  if (best.block < 0) return best.block;
  const int lane = threadIdx.x % 32;
  const int64_t first = static_cast<int64_t>(best.block) * kSumBlock;
  int place = kSumBlock;
#pragma unroll
  for (int i = lane; i < kSumBlock; i += 32) {
    if (first + i < vocab && x[first + i] == best.value) place = min(place, i);
  }
#pragma unroll
  for (int offset = 16; offset > 0; offset /= 2) {
    place = min(place, __shfl_xor_sync(~0U, place, offset));
  }
  return static_cast<int32_t>(first) + place;
}

// partial: [rows, pieces = gridDim.x]; tickets: [rows], zero between launches.
template <bool kAligned>
__global__ void __launch_bounds__(kThreads)
    scan_kernel(const ScanArgs args, Best* partial, uint32_t* tickets) {
  __shared__ Best shared[kThreads / 32];
  grid_dependency_wait();
  grid_dependency_launch();
  const int64_t vocab = args.vocab;
  const int64_t row = blockIdx.y;
  const float* x = args.logits + row * vocab;
  const int pieces = static_cast<int>(gridDim.x);
  const int blocks = static_cast<int>((vocab + kSumBlock - 1) / kSumBlock);
  const int piece = (blocks + pieces - 1) / pieces;
  const int begin = static_cast<int>(blockIdx.x) * piece;
  Best best = scan_blocks<kAligned>(x, vocab, args.block_max + row * blocks, begin,
                                    min(blocks, begin + piece));
  best = best_of_lanes<32>(best);
  if (threadIdx.x % 32 == 0) shared[threadIdx.x / 32] = best;
  __syncthreads();
  if (threadIdx.x >= 32) return;
  const int lane = static_cast<int>(threadIdx.x);
  best = best_of_lanes<32>(shared[lane % (kThreads / 32)]);
  if (pieces > 1) {
    bool last = false;
    if (lane == 0) {
      partial[row * pieces + blockIdx.x] = best;
      __threadfence();
      last = atomicAdd(&tickets[row], 1U) == static_cast<uint32_t>(pieces) - 1;
      __threadfence();
    }
    if (__shfl_sync(~0U, last ? 1 : 0, 0) == 0) return;
    const float2 bits =
        __ldcg(reinterpret_cast<const float2*>(partial + row * pieces + min(lane, pieces - 1)));
    best = best_of_lanes<32>({bits.x, __float_as_int(bits.y)});
  }
  const int32_t token = token_of<kAligned>(best, x, vocab);
  if (lane != 0) return;
  args.ids[row] = token;
  args.host_ids[(args.slot != nullptr ? *args.slot : 0) * args.max_rows + row] = token;
  tickets[row] = 0;
}

}  // namespace

size_t scan_scratch_bytes(int max_rows) {
  return static_cast<size_t>(max_rows) * (kMaxPieces * sizeof(Best) + sizeof(uint32_t));
}

void scan_logits(const LaunchContext& context, const ScanArgs& args, int rows) {
  if (rows == 0) return;
  TM_CHECK(rows <= args.max_rows, "a scan of %d rows, sized for %d", rows, args.max_rows);
  auto* partial = static_cast<Best*>(args.scratch);
  auto* tickets =
      reinterpret_cast<uint32_t*>(partial + static_cast<int64_t>(args.max_rows) * kMaxPieces);
  const auto pieces = static_cast<unsigned>(std::clamp(kWantedCtas / rows, 1, kMaxPieces));
  const LaunchShape shape{.grid = dim3(pieces, static_cast<unsigned>(rows)), .threads = kThreads};
  const bool aligned = args.vocab % 4 == 0 && reinterpret_cast<uintptr_t>(args.logits) % 16 == 0;
  launch(aligned ? scan_kernel<true> : scan_kernel<false>, shape, context.stream,
         context.programmatic, args, partial, tickets);
}

}  // namespace turbomind::cuda
