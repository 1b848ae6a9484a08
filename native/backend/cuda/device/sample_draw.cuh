// The choice of a row's token: the largest, a draw from the best k, a draw from all. All threads of the
// CTA call each function.
#pragma once

#include "backend/cuda/device/sample_nucleus.cuh"
#include "backend/cuda/device/sample_select.cuh"

namespace turbomind::cuda::sampling {

// The lowest id whose logit is `max`, the row's largest.
inline __device__ int first_equal(const Row& row, float max) {
  Shared& s = *row.s;
  if (threadIdx.x == 0) s.rank = row.blocks;
  __syncthreads();
  for (int i = threadIdx.x; i < row.blocks; i += kThreads) {
    if (row.block_max[i] == max) atomicMin(&s.rank, i);
  }
  __syncthreads();
  first_ids(
      row, s.rank, 1, [](int) { return false; }, [&](float value) { return value == max; },
      [&](int id) { s.token = id; });
  __syncthreads();
  return s.token;
}

// With top-k: among the best k, cut by top-p and min-p in their order.
inline __device__ int draw_from_best(const Row& row, const SampleTask& task) {
  Shared& s = *row.s;
  select_best(row, task.top_k);
  const float max = best_logit(s, 0);
  float* shares = s.scratch.select.best_share;
  if (static_cast<int>(threadIdx.x) < task.top_k) {
    shares[threadIdx.x] = exp_nonpositive((best_logit(s, threadIdx.x) - max) / task.temperature);
  }
  __syncthreads();
  if (threadIdx.x == 0) {
    const int index = draw_from_shares(task.top_k, task.top_p, task.min_p,
                                       counter_uniform(task.seed, task.completion_idx),
                                       [&](int i) { return static_cast<double>(shares[i]); });
    s.token = best_id(s, index);
  }
  __syncthreads();
  return s.token;
}

// The token at `target` of the running sum of kept(logit, id), in the order of sampling_math.h: the group,
// the block, the token. Needs row.block_sum and the group sums.
template <class Kept>
__device__ __forceinline__ int draw_from_blocks(const Row& row, double target, Kept kept) {
  Shared& s = *row.s;
  if (threadIdx.x == 0) {
    double running = 0.0;
    const int groups = (row.blocks + kSumGroup - 1) / kSumGroup;
    const int group = walk_shares(groups, target, running, [&](int i) { return s.group_sum[i]; });
    const int first = group * kSumGroup;
    const int block =
        first + walk_shares(min(kSumGroup, row.blocks - first), target, running,
                            [&](int i) { return static_cast<double>(row.block_sum[first + i]); });
    s.rank = block;
    s.base = running;
  }
  __syncthreads();
  const int begin = s.rank * kSumBlock;
  if (threadIdx.x < kSumBlock) {
    const int id = begin + static_cast<int>(threadIdx.x);
    s.values[threadIdx.x] = id < row.vocab ? kept(row.x[id], id) : 0.0F;
  }
  __syncthreads();
  if (threadIdx.x == 0) {
    double running = s.base;
    s.token = begin + walk_shares(kSumBlock, target, running,
                                  [&](int i) { return static_cast<double>(s.values[i]); });
  }
  __syncthreads();
  return s.token;
}

// Without top-k: among all tokens, cut by top-p and min-p.
inline __device__ int draw_from_all(const Row& row, const SampleTask& task, float max) {
  Shared& s = *row.s;
  const auto probability = [&](float logit) {
    return exp_nonpositive((logit - max) / task.temperature);
  };
  double total = exponentials(row, max, task.temperature);
  Border border;
  if (task.top_p < 1.0F) {
    const double wanted = nucleus_mass(task.top_p, total);
    border = nucleus_border(row, wanted, kLikely, probability);
    if (border.value == 0.0F) border = nucleus_border(row, wanted, 0.0F, probability);
  }
  // Of values equal to the border the first `count` stay: those up to an id.
  int last_equal = row.vocab;
  if (border.equal > border.count) {
    first_ids(
        row, 0, border.count, [&](int block) { return row.block_sum[block] < border.value; },
        [&](float logit) { return probability(logit) == border.value; },
        [&](int id) { s.token = id; });
    __syncthreads();
    last_equal = s.token;
  }
  const float cut = fmaxf(border.value, task.min_p);
  const auto kept = [&](float logit, int id) {
    const float p = probability(logit);
    return p < cut || (p == border.value && id > last_equal) ? 0.0F : p;
  };
  if (cut > 0.0F) {
    __syncthreads();
    for (int i = threadIdx.x; i < row.blocks; i += kThreads) {
      if (row.block_sum[i] < cut) row.block_sum[i] = 0.0F;
    }
    __syncthreads();
    for_each_block(
        row, row.x, minus_infinity(), [&](int block) { return row.block_sum[block] == 0.0F; },
        [&](int block, bool active, float(&v)[4]) {
#pragma unroll
          for (int j = 0; j < 4; ++j) {
            v[j] = kept(v[j], block * kSumBlock + 16 * j + static_cast<int>(threadIdx.x % 16));
          }
          const float sum = block_sum(v);
          if (active && threadIdx.x % 16 == 0) row.block_sum[block] = sum;
        });
    total = add_groups(row);
  }
  return draw_from_blocks(row, counter_uniform(task.seed, task.completion_idx) * total, kept);
}

}  // namespace turbomind::cuda::sampling
