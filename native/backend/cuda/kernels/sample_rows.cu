// Sampling of rows that want more than the largest logit: penalties, bias, bans, allowed tokens,
// temperature, top-k, top-p, min-p, the seeded draw, log-probabilities. The same token as HostSampler
// from the same logits, bit for bit: sampling_math.h fixes every sum. One CTA a row; passes skip the
// blocks whose largest logit or whose sum shows that they hold nothing of interest, so that most rows
// read little more than their block maxima. Bound by latency; a full pass of 152k logits is about 6 us.
#include "backend/cuda/device/memory.cuh"
#include "backend/cuda/device/sample_draw.cuh"
#include "backend/cuda/device/sample_edits.cuh"
#include "backend/cuda/device/sample_row.cuh"
#include "backend/cuda/device/sample_select.cuh"
#include "backend/cuda/kernels/kernels.h"

namespace turbomind::cuda {

using namespace sampling;

namespace {

__device__ __forceinline__ int choose(const Row& row, const SampleTask& task, float max) {
  if (!task.do_sample) return first_equal(row, max);
  if (task.top_k > 0 && task.top_k < row.vocab) return draw_from_best(row, task);
  return draw_from_all(row, task, max);
}

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
    output.token = choose(row, task, max);
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
