// A fixture loaded on a backend, with a KV cache and greedy decoding step by step: what the
// decoder's and the vision tower's tests run.
#pragma once

#include <algorithm>
#include <cmath>
#include <optional>

#include "fixture.h"

namespace turbomind::test {

inline const char* const kTextFixtures[] = {"qwen2-bf16-sharded",    "qwen2-f32",
                                            "qwen2-mixed-unaligned", "qwen2-awq-g32",
                                            "qwen2-awq-g128",        "qwen3-bf16"};
inline const char* const kVisionFixtures[] = {"internvl-hf-bf16", "internvl-chat-awq",
                                              "internvl-chat-rms"};

inline std::vector<std::string> all_fixtures() {
  std::vector<std::string> names(std::begin(kTextFixtures), std::end(kTextFixtures));
  names.insert(names.end(), std::begin(kVisionFixtures), std::end(kVisionFixtures));
  return names;
}

// Block sizes are a power of two on every backend; this small one makes short prompts cross blocks.
inline constexpr int kBlockSize = 16;
inline constexpr int kNumBlocks = 32;
inline constexpr int kMaxTokens = 64;
inline constexpr int kMaxSequences = 4;

struct LoadedModel {
  Backend& backend;
  Fixture fixture;
  WeightStore store;
  WeightLoader loader;
  Decoder decoder;
  std::optional<VisionTower> vision;
  std::unique_ptr<KvCache> cache;

  LoadedModel(Backend& backend, const std::string& name, int tiles_per_pass = 2)
      : backend(backend),
        fixture(fixture_folder(name)),
        store(fixture.files),
        loader(backend, store, fixture.spec.quant),
        decoder(loader, fixture.spec.decoder, kMaxTokens) {
    validate(fixture.spec);
    const DecoderSpec& spec = fixture.spec.decoder;
    Backend::WorkspaceSpec workspace = Decoder::workspace(
        spec, kMaxTokens, kMaxSequences, kMaxSequences, spec.max_position_embeddings);
    if (fixture.spec.vision) {
      vision.emplace(loader, *fixture.spec.vision, spec.hidden_size, tiles_per_pass);
      workspace = merge(workspace, VisionTower::workspace(*fixture.spec.vision, spec.hidden_size,
                                                          tiles_per_pass));
    }
    backend.reserve_workspace(workspace);
    cache = backend.make_kv_cache(Decoder::kv_cache_spec(spec, kBlockSize, kNumBlocks));
  }

  bool is_awq() const { return fixture.spec.quant.method == QuantMethod::awq; }

  std::vector<float> download(ConstTensorView view) {
    TM_CHECK(view.dtype == DType::f32, "tests read f32 activations");
    std::vector<float> values(static_cast<size_t>(view.elements()));
    backend.download(values.data(), view);
    return values;
  }

  std::unique_ptr<Buffer> encode_formula_tiles(int num_tiles) {
    const int size = fixture.spec.vision->image_size;
    const std::vector<uint8_t> pixels = formula_tiles(num_tiles, size);
    auto buffer = backend.allocate(static_cast<size_t>(embeddings(num_tiles).elements()) *
                                   dtype_bytes(backend.activation_dtype()));
    vision->encode(ConstTensorView(pixels.data(), DType::u8, {num_tiles, size, size, 3}),
                   embeddings(num_tiles, buffer.get()));
    return buffer;
  }
  // [num_tiles * tokens per tile, H] of a buffer that encode_formula_tiles answered.
  TensorView embeddings(int num_tiles, Buffer* buffer = nullptr) const {
    return {buffer == nullptr ? nullptr : buffer->data(),
            backend.activation_dtype(),
            {int64_t{num_tiles} * vision->tokens_per_tile(), vision->out_features()}};
  }

  // One step of several sequences; answers [S, V] logits of their last tokens.
  std::vector<float> step(const std::vector<StepSequence>& sequences,
                          std::span<const EmbeddingOverride> overrides = {}) {
    const StepArrays arrays(sequences, kBlockSize);
    const StepBatch batch = arrays.batch();
    decoder.forward(batch, *cache, overrides);
    return sampled_logits(batch);
  }

  // [R, V] logits of the last step's sample_rows.
  std::vector<float> sampled_logits(const StepBatch& batch) {
    const auto vocab = static_cast<size_t>(decoder.spec().vocab_size);
    std::vector<float> logits(batch.sample_rows.size() * vocab);
    for (size_t r = 0; r < batch.sample_rows.size(); ++r) {
      decoder.logits(batch.sample_rows[r], std::span(logits).subspan(r * vocab, vocab));
    }
    return logits;
  }

  // Logits after the whole prompt, computed in chunks of at most `chunk` tokens. `overrides` hold
  // rows of the whole prompt.
  std::vector<float> prefill(StepSequence& sequence, const std::vector<TokenId>& prompt, int chunk,
                             const std::vector<EmbeddingOverride>& overrides = {}) {
    std::vector<float> logits;
    sequence.num_past = 0;
    for (int begin = 0; begin < static_cast<int>(prompt.size()); begin += chunk) {
      const int end = std::min(begin + chunk, static_cast<int>(prompt.size()));
      sequence.tokens.assign(prompt.begin() + begin, prompt.begin() + end);
      logits = step({sequence}, cut(overrides, begin, end));
      sequence.num_past = end;
    }
    return logits;
  }

  // `count` greedy ids that follow `logits`.
  std::vector<TokenId> greedy(StepSequence sequence, std::vector<float> logits, size_t count) {
    std::vector<TokenId> ids;
    while (true) {
      ids.push_back(
          static_cast<TokenId>(std::max_element(logits.begin(), logits.end()) - logits.begin()));
      if (ids.size() == count) return ids;
      sequence.tokens = {ids.back()};
      logits = step({sequence});
      ++sequence.num_past;
    }
  }

  // The part of each override that falls into rows [begin, end), in rows of that chunk.
  static std::vector<EmbeddingOverride> cut(const std::vector<EmbeddingOverride>& overrides,
                                            int begin, int end) {
    std::vector<EmbeddingOverride> parts;
    for (const EmbeddingOverride& image : overrides) {
      const int first = std::max(begin, image.row);
      const int last = std::min(end, image.row + static_cast<int>(image.embeddings.dim(0)));
      if (first < last)
        parts.push_back({first - begin, image.embeddings.rows(first - image.row, last - first)});
    }
    return parts;
  }
};

// Blocks of sequence `which`, scattered so that no two neighbours touch. Disjoint for which < 4.
inline std::vector<BlockId> scattered_blocks(int which) {
  std::vector<BlockId> blocks;
  for (int i = 0; i < kNumBlocks / 4; ++i) blocks.push_back(which + 4 * ((i * 5 + which) % 8));
  return blocks;
}

inline double largest_difference(std::span<const float> values, std::span<const double> wanted) {
  double worst = values.size() == wanted.size() ? 0.0 : HUGE_VAL;
  for (size_t i = 0; i < std::min(values.size(), wanted.size()); ++i) {
    const double error = std::abs(values[i] - wanted[i]);
    worst = std::isnan(error) ? HUGE_VAL : std::max(worst, error);
  }
  return worst;
}

}  // namespace turbomind::test
