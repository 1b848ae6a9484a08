// Edits of a row's logits, steps 1 to 4 of host_sampler.h: penalties, bias, bans, allowed tokens. All
// threads of the CTA call each function.
#pragma once

#include "backend/cuda/device/sample_row.cuh"

namespace turbomind::cuda::sampling {

__device__ __forceinline__ void touch(const Row& row, int id) {
  const int block = id / kSumBlock;
  atomicOr(&row.s->touched[block / 32], 1U << (block % 32));
}

// Prompt and completion of a task; the last one may be what the step before has drawn.
struct TaskTokens {
  const int32_t* ids;
  int count;
  int32_t last;
  __device__ int32_t operator[](int i) const { return i + 1 == count ? last : ids[i]; }
};

inline __device__ TaskTokens tokens_of(const SampleTask& task, const uint32_t* words,
                                       const int32_t* token_ids) {
  const auto* ids = reinterpret_cast<const int32_t*>(words + task.tokens);
  if (task.num_tokens == 0) return {ids, 0, -1};
  return {ids, task.num_tokens,
          task.fed_row >= 0 ? token_ids[task.fed_row] : ids[task.num_tokens - 1]};
}

inline __device__ void penalize_repetition(const Row& row, const SampleTask& task,
                                           const TaskTokens& tokens) {
  uint32_t* seen = row.s->scratch.seen;
  for (int i = threadIdx.x; i < (row.vocab + 31) / 32; i += kThreads) seen[i] = 0;
  __syncthreads();
  for (int i = threadIdx.x; i < task.num_tokens; i += kThreads) {
    const int id = tokens[i];
    if (id < 0 || id >= row.vocab) continue;
    const uint32_t bit = 1U << (id % 32);
    if ((atomicOr(&seen[id / 32], bit) & bit) != 0) continue;
    const float logit = row.x[id];
    row.x[id] = logit > 0.0F ? logit / task.repetition_penalty : logit * task.repetition_penalty;
    touch(row, id);
  }
  __syncthreads();
}

inline __device__ void penalize_completion(const Row& row, const SampleTask& task,
                                           const TaskTokens& tokens) {
  auto& hash = row.s->scratch.hash;
  for (int i = threadIdx.x; i < kHashSlots; i += kThreads) {
    hash.keys[i] = kEmpty;
    hash.counts[i] = 0;
  }
  __syncthreads();
  const int first = task.num_tokens - task.num_completion;
  for (int i = threadIdx.x; i < task.num_completion; i += kThreads) {
    const int id = tokens[first + i];
    if (id < 0 || id >= row.vocab) continue;
    uint32_t slot = static_cast<uint32_t>(id) * 2654435761U % kHashSlots;
    for (;;) {
      const uint32_t held = atomicCAS(&hash.keys[slot], kEmpty, static_cast<uint32_t>(id));
      if (held == kEmpty || held == static_cast<uint32_t>(id)) break;
      slot = (slot + 1) % kHashSlots;
    }
    atomicAdd(&hash.counts[slot], 1U);
  }
  __syncthreads();
  for (int i = threadIdx.x; i < kHashSlots; i += kThreads) {
    if (hash.keys[i] == kEmpty) continue;
    const int id = static_cast<int>(hash.keys[i]);
    row.x[id] -=
        static_cast<float>(hash.counts[i]) * task.frequency_penalty + task.presence_penalty;
    touch(row, id);
  }
  __syncthreads();
}

// Steps 1 to 4 of host_sampler.h, then block maxima again where something changed.
inline __device__ void adjust(const Row& row, const SampleTask& task, const uint32_t* words,
                              const int32_t* token_ids) {
  Shared& s = *row.s;
  for (int i = threadIdx.x; i < (row.blocks + 31) / 32; i += kThreads) s.touched[i] = 0;
  if (threadIdx.x == 0) s.bad = 0;
  __syncthreads();
  const TaskTokens tokens = tokens_of(task, words, token_ids);
  if (task.repetition_penalty != 1.0F) penalize_repetition(row, task, tokens);
  if (task.frequency_penalty != 0.0F || task.presence_penalty != 0.0F) {
    penalize_completion(row, task, tokens);
  }
  for (int i = threadIdx.x; i < task.num_bias; i += kThreads) {
    const int id = static_cast<int>(words[task.bias + 2 * i]);
    if (id < 0 || id >= row.vocab) continue;
    row.x[id] += __uint_as_float(words[task.bias + 2 * i + 1]);
    touch(row, id);
  }
  __syncthreads();
  for (int i = threadIdx.x; i < task.num_bans; i += kThreads) {
    const int id = static_cast<int>(words[task.bans + i]);
    row.x[id] = minus_infinity();
    touch(row, id);
  }
  __syncthreads();
  const uint32_t* allowed = task.allowed >= 0 ? words + task.allowed : nullptr;
  const auto untouched = [&](int block) {
    if ((s.touched[block / 32] >> (block % 32) & 1U) != 0) return false;
    if (allowed == nullptr) return true;
    const uint32_t low = 2 * block < task.allowed_words ? allowed[2 * block] : 0;
    const uint32_t high = 2 * block + 1 < task.allowed_words ? allowed[2 * block + 1] : 0;
    return (low & high) == ~0U;
  };
  bool bad = false;
  for_each_block(row, row.x, minus_infinity(), untouched,
                 [&](int block, bool active, float(&v)[4]) {
#pragma unroll
                   for (int j = 0; j < 4; ++j) {
                     const int id = block * kSumBlock + 16 * j + threadIdx.x % 16;
                     if (allowed != nullptr && active && id < row.vocab) {
                       const uint32_t bits = id / 32 < task.allowed_words ? allowed[id / 32] : 0;
                       if ((bits >> (id % 32) & 1U) == 0) {
                         v[j] = minus_infinity();
                         row.x[id] = v[j];
                       }
                     }
                     bad = bad || isnan(v[j]) || v[j] == INFINITY;
                   }
                   const float max = half_warp_max(fmaxf(fmaxf(v[0], v[1]), fmaxf(v[2], v[3])));
                   if (active && threadIdx.x % 16 == 0) row.block_max[block] = max;
                 });
  if (bad) s.bad = 1;
  __syncthreads();
}

}  // namespace turbomind::cuda::sampling
