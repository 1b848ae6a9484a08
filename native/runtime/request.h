// What one caller asked for (immutable) and what the engine tells about it.
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "base/error.h"
#include "base/sampling.h"
#include "image/preprocess.h"

namespace turbomind {

struct ImageInput {
  std::shared_ptr<const image::ImageTiles> tiles;
  int token_offset = 0;  // first of its image tokens in prompt_tokens
  int num_tokens = 0;    // tiles * tokens per tile; all of them carry image_token_id
};

struct Request {
  RequestId id = 0;
  std::vector<TokenId> prompt_tokens;  // at least one
  std::vector<ImageInput> images;      // ordered by token_offset
  SamplingParams sampling;
  int max_new_tokens = 512;
  int min_new_tokens = 0;
  std::vector<TokenId> stop_token_ids;  // includes end-of-sequence ids unless ignored
  int priority = 0;                     // higher first; one level is worth some seconds of waiting
  double queue_timeout_ms = 0;          // longest wait for its first step; 0: for ever
  bool share_prefix = true;  // false: every prompt token is computed (their logits are wanted)
};

enum class FinishReason : uint8_t { none, stop, length, abort, error };

struct TokenEvent {
  TokenId token = -1;
  float logprob = 0.0F;
  std::vector<std::pair<TokenId, float>> top_logprobs;
};

struct RequestTimings {
  double queue_ms = 0;        // submit → first scheduled
  double vision_ms = 0;       // vision tower, this request's tiles
  double prefill_ms = 0;      // first scheduled → first token, less vision
  double first_token_ms = 0;  // submit → first token
  double decode_ms = 0;       // first token → last token
};

// In order per request: any number with tokens, the last one with finish_reason != none.
// The stop token itself is reported as a token; JavaScript leaves it out of the text.
struct Event {
  RequestId id = 0;
  std::vector<TokenEvent> tokens;
  FinishReason finish_reason = FinishReason::none;
  TokenId matched_stop = -1;  // the stop id that ended it
  RequestTimings timings;     // valid with the last event
  int num_preemptions = 0;
  int num_cached_tokens = 0;  // prompt tokens whose K and V were found, not computed
  ErrorCode error_code = ErrorCode::internal;  // FinishReason::error only
  std::string error_message;
};

}  // namespace turbomind
