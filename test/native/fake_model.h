// A scripted model for the runtime's tests. Its KV cache holds one number a slot; the next token is
// a hash of everything that the block table leads to, so a wrong slot, table, position, embedding or
// leftover of another sequence changes the completion, and so does a block of another prefix.
// `expected_completion` computes the same from the request alone.
#pragma once

#include <algorithm>
#include <cstring>
#include <functional>
#include <map>
#include <memory>
#include <optional>
#include <random>
#include <vector>

#include "image/content_hash.h"
#include "runtime/model_runner.h"
#include "runtime/request_check.h"
#include "runtime/scheduler.h"

namespace turbomind::test {

struct FakeSpec {
  int num_blocks = 8;
  int block_size = 4;
  int num_swap_blocks = 0;
  int num_tile_slots = 64;
  int vocab_size = 50;
  TokenId image_token_id = 49;
  int tokens_per_tile = 3;
  int tile_size = 2;
  // Most tokens follow from the one before them, so that texts repeat themselves.
  bool loops = false;
};

inline RequestRules rules_of(const FakeSpec& spec) {
  return {spec.vocab_size, spec.image_token_id, spec.tile_size, spec.tokens_per_tile, 2};
}

inline uint64_t mix(uint64_t hash, uint64_t value) {
  hash ^= value + 0x9E3779B97F4A7C15ULL + (hash << 6) + (hash >> 2);
  hash *= 0xBF58476D1CE4E5B9ULL;
  return hash ^ (hash >> 29);
}

inline int32_t fake_embedding(const uint8_t* tile, size_t bytes, int token_idx) {
  uint64_t hash = 7;
  for (size_t i = 0; i < bytes; ++i) hash = mix(hash, tile[i]);
  return static_cast<int32_t>(mix(hash, static_cast<uint64_t>(token_idx)) | 0x40000000U);
}

// What the next token is drawn from: all that the sequence has in the cache, and its last value.
inline uint64_t fake_hash(uint64_t all, int32_t last, const FakeSpec& spec) {
  return spec.loops && all % 12 != 0 ? mix(2, static_cast<uint64_t>(last)) : all;
}
// The same from the values (ids and embeddings) alone.
inline uint64_t fake_hash(std::span<const int32_t> values, const FakeSpec& spec) {
  uint64_t all = 1;
  uint64_t context = 1;
  for (int32_t value : values) {
    context = mix(context, static_cast<uint64_t>(value));
    all = mix(all, context);
  }
  return fake_hash(all, values.back(), spec);
}

inline TokenId fake_draw(uint64_t hash, std::span<const TokenId> banned, const FakeSpec& spec) {
  for (uint64_t i = 0;; ++i) {
    const auto token = static_cast<TokenId>((hash + i) % static_cast<uint64_t>(spec.vocab_size));
    if (token == spec.image_token_id) continue;
    if (std::find(banned.begin(), banned.end(), token) == banned.end()) return token;
  }
}

class FakeModel final : public Model {
 public:
  explicit FakeModel(const FakeSpec& spec)
      : spec_(spec),
        cache_(static_cast<size_t>(spec.num_blocks * spec.block_size), -1),
        contexts_(cache_.size(), 0),
        swapped_(static_cast<size_t>(spec.num_swap_blocks * spec.block_size)),
        tiles_(static_cast<size_t>(spec.num_tile_slots * spec.tokens_per_tile)) {}

  std::function<void()> on_forward;  // may throw or wait
  uint64_t unsampled = 0;            // rows with this seed cannot be sampled; 0: all can
  bool asynchronous = false;         // draws without the host where no penalty forbids it
  bool fed_rows_need_host = false;   // cannot draw what comes after a token that is fed
  int launches_ahead = 0;            // launched while another was not collected
  int max_step_tokens = 0;
  int64_t tiles_encoded = 0;
  int64_t blocks_copied = 0;
  int64_t blocks_saved = 0;
  int64_t blocks_loaded = 0;
  int64_t forwards = 0;

