#include "backend/cuda/cuda_sampler_sizes.h"

#include <algorithm>

#include "backend/cuda/kernels/kernels.h"
#include "backend/sampling_math.h"

namespace turbomind::cuda {
namespace {

constexpr size_t kMaxWords = size_t{4} << 20;
constexpr size_t kMaxTopEntries = size_t{1} << 17;
constexpr int kMaxSpareRows = 16;

size_t row_bytes(const SamplerSizes& sizes) {
  return static_cast<size_t>(sizes.vocab) * sizeof(float);
}

}  // namespace

SamplerSizes sampler_sizes(const Backend::WorkspaceSpec& spec, int logit_rows) {
  SamplerSizes sizes;
  sizes.rows = logit_rows;
  sizes.vocab = spec.vocab_size;
  sizes.tasks = std::max(spec.max_rows, 1);
  sizes.spare_rows = std::min(sizes.tasks, kMaxSpareRows);
  const size_t words_a_row = static_cast<size_t>(std::max(spec.max_kv_len, 1)) +
                             static_cast<size_t>(spec.vocab_size) / 32 + 64;
  sizes.words = std::min(static_cast<size_t>(sizes.tasks) * words_a_row, kMaxWords);
  sizes.top_entries = std::min(
      static_cast<size_t>(sizes.tasks) * static_cast<size_t>(kMaxBestTokens), kMaxTopEntries);
  return sizes;
}

SamplerBytes sampler_bytes(const SamplerSizes& sizes) {
  const auto rows = static_cast<size_t>(sizes.rows);
  const auto tasks = static_cast<size_t>(sizes.tasks);
  SamplerBytes bytes{};
  bytes.logits = rows * row_bytes(sizes);
  bytes.block_max =
      rows * static_cast<size_t>(ceil_div<int64_t>(sizes.vocab, kSumBlock)) * sizeof(float);
  bytes.scan = scan_scratch_bytes(sizes.rows);
  bytes.ids = rows * sizeof(int32_t);
  bytes.spare = static_cast<size_t>(sizes.spare_rows) * row_bytes(sizes);
  bytes.words = round_up<size_t>(tasks * sizeof(SampleTask), 256);
  bytes.tasks = bytes.words + sizes.words * sizeof(uint32_t);
  bytes.top = round_up<size_t>(tasks * sizeof(SampleOutput), 256);
  bytes.outputs = bytes.top + sizes.top_entries * sizeof(TopLogit);
  return bytes;
}

std::array<size_t, 6> sampler_buffers(const SamplerSizes& sizes) {
  const SamplerBytes bytes = sampler_bytes(sizes);
  return {bytes.logits, bytes.block_max, bytes.scan, bytes.ids, bytes.tasks, bytes.spare};
}

size_t sampler_host_bytes(const SamplerSizes& sizes) {
  const SamplerBytes bytes = sampler_bytes(sizes);
  return 2 * (bytes.ids + bytes.tasks + bytes.outputs) + row_bytes(sizes);
}

}  // namespace turbomind::cuda
