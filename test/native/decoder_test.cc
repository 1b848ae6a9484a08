// The decoder on every backend against float64 outputs of scripts/make-fixtures.py, and against
// itself: chunks, batches and block tables must not change a bit.
#include "models/decoder.h"

#include "each_backend.h"
#include "loaded_model.h"
#include "runtime/warm_up.h"
#include "test.h"

using namespace turbomind;
using namespace turbomind::test;

namespace {

// Counts what is allocated and when.
class CountingBackend : public ReferenceBackend {
 public:
  std::unique_ptr<Buffer> allocate(size_t bytes) override {
    ++allocations;
    allocated_bytes += bytes;
    return ReferenceBackend::allocate(bytes);
  }
  int allocations = 0;
  size_t allocated_bytes = 0;
};

StepSequence sequence_of(int which) {
  StepSequence sequence;
  sequence.blocks = scattered_blocks(which);
  return sequence;
}

// Overrides for a case whose image tokens follow one another.
std::vector<EmbeddingOverride> image_rows(LoadedModel& model, const Json& expected,
                                          Buffer& buffer) {
  const std::vector<TokenId> ids = expected["input_ids"].numbers<TokenId>();
  const auto first =
      std::find(ids.begin(), ids.end(), model.fixture.spec.image_token_id) - ids.begin();
  const int tiles = static_cast<int>(expected["tiles"].integer());
  return {{static_cast<int>(first), model.embeddings(tiles, &buffer)}};
}

void check_case(LoadedModel& model, const Json& expected, double tolerance) {
  std::unique_ptr<Buffer> buffer;
  std::vector<EmbeddingOverride> overrides;
  if (expected["tiles"].integer() > 0) {
    buffer = model.encode_formula_tiles(static_cast<int>(expected["tiles"].integer()));
    overrides = image_rows(model, expected, *buffer);
  }
  StepSequence sequence = sequence_of(1);
  const std::vector<TokenId> prompt = expected["input_ids"].numbers<TokenId>();
  const std::vector<float> logits = model.prefill(sequence, prompt, kMaxTokens, overrides);
  const double error = largest_difference(logits, expected["logits"].numbers<double>());
  EXPECT_NEAR(error, 0.0, tolerance);
  const std::vector<TokenId> wanted = expected["output_ids"].numbers<TokenId>();
  EXPECT(model.greedy(sequence, logits, wanted.size()) == wanted);
}

// The fixture's tensor table with one change.
void load_changed(const std::string& name, const std::function<void(Fixture&)>& change) {
  Fixture fixture(fixture_folder(name));
  change(fixture);
  ReferenceBackend backend;
  WeightStore store(fixture.files);
  WeightLoader loader(backend, store, fixture.spec.quant);
  Decoder decoder(loader, fixture.spec.decoder, kMaxTokens);
}

void erase_tensor(Fixture& fixture, const std::string& name) {
  std::erase_if(fixture.files.tensors,
                [&](const TensorEntry& entry) { return entry.name == name; });
}

}  // namespace

TEST("logits and greedy ids of every fixture are those of the float64 network") {
  for_each_backend([](Backend& backend, const Tolerance& tolerance) {
    for (const std::string& name : all_fixtures()) {
      LoadedModel model(backend, name);
      for (const Json& expected : model.fixture.expected["cases"].items()) {
        check_case(model, expected, model.is_awq() ? tolerance.awq : tolerance.dense);
      }
    }
  });
}

TEST("a model that was warmed up answers as one that was not") {
  for_each_backend([](Backend& backend, const Tolerance& tolerance) {
    for (const char* name : {"qwen2-awq-g32", "internvl-chat-rms"}) {
      LoadedModel model(backend, name);
      MemoryPlan plan;
      plan.num_blocks = kNumBlocks;
      plan.blocks_per_session = 3;  // 48 tokens, fewer than a step may have
      plan.max_tokens = kMaxTokens;
      plan.max_rows = kMaxSequences;
      std::unique_ptr<Buffer> tile;
      VisionTower* vision = nullptr;
      if (model.vision) {
        tile = model.encode_formula_tiles(1);
        vision = &*model.vision;
      }
      warm_up(backend, model.decoder, *model.cache, plan, vision,
              tile ? model.embeddings(1, tile.get()) : TensorView());
      for (const Json& expected : model.fixture.expected["cases"].items()) {
        check_case(model, expected, model.is_awq() ? tolerance.awq : tolerance.dense);
      }
    }
  });
}