  std::unique_ptr<TileEmbeddings> encode_images(ConstTensorView tiles, int first_slot) override {
    auto timer = std::make_unique<HostOpTimer>();
    const int64_t num_tiles = tiles.dim(0);
    const size_t tile_bytes = tiles.bytes() / static_cast<size_t>(num_tiles);
    const int64_t rows = num_tiles * spec_.tokens_per_tile;
    const int first_row = first_slot * spec_.tokens_per_tile;
    TM_CHECK(first_slot >= 0 && first_row + rows <= static_cast<int64_t>(tiles_.size()),
             "tiles in slot %d of %d", first_slot, spec_.num_tile_slots);
    int32_t* const out = tiles_.data() + first_row;
    for (int64_t row = 0; row < rows; ++row) {
      const uint8_t* tile =
          tiles.as<uint8_t>() + static_cast<size_t>(row / spec_.tokens_per_tile) * tile_bytes;
      out[row] = fake_embedding(tile, tile_bytes, static_cast<int>(row % spec_.tokens_per_tile));
    }
    tiles_encoded += num_tiles;
    const ConstTensorView view(out, DType::i32, {rows, 1});
    timer->stop();
    return std::make_unique<TileEmbeddings>(view, std::move(timer));
  }

  void copy_blocks(std::span<const std::pair<BlockId, BlockId>> from_to) override {
    const auto size = static_cast<ptrdiff_t>(spec_.block_size);
    for (const auto& [from, to] : from_to) {
      TM_CHECK(from != to, "copy of block %d over itself", from);
      std::copy_n(cache_.begin() + from * size, size, cache_.begin() + to * size);
      std::copy_n(contexts_.begin() + from * size, size, contexts_.begin() + to * size);
    }
    blocks_copied += static_cast<int64_t>(from_to.size());
  }

  void save_blocks(std::span<const SwapMove> moves) override {
    for (const SwapMove& move : moves) {
      for_each_slot(move, [this](size_t cached, size_t swapped) {
        swapped_.at(swapped) = {cache_.at(cached), contexts_.at(cached)};
      });
    }
    blocks_saved += static_cast<int64_t>(moves.size());
  }
  // Taken away as they are read, so that none is loaded twice.
  void load_blocks(std::span<const SwapMove> moves) override {
    for (const SwapMove& move : moves) {
      for_each_slot(move, [this](size_t cached, size_t swapped) {
        cache_.at(cached) = swapped_.at(swapped).first;
        contexts_.at(cached) = swapped_.at(swapped).second;
        swapped_.at(swapped) = {-1, 0};
      });
    }
    blocks_loaded += static_cast<int64_t>(moves.size());
  }

  void forward(const StepBatch& batch, std::span<const EmbeddingOverride> overrides) override {
    if (on_forward) on_forward();
    ++forwards;
    batch_ = batch;
    const auto num_tokens = static_cast<size_t>(batch.num_tokens());
    TM_CHECK(num_tokens >= 1 && batch.positions.size() == num_tokens &&
                 batch.slots.size() == num_tokens &&
                 batch.query_start.size() == batch.kv_len.size() + 1,
             "batch arrays disagree");
    max_step_tokens = std::max(max_step_tokens, batch.num_tokens());
    std::vector<int32_t> values(batch.token_ids.begin(), batch.token_ids.end());
    for (size_t i = 0; i < batch.fed_from.size(); ++i) {
      if (batch.fed_from[i] < 0) continue;
      TM_CHECK(values[i] == -1, "token %d of a row that is fed", values[i]);
      values[i] = last_drawn_.at(static_cast<size_t>(batch.fed_from[i]));
    }
    TM_CHECK(launched_.size() < 2, "a third step");
    launches_ahead += launched_.empty() ? 0 : 1;
    for (const EmbeddingOverride& part : overrides) {
      for (int64_t i = 0; i < part.embeddings.dim(0); ++i) {
        int32_t& value = values.at(static_cast<size_t>(part.row + i));
        TM_CHECK(value == spec_.image_token_id, "override of token %d", value);
        value = part.embeddings.as<int32_t>()[i];
      }
    }
    for (int s = 0; s < batch.num_sequences(); ++s) write_rows(batch, s, values);
  }

