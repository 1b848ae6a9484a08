// The ViT's layer loop and the projector, in the same five ops a layer as the decoder. Buffers
// whose lives do not overlap are one: pixels and shuffled patches, embedded patches and attention
// outputs.
#include "models/vision_tower.h"

#include <algorithm>

namespace turbomind {
namespace {

int64_t patch_features(const VisionSpec& spec) {
  return int64_t{3} * spec.patch_size * spec.patch_size;
}

int64_t shuffled_features(const VisionSpec& spec) {
  return int64_t{spec.shuffle_factor} * spec.shuffle_factor * spec.hidden_size;
}

int64_t rows_per_tile(const VisionSpec& spec) { return int64_t{spec.patches()} + 1; }

// Elements a tile needs in each buffer. Buffers are reused where their lives do not overlap.
struct TileElements {
  int64_t pixels, hidden, qkv, attention, mlp;
};

TileElements tile_elements(const VisionSpec& spec, int64_t out_features) {
  const int64_t tokens = rows_per_tile(spec);
  const int64_t hidden = tokens * spec.hidden_size;
  return {// patch pixels, then the shuffled patches
          std::max(spec.patches() * patch_features(spec),
                   spec.tokens_per_tile() * shuffled_features(spec)),
          hidden, 3 * hidden,
          // embedded patches before the class token joins, attention outputs
          hidden,
          // MLP activations of the layers, then of the projector
          std::max(tokens * spec.intermediate_size, spec.tokens_per_tile() * out_features)};
}

}  // namespace

struct VisionTower::Layer {
  // A norm together with the vectors that it views.
  struct OwnedNorm {
    WeightLoader::Vector weight;
    WeightLoader::Vector bias;
    Norm norm;
  };
  OwnedNorm norm1;
  OwnedNorm norm2;
  OwnedNorm q_norm;  // qk_norm only
  OwnedNorm k_norm;
  WeightLoader::Vector scale1;
  WeightLoader::Vector scale2;
  std::unique_ptr<LinearWeight> qkv;
  std::unique_ptr<LinearWeight> proj;
  std::unique_ptr<LinearWeight> fc1;
  std::unique_ptr<LinearWeight> fc2;