TEST("a prompt in chunks of any size gives the bits of the whole prompt") {
  for_each_backend([](Backend& backend, const Tolerance&) {
    for (const char* name :
         {"qwen2-bf16-sharded", "qwen2-awq-g32", "qwen3-bf16", "internvl-hf-bf16"}) {
      LoadedModel model(backend, name);
      const Json& expected = model.fixture.expected["cases"].items().back();
      const std::vector<TokenId> prompt = expected["input_ids"].numbers<TokenId>();
      std::unique_ptr<Buffer> buffer;
      std::vector<EmbeddingOverride> overrides;
      if (model.vision) {
        buffer = model.encode_formula_tiles(static_cast<int>(expected["tiles"].integer()));
        overrides = image_rows(model, expected, *buffer);
      }
      StepSequence whole = sequence_of(0);
      const std::vector<float> wanted = model.prefill(whole, prompt, kMaxTokens, overrides);
      for (int chunk : {1, 4, 7, 16}) {
        StepSequence chunked = sequence_of(2);
        EXPECT(model.prefill(chunked, prompt, chunk, overrides) == wanted);
      }
    }
  });
}

TEST("a sequence's bits do not depend on what else is in the step") {
  for_each_backend([](Backend& backend, const Tolerance&) {
    for (const char* name : kTextFixtures) {
      LoadedModel model(backend, name);
      const size_t vocab = static_cast<size_t>(model.decoder.spec().vocab_size);
      std::vector<StepSequence> together;
      std::vector<std::vector<float>> alone;
      for (int i = 0; i < 4; ++i) {  // sequences 0 and 1 decode, 2 and 3 begin
        StepSequence sequence = sequence_of(i);
        std::vector<TokenId> prompt;
        for (int t = 0; t < 3 + 15 * (i % 2); ++t) prompt.push_back((t * 37 + i * 11) % 256);
        if (i < 2) {
          model.prefill(sequence, prompt, kMaxTokens);
          prompt = {i + 65};
        }
        sequence.tokens = prompt;
        alone.push_back(model.step({sequence}));
        together.push_back(sequence);
      }
      const std::vector<float> batched = model.step(together);
      for (size_t i = 0; i < together.size(); ++i) {
        EXPECT(std::equal(alone[i].begin(), alone[i].end(),
                          batched.begin() + static_cast<std::ptrdiff_t>(i * vocab)));
      }
    }
  });
}

TEST("bits do not depend on the number of threads") {
  for (const std::string& isa : cpu_isas()) {
    for (const char* name : {"qwen2-bf16-sharded", "qwen2-awq-g128", "internvl-chat-awq"}) {
      std::vector<float> first;
      for (int threads : {1, 2, 3}) {
        const std::unique_ptr<Backend> backend = make_cpu_backend(isa, threads);
        LoadedModel model(*backend, name);
        StepSequence sequence = sequence_of(0);
        std::vector<TokenId> prompt(40);
        for (size_t t = 0; t < prompt.size(); ++t) prompt[t] = static_cast<TokenId>(t * 41 % 256);
        std::unique_ptr<Buffer> buffer;
        std::vector<EmbeddingOverride> overrides;
        if (model.vision) {
          buffer = model.encode_formula_tiles(3);
          overrides = {{5, model.embeddings(3, buffer.get())}};
        }
        const std::vector<float> logits = model.prefill(sequence, prompt, kMaxTokens, overrides);
        if (first.empty()) first = logits;
        EXPECT(logits == first);
      }
    }
  }
}

TEST("sample answers the best token of each row, logits agree with it") {
  for_each_backend([](Backend& backend, const Tolerance&) {
    LoadedModel model(backend, "qwen2-f32");
    std::vector<StepSequence> sequences = {sequence_of(0), sequence_of(1)};
    sequences[0].tokens = {10, 20, 30};
    sequences[1].tokens = {99};
    const StepArrays arrays(sequences, kBlockSize);
    const StepBatch batch = arrays.batch();
    model.decoder.forward(batch, *model.cache);
    const std::vector<float> logits = model.sampled_logits(batch);
    SamplingParams greedy;
    greedy.num_logprobs = 2;
    std::vector<SampleResult> results(2);
    const std::vector<SampleRow> rows = {{&greedy, sequences[0].tokens, {}, 0},
                                         {&greedy, sequences[1].tokens, {}, 0}};
    model.decoder.sample(rows, results);
    const auto half = logits.begin() + model.decoder.spec().vocab_size;
    EXPECT_EQ(results[0].token,
              static_cast<TokenId>(std::max_element(logits.begin(), half) - logits.begin()));
    EXPECT_EQ(results[1].token, static_cast<TokenId>(std::max_element(half, logits.end()) - half));
    EXPECT(results[0].logprob < 0 && results[0].top_logprobs.size() == 2);
  });
}

