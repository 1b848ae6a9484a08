// The CPU backend as models use it: memory, weights, ops in a step, sampling.
#include "backend/cpu/cpu_backend.h"

#include <atomic>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <new>
#include <random>

#include "backend/backends.h"
#include "test.h"

using namespace turbomind;
using cpu::CpuBackend;

// Counts what the C++ runtime hands out, on any thread. Not inlined, or GCC 12 takes malloc and
// delete for a mismatched pair.
static std::atomic<long> allocations{0};
[[gnu::noinline]] void* operator new(size_t bytes) {
  ++allocations;
  if (void* memory = std::malloc(bytes)) return memory;
  throw std::bad_alloc();
}
[[gnu::noinline]] void* operator new(size_t bytes, std::align_val_t alignment,
                                     const std::nothrow_t&) noexcept {
  ++allocations;
  const auto align = static_cast<size_t>(alignment);
  return std::aligned_alloc(align, (bytes + align - 1) / align * align);
}
[[gnu::noinline]] void operator delete(void* memory) noexcept { std::free(memory); }
[[gnu::noinline]] void operator delete(void* memory, size_t) noexcept { std::free(memory); }
[[gnu::noinline]] void operator delete(void* memory, std::align_val_t) noexcept {
  std::free(memory);
}

namespace {

std::vector<float> random_values(size_t count, uint32_t seed, float spread = 1.0F) {
  std::mt19937 random(seed);
  std::normal_distribution<float> normal(0.0F, spread);
  std::vector<float> values(count);
  for (float& value : values) value = normal(random);
  return values;
}

ConstTensorView view(const std::vector<float>& values, int64_t rows) {
  return {values.data(), DType::f32, {rows, static_cast<int64_t>(values.size()) / rows}};
}
TensorView view(std::vector<float>& values, int64_t rows) {
  return {values.data(), DType::f32, {rows, static_cast<int64_t>(values.size()) / rows}};
}
ConstTensorView vector_view(const std::vector<float>& values) {
  return {values.data(), DType::f32, {static_cast<int64_t>(values.size())}};
}

LinearSource dense(const std::vector<float>& weight, int64_t n, int64_t k) {
  LinearSource source;
  source.name = "test";
  source.in_features = k;
  LinearPart part;
  part.out_features = n;
  part.weight = ConstTensorView(weight.data(), DType::f32, {n, k});
  source.parts = {part};
  return source;
}

// One token a sequence; what sampling and embedding need of a step.
struct Step {
  explicit Step(std::vector<TokenId> tokens) : ids(std::move(tokens)) {
    for (int32_t i = 0; i < static_cast<int32_t>(ids.size()); ++i) {
      positions.push_back(0);
      slots.push_back(i * 64);
      starts.push_back(i);
      kv_len.push_back(1);
      blocks.push_back(i);
      sampled.push_back(i);
    }
    starts.push_back(static_cast<int32_t>(ids.size()));
  }
  StepBatch batch() const {
    return {.token_ids = ids,
            .positions = positions,
            .slots = slots,
            .query_start = starts,
            .kv_len = kv_len,
            .block_table = blocks,
            .max_blocks = 1,
            .sample_rows = sampled};
  }
  std::vector<TokenId> ids;
  std::vector<int32_t> positions, slots, starts, kv_len, blocks, sampled;
};

constexpr int64_t kHidden = 64;
constexpr int64_t kVocab = 2000;

// Sampling of `rows` hidden states with the given parameters, in one step.
std::vector<SampleResult> sample_all(CpuBackend& backend, const LinearWeight& head,
                                     const std::vector<float>& x,
                                     const std::vector<SamplingParams>& params,
                                     const std::vector<TokenId>& said = {}) {
  const auto rows = static_cast<int64_t>(params.size());
  const Step step{std::vector<TokenId>(params.size(), 0)};
  std::vector<SampleRow> sample_rows;
  for (size_t i = 0; i < params.size(); ++i) {
    sample_rows.push_back({.params = &params[i],
                           .tokens = said,
                           .banned = {},
                           .completion_idx = static_cast<uint32_t>(i)});
  }
  std::vector<SampleResult> results(params.size());
  backend.begin_step(step.batch());
  backend.sample({.head = &head,
                  .norm = nullptr,
                  .x = view(x, rows),
                  .rows = sample_rows,
                  .results = results});
  return results;
}

}  // namespace

