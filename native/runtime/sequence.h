// One request in flight: its tokens, its KV blocks, its images and its clock. Changed by the
// scheduler alone, but for the embeddings, which the model runner attaches. Engine thread.
#pragma once

#include <chrono>
#include <memory>
#include <optional>
#include <span>
#include <vector>

#include "runtime/block_manager.h"
#include "runtime/image_store.h"
#include "runtime/request.h"
#include "runtime/speculation.h"
#include "runtime/swap_space.h"

namespace turbomind {

using Clock = std::chrono::steady_clock;

double ms_between(Clock::time_point from, Clock::time_point to);

struct SequenceImage {
  std::shared_ptr<const image::ImageTiles> tiles;
  int token_offset = 0;  // of its first image token in the prompt
  int tokens_per_tile = 0;
  std::shared_ptr<EncodedImage>
      encoded;  // Scheduler::open_images; null once its tokens are computed

  int num_tiles() const { return tiles->num_tiles; }
  int num_tokens() const { return num_tiles() * tokens_per_tile; }
  int end() const { return token_offset + num_tokens(); }
};

// Who goes first: the smaller rank. A level of priority is worth a fixed time of waiting, so a
// request is overtaken only by those that come within that time, and nobody starves.
struct Rank {
  Clock::time_point time;  // of submission, put forward by the priority
  uint64_t arrival = 0;    // among equal times
  auto operator<=>(const Rank&) const = default;
};

// What JavaScript has said about the next token of a sequence.
struct Guide {
  std::optional<TokenMask> mask;             // Request::guided
  std::optional<std::vector<float>> logits;  // Request::edits_logits
  bool offered = false;                      // the logits went out
  void clear() { *this = Guide{}; }
};

class Sequence {
 public:
  // `max_tokens`: prompt and completion may not grow past it (session_len, the pool); at least
  // prompt + 1. The request must have been validated.
  Sequence(Request request, Clock::time_point submitted, int max_tokens, BlockManager& blocks,
           Rank rank = {});

  RequestId id() const { return request_.id; }
  const Request& request() const { return request_; }  // without its prompt tokens
  std::span<const TokenId> tokens() const {
    return std::span(tokens_).first(static_cast<size_t>(num_tokens_));
  }  // prompt, then completion
  int num_tokens() const { return num_tokens_; }
  int num_prompt_tokens() const { return num_prompt_tokens_; }
  int num_completion_tokens() const { return num_tokens() - num_prompt_tokens_; }
  int max_new_tokens() const { return max_new_tokens_; }  // the request's, capped by max_tokens
  int num_computed() const { return num_computed_; }      // tokens whose K and V are in the cache
  int num_pending() const { return num_tokens() - num_computed_; }
  // One row of decode: everything is computed but the token drawn last.
  bool decoding() const { return num_completion_tokens() > 0 && num_pending() == 1; }
  // Tokens that the running step tries behind the known ones; they are gone when one is appended.
  std::span<const TokenId> drafts() const {
    return std::span(tokens_).subspan(static_cast<size_t>(num_tokens_));
  }
  // The known ones and their drafts.
  std::span<const TokenId> tokens_and_drafts() const { return tokens_; }
  void set_drafts(std::span<const TokenId> drafts);
  // Guesses drafts; made when it is first asked for.
  Drafter& drafter();
  bool has_drafter() const { return drafter_ != nullptr; }
  // Stop ids that must not be drawn as token `completion_idx` of the completion.
  std::span<const TokenId> banned(int completion_idx) const;
  // Masks and logits from outside.
  Guide& guide() { return guide_; }
  bool needs_mask() const { return request_.guided && !guide_.mask; }
  bool needs_logits() const { return request_.edits_logits && !guide_.logits; }
  std::span<const uint32_t> allowed() const;  // SampleRow::allowed
  // Parked: its last row has run, but no token could be drawn from it. It is not planned until
  // unpark(), and then its last row runs once more.
  bool parked() const { return parked_; }
  void park();
  void unpark() { parked_ = false; }
  RequestOutputs* outputs() { return outputs_.get(); }  // null: none were asked for
  std::shared_ptr<const RequestOutputs> final_outputs() const { return outputs_; }
  std::vector<SequenceImage>& images() { return images_; }
  const std::vector<SequenceImage>& images() const { return images_; }
  BlockTable& blocks() { return blocks_; }
  const BlockTable& blocks() const { return blocks_; }
  const Rank& rank() const { return rank_; }
  // Its first blocks that are in the index of prefixes.
  int num_published() const { return num_published_; }
  void set_published(int num_blocks) { num_published_ = num_blocks; }
  // What block `idx` holds of the tokens before `end`; views `images`, which it overwrites.
  BlockContent content(int idx, int end, std::vector<ImageSpan>& images) const;
  int num_preemptions() const { return num_preemptions_; }
  int num_cached_tokens() const { return num_cached_tokens_; }  // prompt tokens found, not computed
  bool started() const { return scheduled_.has_value(); }
  // Waited too long for its first step.
  bool expired(Clock::time_point now) const;
  FinishReason finish_reason() const { return finish_reason_; }

  void mark_scheduled(Clock::time_point now);  // the first time only
  void add_vision_ms(double ms) { vision_ms_ += ms; }
  // `count` more tokens are in the cache. An image's embeddings are let go once its tokens are.
  void advance(int count);
  // Like advance, for tokens that were found in the cache.
  void skip(int count);
  // Appends a drawn token and drops the drafts; answers why the sequence ended, or none.
  FinishReason append(TokenId token, Clock::time_point now);
  // Ends a sequence that draws no tokens.
  FinishReason end_prompt() { return finish_reason_ = FinishReason::length; }
  void fail() { finish_reason_ = FinishReason::error; }
  // Gives its blocks back; what is not found or loaded again later is computed again. A tile's
  // embeddings do not depend on what it is encoded with, so those let go may be encoded again.
  void preempt();
  // What of it lies in host memory while it waits.
  SwappedBlocks& swapped() { return swapped_; }
  const SwappedBlocks& swapped() const { return swapped_; }
  RequestTimings timings() const;

 private:
  Request request_;
  std::vector<TokenId> tokens_;  // known ones, then drafts; never reallocated
  int num_tokens_ = 0;           // known
  std::vector<SequenceImage> images_;
  BlockTable blocks_;
  SwappedBlocks swapped_;
  std::unique_ptr<Drafter> drafter_;
  Guide guide_;
  bool parked_ = false;
  std::shared_ptr<RequestOutputs> outputs_;
  int num_prompt_tokens_ = 0;
  int max_new_tokens_ = 0;
  int num_computed_ = 0;
  int num_published_ = 0;
  int num_cached_tokens_ = 0;
  int num_preemptions_ = 0;
  Rank rank_;
  Clock::time_point submitted_;
  std::optional<Clock::time_point> scheduled_;
  std::optional<Clock::time_point> first_token_;
  Clock::time_point last_token_;
  double vision_ms_ = 0;
  double vision_ms_to_first_token_ = 0;
  FinishReason finish_reason_ = FinishReason::none;
};

}  // namespace turbomind