TEST("hidden states are the float64 network's; rows of logits have the same bits one by one") {
  ReferenceBackend reference;
  LoadedModel wanted(reference, "qwen2-f32");
  StepSequence sequence = sequence_of(0);
  sequence.tokens = {10, 20, 30, 40, 50};
  const StepArrays arrays({sequence}, kBlockSize);
  const StepBatch batch = arrays.batch();
  wanted.decoder.forward(batch, *wanted.cache);
  const auto hidden = static_cast<size_t>(wanted.decoder.spec().hidden_size);
  const auto vocab = static_cast<size_t>(wanted.decoder.spec().vocab_size);
  std::vector<float> want(5 * hidden);
  wanted.decoder.hidden_states(0, want);
  for_each_backend([&](Backend& backend, const Tolerance&) {
    LoadedModel model(backend, "qwen2-f32");
    model.decoder.forward(batch, *model.cache);
    std::vector<float> states(5 * hidden);
    model.decoder.hidden_states(0, states);
    for (size_t i = 0; i < states.size(); ++i) EXPECT_NEAR(states[i], want[i], 1e-4);
    std::vector<float> one(hidden);
    model.decoder.hidden_states(3, one);
    EXPECT(std::equal(one.begin(), one.end(), states.begin() + 3 * static_cast<long>(hidden)));
    std::vector<float> all(5 * vocab);
    model.decoder.logits(0, all);
    std::vector<float> row(vocab);
    for (int r : {4, 0, 2}) {
      model.decoder.logits(r, row);
      EXPECT(std::equal(row.begin(), row.end(), all.begin() + r * static_cast<long>(vocab)));
    }
  });
}

TEST("loading allocates what activation_bytes announced, a step allocates nothing") {
  CountingBackend backend;
  LoadedModel model(backend, "qwen3-bf16");
  const DecoderSpec& spec = model.decoder.spec();
  const size_t rope_bytes = static_cast<size_t>(spec.head_dim) / 2 * sizeof(float);
  EXPECT_EQ(backend.allocated_bytes,
            Decoder::activation_bytes(spec, DType::f32, kMaxTokens) + rope_bytes);
  const int before = backend.allocations;
  StepSequence sequence = sequence_of(0);
  model.greedy(sequence, model.prefill(sequence, {1, 2, 3}, kMaxTokens), 1);
  EXPECT_EQ(backend.allocations, before);
}

TEST("a step without tokens or with more than the decoder was made for is refused") {
  ReferenceBackend backend;
  LoadedModel model(backend, "qwen2-f32");
  StepSequence sequence = sequence_of(0);
  EXPECT_ERROR(model.step({sequence}), ErrorCode::internal);
  sequence.tokens.assign(kMaxTokens + 1, 7);
  EXPECT_ERROR(model.step({sequence}), ErrorCode::internal);
}

TEST("missing, misshapen and unexpected tensors are refused while loading") {
  const auto without = [](const char* name) { return [=](Fixture& f) { erase_tensor(f, name); }; };
  for (const char* name :
       {"embed_tokens.weight", "norm.weight", "lm_head.weight", "layers.1.attn.q_norm.weight",
        "layers.0.attn.o.weight", "layers.1.mlp.up.weight", "layers.0.input_norm.weight"}) {
    EXPECT_ERROR(load_changed("qwen3-bf16", without(name)), ErrorCode::missing_tensor);
  }
  EXPECT_ERROR(load_changed("qwen2-awq-g32", without("layers.1.mlp.down.scales")),
               ErrorCode::missing_tensor);
  EXPECT_ERROR(load_changed("qwen2-f32", without("layers.0.attn.k.bias")),
               ErrorCode::missing_tensor);
  EXPECT_ERROR(load_changed("qwen2-f32", [](Fixture& f) { f.spec.decoder.qkv_bias = false; }),
               ErrorCode::tensor_mismatch);
  EXPECT_ERROR(load_changed("qwen2-f32", [](Fixture& f) { f.spec.decoder.intermediate_size = 64; }),
               ErrorCode::tensor_mismatch);
  EXPECT_ERROR(load_changed("qwen2-f32", [](Fixture& f) { f.spec.decoder.vocab_size = 271; }),
               ErrorCode::tensor_mismatch);
  EXPECT_ERROR(load_changed("qwen2-f32", [](Fixture& f) { f.spec.decoder.num_layers = 3; }),
               ErrorCode::missing_tensor);
  EXPECT_ERROR(load_changed("qwen2-awq-g32", [](Fixture& f) { f.spec.quant.group_size = 64; }),
               ErrorCode::unsupported_quantization);
}

TEST("progress rises to the bytes of the checkpoint, a tied table counted once") {
  for (const char* name : {"qwen2-f32", "qwen3-bf16", "qwen2-awq-g128"}) {
    const Fixture fixture(fixture_folder(name));
    ReferenceBackend backend;
    const WeightStore store(fixture.files);
    size_t last = 0;
    WeightLoader loader(backend, store, fixture.spec.quant, [&](size_t loaded, size_t total) {
      EXPECT(loaded >= last && total == store.total_bytes());
      last = loaded;
    });
    const Decoder decoder(loader, fixture.spec.decoder, 1);
    EXPECT_EQ(last, store.total_bytes());
  }
}

TEST_MAIN()