TEST("buffers are aligned, hold what was uploaded, and absurd ones give a typed error") {
  CpuBackend backend({.threads = 1, .isa = ""});
  for (const size_t bytes : {size_t{0}, size_t{1}, size_t{5000}, size_t{3} << 20}) {
    const auto buffer = backend.allocate(bytes);
    EXPECT_EQ(reinterpret_cast<uintptr_t>(buffer->data()) % 64, uintptr_t{0});
    EXPECT_EQ(buffer->bytes(), bytes);
    std::memset(buffer->data(), 7, bytes);
  }
  const auto buffer = backend.allocate(12);
  const float sent[3] = {1, 2, 3};
  float back[3] = {};
  backend.upload({buffer->data(), DType::f32, {3}}, sent);
  backend.download(back, {buffer->data(), DType::f32, {3}});
  EXPECT_EQ(back[2], 3.0F);
  EXPECT_ERROR(backend.allocate(size_t{1} << 60), ErrorCode::out_of_memory);
  EXPECT_ERROR(backend.allocate(SIZE_MAX - 100), ErrorCode::out_of_memory);
  EXPECT_ERROR(backend.make_kv_cache({.num_layers = 1 << 20,
                                      .num_kv_heads = 1 << 10,
                                      .head_dim = 1 << 10,
                                      .block_size = 64,
                                      .num_blocks = 1 << 30}),
               ErrorCode::out_of_memory);
  EXPECT_ERROR(
      backend.make_kv_cache(
          {.num_layers = 1, .num_kv_heads = 0, .head_dim = 64, .block_size = 64, .num_blocks = 1}),
      ErrorCode::invalid_config);
}

TEST("a KV cache costs what kv_block_bytes says") {
  CpuBackend backend({.threads = 1, .isa = ""});
  const KvCacheSpec spec{
      .num_layers = 3, .num_kv_heads = 2, .head_dim = 64, .block_size = 64, .num_blocks = 5};
  EXPECT_EQ(backend.kv_block_bytes(spec), size_t{3 * 2 * 64 * 64 * 2 * 4});
  const auto cache = backend.make_kv_cache(spec);
  EXPECT_EQ(cache->spec().num_blocks, 5);
}

TEST("embedding rows of f32, f16 and bf16 tables, and image rows over them") {
  CpuBackend backend({.threads = 2, .isa = ""});
  const uint16_t f16[6] = {0x3c00, 0xc000, 0x0001, 0x7bff, 0x3555, 0x8000};
  const float f16_values[6] = {1.0F, -2.0F, 0x1p-24F, 65504.0F, 0x1.554p-2F, -0.0F};
  const uint16_t bf16[6] = {0x3f80, 0xc000, 0x0001, 0x4049, 0x7f7f, 0x8000};
  const float bf16_values[6] = {1.0F, -2.0F, 0x1p-133F, 3.140625F, 0x1.fep127F, -0.0F};
  const float f32_values[6] = {1, 2, 3, 4, 5, 6};
  const Step step({1, 2, 1, 0});
  const float image[4] = {10, 20, 30, 40};
  const std::vector<EmbeddingOverride> overrides = {
      {.row = 2, .embeddings = ConstTensorView(image, DType::f32, {2, 2})}};
  const auto check = [&](const void* data, DType dtype, const float* values) {
    const auto table = backend.load_embedding({data, dtype, {3, 2}});
    std::vector<float> x(8);
    backend.begin_step(step.batch());
    backend.embed({.table = table.get(), .x = view(x, 4), .overrides = overrides});
    const float want[8] = {values[2], values[3], values[4], values[5], 10, 20, 30, 40};
    EXPECT_EQ(std::memcmp(x.data(), want, sizeof want), 0);
  };
  check(f16, DType::f16, f16_values);
  check(bf16, DType::bf16, bf16_values);
  check(f32_values, DType::f32, f32_values);

  const auto table = backend.load_embedding({f32_values, DType::f32, {3, 2}});
  std::vector<float> x(2);
  const Step bad({3});
  backend.begin_step(bad.batch());
  EXPECT_ERROR(backend.embed({.table = table.get(), .x = view(x, 1), .overrides = {}}),
               ErrorCode::internal);
  EXPECT_ERROR(backend.load_embedding({f32_values, DType::i32, {3, 2}}),
               ErrorCode::tensor_mismatch);
}

