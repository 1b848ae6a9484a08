// What one caller asked for (immutable) and what the engine tells about it.
#pragma once

#include <cstdint>
#include <memory>
#include <optional>
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

enum class OutputRange : uint8_t { none, generation, all };
enum class Pooling : uint8_t { none, last, mean };

// What a request wants besides tokens, over the positions that are computed: prompt and completion
// but for the last token drawn. Row p belongs to position p and scores token p + 1.
struct OutputSpec {
  // all: from position 0 on; generation: from the prompt's last one on.
  OutputRange logits = OutputRange::none;         // [positions, V], the model's own
  OutputRange hidden_states = OutputRange::none;  // [positions, H], after the last norm
  Pooling pooling = Pooling::none;                // hidden states of the prompt, to [H]
  bool prompt_nll = false;  // -log p of the prompt's tokens, from the second on

  bool any() const {
    return logits != OutputRange::none || hidden_states != OutputRange::none ||
           pooling != Pooling::none || prompt_nll;
  }
  // Positions before the prompt's last one must be computed: a cached prefix cannot stand in.
  bool reads_prompt() const {
    return logits == OutputRange::all || hidden_states == OutputRange::all ||
           pooling == Pooling::mean || prompt_nll;
  }
};

struct Request {
  RequestId id = 0;
  std::vector<TokenId> prompt_tokens;  // at least one
  std::vector<ImageInput> images;      // ordered by token_offset
  SamplingParams sampling;
  int max_new_tokens = 512;  // 0: the prompt is only computed, for its outputs
  int min_new_tokens = 0;
  std::vector<TokenId> stop_token_ids;  // includes end-of-sequence ids unless ignored
  int priority = 0;                     // higher first; one level is worth some seconds of waiting
  double queue_timeout_ms = 0;          // longest wait for its first step; 0: for ever
  bool share_prefix = true;  // false: every prompt token is computed (their logits are wanted)
  // A token is drawn only once Engine::set_mask said which ones may be, for its completion index.
  bool guided = false;
  // The logits of every token go out in an event, and those that Engine::set_logits answers with are
  // drawn from, on the host.
  bool edits_logits = false;
  OutputSpec outputs;

  // Every step of it must end before the next is planned: no drafts, no running ahead.
  bool step_by_step() const { return guided || edits_logits || outputs.any(); }
};

// What OutputSpec asked for, filled position by position.
struct RequestOutputs {
  std::vector<float> logits;         // [n, V]
  std::vector<float> hidden_states;  // [n, H]
  std::vector<double> pooled;        // [H] over the positions so far
  double nll = 0;                    // natural logarithm, summed
  int num_nll_tokens = 0;            // image tokens are not scored
  int next_position = 0;             // those before it are in here
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

// Which tokens may be drawn next: SampleRow::allowed, or nothing for all of them.
using TokenMask = std::optional<std::vector<uint32_t>>;

// Logits that wait for Engine::set_logits.
struct LogitsOffer {
  uint32_t completion_idx = 0;
  std::vector<float> logits;  // [V]
};

// In order per request: any number with tokens or offers, the last one with finish_reason != none.
// The stop token itself is reported as a token; JavaScript leaves it out of the text.
struct Event {
  RequestId id = 0;
  std::vector<TokenEvent> tokens;
  std::shared_ptr<const LogitsOffer> offer;  // Request::edits_logits only
  FinishReason finish_reason = FinishReason::none;
  TokenId matched_stop = -1;  // the stop id that ended it
  RequestTimings timings;     // valid with the last event
  int num_preemptions = 0;
  int num_cached_tokens = 0;  // prompt tokens whose K and V were found, not computed
  std::shared_ptr<const RequestOutputs> outputs;  // with the last event, if any were asked for
  ErrorCode error_code = ErrorCode::internal;     // FinishReason::error only
  std::string error_message;
};

}  // namespace turbomind
