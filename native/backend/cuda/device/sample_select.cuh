// Selection in a row: the k-th largest by radix digits, the first ids of some value, the best k in order.
// All threads of the CTA call each function.
#pragma once

#include "backend/cuda/device/sample_row.cuh"

namespace turbomind::cuda::sampling {

// The first place, from the highest bin down, where stop(sum of the shares above it, its share) holds;
// else bin 0. `sum_above` gets the sum there, which must be exact in any order. All threads call it.
template <class T, class Stop>
__device__ int find_bin(Shared& s, const T* shares, int bins, T* warp_sums, T* sum_above,
                        Stop stop) {
  constexpr int kPer = kRadixBins / kThreads;
  static_assert(kPer == 2);
  const int lane = threadIdx.x % 32;
  const int warp = threadIdx.x / 32;
  const int first = bins - 1 - 2 * static_cast<int>(threadIdx.x);
  const T a = first >= 0 ? shares[first] : T{0};
  const T b = first >= 1 ? shares[first - 1] : T{0};
  T inclusive = a + b;
#pragma unroll
  for (int offset = 1; offset < 32; offset *= 2) {
    const T below = __shfl_up_sync(~0U, inclusive, offset);
    if (lane >= offset) inclusive += below;
  }
  if (threadIdx.x == 0) s.rank = bins - 1;
  if (lane == 31) warp_sums[warp] = inclusive;
  __syncthreads();
  T before = inclusive - (a + b);
  for (int i = 0; i < warp; ++i) before += warp_sums[i];
  const int rank = 2 * static_cast<int>(threadIdx.x);
  if (rank < bins && stop(before, a)) atomicMin(&s.rank, rank);
  if (rank + 1 < bins && stop(before + a, b)) atomicMin(&s.rank, rank + 1);
  __syncthreads();
  const int found = s.rank;
  if (found == rank) warp_sums[0] = before;
  if (found == rank + 1) warp_sums[0] = before + a;
  __syncthreads();
  *sum_above = warp_sums[0];
  __syncthreads();
  return bins - 1 - found;
}

struct Threshold {
  uint32_t key = 0;  // ordered bits of the k-th largest
  int greater = 0;   // values above it
  int equal = 0;
};

// for_each(add) must call add(ordered value) for all values, at least k of them.
template <class ForEach>
__device__ Threshold kth_largest(Shared& s, int k, ForEach for_each) {
  Threshold result;
  int need = k;
  uint32_t known = 0;
  uint32_t* counts = s.scratch.select.low;
  for (int d = 0; d < kNumRadixDigits; ++d) {
    const RadixDigit digit = radix_digit(d);
    __syncthreads();
    for (int i = threadIdx.x; i < kRadixBins; i += kThreads) counts[i] = 0;
    __syncthreads();
    const uint32_t bins = 1U << digit.bits;
    for_each([&](uint32_t key) {
      if ((key & known) == result.key) atomicAdd(&counts[(key >> digit.shift) & (bins - 1)], 1U);
    });
    __syncthreads();
    int above = 0;
    const int bin =
        find_bin(s, reinterpret_cast<const int*>(counts), static_cast<int>(bins), s.warp_int,
                 &above, [&](int before, int share) { return before + share >= need; });
    need -= above;
    result.key |= static_cast<uint32_t>(bin) << digit.shift;
    known |= (bins - 1) << digit.shift;
    result.equal = static_cast<int>(counts[bin]);
  }
  result.greater = k - need;
  return result;
}

// Calls found(id) in thread 0 for the first `count` values from block `begin` on for which is(value), in
// the order of ids. `skip` is for blocks without any. Rarely walks far: it is for equal values.
template <class Skip, class Is, class Found>
__device__ void first_ids(const Row& row, int begin, long long count, Skip skip, Is is,
                          Found found) {
  if (threadIdx.x >= 32) return;
  long long seen = 0;
  for (int block = begin; block < row.blocks && seen < count; ++block) {
    if (skip(block)) continue;
    for (int half = 0; half < 2; ++half) {
      const int i = block * kSumBlock + half * 32 + threadIdx.x;
      uint32_t votes = __ballot_sync(~0U, i < row.vocab && is(row.x[i]));
      for (; votes != 0 && seen < count; votes &= votes - 1, ++seen) {
        if (threadIdx.x == 0) found(block * kSumBlock + half * 32 + __ffs(votes) - 1);
      }
    }
  }
}

// The k best of the row to select.best, best first, ties by lower id. Needs block_max.
inline __device__ void select_best(const Row& row, int k) {
  Shared& s = *row.s;
  uint32_t least = 0;
  if (row.blocks >= k) {
    least = kth_largest(s, k, [&](auto add) {
              for (int i = threadIdx.x; i < row.blocks; i += kThreads)
                add(ordered(row.block_max[i]));
            }).key;
  }
  const auto skip = [&](int block) { return ordered(row.block_max[block]) < least; };
  const auto for_each_key = [&](auto use) {
    for_each_block(row, row.x, 0.0F, skip, [&](int block, bool active, const float(&v)[4]) {
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const int id = block * kSumBlock + 16 * j + threadIdx.x % 16;
        if (active && id < row.vocab) use(ordered(v[j]), id);
      }
    });
  };
  const Threshold threshold =
      kth_largest(s, k, [&](auto add) { for_each_key([&](uint32_t key, int) { add(key); }); });
  uint64_t* best = s.scratch.select.best;
  int padded = 1;
  while (padded < k) padded *= 2;
  if (threadIdx.x == 0) s.counter = 0;
  if (static_cast<int>(threadIdx.x) < padded) best[threadIdx.x] = 0;
  __syncthreads();
  const int ties = k - threshold.greater;
  const bool all_ties = threshold.equal == ties;
  const auto put = [&](uint32_t key, int id) {
    best[atomicAdd(&s.counter, 1)] =
        static_cast<uint64_t>(key) << 32 | (~0U - static_cast<uint32_t>(id));
  };
  for_each_key([&](uint32_t key, int id) {
    if (key > threshold.key || (all_ties && key == threshold.key)) put(key, id);
  });
  if (!all_ties) {
    first_ids(
        row, 0, ties, skip, [&](float value) { return ordered(value) == threshold.key; },
        [&](int id) { put(threshold.key, id); });
  }
  // bitonic, descending
  for (int size = 2; size <= padded; size *= 2) {
    for (int stride = size / 2; stride > 0; stride /= 2) {
      __syncthreads();
      const int i = threadIdx.x;
      const int other = i ^ stride;
      if (i < padded && other > i) {
        const bool descending = (i & size) == 0;
        const uint64_t a = best[i];
        const uint64_t b = best[other];
        if ((a < b) == descending) {
          best[i] = b;
          best[other] = a;
        }
      }
    }
  }
  __syncthreads();
}

__device__ __forceinline__ float best_logit(const Shared& s, int i) {
  return from_ordered(static_cast<uint32_t>(s.scratch.select.best[i] >> 32));
}
__device__ __forceinline__ int best_id(const Shared& s, int i) {
  return static_cast<int>(~0U - static_cast<uint32_t>(s.scratch.select.best[i]));
}

}  // namespace turbomind::cuda::sampling
