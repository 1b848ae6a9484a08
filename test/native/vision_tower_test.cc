// The vision tower on every backend against float64 embeddings, in passes of every size.
#include "models/vision_tower.h"

#include "each_backend.h"
#include "loaded_model.h"
#include "test.h"

using namespace turbomind;
using namespace turbomind::test;

namespace {

class CountingBackend : public ReferenceBackend {
 public:
  std::unique_ptr<Buffer> allocate(size_t bytes) override {
    allocated_bytes += bytes;
    return ReferenceBackend::allocate(bytes);
  }
  size_t allocated_bytes = 0;
};

std::vector<double> expected_embeddings(const Json& expected) {
  std::vector<double> values;
  for (const Json& row : expected["embeddings"].items()) {
    for (double value : row.numbers<double>()) values.push_back(value);
  }
  return values;
}

std::vector<float> encode(LoadedModel& model, int num_tiles) {
  const std::unique_ptr<Buffer> buffer = model.encode_formula_tiles(num_tiles);
  return model.download(model.embeddings(num_tiles, buffer.get()));
}

}  // namespace

TEST("embeddings of every fixture are those of the float64 network") {
  for_each_backend([](Backend& backend, const Tolerance& tolerance) {
    for (const char* name : kVisionFixtures) {
      LoadedModel model(backend, name);
      for (const Json& expected : model.fixture.expected["cases"].items()) {
        const int num_tiles = static_cast<int>(expected["tiles"].integer());
        if (num_tiles == 0) continue;
        const std::vector<float> embeddings = encode(model, num_tiles);
        EXPECT_EQ(embeddings.size(),
                  static_cast<size_t>(num_tiles * model.vision->tokens_per_tile() *
                                      model.fixture.spec.decoder.hidden_size));
        EXPECT_NEAR(largest_difference(embeddings, expected_embeddings(expected)), 0.0,
                    tolerance.dense);
      }
    }
  });
}

TEST("passes of any number of tiles give the same bits") {
  for_each_backend([](Backend& backend, const Tolerance&) {
    for (const char* name : kVisionFixtures) {
      LoadedModel whole(backend, name, 5);
      const std::vector<float> wanted = encode(whole, 5);
      for (int tiles_per_pass : {1, 2, 3, 4}) {
        LoadedModel model(backend, name, tiles_per_pass);
        EXPECT(encode(model, 5) == wanted);
      }
    }
  });
}

TEST("memory is what activation_bytes announced, and encoding takes no more") {
  CountingBackend backend;
  const Fixture fixture(fixture_folder("internvl-hf-bf16"));
  const WeightStore store(fixture.files);
  WeightLoader loader(backend, store, fixture.spec.quant);
  VisionTower tower(loader, *fixture.spec.vision, fixture.spec.decoder.hidden_size, 3);
  EXPECT_EQ(backend.allocated_bytes,
            VisionTower::activation_bytes(*fixture.spec.vision, fixture.spec.decoder.hidden_size,
                                          DType::f32, 3));
  const size_t before = backend.allocated_bytes;
  const std::vector<uint8_t> pixels = formula_tiles(8, 56);
  std::vector<float> out(size_t{8} * 4 * 32);
  tower.encode(ConstTensorView(pixels.data(), DType::u8, {8, 56, 56, 3}),
               TensorView(out.data(), DType::f32, {8 * 4, 32}));
  EXPECT_EQ(backend.allocated_bytes, before);
  EXPECT_ERROR(tower.encode(ConstTensorView(pixels.data(), DType::u8, {8, 56, 56, 3}),
                            TensorView(out.data(), DType::f32, {7 * 4, 32})),
               ErrorCode::internal);
}

TEST("a pass holds as many tiles as have the rows asked for, and at least one") {
  VisionSpec spec;
  spec.patch_size = 14;
  spec.image_size = 448;
  EXPECT_EQ(VisionTower::tiles_per_pass(spec, 1024), 1);
  EXPECT_EQ(VisionTower::tiles_per_pass(spec, 13 * 1025), 13);
  spec.image_size = 224;
  EXPECT_EQ(VisionTower::tiles_per_pass(spec, 1024), 3);
}

TEST("tiles of another size, count or dtype are refused") {
  ReferenceBackend backend;
  LoadedModel model(backend, "internvl-hf-bf16");
  const std::vector<uint8_t> pixels = formula_tiles(1, 56);
  const auto encode_as = [&](DType dtype, int64_t n, int64_t size) {
    const auto buffer = backend.allocate(size_t{1} << 16);
    const TensorView out(buffer->data(), DType::f32,
                         {n * model.vision->tokens_per_tile(), model.vision->out_features()});
    model.vision->encode(ConstTensorView(pixels.data(), dtype, {n, size, size, 3}), out);
  };
  EXPECT_ERROR(encode_as(DType::u8, 0, 56), ErrorCode::internal);
  EXPECT_ERROR(encode_as(DType::u8, 1, 28), ErrorCode::internal);
  EXPECT_ERROR(encode_as(DType::i8, 1, 56), ErrorCode::internal);
}

TEST("missing and misshapen tensors are refused while loading") {
  const auto load = [](const std::string& fixture_name,
                       const std::function<void(Fixture&)>& change) {
    Fixture fixture(fixture_folder(fixture_name));
    change(fixture);
    ReferenceBackend backend;
    const WeightStore store(fixture.files);
    WeightLoader loader(backend, store, fixture.spec.quant);
    VisionTower tower(loader, *fixture.spec.vision, fixture.spec.decoder.hidden_size, 1);
  };
  for (const char* name :
       {"vision.cls", "vision.positions", "vision.patch.bias", "vision.layers.1.norm2.bias",
        "vision.layers.0.attn.v.bias", "vision.layers.1.scale2", "projector.norm.bias",
        "projector.fc2.weight"}) {
    EXPECT_ERROR(load("internvl-hf-bf16",
                      [&](Fixture& f) {
                        std::erase_if(f.files.tensors,
                                      [&](const TensorEntry& t) { return t.name == name; });
                      }),
                 ErrorCode::missing_tensor);
  }
  EXPECT_ERROR(load("internvl-hf-bf16", [](Fixture& f) { f.spec.vision->image_size = 28; }),
               ErrorCode::tensor_mismatch);
  EXPECT_ERROR(load("internvl-hf-bf16", [](Fixture& f) { f.spec.vision->qkv_bias = false; }),
               ErrorCode::tensor_mismatch);
  EXPECT_ERROR(load("internvl-hf-bf16", [](Fixture& f) { f.spec.decoder.hidden_size = 48; }),
               ErrorCode::tensor_mismatch);
  EXPECT_ERROR(load("internvl-chat-rms", [](Fixture& f) { f.spec.vision->rms_norm = false; }),
               ErrorCode::missing_tensor);
}

TEST_MAIN()
