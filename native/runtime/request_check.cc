#include "runtime/request_check.h"

#include <algorithm>
#include <cmath>

namespace turbomind {
namespace {

using Problem = std::optional<Error>;

template <class... Args>
Error invalid(const char* pattern, Args... args) {
  if constexpr (sizeof...(args) == 0) {
    return Error(ErrorCode::invalid_argument, pattern);
  } else {
    return Error(ErrorCode::invalid_argument, format(pattern, args...));
  }
}

Problem check_ids(const char* name, std::span<const TokenId> ids, int vocab_size) {
  for (size_t i = 0; i < ids.size(); ++i) {
    if (ids[i] < 0 || ids[i] >= vocab_size) {
      return invalid("%s[%zu] is %d; the vocabulary has ids 0 to %d", name, i, ids[i],
                     vocab_size - 1);
    }
  }
  return std::nullopt;
}

Problem check_image(const Request& request, size_t image_idx, const RequestRules& rules) {
  const ImageInput& image = request.images[image_idx];
  if (!image.tiles || image.tiles->num_tiles < 1) {
    return invalid("images[%zu] has no tiles", image_idx);
  }
  const image::ImageTiles& tiles = *image.tiles;
  if (tiles.tile_size != rules.tile_size) {
    return invalid("images[%zu] has tiles of %d pixels; the model takes %d", image_idx,
                   tiles.tile_size, rules.tile_size);
  }
  const size_t tile_bytes = size_t{3} * tiles.tile_size * tiles.tile_size;
  if (tiles.pixels.size() != tile_bytes * static_cast<size_t>(tiles.num_tiles)) {
    return invalid("images[%zu] has %zu bytes of pixels; %d tiles need %zu", image_idx,
                   tiles.pixels.size(), tiles.num_tiles,
                   tile_bytes * static_cast<size_t>(tiles.num_tiles));
  }
  if (int64_t{image.num_tokens} != int64_t{tiles.num_tiles} * rules.tokens_per_tile) {
    return invalid("images[%zu] has %d image tokens; %d tiles of %d tokens need %lld", image_idx,
                   image.num_tokens, tiles.num_tiles, rules.tokens_per_tile,
                   static_cast<long long>(tiles.num_tiles) * rules.tokens_per_tile);
  }
  const auto prompt_len = static_cast<int64_t>(request.prompt_tokens.size());
  if (image.token_offset < 0 || int64_t{image.token_offset} + image.num_tokens > prompt_len) {
    return invalid("images[%zu] takes tokens from %d on, %d of them; the prompt has %lld",
                   image_idx, image.token_offset, image.num_tokens,
                   static_cast<long long>(prompt_len));
  }
  return std::nullopt;
}

// Image tokens and images must cover each other exactly.
Problem check_images(const Request& request, const RequestRules& rules) {
  if (!request.images.empty() && rules.tile_size == 0) {
    return invalid("the request has %zu images; the model takes text only", request.images.size());
  }
  const std::vector<TokenId>& prompt = request.prompt_tokens;
  size_t next = 0;  // first prompt token not looked at
  const auto stray = [&](size_t end) -> Problem {
    for (; next < end; ++next) {
      if (rules.tile_size == 0 || prompt[next] != rules.image_token_id) continue;
      return invalid("prompt token %zu is the image token %d, but no image covers it", next,
                     rules.image_token_id);
    }
    return std::nullopt;
  };
  for (size_t i = 0; i < request.images.size(); ++i) {
    if (Problem problem = check_image(request, i, rules)) return problem;
    const auto begin = static_cast<size_t>(request.images[i].token_offset);
    if (begin < next) {
      return invalid("images[%zu] starts at token %zu, inside or before the image before it", i,
                     begin);
    }
    if (Problem problem = stray(begin)) return problem;
    const size_t end = begin + static_cast<size_t>(request.images[i].num_tokens);
    for (; next < end; ++next) {
      if (prompt[next] == rules.image_token_id) continue;
      return invalid("prompt token %zu is %d; images[%zu] needs the image token %d there", next,
                     prompt[next], i, rules.image_token_id);
    }
  }
  return stray(prompt.size());
}

Problem check_bias(std::span<const std::pair<TokenId, float>> logit_bias, int vocab_size) {
  std::vector<TokenId> ids;
  ids.reserve(logit_bias.size());
  for (const auto& [id, bias] : logit_bias) {
    if (!std::isfinite(bias)) {
      return invalid("logitBias of token %d is %g; expected a finite number", id, double{bias});
    }
    ids.push_back(id);
  }
  if (Problem problem = check_ids("logitBias token", ids, vocab_size)) return problem;
  std::sort(ids.begin(), ids.end());
  const auto twice = std::adjacent_find(ids.begin(), ids.end());
  if (twice != ids.end()) return invalid("logitBias names token %d twice", *twice);
  return std::nullopt;
}

Problem check_sampling(const SamplingParams& sampling, int vocab_size) {
  if (!(sampling.repetition_penalty > 0.0F) || !std::isfinite(sampling.repetition_penalty)) {
    return invalid("repetitionPenalty is %g; expected a number above 0",
                   double{sampling.repetition_penalty});
  }
  for (const auto& [name, value] : {std::pair("frequencyPenalty", sampling.frequency_penalty),
                                    std::pair("presencePenalty", sampling.presence_penalty)}) {
    if (!std::isfinite(value))
      return invalid("%s is %g; expected a finite number", name, double{value});
  }
  if (Problem problem = check_bias(sampling.logit_bias, vocab_size)) return problem;
  if (sampling.num_logprobs < 0 || sampling.num_logprobs > vocab_size) {
    return invalid("logprobs is %d; expected 0 to %d", sampling.num_logprobs, vocab_size);
  }
  for (size_t i = 0; i < sampling.bad_words.size(); ++i) {
    if (sampling.bad_words[i].empty()) return invalid("badWords[%zu] is empty", i);
    if (Problem problem = check_ids("badWords token", sampling.bad_words[i], vocab_size)) {
      return problem;
    }
  }
  if (!sampling.do_sample) return std::nullopt;  // greedy uses none of the rest
  if (!(sampling.temperature > 0.0F) || !std::isfinite(sampling.temperature)) {
    return invalid("temperature is %g; expected a number above 0, or doSample: false for greedy",
                   double{sampling.temperature});
  }
  if (sampling.top_k < 0) {
    return invalid("topK is %d; expected 0 (no limit) or more", sampling.top_k);
  }
  if (!(sampling.top_p > 0.0F && sampling.top_p <= 1.0F)) {
    return invalid("topP is %g; expected above 0 and at most 1", double{sampling.top_p});
  }
  if (!(sampling.min_p >= 0.0F && sampling.min_p < 1.0F)) {
    return invalid("minP is %g; expected 0 or more and below 1", double{sampling.min_p});
  }
  return std::nullopt;
}

Problem check_lengths(const Request& request) {
  if (request.max_new_tokens == 0 && request.outputs.any()) {
    // What a completion would need, a prompt alone cannot have.
    if (request.min_new_tokens == 0 && !request.guided && !request.edits_logits)
      return std::nullopt;
    return invalid("maxNewTokens is 0; a request without a completion takes no mask and no logits");
  }
  if (request.max_new_tokens < 1) {
    return invalid("maxNewTokens is %d; expected 1 or more", request.max_new_tokens);
  }
  if (request.min_new_tokens < 0 || request.min_new_tokens > request.max_new_tokens) {
    return invalid("minNewTokens is %d; expected 0 to maxNewTokens = %d", request.min_new_tokens,
                   request.max_new_tokens);
  }
  return std::nullopt;
}

// Up to how many positions `range` covers.
int64_t output_rows(OutputRange range, const Request& request) {
  const auto prompt = static_cast<int64_t>(request.prompt_tokens.size());
  const int64_t computed = prompt + std::max(request.max_new_tokens - 1, 0);
  if (range == OutputRange::none) return 0;
  return range == OutputRange::all ? computed : computed - prompt + 1;
}

Problem check_outputs(const Request& request, const RequestRules& rules) {
  const auto check = [](const char* name, int64_t rows, int64_t columns, int64_t taken) -> Problem {
    const int64_t bytes = rows * columns * static_cast<int64_t>(sizeof(float));
    if (taken + bytes <= kMaxOutputBytes) return std::nullopt;
    constexpr double kMib = 1024.0 * 1024.0;
    return invalid(
        "%s of up to %lld positions of %lld numbers each takes %.1f MiB, beside %.1f MiB of other "
        "outputs; a request may take %.0f MiB: lower maxNewTokens, shorten the prompt or ask for "
        "'generation'",
        name, static_cast<long long>(rows), static_cast<long long>(columns),
        static_cast<double>(bytes) / kMib, static_cast<double>(taken) / kMib,
        static_cast<double>(kMaxOutputBytes) / kMib);
  };
  const int64_t logits = output_rows(request.outputs.logits, request);
  const int64_t hidden = output_rows(request.outputs.hidden_states, request);
  if (Problem problem = check("outputLogits", logits, rules.vocab_size, 0)) return problem;
  const int64_t taken = logits * rules.vocab_size * static_cast<int64_t>(sizeof(float));
  return check("outputLastHiddenState", hidden, rules.hidden_size, taken);
}

}  // namespace

std::optional<Error> check_request(const Request& request, const RequestRules& rules) {
  if (request.prompt_tokens.empty()) {
    return invalid("the prompt has no tokens; at least one is needed");
  }
  // Positions and counts are 32 bit.
  if (request.prompt_tokens.size() > size_t{1} << 30) {
    return Error(ErrorCode::prompt_too_long,
                 format("the prompt has %zu tokens; no session holds that many, shorten it",
                        request.prompt_tokens.size()));
  }
  if (Problem problem = check_ids("prompt token", request.prompt_tokens, rules.vocab_size)) {
    return problem;
  }
  if (Problem problem = check_ids("stopTokenIds", request.stop_token_ids, rules.vocab_size)) {
    return problem;
  }
  if (Problem problem = check_images(request, rules)) return problem;
  if (Problem problem = check_lengths(request)) return problem;
  if (Problem problem = check_outputs(request, rules)) return problem;
  return check_sampling(request.sampling, rules.vocab_size);
}

}  // namespace turbomind
