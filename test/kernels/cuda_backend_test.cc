// class CudaBackend as the engine uses it: steps, captured graphs, batches, memory and errors.
#include "backend/cuda/cuda_backend.h"

#include "small_decoder.h"

namespace {

using namespace turbomind;
using namespace turbomind::cuda;
using namespace turbomind::cuda::testing;
using Sequence = SmallDecoder::Sequence;

std::vector<TokenId> prompt_of(int length, uint32_t seed) {
  Random random(seed);
  std::vector<TokenId> prompt(static_cast<size_t>(length));
  for (TokenId& id : prompt) id = random.below(1000);
  return prompt;
}

std::unique_ptr<CudaBackend> backend_with(int graphs) {
  CreateOptions options;
  options.use_graphs = graphs;
  return std::make_unique<CudaBackend>(options);
}

// Prefills `prompt` in chunks of at most `chunk` and decodes `count` tokens, alone.
std::vector<TokenId> generate(SmallDecoder& decoder, const std::vector<TokenId>& prompt, int chunk, int count) {
  Sequence sequence = decoder.make_sequence(prompt);
  while (sequence.computed < static_cast<int>(prompt.size())) {
    decoder.step({&sequence}, {std::min(chunk, static_cast<int>(prompt.size()) - sequence.computed)});
  }
  for (int i = 1; i < count; ++i) decoder.step({&sequence}, {1});
  return {sequence.tokens.begin() + static_cast<int64_t>(prompt.size()), sequence.tokens.end()};
}

TEST("greedy tokens are the same with and without graphs, alone and in a mixed batch of 64") {
  const std::vector<TokenId> prompt = prompt_of(150, 1);
  const auto eager = backend_with(0);
  const auto graphed = backend_with(1);
  SmallDecoder a(*eager, {});
  SmallDecoder b(*graphed, {});
  const std::vector<TokenId> alone = generate(a, prompt, 100, 40);
  EXPECT(generate(b, prompt, 100, 40) == alone);
  EXPECT(generate(b, prompt, 75, 40) == alone);
  EXPECT(graphed->counters().graph_captures > 0);

  // The same request beside 40 others that come and go, some of them prefilling.
  for (SmallDecoder* decoder : {&a, &b}) {
    Sequence wanted = decoder->make_sequence(prompt);
    std::vector<Sequence> others;
    for (int i = 0; i < 30; ++i) others.push_back(decoder->make_sequence(prompt_of(3 + i, 100 + static_cast<uint32_t>(i))));
    decoder->step({&wanted}, {100});
    decoder->step({&others[0], &wanted, &others[1]}, {2, 50, 4});
    for (int step = 1; step < 40; ++step) {
      std::vector<Sequence*> members;
      std::vector<int> chunks;
      for (int i = 0; i < std::min(step, 30); ++i) {
        Sequence& other = others[static_cast<size_t>(i)];
        const int waiting = static_cast<int>(other.tokens.size()) - other.computed;
        if (waiting == 0) continue;
        members.push_back(&other);
        chunks.push_back(std::min(waiting, 9));
      }
      members.insert(members.begin() + static_cast<int64_t>(members.size() / 2), &wanted);
      chunks.insert(chunks.begin() + static_cast<int64_t>(chunks.size() / 2), 1);
      decoder->step(members, chunks);
    }
    const std::vector<TokenId> tokens(wanted.tokens.begin() + 150, wanted.tokens.end());
    EXPECT(tokens == alone);
  }
}

TEST("logits of a step are finite and the same bits with graphs and without") {
  const auto eager = backend_with(0);
  const auto graphed = backend_with(1);
  std::vector<float> first, second, third;
  for (const auto& [backend, out] : {std::pair{eager.get(), &first}, {graphed.get(), &second}, {graphed.get(), &third}}) {
    SmallDecoder decoder(*backend, {});
    Sequence x = decoder.make_sequence(prompt_of(20, 2));
    Sequence y = decoder.make_sequence(prompt_of(300, 3));
    decoder.step({&x}, {20});
    decoder.step({&y}, {200});
    decoder.step({&y}, {100});
    for (int i = 0; i < 5; ++i) decoder.step({&x, &y}, {1, 1}, out);
  }
  EXPECT(first == second);
  EXPECT(second == third);
  for (float value : first) EXPECT(std::isfinite(value));
}

TEST("norms split between products: the values of whole ones, the same bits in any chunk, batch and kernel") {
  const std::vector<TokenId> prompt = prompt_of(150, 12);
  // Logits of the prompt's last token and of three decode steps.
  const auto logits_of = [&](CudaBackend& backend, bool split, const std::vector<int>& chunks, int others) {
    SmallSpec spec;
    spec.blocks = 64 * spec.max_kv_len / 64;  // nobody shares any
    SmallDecoder decoder(backend, spec);
    decoder.next_norms = split;
    Sequence wanted = decoder.make_sequence(prompt);
    std::vector<Sequence> rest;
    for (int i = 0; i < others; ++i) rest.push_back(decoder.make_sequence(prompt_of(2, 300 + static_cast<uint32_t>(i))));
    std::vector<float> all, part;
    for (int chunk : chunks) decoder.step({&wanted}, {chunk}, &part);
    all = part;
    for (Sequence& other : rest) decoder.step({&other}, {2});
    std::vector<Sequence*> members{&wanted};
    for (Sequence& other : rest) members.push_back(&other);
    for (int i = 0; i < 3; ++i) {
      decoder.step(members, std::vector<int>(members.size(), 1), &part);
      all.insert(all.end(), part.begin(), part.begin() + 1000);
    }
    return all;
  };
  const auto graphed = backend_with(1);
  const auto eager = backend_with(0);
  const std::vector<float> split = logits_of(*graphed, true, {150}, 0);
  const std::vector<float> whole = logits_of(*graphed, false, {150}, 0);
  EXPECT(split != whole);
  // Of the first position: later ones may follow another token.
  const double error = relative_error(split, std::vector<double>(whole.begin(), whole.begin() + 1000));
  std::printf("    against whole norms: %.2e\n", error);
  EXPECT(error < 0.03);
  EXPECT(logits_of(*graphed, true, {64, 1, 85}, 3) == split);
  EXPECT(logits_of(*graphed, true, {17, 33, 100}, 20) == split);
  EXPECT(logits_of(*graphed, true, {16, 128, 6}, 40) == split);
  EXPECT(logits_of(*eager, true, {100, 50}, 63) == split);
  for (const char* name : {"u4_sm80", "u4_sm90"}) {
    eager->force_gemm(name);
    EXPECT(logits_of(*eager, true, {150}, 40) == split);
  }
}

// Two products of 16-bit weights with a norm between them, and what the second one gives.
struct TwoProducts {
  TwoProducts(CudaBackend& backend, int hidden, float norm_mean) : backend(backend), hidden(hidden) {
    Random random(8);
    first = dense(random, hidden, 64);
    second = dense(random, 48, hidden);
    const std::vector<float> values = random.floats(static_cast<size_t>(hidden), norm_mean / 3, norm_mean);
    weight = backend.load_vector(ConstTensorView(values.data(), DType::f32, {hidden}));
    norm.weight = ConstTensorView(weight->data(), DType::f32, {hidden});
    input = upload(random.half(kRows * 64, DType::bf16), 64);
    old = random.half(static_cast<size_t>(kRows * hidden), DType::bf16);
    backend.reserve_workspace({.max_tokens = 16, .max_in_features = hidden, .max_out_features = hidden});
  }
  // next: whether the first product knows of the norm; overwrite: x changes between the two.
  std::vector<uint16_t> run(bool next, bool overwrite) {
    const auto x = upload(old, hidden);
    const TensorView x_view(x->data(), DType::bf16, {kRows, hidden});
    backend.linear({.weight = first.get(), .x = ConstTensorView(input->data(), DType::bf16, {kRows, 64}), .y = x_view,
                    .epilogue = Epilogue::residual, .next_norm = next ? &norm : nullptr});
    if (overwrite) backend.norm(norm, x_view, x_view);
    const auto y = upload(std::vector<uint16_t>(kRows * 48, 0xffff), 48);
    const TensorView y_view(y->data(), DType::bf16, {kRows, 48});
    backend.linear({.weight = second.get(), .norm = &norm, .x = x_view, .y = y_view});
    std::vector<uint16_t> out(kRows * 48);
    backend.download(out.data(), y_view);
    return out;
  }