TEST("norms by hand") {
  CpuBackend backend({.threads = 1, .isa = ""});
  const std::vector<float> x = {3, 4, 0, 0, 1, 1, 1, 1};
  const std::vector<float> weight = {1, 2, 3, 4};
  const std::vector<float> bias = {0, 0, 10, 0};
  std::vector<float> y(8);
  backend.norm({.kind = NormKind::rms, .weight = vector_view(weight), .bias = {}, .eps = 0},
               view(x, 2), view(y, 2));
  EXPECT_NEAR(y[0], 3 / 2.5, 1e-6);
  EXPECT_NEAR(y[1], 2 * 4 / 2.5, 1e-6);
  EXPECT_NEAR(y[7], 4.0, 1e-6);
  std::vector<float> z = {1, 2, 3, 4, 5, 5, 5, 5};
  backend.norm({.kind = NormKind::layer,
                .weight = vector_view(weight),
                .bias = vector_view(bias),
                .eps = 1e-5F},
               view(z, 2), view(z, 2));  // in place; mean 2.5, variance 1.25
  EXPECT_NEAR(z[0], -1.5 / std::sqrt(1.25001), 1e-6);
  EXPECT_NEAR(z[2], 10 + 3 * 0.5 / std::sqrt(1.25001), 1e-6);
  EXPECT_EQ(z[6], 10.0F);
}

TEST("tokens scored by best_logits equal those of the full logits, alone and in any batch") {
  CpuBackend fast({.threads = 2, .isa = ""});
  CpuBackend full({.threads = 1, .isa = ""});
  full.set_exhaustive_sampling();
  const auto weight = random_values(kVocab * kHidden, 1, 0.3F);
  const auto fast_head = fast.load_head(dense(weight, kVocab, kHidden));
  const auto full_head = full.load_head(dense(weight, kVocab, kHidden));
  std::vector<SamplingParams> params;
  for (int i = 0; i < 70; ++i) {  // more than one group of logits rows
    SamplingParams p{.do_sample = i % 2 == 1,
                     .temperature = 0.7F,
                     .top_k = i % 3 == 0 ? 0 : 1 + i,
                     .top_p = i % 5 == 0 ? 0.8F : 1.0F,
                     .logit_bias = {},
                     .seed = static_cast<uint64_t>(i),
                     .bad_words = {}};
    if (i % 7 == 0) p.repetition_penalty = 1.3F;
    if (i % 11 == 0) p.num_logprobs = 2;
    if (i % 4 == 0) p.bad_words = {{i}, {7, 8}, {9, 3}};
    if (i % 13 == 0) p.frequency_penalty = -1.5F;  // raises what was said
    if (i % 17 == 0) p.logit_bias = {{i, 30.0F}, {1500, -30.0F}};
    params.push_back(p);
  }
  const std::vector<TokenId> said = {5, 5, 7};
  const auto x = random_values(70 * kHidden, 2);
  const auto got = sample_all(fast, *fast_head, x, params, said);
  const auto want = sample_all(full, *full_head, x, params, said);
  for (size_t i = 0; i < got.size(); ++i) {
    EXPECT_EQ(got[i].token, want[i].token);
    EXPECT_EQ(got[i].logprob, want[i].logprob);
    EXPECT_EQ(got[i].top_logprobs.size(), want[i].top_logprobs.size());
    EXPECT(got[i].token >= 0 && got[i].token < kVocab);
  }
  // greedy row 4 with its best tokens banned one after another
  const std::vector<float> row(x.begin() + 4 * kHidden, x.begin() + 5 * kHidden);
  SamplingParams banning;
  for (int round = 0; round < 5; ++round) {
    const auto a = sample_all(fast, *fast_head, row, {banning})[0];
    const auto b = sample_all(full, *full_head, row, {banning})[0];
    EXPECT_EQ(a.token, b.token);
    for (const auto& word : banning.bad_words) EXPECT(word[0] != a.token);
    banning.bad_words.push_back({a.token});
  }
}