  Layer(WeightLoader& loader, const VisionSpec& spec, int layer_idx) {
    const std::string prefix = "vision.layers." + std::to_string(layer_idx) + ".";
    const int64_t hidden = spec.hidden_size;
    const Bias qkv_bias = spec.qkv_bias ? Bias::required : Bias::none;
    const auto load_norm = [&](const std::string& name, NormKind kind) {
      OwnedNorm owned;
      owned.weight = loader.vector(prefix + name + ".weight", {hidden});
      if (kind == NormKind::layer) owned.bias = loader.vector(prefix + name + ".bias", {hidden});
      owned.norm = Norm{kind, owned.weight.view, owned.bias.view, spec.norm_eps};
      return owned;
    };
    const NormKind kind = spec.rms_norm ? NormKind::rms : NormKind::layer;
    norm1 = load_norm("norm1", kind);
    qkv = loader.linear(hidden, {{prefix + "attn.q", hidden, qkv_bias},
                                 {prefix + "attn.k", hidden, qkv_bias},
                                 {prefix + "attn.v", hidden, qkv_bias}});
    if (spec.qk_norm) {
      q_norm = load_norm("attn.q_norm", NormKind::rms);
      k_norm = load_norm("attn.k_norm", NormKind::rms);
    }
    proj = loader.linear(hidden, {{prefix + "attn.proj", hidden, Bias::required}});
    scale1 = loader.vector(prefix + "scale1", {hidden});
    norm2 = load_norm("norm2", kind);
    fc1 = loader.linear(hidden, {{prefix + "mlp.fc1", spec.intermediate_size, Bias::required}});
    fc2 = loader.linear(spec.intermediate_size, {{prefix + "mlp.fc2", hidden, Bias::required}});
    scale2 = loader.vector(prefix + "scale2", {hidden});
  }
};

VisionTower::VisionTower(WeightLoader& loader, const VisionSpec& spec, int out_features,
                         int tiles_per_pass)
    : backend_(loader.backend()),
      spec_(spec),
      out_features_(out_features),
      tiles_per_pass_(tiles_per_pass) {
  TM_CHECK(tiles_per_pass > 0 && out_features > 0, "tiles_per_pass %d, out_features %d",
           tiles_per_pass, out_features);
  const int64_t hidden = spec.hidden_size;
  patch_ = loader.linear(patch_features(spec), {{"vision.patch", hidden, Bias::required}});
  cls_ = loader.vector("vision.cls", {1, 1, hidden});
  positions_ = loader.vector("vision.positions", {1, rows_per_tile(spec), hidden});
  layers_.reserve(static_cast<size_t>(spec.num_layers));
  for (int i = 0; i < spec.num_layers; ++i) layers_.emplace_back(loader, spec, i);

  const int64_t shuffled = shuffled_features(spec);
  projector_norm_weight_ = loader.vector("projector.norm.weight", {shuffled});
  projector_norm_bias_ = loader.vector("projector.norm.bias", {shuffled});
  projector_norm_ = Norm{NormKind::layer, projector_norm_weight_.view, projector_norm_bias_.view,
                         spec.projector_norm_eps};
  fc1_ = loader.linear(shuffled, {{"projector.fc1", out_features, Bias::required}});
  fc2_ = loader.linear(out_features, {{"projector.fc2", out_features, Bias::required}});

  const TileElements elements = tile_elements(spec, out_features);
  const auto activations = [&](int64_t per_tile) {
    return backend_.allocate(static_cast<size_t>(per_tile * tiles_per_pass) *
                             dtype_bytes(backend_.activation_dtype()));
  };
  pixels_ = activations(elements.pixels);
  hidden_ = activations(elements.hidden);
  qkv_ = activations(elements.qkv);
  attention_ = activations(elements.attention);
  mlp_ = activations(elements.mlp);
}

VisionTower::~VisionTower() = default;

int VisionTower::tiles_per_pass(const VisionSpec& spec, int rows) {
  return static_cast<int>(std::max<int64_t>(1, rows / rows_per_tile(spec)));
}

size_t VisionTower::activation_bytes(const VisionSpec& spec, int out_features, DType dtype,
                                     int tiles_per_pass) {
  const TileElements elements = tile_elements(spec, out_features);
  const int64_t per_tile =
      elements.pixels + elements.hidden + elements.qkv + elements.attention + elements.mlp;
  return static_cast<size_t>(per_tile * tiles_per_pass) * dtype_bytes(dtype);
}

Backend::WorkspaceSpec VisionTower::workspace(const VisionSpec& spec, int out_features,
                                              int tiles_per_pass) {
  Backend::WorkspaceSpec workspace;
  workspace.max_tokens = static_cast<int>(rows_per_tile(spec)) * tiles_per_pass;
  workspace.max_in_features =
      std::max<int64_t>({patch_features(spec), spec.hidden_size, spec.intermediate_size,
                         shuffled_features(spec), out_features});
  workspace.max_out_features =
      std::max<int64_t>({3 * int64_t{spec.hidden_size}, spec.intermediate_size, out_features});
  workspace.max_kv_len = static_cast<int>(rows_per_tile(spec));
  workspace.max_heads = spec.num_heads;
  workspace.max_head_dim = spec.hidden_size / spec.num_heads;
  workspace.vision_tile_tokens = static_cast<int>(rows_per_tile(spec));
  workspace.vision_head_dim = spec.hidden_size / spec.num_heads;
  workspace.vision_pixel_bytes = static_cast<size_t>(tiles_per_pass) * 3 *
                                 static_cast<size_t>(spec.image_size) *
                                 static_cast<size_t>(spec.image_size);
  return workspace;
}

TensorView VisionTower::rows(Buffer& buffer, int64_t num_rows, int64_t columns) const {
  return TensorView(buffer.data(), backend_.activation_dtype(), {num_rows, columns});
}

void VisionTower::encode(ConstTensorView tiles, TensorView out) {
  const int64_t size = spec_.image_size;
  TM_CHECK(tiles.dtype == DType::u8 && tiles.rank == 4 && tiles.dim(0) >= 1 &&
               tiles.dim(0) <= (1 << 20) && tiles.dim(1) == size && tiles.dim(2) == size &&
               tiles.dim(3) == 3,
           "tiles of [%lld, %lld, %lld, %lld]; the vision tower reads u8 [n, %d, %d, 3]",
           static_cast<long long>(tiles.dim(0)), static_cast<long long>(tiles.dim(1)),
           static_cast<long long>(tiles.dim(2)), static_cast<long long>(tiles.dim(3)),
           spec_.image_size, spec_.image_size);
  const int num_tiles = static_cast<int>(tiles.dim(0));
  TM_CHECK(out.dtype == backend_.activation_dtype() && out.rank == 2 &&
               out.dim(0) == int64_t{num_tiles} * tokens_per_tile() && out.dim(1) == out_features_,
           "embeddings of [%lld, %lld] for %d tiles", static_cast<long long>(out.dim(0)),
           static_cast<long long>(out.dim(1)), num_tiles);
  for (int begin = 0; begin < num_tiles; begin += tiles_per_pass_) {
    const int count = std::min(tiles_per_pass_, num_tiles - begin);
    encode_pass(tiles.rows(begin, count),
                out.rows(int64_t{begin} * tokens_per_tile(), int64_t{count} * tokens_per_tile()));
  }
}

void VisionTower::encode_pass(ConstTensorView tiles, TensorView out) {
  const int num_tiles = static_cast<int>(tiles.dim(0));
  const int64_t patch_rows = int64_t{num_tiles} * spec_.patches();
  const TensorView pixels = rows(*pixels_, patch_rows, patch_features(spec_));
  const TensorView patches = rows(*attention_, patch_rows, spec_.hidden_size);
  const TensorView x = rows(*hidden_, num_tiles * rows_per_tile(spec_), spec_.hidden_size);

  PatchifyArgs patchify{.tiles = tiles, .patches = pixels, .patch_size = spec_.patch_size};
  std::copy_n(spec_.mean, 3, patchify.mean);
  std::copy_n(spec_.std, 3, patchify.std);
  backend_.patchify(patchify);
  backend_.linear({.weight = patch_.get(), .x = pixels, .y = patches});
  backend_.vision_embed({.patches = patches,
                         .cls = cls_.view,
                         .positions = ConstTensorView(positions_.view.data, DType::f32,
                                                      {rows_per_tile(spec_), spec_.hidden_size}),
                         .x = x,
                         .num_tiles = num_tiles});
  for (const Layer& layer : layers_) run_layer(layer, num_tiles);

  const TensorView shuffled = rows(*pixels_, out.dim(0), shuffled_features(spec_));
  const TensorView projected = rows(*mlp_, out.dim(0), out_features_);
  backend_.pixel_shuffle({.x = x,
                          .y = shuffled,
                          .num_tiles = num_tiles,
                          .grid = spec_.grid(),
                          .factor = spec_.shuffle_factor});
  backend_.linear({.weight = fc1_.get(),
                   .norm = &projector_norm_,
                   .x = shuffled,
                   .y = projected,
                   .epilogue = Epilogue::gelu});
  backend_.linear({.weight = fc2_.get(), .x = projected, .y = out});
}

void VisionTower::run_layer(const Layer& layer, int num_tiles) {
  const int64_t num_rows = num_tiles * rows_per_tile(spec_);
  const TensorView x = rows(*hidden_, num_rows, spec_.hidden_size);
  const TensorView qkv = rows(*qkv_, num_rows, 3 * int64_t{spec_.hidden_size});
  const TensorView attended = rows(*attention_, num_rows, spec_.hidden_size);
  const TensorView mlp = rows(*mlp_, num_rows, spec_.intermediate_size);

  backend_.linear({.weight = layer.qkv.get(), .norm = &layer.norm1.norm, .x = x, .y = qkv});
  backend_.vision_attention({.qkv = qkv,
                             .y = attended,
                             .num_tiles = num_tiles,
                             .tokens_per_tile = static_cast<int>(rows_per_tile(spec_)),
                             .num_heads = spec_.num_heads,
                             .head_dim = spec_.hidden_size / spec_.num_heads,
                             .q_norm = spec_.qk_norm ? &layer.q_norm.norm : nullptr,
                             .k_norm = spec_.qk_norm ? &layer.k_norm.norm : nullptr});
  backend_.linear({.weight = layer.proj.get(),
                   .x = attended,
                   .y = x,
                   .epilogue = Epilogue::residual,
                   .scale = layer.scale1.view});
  backend_.linear({.weight = layer.fc1.get(),
                   .norm = &layer.norm2.norm,
                   .x = x,
                   .y = mlp,
                   .epilogue = Epilogue::gelu});
  backend_.linear({.weight = layer.fc2.get(),
                   .x = mlp,
                   .y = x,
                   .epilogue = Epilogue::residual,
                   .scale = layer.scale2.view});
}

}  // namespace turbomind
