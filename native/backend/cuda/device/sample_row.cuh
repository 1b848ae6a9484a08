// A row of logits that is sampled, and its CTA's memory: passes over its blocks of kSumBlock logits, and
// the sums in the order that sampling_math.h fixes. All threads of the CTA call what synchronises.
#pragma once

#include <cmath>

#include "backend/cuda/kernels/kernels.h"
#include "backend/sampling_math.h"

namespace turbomind::cuda::sampling {

inline constexpr int kThreads = 1024;
inline constexpr int kWarps = kThreads / 32;
inline constexpr int kMaxGroups = 128;  // of kSumGroup * kSumBlock tokens
inline constexpr int kHashSlots = 8192;
inline constexpr int kUnroll = 4;
inline constexpr uint32_t kEmpty = ~0U;
static_assert(kMaxSampleVocab <= kMaxGroups * kSumGroup * kSumBlock);
static_assert(kMaxSampleCompletion <= kHashSlots * 3 / 4 && kMaxBestTokens <= kThreads);

// Memory that one phase uses at a time.
union Scratch {
  uint32_t seen[kMaxSampleVocab / 32];  // a bit a token
  struct {
    uint32_t keys[kHashSlots];
    uint32_t counts[kHashSlots];
  } hash;
  struct {
    double shares[kRadixBins];
    uint32_t low[kRadixBins];  // sums of the low 12 bits of mantissas, or counts
    uint32_t high[kRadixBins];
    uint64_t best[kMaxBestTokens];  // (ordered logit, ~id), best first once sorted
    float best_share[kMaxBestTokens];
  } select;
};

struct Shared {
  Scratch scratch;
  double group_sum[kMaxGroups];
  double warp_double[kWarps];
  double total;
  double base;
  float values[kSumBlock];
  float warp_float[kWarps];
  uint32_t touched[kMaxSampleVocab / kSumBlock / 32];  // a bit a block
  int counter;
  int rank;
  int token;
  int bad;
  int warp_int[kWarps];
};

// One row and the CTA's memory for it.
struct Row {
  float* x;  // [vocab]
  int vocab;
  int blocks;
  float* block_max;  // shared
  float* block_sum;  // shared
  Shared* s;
};

__device__ __forceinline__ float minus_infinity() { return -INFINITY; }

// Order of floats as unsigned integers; -0 equals +0.
__device__ __forceinline__ uint32_t ordered(float value) {
  const uint32_t bits = __float_as_uint(value + 0.0F);
  return (bits & 0x80000000U) != 0 ? ~bits : bits | 0x80000000U;
}
__device__ __forceinline__ float from_ordered(uint32_t key) {
  return __uint_as_float((key & 0x80000000U) != 0 ? key & 0x7fffffffU : ~key);
}

// Calls use(block, active, values) for the blocks that `skip` leaves: 16 lanes a block, lane t having
// values t, t + 16, t + 32, t + 48 of it, `pad` past the end. All lanes of a warp call use together.
template <class Skip, class Use>
__device__ __forceinline__ void for_each_block(const Row& row, const float* x, float pad, Skip skip,
                                               Use use) {
  const int lane = threadIdx.x % 16;
  const int first = threadIdx.x / 16;  // of 2 * kWarps
  const int rounds = (row.blocks + 2 * kWarps - 1) / (2 * kWarps);
  for (int round = 0; round < rounds; round += kUnroll) {
    float values[kUnroll][4];
    bool active[kUnroll];
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      const int block = first + (round + u) * 2 * kWarps;
      active[u] = block < row.blocks && !skip(block);
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const int i = block * kSumBlock + 16 * j + lane;
        values[u][j] = active[u] && i < row.vocab ? x[i] : pad;
      }
    }
    __syncwarp();  // `use` may write what `skip` read
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      if (__any_sync(~0U, active[u])) {
        use(first + (round + u) * 2 * kWarps, active[u], values[u]);
      }
    }
  }
}

__device__ __forceinline__ float half_warp_max(float value) {
#pragma unroll
  for (int offset = 8; offset > 0; offset /= 2) {
    value = fmaxf(value, __shfl_xor_sync(~0U, value, offset));
  }
  return value;
}

// The sum of a block in the order of sampling_math.h; lane 0 of the half warp stores it.
__device__ __forceinline__ float block_sum(const float (&v)[4]) {
  float q = (v[0] + v[1]) + (v[2] + v[3]);
#pragma unroll
  for (int offset = 8; offset > 0; offset /= 2) q += __shfl_xor_sync(~0U, q, offset);
  return q;
}

// row.block_sum to group sums and the total. Ends synchronised.
inline __device__ double add_groups(const Row& row) {
  __syncthreads();
  const int groups = (row.blocks + kSumGroup - 1) / kSumGroup;
  if (static_cast<int>(threadIdx.x) < groups) {
    const int begin = threadIdx.x * kSumGroup;
    const int end = min(row.blocks, begin + kSumGroup);
    double sum = 0.0;
    for (int i = begin; i < end; ++i) sum += row.block_sum[i];
    row.s->group_sum[threadIdx.x] = sum;
  }
  __syncthreads();
  if (threadIdx.x == 0) {
    double total = 0.0;
    for (int g = 0; g < groups; ++g) total += row.s->group_sum[g];
    row.s->total = total;
  }
  __syncthreads();
  return row.s->total;
}

// Sums of exp((x - max) / temperature).
inline __device__ double exponentials(const Row& row, float max, float temperature) {
  __syncthreads();
  for_each_block(
      row, row.x, minus_infinity(), [](int) { return false; },
      [&](int block, bool active, float(&v)[4]) {
#pragma unroll
        for (float& value : v) value = exp_nonpositive((value - max) / temperature);
        const float sum = block_sum(v);
        if (active && threadIdx.x % 16 == 0) row.block_sum[block] = sum;
      });
  return add_groups(row);
}

// Of block_max, to all threads.
inline __device__ float largest(const Row& row) {
  float max = minus_infinity();
  for (int i = threadIdx.x; i < row.blocks; i += kThreads) max = fmaxf(max, row.block_max[i]);
#pragma unroll
  for (int offset = 16; offset > 0; offset /= 2) {
    max = fmaxf(max, __shfl_xor_sync(~0U, max, offset));
  }
  if (threadIdx.x % 32 == 0) row.s->warp_float[threadIdx.x / 32] = max;
  __syncthreads();
  max = row.s->warp_float[0];
  for (int i = 1; i < kWarps; ++i) max = fmaxf(max, row.s->warp_float[i]);
  __syncthreads();
  return max;
}

}  // namespace turbomind::cuda::sampling
