// How much memory a sampler takes, on the device and on the host. Pure functions.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>

#include "backend/backend.h"

namespace turbomind::cuda {

// Sizes of a sampler, a pure function of the workspace it is for.
struct SamplerSizes {
  int rows = 0;  // of logits
  int64_t vocab = 0;
  int tasks = 0;           // rows that one step may sample
  int spare_rows = 0;      // raw logits kept beside edited ones
  size_t words = 0;        // of uploaded token lists and masks
  size_t top_entries = 0;  // of best tokens that come back
};
SamplerSizes sampler_sizes(const Backend::WorkspaceSpec& spec, int logit_rows);

// Bytes of its buffers, each on the device but for `outputs`; tasks, outputs and ids have two sets on the
// host.
struct SamplerBytes {
  size_t logits, block_max, scan, ids, spare;
  size_t tasks;    // SampleTask [tasks], then words
  size_t words;    // where in `tasks` they begin
  size_t outputs;  // SampleOutput [tasks], then TopLogit
  size_t top;      // where in `outputs` they begin
};
SamplerBytes sampler_bytes(const SamplerSizes& sizes);
// Bytes of each device buffer.
std::array<size_t, 6> sampler_buffers(const SamplerSizes& sizes);
size_t sampler_host_bytes(const SamplerSizes& sizes);

}  // namespace turbomind::cuda
