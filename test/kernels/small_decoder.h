// A random 4-bit decoder with a few layers, driven through the Backend seam as models/ drives it:
// for tests of steps, graphs and batches, not of numbers.
#pragma once

#include <algorithm>
#include <memory>

#include "backend/backend.h"
#include "gpu_test.h"

namespace turbomind::cuda::testing {

struct SmallSpec {
  int hidden = 256, layers = 3, heads = 6, kv_heads = 2, dim = 64, mlp = 512, vocab = 1000;
  int max_tokens = 256, max_sequences = 64, max_kv_len = 1024, blocks = 512;
};

class SmallDecoder {
 public:
  SmallDecoder(Backend& backend, const SmallSpec& spec, uint32_t seed = 5) : backend_(backend), spec_(spec), random_(seed) {
    const int qkv = (spec.heads + 2 * spec.kv_heads) * spec.dim;
    for (int i = 0; i < spec.layers; ++i) {
      qkv_.push_back(awq(qkv, spec.hidden, PartOrder::concatenated));
      o_.push_back(awq(spec.hidden, spec.heads * spec.dim, PartOrder::concatenated));
      gate_up_.push_back(awq(2 * spec.mlp, spec.hidden, PartOrder::gate_up));
      down_.push_back(awq(spec.hidden, spec.mlp, PartOrder::concatenated));
    }
    table_bits_ = random_.half(static_cast<size_t>(spec.vocab) * spec.hidden, DType::bf16, 0.5F);
    const ConstTensorView table(table_bits_.data(), DType::bf16, {spec.vocab, spec.hidden});
    table_ = backend.load_embedding(table);
    LinearPart part;
    part.out_features = spec.vocab;
    part.weight = table;
    LinearSource head;
    head.name = "head";
    head.in_features = spec.hidden;
    head.parts = {part};
    head_ = backend.load_head(head);
    const std::vector<float> ones(static_cast<size_t>(spec.hidden), 1.0F);
    ones_ = backend.load_vector(ConstTensorView(ones.data(), DType::f32, {spec.hidden}));
    norm_.weight = ConstTensorView(ones_->data(), DType::f32, {spec.hidden});
    std::vector<float> freq(static_cast<size_t>(spec.dim) / 2);
    for (size_t i = 0; i < freq.size(); ++i) freq[i] = std::pow(10000.0F, -2.0F * static_cast<float>(i) / static_cast<float>(spec.dim));
    freq_ = backend.load_vector(ConstTensorView(freq.data(), DType::f32, {spec.dim / 2}));
    const auto rows = [&](int64_t columns) { return backend.allocate(static_cast<size_t>(spec.max_tokens * columns) * 2); };
    x_ = rows(spec.hidden);
    qkv_out_ = rows(qkv);
    attended_ = rows(static_cast<int64_t>(spec.heads) * spec.dim);
    mlp_ = rows(spec.mlp);
    cache_ = backend.make_kv_cache({spec.layers, spec.kv_heads, spec.dim, 64, spec.blocks});
    backend.reserve_workspace({.max_tokens = spec.max_tokens, .max_sequences = spec.max_sequences, .max_rows = spec.max_sequences,
                               .max_in_features = std::max({spec.hidden, spec.mlp, spec.heads * spec.dim}),
                               .max_out_features = std::max(qkv, 2 * spec.mlp), .vocab_size = spec.vocab,
                               .max_kv_len = spec.max_kv_len, .max_heads = spec.heads, .max_head_dim = spec.dim});
  }

  struct Sequence {
    std::vector<TokenId> tokens;
    std::vector<int32_t> blocks;
    int computed = 0;
  };
  Sequence make_sequence(std::vector<TokenId> prompt) {
    Sequence sequence{std::move(prompt), {}, 0};
    for (int i = 0; i < spec_.max_kv_len / 64; ++i) sequence.blocks.push_back(next_block_++ % spec_.blocks);
    return sequence;
  }

  // One step: sequence i computes chunks[i] of its waiting tokens; those that finish get a token.
  void step(std::vector<Sequence*> sequences, const std::vector<int>& chunks, std::vector<float>* logits = nullptr) {
    std::vector<TokenId> ids;
    std::vector<int32_t> positions, slots, start{0}, kv_len, table, sample_rows;
    std::vector<Sequence*> finished;
    const int stride = spec_.max_kv_len / 64;
    for (size_t s = 0; s < sequences.size(); ++s) {
      Sequence& sequence = *sequences[s];
      for (int i = 0; i < chunks[s]; ++i) {
        const int position = sequence.computed + i;
        ids.push_back(sequence.tokens[static_cast<size_t>(position)]);
        positions.push_back(position);
        slots.push_back(sequence.blocks[static_cast<size_t>(position / 64)] * 64 + position % 64);
      }
      sequence.computed += chunks[s];
      start.push_back(static_cast<int32_t>(ids.size()));
      kv_len.push_back(sequence.computed);
      table.insert(table.end(), sequence.blocks.begin(), sequence.blocks.end());
      if (sequence.computed == static_cast<int>(sequence.tokens.size())) {
        sample_rows.push_back(static_cast<int32_t>(ids.size()) - 1);
        finished.push_back(&sequence);
      }
    }
    const StepBatch batch{.token_ids = ids, .positions = positions, .slots = slots, .query_start = start, .kv_len = kv_len,
                          .block_table = table, .max_blocks = stride, .sample_rows = sample_rows};
    backend_.begin_step(batch);
    const auto tokens = static_cast<int64_t>(ids.size());
    const SampleArgs args{.head = head_.get(), .norm = &norm_, .x = view(*x_, tokens, spec_.hidden)};
    backend_.execute([&] {
      forward(tokens);
      if (!sample_rows.empty() && start_sample) backend_.start_sample(args);
    });
    if (logits != nullptr) {
      logits->resize(sample_rows.size() * static_cast<size_t>(spec_.vocab));
      const auto vocab = static_cast<size_t>(spec_.vocab);
      for (size_t r = 0; r < sample_rows.size(); ++r) {
        backend_.logits({.head = head_.get(), .norm = &norm_, .x = args.x.rows(sample_rows[r], 1)},
                        std::span(*logits).subspan(r * vocab, vocab));
      }
    }
    if (finished.empty()) return;
    std::vector<SampleRow> rows(finished.size());
    std::vector<SampleResult> results(finished.size());
    for (size_t i = 0; i < rows.size(); ++i) rows[i] = {&params, finished[i]->tokens, {}, 0};
    SampleArgs sample = args;
    sample.rows = rows;
    sample.results = results;
    backend_.sample(sample);
    for (size_t i = 0; i < rows.size(); ++i) finished[i]->tokens.push_back(results[i].token);
  }

