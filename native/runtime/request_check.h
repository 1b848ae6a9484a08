// Refuses a request that the model cannot run, before it can hurt the others in its batch. Pure
// logic. Engine thread.
#pragma once

#include <optional>

#include "runtime/request.h"

namespace turbomind {

// What the model expects of a request.
struct RequestRules {
  int vocab_size = 0;
  TokenId image_token_id = -1;
  int tile_size = 0;  // pixels; 0: the model takes no images
  int tokens_per_tile = 0;
  int hidden_size = 0;
};

// Most bytes that the outputs of one request may take, logits and hidden states together.
inline constexpr int64_t kMaxOutputBytes = int64_t{1} << 30;

// The first thing wrong with `request`, if any.
std::optional<Error> check_request(const Request& request, const RequestRules& rules);

}  // namespace turbomind
