// A model folder of test/fixtures/models (see scripts/make-fixtures.py): its spec and tensor table
// as lib/checkpoint would hand them over, a loaded decoder with a KV cache, and the expected
// outputs.
#pragma once

#include <memory>
#include <numeric>
#include <string>
#include <vector>

#include "backend/backend.h"
#include "io/weights.h"
#include "json.h"
#include "models/decoder.h"
#include "models/model_spec.h"
#include "models/vision_tower.h"

namespace turbomind::test {

inline DType parse_dtype(const std::string& name) {
  for (DType dtype : {DType::f32, DType::f16, DType::bf16, DType::i32}) {
    if (to_string(dtype) == name) return dtype;
  }
  throw Error(ErrorCode::internal, "unknown dtype " + name);
}

inline DecoderSpec parse_decoder(const Json& json) {
  DecoderSpec spec;
  spec.hidden_size = static_cast<int>(json["hiddenSize"].integer());
  spec.num_layers = static_cast<int>(json["numLayers"].integer());
  spec.num_heads = static_cast<int>(json["numHeads"].integer());
  spec.num_kv_heads = static_cast<int>(json["numKvHeads"].integer());
  spec.head_dim = static_cast<int>(json["headDim"].integer());
  spec.intermediate_size = static_cast<int>(json["intermediateSize"].integer());
  spec.vocab_size = static_cast<int>(json["vocabSize"].integer());
  spec.max_position_embeddings = static_cast<int>(json["maxPositionEmbeddings"].integer());
  spec.norm_eps = static_cast<float>(json["normEps"].number());
  spec.rope_theta = static_cast<float>(json["ropeTheta"].number());
  spec.qkv_bias = json["qkvBias"].boolean();
  spec.qk_norm = json["qkNorm"].boolean();
  spec.tied_embeddings = json["tiedEmbeddings"].boolean();
  return spec;
}

inline VisionSpec parse_vision(const Json& json) {
  VisionSpec spec;
  spec.image_size = static_cast<int>(json["imageSize"].integer());
  spec.patch_size = static_cast<int>(json["patchSize"].integer());
  spec.hidden_size = static_cast<int>(json["hiddenSize"].integer());
  spec.num_layers = static_cast<int>(json["numLayers"].integer());
  spec.num_heads = static_cast<int>(json["numHeads"].integer());
  spec.intermediate_size = static_cast<int>(json["intermediateSize"].integer());
  spec.norm_eps = static_cast<float>(json["normEps"].number());
  spec.rms_norm = json["rmsNorm"].boolean();
  spec.qkv_bias = json["qkvBias"].boolean();
  spec.qk_norm = json["qkNorm"].boolean();
  spec.shuffle_factor = static_cast<int>(json["shuffleFactor"].integer());
  spec.projector_norm_eps = static_cast<float>(json["projectorNormEps"].number());
  for (size_t c = 0; c < 3; ++c) {
    spec.mean[c] = static_cast<float>(json["mean"].items().at(c).number());
    spec.std[c] = static_cast<float>(json["std"].items().at(c).number());
  }
  return spec;
}

// native.json: `spec`, `files` and `tensors` of NativeOpenOptions.
struct Fixture {
  std::string folder;
  ModelSpec spec;
  CheckpointFiles files;
  Json expected;

  explicit Fixture(const std::string& path) : folder(path) {
    const Json json = Json::read(folder + "/native.json");
    spec.decoder = parse_decoder(json["spec"]["decoder"]);
    if (json["spec"].has("vision")) spec.vision = parse_vision(json["spec"]["vision"]);
    spec.quant.method =
        json["spec"]["quant"]["method"].text() == "awq" ? QuantMethod::awq : QuantMethod::none;
    spec.quant.group_size = static_cast<int>(json["spec"]["quant"]["groupSize"].integer());
    spec.image_token_id = static_cast<TokenId>(json["spec"]["imageTokenId"].integer());
    for (const Json& file : json["files"].items())
      files.paths.push_back(folder + "/" + file.text());
    for (const Json& tensor : json["tensors"].items()) {
      files.tensors.push_back({tensor["name"].text(), parse_dtype(tensor["dtype"].text()),
                               tensor["shape"].numbers<int64_t>(),
                               static_cast<int>(tensor["file"].integer()),
                               static_cast<uint64_t>(tensor["offset"].integer()),
                               static_cast<uint64_t>(tensor["bytes"].integer())});
    }
    expected = Json::read(folder + "/expected.json");
  }
};

inline std::string fixture_folder(const std::string& name) {
  return std::string(TM_SOURCE_DIR) + "/test/fixtures/models/" + name;
}

// Pixels of the expected outputs: byte i of tile t is this, so that no picture need be stored.
inline std::vector<uint8_t> formula_tiles(int num_tiles, int size) {
  std::vector<uint8_t> pixels;
  for (int tile = 0; tile < num_tiles; ++tile) {
    for (int y = 0; y < size; ++y) {
      for (int x = 0; x < size; ++x) {
        for (int channel = 0; channel < 3; ++channel) {
          pixels.push_back(static_cast<uint8_t>(
              (tile * 71 + y * (3 + channel) + x * (5 + tile) + channel * 40) % 256));
        }
      }
    }
  }
  return pixels;
}

// One sequence's place in a step.
struct StepSequence {
  std::vector<TokenId> tokens;  // new ones
  int num_past = 0;             // already in the cache
  std::vector<BlockId> blocks;
};

// Owns the arrays that a StepBatch points to. Every sequence's last token is sampled.
class StepArrays {
 public:
  StepArrays(const std::vector<StepSequence>& sequences, int block_size) {
    for (const StepSequence& sequence : sequences) {
      max_blocks_ = std::max(max_blocks_, static_cast<int>(sequence.blocks.size()));
    }
    query_start_.push_back(0);
    for (const StepSequence& sequence : sequences) {
      for (size_t i = 0; i < sequence.tokens.size(); ++i) {
        const int position = sequence.num_past + static_cast<int>(i);
        ids_.push_back(sequence.tokens[i]);
        positions_.push_back(position);
        slots_.push_back(sequence.blocks.at(static_cast<size_t>(position / block_size)) *
                             block_size +
                         position % block_size);
      }
      query_start_.push_back(static_cast<int32_t>(ids_.size()));
      kv_len_.push_back(sequence.num_past + static_cast<int>(sequence.tokens.size()));
      sample_rows_.push_back(static_cast<int32_t>(ids_.size()) - 1);
      for (int i = 0; i < max_blocks_; ++i) {
        block_table_.push_back(i < static_cast<int>(sequence.blocks.size())
                                   ? sequence.blocks[static_cast<size_t>(i)]
                                   : -1);
      }
    }
  }
  StepBatch batch() const {
    return {ids_,    positions_,   slots_,      query_start_,
            kv_len_, block_table_, max_blocks_, sample_rows_};
  }

 private:
  std::vector<TokenId> ids_;
  std::vector<int32_t> positions_, slots_, query_start_, kv_len_, block_table_, sample_rows_;
  int max_blocks_ = 0;
};

}  // namespace turbomind::test