  void sample(std::span<const SampleRow> rows, std::span<SampleResult> results) override {
    TM_CHECK(rows.size() == batch_.sample_rows.size() && rows.size() == results.size(),
             "%zu rows to sample, %zu results", rows.size(), results.size());
    for (size_t r = 0; r < rows.size(); ++r) {
      const int row = batch_.sample_rows[r];
      if (rows[r].tokens.empty()) continue;  // it has ended
      TM_CHECK(static_cast<int>(rows[r].tokens.size()) ==
                       batch_.positions[static_cast<size_t>(row)] + 1 &&
                   (batch_.token_ids[static_cast<size_t>(row)] == -1 ||
                    rows[r].tokens.back() == batch_.token_ids[static_cast<size_t>(row)]),
               "row %zu: %zu tokens, position %d", r, rows[r].tokens.size(),
               batch_.positions[static_cast<size_t>(row)]);
      if (unsampled == rows[r].params->seed && unsampled != 0) continue;
      std::vector<TokenId> banned(rows[r].banned.begin(), rows[r].banned.end());
      for (TokenId id = 0; id < spec_.vocab_size && !rows[r].allowed.empty(); ++id) {
        if ((rows[r].allowed[static_cast<size_t>(id) / 32] >> (id % 32) & 1) == 0) {
          banned.push_back(id);
        }
      }
      results[r].token = fake_draw(hash_of(row), banned, spec_);
    }
    if (unsampled != 0) throw Error(ErrorCode::device_error, "scripted row failure");
  }

  bool launch_sample(std::span<const SampleRow> rows) override {
    const auto needs_host = [](const SampleRow& row) {
      return row.params->repetition_penalty != 1.0F;
    };
    if (!asynchronous || std::any_of(rows.begin(), rows.end(), needs_host)) return false;
    if (fed_rows_need_host && !batch_.fed_from.empty()) return false;
    Launched& launch = launched_.emplace_back();
    launch.results.resize(rows.size());
    try {
      sample(rows, launch.results);
    } catch (const Error& error) {
      launch.failure = error;
    }
    last_drawn_.clear();
    for (const SampleResult& result : launch.results) last_drawn_.push_back(result.token);
    return true;
  }
  void collect_sample(std::span<SampleResult> results) override {
    const Launched launch = std::move(launched_.at(0));
    launched_.erase(launched_.begin());
    TM_CHECK(results.size() == launch.results.size(), "%zu results of %zu", results.size(),
             launch.results.size());
    std::copy(launch.results.begin(), launch.results.end(), results.begin());
    if (launch.failure) throw *launch.failure;
  }

  // 1 for the token that would be drawn, 0 for the others.
  void logits(int first_row, std::span<float> out) override {
    const auto vocab = static_cast<size_t>(spec_.vocab_size);
    for (size_t r = 0; r * vocab < out.size(); ++r) {
      const TokenId best = fake_draw(hash_of(first_row + static_cast<int>(r)), {}, spec_);
      for (size_t i = 0; i < vocab; ++i) {
        out[r * vocab + i] = static_cast<TokenId>(i) == best ? 1.0F : 0.0F;
      }
    }
  }
  // [n, 2]: the row's position and what it holds in the cache.
  void hidden_states(int first_row, std::span<float> out) override {
    for (size_t r = 0; 2 * r < out.size(); ++r) {
      const auto row = static_cast<size_t>(first_row) + r;
      out[2 * r] = static_cast<float>(batch_.positions[row]);
      out[2 * r + 1] = static_cast<float>(cache_.at(static_cast<size_t>(batch_.slots[row])));
    }
  }