TEST("logits are x W^T of the given rows under the final norm") {
  CpuBackend backend({.threads = 1, .isa = ""});
  const auto weight = random_values(kVocab * kHidden, 1, 0.3F);
  const auto head = backend.load_head(dense(weight, kVocab, kHidden));
  const auto x = random_values(3 * kHidden, 2);
  const auto scale = random_values(kHidden, 3);
  Norm norm;
  norm.weight = vector_view(scale);
  std::vector<float> out(2 * kVocab);
  backend.logits({.head = head.get(), .norm = &norm, .x = view(x, 3).rows(1, 2)}, out);
  double square = 0;
  for (int64_t k = 0; k < kHidden; ++k) square += double{x[2 * kHidden + k]} * x[2 * kHidden + k];
  for (int64_t v : {int64_t{0}, int64_t{777}, kVocab - 1}) {
    double dot = 0;
    for (int64_t k = 0; k < kHidden; ++k) {
      dot += double{x[2 * kHidden + k]} * scale[k] * weight[v * kHidden + k];
    }
    EXPECT_NEAR(out[kVocab + v], dot / std::sqrt(square / kHidden + 1e-6), 1e-4);
  }
}

TEST("a row of NaN is an error that names it; the other rows keep their tokens") {
  CpuBackend backend({.threads = 2, .isa = ""});
  const auto weight = random_values(kVocab * kHidden, 1, 0.3F);
  const auto head = backend.load_head(dense(weight, kVocab, kHidden));
  auto x = random_values(3 * kHidden, 2);
  const auto want = sample_all(backend, *head, x, std::vector<SamplingParams>(3));
  x[kHidden + 5] = NAN;
  const Step step({0, 0, 0});
  const SamplingParams greedy;
  const std::vector<SampleRow> rows(3, SampleRow{.params = &greedy, .tokens = {}, .banned = {}});
  std::vector<SampleResult> results(3);
  backend.begin_step(step.batch());
  try {
    backend.sample(
        {.head = head.get(), .norm = nullptr, .x = view(x, 3), .rows = rows, .results = results});
    EXPECT(!"an error was expected");
  } catch (const Error& error) {
    EXPECT(error.code() == ErrorCode::device_error);
    EXPECT(std::string(error.what()).find("row 1 of 3") != std::string::npos);
  }
  EXPECT_EQ(results[0].token, want[0].token);
  EXPECT_EQ(results[1].token, -1);
  EXPECT_EQ(results[2].token, want[2].token);
}