  SamplingParams params;
  bool start_sample = true;  // head inside the captured step

 private:
  TensorView view(Buffer& buffer, int64_t rows, int64_t columns) const {
    return TensorView(buffer.data(), backend_.activation_dtype(), {rows, columns});
  }
  void forward(int64_t tokens) {
    const int qkv = (spec_.heads + 2 * spec_.kv_heads) * spec_.dim;
    const TensorView x = view(*x_, tokens, spec_.hidden);
    const TensorView attended = view(*attended_, tokens, static_cast<int64_t>(spec_.heads) * spec_.dim);
    const TensorView mlp = view(*mlp_, tokens, spec_.mlp);
    backend_.embed({.table = table_.get(), .x = x, .overrides = {}});
    for (int i = 0; i < spec_.layers; ++i) {
      const TensorView qkv_rows = view(*qkv_out_, tokens, qkv);
      backend_.linear({.weight = qkv_[i].get(), .norm = &norm_, .x = x, .y = qkv_rows});
      AttentionArgs attention{.qkv = qkv_rows, .y = attended, .cache = cache_.get(), .layer = i, .num_heads = spec_.heads,
                              .num_kv_heads = spec_.kv_heads, .head_dim = spec_.dim};
      attention.rope.inv_freq = ConstTensorView(freq_->data(), DType::f32, {spec_.dim / 2});
      backend_.attention(attention);
      backend_.linear({.weight = o_[i].get(), .x = attended, .y = x, .epilogue = Epilogue::residual});
      backend_.linear({.weight = gate_up_[i].get(), .norm = &norm_, .x = x, .y = mlp, .epilogue = Epilogue::silu_mul});
      backend_.linear({.weight = down_[i].get(), .x = mlp, .y = x, .epilogue = Epilogue::residual});
    }
  }
  std::unique_ptr<LinearWeight> awq(int n, int k, PartOrder order) {
    const int parts = order == PartOrder::gate_up ? 2 : 1;
    LinearSource source;
    source.name = "linear";
    source.in_features = k;
    source.group_size = 128;
    source.order = order;
    std::vector<std::vector<uint32_t>> words;
    std::vector<std::vector<uint16_t>> halves;
    for (int p = 0; p < parts; ++p) {
      const int part_n = n / parts;
      words.emplace_back(static_cast<size_t>(k) * part_n / 8);
      for (uint32_t& word : words.back()) word = random_.bits();
      words.emplace_back(static_cast<size_t>(k / 128) * part_n / 8, 0x77777777U);
      halves.emplace_back(static_cast<size_t>(k / 128) * part_n);
      for (uint16_t& bits : halves.back()) bits = to_bits(0.008F + 0.004F * static_cast<float>(random_.below(100)) / 100.0F, DType::f16);
      halves.push_back(random_.half(static_cast<size_t>(part_n), DType::f16, 0.1F));
      LinearPart part;
      part.kind = WeightKind::awq;
      part.out_features = part_n;
      part.qweight = ConstTensorView(words[2 * p].data(), DType::i32, {k, part_n / 8});
      part.qzeros = ConstTensorView(words[2 * p + 1].data(), DType::i32, {k / 128, part_n / 8});
      part.scales = ConstTensorView(halves[2 * p].data(), DType::f16, {k / 128, part_n});
      part.bias = ConstTensorView(halves[2 * p + 1].data(), DType::f16, {part_n});
      source.parts.push_back(part);
    }
    auto weight = backend_.load_linear(source);
    backend_.synchronize();
    return weight;
  }

  Backend& backend_;
  SmallSpec spec_;
  Random random_;
  Norm norm_;
  std::vector<uint16_t> table_bits_;
  std::unique_ptr<LinearWeight> table_, head_;
  std::vector<std::unique_ptr<LinearWeight>> qkv_, o_, gate_up_, down_;
  std::unique_ptr<Buffer> ones_, freq_, x_, qkv_out_, attended_, mlp_;
  std::unique_ptr<KvCache> cache_;
  int next_block_ = 0;
};

}  // namespace turbomind::cuda::testing
