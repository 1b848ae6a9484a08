// Sampling of rows that want more than the largest logit: penalties, bias, bans, allowed tokens,
// temperature, top-k, top-p, min-p, the seeded draw, log-probabilities. The same token as HostSampler
// from the same logits, bit for bit: sampling_math.h fixes every sum. One CTA a row; passes skip the
// blocks whose largest logit or whose sum shows that they hold nothing of interest, so that most rows
// read little more than their block maxima. Bound by latency; a full pass of 152k logits is about 6 us.
#include <cmath>

#include "backend/cuda/device/memory.cuh"
#include "backend/cuda/kernels/kernels.h"
#include "backend/sampling_math.h"

namespace turbomind::cuda {
namespace {

constexpr int kThreads = 1024;
constexpr int kWarps = kThreads / 32;
constexpr int kMaxGroups = 128;  // of kSumGroup * kSumBlock tokens
constexpr int kHashSlots = 8192;
constexpr int kUnroll = 4;
constexpr uint32_t kEmpty = ~0U;
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
__device__ double add_groups(const Row& row) {
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
__device__ double exponentials(const Row& row, float max, float temperature) {
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

// ---- selection -----------------------------------------------------------------------------------

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
__device__ void select_best(const Row& row, int k) {
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

// ---- edits ---------------------------------------------------------------------------------------

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

__device__ TaskTokens tokens_of(const SampleTask& task, const uint32_t* words,
                                const int32_t* token_ids) {
  const auto* ids = reinterpret_cast<const int32_t*>(words + task.tokens);
  if (task.num_tokens == 0) return {ids, 0, -1};
  return {ids, task.num_tokens,
          task.fed_row >= 0 ? token_ids[task.fed_row] : ids[task.num_tokens - 1]};
}

__device__ void penalize_repetition(const Row& row, const SampleTask& task,
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

__device__ void penalize_completion(const Row& row, const SampleTask& task,
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
__device__ void adjust(const Row& row, const SampleTask& task, const uint32_t* words,
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

__device__ float largest(const Row& row) {
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

// ---- choice --------------------------------------------------------------------------------------

__device__ int first_equal(const Row& row, float max) {
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

__device__ int draw_from_best(const Row& row, const SampleTask& task) {
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

struct Border {
  float value = 0.0F;  // 0: nothing is cut
  long long count = 0;
  long long equal = 0;  // values equal to it
};

// The nucleus' smallest probability and how many equal to it belong to it, among values from `least`
// up; see HostSampler::nucleus_border. Value 0: they do not reach `wanted`.
template <class Probability>
__device__ Border nucleus_border(const Row& row, double wanted, float least,
                                 Probability probability) {
  Shared& s = *row.s;
  auto& select = s.scratch.select;
  double base = 0.0;
  uint32_t prefix = 0;
  uint64_t units = 0;
  for (int d = 0; d < kNumRadixDigits; ++d) {
    const RadixDigit digit = radix_digit(d);
    const uint32_t bins = 1U << digit.bits;
    const uint32_t known = d == 0 ? 0U : ~0U << (digit.shift + digit.bits);
    __syncthreads();
    for (int i = threadIdx.x; i < kRadixBins; i += kThreads) select.low[i] = select.high[i] = 0;
    __syncthreads();
    const float floor = fmaxf(least, __uint_as_float(prefix));
    for_each_block(
        row, row.x, minus_infinity(), [&](int block) { return row.block_sum[block] < floor; },
        [&](int, bool active, const float(&v)[4]) {
          for (int j = 0; active && j < 4; ++j) {
            const float p = probability(v[j]);
            const uint32_t bits = __float_as_uint(p);
            if (p < least || bits == 0 || (bits & known) != prefix) continue;
            const uint32_t mantissa = (bits & 0x7fffffU) | 0x800000U;  // never denormal
            const uint32_t bin = (bits >> digit.shift) & (bins - 1);
            atomicAdd(&select.low[bin], mantissa & 0xfffU);
            atomicAdd(&select.high[bin], mantissa >> 12);
          }
        });
    __syncthreads();
    for (int i = threadIdx.x; i < static_cast<int>(bins); i += kThreads) {
      const int exponent = static_cast<int>(d == 0 ? i >> 2 : prefix >> 23);
      const double sum = static_cast<double>(uint64_t{select.high[i]} * 4096 + select.low[i]);
      select.shares[i] = ldexp(sum, exponent - 150);
    }
    __syncthreads();
    int bin = 0;
    if (d == 0) {
      // Across exponents sums are rounded: in order, skipping empty bins.
      if (threadIdx.x < 32) {
        double inside = 0.0;
        int found = 0;
        for (int top = static_cast<int>(bins) - 1; top > 0 && found == 0; top -= 32) {
          const int mine = top - static_cast<int>(threadIdx.x);
          const double share = mine > 0 ? select.shares[mine] : 0.0;
          uint32_t votes = __ballot_sync(~0U, share > 0.0);
          for (; votes != 0; votes &= votes - 1) {
            const int lane = __ffs(votes) - 1;
            const double next = __shfl_sync(~0U, share, lane);
            if (!(inside + next < wanted)) {
              found = top - lane;
              break;
            }
            inside += next;
          }
        }
        if (threadIdx.x == 0) {
          s.rank = found;
          s.base = inside;
        }
      }
      __syncthreads();
      bin = s.rank;
      base = s.base;
      __syncthreads();
      if (bin == 0) return {};
    } else {
      double inside = 0.0;
      bin = find_bin(
          s, select.shares, static_cast<int>(bins), s.warp_double, &inside,
          [&](double before, double share) { return !(base + (before + share) < wanted); });
      base += inside;
    }
    prefix |= static_cast<uint32_t>(bin) << digit.shift;
    units = uint64_t{select.high[bin]} * 4096 + select.low[bin];
    __syncthreads();
  }
  const float value = __uint_as_float(prefix);
  const auto count = static_cast<long long>(ceil((wanted - base) / value));
  return {value, count < 1 ? 1 : count,
          static_cast<long long>(units / ((prefix & 0x7fffffU) | 0x800000U))};
}

__device__ int draw_from_all(const Row& row, const SampleTask& task, float max) {
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
  const double target = counter_uniform(task.seed, task.completion_idx) * total;
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

// ---- a row ---------------------------------------------------------------------------------------

__global__ void __launch_bounds__(kThreads, 1) sample_rows_kernel(const SampleRowsArgs args) {
  extern __shared__ __align__(16) char dynamic[];
  grid_dependency_wait();
  grid_dependency_launch();
  const SampleTask task = args.tasks[blockIdx.x];
  const int vocab = static_cast<int>(args.vocab);
  const int blocks = (vocab + kSumBlock - 1) / kSumBlock;
  auto* block_values = reinterpret_cast<float*>(dynamic + sizeof(Shared));
  const Row row{.x = args.logits + task.row * args.vocab,
                .vocab = vocab,
                .blocks = blocks,
                .block_max = block_values,
                .block_sum = block_values + blocks,
                .s = reinterpret_cast<Shared*>(dynamic)};
  SampleOutput output{.status = SampleOutcome::ok, .token = -1};
  const int first = args.ids[task.row];
  if (first < 0) {
    output.status = first == kNoTokenLeft ? SampleOutcome::all_banned : SampleOutcome::not_finite;
    if (threadIdx.x == 0) args.outputs[blockIdx.x] = output;
    return;
  }
  for (int i = threadIdx.x; i < blocks; i += kThreads) {
    row.block_max[i] = args.block_max[static_cast<int64_t>(task.row) * blocks + i];
  }
  float max = row.x[first];
  __syncthreads();

  const float* raw = row.x;
  if (task.num_logprobs > 0) {
    output.raw_max = max;
    output.raw_total = exponentials(row, max, 1.0F);
    const int count = min(task.num_logprobs, vocab);
    select_best(row, count);
    if (static_cast<int>(threadIdx.x) < count) {
      const int i = threadIdx.x;
      args.top[task.top + i] = {row.x[best_id(*row.s, i)], best_id(*row.s, i)};
    }
    if (task.spare >= 0) {
      float* spare = args.spare + task.spare * args.vocab;
      for (int i = threadIdx.x; i < vocab; i += kThreads) spare[i] = row.x[i];
      raw = spare;
    }
    __syncthreads();
  }
  if (task.edits) {
    adjust(row, task, args.words, args.token_ids);
    max = largest(row);
    if (row.s->bad != 0) output.status = SampleOutcome::not_finite;
    if (row.s->bad == 0 && max == minus_infinity()) output.status = SampleOutcome::all_banned;
  }
  if (output.status == SampleOutcome::ok) {
    if (!task.do_sample) {
      output.token = first_equal(row, max);
    } else if (task.top_k > 0 && task.top_k < vocab) {
      output.token = draw_from_best(row, task);
    } else {
      output.token = draw_from_all(row, task, max);
    }
    if (task.num_logprobs > 0) output.raw_logit = raw[output.token];
  }
  if (threadIdx.x == 0) {
    args.outputs[blockIdx.x] = output;
    args.ids[task.row] = output.token;  // read by all threads long ago
  }
}

}  // namespace

size_t sample_rows_shared_bytes(int64_t vocab) {
  return sizeof(Shared) +
         2 * sizeof(float) * static_cast<size_t>(ceil_div<int64_t>(vocab, kSumBlock));
}

void sample_rows(const LaunchContext& context, const SampleRowsArgs& args, int tasks) {
  if (tasks == 0) return;
  launch(sample_rows_kernel,
         {.grid = dim3(static_cast<unsigned>(tasks)),
          .threads = kThreads,
          .shared_bytes = static_cast<int>(sample_rows_shared_bytes(args.vocab))},
         context.stream, context.programmatic, args);
}

}  // namespace turbomind::cuda
