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
    const std::vector<float> weight = random_.floats(static_cast<size_t>(spec.hidden), 0.5F, 1.5F);
    norm_weight_ = backend.load_vector(ConstTensorView(weight.data(), DType::f32, {spec.hidden}));
    norm_.weight = ConstTensorView(norm_weight_->data(), DType::f32, {spec.hidden});
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
    std::vector<TokenId> tokens;  // -1: drawn by a step that was launched and not collected
    std::vector<int32_t> blocks;
    int computed = 0;
    int prompt = 0;
    std::vector<std::pair<TokenId, float>> top{};  // log-probabilities of all tokens drawn
  };
  Sequence make_sequence(std::vector<TokenId> prompt) {
    Sequence sequence{std::move(prompt), {}, 0};
    sequence.prompt = static_cast<int>(sequence.tokens.size());
    for (int i = 0; i < spec_.max_kv_len / 64; ++i) sequence.blocks.push_back(next_block_++ % spec_.blocks);
    return sequence;
  }

  // One step: sequence i computes chunks[i] of its waiting tokens; those that finish get a token.
  void step(std::vector<Sequence*> sequences, const std::vector<int>& chunks, std::vector<float>* logits = nullptr) {
    Step step;
    for (size_t s = 0; s < sequences.size(); ++s) add(step, *sequences[s], chunks[s], {}, false);
    const SampleArgs args = forward(step);
    if (logits != nullptr) {
      logits->resize(step.sample_rows.size() * static_cast<size_t>(spec_.vocab));
      const auto vocab = static_cast<size_t>(spec_.vocab);
      for (size_t r = 0; r < step.sample_rows.size(); ++r) {
        backend_.logits({.head = head_.get(), .norm = &norm_, .x = args.x.rows(step.sample_rows[r], 1)},
                        std::span(*logits).subspan(r * vocab, vocab));
      }
    }
    if (step.finished.empty()) return;
    std::vector<SampleRow> rows;
    for (Sequence* sequence : step.finished) rows.push_back(sample_row(*sequence, sequence->tokens));
    std::vector<SampleResult> results(rows.size());
    draw(args, rows, results);
    for (size_t i = 0; i < rows.size(); ++i) take(*step.finished[i], results[i], sequence_end);
  }

  // Starts a step of one token each without waiting; its ids are those that the step launched before
  // draws, if that is not collected. False: the backend cannot draw it by itself, sample() can.
  bool launch(const std::vector<Sequence*>& sequences) {
    Step step;
    for (Sequence* sequence : sequences) {
      const bool fed = sequence->tokens.back() < 0;
      step.fed_from.push_back(fed ? static_cast<int32_t>(step.fed_from.size()) : -1);
      add(step, *sequence, 1, {}, true);
    }
    SampleArgs args = forward(step);
    std::vector<SampleRow> rows;
    for (Sequence* sequence : sequences) rows.push_back(sample_row(*sequence, sequence->tokens));
    args.rows = rows;
    if (!backend_.launch_sample(args)) return false;
    for (Sequence* sequence : sequences) sequence->tokens.push_back(-1);
    return true;
  }
  // The step launched first of those that were not collected, of the same sequences.
  void collect(const std::vector<Sequence*>& sequences) {
    std::vector<SampleResult> results(sequences.size());
    backend_.collect_sample(results);
    for (size_t i = 0; i < sequences.size(); ++i) {
      std::vector<TokenId>& tokens = sequences[i]->tokens;
      const auto place = std::find(tokens.begin(), tokens.end(), -1);
      take(*sequences[i], results[i], static_cast<size_t>(place - tokens.begin()));
    }
  }

  // One step of the waiting token of each sequence and drafts behind it; answers what is drawn at each
  // of these rows. Nothing is appended.
  std::vector<std::vector<TokenId>> verify(const std::vector<Sequence*>& sequences, const std::vector<std::vector<TokenId>>& drafts) {
    Step step;
    for (size_t s = 0; s < sequences.size(); ++s) add(step, *sequences[s], 1, drafts[s], true);
    const SampleArgs args = forward(step);
    std::vector<SampleRow> rows;
    std::vector<std::vector<TokenId>> texts;
    for (size_t s = 0; s < sequences.size(); ++s) {
      texts.push_back(sequences[s]->tokens);
      texts.back().insert(texts.back().end(), drafts[s].begin(), drafts[s].end());
    }
    for (size_t s = 0; s < sequences.size(); ++s) {
      for (size_t i = 0; i <= drafts[s].size(); ++i) {
        rows.push_back(sample_row(*sequences[s], std::span(texts[s]).first(sequences[s]->tokens.size() + i)));
      }
    }
    std::vector<SampleResult> results(rows.size());
    draw(args, rows, results);
    std::vector<std::vector<TokenId>> drawn(sequences.size());
    size_t r = 0;
    for (size_t s = 0; s < sequences.size(); ++s) {
      for (size_t i = 0; i <= drafts[s].size(); ++i) drawn[s].push_back(results[r++].token);
      sequences[s]->computed -= 1 + static_cast<int>(drafts[s].size());
    }
    return drawn;
  }

  SamplingParams params;
  bool start_sample = true;  // head inside the captured step
  bool next_norms = true;    // whether o and down are told of the norm that follows

 private:
  struct Step {
    std::vector<TokenId> ids;
    std::vector<int32_t> positions, slots, start{0}, kv_len, table, sample_rows, fed_from;
    std::vector<Sequence*> finished;
  };
  // `count` waiting tokens of the sequence, and drafts. All rows are sampled, or the last one.
  void add(Step& step, Sequence& sequence, int count, const std::vector<TokenId>& drafts, bool all_rows) {
    const auto known = static_cast<int>(sequence.tokens.size());
    for (int i = 0; i < count + static_cast<int>(drafts.size()); ++i) {
      const int position = sequence.computed + i;
      step.ids.push_back(position < known ? sequence.tokens[static_cast<size_t>(position)] : drafts[static_cast<size_t>(position - known)]);
      step.positions.push_back(position);
      step.slots.push_back(sequence.blocks[static_cast<size_t>(position / 64)] * 64 + position % 64);
      if (all_rows) step.sample_rows.push_back(static_cast<int32_t>(step.ids.size()) - 1);
    }
    sequence.computed += count + static_cast<int>(drafts.size());
    step.start.push_back(static_cast<int32_t>(step.ids.size()));
    step.kv_len.push_back(sequence.computed);
    step.table.insert(step.table.end(), sequence.blocks.begin(), sequence.blocks.end());
    if (!all_rows && sequence.computed == known) {
      step.sample_rows.push_back(static_cast<int32_t>(step.ids.size()) - 1);
      step.finished.push_back(&sequence);
    }
  }
  SampleArgs forward(const Step& step) {
    backend_.begin_step({.token_ids = step.ids, .positions = step.positions, .slots = step.slots, .query_start = step.start,
                         .kv_len = step.kv_len, .block_table = step.table, .max_blocks = spec_.max_kv_len / 64,
                         .sample_rows = step.sample_rows, .fed_from = step.fed_from});
    const auto tokens = static_cast<int64_t>(step.ids.size());
    const SampleArgs args{.head = head_.get(), .norm = &norm_, .x = view(*x_, tokens, spec_.hidden)};
    backend_.execute([&] {
      forward(tokens);
      if (!step.sample_rows.empty() && start_sample) backend_.start_sample(args);
    });
    return args;
  }
  SampleRow sample_row(const Sequence& sequence, std::span<const TokenId> tokens) const {
    return {&params, tokens, {}, static_cast<uint32_t>(tokens.size()) - static_cast<uint32_t>(sequence.prompt)};
  }
  void draw(SampleArgs args, std::span<const SampleRow> rows, std::span<SampleResult> results) {
    args.rows = rows;
    args.results = results;
    backend_.sample(args);
  }
  static constexpr size_t sequence_end = ~size_t{0};
  static void take(Sequence& sequence, const SampleResult& result, size_t place) {
    if (place == sequence_end) {
      sequence.tokens.push_back(result.token);
    } else {
      sequence.tokens[place] = result.token;
    }
    sequence.top.insert(sequence.top.end(), result.top_logprobs.begin(), result.top_logprobs.end());
  }
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
      const Norm* post_attention = next_norms ? &norm_ : nullptr;
      const Norm* next_input = i + 1 < spec_.layers ? post_attention : nullptr;
      backend_.linear({.weight = o_[i].get(), .x = attended, .y = x, .epilogue = Epilogue::residual, .next_norm = post_attention});
      backend_.linear({.weight = gate_up_[i].get(), .norm = &norm_, .x = x, .y = mlp, .epilogue = Epilogue::silu_mul});
      backend_.linear({.weight = down_[i].get(), .x = mlp, .y = x, .epilogue = Epilogue::residual, .next_norm = next_input});
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
  std::unique_ptr<Buffer> norm_weight_, freq_, x_, qkv_out_, attended_, mlp_;
  std::unique_ptr<KvCache> cache_;
  int next_block_ = 0;
};

}  // namespace turbomind::cuda::testing