TEST("a decode step allocates nothing once it has run") {
  CpuBackend backend({.threads = 2, .isa = ""});
  const auto weight = random_values(kVocab * kHidden, 1, 0.1F);
  const auto head = backend.load_head(dense(weight, kVocab, kHidden));
  const auto qkv_weight = random_values(4 * kHidden * kHidden, 2, 0.1F);
  const auto qkv_linear = backend.load_linear(dense(qkv_weight, 4 * kHidden, kHidden));
  const auto table = backend.load_embedding(view(weight, kVocab));
  const auto cache = backend.make_kv_cache(
      {.num_layers = 1, .num_kv_heads = 1, .head_dim = 64, .block_size = 64, .num_blocks = 3});
  backend.reserve_workspace({.max_tokens = 3,
                             .max_sequences = 3,
                             .max_rows = 3,
                             .max_in_features = kHidden,
                             .max_out_features = 4 * kHidden,
                             .vocab_size = kVocab,
                             .max_kv_len = 64,
                             .max_heads = 2,
                             .max_head_dim = 64});
  const std::vector<float> inv_freq(32, 0.5F);
  std::vector<float> x(3 * kHidden), qkv(3 * 4 * kHidden), y(3 * 2 * kHidden);
  const Step step({1, 2, 3});
  std::vector<SamplingParams> params(3);
  params[1] = {.do_sample = true, .top_k = 20, .logit_bias = {}, .bad_words = {{4}}};
  params[2] = {.do_sample = true,
               .top_p = 0.9F,
               .repetition_penalty = 1.2F,
               .logit_bias = {},
               .bad_words = {}};
  std::vector<SampleRow> rows;
  for (const SamplingParams& p : params) {
    rows.push_back({.params = &p, .tokens = step.ids, .banned = {}});
  }
  std::vector<SampleResult> results(3);
  long last = -1;
  // Each thread keeps a sampler's memory from its first draw on; which threads draw is chance.
  for (int round = 0; round < 100 && last != 1; ++round) {
    const long before = allocations.load();
    backend.begin_step(step.batch());
    backend.execute([&] {
      backend.embed({.table = table.get(), .x = view(x, 3), .overrides = {}});
      LinearArgs linear;
      linear.weight = qkv_linear.get();
      linear.x = view(x, 3);
      linear.y = view(qkv, 3);
      backend.linear(linear);
      AttentionArgs attention;
      attention.qkv = view(qkv, 3);
      attention.y = view(y, 3);
      attention.cache = cache.get();
      attention.num_heads = 2;
      attention.num_kv_heads = 1;
      attention.head_dim = 64;
      attention.rope.inv_freq = vector_view(inv_freq);
      backend.attention(attention);
    });
    backend.sample(
        {.head = head.get(), .norm = nullptr, .x = view(x, 3), .rows = rows, .results = results});
    last = allocations.load() - before;
  }
  EXPECT_EQ(last, 1L);  // the std::function that carries the lambda above
  EXPECT(results[0].token >= 0 && results[1].token >= 0 && results[2].token >= 0);
}

TEST("weights of another kind, wrong shapes and unknown devices are refused") {
  CpuBackend backend({.threads = 1, .isa = ""});
  const auto weight = random_values(32 * kHidden, 1);
  const auto linear = backend.load_linear(dense(weight, 32, kHidden));
  const auto head = backend.load_head(dense(weight, 32, kHidden));
  std::vector<float> x(kHidden), y(32), short_y(31);
  LinearArgs args;
  args.weight = head.get();
  args.x = view(x, 1);
  args.y = view(y, 1);
  EXPECT_ERROR(backend.linear(args), ErrorCode::internal);
  args.weight = linear.get();
  backend.linear(args);
  args.y = view(short_y, 1);
  EXPECT_ERROR(backend.linear(args), ErrorCode::internal);
  EXPECT_ERROR(make_backend({.device = "cuda", .threads = 1, .cuda_library = "", .cpu_isa = ""}),
               ErrorCode::unsupported_device);
  EXPECT_ERROR(make_backend({.device = "gpu", .threads = 1, .cuda_library = "", .cpu_isa = ""}),
               ErrorCode::unsupported_device);
  EXPECT_ERROR(make_backend({.device = "cpu", .threads = -1, .cuda_library = "", .cpu_isa = ""}),
               ErrorCode::invalid_argument);
  EXPECT_EQ(
      make_backend({.device = "cpu", .threads = 1, .cuda_library = "", .cpu_isa = ""})->info().name,
      std::string("cpu"));
}

TEST_MAIN()
