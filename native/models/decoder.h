// A decoder-only transformer (Llama, Qwen2, Qwen3) as one sequence of backend ops: what differs
// between families is data in DecoderSpec. Owns its weights and its activations, sized once; leaves
// planning, block tables and the KV cache to the runtime. Engine thread.
#pragma once

#include <memory>
#include <span>
#include <vector>

#include "backend/backend.h"
#include "models/model_spec.h"
#include "models/weight_loader.h"

namespace turbomind {

class Decoder {
 public:
  // Loads all weights and allocates activations for steps of up to `max_tokens` tokens.
  // Throws Error{missing_tensor | tensor_mismatch | unsupported_quantization | out_of_memory}.
  Decoder(WeightLoader& loader, const DecoderSpec& spec, int max_tokens);
  ~Decoder();

  const DecoderSpec& spec() const { return spec_; }
  int max_tokens() const { return max_tokens_; }

  // Pure functions of the spec, so that memory can be planned before anything is loaded.
  static KvCacheSpec kv_cache_spec(const DecoderSpec& spec, int block_size, int num_blocks,
                                   int bits = 16);
  static size_t activation_bytes(const DecoderSpec& spec, DType dtype, int max_tokens);
  // What this decoder asks of Backend::reserve_workspace. max_kv_len: tokens of the longest
  // sequence.
  static Backend::WorkspaceSpec workspace(const DecoderSpec& spec, int max_tokens,
                                          int max_sequences, int max_rows, int max_kv_len);

  // Runs one step: begin_step, all layers, KV written to `cache`. 1 <= T <= max_tokens.
  // `batch` must live until sample(), logits() or hidden_states() has returned.
  void forward(const StepBatch& batch, KvCache& cache,
               std::span<const EmbeddingOverride> overrides = {});
  // The ops of a step once, with the first layer alone: what they cost on their first use at this size
  // is paid. The results mean nothing.
  void warm_up(const StepBatch& batch, KvCache& cache, std::span<const SampleRow> rows,
               std::span<SampleResult> results);
  // Tokens of the last step's sample_rows, in order. Waits.
  void sample(std::span<const SampleRow> rows, std::span<SampleResult> results);
  // The same in two halves, see Backend::launch_sample.
  bool launch_sample(std::span<const SampleRow> rows);
  void collect_sample(std::span<SampleResult> results) { backend_.collect_sample(results); }
  // Of rows [first, first + n) of the last step's T, f32 on the host. Each waits.
  void logits(int first_row, std::span<float> out);         // [n, V]
  void hidden_states(int first_row, std::span<float> out);  // [n, H], after the final norm

 private:
  struct Layer;
  void run_layer(int layer_idx, int num_tokens, KvCache& cache);
  void download_floats(ConstTensorView from, std::span<float> out);
  TensorView rows(Buffer& buffer, int64_t num_rows, int64_t columns) const;

  Backend& backend_;
  DecoderSpec spec_;
  int max_tokens_ = 0;
  int num_tokens_ = 0;  // T of the last step
  int num_rows_ = 0;    // R of the last step
  std::unique_ptr<LinearWeight> embedding_;
  std::unique_ptr<LinearWeight> head_;
  WeightLoader::Vector final_norm_weight_;
  Norm final_norm_;
  std::unique_ptr<Buffer> inv_freq_;
  Rope rope_;
  std::vector<Layer> layers_;
  std::unique_ptr<Buffer> hidden_;     // [T, H]
  std::unique_ptr<Buffer> qkv_;        // [T, (Hq + 2 Hkv) * D]
  std::unique_ptr<Buffer> attention_;  // [T, Hq * D]
  std::unique_ptr<Buffer> mlp_;        // [T, I]
};

// The larger of each field: one workspace serves several models of one engine.
Backend::WorkspaceSpec merge(const Backend::WorkspaceSpec& a, const Backend::WorkspaceSpec& b);

}  // namespace turbomind
