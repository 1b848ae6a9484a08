// InternViT, pixel shuffle and projector: image tiles → embeddings of the decoder's image tokens.
// Owns its weights and activations; works in passes of a bounded number of tiles, so that its
// memory does not grow with a request. Engine thread, between steps (never inside
// Backend::execute).
#pragma once

#include <memory>
#include <vector>

#include "backend/backend.h"
#include "models/model_spec.h"
#include "models/weight_loader.h"

namespace turbomind {

class VisionTower {
 public:
  // `out_features`: the decoder's hidden size, H. `tiles_per_pass` as tiles_per_pass().
  VisionTower(WeightLoader& loader, const VisionSpec& spec, int out_features, int tiles_per_pass);
  ~VisionTower();

  const VisionSpec& spec() const { return spec_; }
  int tokens_per_tile() const { return spec_.tokens_per_tile(); }
  int out_features() const { return out_features_; }

  // As many tiles as have at most `rows` rows, one at least: see Backend::vision_rows_per_pass.
  static int tiles_per_pass(const VisionSpec& spec, int rows);
  // Pure functions of the spec, so that memory can be planned before anything is loaded.
  static size_t activation_bytes(const VisionSpec& spec, int out_features, DType dtype,
                                 int tiles_per_pass);
  static Backend::WorkspaceSpec workspace(const VisionSpec& spec, int out_features,
                                          int tiles_per_pass);

  // tiles: [n, S, S, 3] u8 in host memory, n >= 1. `out`: [n * tokens_per_tile, H] in the backend's
  // activation dtype, tile by tile. A tile's rows do not depend on the other tiles.
  void encode(ConstTensorView tiles, TensorView out);

 private:
  struct Layer;
  void encode_pass(ConstTensorView tiles, TensorView out);
  void run_layer(const Layer& layer, int num_tiles);
  TensorView rows(Buffer& buffer, int64_t num_rows, int64_t columns) const;

  Backend& backend_;
  VisionSpec spec_;
  int out_features_ = 0;
  int tiles_per_pass_ = 0;
  std::unique_ptr<LinearWeight> patch_;
  WeightLoader::Vector cls_;
  WeightLoader::Vector positions_;
  std::vector<Layer> layers_;
  WeightLoader::Vector projector_norm_weight_;
  WeightLoader::Vector projector_norm_bias_;
  Norm projector_norm_;
  std::unique_ptr<LinearWeight> fc1_;
  std::unique_ptr<LinearWeight> fc2_;
  std::unique_ptr<Buffer> pixels_;     // [n * P, 3 * p * p]; later the shuffled patches
  std::unique_ptr<Buffer> hidden_;     // [n * (P + 1), C]
  std::unique_ptr<Buffer> qkv_;        // [n * (P + 1), 3 * C]
  std::unique_ptr<Buffer> attention_;  // [n * (P + 1), C]
  std::unique_ptr<Buffer> mlp_;        // [n * (P + 1), I]
};

}  // namespace turbomind