 private:
  static constexpr int kRows = 5;
  std::unique_ptr<LinearWeight> dense(Random& random, int n, int k) {
    const std::vector<uint16_t> bits = random.half(static_cast<size_t>(n) * k, DType::bf16, 0.1F);
    LinearPart part;
    part.out_features = n;
    part.weight = ConstTensorView(bits.data(), DType::bf16, {n, k});
    LinearSource source;
    source.name = "dense";
    source.in_features = k;
    source.parts = {part};
    auto loaded = backend.load_linear(source);
    backend.synchronize();
    return loaded;
  }
  std::unique_ptr<Buffer> upload(const std::vector<uint16_t>& bits, int64_t columns) {
    auto buffer = backend.allocate(bits.size() * 2);
    backend.upload(TensorView(buffer->data(), DType::bf16, {static_cast<int64_t>(bits.size()) / columns, columns}), bits.data());
    return buffer;
  }

  CudaBackend& backend;
  int hidden;
  Norm norm;
  std::unique_ptr<LinearWeight> first, second;
  std::unique_ptr<Buffer> weight, input;
  std::vector<uint16_t> old;
};

TEST("a norm that cannot be split runs whole, and half of one is not used for rows written since") {
  const auto backend = backend_with(0);
  TwoProducts odd(*backend, 96, 1.0F);  // no multiple of 64 columns
  EXPECT(odd.run(true, false) == odd.run(false, false));
  TwoProducts zero(*backend, 128, 0.0F);  // no peak
  EXPECT(zero.run(true, false) == zero.run(false, false));
  TwoProducts products(*backend, 128, 1.0F);
  const std::vector<uint16_t> split = products.run(true, false);
  const std::vector<uint16_t> whole = products.run(false, false);
  const std::vector<float> reference = to_floats(whole, DType::bf16);
  EXPECT(split != whole);
  EXPECT(relative_error(to_floats(split, DType::bf16), std::vector<double>(reference.begin(), reference.end())) < 0.01);
  EXPECT(products.run(true, true) == products.run(false, true));
}

TEST("a steady decode step allocates nothing and captures nothing new") {
  const auto backend = backend_with(1);
  SmallDecoder decoder(*backend, {});
  std::vector<Sequence> sequences;
  std::vector<Sequence*> members;
  for (int i = 0; i < 7; ++i) sequences.push_back(decoder.make_sequence(prompt_of(10 + i, 50 + static_cast<uint32_t>(i))));
  for (Sequence& sequence : sequences) {
    decoder.step({&sequence}, {static_cast<int>(sequence.tokens.size())});
    members.push_back(&sequence);
  }
  const std::vector<int> ones(7, 1);
  decoder.step(members, ones);
  decoder.step(members, ones);
  const CudaCounters before = backend->counters();
  for (int i = 0; i < 50; ++i) decoder.step(members, ones);
  EXPECT_EQ(backend->counters().driver_allocations, before.driver_allocations);
  EXPECT_EQ(backend->counters().graph_captures, before.graph_captures);
}

// Greedy; sampled; penalties, which look at tokens that a step ahead does not know yet.
std::vector<SamplingParams> kinds_of_sampling() {
  std::vector<SamplingParams> kinds(4);
  for (size_t i = 1; i < kinds.size(); ++i) {
    kinds[i].do_sample = true;
    kinds[i].temperature = 1.5F;
    kinds[i].seed = 40 + i;
  }
  kinds[1].top_k = 50;
  kinds[1].num_logprobs = 3;
  kinds[2].top_p = 0.9F;
  kinds[2].repetition_penalty = 1.8F;
  kinds[2].frequency_penalty = 0.7F;
  kinds[3].presence_penalty = 1.5F;
  kinds[3].num_logprobs = 2;
  kinds[3].bad_words = {{7}};
  return kinds;
}

struct Group {
  Group(SmallDecoder& decoder, int count) {
    for (int i = 0; i < count; ++i) {
      sequences.push_back(decoder.make_sequence(prompt_of(5 + i % 30, 200 + static_cast<uint32_t>(i))));
    }
    for (Sequence& sequence : sequences) {
      decoder.step({&sequence}, {sequence.prompt});
      members.push_back(&sequence);
    }
  }
  std::vector<Sequence> sequences;
  std::vector<Sequence*> members;
};

TEST("steps launched ahead draw what steps that are waited for draw") {
  for (const int graphs : {0, 1}) {
    const auto backend = backend_with(graphs);
    SmallDecoder decoder(*backend, {});
    for (const SamplingParams& params : kinds_of_sampling()) {
      decoder.params = params;
      for (const int count : {1, 5, 16}) {
        Group plain(decoder, count);
        for (int i = 0; i < 24; ++i) decoder.step(plain.members, std::vector<int>(static_cast<size_t>(count), 1));
        Group ahead(decoder, count);
        // Runs of steps ahead of different lengths, and single steps between them.
        for (const int run : {1, 9, 1, 2, 10}) {
          EXPECT(decoder.launch(ahead.members));
          for (int i = 1; i < run; ++i) {
            EXPECT(decoder.launch(ahead.members));
            decoder.collect(ahead.members);
          }
          decoder.collect(ahead.members);
          if (run == 9) decoder.step(ahead.members, std::vector<int>(static_cast<size_t>(count), 1));
        }
        for (size_t i = 0; i < plain.sequences.size(); ++i) {
          EXPECT(ahead.sequences[i].tokens == plain.sequences[i].tokens);
          EXPECT(ahead.sequences[i].top == plain.sequences[i].top);
        }
      }
    }
    EXPECT_EQ(backend->counters().rows_on_host, 0U);
  }
}

TEST("a step ahead allocates nothing and captures nothing new") {
  const auto backend = backend_with(1);
  SmallDecoder decoder(*backend, {});
  decoder.params = kinds_of_sampling()[2];
  Group group(decoder, 7);
  EXPECT(decoder.launch(group.members));
  CudaCounters before;
  for (int i = 0; i < 40; ++i) {
    EXPECT(decoder.launch(group.members));
    decoder.collect(group.members);
    if (i == 1) before = backend->counters();
  }
  decoder.collect(group.members);
  EXPECT_EQ(backend->counters().driver_allocations, before.driver_allocations);
  EXPECT_EQ(backend->counters().graph_captures, before.graph_captures);
}

TEST("a ban that depends on a token not known yet is left to sample()") {
  const auto backend = backend_with(1);
  SmallDecoder decoder(*backend, {});
  decoder.params.bad_words = {{1, 2}};
  Group group(decoder, 2);
  EXPECT(decoder.launch(group.members));  // all tokens are known
  EXPECT(!decoder.launch(group.members));
  decoder.collect(group.members);
  EXPECT(group.sequences[0].tokens.back() >= 0);
}

TEST("drafts draw what decoding one by one draws, in captured steps") {
  const auto eager = backend_with(0);
  const auto graphed = backend_with(1);
  for (CudaBackend* backend : {eager.get(), graphed.get()}) {
    SmallDecoder decoder(*backend, {});
    for (const SamplingParams& params : kinds_of_sampling()) {
      decoder.params = params;
      Group group(decoder, 6);
      Group reference(decoder, 6);
      for (int i = 0; i < 16; ++i) decoder.step(reference.members, std::vector<int>(6, 1));
      size_t captured = 0;
      for (int round = 0; round < 3; ++round) {
        // The i-th sequence guesses i + 1 tokens, all but the last of which will be right.
        std::vector<std::vector<TokenId>> drafts(6);
        for (size_t s = 0; s < 6; ++s) {
          const std::vector<TokenId>& right = reference.sequences[s].tokens;
          const size_t known = group.sequences[s].tokens.size();
          for (size_t i = 0; i <= s; ++i) drafts[s].push_back(right[known + i]);
          drafts[s].back() = (drafts[s].back() + 1) % 1000;
        }
        const auto drawn = decoder.verify(group.members, drafts);
        for (size_t s = 0; s < 6; ++s) {
          Sequence& sequence = group.sequences[s];
          const std::vector<TokenId>& right = reference.sequences[s].tokens;
          for (size_t i = 0; i <= s; ++i) EXPECT_EQ(drawn[s][i], right[sequence.tokens.size() + i]);
        }
        for (Sequence& sequence : group.sequences) {
          sequence.tokens.push_back(reference.sequences[static_cast<size_t>(&sequence - group.sequences.data())].tokens[sequence.tokens.size()]);
          ++sequence.computed;
        }
        if (round == 0) captured = backend->counters().graph_captures;
      }
      EXPECT_EQ(backend->counters().graph_captures, captured);
    }
  }
  EXPECT(graphed->counters().graph_captures > 0);
}

TEST("buffers without room for padding rows are never written past their end") {
  const auto backend = backend_with(1);
  const auto eager = backend_with(0);
  SmallSpec spec;
  spec.max_tokens = 5;  // below the bucket of 5 rows, which is 8
  SmallDecoder tight(*backend, spec);
  SmallDecoder reference(*eager, spec);
  for (SmallDecoder* decoder : {&tight, &reference}) decoder->params = {};
  std::vector<std::vector<TokenId>> outputs;
  for (SmallDecoder* decoder : {&tight, &reference}) {
    std::vector<Sequence> sequences;
    std::vector<Sequence*> members;
    for (int i = 0; i < 5; ++i) sequences.push_back(decoder->make_sequence(prompt_of(3, static_cast<uint32_t>(i))));
    for (Sequence& sequence : sequences) {
      decoder->step({&sequence}, {3});
      members.push_back(&sequence);
    }
    for (int i = 0; i < 10; ++i) decoder->step(members, {1, 1, 1, 1, 1});
    std::vector<TokenId> all;
    for (const Sequence& sequence : sequences) all.insert(all.end(), sequence.tokens.begin(), sequence.tokens.end());
    outputs.push_back(all);
  }
  EXPECT(outputs[0] == outputs[1]);
}

TEST("sampled tokens repeat with their seed, and log-probabilities come back") {
  const auto backend = backend_with(1);
  SmallDecoder decoder(*backend, {});
  decoder.params.do_sample = true;
  decoder.params.temperature = 0.9F;
  decoder.params.top_k = 40;
  decoder.params.seed = 77;
  decoder.params.num_logprobs = 3;
  const std::vector<TokenId> prompt = prompt_of(30, 9);
  const std::vector<TokenId> first = generate(decoder, prompt, 64, 12);
  EXPECT(generate(decoder, prompt, 64, 12) == first);
}

TEST("too much memory is an error with numbers, and the backend lives on") {
  const auto backend = backend_with(1);
  try {
    (void)backend->allocate(size_t{1} << 45);
    EXPECT(false);
  } catch (const Error& error) {
    EXPECT(error.code() == ErrorCode::out_of_memory);
    EXPECT(std::string(error.what()).find("GiB") != std::string::npos);
  }
  SmallDecoder decoder(*backend, {});
  EXPECT_EQ(generate(decoder, prompt_of(10, 4), 64, 3).size(), 3U);
}

TEST("shapes and options that the kernels cannot serve are refused by name") {
  CreateOptions options;
  options.device = 99;
  EXPECT_ERROR(CudaBackend(options), ErrorCode::unsupported_device);
  options = {};
  options.abi_version = -1;
  EXPECT_ERROR(make_cuda_backend(options), ErrorCode::unsupported_device);
  options = {};
  options.activation_dtype = static_cast<int>(DType::i8);
  EXPECT_ERROR(CudaBackend(options), ErrorCode::invalid_argument);
  cudaDeviceProp turing{};
  turing.major = 7;
  turing.minor = 5;
  EXPECT_ERROR((check_supported(0, turing), 0), ErrorCode::unsupported_device);
  const auto backend = backend_with(1);
  EXPECT_ERROR(backend->make_kv_cache({1, 1, 64, 16, 4}), ErrorCode::invalid_argument);
  const std::vector<uint16_t> weight(64 * 64);
  LinearPart part;
  part.out_features = 64;
  part.weight = ConstTensorView(weight.data(), DType::bf16, {64, 32});
  LinearSource source;
  source.name = "wrong";
  source.in_features = 64;
  source.parts = {part};
  EXPECT_ERROR(backend->load_linear(source), ErrorCode::tensor_mismatch);
}

TEST("closing gives back the GPU memory") {
  size_t before = 0;
  size_t after = 0;
  size_t total = 0;
  {
    const auto warm = backend_with(1);  // the context and its modules stay
    SmallDecoder decoder(*warm, {});
    (void)generate(decoder, prompt_of(10, 4), 64, 3);
  }
  cuda_check(cudaMemGetInfo(&before, &total));
  for (int i = 0; i < 3; ++i) {
    const auto backend = backend_with(1);
    SmallDecoder decoder(*backend, {});
    (void)generate(decoder, prompt_of(10, 4), 64, 3);
  }
  cuda_check(cudaMemGetInfo(&after, &total));
  EXPECT(after + (size_t{4} << 20) >= before);
}

}  // namespace

int main() {
  require_device();
  return turbomind::test::run_all();
}