 private:
  template <class Move>
  void for_each_slot(const SwapMove& move, Move&& copy) const {
    for (int i = 0; i < spec_.block_size; ++i) {
      copy(static_cast<size_t>(move.block * spec_.block_size + i),
           static_cast<size_t>(move.slot * spec_.block_size + i));
    }
  }
  void write_rows(const StepBatch& batch, int s, const std::vector<int32_t>& values) {
    for (int row = batch.query_start[s]; row < batch.query_start[s + 1]; ++row) {
      const auto i = static_cast<size_t>(row);
      const int position = batch.positions[i];
      TM_CHECK(values[i] != spec_.image_token_id, "image token at %d not overridden", position);
      TM_CHECK(position == batch.kv_len[s] - (batch.query_start[s + 1] - row), "position %d",
               position);
      TM_CHECK(batch.slots[i] == slot_of(s, position), "slot %d of position %d", batch.slots[i],
               position);
      // K and V of a real layer depend on all tokens before, so a block behind another prefix is
      // another block.
      const uint64_t before =
          position == 0 ? 1 : contexts_.at(static_cast<size_t>(slot_of(s, position - 1)));
      const auto slot = static_cast<size_t>(batch.slots[i]);
      cache_.at(slot) = values[i];
      contexts_.at(slot) = mix(before, static_cast<uint64_t>(values[i]));
    }
  }
  int sequence_of(int row) const {
    for (int s = 0; s < batch_.num_sequences(); ++s) {
      if (row >= batch_.query_start[s] && row < batch_.query_start[s + 1]) return s;
    }
    TM_CHECK(false, "row %d is nobody's", row);
    return -1;
  }
  int slot_of(int s, int position) const {
    const int block =
        batch_
            .block_table[static_cast<size_t>(s * batch_.max_blocks + position / spec_.block_size)];
    return block * spec_.block_size + position % spec_.block_size;
  }
  // Of everything up to row `row`, as its block table finds it.
  uint64_t hash_of(int row) const {
    const int s = sequence_of(row);
    uint64_t all = 1;
    int32_t last = 0;
    for (int i = 0; i <= batch_.positions[static_cast<size_t>(row)]; ++i) {
      const auto slot = static_cast<size_t>(slot_of(s, i));
      all = mix(all, contexts_.at(slot));
      last = cache_.at(slot);
    }
    return fake_hash(all, last, spec_);
  }

  struct Launched {
    std::vector<SampleResult> results;
    std::optional<Error> failure;
  };
  FakeSpec spec_;
  StepBatch batch_;
  std::vector<Launched> launched_;
  std::vector<TokenId> last_drawn_;                    // of the last launch, [R]
  std::vector<int32_t> cache_;                         // [slots] the token or embedding written
  std::vector<uint64_t> contexts_;                     // [slots] it and all before it
  std::vector<std::pair<int32_t, uint64_t>> swapped_;  // both, [swap slots]
  std::vector<int32_t> tiles_;                         // [tile slots, tokens_per_tile]
};

struct Completion {
  std::vector<TokenId> tokens;
  FinishReason reason = FinishReason::none;
};

// What `request` must answer, whatever runs beside it. max_tokens: min(session_len, pool tokens).
inline Completion expected_completion(const Request& request, const FakeSpec& spec,
                                      int max_tokens) {
  const auto prompt_len = request.prompt_tokens.size();
  std::vector<int32_t> values(request.prompt_tokens.begin(), request.prompt_tokens.end());
  for (const ImageInput& image : request.images) {
    const size_t tile_bytes =
        image.tiles->pixels.size() / static_cast<size_t>(image.tiles->num_tiles);
    for (int i = 0; i < image.num_tokens; ++i) {
      const uint8_t* tile =
          image.tiles->pixels.data() + static_cast<size_t>(i / spec.tokens_per_tile) * tile_bytes;
      values[static_cast<size_t>(image.token_offset + i)] =
          fake_embedding(tile, tile_bytes, i % spec.tokens_per_tile);
    }
  }
  const int max_new = std::min(request.max_new_tokens, max_tokens - static_cast<int>(prompt_len));
  Completion completion;
  const std::vector<TokenId>& stops = request.stop_token_ids;
  while (completion.reason == FinishReason::none) {
    const bool may_stop = static_cast<int>(completion.tokens.size()) >= request.min_new_tokens;
    const TokenId token =
        fake_draw(fake_hash(values, spec),
                  may_stop ? std::span<const TokenId>() : std::span<const TokenId>(stops), spec);
    completion.tokens.push_back(token);
    values.push_back(token);
    if (may_stop && std::find(stops.begin(), stops.end(), token) != stops.end()) {
      completion.reason = FinishReason::stop;
    } else if (static_cast<int>(completion.tokens.size()) >= max_new) {
      completion.reason = FinishReason::length;
    }
  }
  return completion;
}

inline std::shared_ptr<const image::ImageTiles> fake_tiles(int num_tiles, uint8_t seed,
                                                           const FakeSpec& spec) {
  auto tiles = std::make_shared<image::ImageTiles>();
  tiles->tile_size = spec.tile_size;
  tiles->num_tiles = num_tiles;
  tiles->pixels.resize(static_cast<size_t>(num_tiles * spec.tile_size * spec.tile_size * 3));
  for (size_t i = 0; i < tiles->pixels.size(); ++i) {
    tiles->pixels[i] = static_cast<uint8_t>(seed * 31 + i * 7 + 1);
  }
  const image::ContentHash hash = image::content_hash(tiles->pixels.data(), tiles->pixels.size());
  std::copy_n(hash.words, 2, tiles->content_hash);
  return tiles;
}

// Appends an image of `num_tiles` tiles to the prompt.
inline void add_image(Request& request, int num_tiles, uint8_t seed, const FakeSpec& spec) {
  const int offset = static_cast<int>(request.prompt_tokens.size());
  const int count = num_tiles * spec.tokens_per_tile;
  request.images.push_back({fake_tiles(num_tiles, seed, spec), offset, count});
  request.prompt_tokens.insert(request.prompt_tokens.end(), static_cast<size_t>(count),
                               spec.image_token_id);
}

inline Request text_request(RequestId id, int prompt_len, int max_new_tokens) {
  Request request;
  request.id = id;
  for (int i = 0; i < prompt_len; ++i) {
    request.prompt_tokens.push_back(
        static_cast<TokenId>((id * 13 + static_cast<uint64_t>(i) * 5) % 49));
  }
  request.max_new_tokens = max_new_tokens;
  return request;
}

// What a caller learns from the events, with the contract checked: order, one end each.
struct Answer {
  std::vector<TokenId> tokens;
  FinishReason reason = FinishReason::none;
  Event last;
};
class Answers {
 public:
  void take(const std::vector<Event>& events) {
    for (const Event& event : events) {
      Answer& answer = answers_[event.id];
      TM_CHECK(answer.reason == FinishReason::none, "request %d got an event after its end",
               static_cast<int>(event.id));
      for (const TokenEvent& token : event.tokens) answer.tokens.push_back(token.token);
      answer.reason = event.finish_reason;
      answer.last = event;
    }
  }
  const Answer& at(RequestId id) const { return answers_.at(id); }
  bool known(RequestId id) const { return answers_.contains(id); }
  bool ended(RequestId id) const {
    const auto found = answers_.find(id);
    return found != answers_.end() && found->second.reason != FinishReason::none;
  }
  size_t num_ended() const {
    return static_cast<size_t>(std::count_if(answers_.begin(), answers_.end(), [](const auto& a) {
      return a.second.reason != FinishReason::none;
    }));
  }

 private:
  std::map<RequestId, Answer> answers_;
};

}  // namespace turbomind::test
